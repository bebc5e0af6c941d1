"""Adapters: the method's interface to an architecture."""
