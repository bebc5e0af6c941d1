"""Adapters: what the method needs to know of an architecture."""
