"""What scenarios share: small models, the same on every rank, and counted calls of the op."""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch._dynamo.backends.debugging
import torch._functorch.aot_autograd
import torch.distributed as dist
from diffusers import ContextParallelConfig
from torch import Tensor, nn

from benchmarks.diffusers_models import CASES, Case, outputs
from pisa_compile.integrations.diffusers import register
from pisa_compile.kernels.params import AttentionParams
from pisa_compile.kernels.testing import relative_l2
from pisa_compile.ops import dispatch

from .launch import Scenario

OPTIONS: dict[str, Any] = {
    "min_tokens": 0,
    "block_size": 16,
    "inner": "aot_eager",
    "preset": None,
    "exact": (0, 0),
    "curve": "raster",  # the same order of tokens on one process and on many
}
HEADS = 4  # as many as ranks, at most
SPARSITY = 0.7
register()
SCENARIOS: dict[str, Scenario] = {}
# Imported here, before the processes are forked, and not in each of them.
PRELOADED = [CASES[name].cls() for name in ("FluxTransformer2DModel", "WanTransformer3DModel")]


def scenario(function: Scenario) -> Scenario:
    SCENARIOS[function.__name__] = function
    return function


def small(name: str, **config: Any) -> Case:
    """A case with one block of each kind and a head for every rank."""
    case = CASES[name]
    sizes = {**case.config(), "num_attention_heads": HEADS, "num_layers": 1, **config}
    return dataclasses.replace(case, config=lambda: sizes)


def flux() -> Case:
    return small("FluxTransformer2DModel", num_single_layers=1)


def run(model: nn.Module, case: Case) -> Tensor:
    (result,) = outputs(model(**case.inputs()))
    return result


def single(case: Case, **options: Any) -> Tensor:
    """The result of one process."""
    return run(compiled(case.build(), **options), case)


def compiled(model: nn.Module, **options: Any) -> nn.Module:
    torch._dynamo.reset()
    return torch.compile(model, backend="pisa", options={**OPTIONS, **options})


def from_rank_zero(rank: int, make: Callable[[], Any]) -> Any:
    """What `make` gives on rank 0, on every rank; if it fails there, every rank fails."""
    box: list[Any] = [None]
    if rank == 0:
        try:
            box = [make()]
        except Exception:
            box = [RuntimeError(traceback.format_exc())]
    dist.broadcast_object_list(box)
    if isinstance(box[0], RuntimeError):
        raise box[0]
    return box[0]


class Calls(list[tuple[int, ...]]):
    """Query shapes of the op's calls, and what else they were told."""

    def __init__(self) -> None:
        super().__init__()
        self.settings: list[AttentionParams] = []
        self.permutations: list[Tensor | None] = []


@contextmanager
def counted_op(reorder: Callable[[Tensor], Tensor] | None = None) -> Iterator[Calls]:
    """Collect the op's calls; each may get its tokens in another order."""
    shapes = Calls()
    original = dispatch.attention

    def counting(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        shapes.append(tuple(query.shape))
        shapes.settings += [x for x in args if isinstance(x, AttentionParams)]
        shapes.permutations.append(kwargs.get("permutation"))
        if reorder is None:
            return original(query, key, value, *args, **kwargs)
        order = reorder(torch.arange(query.shape[2]))
        ordered = (x[:, :, order] for x in (query, key, value))
        out, lse = original(*ordered, *args, **kwargs)
        back = order.argsort()
        # In the memory order that the op promises.
        out = out[:, :, back].transpose(1, 2).contiguous().transpose(1, 2)
        return out, lse[:, :, back].contiguous()

    with mock.patch.object(dispatch, "attention", counting):
        yield shapes


@contextmanager
def ulysses(model: nn.Module, ranks: int) -> Iterator[nn.Module]:
    """The model with diffusers' context parallelism: all tokens for some of the heads."""
    with parallel(model, ulysses_degree=ranks):
        yield model


@contextmanager
def parallel(model: nn.Module, **degrees: int) -> Iterator[nn.Module]:
    """The model with diffusers' context parallelism, on processes without an accelerator."""
    with mock.patch.object(torch.accelerator, "device_count", return_value=1):
        model.enable_parallelism(config=ContextParallelConfig(**degrees))
        yield model


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    error = relative_l2(actual, expected)
    assert error < tolerance, f"relative distance {error:.1e}"


def different(actual: Tensor, expected: Tensor) -> None:
    error = relative_l2(actual, expected)
    assert error > 1e-3, f"relative distance {error:.1e}: sparsity changes nothing"
