"""The op as a function, with the argument checks of a library."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from ..kernels.params import DEFAULT_BLOCK_SIZE, DEFAULT_ORDER, DEFAULT_ROUTING, Settings
from . import validation


@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    sparsity: float,
    scale: float | None = ...,
    block_size: int = ...,
    key_block_size: int | None = ...,
    routing: str = ...,
    order: str = ...,
    attn_mask: Tensor | None = ...,
    exact: tuple[int, int] = ...,
    density: Tensor | None = ...,
    permutation: Tensor | None = ...,
    enable_gqa: bool = ...,
    return_lse: Literal[False] = ...,
    impl: str | None = ...,
) -> Tensor: ...


@overload
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    sparsity: float,
    scale: float | None = ...,
    block_size: int = ...,
    key_block_size: int | None = ...,
    routing: str = ...,
    order: str = ...,
    attn_mask: Tensor | None = ...,
    exact: tuple[int, int] = ...,
    density: Tensor | None = ...,
    permutation: Tensor | None = ...,
    enable_gqa: bool = ...,
    return_lse: Literal[True],
    impl: str | None = ...,
) -> tuple[Tensor, Tensor]: ...


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    sparsity: float,
    scale: float | None = None,
    block_size: int = DEFAULT_BLOCK_SIZE,
    key_block_size: int | None = None,
    routing: str = DEFAULT_ROUTING,
    order: str = DEFAULT_ORDER,
    attn_mask: Tensor | None = None,
    exact: tuple[int, int] = (0, 0),
    density: Tensor | None = None,
    permutation: Tensor | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Piecewise sparse attention (PISA, arXiv 2602.01077).

    Every query block attends the key blocks that matter most to it exactly; all other key blocks
    are approximated by a Taylor expansion around their mean key, inside the same softmax.

    Args:
        query: [B, H, Tq, D], a floating-point dtype, any strides. Accumulation is in float32, or
            float64 for float64 inputs.
        key: [B, H, Tk, D], or [B, G, Tk, D] with H a multiple of G and `enable_gqa=True`.
        value: [B, H, Tk, E] or [B, G, Tk, E].
        sparsity: fraction of the key blocks that is approximated, in [0, 1). 0 is dense attention.
            The exact blocks of each query block number `max(1, ceil((1 - sparsity) * N))`.
        scale: factor on `query @ key^T`; `D ** -0.5` by default.
        block_size: tokens per query block, and per key block: 16, 32, 64 or 128.
        key_block_size: tokens per key block, where that is to be another number of the same four.
        routing: which blocks are exact. "topk": highest product of mean query and mean key, with
            order "corrected" plus twice the logarithm of the block's corrected mass;
            "topk_covariance": the same plus the log norm of the block's key-value covariance;
            "threshold": those above mean + beta * std of their row (Sol-Attn, arXiv 2607.24027),
            beta chosen for the asked density.
        order: how the other blocks are approximated. "none": dropped; "zeroth": by their means;
            "hybrid": means plus one first-order matrix for all of them (the paper's method);
            "corrected": hybrid, each block's mass corrected for the scatter of its keys;
            "blockwise": a first-order matrix each (slow).
        attn_mask: boolean key-padding mask, True where a key takes part, that broadcasts to
            [B, 1, 1, Tk]. Rows without any valid key give zeros.
        exact: `(prefix, suffix)` tokens that every query attends exactly. In self-attention
            (`Tq == Tk`) their own rows attend densely.
        density: float32 [] or [H] on the device of the query: the fraction of exact blocks, for all
            heads or for each, in place of `1 - sparsity`; 1 is dense attention. Being data, it may
            change from call to call without recompilation, and is not read on the host.
        permutation: integer [T]: self-attention cuts its tokens into blocks in this order. The
            result is in the tokens' own order. `exact` counts places in the permuted sequence.
        enable_gqa: allow fewer key/value heads than query heads.
        return_lse: also return the natural log-sum-exp of the logits, [B, H, Tq] in float32.
        impl: force "reference", "cpu" or "triton"; chosen by device when None.

    Returns:
        [B, H, Tq, E] in the query's dtype, in [B, Tq, H, E] memory order; with `return_lse` a pair.

    Raises:
        TypeError, ValueError: an argument is not what is described above; the text says what was
            expected and what came.
        UnsupportedError: `impl` cannot run this call.
    """
    if isinstance(query, Tensor) and _under_autocast(query.device.type):
        # As `F.scaled_dot_product_attention` does under autocast.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    validation.check_exact(exact)  # two arguments of the op
    settings = Settings(
        sparsity=sparsity,
        block_size=block_size,
        key_block_size=key_block_size,
        routing=routing,
        order=order,
        exact=exact,
    )
    op: Any = torch.ops.pisa.attention_with_lse if return_lse else torch.ops.pisa.attention
    tensors = query, key, value, attn_mask, density, permutation
    arguments = {"scale": scale, "enable_gqa": enable_gqa, "impl": impl, **settings.as_arguments()}
    if torch.compiler.is_compiling():
        result: Tensor | tuple[Tensor, Tensor] = op(*tensors, **arguments)
        return result
    try:
        result = op(*tensors, **arguments)
    except RuntimeError:
        # What the schema refuses does not reach the op's own check, which has the better words.
        validation.check_call(
            *tensors, scale=scale, enable_gqa=enable_gqa, settings=vars(settings) | {"impl": impl}
        )
        raise
    return result


def _under_autocast(device_type: str) -> bool:
    """Some devices have no autocast, and torch raises when it is asked about them."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)
