"""What leaves the process that made it: exported programs, compiled packages, compile caches.

Each test loads in a fresh process that knows nothing of the model and cannot import anything but
torch and this package.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

import pisa_compile as pisa

from .models import tiny, tokens

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's own

ROOT = Path(__file__).parent.parent
SPARSE = pisa.Policy(sparsity=0.5, min_tokens=0)
LENGTHS = (100, 77)

# What a server needs to know. Everything optional is out of reach, our model code included.
_FRESH = """
import sys
for name in ("triton", "diffusers", "transformers", "numpy", "rich", "tests"):
    sys.modules[name] = None
import torch
{imports}
inputs, path = torch.load({inputs!r}), {program!r}
model = {load}
with torch.no_grad():
    torch.save([model(x) for x in inputs], {outputs!r})
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def rewritten() -> ExportedProgram:
    """A program for any number of tokens, whose attention is sparse."""
    shapes = ({1: Dim("tokens", min=32, max=4096)},)
    with torch.no_grad():
        program = torch.export.export(tiny(1).eval(), (tokens(100),), dynamic_shapes=shapes)
    return pisa.rewrite(program, SPARSE)


def in_fresh_process(
    folder: Path, program: Path, load: str, imports: str = "import pisa_compile.ops"
) -> list[Tensor]:
    """What the program gives there for inputs of two lengths."""
    paths = {"inputs": str(folder / "inputs.pt"), "outputs": str(folder / "outputs.pt")}
    torch.save([tokens(count) for count in LENGTHS], paths["inputs"])
    result = run(_FRESH.format(imports=imports, program=str(program), load=load, **paths))
    if result.returncode:
        raise RuntimeError(result.stderr)
    outputs: list[Tensor] = torch.load(paths["outputs"])
    return outputs


def assert_sparse_results(outputs: list[Tensor]) -> None:
    with torch.no_grad():
        for count, out in zip(LENGTHS, outputs, strict=True):
            sparse = torch.compile(
                tiny(1).eval(),
                backend="pisa",
                options={"min_tokens": 0, "sparsity": 0.5, "inner": "eager"},
            )(tokens(count))
            torch.testing.assert_close(out, sparse, rtol=1e-4, atol=1e-5)
            assert not torch.allclose(out, tiny(1).eval()(tokens(count)), atol=1e-3)


LOAD_PROGRAM = "torch.export.load(path).module()"
LOAD_PACKAGE = "torch._inductor.aoti_load_package(path)"


def test_saved_program_runs_where_only_the_op_is_known(tmp_path: Path) -> None:
    path = tmp_path / "program.pt2"
    torch.export.save(rewritten(), path)
    assert_sparse_results(in_fresh_process(tmp_path, path, LOAD_PROGRAM))


def test_saved_program_names_the_op_where_it_is_not_known(tmp_path: Path) -> None:
    path = tmp_path / "program.pt2"
    torch.export.save(rewritten(), path)
    with pytest.raises(RuntimeError, match="pisa"):
        in_fresh_process(tmp_path, path, LOAD_PROGRAM, imports="")


@pytest.mark.slow
def test_compiled_package_runs_where_only_the_op_is_known(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    with torch.no_grad():
        torch._inductor.aoti_compile_and_package(rewritten(), package_path=str(path))
    assert_sparse_results(in_fresh_process(tmp_path, path, LOAD_PACKAGE))
    with pytest.raises(RuntimeError, match="pisa"):
        in_fresh_process(tmp_path, path, LOAD_PACKAGE, imports="")


_COMPILE = """
import json, torch
from torch._dynamo.utils import counters
from tests.models import tiny, tokens
options = {"min_tokens": 0, "sparsity": 0.5}
with torch.no_grad():
    torch.compile(tiny(1), backend="pisa", options=options)(tokens())
print(json.dumps({"inductor": counters["inductor"], "aot_autograd": counters["aot_autograd"]}))
"""


def compile_counters(cache: Path, **environment: str) -> dict[str, dict[str, int]]:
    result = run(_COMPILE, TORCHINDUCTOR_CACHE_DIR=str(cache), **environment)
    assert result.returncode == 0, result.stderr
    found: dict[str, dict[str, int]] = json.loads(result.stdout.splitlines()[-1])
    return found


def hits_and_misses(found: dict[str, Any], kind: str, cache: str) -> tuple[int, int]:
    return found[kind].get(f"{cache}_hit", 0), found[kind].get(f"{cache}_miss", 0)


def test_second_process_compiles_nothing_again(tmp_path: Path) -> None:
    """The graph comes from the AOTAutograd cache, or without that from the FX graph cache."""
    first = compile_counters(tmp_path)
    assert hits_and_misses(first, "aot_autograd", "autograd_cache") == (0, 1)
    assert hits_and_misses(first, "inductor", "fxgraph_cache") == (0, 1)
    second = compile_counters(tmp_path)
    assert hits_and_misses(second, "aot_autograd", "autograd_cache") == (1, 0)
    assert "pattern_matcher_count" not in second["inductor"]  # Inductor's passes did not run
    third = compile_counters(tmp_path, TORCHINDUCTOR_AUTOGRAD_CACHE="0")
    assert hits_and_misses(third, "aot_autograd", "autograd_cache") == (0, 0)
    assert hits_and_misses(third, "inductor", "fxgraph_cache") == (1, 0)
