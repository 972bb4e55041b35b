"""One cell of the pipeline matrix: a pipeline, a way to compile it, and a feature beside it.

The same steps run on a dense pipeline in eager mode and on one compiled with `backend="pisa"` at
sparsity 0. Both must give the same latents, and the op must run as often as the dense pipeline ran
self-attention, so a site that silently fell back to eager mode would show.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch._dynamo.utils import counters
from torch.overrides import TorchFunctionMode

from benchmarks.diffusers_models.case import randomise
from examples.pipelines.tiny import TEXT_TOKENS, TinyPipeline
from pisa_compile.ops import dispatch

from .features import FEATURES, STEPS, Feature

OPTIONS = {"min_tokens": 0, "block_size": 16, "preset": None}
TOLERANCE = 1e-4
WHOLE = "torch.compile(transformer)"
BLOCKS = "compile_repeated_blocks(fullgraph=True)"
BREAKS = "compile_repeated_blocks()"
ATTENTION = "compile() of each attention"
STYLES = (WHOLE, BLOCKS)
_FINER = {WHOLE: ATTENTION, BLOCKS: BREAKS, BREAKS: ATTENTION}
ATTENTION_NAMES = (".attn", ".attn1")
_OUTSIDE = "all attention runs outside of compiled code"


class NotOfferedError(RuntimeError):
    """Without us it does not work either."""


@dataclass(frozen=True)
class Cell:
    """What came out.

    Attributes:
        style: how the transformer was to be compiled, one of `STYLES`.
        used: how it was compiled: `style`, or what was left where diffusers does not allow that.
        remark: what diffusers does not allow, in its own or Dynamo's words.
        attention: self-attention calls of the dense pipeline, over all steps.
        replaced: calls of the op in the compiled one.
        graphs: graphs that were compiled, and of those the ones compiled after the first call.
        difference: relative distance of the latents at sparsity 0, the largest of all calls.
        change: the same at a sparsity of 0.9; None where it was not measured.
    """

    pipeline: str
    style: str
    used: str
    remark: str
    feature: str
    inner: str
    attention: int
    replaced: int
    graphs: int
    late_graphs: int
    difference: float
    change: float | None
    seconds: float

    @property
    def problems(self) -> list[str]:
        """What must not be; empty if all is well."""
        found = []
        if not 0 < self.attention == self.replaced:
            found.append(f"{self.replaced} of {self.attention} attention calls replaced")
        if not self.difference <= TOLERANCE:
            found.append(f"latents differ by {self.difference:.1e} at sparsity 0")
        if self.change is not None and not self.change > 10 * TOLERANCE:
            found.append(f"latents differ by only {self.change:.1e} at sparsity 0.9")
        if self.late_graphs and not FEATURES[self.feature].recompiles:
            found.append(f"{self.late_graphs} graphs were compiled again")
        return found


def measure(
    tiny: TinyPipeline,
    style: str,
    feature: Feature,
    inner: str = "eager",
    *,
    change: bool = False,
) -> Cell:
    """Run one combination.

    Where a style fails with a backend that changes nothing as well, the next finer one is tried.

    Args:
        tiny: the pipeline.
        style: one of `STYLES`.
        feature: set up on both pipelines.
        inner: what compiles the rewritten graph.
        change: also measure what a sparsity of 0.9 changes.

    Raises:
        NotOfferedError: the dense pipeline does not run with this feature.
    """
    start = time.perf_counter()
    attention: list[Any] = []
    try:
        with counted_attention(attention):
            dense = _run(tiny, feature, lambda pipe: None)
    except Exception as error:
        raise NotOfferedError(_first_line(error)) from error

    used, remark = style, ""
    while True:
        graphs: list[int] = []
        replaced: list[Any] = []
        try:
            with counted_op(replaced):
                same = _run(tiny, feature, _pisa(used, inner, 0.0), graphs)
        except torch._dynamo.exc.Unsupported:
            cause = _any_backend_fails(tiny, feature, used)
            if not cause or used not in _FINER:
                raise
        else:
            if len(replaced) == len(attention) or used not in _FINER:
                break
            seen = _seen_by_any_backend(tiny, feature, used)
            if seen != len(replaced):
                break
            cause = "some attention runs outside of compiled code" if seen else _OUTSIDE
        used, remark = _FINER[used], remark or cause

    changed = None
    if change:
        changed = _distance(_run(tiny, feature, _pisa(used, inner, 0.9)), dense)
    return Cell(
        pipeline=tiny.name,
        style=style,
        used=used,
        remark=remark,
        feature=feature.name,
        inner=inner,
        attention=len(attention),
        replaced=len(replaced),
        graphs=graphs[-1],
        late_graphs=graphs[-1] - graphs[0],
        difference=_distance(same, dense),
        change=changed,
        seconds=round(time.perf_counter() - start, 1),
    )


def compile_transformer(pipe: Any, style: str, **settings: Any) -> None:
    """Compile a pipeline's transformer as a user would."""
    transformer = pipe.transformer
    fullgraph = style == BLOCKS
    if style == WHOLE:
        pipe.transformer = torch.compile(transformer, **settings)
    elif style == ATTENTION:
        for name, module in transformer.named_modules():
            if name.endswith(ATTENTION_NAMES):
                module.compile(**settings)
    elif getattr(transformer, "_repeated_blocks", None):
        transformer.compile_repeated_blocks(fullgraph=fullgraph, **settings)
    else:  # diffusers does not say what the blocks of these are
        for block in transformer.transformer_blocks:
            block.compile(fullgraph=fullgraph, **settings)


