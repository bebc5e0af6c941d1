"""The stages of a run: each reads files, calls the rooms of the house, and writes files."""
