"""Kernels in the Triton language, each with a PyTorch reference beside it.

A linear layer is y = x̂ ŵᵀ + b. Every GEMM computes a tile of yᵀ, with the weights as the left operand of `tl.dot`: the
tensor cores of Hopper read only that operand from registers, where packed weights are expanded, and few tokens fill the
narrow side of their instructions.

Shapes everywhere: x [M, K] row by row, y [M, N] float16 or bfloat16, weights [N, K] row by row, bias [N] in y's type.
Any M, N and K will do, except that packed weights need a K that is a multiple of their group. Sums of integers are
exact; scales, bias and the sums of groups are float32; the result is rounded once, to y's type.
"""
