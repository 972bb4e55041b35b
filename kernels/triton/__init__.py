"""The op on CUDA and ROCm devices. Importing this package does not import Triton."""

from __future__ import annotations

from torch import Tensor

from ..params import AttentionParams

__all__ = ["attention"]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    params: AttentionParams,
    *,
    density: Tensor | None = None,
    permutation: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Piecewise sparse attention, as specified by `kernels.reference.attention`.

    Args:
        query: [B, H, Tq, D] in float32, float16 or bfloat16, any strides; D up to 256.
        key: [B, G, Tk, D] where G divides H.
        value: [B, G, Tk, E]; E up to 256.
        key_mask: boolean [B, Tk], True where a key takes part, or None.
        params: validated settings; `order="blockwise"` is not implemented here.
        density: float32 [] or [H] on the query's device, or None. The density of the exact blocks
            in place of `1 - params.sparsity`; 1 or more is dense attention. It is read by the
            kernels, so its values may change from call to call without recompilation or
            synchronisation.
        permutation: int32 or int64 [T], or None: place i of the block structure of self-attention
            holds token `permutation[i]`. Rows are read and written through it; nothing is copied.

    Returns:
        Output [B, H, Tq, E] in [B, Tq, H, E] memory order and log-sum-exp [B, H, Tq] in float32.
    """
    from .launcher import run  # imports Triton

    return run(query, key, value, key_mask, params, density, permutation)
