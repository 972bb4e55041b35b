"""Piecewise sparse attention of one query tile: one online softmax over three kinds of columns.

Order matters. First the centroids of the approximated blocks, whose log-weight stands for the
block's length; then the global first-order term, which is proportional to the mass accumulated so
far, the tail mass; then the tokens of the exact blocks. The tail mass is never kept apart, so it
cannot miss a rescaling.

Shapes: legend in primitives.py. A query tile holds PACK whole query blocks or is a part of one;
each row keeps the selection of its own query block either way.
"""

# mypy: disable-error-code="no-untyped-def,misc,no-any-return"

import triton
import triton.language as tl

from .primitives import (
    ENTRY_BITS,
    ENTRY_MASK,
    LN2,
    LOG2E,
    bits_of_blocks,
    dot,
    key_validity,
    load_tile,
    online_softmax,
)


@triton.jit
def _scores_in_chunks(
    query, rows, row_valid, query_stride_t, query_stride_d,
    key, columns, column_valid, key_stride_t, key_stride_d,
    D: tl.constexpr, D_PAD: tl.constexpr, D_CHUNK: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """`query[rows] @ key[columns]^T` with both read again D_CHUNK columns at a time. [R, C]

    For float32, whose whole query tile, split into TF32 parts, would not fit the registers.
    """
    score = tl.zeros([rows.shape[0], columns.shape[0]], tl.float32)
    for start in tl.range(0, D_PAD, D_CHUNK):
        d_columns = start + tl.arange(0, D_CHUNK)
        q = load_tile(query, rows, d_columns, query_stride_t, query_stride_d, row_valid, D)
        k = load_tile(key, columns, d_columns, key_stride_t, key_stride_d, column_valid, D)
        score = dot(q, tl.trans(k), score, PRECISION, UPCAST)
    return score


@triton.jit
def _centroids(
    q, query, rows, row_valid, query_stride_t, query_stride_d,
    key_mean, value_mean, kv_row, log_weight, bitmap, first_block, member, query_blocks, blocks,
    scale, row_max, row_sum, out,
    D: tl.constexpr, E: tl.constexpr, D_PAD: tl.constexpr, E_PAD: tl.constexpr,
    D_CHUNK: tl.constexpr, IN_CHUNKS: tl.constexpr, COLUMNS: tl.constexpr,
    WORDS: tl.constexpr, PACK: tl.constexpr, DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Zeroth order: every block that the row's query block did not select, as one column.

    `key_mean` and `value_mean` point at the head's first block, or are descriptors of all heads
    with the head in `kv_row`.
    """
    for start in tl.range(0, blocks, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        valid = columns < blocks
        if IN_CHUNKS:
            score = _scores_in_chunks(
                query, rows, row_valid, query_stride_t, query_stride_d,
                key_mean, columns, valid, D, 1, D, D_PAD, D_CHUNK, PRECISION, UPCAST,
            )  # fmt: skip
        else:
            if DESCRIPTORS:
                k = key_mean.load([kv_row, start, 0]).reshape([COLUMNS, D_PAD])  # [C, D]
            else:
                k = load_tile(key_mean, columns, tl.arange(0, D_PAD), D, 1, valid, D)  # [C, D]
            zero = tl.zeros([rows.shape[0], COLUMNS], tl.float32)
            score = dot(q, tl.trans(k), zero, PRECISION, UPCAST)  # [R, C]
        if DESCRIPTORS:
            v = value_mean.load([kv_row, start, 0]).reshape([COLUMNS, E_PAD])  # [C, E]
        else:
            v = load_tile(value_mean, columns, tl.arange(0, E_PAD), E, 1, valid, E)  # [C, E]
        weight = tl.load(log_weight + columns, mask=valid, other=float("-inf")) * LOG2E
        exact = bits_of_blocks(bitmap, columns, blocks)
        bias = tl.where(exact != 0, float("-inf"), weight)[None, :]  # [1, C]
        for other in tl.static_range(1, PACK):
            # Rows of query blocks beyond the end have no bitmap; their result is not stored.
            row = tl.minimum(first_block + other, query_blocks - 1) - first_block
            exact = bits_of_blocks(bitmap + row * WORDS, columns, blocks)
            its_bias = tl.where(exact != 0, float("-inf"), weight)[None, :]
            bias = tl.where((member == other)[:, None], its_bias, bias)  # [R, C]
        row_max, row_sum, out = online_softmax(
            score * scale + bias, v, row_max, row_sum, out, PRECISION, UPCAST
        )
    return row_max, row_sum, out


@triton.jit
def _first_order(
    query, rows, row_valid, stride_t, stride_d, first_order, row_sum, out,
    D: tl.constexpr, E: tl.constexpr, D_PAD: tl.constexpr, E_PAD: tl.constexpr,
    D_CHUNK: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """`out + row_sum * (q @ first_order)`, D_CHUNK rows of the matrix at a time.

    `out` is divided by the mass and multiplied by it again so that it can be the accumulator: a
    second one would not fit the registers, and `row_sum * q` could overflow float16.
    """
    out /= tl.where(row_sum > 0, row_sum, 1.0)[:, None]  # all zeros where there is no mass
    e_columns = tl.arange(0, E_PAD)
    for start in tl.range(0, D_PAD, D_CHUNK):
        d_columns = start + tl.arange(0, D_CHUNK)
        q = load_tile(query, rows, d_columns, stride_t, stride_d, row_valid, D)  # [R, D_CHUNK]
        matrix = load_tile(first_order, d_columns, e_columns, E, 1, d_columns < D, E)
        out = dot(q, matrix, out, PRECISION, UPCAST)
    return out * row_sum[:, None]


@triton.jit
def _exact_blocks(
    q, query, rows, row_valid, query_stride_t, query_stride_d,
    key, value, key_mask, indices, count, member, batch, kv_head, key_len, scale,
    key_stride_t, key_stride_d, value_stride_t, value_stride_d, mask_stride_t,
    row_max, row_sum, out,
    BLOCK: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    D_PAD: tl.constexpr, E_PAD: tl.constexpr,
    D_CHUNK: tl.constexpr, IN_CHUNKS: tl.constexpr, KEYS: tl.constexpr, PACK: tl.constexpr,
    DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Tokens of the selected blocks, KEYS at a time.

    `key` and `value` point at the head's first element, or are descriptors of the whole tensors.
    """
    parts: tl.constexpr = BLOCK // KEYS
    columns = tl.arange(0, KEYS)
    for step in tl.range(0, count * parts):
        entry = tl.load(indices + step // parts)
        start = (entry & ENTRY_MASK) * BLOCK + (step % parts) * KEYS
        first = tl.cast(start, tl.int64)
        # Masked keys are loaded as zeros: they may hold anything, NaN included.
        valid = key_validity(key_mask, start, columns, key_len, mask_stride_t)  # [C]
        if IN_CHUNKS:
            score = _scores_in_chunks(
                query, rows, row_valid, query_stride_t, query_stride_d,
                key + first * key_stride_t, columns, valid, key_stride_t, key_stride_d,
                D, D_PAD, D_CHUNK, PRECISION, UPCAST,
            )  # fmt: skip
        else:
            if DESCRIPTORS:
                k = key.load([batch, kv_head, start, 0]).reshape([KEYS, D_PAD])  # [C, D]
            else:
                k = load_tile(
                    key + first * key_stride_t, columns, tl.arange(0, D_PAD),
                    key_stride_t, key_stride_d, valid, D,
                )  # [C, D]  # fmt: skip
            zero = tl.zeros([rows.shape[0], KEYS], tl.float32)
            score = dot(q, tl.trans(k), zero, PRECISION, UPCAST)  # [R, C]
        if DESCRIPTORS:
            v = value.load([batch, kv_head, start, 0]).reshape([KEYS, E_PAD])  # [C, E]
        else:
            v = load_tile(
                value + first * value_stride_t, columns, tl.arange(0, E_PAD),
                value_stride_t, value_stride_d, valid, E,
            )  # [C, E]  # fmt: skip
        bias = tl.where(valid, 0.0, float("-inf"))[None, :]
        if PACK > 1:
            chosen = (entry >> (member + ENTRY_BITS)) & 1  # [R]
            bias = tl.where(chosen[:, None] != 0, bias, float("-inf"))  # [R, C]
        row_max, row_sum, out = online_softmax(
            score * scale + bias, v, row_max, row_sum, out, PRECISION, UPCAST
        )
    return row_max, row_sum, out


@triton.jit(
    do_not_specialize=[
        "head_start", "query_len", "key_len", "query_blocks", "blocks", "capacity", "index_tiles"
    ]
)  # fmt: skip
def forward_kernel(
    query,  # [B, H, Tq, D]
    key,  # [B, G, Tk, D]: a pointer, or with DESCRIPTORS a descriptor
    value,  # [B, G, Tk, E]: likewise
    key_mask,  # uint8 [B, Tk] or None; must be None with DESCRIPTORS
    key_mean,  # [kv heads, blocks, D] in the input dtype: a pointer or a descriptor
    value_mean,  # [kv heads, blocks, E] in the input dtype: likewise
    log_weight,  # float32 [kv heads, blocks]
    first_order,  # [kv heads, D, E] in the input dtype, or None
    indices,  # int32 [heads, index_tiles, capacity]
    counts,  # int32 [heads, index_tiles]
    bitmap,  # int32 [heads, query blocks, WORDS]
    out,  # out [B, H, Tq, E]
    lse,  # out float32 [B, H, Tq]
    query_stride_b, query_stride_h, query_stride_t, query_stride_d,
    key_stride_b, key_stride_h, key_stride_t, key_stride_d,
    value_stride_b, value_stride_h, value_stride_t, value_stride_d,
    out_stride_b, out_stride_h, out_stride_t,
    mask_stride_b, mask_stride_t,
    head_start,  # first query head of this launch, counted over batch and heads
    heads,  # H
    group_size,  # query heads per key/value head
    query_len, key_len, query_blocks, blocks, capacity, index_tiles,
    scale,
    TAIL: tl.constexpr,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    D_PAD: tl.constexpr,
    E_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    CENTROIDS: tl.constexpr,
    D_CHUNK: tl.constexpr,
    IN_CHUNKS: tl.constexpr,
    WORDS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    tile, local_head = tl.program_id(0), tl.program_id(1)
    head = head_start + local_head
    batch, own_head = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    kv_head = own_head // group_size
    if not DESCRIPTORS:
        key += batch * key_stride_b + kv_head * key_stride_h
        value += batch * value_stride_b + kv_head * value_stride_h
    local_kv = ((head // group_size) - (head_start // group_size)).to(tl.int64)
    pack: tl.constexpr = max(ROWS // BLOCK, 1)  # query blocks per query tile
    split: tl.constexpr = max(BLOCK // ROWS, 1)  # query tiles per query block

    rows = tl.arange(0, ROWS)
    first_row = tile * ROWS
    row_valid = first_row + rows < query_len
    member = rows // BLOCK  # which query block of the tile a row belongs to
    query += (
        batch * query_stride_b + own_head * query_stride_h + first_row.to(tl.int64) * query_stride_t
    )
    q = None
    if not IN_CHUNKS:
        q = load_tile(
            query, rows, tl.arange(0, D_PAD), query_stride_t, query_stride_d, row_valid, D
        )  # [R, D]

    row_max = tl.full([ROWS], float("-inf"), tl.float32)  # of base-2 logits
    row_sum = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, E_PAD], tl.float32)
    if TAIL:
        if not DESCRIPTORS:
            key_mean += local_kv * blocks * D
            value_mean += local_kv * blocks * E
        first_block = (tile // split) * pack
        bitmap_row = local_head.to(tl.int64) * query_blocks + first_block
        row_max, row_sum, acc = _centroids(
            q, query, rows, row_valid, query_stride_t, query_stride_d,
            key_mean, value_mean, local_kv.to(tl.int32),
            log_weight + local_kv * blocks, bitmap + bitmap_row * WORDS,
            first_block, member, query_blocks, blocks, scale * LOG2E, row_max, row_sum, acc,
            D, E, D_PAD, E_PAD, D_CHUNK, IN_CHUNKS, CENTROIDS, WORDS, pack, DESCRIPTORS,
            PRECISION, UPCAST,
        )  # fmt: skip
        if first_order is not None:
            acc = _first_order(
                query, rows, row_valid, query_stride_t, query_stride_d,
                first_order + local_kv * (D * E), row_sum, acc,
                D, E, D_PAD, E_PAD, D_CHUNK, PRECISION, UPCAST,
            )  # fmt: skip
    if key_mask is not None:
        key_mask += batch * mask_stride_b
    index_row = local_head.to(tl.int64) * index_tiles + tile // split
    row_max, row_sum, acc = _exact_blocks(
        q, query, rows, row_valid, query_stride_t, query_stride_d,
        key, value, key_mask, indices + index_row * capacity, tl.load(counts + index_row), member,
        batch.to(tl.int32), kv_head.to(tl.int32), key_len, scale * LOG2E,
        key_stride_t, key_stride_d, value_stride_t, value_stride_d, mask_stride_t,
        row_max, row_sum, acc,
        BLOCK, D, E, D_PAD, E_PAD, D_CHUNK, IN_CHUNKS, KEYS, pack, DESCRIPTORS,
        PRECISION, UPCAST,
    )  # fmt: skip

    # A row without any valid key: zeros and -inf.
    empty = row_sum == 0.0
    acc = acc / tl.where(empty, 1.0, row_sum)[:, None]
    log_sum = tl.where(empty, float("-inf"), row_max * LN2 + tl.log(tl.where(empty, 1.0, row_sum)))
    out += batch * out_stride_b + own_head * out_stride_h + first_row.to(tl.int64) * out_stride_t
    columns = tl.arange(0, E_PAD)
    tl.store(
        out + rows[:, None] * out_stride_t + columns[None, :],
        acc.to(out.dtype.element_ty),
        mask=row_valid[:, None] & (columns < E)[None, :],
    )
    lse += (batch * heads + own_head) * query_len + first_row
    tl.store(lse + rows, log_sum, mask=row_valid)
