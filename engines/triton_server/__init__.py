"""Deployment in Triton server: model repositories, the models in them, and the server that a wheel carries."""
