"""`pisa bench`: the op against dense attention on shapes of the user's own."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F  # noqa: N812
import typer
from rich.console import Console
from rich.progress import track

from ..cost.store import device_name
from ..kernels.params import ORDERS, ROUTINGS, AttentionParams
from ..kernels.testing import Inputs, random_inputs, relative_l2, specified
from ..ops.dispatch import UnsupportedError
from ..ops.functional import attention
from .common.environment import versions
from .common.errors import UserError
from .common.output import print_json, table_of

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# Relative L2 error that rounding alone explains, twice over, on inputs of order 1.
_TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float32: 1e-4}
_CHECKED_TOKENS = 700


@dataclass(frozen=True)
class Shape:
    batch: int
    heads: int
    kv_heads: int
    tokens: int
    head_dim: int

    def __str__(self) -> str:
        heads = f"{self.heads}" + (f"/{self.kv_heads}" if self.kv_heads != self.heads else "")
        return f"{self.batch}x{heads}x{self.tokens}x{self.head_dim}"


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one candidate on one shape; sparsity None is dense attention of torch."""

    shape: str
    sparsity: float | None
    p20: float
    median: float
    p80: float
    speedup: float


def bench(
    shape: Annotated[
        list[str],
        typer.Option(
            "--shape",
            "-s",
            metavar="BxHxTxD",
            help="Batch, heads, tokens and head_dim, such as `1x24x4608x128`; `1x32/8x4096x128` "
            "has 8 key heads. May be repeated.",
        ),
    ],
    *,
    sparsity: Annotated[
        list[float], typer.Option("--sparsity", help="Fraction of the key blocks. May be repeated.")
    ] = [0.85],
    dtype: Annotated[
        str | None, typer.Option(help="bfloat16, float16 or float32.", show_default="by device")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="cpu, cuda, cuda:1, ...", show_default="a GPU if there is one"),
    ] = None,
    block_size: Annotated[int, typer.Option(help="16, 32, 64 or 128.")] = 64,
    key_block_size: Annotated[
        int | None, typer.Option(help="The same, of keys.", show_default="block size")
    ] = None,
    routing: Annotated[str, typer.Option(help=", ".join(ROUTINGS))] = "topk",
    order: Annotated[str, typer.Option(help=", ".join(ORDERS))] = "corrected",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds, each with every candidate.")] = 9,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also draw the times as a picture.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Time attention shapes: dense attention of torch beside ours.

    Candidates take turns, so that a slow moment of the machine hits all of them; times are medians.
    Inputs are random, so this says how fast it is and nothing about quality. Nothing is timed if a
    check against the specification fails; the exit code is then 1.

    Examples:

        pisa bench --shape 1x24x4608x128

        pisa bench -s 1x40x32760x128 -s 1x40x75600x128 --sparsity 0.8 --sparsity 0.9 --plot wan.png
    """
    shapes = [_shape(text) for text in shape]
    where = _device(device)
    kind = _dtype(dtype, where)
    console = Console(stderr=True)
    settings: dict[str, Any] = {
        "block_size": block_size,
        "key_block_size": key_block_size,
        "routing": routing,
        "order": order,
    }
    try:
        wrong = _check(shapes, sparsity, kind, where, settings)
        if wrong:
            console.print(f"not timed, because results are wrong: {wrong}", style="red")
            raise typer.Exit(1)
        timings = [
            timing
            for each in track(shapes, "Timing", console=console, transient=True)
            for timing in _measure(each, sparsity, kind, where, settings, rounds)
        ]
    except (ValueError, UnsupportedError) as error:
        raise UserError(str(error)) from error
    except torch.OutOfMemoryError as error:
        raise UserError(f"out of memory on {where}: {error}".splitlines()[0]) from error
    about = {
        "device": device_name(where),
        "threads": torch.get_num_threads() if where.type == "cpu" else None,
        "dtype": str(kind).removeprefix("torch."),
        "rounds": rounds,
        **settings,
        "versions": versions(),
    }
    if as_json:
        print_json({"about": about, "timings": [asdict(timing) for timing in timings]})
    else:
        _print(timings, about)
    if plot is not None:
        _draw(timings, about, plot)
        console.print(f"wrote {plot}", highlight=False)


def _shape(text: str) -> Shape:
    match = re.fullmatch(r"(\d+)x(\d+)(?:/(\d+))?x(\d+)x(\d+)", text)
    if match is None or "0" in match.groups():
        raise UserError(f"--shape takes BxHxTxD, such as 1x24x4608x128, got {text!r}")
    batch, heads, kv_heads, tokens, head_dim = (int(number or 0) for number in match.groups())
    kv_heads = kv_heads or heads
    if heads % kv_heads:
        raise UserError(f"--shape: {heads} heads are not a multiple of {kv_heads} key heads")
    return Shape(batch, heads, kv_heads, tokens, head_dim)


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device: {name!r} cannot be used: {reason}") from error
    return device


def _dtype(name: str | None, device: torch.device) -> torch.dtype:
    if name is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if name not in _DTYPES:
        raise UserError(f"--dtype must be one of {', '.join(_DTYPES)}, got {name!r}")
    return _DTYPES[name]


def _check(
    shapes: Sequence[Shape],
    sparsities: Sequence[float],
    dtype: torch.dtype,
    device: torch.device,
    settings: dict[str, Any],
) -> str | None:
    """What differs from the specification in float64 on shorter inputs of the same kind, or None.

    The inputs have real gaps between blocks, but two blocks may still score within rounding of each
    other; so the best of several seeds counts, and rounding cannot fail all of them.
    """
    for shape in shapes:
        for sparsity in sparsities:
            params = AttentionParams(
                scale=shape.head_dim**-0.5, sparsity=_checked(sparsity), **settings
            )
            errors = []
            for seed in range(4):
                inputs = _inputs(shape, dtype, device, min(shape.tokens, _CHECKED_TOKENS), 2, seed)
                out = _ours(inputs, sparsity, settings)()
                expected, _ = specified(_to_cpu(inputs), params)
                errors.append(relative_l2(out.cpu(), expected))
                if errors[-1] <= _TOLERANCE[dtype]:
                    break
            if min(errors) > _TOLERANCE[dtype]:
                return f"shape {shape}, sparsity {sparsity}: relative error {min(errors):.1e}"
    return None


def _checked(sparsity: float) -> float:
    if not 0 <= sparsity < 1:
        raise UserError(f"--sparsity must be in [0, 1), got {sparsity}")
    return sparsity


def _inputs(
    shape: Shape, dtype: torch.dtype, device: torch.device, tokens: int, groups: int, seed: int = 0
) -> Inputs:
    """Inputs of that shape; `groups` limits the number of key heads."""
    kv_heads = min(shape.kv_heads, groups) if groups else shape.kv_heads
    return random_inputs(
        batch=1 if groups else shape.batch,
        heads=shape.heads // shape.kv_heads * kv_heads,
        kv_heads=kv_heads,
        query_len=tokens,
        head_dim=shape.head_dim,
        dtype=dtype,
        device=str(device),
        seed=seed,
    )


def _to_cpu(inputs: Inputs) -> Inputs:
    return Inputs(inputs.query.cpu(), inputs.key.cpu(), inputs.value.cpu(), None)


def _ours(inputs: Inputs, sparsity: float, settings: dict[str, Any]) -> Callable[[], torch.Tensor]:
    query, key, value, _ = inputs.astuple()
    gqa = query.shape[1] != key.shape[1]
    return lambda: attention(query, key, value, sparsity=sparsity, enable_gqa=gqa, **settings)


def _measure(
    shape: Shape,
    sparsities: Sequence[float],
    dtype: torch.dtype,
    device: torch.device,
    settings: dict[str, Any],
    rounds: int,
) -> Iterator[Timing]:
    inputs = _inputs(shape, dtype, device, shape.tokens, groups=0)
    query, key, value, _ = inputs.astuple()
    gqa = shape.kv_heads != shape.heads
    candidates: dict[float | None, Callable[[], torch.Tensor]] = {
        None: lambda: F.scaled_dot_product_attention(query, key, value, enable_gqa=gqa)
    }
    candidates |= {sparsity: _ours(inputs, sparsity, settings) for sparsity in sparsities}
    times: dict[float | None, list[float]] = {name: [] for name in candidates}
    for _ in range(1 + rounds):
        for name, call in candidates.items():
            times[name].append(_milliseconds(call, device))
    dense = statistics.median(times[None][1:])  # the first round warms up
    for name, values in times.items():
        ordered = sorted(values[1:])
        median = statistics.median(ordered)
        low, high = ordered[len(ordered) // 5], ordered[-1 - len(ordered) // 5]
        yield Timing(str(shape), name, low, median, high, dense / median)


def _milliseconds(call: Callable[[], torch.Tensor], device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize()
    start = time.perf_counter()
    call()
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return 1e3 * (time.perf_counter() - start)


def _print(timings: Sequence[Timing], about: dict[str, Any]) -> None:
    rows = []
    for timing in timings:
        name = "dense" if timing.sparsity is None else f"sparsity {timing.sparsity:g}"
        spread = f"{timing.p20:,.2f} to {timing.p80:,.2f}"
        rows.append((timing.shape, name, f"{timing.median:,.2f}", spread, f"{timing.speedup:.2f}x"))
    console = Console()
    columns = ("shape", "attention", "median ms", "p20 to p80", "speed-up")
    console.print(table_of(columns, rows))
    console.print(_caption(about), highlight=False)


def _caption(about: dict[str, Any]) -> str:
    threads = f", {about['threads']} threads" if about["threads"] else ""
    blocks = f"block size {about['block_size']}"
    if about["key_block_size"]:
        blocks += f" (keys {about['key_block_size']})"
    return (
        f"{about['device']}{threads}, {about['dtype']}, {blocks}, "
        f"{about['routing']} + {about['order']}, torch {about['versions']['torch']}; "
        f"{about['rounds']} interleaved rounds"
    )


def _draw(timings: Sequence[Timing], about: dict[str, Any], path: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("--plot needs matplotlib; pip install 'pisa-compile[cli]'") from error
    shapes = list(dict.fromkeys(timing.shape for timing in timings))
    names = list(dict.fromkeys(timing.sparsity for timing in timings))
    figure = Figure(figsize=(1.5 + 2.2 * len(shapes), 4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(names)
    for place, name in enumerate(names):
        mine = [timing for timing in timings if timing.sparsity == name]
        centres = [shapes.index(t.shape) + (place - (len(names) - 1) / 2) * width for t in mine]
        label = "dense" if name is None else f"sparsity {name:g}"
        bars = axes.bar(centres, [t.median for t in mine], 0.95 * width, label=label)
        if name is not None:
            axes.bar_label(bars, [f"{t.speedup:.1f}x" for t in mine], fontsize=8)
    axes.set_xticks(range(len(shapes)), shapes)
    axes.set_ylabel("milliseconds")
    axes.set_title(_caption(about), fontsize=7, wrap=True)
    axes.legend(fontsize=8, loc="upper left")
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise UserError(f"--plot: {error}") from error
