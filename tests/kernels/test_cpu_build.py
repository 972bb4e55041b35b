"""Building the native library, and refusing one that does not fit."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pisa_compile.kernels.cpu import build, native

ROOT = Path(__file__).parents[2]
CALL_SIZE = ctypes.sizeof(native._Call)

# The functions that a library is asked about itself, with the answers to be filled in.
STUB = """
extern "C" int pisa_abi_version() {{ return {version}; }}
extern "C" long long pisa_call_size() {{ return {size}; }}
extern "C" const char* pisa_source_digest() {{ return "{digest}"; }}
extern "C" const char* pisa_variant(int) {{ return nullptr; }}
extern "C" long long pisa_workspace_floats(void*) {{ return 0; }}
extern "C" int pisa_attention(void*, int) {{ return 0; }}
"""


@pytest.fixture
def compiler() -> list[str]:
    try:
        return build.find_compiler()
    except build.BuildError as error:
        pytest.skip(str(error))


def stub(
    folder: Path,
    compiler: list[str],
    version: int = native.ABI_VERSION,
    size: int = CALL_SIZE,
    digest: str | None = None,
) -> Path:
    digest = build.source_digest() if digest is None else digest
    source, library = folder / "stub.cpp", folder / "stub.so"
    source.write_text(STUB.format(version=version, size=size, digest=digest))
    subprocess.run([*compiler, "-shared", "-fPIC", source, "-o", library], check=True)
    return library


def test_the_library_is_built_and_current(compiler: list[str]) -> None:
    """Where there is a compiler, an installation has the library; tests must not pass without."""
    assert native.unavailable() is None
    assert native.variants()[-1] == "baseline"


def test_build_from_the_sources(tmp_path: Path, compiler: list[str]) -> None:
    library = build.build(tmp_path / "nested" / "library.so")
    assert [path.name for path in library.parent.iterdir()] == ["library.so"]
    assert native.variants(library) == native.variants()


def test_a_matching_library_is_accepted(tmp_path: Path, compiler: list[str]) -> None:
    assert native.variants(stub(tmp_path, compiler)) == ()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"version": native.ABI_VERSION + 1}, "has interface"),
        ({"size": CALL_SIZE + 8}, "has interface"),
        ({"digest": "0123456789abcdef"}, "older than its sources"),
    ],
    ids=["version", "call-size", "sources"],
)
def test_a_stale_library_is_refused(
    tmp_path: Path, compiler: list[str], answer: dict[str, int], message: str
) -> None:
    library = stub(tmp_path, compiler, **answer)  # type: ignore[arg-type]
    with pytest.raises(native.NativeUnavailableError, match=f"{message}.*python -m pisa_compile"):
        native.library(library)


def test_a_missing_or_broken_library_is_refused(tmp_path: Path) -> None:
    with pytest.raises(native.NativeUnavailableError, match="has not been built"):
        native.library(tmp_path / "none.so")
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"not a library")
    with pytest.raises(native.NativeUnavailableError, match="cannot be loaded"):
        native.library(broken)


def test_the_digest_follows_the_sources(tmp_path: Path) -> None:
    sources = tmp_path / "src"
    shutil.copytree(build.SOURCES, sources)
    assert build.source_digest(sources) == build.source_digest()
    with (sources / "plan.h").open("a") as file:
        file.write("// changed\n")
    assert build.source_digest(sources) != build.source_digest()
    assert build.source_digest(tmp_path / "absent") == ""


def test_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(build.BuildError, match=r"no C\+\+ compiler"):
        build.build(tmp_path / "library.so")
    monkeypatch.setenv("CXX", str(tmp_path / "missing"))
    with pytest.raises(build.BuildError, match="cannot be run"):
        build.build(tmp_path / "library.so")
    assert build.main() == 1


@pytest.mark.skipif(shutil.which("false") is None, reason="needs the command `false`")
def test_a_failing_compiler_does_not_fail_the_installation(tmp_path: Path) -> None:
    pytest.importorskip("setuptools.command.bdist_wheel")
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", f"--build-lib={tmp_path}"],
        cwd=ROOT,
        env={**os.environ, "CXX": "false"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "installing without the native CPU library" in done.stderr
    assert not list(tmp_path.rglob("*.so"))
