"""Backends: libraries that compile graphs and libraries that run them."""
