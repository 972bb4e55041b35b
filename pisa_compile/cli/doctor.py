"""`pisa doctor`: what works on this machine, and what to do about the rest."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ..cost.store import cache_directory, device_name
from ..kernels.cpu import native
from ..kernels.cpu.build import BuildError, find_compiler
from ..kernels.params import AttentionParams
from ..kernels.testing import random_inputs, relative_l2, specified
from ..ops import dispatch
from ..policies.policy import DEFAULT
from .common.environment import versions
from .common.errors import UserError
from .common.output import print_json

Status = Literal["ok", "warning", "failure"]
_STYLES: dict[Status, str] = {"ok": "green", "warning": "yellow", "failure": "bold red"}
_MINIMUM_TORCH = (2, 10)
_FREE_SPACE = 2 << 30  # bytes; a large model's compiled code takes some hundred MB


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `advice` says what to do where it is not fine."""

    name: str
    status: Status
    found: str
    advice: str = ""


def doctor(
    *,
    kernels: Annotated[
        bool,
        typer.Option(
            "--kernels",
            help="Also compile the Triton kernels for `--architecture`, without needing such a "
            "GPU, and list registers, spills and shared memory. Takes minutes.",
        ),
    ] = False,
    architecture: Annotated[
        list[str],
        typer.Option(
            "--architecture",
            metavar="NAME",
            help="For `--kernels`: sm_80, sm_90, gfx942, ... The GPU's own by default, or sm_90. "
            "May be repeated.",
        ),
    ] = [],
    head_dim: Annotated[
        list[int], typer.Option("--head-dim", help="For `--kernels`. May be repeated.")
    ] = [128],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check the installation, the kernels and the GPU, and say what to do about what is not fine.

    Exits with 1 if something that is needed does not work. Takes some seconds; `--kernels` takes
    minutes.

    Examples:

        pisa doctor

        pisa doctor --kernels --architecture sm_90 --head-dim 64 --head-dim 128

        pisa doctor --json
    """
    console = Console(stderr=as_json)
    findings: list[Finding] = []
    for check in CHECKS:
        with console.status(f"{check.__name__.strip('_').replace('_', ' ')} ..."):
            for finding in _safely(check):
                findings.append(finding)
                if not as_json:
                    _print(finding, console)
    rows: list[dict[str, Any]] = []
    if kernels:
        rows = list(_compiled(architecture or [_architecture() or "sm_90"], head_dim, console))
        broken = [row for row in rows if row["problem"]]
        findings.append(
            Finding(
                "Triton kernels, compiled ahead of time",
                "failure" if broken else "ok",
                f"{len(rows) - len(broken)} of {len(rows)} are fine",
                "the table names the problem; please report it" if broken else "",
            )
        )
        if not as_json:
            console.print(_kernel_table(rows))
            _print(findings[-1], console)
    failed = [finding for finding in findings if finding.status == "failure"]
    if as_json:
        print_json(
            {
                "ok": not failed,
                "versions": versions(),
                "findings": [asdict(finding) for finding in findings],
                "kernels": rows,
            }
        )
    if failed:
        raise typer.Exit(1)


def _safely(check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """Whatever goes wrong inside a check is what it found."""
    try:
        yield from check()
    except Exception as error:
        name = check.__name__.strip("_").replace("_", " ")
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        yield Finding(name, "failure", reason, "please report this with the output of --json")


def _print(finding: Finding, console: Console) -> None:
    style = _STYLES[finding.status]
    console.print(f"[{style}]{finding.status:8}[/] [bold]{finding.name}[/]: ", end="")
    console.print(finding.found, markup=False, highlight=False)
    if finding.advice:
        console.print(f"         -> {finding.advice}", markup=False, highlight=False)


def _packages() -> Iterator[Finding]:
    found = versions()
    text = ", ".join(f"{name} {version}" for name, version in found.items())
    numbers = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if numbers < _MINIMUM_TORCH:
        yield Finding("versions", "failure", text, "install torch 2.10 or newer")
    else:
        yield Finding("versions", "ok", text)
    names = torch.compiler.list_backends()
    if "pisa" in names:
        yield Finding("backend", "ok", 'torch.compile(model, backend="pisa") is registered')
    else:
        yield Finding(
            "backend",
            "failure",
            f"torch lists {', '.join(names)}",
            "install the package with pip: a checkout on PYTHONPATH has no entry points",
        )


def _cpu_kernels() -> Iterator[Finding]:
    where = f"{device_name(torch.device('cpu'))}, {torch.get_num_threads()} threads"
    reason = native.unavailable()
    if reason is None:
        yield Finding("CPU kernels", "ok", f"native, {native.variants()[0]}; {where}")
    else:
        yield Finding("CPU kernels", "warning", f"plain torch, slower; {where}", reason)
    yield _against_specification("cpu", torch.device("cpu"), torch.float32, 64)


def _compiler() -> Iterator[Finding]:
    try:
        yield Finding("C++ compiler", "ok", " ".join(find_compiler()))
    except BuildError as error:
        advice = "install one, or pass options={'inner': 'aot_eager'}; GPUs do not need it"
        status: Status = "warning" if torch.cuda.is_available() else "failure"
        yield Finding("C++ compiler", status, f"{error}; Inductor needs one for the CPU", advice)


def _compilation() -> Iterator[Finding]:
    """The whole way: Dynamo, the rewrite, Inductor, the op."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def attend(query: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(query, query, query) + 1

    settings: dict[str, Any] = {"min_tokens": 0, "sparsity": 0.0}
    compiled = torch.compile(attend, backend="pisa", options=settings)
    query = random_inputs(query_len=200, head_dim=64, device=str(device)).query
    with torch.no_grad():
        error = relative_l2(compiled(query), attend(query))
    if error < 1e-3:
        yield Finding("torch.compile", "ok", f"compiles and runs on {device.type}")
    else:
        yield Finding(
            "torch.compile", "failure", f"results on {device.type} are off by {error:.1e}",
            "please report this with the output of --json",
        )  # fmt: skip


def _gpu() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        built = "this torch is built for the CPU alone" if not torch.version.cuda else "none found"
        yield Finding("GPU", "warning", built, "without one, attention runs on the processor")
        return
    device = torch.device("cuda", torch.cuda.current_device())
    free, total = torch.cuda.mem_get_info(device)
    about = f"{device_name(device)} ({_architecture()}), {free >> 30} of {total >> 30} GiB free"
    yield Finding("GPU", "ok", about)
    params = AttentionParams(scale=1.0)
    reason = dispatch.refusal("triton", device, torch.bfloat16, 128, 128, params)
    if reason is not None:
        yield Finding("Triton kernels", "failure", reason, "pip install triton")
        return
    for dtype, head_dim in ((torch.bfloat16, 128), (torch.float16, 64), (torch.float32, 72)):
        yield _against_specification("triton", device, dtype, head_dim)


def _against_specification(
    name: str, device: torch.device, dtype: torch.dtype, head_dim: int
) -> Finding:
    """A small call compared with the specification in float64."""
    from ..ops.functional import attention

    title = f"{'CPU' if name == 'cpu' else 'Triton'} results"
    inputs = random_inputs(query_len=700, head_dim=head_dim, dtype=dtype)
    query, key, value = (x.to(device) for x in inputs.astuple()[:3])
    settings: dict[str, Any] = {"sparsity": 0.7, "order": DEFAULT.order}
    expected, _ = specified(inputs, AttentionParams(scale=head_dim**-0.5, **settings))
    error = relative_l2(attention(query, key, value, impl=name, **settings).cpu(), expected)
    limit = {torch.float32: 1e-4, torch.float16: 5e-3}.get(dtype, 2e-2)
    about = f"{str(dtype).removeprefix('torch.')}, head_dim {head_dim}: relative error {error:.1e}"
    if error <= limit:
        return Finding(title, "ok", about)
    advice = "please report this; options={'impl': 'reference'} avoids the kernels"
    return Finding(title, "failure", f"{about}, expected below {limit:.0e}", advice)


def _caches() -> Iterator[Finding]:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    folders = {
        "compiled code": Path(cache_dir()),
        "measured break-even lengths": cache_directory(),
    }
    for name, folder in folders.items():
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        if not os.access(existing, os.W_OK):
            advice = "every process starts from nothing; make it writable or set "
            advice += "TORCHINDUCTOR_CACHE_DIR" if name == "compiled code" else "PISA_CACHE_DIR"
            yield Finding(f"cache of {name}", "warning", f"{folder} is not writable", advice)
            continue
        free = shutil.disk_usage(existing).free
        about = f"{folder}, {free / (1 << 30):.1f} GiB free"
        if free < _FREE_SPACE:
            yield Finding(f"cache of {name}", "warning", about, "free some space")
        else:
            yield Finding(f"cache of {name}", "ok", about)
    if torch._inductor.config.force_disable_caches:
        advice = "unset TORCHINDUCTOR_FORCE_DISABLE_CACHES"
        yield Finding("caching", "warning", "switched off, every start compiles again", advice)


CHECKS = (_packages, _cpu_kernels, _compiler, _gpu, _compilation, _caches)


def _architecture() -> str | None:
    """The GPU's name as compilers have it, None without one."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def _compiled(
    architectures: list[str], head_dims: list[int], console: Console
) -> Iterator[dict[str, Any]]:
    try:
        from ..kernels.triton.tools import compile_check
    except ImportError as error:
        raise UserError(f"--kernels needs Triton: {error}") from error
    known = compile_check.SHARED_LIMITS
    for name in architectures:
        if name not in known:
            raise UserError(f"--architecture must be one of {', '.join(known)}, got {name!r}")
    pairs = [(name, width) for name in architectures for width in head_dims]
    for name, width in track(pairs, "Compiling", console=console, transient=True):
        for row in compile_check.rows((name,), (width,)):
            yield {**asdict(row), "problem": row.problem}


def _kernel_table(rows: list[dict[str, Any]]) -> Table:
    table = Table("kernel", "GPU", "head_dim", "matrix unit", "registers", "spills", "shared", "")
    for row in rows:
        table.add_row(
            *(str(row[name]) for name in ("kernel", "target", "head_dim", "mma", "registers")),
            str(row["spills"]),
            f"{row['shared'] / 1024:.0f} of {row['shared_limit'] >> 10} KiB",
            row["problem"] or "ok",
        )
    return table
