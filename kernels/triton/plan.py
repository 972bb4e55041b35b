"""From one call to a list of kernel launches with their workspaces.

Nothing here looks at values, so a plan can be made for tensors on the `meta` device: that is how
the ahead-of-time check compiles exactly what a call would launch.

Heads are processed in groups, one after the other in the same workspace, which bounds the memory
whatever the number of heads and keeps the keys of a group in the cache.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..params import MASS_FACTOR_LIMIT, ROUTING_WEIGHT, AttentionParams, block_count
from ..reference import COVARIANCE_EPS
from .block_statistics import block_statistics_kernel, covariance_kernel, first_order_kernel
from .configs import Config, lookup, padded_width
from .configs import Launch as Options
from .forward import forward_kernel
from .geometry import ENERGY_PARTS, ROUTING_ROWS, Device, Geometry
from .query_statistics import query_energy_kernel
from .routing import route_kernel
from .thresholds import centroid_moments_kernel, cut_kernel

ROUTING_D_CHUNK = 64
ENERGY_ROWS = 32
MOMENT_TILE = 64
MOMENT_BLOCKS = 32
REDUCE_TILE = 512
# Offsets inside a tile are 32-bit; only offsets of whole tiles are 64-bit. The largest tile is the
# 16 query blocks of up to 128 tokens that a routing program averages.
MAX_TILE_SPAN = 2**31 - 1
LARGEST_TILE = 16 * 128


@dataclass(frozen=True)
class KernelLaunch:
    name: str
    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, int]
    multiplies: bool = True  # whether it has matrix products, which belong on tensor cores


@dataclass(frozen=True)
class Plan:
    out: Tensor  # [B, H, Tq, E]
    lse: Tensor  # [B, H, Tq]
    launches: list[KernelLaunch] = field(default_factory=list)


@dataclass(frozen=True)
class Call:
    """The tensors of one call, as the kernels take them."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None  # uint8 [B, Tk]
    density: Tensor | None  # float32 [1 or H]
    permutation: Tensor | None  # int32 or int64 [T]
    out: Tensor
    lse: Tensor

    @property
    def mask_strides(self) -> tuple[int, ...]:
        return (0, 0) if self.mask is None else self.mask.stride()

    @property
    def density_arguments(self) -> dict[str, Any]:
        shared = self.density is None or self.density.numel() == 1
        stride = 0 if shared or self.density is None else self.density.stride(0)
        return {"density": self.density, "density_stride": stride}


def plan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    params: AttentionParams,
    device: Device,
    *,
    density: Tensor | None = None,
    permutation: Tensor | None = None,
    config: Config | None = None,
) -> Plan:
    batch, heads, query_len, d = query.shape
    _, kv_heads, key_len, e = value.shape
    out = query.new_empty(batch, query_len, heads, e).transpose(1, 2)
    lse = torch.empty(batch, heads, query_len, dtype=torch.float32, device=query.device)
    if out.numel() == 0 or key_len == 0:
        return Plan(out.zero_(), lse.fill_(-torch.inf))

    dtype, bits = str(query.dtype).removeprefix("torch."), 8 * query.element_size()
    g = Geometry(
        params, device, config or lookup(device.arch, d, e, dtype), batch, heads, kv_heads,
        query_len, key_len, d, e, query.element_size(),
        has_density=density is not None, masked=key_mask is not None,
        permuted=permutation is not None,
        describable=_describable(key, value) and d * bits % 128 == 0 and e * bits % 128 == 0,
    )  # fmt: skip
    call = Call(
        query=_with_small_span(query),
        key=_with_small_span(key),
        value=_with_small_span(value),
        mask=None if key_mask is None else key_mask.view(torch.uint8),
        density=None if density is None else density.reshape(-1),
        permutation=None if permutation is None else permutation.contiguous(),
        out=out,
        lse=lse,
    )
    buffers = _Buffers.allocate(g, query)
    work = Plan(out, lse)
    total = batch * kv_heads
    for start in range(0, total, g.group):
        count = min(g.group, total - start)
        work.launches.extend(_statistics(g, buffers, call, start, count))
        if g.inside:
            work.launches.extend(_cuts(g, buffers, call, start, count))
        else:
            work.launches.append(_routing(g, buffers, call, start, count))
        work.launches.append(_forward(g, buffers, call, start, count))
    return work


def _describable(*tensors: Tensor) -> bool:
    """Whether the copy engine can address the tensors: dense rows, 16-byte steps."""
    return all(
        t.stride(-1) == 1
        and t.data_ptr() % 16 == 0
        and all(s > 0 and s * t.element_size() % 16 == 0 for s in t.stride()[:-1])
        for t in tensors
    )


def _descriptor(tensor: Tensor, block: list[int]) -> TensorDescriptor:
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), block)


