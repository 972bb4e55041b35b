"""Compile what a call would launch, for any GPU, without having one.

Proves each entry of the configuration table: it compiles, uses the tensor cores, spills no
registers and fits the shared memory. Triton ships the assemblers that this needs.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from ...params import AttentionParams
from ..configs import Config
from ..geometry import Device
from ..plan import KernelLaunch, plan

# Bytes of shared memory that one program may use.
SHARED_LIMITS = {
    "sm_80": 163 << 10,
    "sm_86": 99 << 10,
    "sm_89": 99 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "sm_103": 227 << 10,
    "sm_120": 99 << 10,
    "gfx942": 64 << 10,
    "gfx950": 160 << 10,
}
ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
HEAD_DIMS = (64, 72, 96, 128, 256)

_MMA = {
    "tcgen05": r"tcgen05\.mma",
    "wgmma": r"wgmma\.mma_async",
    "mma.sync": r"mma\.sync",
    "mfma": r"v_mfma",
}
_TYPES = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16",
    torch.int32: "*i32", torch.int64: "*i64", torch.uint8: "*u8",
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """What became of one kernel on one architecture."""

    kernel: str
    target: str
    head_dim: int
    dtype: str
    config: str
    compiles: bool
    mma: str  # "none" where no tensor core instruction was found
    registers: int
    spills: int  # bytes (NVIDIA) or registers (AMD)
    shared: int
    shared_limit: int
    error: str = ""
    multiplies: bool = True  # whether the kernel has matrix products

    @property
    def ok(self) -> bool:
        return not self.problem

    @property
    def problem(self) -> str:
        """Why the entry must not ship, or an empty string."""
        if not self.compiles:
            return f"does not compile: {self.error}"
        if self.spills:
            return f"spills {self.spills} of its registers"
        if self.shared > self.shared_limit:
            return f"needs {self.shared} bytes of shared memory of {self.shared_limit}"
        if self.multiplies and self.mma == "none":
            return "does not use the tensor cores"
        return ""


def rows(
    architectures: Iterable[str] = ARCHITECTURES,
    head_dims: Iterable[int] = HEAD_DIMS,
    dtypes: Iterable[torch.dtype] = (torch.bfloat16,),
    *,
    kernels: Iterable[str] | None = None,
    config: Config | None = None,
    **call: Any,
) -> Iterator[Row]:
    """Compile all kernels of one call per combination; `call` as for `launches_of`."""
    head_dims, dtypes = tuple(head_dims), tuple(dtypes)
    wanted = None if kernels is None else set(kernels)
    for architecture in architectures:
        for head_dim in head_dims:
            for dtype in dtypes:
                for launch in launches_of(architecture, head_dim, dtype, config=config, **call):
                    if wanted is None or launch.name in wanted:
                        yield check(launch, architecture, head_dim, dtype)


def launches_of(
    architecture: str,
    head_dim: int,
    dtype: torch.dtype,
    *,
    value_dim: int | None = None,
    tokens: int = 75_600,
    heads: int = 4,
    kv_heads: int | None = None,
    masked: bool = False,
    density: bool = False,
    permuted: bool = False,
    config: Config | None = None,
    **settings: Any,
) -> list[KernelLaunch]:
    """The launches of a call with [B, T, H, D] memory, planned on the `meta` device."""
    kv_heads = kv_heads or heads
    params = AttentionParams(**{"scale": head_dim**-0.5, "routing": "topk_covariance", **settings})

    def tensor(count: int, width: int) -> torch.Tensor:
        return torch.empty(2, tokens, count, width, dtype=dtype, device="meta").transpose(1, 2)

    mask = torch.empty(2, tokens, dtype=torch.bool, device="meta") if masked else None
    launches = plan(
        tensor(heads, head_dim),
        tensor(kv_heads, head_dim),
        tensor(kv_heads, value_dim or head_dim),
        mask,
        params,
        Device(architecture, processors=128),
        density=torch.empty(heads, device="meta") if density else None,
        permutation=torch.empty(tokens, dtype=torch.int64, device="meta") if permuted else None,
        config=config,
    ).launches
    # Later groups of heads repeat the same kernels.
    return list({launch.name: launch for launch in reversed(launches)}.values())[::-1]


def check(launch: KernelLaunch, architecture: str, head_dim: int, dtype: torch.dtype) -> Row:
    """Compile one launch and read what the assembler says about it."""
    limit = SHARED_LIMITS[architecture]
    described = ", ".join(f"{k}={v}" for k, v in launch.options.items())
    head = (launch.name, architecture, head_dim, str(dtype).removeprefix("torch."), described)
    try:
        compiled = triton.compile(
            _source(launch), target=target_of(architecture), options=dict(launch.options)
        )
        assembly = compiled.asm["amdgcn" if architecture.startswith("gfx") else "ptx"]
        registers, spills = _registers(assembly, architecture)
    except Exception as error:  # any failure of the compiler is a finding, not a crash
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return Row(*head, False, "none", 0, 0, 0, limit, reason)
    mma = next((name for name, pattern in _MMA.items() if re.search(pattern, assembly)), "none")
    return Row(
        *head, True, mma, registers, spills, compiled.metadata.shared, limit,
        multiplies=launch.multiplies,
    )  # fmt: skip


def target_of(architecture: str) -> GPUTarget:
    if architecture.startswith("gfx"):
        return GPUTarget("hip", architecture, 64)
    return GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)


def _source(launch: KernelLaunch) -> ASTSource:
    """Signature, constants and alignment as the just-in-time compiler would derive them."""
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}

    def typed(path: tuple[int, ...], value: Any, parameter: Any) -> Any:
        """The type of what is at `path`; its constant and its alignment are noted on the way."""
        if isinstance(value, tuple):
            return tuple(typed((*path, at), item, parameter) for at, item in enumerate(value))
        if isinstance(value, torch.Tensor):
            attributes[path] = [["tt.divisibility", 16]]
            return _TYPES[value.dtype]
        if isinstance(value, TensorDescriptor):
            block = ", ".join(map(str, value.block_shape))
            return f"tensordesc<{_TYPES[value.base.dtype][1:]}[{block}]>"
        specialised = not parameter.do_not_specialize
        one = specialised and type(value) is int and value == 1
        if parameter.is_constexpr or value is None or one:
            constants[path] = value
            return "constexpr"
        if isinstance(value, float):
            return "fp32"
        if specialised and value % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        return "i32" if abs(value) < 2**31 else "i64"

    signature = {
        parameter.name: typed((position,), launch.arguments[parameter.name], parameter)
        for position, parameter in enumerate(launch.kernel.params)
    }
    return ASTSource(launch.kernel, signature, constants, attributes)


def _registers(assembly: str, architecture: str) -> tuple[int, int]:
    """Registers per thread and what is spilled of them."""
    if architecture.startswith("gfx"):
        count = {
            name: int(number) for name, number in re.findall(r"\.(\w+_count):\s+(\d+)", assembly)
        }
        return count["vgpr_count"], count["vgpr_spill_count"]
    capability = int(architecture.removeprefix("sm_"))
    name = "ptxas-blackwell" if capability >= 100 else "ptxas"
    assembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    suffix = "a" if capability >= 90 else ""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(assembly)
        report = subprocess.run(
            [assembler, "-v", f"--gpu-name={architecture}{suffix}", source, "-o", "/dev/null"],
            capture_output=True, text=True, check=True,
        ).stderr  # fmt: skip
    used = re.search(r"Used (\d+) registers", report)
    spilled = re.search(r"(\d+) bytes spill stores", report)
    if used is None or spilled is None:
        raise RuntimeError(f"{name} reported no registers: {report}")
    return int(used[1]), int(spilled[1])
