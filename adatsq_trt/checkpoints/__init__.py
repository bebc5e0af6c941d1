"""Checkpoints that users bring: where their parts lie, whether they are whole, and how they become a model."""
