"""Which key blocks each query block attends exactly: scores and selection in one kernel.

A program scores 16 query blocks against all key blocks into its own few rows of scratch memory,
which stay in the cache, and then selects from them. So no N x N map is written, whatever N is.
Up to a few thousand key blocks a row is held in registers while it is searched; a longer one is
read again, a tile at a time, for each step of the search.

Shapes (legend in primitives.py): Q query blocks per program, S of them selected for at a time,
N padded number of key blocks, T of them at a time, P query blocks per query tile.
"""

# mypy: disable-error-code="no-untyped-def,misc,no-any-return"

import triton
import triton.language as tl

from .primitives import ENTRY_BITS, dot, load_tile
from .query_statistics import query_means
from .thresholds import normal_upper_quantile, scaled_deviation


@triton.jit
def _ordered(score):
    """Float32 mapped to uint32 so that the order stays: integers can be bisected bit by bit."""
    bits = score.to(tl.int32, bitcast=True)
    flipped = tl.where(bits < 0, ~bits, bits | (-2147483648))
    return flipped.to(tl.uint32, bitcast=True)


@triton.jit
def _tile(scratch, log_weight, rows, row_valid, start, blocks, free_first, free_last,
          scratch_stride, T: tl.constexpr):  # fmt: skip
    """Scores of T key blocks, and which are candidates. (float32 [S, T], bool [S, T])"""
    columns = start + tl.arange(0, T)
    inside = (columns < blocks)[None, :] & row_valid[:, None]
    places = rows[:, None] * scratch_stride + columns[None, :]
    score = tl.load(scratch + places, mask=inside, other=0.0)
    free = (columns >= free_first) & (columns < free_last)
    candidate = inside & (_present(log_weight, columns, blocks) & free)[None, :]
    return tl.where(candidate, score, float("-inf")), candidate


@triton.jit
def _reloaded(row, score, candidate, start, N: tl.constexpr, T: tl.constexpr):
    """The `_tile` at `start`, from its other arguments; one that holds all N is there already."""
    if N > T:
        scratch, log_weight, rows, row_valid, blocks, free_first, free_last, scratch_stride = row
        score, candidate = _tile(
            scratch, log_weight, rows, row_valid, start, blocks, free_first, free_last,
            scratch_stride, T,
        )  # fmt: skip
    return score, candidate


@triton.jit
def _present(log_weight, columns, blocks):
    """Which key blocks exist and have a valid key. [T]"""
    return tl.load(log_weight + columns, mask=columns < blocks, other=float("-inf")) > float("-inf")