def _pisa(style: str, inner: str, sparsity: float) -> Callable[[Any], None]:
    options = {**OPTIONS, "inner": inner, "sparsity": sparsity}
    return lambda pipe: compile_transformer(pipe, style, backend="pisa", options=options)


def _any_backend_fails(tiny: TinyPipeline, feature: Feature, style: str) -> str:
    """Why this style cannot be traced, or "" if a backend that changes nothing manages to."""
    try:
        _run(tiny, feature, lambda pipe: compile_transformer(pipe, style, backend="eager"))
    except torch._dynamo.exc.Unsupported as error:
        return _first_line(error)
    return ""


def _seen_by_any_backend(tiny: TinyPipeline, feature: Feature, style: str) -> int:
    """How many of the self-attention calls run inside compiled graphs."""
    calls: list[Any] = []

    def backend(gm: torch.fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            with counted_attention(calls):
                return gm.forward(*args)

        return run

    _run(tiny, feature, lambda pipe: compile_transformer(pipe, style, backend=backend))
    return len(calls)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _run(
    tiny: TinyPipeline,
    feature: Feature,
    compile_it: Callable[[Any], None],
    graphs: list[int] | None = None,
) -> list[Tensor]:
    """The latents of every call; `graphs` gets the number of compiled graphs after each."""
    torch._dynamo.reset()
    counters.clear()
    with tempfile.TemporaryDirectory() as folder:
        pipe = tiny.build()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            randomise(pipe.transformer)
        pipe.set_progress_bar_config(disable=True)
        feature.set_up(pipe, Path(folder))
        compile_it(pipe)
        latents = []
        for arguments in feature.calls(pipe, tiny):
            generator = torch.Generator().manual_seed(0)
            result = pipe(
                **arguments,
                num_inference_steps=STEPS,
                generator=generator,
                output_type="latent",
                return_dict=False,
            )
            latents.append(result[0])
            if graphs is not None:
                graphs.append(counters["stats"]["unique_graphs"])
    torch._dynamo.reset()
    return latents


def _distance(actual: list[Tensor], expected: list[Tensor]) -> float:
    pairs = zip(actual, expected, strict=True)
    return max(((a - e).norm() / e.norm()).item() for a, e in pairs)


@contextmanager
def counted_attention(calls: list[tuple[int, ...]]) -> Iterator[None]:
    """Collect the query shapes of every self-attention over latents that runs."""

    class Counter(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            kwargs = kwargs or {}
            if func is F.scaled_dot_product_attention:
                query = args[0] if args else kwargs["query"]
                key = args[1] if len(args) > 1 else kwargs["key"]
                # The refiner of HunyuanVideo attends among text tokens; it stays dense.
                if key.shape[2] == query.shape[2] > TEXT_TOKENS:
                    calls.append(tuple(query.shape))
            return func(*args, **kwargs)

    with Counter():
        yield


@contextmanager
def counted_op(calls: list[tuple[int, ...]]) -> Iterator[None]:
    """Collect the query shapes of every call of the op that runs."""
    original = dispatch.attention

    def counting(query: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(tuple(query.shape))
        return original(query, *args, **kwargs)

    with mock.patch.object(dispatch, "attention", counting):
        yield
