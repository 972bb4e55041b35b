"""Which key blocks each query block attends exactly: scores and selection in one kernel.

A program scores 16 query blocks against all key blocks into its own few rows of scratch memory,
which stay in the cache, and then selects from them. So no N x N map is written, whatever N is.

Shapes (legend in primitives.py): Q query blocks per program, S of them selected for at a time,
N padded number of key blocks, W = N / 32 bitmap words, P query blocks per query tile.
"""

# mypy: disable-error-code="no-untyped-def,misc,no-any-return"

import triton
import triton.language as tl

from .primitives import ENTRY_BITS, dot, load_tile


@triton.jit
def _query_means(
    query, columns, first_block, query_len, stride_t, stride_d,
    BLOCK: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Some columns of the means of the query blocks `first_block ..`, float32. [Q, D_CHUNK]"""
    rows = tl.arange(0, ROWS)
    start = first_block * BLOCK
    base = query + tl.cast(start, tl.int64) * stride_t
    total = tl.zeros([ROWS, columns.shape[0]], tl.float32)
    for token in tl.range(0, BLOCK):
        offset = rows * BLOCK + token
        valid = start + offset < query_len
        total += load_tile(base, offset, columns, stride_t, stride_d, valid, D).to(tl.float32)
    length = tl.minimum(query_len - (start + rows * BLOCK), BLOCK)
    return total / tl.maximum(length, 1).to(tl.float32)[:, None]


@triton.jit
def _tie_rank(tied, origin, columns):
    """1-based rank of each tied column, counted cyclically from column `origin`. [S, N]

    Every row starts at its own relative position in the sequence, so that ties favour neither
    early nor late blocks.
    """
    tied = tied.to(tl.int32)
    count = tl.cumsum(tied, axis=1)
    before_origin = (columns[None, :] < origin[:, None]).to(tl.int32)
    before = tl.sum(tied * before_origin, axis=1)[:, None]
    total = tl.sum(tied, axis=1)[:, None]
    return count - before + before_origin * total


@triton.jit
def _ordered(score):
    """Float32 mapped to uint32 so that the order stays: integers can be bisected bit by bit."""
    bits = score.to(tl.int32, bitcast=True)
    flipped = tl.where(bits < 0, ~bits, bits | (-2147483648))
    return flipped.to(tl.uint32, bitcast=True)


@triton.jit
def _top(score, candidate, count, origin, columns):
    """The `count` [S] best candidates of each row of `score` [S, N], all if there are fewer."""
    order = tl.where(candidate, _ordered(score), 0)
    count = tl.minimum(count, tl.sum(candidate.to(tl.int32), axis=1))
    least = tl.zeros_like(count).to(tl.uint32)  # the count-th largest, built from the top bit down
    for step in tl.range(0, 32):
        bit = tl.full([1], 1, tl.uint32) << tl.cast(31 - step, tl.uint32)
        higher = least | bit
        enough = tl.sum((order >= higher[:, None]).to(tl.int32), axis=1) >= count
        least = tl.where(enough, higher, least)
    above = order > least[:, None]
    tied = candidate & (order == least[:, None])
    missing = count - tl.sum(above.to(tl.int32), axis=1)
    return above | (tied & (_tie_rank(tied, origin, columns) <= missing[:, None]))


@triton.jit
def _above_threshold(score, candidate, beta, origin, columns):
    """Candidates above `mean + beta * sigma` of their row, and always the best one. [S, N]"""
    count = tl.maximum(tl.sum(candidate.to(tl.float32), axis=1), 1.0)
    mean = tl.sum(tl.where(candidate, score, 0.0), axis=1) / count
    deviation = tl.where(candidate, score - mean[:, None], 0.0)
    sigma = tl.sqrt(tl.sum(deviation * deviation, axis=1) / count)
    # -inf asks for every block; -inf * 0 would be NaN.
    every = beta == float("-inf")
    cut = tl.where(every, float("-inf"), mean + tl.where(every, 0.0, beta) * sigma)
    best = candidate & (score == tl.max(score, axis=1)[:, None])
    first = best & (_tie_rank(best, origin, columns) == 1)
    return (candidate & (score > cut[:, None])) | first


@triton.jit
def _budget_count(density, candidates):
    """`exact_block_count` for a density that is only known on the device, in float32."""
    wanted = density * candidates
    # The slack is the specification's plus the rounding of a float32 density and product.
    return tl.ceil(wanted - (1e-6 + wanted * 2.5e-7)).to(tl.int32)


@triton.jit(
    do_not_specialize=[
        "head_start", "query_len", "query_blocks", "blocks", "free_first", "free_last",
        "dense_first", "dense_last", "count", "beta", "capacity", "index_tiles",
        "row_groups", "tasks",
    ]
)  # fmt: skip
def route_kernel(
    query,  # [B, H, Tq, D]
    key_mean,  # float32 [kv heads, blocks, D]
    log_weight,  # float32 [kv heads, blocks], -inf for blocks without a valid key
    score_bias,  # float32 [kv heads, blocks] or None
    budget,  # float32 [H]: density (top-k) or beta (threshold) of each head, or None
    scratch,  # float32 [programs, Q, scratch_stride]
    indices,  # out int32 [heads, index_tiles, capacity]: sorted entries
    counts,  # out int32 [heads, index_tiles]
    bitmap,  # out int32 [heads, query blocks, W]
    query_stride_b, query_stride_h, query_stride_t, query_stride_d,
    head_start,  # first query head of this launch, counted over batch and heads
    heads,  # H
    group_size,  # query heads per key/value head
    query_len, query_blocks, blocks,
    free_first, free_last,  # key blocks that routing chooses from; the others are always exact
    dense_first, dense_last,  # query blocks outside attend densely
    count, beta, scale,
    capacity, index_tiles, row_groups,
    tasks,  # heads in this launch * row_groups
    scratch_stride,
    THRESHOLD: tl.constexpr,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    D_CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    SELECT: tl.constexpr,
    COLUMNS: tl.constexpr,
    N: tl.constexpr,
    PACK: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    scratch += tl.program_id(0).to(tl.int64) * (ROWS * scratch_stride)
    for task in tl.range(tl.program_id(0), tasks, tl.num_programs(0)):
        local_head, first_block = task // row_groups, (task % row_groups) * ROWS
        head = head_start + local_head
        batch, own_head = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
        kv_row = ((head // group_size) - (head_start // group_size)).to(tl.int64) * blocks

        own_query = query + batch * query_stride_b + own_head * query_stride_h
        # In chunks of D, because the operands of a float32 product fill the registers.
        for chunk in tl.static_range(0, D_PAD, D_CHUNK):
            d_columns = chunk + tl.arange(0, D_CHUNK)
            mean = _query_means(
                own_query, d_columns, first_block, query_len, query_stride_t, query_stride_d,
                BLOCK, D, ROWS,
            )  # [Q, D_CHUNK]  # fmt: skip
            _score_rows(
                mean, key_mean + kv_row * D, d_columns, score_bias, kv_row,
                scratch, scratch_stride, scale, blocks, chunk,
                D, ROWS, COLUMNS, PRECISION, UPCAST,
            )  # fmt: skip
            tl.debug_barrier()  # the program's own scratch rows are written
        for first_row in tl.range(0, ROWS, SELECT):
            rows = first_row + tl.arange(0, SELECT)
            columns = tl.arange(0, N)
            inside = (columns < blocks)[None, :] & (first_block + rows < query_blocks)[:, None]
            places = rows[:, None] * scratch_stride + columns[None, :]
            score = tl.load(scratch + places, mask=inside, other=0.0)
            weight = tl.load(log_weight + kv_row + columns, mask=columns < blocks, other=-1.0)
            present = inside & (weight > float("-inf"))[None, :]
            free = (columns >= free_first) & (columns < free_last)
            candidate = present & free[None, :]
            score = tl.where(candidate, score, float("-inf"))
            origin = ((first_block + rows) * blocks) // query_blocks
            if THRESHOLD:
                if budget is not None:
                    beta = tl.load(budget + own_head)
                chosen = _above_threshold(score, candidate, beta, origin, columns)
            else:
                wanted = count
                if budget is not None:
                    candidates = free_last - free_first
                    wanted = _budget_count(tl.load(budget + own_head), candidates)
                    wanted = tl.minimum(tl.maximum(wanted, 1), candidates)
                wanted = tl.zeros([SELECT], tl.int32) + wanted
                chosen = _top(score, candidate, wanted, origin, columns)
            dense = (first_block + rows < dense_first) | (first_block + rows >= dense_last)
            selected = present & (chosen | ~free[None, :] | dense[:, None])
            _write_rows(
                selected, first_block + first_row, local_head,
                indices, counts, bitmap, query_blocks, capacity, index_tiles,
                SELECT, N, PACK,
            )  # fmt: skip
        tl.debug_barrier()  # the scratch rows have been read


@triton.jit
def _score_rows(
    mean, key_mean, d_columns, score_bias, kv_row, scratch, scratch_stride, scale, blocks,
    CHUNK: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Proxy scores of query means [Q, D_CHUNK] with all key blocks, into or onto `scratch`."""
    rows = tl.arange(0, ROWS)
    for start in tl.range(0, blocks, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        valid = columns < blocks
        k = load_tile(key_mean, columns, d_columns, D, 1, valid, D)  # [C, D_CHUNK]
        zero = tl.zeros([ROWS, COLUMNS], tl.float32)
        score = dot(mean, tl.trans(k), zero, PRECISION, UPCAST) * scale  # [Q, C]
        places = rows[:, None] * scratch_stride + columns[None, :]
        if CHUNK > 0:
            score += tl.load(scratch + places, mask=valid[None, :], other=0.0)
        elif score_bias is not None:
            score += tl.load(score_bias + kv_row + columns, mask=valid, other=0.0)[None, :]
        tl.store(scratch + places, score, mask=valid[None, :])


@triton.jit
def _write_rows(
    selected, first_block, local_head, indices, counts, bitmap, query_blocks, capacity, index_tiles,
    SELECT: tl.constexpr, N: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """Bitmap rows of `selected` [S, N] and, per query tile of PACK rows, the sorted entries."""
    flags = selected.to(tl.int32)
    rows = first_block + tl.arange(0, SELECT)
    words: tl.constexpr = N // 32
    shifts = tl.arange(0, 32)[None, None, :]
    packed = tl.sum(tl.reshape(flags, [SELECT, words, 32]) << shifts, axis=2).to(tl.int32)  # [S, W]
    row = local_head.to(tl.int64) * query_blocks + rows
    places = row[:, None] * words + tl.arange(0, words)[None, :]
    tl.store(bitmap + places, packed, mask=(rows < query_blocks)[:, None])

    groups: tl.constexpr = SELECT // PACK
    members = flags
    if PACK > 1:
        members = tl.reshape(flags, [groups, PACK, N]) << tl.arange(0, PACK)[None, :, None]
        members = tl.sum(members, axis=1)  # [S / PACK, N]
    taken = members != 0
    position = tl.cumsum(taken.to(tl.int32), axis=1) - 1
    entry = tl.arange(0, N)[None, :] | (members << ENTRY_BITS)
    tile = first_block // PACK + tl.arange(0, groups)
    place = local_head.to(tl.int64) * index_tiles + tile
    tl.store(indices + place[:, None] * capacity + position, entry, mask=taken)
    total = tl.sum(taken.to(tl.int32), axis=1)
    tl.store(counts + place, total, mask=tile < index_tiles)
