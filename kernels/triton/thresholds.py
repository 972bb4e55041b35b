"""The cut of threshold routing from moments: mean and deviation of a row of scores without the row.

The proxy scores of query block i are `s_ij = scale * qbar_i . kbar_j`. Over the candidates j their
mean is `scale * qbar_i . m` and their variance `scale^2 * qbar_i^T C qbar_i`, with mean m and
covariance C of the centroids (Sol-Attn, arXiv 2607.24027). The forward kernel then compares the
scores that it computes anyway with one number per query block, and no map is written.
"""

# mypy: disable-error-code="no-untyped-def,misc,no-any-return"

import triton
import triton.language as tl

from .primitives import dot, load_tile
from .query_statistics import query_means


@triton.jit
def normal_upper_quantile(density):
    """The `beta` that a standard normal variable exceeds with probability `density`, float32.

    Wichura's rational approximations, Algorithm AS 241 (PPND7), good to 1e-7. +inf for a density
    of 0 or less, -inf from 1 on.
    """
    density = tl.minimum(tl.maximum(density, 0.0), 1.0)
    centre = 0.5 - density
    r = 0.180625 - centre * centre
    upper = ((5.9109374720e1 * r + 1.5929113202e2) * r + 5.0434271938e1) * r + 3.3871327179
    lower = ((6.7187563600e1 * r + 7.8757757664e1) * r + 1.7895169469e1) * r + 1.0
    middle = centre * upper / lower
    tail = tl.minimum(density, 1.0 - density)
    r = tl.sqrt(-tl.log(tl.maximum(tail, 1e-37)))
    near = r - 1.6
    upper = ((1.7023821103e-1 * near + 1.3067284816) * near + 2.7568153900) * near + 1.4234372777
    lower = (1.2021132975e-1 * near + 7.3700164250e-1) * near + 1.0
    far = r - 5.0
    far_upper = ((1.7337203997e-2 * far + 4.2868294337e-1) * far + 3.0812263860) * far
    far_lower = (1.2258202635e-2 * far + 2.4197894225e-1) * far + 1.0
    outer = tl.where(r <= 5.0, upper / lower, (far_upper + 6.6579051150) / far_lower)
    outer = tl.where(centre < 0.0, -outer, outer)
    beta = tl.where(tl.abs(centre) <= 0.425, middle, outer)
    beta = tl.where(density <= 0.0, float("inf"), beta)
    return tl.where(density >= 1.0, float("-inf"), beta)


@triton.jit
def scaled_deviation(beta, sigma):
    """`beta * sigma`, also for infinite `beta`: -inf selects every block, +inf only the best."""
    finite = tl.abs(beta) < float("inf")
    return tl.where(finite, tl.where(finite, beta, 0.0) * sigma, beta)


@triton.jit
def _free_means(key_mean, log_weight, start, d_columns, free_last, BLOCKS: tl.constexpr,
                D: tl.constexpr):  # fmt: skip
    """Some columns of the centroids that routing chooses from, and which of them exist."""
    rows = start + tl.arange(0, BLOCKS)
    inside = rows < free_last
    weight = tl.load(log_weight + rows, mask=inside, other=float("-inf"))
    present = inside & (weight > float("-inf"))
    return load_tile(key_mean, rows, d_columns, D, 1, present, D), present


