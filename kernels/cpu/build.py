"""Builds the native library: `python -m pisa_compile.kernels.cpu.build`.

Imports nothing but the standard library, because setup.py runs this file before torch or the
package itself need to exist.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parent / "src"
LIBRARY = Path(__file__).parent / "_pisa_cpu.so"
_COMPILERS = ("c++", "g++", "clang++")
_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
]
_LINK_FLAGS = ["-shared", "-pthread"]
# Tried first: nothing to resolve at load time but the C library, and nothing exported but ours.
_STATIC_RUNTIME = ["-static-libstdc++", "-static-libgcc", "-Wl,--exclude-libs,ALL", "-s"]
# Flags of each copy of the vector kernels, by processor architecture.
_X86_VARIANTS = {
    "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mprefer-vector-width=512",
    "avx2": "-mavx2 -mfma",
}


class BuildError(RuntimeError):
    """The library could not be built; the message holds the compiler's own words."""


def source_digest(sources: Path = SOURCES) -> str:
    """Identifies the sources a library was built from; empty where they are not installed."""
    files = sorted(path for path in sources.glob("*") if path.suffix in (".cpp", ".h"))
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16] if files else ""


def find_compiler() -> list[str]:
    """The C++ compiler as a command: $CXX, else the first of c++, g++ and clang++."""
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    for name in _COMPILERS:
        if path := shutil.which(name):
            return [path]
    raise BuildError(f"no C++ compiler: $CXX is not set and none of {_COMPILERS} is on the path")


def build(target: Path = LIBRARY, sources: Path = SOURCES) -> Path:
    """Compile and link the library at `target`, or raise `BuildError`."""
    compiler = find_compiler()
    variants = {"baseline": ""}
    if platform.machine().lower() in ("x86_64", "amd64"):
        variants |= _X86_VARIANTS
    with tempfile.TemporaryDirectory(prefix="pisa-build-") as scratch:
        objects = []
        for name, flags in variants.items():
            objects.append(Path(scratch) / f"{name}.o")
            command = [*_FLAGS, *flags.split(), f"-DPISA_VARIANT={name}"]
            _run([*compiler, *command, "-c", sources / "kernels.cpp", "-o", objects[-1]])
        for source in sorted(sources.glob("*.cpp")):
            if source.stem == "kernels":  # compiled above, once per instruction set
                continue
            objects.append(Path(scratch) / f"{source.stem}.o")
            digest = f'-DPISA_SOURCE_DIGEST="{source_digest(sources)}"'
            _run([*compiler, *_FLAGS, digest, "-c", source, "-o", objects[-1]])
        linked = Path(scratch) / target.name
        link: list[str | Path] = [*compiler, *_LINK_FLAGS, *objects, "-o", linked]
        try:
            _run([*link, *_STATIC_RUNTIME])
        except BuildError:
            _run(link)
        target.parent.mkdir(parents=True, exist_ok=True)
        # A rename, so that a process that has the old library mapped keeps it intact.
        partial = target.with_name(f"{target.name}.{os.getpid()}")
        shutil.copy(linked, partial)
        os.replace(partial, target)
    return target


def _run(command: list[str | Path]) -> None:
    words = [str(word) for word in command]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildError(f"{words[0]} cannot be run: {error}") from error
    if done.returncode != 0:
        raise BuildError(f"`{shlex.join(words)}` failed:\n{done.stderr.strip()[-2000:]}")


def main() -> int:
    try:
        path = build()
    except BuildError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(f"{path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
