"""Transforms of torch.func, inside of which the op has no rules of its own."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from ..graph.fake import example, is_tensor


def transform_of(nodes: Iterable[fx.Node]) -> str | None:
    """Why tensors that a transform of torch.func wraps keep their attention dense, or None."""
    functorch = torch._C._functorch
    for node in nodes:
        if not is_tensor(node) or not functorch.is_functorch_wrapped_tensor(example(node)):
            continue
        if functorch.is_batchedtensor(example(node)):
            return (
                "it runs inside torch.vmap; pass the mapped dimension as one of the batch instead"
            )
        return (
            "it runs inside a derivative of torch.func (grad, vjp, jvp), and the op has none; "
            "call it outside"
        )
    return None
