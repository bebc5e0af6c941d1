"""The world of coloured digits: its prompts, its pictures, its judge, and the training of models on it."""
