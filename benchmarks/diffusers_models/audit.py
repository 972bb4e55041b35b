"""Which attention runs in eager mode, so that what tracing loses can be counted and named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _pop_mode_temporarily

from pisa_compile import Report
from pisa_compile.report.explain import Site

_PRODUCTS = {"matmul", "__matmul__", "bmm", "baddbmm", "einsum"}
_KEEPS_WEIGHTS = {"dropout", "to", "float", "type_as", "type", "half", "view", "reshape"}


@dataclass(frozen=True)
class EagerCall:
    """One attention that ran.

    Attributes:
        module: name of the innermost module around it.
        kind: "sdpa", "multi_head_attention", "flex_attention" or "softmax and product".
        query_shape, key_shape: as passed; empty where the call does not show them.
        mask: shape and dtype of the mask, or "".
    """

    module: str
    kind: str
    query_shape: tuple[int, ...] = ()
    key_shape: tuple[int, ...] = ()
    mask: str = ""


@torch.no_grad()
def record_eager(model: nn.Module, inputs: dict[str, Any]) -> tuple[Any, list[EagerCall]]:
    """Run a model in eager mode; its result and the attention calls in it."""
    with _module_stack(model) as innermost, _Recorder(innermost) as recorder:
        return model(**inputs), recorder.calls


@dataclass(frozen=True)
class Coverage:
    """Eager calls against sites found in graphs.

    Attributes:
        eager, found: how many there are.
        lost: calls by module that no site stands for.
        unexplained: sites by module that stand for no call.
    """

    eager: int
    found: int
    lost: Counter[str]
    unexplained: Counter[str]

    @classmethod
    def of(cls, calls: list[EagerCall], report: Report) -> Coverage:
        sites = [site for site in report.sites for _ in range(site.calls)]
        # By module and shape; what is left by module alone, for an attention inside an opaque call
        # has other shapes; then by shape alone, for behind a graph break module names are partial.
        keys: list[tuple[Callable[[EagerCall], Any], Callable[[Site], Any]]] = [
            (lambda c: (c.module, *_shapes(c)), lambda s: (s.module, *_shapes(s))),
            (lambda c: c.module, lambda s: s.module),
            (_shapes, _shapes),
        ]
        lost, unexplained = calls, sites
        for call_key, site_key in keys:
            lost, unexplained = _without_pairs(lost, unexplained, call_key, site_key)
        return cls(
            eager=len(calls),
            found=len(sites),
            lost=Counter(call.module for call in lost),
            unexplained=Counter(site.module for site in unexplained),
        )


def _shapes(x: EagerCall | Site) -> tuple[tuple[int, ...], ...]:
    return (x.query_shape, x.key_shape)


def _without_pairs(
    calls: list[EagerCall],
    sites: list[Site],
    call_key: Callable[[EagerCall], Any],
    site_key: Callable[[Site], Any],
) -> tuple[list[EagerCall], list[Site]]:
    """What remains when calls and sites of equal keys are taken away in pairs."""
    rest, unmatched = list(sites), []
    for call in calls:
        match = next((site for site in rest if site_key(site) == call_key(call)), None)
        if match is None:
            unmatched.append(call)
        else:
            rest.remove(match)
    return unmatched, rest


class _Recorder(TorchFunctionMode):
    def __init__(self, innermost: Callable[[], str]) -> None:
        super().__init__()
        self.calls: list[EagerCall] = []
        self._innermost = innermost
        self._weights: list[Tensor] = []  # results of a softmax; kept alive, so ids stay unique
        self._patches = ExitStack()

    def __enter__(self) -> _Recorder:
        # A higher-order operator: function modes do not see it.
        from torch.nn.attention import flex_attention

        original = flex_attention.flex_attention

        def flex(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
            self._add("flex_attention", query, key)
            # It compiles itself, and would trace this mode.
            with _pop_mode_temporarily():
                return original(query, key, *args, **kwargs)

        self._patches.enter_context(mock.patch.object(flex_attention, "flex_attention", flex))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.close()
        self._weights.clear()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if func is F.scaled_dot_product_attention:
            self._sdpa(*args, **kwargs)
        elif func is F.multi_head_attention_forward:
            self._add("multi_head_attention", *args[:2])
        elif name in _PRODUCTS and self._has_weights(args):
            self._add("softmax and product")
        result = func(*args, **kwargs)
        attention_sized = name == "softmax" and result.dim() >= 3
        if attention_sized or (name in _KEEPS_WEIGHTS and self._has_weights(args[:1])):
            self._weights.append(result)
        return result

    def _sdpa(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, *args: Any, **_: Any
    ) -> None:
        mask = "" if attn_mask is None else f"{[*attn_mask.shape]} {attn_mask.dtype}"
        self._add("sdpa", query, key, mask)

    def _add(
        self, kind: str, query: Tensor | None = None, key: Tensor | None = None, mask: str = ""
    ) -> None:
        shapes = [() if x is None else tuple(x.shape) for x in (query, key)]
        self.calls.append(EagerCall(self._innermost(), kind, *shapes, mask))

    def _has_weights(self, args: Any) -> bool:
        return any(any(x is weights for weights in self._weights) for x in args)


@contextmanager
def _module_stack(model: nn.Module) -> Iterator[Callable[[], str]]:
    """A function that names the innermost running module of `model`."""
    names = {module: name for name, module in model.named_modules()}
    stack: list[str] = []

    def push(module: nn.Module, args: Any) -> None:
        stack.append(names.get(module, ""))

    def pop(module: nn.Module, args: Any, result: Any) -> None:
        stack.pop()

    module_hooks = nn.modules.module
    handles = [
        module_hooks.register_module_forward_pre_hook(push),
        module_hooks.register_module_forward_hook(pop),
    ]
    try:
        yield lambda: stack[-1] if stack else ""
    finally:
        for handle in handles:
            handle.remove()
