"""Kernels for formats that no Q/DQ graph accelerates, and the TensorRT plugin around them."""
