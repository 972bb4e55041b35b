"""What must hold on several ranks: the result is that of a single process.

Models and inputs are the same everywhere. Rank 0 works out what to expect, alone, while the others
wait, for all ranks share the processor.
"""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch._dynamo.backends.debugging
import torch._functorch.aot_autograd
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from diffusers import ContextParallelConfig
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import pisa_compile as pisa
from pisa_compile.distributed import policies_of_rank, ring_attention
from pisa_compile.integrations.diffusers import register
from pisa_compile.kernels import dispatch
from pisa_compile.kernels.params import AttentionParams
from pisa_compile.kernels.testing import relative_l2
from tests.diffusers_models import CASES, Case, outputs
from tests.diffusers_models.flux_like import TEXT

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


@scenario
def ulysses_wan(rank: int, ranks: int) -> None:
    """Self-attention over latents: dense and sparse results are those of one process."""
    case = small("WanTransformer3DModel")

    def expected_results() -> dict[float, Tensor]:
        results = {0.0: run(case.build(), case), SPARSITY: single(case, sparsity=SPARSITY)}
        different(results[SPARSITY], results[0.0])
        return results

    for sparsity, expected in from_rank_zero(rank, expected_results).items():
        torch._dynamo.reset()
        with ulysses(case.build(), ranks) as model, counted_op() as shapes:
            # Not fullgraph: a hook of diffusers calls inspect.signature.
            model.compile_repeated_blocks(backend="pisa", options={**OPTIONS, "sparsity": sparsity})
            close(run(model, case), expected)
        assert shapes == [(1, HEADS // ranks, 300, 16)], shapes


@scenario
def ulysses_flux(rank: int, ranks: int) -> None:
    """Joint attention: after the all-to-all, ranks' shares of text and image alternate."""
    case = flux()

    def expected_results() -> dict[float, Tensor]:
        with counted_op(reorder=lambda tokens: interleaved(tokens, ranks)):
            sparse = single(case, sparsity=SPARSITY)
        different(sparse, single(case, sparsity=SPARSITY))  # the order does matter
        return {0.0: run(case.build(), case), SPARSITY: sparse}

    for sparsity, expected in from_rank_zero(rank, expected_results).items():
        torch._dynamo.reset()
        with ulysses(case.build(), ranks) as model, counted_op() as shapes:
            model.compile(backend="pisa", options={**OPTIONS, "sparsity": sparsity})
            close(run(model, case), expected)
        assert shapes == [(1, HEADS // ranks, TEXT + 256, 16)] * 2, shapes


def interleaved(tokens: Tensor, ranks: int) -> Tensor:
    """Text and image tokens [T] as ranks hold them: each its share of both."""
    parts = zip(tokens[:TEXT].chunk(ranks), tokens[TEXT:].chunk(ranks), strict=True)
    return torch.cat([share for both in parts for share in both])


@scenario
def ranges_of_one_process(rank: int, ranks: int) -> None:
    """Where shares alternate, "auto" finds no text at the start, and an exact range stays dense."""
    wan = small("WanTransformer3DModel")
    for case, exact, curve, expected, ordered in (
        (flux(), (TEXT, 0), "raster", [], []),
        (flux(), "auto", "hilbert", [(0, 0)] * 2, [False] * 2),
        (wan, (8, 0), "raster", [(8, 0)], [False]),
        (wan, "auto", "hilbert", [(0, 0)], [True]),  # the video's own grid
    ):
        torch._dynamo.reset()
        with ulysses(case.build(), ranks) as model, counted_op() as shapes:
            options = {**OPTIONS, "inner": "eager", "exact": exact, "curve": curve}
            model.compile(backend="pisa", options=options)
            assert run(model, case).isfinite().all()
        assert [call.exact for call in shapes.settings] == expected, shapes.settings
        permutations = shapes.permutations
        assert [order is not None for order in permutations] == ordered, permutations
        for order in permutations:
            if order is not None:
                near = (order // 100, order % 100 // 10, order % 10)  # of 3 frames, 10 x 10
                steps = sum(axis.diff().abs() for axis in near)
                assert steps.float().mean() < 1.5, steps


@scenario
def ring(rank: int, ranks: int) -> None:
    """Over all parts, what merging the parts in one process gives; at sparsity 0, dense."""
    generator = torch.Generator().manual_seed(5)
    query, key, value = torch.randn(3, 2, 3, 60 * ranks, 24, generator=generator).unbind()
    mask = torch.rand(2, 1, 1, 60 * ranks, generator=generator) > 0.3
    mask[1, ..., :60] = False  # one part has no valid key for this sample
    mine = [x.chunk(ranks, dim=2)[rank] for x in (query, key, value)]
    rows = slice(60 * rank, 60 * (rank + 1))
    dense = F.scaled_dot_product_attention(query, key, value, mask)[:, :, rows]
    shares = mask.chunk(ranks, dim=-1)

    out = ring_attention(*mine, sparsity=0.0, attn_mask=shares[rank])
    close(out, dense)
    settings: dict[str, Any] = {"sparsity": 0.7, "block_size": 16, "exact": (8, 0)}
    out, lse = ring_attention(*mine, attn_mask=shares[rank], return_lse=True, **settings)
    different(out, dense)
    parts = [
        pisa.attention(mine[0], k, v, attn_mask=share, return_lse=True, **settings)
        for k, v, share in zip(key.chunk(ranks, 2), value.chunk(ranks, 2), shares, strict=True)
    ]
    weights = torch.stack([part[1] for part in parts]).double().softmax(0)
    expected = sum(w[..., None] * part[0] for w, part in zip(weights, parts, strict=True))
    close(out, expected)
    close(lse, torch.stack([part[1] for part in parts]).double().logsumexp(0))
    assert out.transpose(1, 2).is_contiguous()


@scenario
def ring_in_diffusers(rank: int, ranks: int) -> None:
    """diffusers' ring and its mixture with Ulysses, through its attention backend "pisa"."""
    case = small("WanTransformer3DModel")
    dense = from_rank_zero(rank, lambda: run(case.build(), case))
    settings = {"min_tokens": 0, "block_size": 16, "exact": (0, 0)}
    degrees: list[dict[str, int]] = [{"ring_degree": ranks}, {"ulysses_degree": ranks}]
    if ranks == 4:
        degrees.append({"ring_degree": 2, "ulysses_degree": 2})
    for degree in degrees:
        model: Any = case.build()
        model.set_attention_backend("pisa")
        with parallel(model, **degree):
            register(pisa.Policy(**settings, sparsity=0.0))
            close(run(model, case), dense)
            register(pisa.Policy(**settings, sparsity=SPARSITY))
            with counted_op() as shapes:
                different(run(model, case), dense)
        heads, parts = HEADS // degree.get("ulysses_degree", 1), degree.get("ring_degree", 1)
        assert shapes == [(1, heads, 300 // parts, 16)] * parts, shapes
    register(pisa.Policy(**settings | {"exact": (8, 0)}))
    with pytest.raises(pisa.UnsupportedError, match="exact"):
        run(model, case)
    model.set_attention_backend("native")  # diffusers uses the last name for later models too


@scenario
def ring_compiled(rank: int, ranks: int) -> None:
    """The ring is one graph."""
    query, key, value = torch.randn(
        3, 1, 2, 64, 16, generator=torch.Generator().manual_seed(rank)
    ).unbind()

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = ring_attention(q, k, v, sparsity=0.5, block_size=16)
        assert isinstance(out, Tensor)
        return out

    traced = torch.compile(function, backend="aot_eager", fullgraph=True)
    close(traced(query, key, value), function(query, key, value))


@scenario
def ring_refusals(rank: int, ranks: int) -> None:
    q = torch.randn(1, 1, 32 + rank, 8)
    _raises(
        pisa.UnsupportedError, "same number of keys", lambda: ring_attention(q, q, q, sparsity=0.5)
    )
    q = torch.randn(1, 1, 32, 8, requires_grad=True)
    with torch.enable_grad():
        _raises(pisa.UnsupportedError, "no backward", lambda: ring_attention(q, q, q, sparsity=0.5))


def _raises(error: type[Exception], words: str, function: Callable[[], Any]) -> None:
    with pytest.raises(error, match=words):
        function()


class Attention(nn.Module):
    """With separate projections, as tensor parallelism wants them."""

    def __init__(self, width: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.to_q, self.to_k, self.to_v)
        )
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int = 64, head_dim: int = 16) -> None:
        super().__init__()
        self.attn = Attention(width, head_dim)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        return x + self.down(F.gelu(self.up(x)))


class Transformer(nn.Module):
    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(depth)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def transformer() -> Transformer:
    torch.manual_seed(0)
    model = Transformer().eval().requires_grad_(False)
    for block in model.blocks:
        block.attn.to_q.weight.mul_(4.0)
        block.attn.to_k.weight.mul_(4.0)
    return model


def expectations(rank: int, x: Tensor) -> dict[float, Tensor]:
    """Dense and sparse result of one process for the small transformer, by sparsity."""

    def make() -> dict[float, Tensor]:
        results = {0.0: transformer()(x), SPARSITY: compiled(transformer(), sparsity=SPARSITY)(x)}
        different(results[SPARSITY], results[0.0])
        return results

    results: dict[float, Tensor] = from_rank_zero(rank, make)
    return results


@scenario
def tensor_parallel(rank: int, ranks: int) -> None:
    """`parallelize_module`: every rank has some of the heads, as DTensors."""
    x = torch.randn(1, 250, 64, generator=torch.Generator().manual_seed(1))
    plan = {
        **dict.fromkeys(("attn.to_q", "attn.to_k", "attn.to_v", "up"), ColwiseParallel()),
        **dict.fromkeys(("attn.to_out", "down"), RowwiseParallel()),
    }
    mesh = init_device_mesh("cpu", (ranks,))
    for sparsity, expected in expectations(rank, x).items():
        model = transformer()
        for block in model.blocks:
            parallelize_module(block, mesh, plan)
        with counted_op() as shapes:
            close(compiled(model, sparsity=sparsity)(x), expected)
        assert shapes == [(1, HEADS // ranks, 250, 16)] * 2, shapes


@scenario
def fully_sharded(rank: int, ranks: int) -> None:
    """FSDP2: every rank has some rows of every weight, and a sample of its own."""
    x = torch.randn(ranks, 250, 64, generator=torch.Generator().manual_seed(1))
    mesh = init_device_mesh("cpu", (ranks,))
    for sparsity, expected in expectations(rank, x).items():
        torch._dynamo.reset()
        model: Any = transformer()
        whole = model.blocks[0].up.weight.numel()
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        assert model.blocks[0].up.weight.to_local().numel() * ranks == whole
        for module in model.blocks if sparsity else [model]:  # by block, and as a whole
            module.compile(backend="pisa", options={**OPTIONS, "sparsity": sparsity})
        with counted_op() as shapes:
            close(model(x[rank : rank + 1]), expected[rank : rank + 1])
        assert shapes == [(1, HEADS, 250, 16)] * 2, shapes


@scenario
def policies_on_every_rank(rank: int, ranks: int) -> None:
    """A policy file holds on every rank: also inside hooks, and for the heads that a rank has."""
    case = small("WanTransformer3DModel", num_layers=2)
    listed = pisa.Schedule(steps=[[0.2, 0.4, 0.6, 0.8]])
    policies = {"blocks.0": pisa.DENSE, "blocks.1": pisa.Policy(schedule=listed)}

    def expected_result() -> Tensor:
        model = case.build()
        pisa.set_policy(model, policies)
        return run(compiled(model), case)

    expected = from_rank_zero(rank, expected_result)
    torch._dynamo.reset()
    with ulysses(case.build(), ranks) as model, counted_op() as shapes:
        pisa.set_policy(model, policies_of_rank(policies))
        model.compile_repeated_blocks(backend="pisa", options=OPTIONS)
        close(run(model, case), expected)
    assert len(shapes) == 1, shapes