def _with_small_span(tensor: Tensor) -> Tensor:
    """The tensor itself, or a copy where the largest tile spans more than 32-bit offsets."""
    span = LARGEST_TILE * (tensor.stride(2) + tensor.stride(3))
    return tensor if span <= MAX_TILE_SPAN else tensor.contiguous()


@dataclass(frozen=True)
class _Buffers:
    """Workspace of one group of heads, reused by the next group."""

    key_mean: Tensor  # float32 [kv heads, N, D]
    key_mean_low: Tensor  # [kv heads, N, D] in the input dtype; key_mean itself for float32
    value_mean: Tensor  # [kv heads, N, E] in the input dtype
    log_weight: Tensor  # float32 [kv heads, N]
    counts_partial: Tensor  # float32 [kv heads, S, 2]
    partial: Tensor | None  # float32 [kv heads, S, D, E]
    first_order: Tensor | None  # [kv heads, D, E] in the input dtype
    mean_matrix: Tensor | None  # float32 [kv heads, D, E]
    score_bias: Tensor | None  # float32 [kv heads, N]
    energy: Tensor | None  # float32 [kv heads, parts, D]
    indices: Tensor  # int32 [heads, index tiles, capacity]
    # Of the routing kernel:
    scratch: Tensor | None  # float32 [programs, 16, N rounded up]
    counts: Tensor | None  # int32 [heads, index tiles]
    bitmap: Tensor | None  # int32 [heads, M, words]
    # Of threshold routing in the forward kernel:
    moments: tuple[Tensor, Tensor] | None  # float32 [kv heads, D] and [kv heads, D, D]
    cuts: Tensor | None  # float32 [heads, M]

    @staticmethod
    def allocate(g: Geometry, like: Tensor) -> _Buffers:
        kv_heads = g.group
        heads = kv_heads * g.group_size
        splits = g.splits(kv_heads)

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=like.device)

        matrix = g.first_order or g.covariance
        key_mean = empty(kv_heads, g.blocks, g.d)
        low = like.dtype != torch.float32
        return _Buffers(
            key_mean=key_mean,
            key_mean_low=empty(kv_heads, g.blocks, g.d, dtype=like.dtype) if low else key_mean,
            value_mean=empty(kv_heads, g.blocks, g.e, dtype=like.dtype),
            log_weight=empty(kv_heads, g.blocks),
            counts_partial=empty(kv_heads, splits, 2),
            partial=empty(kv_heads, splits, g.d, g.e) if matrix else None,
            first_order=empty(kv_heads, g.d, g.e, dtype=like.dtype) if g.first_order else None,
            mean_matrix=empty(kv_heads, g.d, g.e) if g.covariance else None,
            score_bias=empty(kv_heads, g.blocks) if g.covariance else None,
            energy=empty(kv_heads, ENERGY_PARTS, g.d) if g.corrected else None,
            indices=empty(heads, g.index_tiles, g.capacity, dtype=torch.int32),
            scratch=None
            if g.inside
            else empty(g.routing_programs(heads), ROUTING_ROWS, g.scratch_stride),
            counts=None if g.inside else empty(heads, g.index_tiles, dtype=torch.int32),
            bitmap=None
            if g.inside
            else empty(heads, g.query_blocks, g.columns // 32, dtype=torch.int32),
            moments=(empty(kv_heads, g.d), empty(kv_heads, g.d, g.d)) if g.inside else None,
            cuts=empty(heads, g.query_blocks) if g.inside else None,
        )


def _options(options: Options) -> dict[str, int]:
    chosen = {"num_warps": options.warps, "num_stages": options.stages}
    return chosen if options.registers is None else {**chosen, "maxnreg": options.registers}


def _dot_arguments(g: Geometry) -> dict[str, Any]:
    precise = g.bytes_per_value == 4
    return {
        "PRECISION": g.device.float32_precision if precise else "ieee",
        "UPCAST": g.device.arch == "interpreter",
    }


def _routing_dot_arguments(g: Geometry) -> dict[str, Any]:
    """Scores that decide are products of float32 means whatever the inputs."""
    return {
        "PRECISION": g.device.float32_precision,
        "UPCAST": g.device.arch == "interpreter",
    }


def _energy(g: Geometry, buffers: _Buffers, call: Call, start: int, count: int) -> KernelLaunch:
    arguments = {
        "query": call.query, "energy": buffers.energy, "query_strides": call.query.stride(),
        "head_start": start, "kv_heads": g.kv_heads, "group_size": g.group_size,
        "query_len": g.query_len, "part_rows": g.energy_rows,
        "share": 1.0 / (g.group_size * g.query_len),
        "D": g.d, "D_PAD": padded_width(g.d), "ROWS": ENERGY_ROWS,
    }  # fmt: skip
    grid = (ENERGY_PARTS, count)
    options = {"num_warps": 8}
    return KernelLaunch("energy", query_energy_kernel, grid, arguments, options, multiplies=False)


def _statistics(
    g: Geometry, buffers: _Buffers, call: Call, start: int, count: int
) -> list[KernelLaunch]:
    launches = []
    if buffers.energy is not None:
        launches.append(_energy(g, buffers, call, start, count))
    splits = g.splits(g.group)
    d_tile, e_tile = g.matrix_tiles
    low = buffers.key_mean_low
    inputs = {
        "key": call.key, "value": call.value, "key_mask": call.mask,
        "permutation": call.permutation, "key_mean": buffers.key_mean,
        "key_strides": call.key.stride(), "value_strides": call.value.stride(),
        "mask_strides": call.mask_strides,
        "head_start": start, "kv_heads": g.kv_heads, "key_len": g.key_len, "blocks": g.blocks,
        "BLOCK": g.key_size, "D": g.d, "E": g.e, "D_TILE": d_tile, "E_TILE": e_tile,
        **_dot_arguments(g),
    }  # fmt: skip
    options = _options(g.config.statistics)
    arguments = {
        **inputs,
        "key_mean_low": None if low is buffers.key_mean else low,
        "value_mean": buffers.value_mean,
        "log_weight": buffers.log_weight,
        "partial": buffers.partial,
        "partial_counts": buffers.counts_partial,
        "blocks_per_split": block_count(g.blocks, splits),
        "energy": buffers.energy,
        "scale": g.params.scale,
        "PARTS": ENERGY_PARTS,
        "LIMIT": MASS_FACTOR_LIMIT,
    }
    grid: tuple[int, ...] = (splits, g.matrix_programs, count)
    products = buffers.partial is not None
    launches.append(
        KernelLaunch("statistics", block_statistics_kernel, grid, arguments, options, products)
    )
    if buffers.partial is not None:
        arguments = {
            "partial": buffers.partial,
            "partial_counts": buffers.counts_partial,
            "first_order": buffers.first_order,
            "mean_matrix": buffers.mean_matrix,
            "scale": g.params.scale,
            "splits": splits,
            "SIZE": g.d * g.e,
            "TILE": REDUCE_TILE,
        }
        grid = (block_count(g.d * g.e, REDUCE_TILE), count)
        warps = {"num_warps": 4}
        launches.append(
            KernelLaunch("first_order", first_order_kernel, grid, arguments, warps, False)
        )
    if buffers.score_bias is not None:
        d_tile, e_tile = g.norm_tiles
        arguments = {
            **inputs, "mean_matrix": buffers.mean_matrix, "score_bias": buffers.score_bias,
            "D_TILE": d_tile, "E_TILE": e_tile, "EPS": COVARIANCE_EPS,
        }  # fmt: skip
        grid = (g.blocks, count)
        options = _options(g.config.covariance)
        launches.append(KernelLaunch("covariance", covariance_kernel, grid, arguments, options))
    return launches


def _cuts(g: Geometry, buffers: _Buffers, call: Call, start: int, count: int) -> list[KernelLaunch]:
    assert buffers.moments is not None
    first, last = g.free
    dense_first, dense_last = g.dense
    mean, covariance = buffers.moments
    tile = min(MOMENT_TILE, padded_width(g.d))
    options = _options(g.config.routing)
    moments = {
        "key_mean": buffers.key_mean, "log_weight": buffers.log_weight,
        "mean": mean, "covariance": covariance,
        "blocks": g.blocks, "free_first": first, "free_last": last,
        "D": g.d, "TILE": tile, "BLOCKS": MOMENT_BLOCKS, **_routing_dot_arguments(g),
    }  # fmt: skip
    cuts = {
        "query": call.query, "permutation": call.permutation,
        "mean": mean, "covariance": covariance, "cuts": buffers.cuts,
        **call.density_arguments, "query_strides": call.query.stride(),
        "head_start": start * g.group_size, "heads": g.heads, "group_size": g.group_size,
        "query_len": g.query_len, "query_blocks": g.query_blocks,
        "dense_first": dense_first, "dense_last": dense_last,
        "beta": g.params.threshold_beta, "scale": g.params.scale,
        "BLOCK": g.query_size, "D": g.d, "D_PAD": padded_width(g.d),
        "D_CHUNK": min(ROUTING_D_CHUNK, padded_width(g.d)), "ROWS": ROUTING_ROWS,
        **_routing_dot_arguments(g),
    }  # fmt: skip
    tiles = block_count(g.d, tile) ** 2
    rows = (g.row_groups, count * g.group_size)
    return [
        KernelLaunch("moments", centroid_moments_kernel, (tiles, count), moments, options),
        KernelLaunch("cuts", cut_kernel, rows, cuts, options),
    ]


def _routing(g: Geometry, buffers: _Buffers, call: Call, start: int, count: int) -> KernelLaunch:
    heads = count * g.group_size
    first, last = g.free
    dense_first, dense_last = g.dense
    weighed = g.params.weighs_routing
    arguments = {
        "query": call.query, "permutation": call.permutation,
        "key_mean": buffers.key_mean, "log_weight": buffers.log_weight,
        "score_bias": buffers.log_weight if weighed else buffers.score_bias,
        "BIAS_FACTOR": ROUTING_WEIGHT if weighed else 1.0, "scratch": buffers.scratch,
        "indices": buffers.indices, "counts": buffers.counts, "bitmap": buffers.bitmap,
        **call.density_arguments, "query_strides": call.query.stride(),
        "head_start": start * g.group_size, "heads": g.heads, "group_size": g.group_size,
        "query_len": g.query_len, "query_blocks": g.query_blocks, "blocks": g.blocks,
        "free_first": first, "free_last": last,
        "dense_first": dense_first, "dense_last": dense_last,
        "count": g.count, "beta": g.params.threshold_beta, "scale": g.params.scale,
        "capacity": g.capacity, "index_tiles": g.index_tiles, "row_groups": g.row_groups,
        "tasks": heads * g.row_groups, "scratch_stride": g.scratch_stride,
        "THRESHOLD": g.params.routing == "threshold",
        "BLOCK": g.query_size, "D": g.d, "D_PAD": padded_width(g.d),
        "D_CHUNK": min(ROUTING_D_CHUNK, padded_width(g.d)),
        "ROWS": ROUTING_ROWS, "SELECT": g.select, "COLUMNS": g.config.columns,
        "N": g.columns, "T": g.select_columns, "PACK": g.pack, **_routing_dot_arguments(g),
    }  # fmt: skip
    grid = (g.routing_programs(heads),)
    return KernelLaunch("routing", route_kernel, grid, arguments, _options(g.config.routing))


def _forward(g: Geometry, buffers: _Buffers, call: Call, start: int, count: int) -> KernelLaunch:
    sources: dict[str, Any] = {
        "key": call.key, "value": call.value,
        "key_mean": buffers.key_mean_low, "value_mean": buffers.value_mean,
    }  # fmt: skip
    if g.descriptors:
        shapes = {
            "key": [1, 1, g.keys, padded_width(g.d)],
            "value": [1, 1, g.keys, padded_width(g.e)],
            "key_mean": [1, g.config.centroids, padded_width(g.d)],
            "value_mean": [1, g.config.centroids, padded_width(g.e)],
        }
        sources = {name: _descriptor(t, shapes[name]) for name, t in sources.items()}
    arguments = {
        "query": call.query, **sources, "key_mask": call.mask, "permutation": call.permutation,
        "log_weight": buffers.log_weight, "first_order": buffers.first_order,
        "indices": buffers.indices, "counts": buffers.counts, "bitmap": buffers.bitmap,
        "cuts": buffers.cuts, "out": call.out, "lse": call.lse,
        "query_strides": call.query.stride(), "key_strides": call.key.stride(),
        "value_strides": call.value.stride(), "mask_strides": call.mask_strides,
        "out_strides": call.out.stride(),
        "head_start": start * g.group_size, "heads": g.heads, "group_size": g.group_size,
        "query_len": g.query_len, "key_len": g.key_len, "query_blocks": g.query_blocks,
        "blocks": g.blocks, "free_first": g.free[0], "free_last": g.free[1],
        "capacity": g.capacity, "index_tiles": g.index_tiles,
        "scale": g.params.scale, "TAIL": g.params.order != "none", "INSIDE": g.inside,
        "BLOCK": g.query_size, "KEY_BLOCK": g.key_size, "D": g.d, "E": g.e,
        "D_PAD": padded_width(g.d), "E_PAD": padded_width(g.e),
        "ROWS": g.rows, "KEYS": g.keys, "CENTROIDS": g.config.centroids,
        "D_CHUNK": min(g.config.d_chunk, padded_width(g.d)), "IN_CHUNKS": g.config.in_chunks,
        "WORDS": g.columns // 32,
        "DESCRIPTORS": g.descriptors, **_dot_arguments(g),
    }  # fmt: skip
    grid = (block_count(g.query_len, g.rows), count * g.group_size)
    return KernelLaunch("forward", forward_kernel, grid, arguments, _options(_forward_options(g)))


def _forward_options(g: Geometry) -> Options:
    config, small = g.config, g.keys < g.config.keys
    special = (
        config.small_guarded if g.guarded and small else None,
        config.guarded if g.guarded else None,
        config.selecting if g.inside else None,
        config.small if small else None,
    )
    return next((options for options in special if options is not None), config.forward)