@triton.jit
def _top_limit(
    row, score, candidate, count,
    S: tl.constexpr, N: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """The `count`-th best score of each row, ordered, and how many of its equals are wanted. [S]

    All candidates are chosen where there are fewer. `score` and `candidate` hold the row if it
    fits in one tile.
    """
    seen = tl.zeros([S, T], tl.int32)
    for start in tl.range(0, N, T):
        score, candidate = _reloaded(row, score, candidate, start, N, T)
        seen += candidate.to(tl.int32)
    count = tl.minimum(count, tl.sum(seen, axis=1))
    least = tl.zeros([S], tl.uint32)  # built from the top bit down
    for step in tl.range(0, 32):
        bit = tl.full([1], 1, tl.uint32) << tl.cast(31 - step, tl.uint32)
        higher = least | bit
        seen = tl.zeros([S, T], tl.int32)
        for start in tl.range(0, N, T):
            score, candidate = _reloaded(row, score, candidate, start, N, T)
            seen += (candidate & (_ordered(score) >= higher[:, None])).to(tl.int32)
        least = tl.where(tl.sum(seen, axis=1) >= count, higher, least)
    seen = tl.zeros([S, T], tl.int32)
    for start in tl.range(0, N, T):
        score, candidate = _reloaded(row, score, candidate, start, N, T)
        seen += (candidate & (_ordered(score) > least[:, None])).to(tl.int32)
    return least, count - tl.sum(seen, axis=1)


@triton.jit
def _threshold_limit(
    row, score, candidate, beta,
    S: tl.constexpr, N: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """`mean + beta * sigma` of each row and its largest score, both ordered. [S]"""
    total = tl.zeros([S, T], tl.float32)
    seen = tl.zeros([S, T], tl.float32)
    best = tl.full([S, T], float("-inf"), tl.float32)
    for start in tl.range(0, N, T):
        score, candidate = _reloaded(row, score, candidate, start, N, T)
        total += tl.where(candidate, score, 0.0)
        seen += candidate.to(tl.float32)
        best = tl.maximum(best, score)
    count = tl.maximum(tl.sum(seen, axis=1), 1.0)
    mean = tl.sum(total, axis=1) / count
    total = tl.zeros([S, T], tl.float32)
    for start in tl.range(0, N, T):
        score, candidate = _reloaded(row, score, candidate, start, N, T)
        deviation = tl.where(candidate, score - mean[:, None], 0.0)
        total += deviation * deviation
    sigma = tl.sqrt(tl.sum(total, axis=1) / count)
    cut = mean + scaled_deviation(beta, sigma)
    return _ordered(cut), _ordered(tl.max(best, axis=1))


@triton.jit
def _ties(
    row, score, candidate, tie, origin,
    S: tl.constexpr, N: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """How many candidates equal `tie`, before column `origin` and in all. [S]"""
    seen = tl.zeros([S, T], tl.int32)
    early = tl.zeros([S, T], tl.int32)
    for start in tl.range(0, N, T):
        score, candidate = _reloaded(row, score, candidate, start, N, T)
        tied = candidate & (_ordered(score) == tie[:, None])
        columns = start + tl.arange(0, T)
        seen += tied.to(tl.int32)
        early += (tied & (columns[None, :] < origin[:, None])).to(tl.int32)
    return tl.sum(early, axis=1), tl.sum(seen, axis=1)


@triton.jit
def _wanted_count(density, candidates):
    """`exact_block_counts` for a density that is only known on the device."""
    candidates = candidates.to(tl.float64)
    wanted = tl.ceil(density.to(tl.float64) * candidates - candidates * 1e-6)
    return tl.minimum(tl.maximum(wanted, 1.0), candidates).to(tl.int32)


@triton.jit(
    do_not_specialize=[
        "head_start", "query_len", "query_blocks", "blocks", "free_first", "free_last",
        "dense_first", "dense_last", "count", "beta", "density_stride", "capacity", "index_tiles",
        "row_groups", "tasks",
    ]
)  # fmt: skip
def route_kernel(
    query,  # [B, H, Tq, D]
    permutation,  # int32 or int64 [Tq], or None
    key_mean,  # float32 [kv heads, blocks, D]
    log_weight,  # float32 [kv heads, blocks], -inf for blocks without a valid key
    score_bias,  # float32 [kv heads, blocks] or None; BIAS_FACTOR times it is added to the scores
    density,  # float32 [H] or None
    scratch,  # float32 [programs, Q, scratch_stride]
    indices,  # out int32 [heads, index_tiles, capacity]: sorted entries
    counts,  # out int32 [heads, index_tiles]
    bitmap,  # out int32 [heads, query blocks, N / 32]
    query_strides,
    head_start,  # first query head of this launch, counted over batch and heads
    heads,  # H
    group_size,  # query heads per key/value head
    query_len, query_blocks, blocks,
    free_first, free_last,  # key blocks that routing chooses from; the others are always exact
    dense_first, dense_last,  # query blocks outside attend densely
    count, beta, scale,
    density_stride, capacity, index_tiles, row_groups,
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
    BIAS_FACTOR: tl.constexpr,
    N: tl.constexpr,
    T: tl.constexpr,
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

        own_query = query + batch * query_strides[0] + own_head * query_strides[1]
        # In chunks of D, because the operands of a float32 product fill the registers.
        for chunk in tl.static_range(0, D_PAD, D_CHUNK):
            d_columns = chunk + tl.arange(0, D_CHUNK)
            mean = query_means(
                own_query, permutation, d_columns, first_block, query_len, query_strides,
                BLOCK, D, ROWS,
            )  # [Q, D_CHUNK]  # fmt: skip
            _score_rows(
                mean, key_mean + kv_row * D, d_columns, score_bias, kv_row,
                scratch, scratch_stride, scale, blocks, chunk,
                D, ROWS, COLUMNS, BIAS_FACTOR, PRECISION, UPCAST,
            )  # fmt: skip
            tl.debug_barrier()  # the program's own scratch rows are written
        candidates = free_last - free_first
        wanted = count
        if density is not None:
            own_density = tl.load(density + own_head * density_stride)
            if THRESHOLD:
                beta = normal_upper_quantile(own_density)
            else:
                wanted = _wanted_count(own_density, candidates)
        own_weight = log_weight + kv_row
        for first_row in tl.range(0, ROWS, SELECT):
            rows = first_row + tl.arange(0, SELECT)
            row_valid = first_block + rows < query_blocks
            origin = ((first_block + rows).to(tl.int64) * blocks // query_blocks).to(tl.int32)
            score, candidate = _tile(
                scratch, own_weight, rows, row_valid, 0, blocks, free_first, free_last,
                scratch_stride, T,
            )  # fmt: skip
            row = (
                scratch, own_weight, rows, row_valid, blocks, free_first, free_last, scratch_stride
            )  # fmt: skip
            # Chosen is what lies above `limit`, and the first `missing` of what equals `tie`.
            if THRESHOLD:
                limit, tie = _threshold_limit(row, score, candidate, beta, SELECT, N, T)
                missing = tl.full([SELECT], 1, tl.int32)
            else:
                limit, missing = _top_limit(
                    row, score, candidate, tl.zeros([SELECT], tl.int32) + wanted, SELECT, N, T
                )
                tie = limit
            early, ties = _ties(row, score, candidate, tie, origin, SELECT, N, T)
            dense = (first_block + rows < dense_first) | (first_block + rows >= dense_last)
            if density is not None:
                dense = dense | (tl.zeros([SELECT], tl.float32) + own_density >= 1.0)
            tied_so_far = tl.zeros([SELECT], tl.int32)
            taken_so_far = tl.zeros([SELECT // PACK], tl.int32)
            for start in tl.range(0, N, T):
                score, candidate = _reloaded(row, score, candidate, start, N, T)
                columns = start + tl.arange(0, T)
                order = _ordered(score)
                tied = candidate & (order == tie[:, None])
                # Ranks of ties count cyclically from the row's own relative position in the
                # sequence, so that they favour neither early nor late blocks.
                late = (columns[None, :] < origin[:, None]).to(tl.int32) * ties[:, None]
                rank = tl.cumsum(tied.to(tl.int32), axis=1) + (tied_so_far - early)[:, None] + late
                chosen = candidate & (order > limit[:, None])
                chosen = chosen | (tied & (rank <= missing[:, None]))
                tied_so_far += tl.sum(tied.to(tl.int32), axis=1)
                free = (columns >= free_first) & (columns < free_last)
                present = _present(own_weight, columns, blocks)[None, :] & row_valid[:, None]
                selected = present & (chosen | ~free[None, :] | dense[:, None])
                taken_so_far = _write_tile(
                    selected, start, first_block + first_row, local_head, taken_so_far,
                    indices, bitmap, query_blocks, capacity, index_tiles, SELECT, N, T, PACK,
                )  # fmt: skip
            tile = (first_block + first_row) // PACK + tl.arange(0, SELECT // PACK)
            place = local_head.to(tl.int64) * index_tiles + tile
            tl.store(counts + place, taken_so_far, mask=tile < index_tiles)
        tl.debug_barrier()  # the scratch rows have been read


@triton.jit
def _score_rows(
    mean, key_mean, d_columns, score_bias, kv_row, scratch, scratch_stride, scale, blocks,
    CHUNK: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    BIAS_FACTOR: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
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
            bias = tl.load(score_bias + kv_row + columns, mask=valid, other=0.0)
            score += BIAS_FACTOR * bias[None, :]
        tl.store(scratch + places, score, mask=valid[None, :])


@triton.jit
def _write_tile(
    selected, start, first_block, local_head, taken_so_far,
    indices, bitmap, query_blocks, capacity, index_tiles,
    SELECT: tl.constexpr, N: tl.constexpr, T: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """Bitmap words of `selected` [S, T] and, per query tile of PACK rows, its sorted entries.

    Returns the number of entries written so far. [S / P]
    """
    flags = selected.to(tl.int32)
    rows = first_block + tl.arange(0, SELECT)
    words: tl.constexpr = T // 32
    shifts = tl.arange(0, 32)[None, None, :]
    packed = tl.sum(tl.reshape(flags, [SELECT, words, 32]) << shifts, axis=2).to(tl.int32)
    row = local_head.to(tl.int64) * query_blocks + rows
    places = row[:, None] * (N // 32) + start // 32 + tl.arange(0, words)[None, :]
    tl.store(bitmap + places, packed, mask=(rows < query_blocks)[:, None])

    groups: tl.constexpr = SELECT // PACK
    members = flags
    if PACK > 1:
        members = tl.reshape(flags, [groups, PACK, T]) << tl.arange(0, PACK)[None, :, None]
        members = tl.sum(members, axis=1)  # [S / P, T]
    taken = members != 0
    position = tl.cumsum(taken.to(tl.int32), axis=1) + (taken_so_far - 1)[:, None]
    entry = (start + tl.arange(0, T))[None, :] | (members << ENTRY_BITS)
    tile = first_block // PACK + tl.arange(0, groups)
    place = local_head.to(tl.int64) * index_tiles + tile
    tl.store(indices + place[:, None] * capacity + position, entry, mask=taken)
    return taken_so_far + tl.sum(taken.to(tl.int32), axis=1)
