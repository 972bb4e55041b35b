"""What routing and the tail-mass correction know of the queries: block means and mean squares.

Shapes (legend in primitives.py): Q query blocks per program, D_CHUNK columns at a time.
"""

# mypy: disable-error-code="no-untyped-def,misc,no-any-return"

import triton
import triton.language as tl

from .primitives import load_tile, tokens_of


@triton.jit
def query_means(
    query, permutation, columns, first_block, query_len, strides,
    BLOCK: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Some columns of the means of the query blocks `first_block ..`, float32. [Q, D_CHUNK]"""
    _, _, stride_t, stride_d = strides
    rows = tl.arange(0, ROWS)
    start = first_block * BLOCK
    total = tl.zeros([ROWS, columns.shape[0]], tl.float32)
    for token in tl.range(0, BLOCK):
        base, offset, valid = tokens_of(permutation, start, rows * BLOCK + token, query_len)
        own = query + base * stride_t
        total += load_tile(own, offset, columns, stride_t, stride_d, valid, D).to(tl.float32)
    length = tl.minimum(query_len - (start + rows * BLOCK), BLOCK)
    return total / tl.maximum(length, 1).to(tl.float32)[:, None]


@triton.jit(do_not_specialize=["head_start", "kv_heads", "group_size", "query_len", "part_rows"])
def query_energy_kernel(
    query,  # [B, H, Tq, D]
    energy,  # out float32 [kv heads, PARTS, D]: summands of the mean of q_d^2
    query_strides,
    head_start,  # first key/value head of this launch, counted over batch and heads
    kv_heads, group_size, query_len,
    part_rows,  # queries per program and head
    share,  # 1 / number of queries that share a key head
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """The order of the sums is fixed: results repeat bit for bit. Places do not matter here."""
    part, local_head = tl.program_id(0), tl.program_id(1)
    head = head_start + local_head
    batch, kv_head = (head // kv_heads).to(tl.int64), (head % kv_heads).to(tl.int64)
    stride_b, stride_h, stride_t, stride_d = query_strides
    query += batch * stride_b + kv_head * group_size * stride_h
    rows, columns = tl.arange(0, ROWS), tl.arange(0, D_PAD)
    last = tl.minimum((part + 1) * part_rows, query_len)
    total = tl.zeros([ROWS, D_PAD], tl.float32)
    for member in tl.range(0, group_size):
        own = query + tl.cast(member, tl.int64) * stride_h
        for start in tl.range(part * part_rows, last, ROWS):
            first = own + tl.cast(start, tl.int64) * stride_t
            valid = start + rows < last
            q = load_tile(first, rows, columns, stride_t, stride_d, valid, D)
            q = q.to(tl.float32)
            total += q * q
    row = (local_head.to(tl.int64) * tl.num_programs(0) + part) * D
    tl.store(energy + row + columns, tl.sum(total, axis=0) * share, mask=columns < D)
