"""Tokens spread over ranks: Ulysses, ring, and diffusers' own context parallelism."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.backends.debugging
import torch._functorch.aot_autograd
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

import pisa_compile as pisa
from benchmarks.diffusers_models.flux_like import TEXT
from pisa_compile.distributed import ring_attention
from pisa_compile.integrations.diffusers import register

from .shared import (
    HEADS,
    OPTIONS,
    SPARSITY,
    close,
    counted_op,
    different,
    flux,
    from_rank_zero,
    parallel,
    run,
    scenario,
    single,
    small,
    ulysses,
)


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
