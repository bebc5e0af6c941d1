"""Pareto beam search over denoising steps, guided by the error of the final picture."""
