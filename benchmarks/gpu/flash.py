"""Dense attention as a plain Triton kernel: what the exact part of ours is compared with.

It has our forward kernel's tile shape, warps, stages and way of reading memory, and nothing of its
bookkeeping: no index lists, no masks but the one at the end of the sequence, one head after the
other. What ours loses against it is the price of sparsity.
"""

# mypy: disable-error-code="no-untyped-def,misc,no-any-return"

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from pisa_compile.kernels.triton.configs import Config, padded_width
from pisa_compile.kernels.triton.primitives import LOG2E, dot, load_tile, online_softmax


@triton.jit(do_not_specialize=["tokens"])
def flash_kernel(
    query, key, value, out,  # [B, H, T, D]; key and value pointers or descriptors
    stride_b, stride_h, stride_t,  # of query, key and value
    out_stride_b, out_stride_h, out_stride_t,
    heads, tokens, scale,
    D: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    first, head = tl.program_id(0) * ROWS, tl.program_id(1)
    batch, own = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    place = batch * stride_b + own * stride_h
    rows, columns, width = tl.arange(0, ROWS), tl.arange(0, KEYS), tl.arange(0, D_PAD)
    inside = first + rows < tokens
    q = load_tile(
        query + place + first.to(tl.int64) * stride_t, rows, width, stride_t, 1, inside, D
    )
    if not DESCRIPTORS:
        key += place
        value += place
    row_max = tl.full([ROWS], float("-inf"), tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D_PAD], tl.float32)
    for start in tl.range(0, tokens, KEYS):
        valid = start + columns < tokens
        if DESCRIPTORS:
            k = key.load([batch.to(tl.int32), own.to(tl.int32), start, 0]).reshape([KEYS, D_PAD])
            v = value.load([batch.to(tl.int32), own.to(tl.int32), start, 0]).reshape([KEYS, D_PAD])
        else:
            step = tl.cast(start, tl.int64) * stride_t
            k = load_tile(key + step, columns, width, stride_t, 1, valid, D)
            v = load_tile(value + step, columns, width, stride_t, 1, valid, D)
        zero = tl.zeros([ROWS, KEYS], tl.float32)
        score = dot(q, tl.trans(k), zero, PRECISION, UPCAST) * (scale * LOG2E)
        score += tl.where(valid, 0.0, float("-inf"))[None, :]
        row_max, row_sum, acc = online_softmax(score, v, row_max, row_sum, acc, PRECISION, UPCAST)
    acc = acc / row_sum[:, None]
    out += batch * out_stride_b + own * out_stride_h + first.to(tl.int64) * out_stride_t
    tl.store(
        out + rows[:, None] * out_stride_t + width[None, :], acc.to(out.dtype.element_ty),
        mask=inside[:, None] & (width < D)[None, :],
    )  # fmt: skip


def dense_flash(
    q: Tensor, k: Tensor, v: Tensor, scale: float, config: Config, interpreted: bool
) -> Callable[[], Tensor]:
    """A run of the kernel on tensors of one shape and one set of strides, dense rows."""
    if not q.stride() == k.stride() == v.stride() or q.stride(3) != 1:
        raise ValueError(f"expected three tensors of equal strides, got {q.stride()}, {k.stride()}")
    batch, heads, tokens, d = q.shape
    keys, padded = min(config.keys, 64), padded_width(d)
    descriptors = config.descriptors and (d * q.element_size()) % 16 == 0

    def source(tensor: Tensor) -> Tensor | TensorDescriptor:
        if not descriptors:
            return tensor
        shape, stride = list(tensor.shape), list(tensor.stride())
        return TensorDescriptor(tensor, shape, stride, [1, 1, keys, padded])

    out = q.new_empty(batch, tokens, heads, d).transpose(1, 2)
    grid = (triton.cdiv(tokens, config.rows), batch * heads)

    def run() -> Tensor:
        flash_kernel[grid](
            q, source(k), source(v), out, *q.stride()[:3], *out.stride()[:3], heads, tokens, scale,
            D=d, D_PAD=padded, ROWS=config.rows, KEYS=keys, DESCRIPTORS=descriptors,
            PRECISION="tf32x3" if q.dtype == torch.float32 and not interpreted else "ieee",
            UPCAST=interpreted, num_warps=config.forward.warps, num_stages=config.forward.stages,
        )  # fmt: skip
        return out

    return run
