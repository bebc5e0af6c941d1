"""Common part of all GEMMs: which tile a program computes, where its rows are, how the tile is written."""

import triton
import triton.language as tl


@triton.jit
def tile_position(m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Tokens [BLOCK_M] and output features [BLOCK_N] of this program's tile.

    Programs that run at the same time share GROUP_M blocks of tokens, so their weights stay in the L2 cache.
    """
    blocks_m = tl.cdiv(m, BLOCK_M)
    programs_in_group = GROUP_M * tl.cdiv(n, BLOCK_N)
    program = tl.program_id(0)
    first = program // programs_in_group * GROUP_M
    height = tl.minimum(blocks_m - first, GROUP_M)
    within = program % programs_in_group
    tokens = (first + within % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    features = within // height * BLOCK_N + tl.arange(0, BLOCK_N)
    return tokens, features


@triton.jit
def row_pointers(matrix, rows, count, length):
    """Pointers to the rows' first elements; rows beyond the last are the last, so that loads need no mask for them.

    64-bit, because a matrix may hold more than 2^31 elements.
    """
    return matrix + tl.minimum(rows, count - 1).to(tl.int64) * length


@triton.jit
def store_tile(tile, bias, y, tokens, features, m, n, has_bias):
    """Add the bias [N] to a tile [BLOCK_N, BLOCK_M] of yᵀ, float32, and write what lies inside y [M, N]."""
    offset = tl.load(bias + features, mask=features < n * has_bias, other=0.0).to(tl.float32)
    pointers = y + tokens.to(tl.int64)[None, :] * n + features[:, None]
    mask = (features < n)[:, None] & (tokens < m)[None, :]
    tl.store(pointers, (tile + offset[:, None]).to(y.dtype.element_ty), mask=mask)