@triton.jit(do_not_specialize=["blocks", "free_first", "free_last"])
def centroid_moments_kernel(
    key_mean,  # float32 [kv heads, blocks, D]
    log_weight,  # float32 [kv heads, blocks], -inf for blocks without a valid key
    mean,  # out float32 [kv heads, D]
    covariance,  # out float32 [kv heads, D, D]
    blocks, free_first, free_last,
    D: tl.constexpr,
    TILE: tl.constexpr,
    BLOCKS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    tile, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    tiles: tl.constexpr = (D + TILE - 1) // TILE
    left = (tile // tiles) * TILE + tl.arange(0, TILE)
    right = (tile % tiles) * TILE + tl.arange(0, TILE)
    key_mean += head * blocks * D
    log_weight += head * blocks
    left_sum = tl.zeros([TILE], tl.float32)
    right_sum = tl.zeros([TILE], tl.float32)
    seen = 0.0
    for start in tl.range(free_first, free_last, BLOCKS):
        k, present = _free_means(key_mean, log_weight, start, left, free_last, BLOCKS, D)
        left_sum += tl.sum(k, axis=0)
        k, _ = _free_means(key_mean, log_weight, start, right, free_last, BLOCKS, D)
        right_sum += tl.sum(k, axis=0)
        seen += tl.sum(present.to(tl.float32), axis=0)
    seen = tl.maximum(seen, 1.0)
    left_mean, right_mean = left_sum / seen, right_sum / seen
    # Centred before the product: centroids share a vector that is large against their spread.
    total = tl.zeros([TILE, TILE], tl.float32)
    for start in tl.range(free_first, free_last, BLOCKS):
        k, present = _free_means(key_mean, log_weight, start, left, free_last, BLOCKS, D)
        a = tl.where(present[:, None], k - left_mean[None, :], 0.0)
        k, _ = _free_means(key_mean, log_weight, start, right, free_last, BLOCKS, D)
        b = tl.where(present[:, None], k - right_mean[None, :], 0.0)
        total = dot(tl.trans(a), b, total, PRECISION, UPCAST)
    inside = (left < D)[:, None] & (right < D)[None, :]
    place = covariance + head * (D * D) + left[:, None] * D + right[None, :]
    tl.store(place, total / seen, mask=inside)
    if tile % tiles == 0:
        tl.store(mean + head * D + left, left_mean, mask=left < D)


@triton.jit(
    do_not_specialize=[
        "head_start", "group_size", "query_len", "query_blocks", "dense_first", "dense_last",
        "beta", "density_stride",
    ]
)  # fmt: skip
def cut_kernel(
    query,  # [B, H, Tq, D]
    permutation,  # int32 or int64 [Tq], or None
    mean,  # float32 [kv heads, D]
    covariance,  # float32 [kv heads, D, D]
    density,  # float32 [H] or None
    cuts,  # out float32 [heads, query blocks]; -inf where everything is exact
    query_strides,
    head_start,  # first query head of this launch, counted over batch and heads
    heads,  # H
    group_size,  # query heads per key/value head
    query_len, query_blocks,
    dense_first, dense_last,  # query blocks outside attend densely
    beta, scale, density_stride,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    D_CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    first_block, local_head = tl.program_id(0) * ROWS, tl.program_id(1)
    head = head_start + local_head
    batch, own_head = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    local_kv = ((head // group_size) - (head_start // group_size)).to(tl.int64)
    query += batch * query_strides[0] + own_head * query_strides[1]
    mean += local_kv * D
    covariance += local_kv * (D * D)
    centre = tl.zeros([ROWS], tl.float32)
    variance = tl.zeros([ROWS], tl.float32)
    # In chunks of D, because the operands of a float32 product fill the registers.
    for left in tl.range(0, D_PAD, D_CHUNK):
        columns = left + tl.arange(0, D_CHUNK)
        q = query_means(
            query, permutation, columns, first_block, query_len, query_strides,
            BLOCK, D, ROWS,
        )  # [Q, D_CHUNK]  # fmt: skip
        kept = tl.load(mean + columns, mask=columns < D, other=0.0)
        centre += tl.sum(q * kept[None, :], axis=1)
        product = tl.zeros([ROWS, D_CHUNK], tl.float32)
        for right in tl.range(0, D_PAD, D_CHUNK):
            rows = right + tl.arange(0, D_CHUNK)
            other = q
            if D_CHUNK < D_PAD:
                other = query_means(
                    query, permutation, rows, first_block, query_len, query_strides,
                    BLOCK, D, ROWS,
                )  # fmt: skip
            part = load_tile(covariance, rows, columns, D, 1, rows < D, D)
            product = dot(other, part, product, PRECISION, UPCAST)
        variance += tl.sum(product * q, axis=1)
    if density is not None:
        beta = normal_upper_quantile(tl.load(density + own_head * density_stride))
    sigma = tl.sqrt(tl.maximum(variance, 0.0)) * tl.abs(scale)
    cut = centre * scale + scaled_deviation(beta, sigma)
    block = first_block + tl.arange(0, ROWS)
    dense = (block < dense_first) | (block >= dense_last)
    row = local_head.to(tl.int64) * query_blocks
    tl.store(
        cuts + row + block, tl.where(dense, float("-inf"), cut), mask=block < query_blocks
    )  # fmt: skip
