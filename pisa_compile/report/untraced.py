"""Attention that ran outside of every graph, where the pass cannot see it.

Dynamo leaves some code alone: around a graph break in a loop, under `torch.compiler.disable`, in
functions of C. A mode below autograd watches the operators that such code runs. It is switched off
while Dynamo compiles and inside our graphs, so it neither changes nor recompiles anything.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from ..passes import attention_kernel

_MODULES = {"_native_multi_head_attention", "_transformer_encoder_layer_fwd"}
_SOFTMAX = {"_softmax", "_safe_softmax", "softmax"}
_PRODUCTS = {"mm", "bmm", "matmul", "baddbmm"}
_COPIES = {"_to_copy", "clone", "native_dropout", "mul", "expand", "view"}


@dataclass(frozen=True)
class NotTraced:
    """Attention that no graph contains.

    Attributes:
        module: name of the innermost module around it, as in `model.named_modules()`.
        kind: the operator that ran, or "softmax and product".
        query_shape, key_shape: of its arguments; empty where no operator takes query and key.
        reason: why it is not in a graph and what to do about it.
        calls: how often it ran.
    """

    module: str
    kind: str
    query_shape: tuple[int, ...]
    key_shape: tuple[int, ...]
    reason: str
    calls: int = 1


class EagerAttention(TorchDispatchMode):
    """Notes every attention that runs while it is active and `watching()` is true."""

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module, watching: Callable[[], bool]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._names = {id(module): name for name, module in model.named_modules()}
        self._watching = watching
        self._calls: list[NotTraced] = []
        self._weights: dict[int, StorageWeakRef] = {}  # of softmax results, by address

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let Dynamo compile under this mode, and do not watch it."""
        return True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._watching():
            self._note(func, args, result)
        return result

    def found(self) -> tuple[NotTraced, ...]:
        """What ran, equal calls as one, in the order of their first runs."""
        reason = _reason()
        counts = Counter(self._calls)
        return tuple(replace(call, calls=count, reason=reason) for call, count in counts.items())

    def _note(self, func: Any, args: tuple[Any, ...], result: Any) -> None:
        name = func.name() if not isinstance(func, torch._ops.OpOverload) else func._opname
        fused = name.startswith("_scaled_dot_product")
        if fused or attention_kernel(func) or name in _MODULES or name == "flex_attention":
            query, key = (*(x for x in args if isinstance(x, Tensor)), None, None)[:2]
            # Which of its kernels torch chose says nothing to a reader.
            self._add("scaled_dot_product_attention" if fused else name, query, key)
        elif name in _SOFTMAX and result.dim() >= 3:
            self._remember(result)
        elif name in _PRODUCTS and any(map(self._is_weights, args)):
            self._add("softmax and product", None, None)
        elif name in _COPIES and self._is_weights(args[0]):
            self._remember(result[0] if isinstance(result, tuple) else result)

    def _add(self, kind: str, query: Tensor | None, key: Tensor | None) -> None:
        query_shape, key_shape = (() if x is None else tuple(x.shape) for x in (query, key))
        self._calls.append(NotTraced(self._module(), kind, query_shape, key_shape, reason=""))

    def _remember(self, weights: Tensor) -> None:
        storage = weights.untyped_storage()
        self._weights[storage._cdata] = StorageWeakRef(storage)  # type: ignore[no-untyped-call]

    def _is_weights(self, value: Any) -> bool:
        if not isinstance(value, Tensor):
            return False
        known = self._weights.get(value.untyped_storage()._cdata)
        return known is not None and not known.expired()  # type: ignore[no-untyped-call]

    def _module(self) -> str:
        """The innermost module whose forward is on the stack: hooks would be traced instead."""
        frame = sys._getframe(1)
        while frame.f_back is not None:
            frame = frame.f_back
            owner = frame.f_locals.get("self")
            if isinstance(owner, nn.Module) and id(owner) in self._names:
                name: str = self._names[id(owner)]
                return name.removeprefix("_orig_mod").removeprefix(".")
        return ""


def _reason() -> str:
    """Why code is not traced, and the setting that helps where tokens are picked by a mask."""
    text = "Dynamo did not trace the code around it"
    name = "capture_dynamic_output_shape_ops"
    setting = f"set torch._dynamo.config.{name} = True, or compile with fullgraph=True"
    breaks = torch._dynamo.utils.counters["graph_break"]
    if any("Dynamic shape operator" in cause or name in cause for cause in breaks):
        return f"{text}: {setting}"
    text += "; TORCH_LOGS=graph_breaks says why"
    # Dynamo gives up on loops without counting the break.
    captured = getattr(torch._dynamo.config, name)
    return text if captured else f"{text}; if it picks tokens by a mask, {setting}"
