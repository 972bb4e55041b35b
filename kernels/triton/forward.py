"""Piecewise sparse attention of one query tile: one online softmax over three kinds of columns.

Order matters. First the centroids of the approximated blocks, whose log-weight stands for the
block's length; then the global first-order term, which is proportional to the mass accumulated so
far, the tail mass; then the tokens of the exact blocks. The tail mass is never kept apart, so it
cannot miss a rescaling.

Which blocks are exact comes from the routing kernel, as a bitmap and a sorted list per query tile.
With INSIDE it is decided here: the mean over a query block's rows of the scores with a centroid is
the proxy score of that pair, so threshold routing needs one number per query block (thresholds.py)
and a list of entries in the program's own scratch row.

Shapes: legend in primitives.py. A query tile holds P whole query blocks or is a part of one; each
row keeps the selection of its own query block either way.
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
    keys_of,
    load_tile,
    online_softmax,
    tokens_of,
)


@triton.jit
def _scores_in_chunks(
    query, rows, row_valid, query_strides, key, columns, column_valid, key_stride_t, key_stride_d,
    D: tl.constexpr, D_PAD: tl.constexpr, D_CHUNK: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """`query[rows] @ key[columns]^T` with both read again D_CHUNK columns at a time. [R, C]

    For float32, whose whole query tile, split into TF32 parts, would not fit the registers.
    """
    score = tl.zeros([rows.shape[0], columns.shape[0]], tl.float32)
    for start in tl.range(0, D_PAD, D_CHUNK):
        d_columns = start + tl.arange(0, D_CHUNK)
        q = load_tile(query, rows, d_columns, query_strides[2], query_strides[3], row_valid, D)
        k = load_tile(key, columns, d_columns, key_stride_t, key_stride_d, column_valid, D)
        score = dot(q, tl.trans(k), score, PRECISION, UPCAST)
    return score


@triton.jit
def _centroid_tile(
    q, query, rows, row_valid, query_strides,
    key_mean, value_mean, kv_row, start, blocks,
    D: tl.constexpr, E: tl.constexpr, D_PAD: tl.constexpr, E_PAD: tl.constexpr,
    D_CHUNK: tl.constexpr, IN_CHUNKS: tl.constexpr, COLUMNS: tl.constexpr,
    DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Unscaled scores with COLUMNS centroids [R, C] and their value means [C, E].

    `key_mean` and `value_mean` point at the head's first block, or are descriptors of all heads
    with the head in `kv_row`.
    """
    columns = start + tl.arange(0, COLUMNS)
    valid = columns < blocks
    if IN_CHUNKS:
        score = _scores_in_chunks(
            query, rows, row_valid, query_strides, key_mean, columns, valid, D, 1,
            D, D_PAD, D_CHUNK, PRECISION, UPCAST,
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
    return score, v


@triton.jit
def _centroids(
    q, query, rows, row_valid, query_strides,
    key_mean, value_mean, kv_row, log_weight, bitmap, first_block, member, query_blocks, blocks,
    scale, row_max, row_sum, out,
    D: tl.constexpr, E: tl.constexpr, D_PAD: tl.constexpr, E_PAD: tl.constexpr,
    D_CHUNK: tl.constexpr, IN_CHUNKS: tl.constexpr, COLUMNS: tl.constexpr,
    WORDS: tl.constexpr, PACK: tl.constexpr, DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Zeroth order: every block that the row's query block did not select, as one column."""
    for start in tl.range(0, blocks, COLUMNS):
        score, v = _centroid_tile(
            q, query, rows, row_valid, query_strides,
            key_mean, value_mean, kv_row, start, blocks, D, E, D_PAD, E_PAD, D_CHUNK, IN_CHUNKS,
            COLUMNS, DESCRIPTORS, PRECISION, UPCAST,
        )  # fmt: skip
        columns = start + tl.arange(0, COLUMNS)
        weight = tl.load(log_weight + columns, mask=columns < blocks, other=float("-inf")) * LOG2E
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
def _select_inside(
    q, query, rows, row_valid, query_strides,
    key_mean, value_mean, kv_row, log_weight, cuts, entries, first_block, member,
    query_len, query_blocks, blocks, free_first, free_last, scale, row_max, row_sum, out,
    BLOCK: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    D_PAD: tl.constexpr, E_PAD: tl.constexpr,
    D_CHUNK: tl.constexpr, IN_CHUNKS: tl.constexpr, COLUMNS: tl.constexpr,
    PACK: tl.constexpr, DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Zeroth order and threshold routing in one: what is above the cut goes to `entries`.

    Each query block attends its best free block at least. Whether any is above the cut is known at
    the end only; if none is, which is rare, the best one's column is taken out of the sums again.
    That costs no accuracy: the tokens of a block weigh no less than its centroid (Jensen), so what
    is taken out is never large against the result.
    """
    block = first_block + tl.arange(0, PACK)
    block_valid = block < query_blocks
    cut = tl.load(cuts + tl.arange(0, PACK), mask=block_valid, other=float("inf"))  # [P]
    length = tl.maximum(tl.minimum(query_len - block * BLOCK, BLOCK), 1).to(tl.float32)
    # Where the search for the best begins, so that ties favour neither early nor late blocks.
    origin = (block.to(tl.int64) * blocks // query_blocks).to(tl.int32)
    count = 0
    routed = tl.zeros([PACK], tl.int32)
    best = tl.full([PACK], float("-inf"), tl.float32)
    best_distance = tl.zeros([PACK], tl.int32)
    for start in tl.range(0, blocks, COLUMNS):
        score, v = _centroid_tile(
            q, query, rows, row_valid, query_strides,
            key_mean, value_mean, kv_row, start, blocks, D, E, D_PAD, E_PAD, D_CHUNK,
            IN_CHUNKS, COLUMNS, DESCRIPTORS, PRECISION, UPCAST,
        )  # fmt: skip
        score *= scale
        columns = start + tl.arange(0, COLUMNS)
        weight = tl.load(log_weight + columns, mask=columns < blocks, other=float("-inf"))
        # Rows beyond the end are zero and so is their score.
        proxy = _per_query_block(score, PACK) / length[:, None] * LN2  # [P, C]
        present = (weight > float("-inf"))[None, :] & block_valid[:, None]
        free = ((columns >= free_first) & (columns < free_last))[None, :]
        selected = present & ((proxy > cut[:, None]) | ~free)  # [P, C]
        routed += tl.sum((selected & free).to(tl.int32), axis=1)

        proxy = tl.where(present & free, proxy, float("-inf"))
        tile_best = tl.max(proxy, axis=1)
        distance = (columns[None, :] - origin[:, None] + blocks) % blocks
        distance = tl.where(proxy == tile_best[:, None], distance, blocks)
        nearest = tl.min(distance, axis=1)
        better = (tile_best > best) | ((tile_best == best) & (nearest < best_distance))
        best_distance = tl.where(better, nearest, best_distance)
        best = tl.maximum(best, tile_best)

        members = tl.sum(selected.to(tl.int32) << tl.arange(0, PACK)[:, None], axis=0)  # [C]
        taken = members != 0
        position = count + tl.cumsum(taken.to(tl.int32), axis=0) - 1
        tl.store(entries + position, columns | (members << ENTRY_BITS), mask=taken)
        count += tl.sum(taken.to(tl.int32), axis=0)

        bias = _per_row(tl.where(selected, float("-inf"), (weight * LOG2E)[None, :]), member, PACK)
        row_max, row_sum, out = online_softmax(
            score + bias, v, row_max, row_sum, out, PRECISION, UPCAST
        )
    none = (best > float("-inf")) & (routed == 0)
    missing = tl.sum(none.to(tl.int32), axis=0)
    for step in tl.range(0, tl.where(missing > 0, PACK, 0)):
        own = none & (tl.arange(0, PACK) == step)
        column = tl.sum(tl.where(own, (origin + best_distance) % blocks, 0), axis=0)
        wanted = tl.sum(own.to(tl.int32), axis=0) > 0
        score, v = _centroid_tile(
            q, query, rows, row_valid, query_strides,
            key_mean, value_mean, kv_row, column // COLUMNS * COLUMNS, blocks,
            D, E, D_PAD, E_PAD, D_CHUNK, IN_CHUNKS, COLUMNS, DESCRIPTORS, PRECISION, UPCAST,
        )  # fmt: skip
        columns = column // COLUMNS * COLUMNS + tl.arange(0, COLUMNS)
        weight = tl.load(log_weight + columns, mask=columns < blocks, other=float("-inf"))
        removed = tl.where((columns == column) & wanted, weight * LOG2E, float("-inf"))[None, :]
        removed = tl.where((member == step)[:, None], removed, float("-inf"))
        shift = tl.where(row_max == float("-inf"), 0.0, row_max)
        mass = tl.exp2(score * scale + removed - shift[:, None])  # [R, C]
        row_sum = tl.maximum(row_sum - tl.sum(mass, axis=1), 0.0)
        out = dot((-mass).to(v.dtype), v, out, PRECISION, UPCAST)
        # At the end of the list: only there sorting is given up, for a block of its own.
        bit = tl.sum(own.to(tl.int32) << tl.arange(0, PACK), axis=0)
        tl.store(entries + count, column | (bit << ENTRY_BITS), mask=wanted)
        count += wanted.to(tl.int32)
    # The list is read by other threads than those that wrote it.
    tl.debug_barrier()
    return count, row_max, row_sum, out


@triton.jit
def _per_query_block(score, PACK: tl.constexpr):
    """Sum over the rows of each query block of a tile. [R, C] -> [P, C]"""
    if PACK == 1:
        total = tl.sum(score, axis=0)[None, :]
    else:
        shape: tl.constexpr = [PACK, score.shape[0] // PACK, score.shape[1]]
        total = tl.sum(tl.reshape(score, shape), axis=1)
    return total


@triton.jit
def _per_row(bias, member, PACK: tl.constexpr):
    """A value per query block of a tile for each of its rows. [P, C] -> [R or 1, C]"""
    if PACK > 1:
        shape: tl.constexpr = [PACK, member.shape[0] // PACK, bias.shape[1]]
        spread = tl.broadcast_to(bias[:, None, :], shape)
        bias = tl.reshape(spread, [member.shape[0], bias.shape[1]])
    return bias


@triton.jit
def _first_order(
    query, rows, row_valid, query_strides, first_order, row_sum, out,
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
        q = load_tile(
            query, rows, d_columns, query_strides[2], query_strides[3], row_valid, D
        )  # [R, D_CHUNK]
        matrix = load_tile(first_order, d_columns, e_columns, E, 1, d_columns < D, E)
        out = dot(q, matrix, out, PRECISION, UPCAST)
    return out * row_sum[:, None]


@triton.jit
def _exact_blocks(
    q, query, rows, row_valid, query_strides,
    key, value, key_mask, permutation, indices, count, member, batch, kv_head, key_len, scale,
    key_strides, value_strides, mask_strides, row_max, row_sum, out,
    KEY_BLOCK: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    D_PAD: tl.constexpr, E_PAD: tl.constexpr,
    D_CHUNK: tl.constexpr, IN_CHUNKS: tl.constexpr, KEYS: tl.constexpr, PACK: tl.constexpr,
    DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Tokens of the selected blocks, KEYS at a time.

    `key` and `value` point at the head's first element, or are descriptors of the whole tensors.
    """
    parts: tl.constexpr = KEY_BLOCK // KEYS
    columns = tl.arange(0, KEYS)
    for step in tl.range(0, count * parts):
        entry = tl.load(indices + step // parts)
        start = (entry & ENTRY_MASK) * KEY_BLOCK + (step % parts) * KEYS
        # Masked keys are loaded as zeros: they may hold anything, NaN included.
        base, tokens, valid = keys_of(
            permutation, key_mask, start, columns, key_len, mask_strides[1]
        )  # [C]
        if IN_CHUNKS:
            score = _scores_in_chunks(
                query, rows, row_valid, query_strides,
                key + base * key_strides[2], tokens, valid, key_strides[2], key_strides[3],
                D, D_PAD, D_CHUNK, PRECISION, UPCAST,
            )  # fmt: skip
        else:
            if DESCRIPTORS:
                k = key.load([batch, kv_head, start, 0]).reshape([KEYS, D_PAD])  # [C, D]
            else:
                k = load_tile(
                    key + base * key_strides[2], tokens, tl.arange(0, D_PAD),
                    key_strides[2], key_strides[3], valid, D,
                )  # [C, D]  # fmt: skip
            zero = tl.zeros([rows.shape[0], KEYS], tl.float32)
            score = dot(q, tl.trans(k), zero, PRECISION, UPCAST)  # [R, C]
        if DESCRIPTORS:
            v = value.load([batch, kv_head, start, 0]).reshape([KEYS, E_PAD])  # [C, E]
        else:
            v = load_tile(
                value + base * value_strides[2], tokens, tl.arange(0, E_PAD),
                value_strides[2], value_strides[3], valid, E,
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
        "head_start", "query_len", "key_len", "query_blocks", "blocks", "free_first", "free_last",
        "capacity", "index_tiles",
    ]
)  # fmt: skip
def forward_kernel(
    query,  # [B, H, Tq, D]
    key,  # [B, G, Tk, D]: a pointer, or with DESCRIPTORS a descriptor
    value,  # [B, G, Tk, E]: likewise
    key_mask,  # uint8 [B, Tk] or None; must be None with DESCRIPTORS
    permutation,  # int32 or int64 [T] or None; likewise
    key_mean,  # [kv heads, blocks, D] in the input dtype: a pointer or a descriptor
    value_mean,  # [kv heads, blocks, E] in the input dtype: likewise
    log_weight,  # float32 [kv heads, blocks]
    first_order,  # [kv heads, D, E] in the input dtype, or None
    indices,  # int32 [heads, index_tiles, capacity]; with INSIDE made here
    counts,  # int32 [heads, index_tiles], or None with INSIDE
    bitmap,  # int32 [heads, query blocks, WORDS], or None with INSIDE
    cuts,  # float32 [heads, query blocks] with INSIDE, or None
    out,  # out [B, H, Tq, E]
    lse,  # out float32 [B, H, Tq]
    query_strides, key_strides, value_strides, out_strides, mask_strides,
    head_start,  # first query head of this launch, counted over batch and heads
    heads,  # H
    group_size,  # query heads per key/value head
    query_len, key_len, query_blocks, blocks,
    free_first, free_last,  # key blocks that routing chooses from; the others are always exact
    capacity, index_tiles,
    scale,
    TAIL: tl.constexpr,
    INSIDE: tl.constexpr,
    BLOCK: tl.constexpr,  # tokens per query block
    KEY_BLOCK: tl.constexpr,
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
        key += batch * key_strides[0] + kv_head * key_strides[1]
        value += batch * value_strides[0] + kv_head * value_strides[1]
    local_kv = ((head // group_size) - (head_start // group_size)).to(tl.int64)
    pack: tl.constexpr = max(ROWS // BLOCK, 1)  # query blocks per query tile
    split: tl.constexpr = max(BLOCK // ROWS, 1)  # query tiles per query block

    places = tl.arange(0, ROWS)
    first_row = tile * ROWS
    member = places // BLOCK  # which query block of the tile a row belongs to
    base, rows, row_valid = tokens_of(permutation, first_row, places, query_len)
    query += batch * query_strides[0] + own_head * query_strides[1] + base * query_strides[2]
    q = None
    if not IN_CHUNKS:
        q = load_tile(
            query, rows, tl.arange(0, D_PAD), query_strides[2], query_strides[3], row_valid, D
        )  # [R, D]

    row_max = tl.full([ROWS], float("-inf"), tl.float32)  # of base-2 logits
    row_sum = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, E_PAD], tl.float32)
    index_row = local_head.to(tl.int64) * index_tiles + tile // split
    count = 0
    if not INSIDE:
        count = tl.load(counts + index_row)
    if TAIL:
        if not DESCRIPTORS:
            key_mean += local_kv * blocks * D
            value_mean += local_kv * blocks * E
        first_block = (tile // split) * pack
        block_row = local_head.to(tl.int64) * query_blocks + first_block
        if INSIDE:
            count, row_max, row_sum, acc = _select_inside(
                q, query, rows, row_valid, query_strides,
                key_mean, value_mean, local_kv.to(tl.int32),
                log_weight + local_kv * blocks, cuts + block_row, indices + index_row * capacity,
                first_block, member, query_len, query_blocks, blocks, free_first, free_last,
                scale * LOG2E, row_max, row_sum, acc,
                BLOCK, D, E, D_PAD, E_PAD, D_CHUNK, IN_CHUNKS, CENTROIDS, pack, DESCRIPTORS,
                PRECISION, UPCAST,
            )  # fmt: skip
        else:
            row_max, row_sum, acc = _centroids(
                q, query, rows, row_valid, query_strides,
                key_mean, value_mean, local_kv.to(tl.int32),
                log_weight + local_kv * blocks, bitmap + block_row * WORDS,
                first_block, member, query_blocks, blocks, scale * LOG2E, row_max, row_sum, acc,
                D, E, D_PAD, E_PAD, D_CHUNK, IN_CHUNKS, CENTROIDS, WORDS, pack, DESCRIPTORS,
                PRECISION, UPCAST,
            )  # fmt: skip
        if first_order is not None:
            acc = _first_order(
                query, rows, row_valid, query_strides,
                first_order + local_kv * (D * E), row_sum, acc,
                D, E, D_PAD, E_PAD, D_CHUNK, PRECISION, UPCAST,
            )  # fmt: skip
    if key_mask is not None:
        key_mask += batch * mask_strides[0]
    row_max, row_sum, acc = _exact_blocks(
        q, query, rows, row_valid, query_strides,
        key, value, key_mask, permutation, indices + index_row * capacity, count, member,
        batch.to(tl.int32), kv_head.to(tl.int32), key_len, scale * LOG2E,
        key_strides, value_strides, mask_strides, row_max, row_sum, acc,
        KEY_BLOCK, D, E, D_PAD, E_PAD, D_CHUNK, IN_CHUNKS, KEYS, pack, DESCRIPTORS,
        PRECISION, UPCAST,
    )  # fmt: skip

    # A row without any valid key: zeros and -inf.
    empty = row_sum == 0.0
    acc = acc / tl.where(empty, 1.0, row_sum)[:, None]
    log_sum = tl.where(empty, float("-inf"), row_max * LN2 + tl.log(tl.where(empty, 1.0, row_sum)))
    out += batch * out_strides[0] + own_head * out_strides[1] + base * out_strides[2]
    columns = tl.arange(0, E_PAD)
    tl.store(
        out + rows[:, None] * out_strides[2] + columns[None, :] * out_strides[3],
        acc.to(out.dtype.element_ty),
        mask=row_valid[:, None] & (columns < E)[None, :],
    )
    lse += (batch * heads + own_head) * query_len + base
    tl.store(lse + rows, log_sum, mask=row_valid)
