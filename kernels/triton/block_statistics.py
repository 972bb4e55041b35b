"""What the approximation knows of each key block, from one pass over keys and values.

Shapes (legend in primitives.py): K key blocks per program, S programs ("splits") per head.
All results are float32; means are stored a second time in the input dtype for the tensor cores of
the forward kernel. The order of every sum is fixed, so results repeat bit for bit.
"""

# mypy: disable-error-code="no-untyped-def,misc,no-any-return"

import triton
import triton.language as tl

from .primitives import dot, keys_of, load_tile


@triton.jit
def _block(
    key, value, key_mask, permutation, start,
    key_strides, value_strides, mask_strides, key_len, d_columns, e_columns,
    BLOCK: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """One key block: validity, number of valid keys, keys and values."""
    base, rows, valid = keys_of(
        permutation, key_mask, start, tl.arange(0, BLOCK), key_len, mask_strides[1]
    )
    _, _, stride_t, stride_d = key_strides
    k = load_tile(key + base * stride_t, rows, d_columns, stride_t, stride_d, valid, D)  # [B, D]
    _, _, stride_t, stride_e = value_strides
    v = load_tile(value + base * stride_t, rows, e_columns, stride_t, stride_e, valid, E)  # [B, E]
    length = tl.sum(valid.to(tl.float32), axis=0)
    return valid, length, k, v


@triton.jit
def _centred(k, mean, valid):
    """Keys without their block's mean, float32, zero where invalid. [B, D]

    Centring before a product avoids the cancellation in `K^T V - b * mean^T vmean`, whose terms
    grow with a vector that all keys share while their difference does not.
    """
    return tl.where(valid[:, None], k.to(tl.float32) - mean[None, :], 0.0)


@triton.jit
def _mean_energy(energy, columns, PARTS: tl.constexpr, D: tl.constexpr):
    """Mean of `q_d^2` from its summands. [D]"""
    parts = tl.arange(0, PARTS)
    every = parts >= 0
    return tl.sum(load_tile(energy, parts, columns, D, 1, every, D), axis=0)


@triton.jit
def _tail_mass_correction(
    centred, length, key, key_mask, permutation, energy, held, start,
    key_strides, mask_strides, key_len, scale,
    BLOCK: tl.constexpr, D: tl.constexpr, D_TILE: tl.constexpr, PARTS: tl.constexpr,
    LIMIT: tl.constexpr,
):  # fmt: skip
    """`log(1 + 1/2 scale^2 sum_d Var(k_d) mean(q_d^2))` of one block: see the specification.

    `centred` holds the first D_TILE columns and `held` their energy; where there are more columns
    than that, the others are read here. Only one of the block's programs does so.
    """
    weighted = tl.sum(centred * centred * held[None, :])
    for first in tl.range(D_TILE, D, D_TILE):
        columns = first + tl.arange(0, D_TILE)
        base, rows, valid = keys_of(
            permutation, key_mask, start, tl.arange(0, BLOCK), key_len, mask_strides[1]
        )
        k = load_tile(
            key + base * key_strides[2], rows, columns, key_strides[2], key_strides[3], valid, D
        )  # [B, D]
        mean = tl.sum(k.to(tl.float32), axis=0) / length
        rest = _centred(k, mean, valid)
        weighted += tl.sum(rest * rest * _mean_energy(energy, columns, PARTS, D)[None, :])
    beta = 0.5 * scale * scale * weighted / length
    return tl.log(tl.where(beta < LIMIT - 1.0, 1.0 + beta, LIMIT))  # NaN lands on the limit too


@triton.jit(do_not_specialize=["head_start", "key_len", "blocks", "blocks_per_split"])
def block_statistics_kernel(
    key,  # [B, G, Tk, D]
    value,  # [B, G, Tk, E]
    key_mask,  # uint8 [B, Tk] or None
    permutation,  # int32 or int64 [Tk], or None
    energy,  # float32 [heads, PARTS, D], or None: no correction of the tail mass
    key_mean,  # out float32 [heads, blocks, D]
    key_mean_low,  # out [heads, blocks, D] in the input dtype, or None where that is float32
    value_mean,  # out [heads, blocks, E] in the input dtype
    log_weight,  # out float32 [heads, blocks]: log of the number of valid keys plus the
    #              correction, -inf for none
    partial,  # out float32 [heads, S, D, E], or None
    partial_counts,  # out float32 [heads, S, 2]: valid keys, blocks that have any
    key_strides, value_strides, mask_strides,
    head_start, kv_heads, key_len, blocks, blocks_per_split, scale,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    D_TILE: tl.constexpr,
    E_TILE: tl.constexpr,
    PARTS: tl.constexpr,
    LIMIT: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    split, tile, local_head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    e_tiles: tl.constexpr = (E + E_TILE - 1) // E_TILE
    d_tile, e_tile = tile // e_tiles, tile % e_tiles
    head = head_start + local_head
    batch, kv_head = (head // kv_heads).to(tl.int64), (head % kv_heads).to(tl.int64)
    key += batch * key_strides[0] + kv_head * key_strides[1]
    value += batch * value_strides[0] + kv_head * value_strides[1]
    if key_mask is not None:
        key_mask += batch * mask_strides[0]
    row0 = local_head.to(tl.int64) * blocks
    d_columns = d_tile * D_TILE + tl.arange(0, D_TILE)
    e_columns = e_tile * E_TILE + tl.arange(0, E_TILE)
    held = tl.zeros([D_TILE], tl.float32)
    if energy is not None:
        energy += local_head.to(tl.int64) * (PARTS * D)
        held = _mean_energy(energy, d_columns, PARTS, D)

    first_order = tl.zeros([D_TILE, E_TILE], tl.float32)
    keys_seen, blocks_seen = 0.0, 0.0
    for block in tl.range(
        split * blocks_per_split, tl.minimum((split + 1) * blocks_per_split, blocks)
    ):
        valid, length, k, v = _block(
            key, value, key_mask, permutation, block * BLOCK,
            key_strides, value_strides, mask_strides, key_len, d_columns, e_columns, BLOCK, D, E,
        )  # fmt: skip
        divisor = tl.maximum(length, 1.0)
        mean = tl.sum(k.to(tl.float32), axis=0) / divisor  # [D]
        centred = _centred(k, mean, valid)
        if partial is not None:
            centred_low = centred.to(v.dtype)
            first_order = dot(tl.trans(centred_low), v, first_order, PRECISION, UPCAST)
        keys_seen += length
        blocks_seen += tl.where(length > 0, 1.0, 0.0)

        row = row0 + block
        if e_tile == 0:
            tl.store(key_mean + row * D + d_columns, mean, mask=d_columns < D)
            if key_mean_low is not None:
                low = mean.to(key_mean_low.dtype.element_ty)
                tl.store(key_mean_low + row * D + d_columns, low, mask=d_columns < D)
        if d_tile == 0:
            low = (tl.sum(v.to(tl.float32), axis=0) / divisor).to(value_mean.dtype.element_ty)
            tl.store(value_mean + row * E + e_columns, low, mask=e_columns < E)
        if tile == 0:
            weight = tl.log(divisor)
            if energy is not None:
                weight += _tail_mass_correction(
                    centred, divisor, key, key_mask, permutation, energy, held, block * BLOCK,
                    key_strides, mask_strides, key_len, scale,
                    BLOCK, D, D_TILE, PARTS, LIMIT,
                )  # fmt: skip
            tl.store(log_weight + row, tl.where(length > 0, weight, float("-inf")))

    splits = tl.num_programs(0)
    place = local_head.to(tl.int64) * splits + split
    if partial is not None:
        offsets = d_columns[:, None] * E + e_columns[None, :]
        inside = (d_columns < D)[:, None] & (e_columns < E)[None, :]
        tl.store(partial + place * (D * E) + offsets, first_order, mask=inside)
    if tile == 0:
        tl.store(partial_counts + place * 2, keys_seen)
        tl.store(partial_counts + place * 2 + 1, blocks_seen)


@triton.jit(do_not_specialize=["splits"])
def first_order_kernel(
    partial,  # float32 [heads, S, D * E]
    partial_counts,  # float32 [heads, S, 2]
    first_order,  # out [heads, D * E] in the input dtype, or None: scale * H / valid keys
    mean_matrix,  # out float32 [heads, D * E], or None: H / valid blocks
    scale,
    splits,
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    tile, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    offsets = tile * TILE + tl.arange(0, TILE)
    inside = offsets < SIZE
    total = tl.zeros([TILE], tl.float32)
    keys, blocks = 0.0, 0.0
    for split in tl.range(0, splits):
        place = head * splits + split
        total += tl.load(partial + place * SIZE + offsets, mask=inside, other=0.0)
        keys += tl.load(partial_counts + place * 2)
        blocks += tl.load(partial_counts + place * 2 + 1)
    if first_order is not None:
        # Divided here and not later: H itself overflows float16 at a hundred thousand tokens.
        scaled = (total * (scale / tl.maximum(keys, 1.0))).to(first_order.dtype.element_ty)
        tl.store(first_order + head * SIZE + offsets, scaled, mask=inside)
    if mean_matrix is not None:
        tl.store(mean_matrix + head * SIZE + offsets, total / tl.maximum(blocks, 1.0), mask=inside)


@triton.jit(do_not_specialize=["head_start", "key_len", "blocks"])
def covariance_kernel(
    key,  # [B, G, Tk, D]
    value,  # [B, G, Tk, E]
    key_mask,  # uint8 [B, Tk] or None
    permutation,  # int32 or int64 [Tk], or None
    key_mean,  # float32 [heads, blocks, D]
    mean_matrix,  # float32 [heads, D, E]
    score_bias,  # out float32 [heads, blocks]: log(||H_j - mean|| + EPS)
    key_strides, value_strides, mask_strides,
    head_start, kv_heads, key_len, blocks,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    D_TILE: tl.constexpr,
    E_TILE: tl.constexpr,
    EPS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """The matrix of a block lives in registers, tile by tile, and is never written."""
    block, local_head = tl.program_id(0), tl.program_id(1)
    head = head_start + local_head
    batch, kv_head = (head // kv_heads).to(tl.int64), (head % kv_heads).to(tl.int64)
    key += batch * key_strides[0] + kv_head * key_strides[1]
    value += batch * value_strides[0] + kv_head * value_strides[1]
    if key_mask is not None:
        key_mask += batch * mask_strides[0]
    row = local_head.to(tl.int64) * blocks + block
    mean_matrix += local_head.to(tl.int64) * (D * E)

    square = 0.0
    for d_start in tl.range(0, D, D_TILE):
        d_columns = d_start + tl.arange(0, D_TILE)
        mean = tl.load(key_mean + row * D + d_columns, mask=d_columns < D, other=0.0)
        for e_start in tl.range(0, E, E_TILE):
            e_columns = e_start + tl.arange(0, E_TILE)
            valid, _, k, v = _block(
                key, value, key_mask, permutation, block * BLOCK,
                key_strides, value_strides, mask_strides, key_len, d_columns, e_columns,
                BLOCK, D, E,
            )  # fmt: skip
            inside = (d_columns < D)[:, None] & (e_columns < E)[None, :]
            offsets = d_columns[:, None] * E + e_columns[None, :]
            average = tl.load(mean_matrix + offsets, mask=inside, other=0.0)  # [D, E]
            zero = tl.zeros([D_TILE, E_TILE], tl.float32)
            centred = _centred(k, mean, valid).to(v.dtype)
            own = dot(tl.trans(centred), v, zero, PRECISION, UPCAST)
            deviation = own - average
            # One axis at a time fails to compile for sm_100 in triton 3.6 and 3.7.
            square += tl.sum(deviation * deviation)
    tl.store(score_bias + row, tl.log(tl.sqrt(square) + EPS))
