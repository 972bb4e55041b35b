"""Pieces that several kernels share.

Legend for the trailing shape comments of this folder:
    R rows of a query tile, C columns (keys or key blocks) of a score tile, D head_dim of query and
    key, E head_dim of value (both padded to powers of two), N padded number of key blocks, P query
    blocks per query tile.
What is called `..._strides` is a tuple with one stride per axis of the tensor.
"""

# mypy: disable-error-code="no-untyped-def,misc,no-any-return"

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# An index entry holds a key block in its low bits and, above, one bit per query block of the tile.
ENTRY_BITS = tl.constexpr(16)
ENTRY_MASK = tl.constexpr((1 << 16) - 1)


@triton.jit
def load_tile(pointer, rows, columns, row_stride, column_stride, row_valid, WIDTH: tl.constexpr):
    """`pointer[rows, columns]`, zero in invalid rows and in columns from WIDTH on."""
    valid = row_valid[:, None]
    if columns.shape[0] != WIDTH:
        valid = valid & (columns < WIDTH)[None, :]
    offsets = rows[:, None] * row_stride + columns[None, :] * column_stride
    return tl.load(pointer + offsets, mask=valid, other=0.0)


@triton.jit
def tokens_of(permutation, start, rows, length):
    """Tokens at the places `start + rows`: (base, rows, valid), token `base + rows[n]` each.

    In the tokens' own order `rows` stays a constant and the 64-bit `base` moves, which is what
    pointers are cheapest to make from. A permutation is looked up, and what it holds is checked:
    a wrong entry may cost a token but reads no foreign memory.
    """
    valid = start + rows < length
    base = tl.cast(start, tl.int64)
    if permutation is not None:
        tokens = tl.load(permutation + base + rows, mask=valid, other=-1).to(tl.int64)
        valid = (tokens >= 0) & (tokens < length)
        rows = tokens
        base = 0
    return base, rows, valid


@triton.jit
def keys_of(permutation, key_mask, start, rows, key_len, mask_stride):
    """`tokens_of`, valid only where the key also takes part. `key_mask` points at one batch."""
    base, rows, valid = tokens_of(permutation, start, rows, key_len)
    if key_mask is not None:
        offsets = (base + rows).to(tl.int64) * mask_stride
        present = tl.load(key_mask + offsets, mask=valid, other=0)
        valid = valid & (present != 0)
    return base, rows, valid


@triton.jit
def dot(a, b, accumulator, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """`accumulator + a @ b` in float32.

    UPCAST is for the interpreter, which computes silently wrong products of bfloat16.
    """
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def online_softmax(
    score, value, row_max, row_sum, out, PRECISION: tl.constexpr, UPCAST: tl.constexpr
):
    """Add columns with base-2 logits `score` [R, C] and rows `value` [C, E] to a running softmax.

    Everything accumulated so far, of whichever kind, is in `row_sum` and `out` and is rescaled
    here and only here. A row that has seen nothing but -inf stays at (-inf, 0, 0).
    """
    new_max = tl.maximum(row_max, tl.max(score, axis=1))  # [R]
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)
    weight = tl.exp2(score - shift[:, None])  # [R, C]
    decay = tl.exp2(row_max - shift)  # [R]
    row_sum = row_sum * decay + tl.sum(weight, axis=1)
    out = dot(weight.to(value.dtype), value, out * decay[:, None], PRECISION, UPCAST)  # [R, E]
    return new_max, row_sum, out


@triton.jit
def bits_of_blocks(bitmap, columns, blocks):
    """Whether the bit of each key block in `columns` is set in one bitmap row. int32 0 or 1. [C]"""
    word = tl.load(bitmap + columns // 32, mask=columns < blocks, other=0)
    return (word >> (columns % 32)) & 1
