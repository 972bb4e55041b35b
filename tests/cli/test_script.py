"""`pisa run`: scripts behave as without it, and their attention is replaced."""

from __future__ import annotations

import doctest
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pisa_compile.cli import main

pytest.importorskip("typer")

PREAMBLE = """
import sys
import torch
import torch.nn.functional as F
class Attention(torch.nn.Module):
    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x)
model, x = Attention(), torch.ones(1, 2, 200, 16)
"""


@pytest.fixture(autouse=True)
def own_process() -> Iterator[None]:
    """What a script may leave behind in the process, which here goes on."""
    saved = sys.argv, sys.path[:], sys.modules["__main__"], sys.excepthook
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # many small calls
    yield
    torch.set_num_threads(threads)
    sys.argv, sys.path[:], sys.modules["__main__"], sys.excepthook = saved


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., tuple[int, dict]]:
    """Runs the text of a script; gives its exit code and the report as data."""

    def run(script: str, *arguments: str, options: tuple[str, ...] = ()) -> tuple[int, dict]:
        path = tmp_path / "script.py"
        path.write_text(PREAMBLE + textwrap.dedent(script))
        report = tmp_path / "report.json"
        eager = ("-o", "inner=eager", "-o", "min_tokens=0", "--json", str(report))
        with pytest.raises(SystemExit) as exit, torch.no_grad():
            main(["run", *eager, *options, str(path), *arguments])
        return exit.value.code, json.loads(report.read_text())

    return run


def test_default_backend_is_replaced_however_it_is_left_open(run, capsys) -> None:
    code, report = run(
        """
        torch.compile(model)(x)
        torch.compile(mode="default")(Attention())(x[:, :, :150])
        model.compile(fullgraph=True)
        model(x[:, :, :100])
        @torch.compile
        def function(x):
            return F.scaled_dot_product_attention(x, x, x)
        function(x[:, :, :90]); function(x[:, :, :90])
        torch.compile(Attention(), backend="eager")(x[:, :, :80])
        torch.compile(Attention(), backend="pisa", options={"inner": "eager"})(x[:, :, :70])
        """,
        options=("-o", "sparsity=0.5"),
    )
    assert code == 0
    found = {(s["query_shape"][2], s["calls"], s["replaced"]) for s in report["sites"]}
    # The second graph is dynamic and also runs 100 tokens. The last one is compiled with options of
    # its own, under which 70 tokens are too few.
    assert found == {(200, 1, True), (150, 2, True), (90, 2, True), (70, 1, False)}
    assert report["summary"] in " ".join(capsys.readouterr().err.split())
    assert torch.compiler.get_default_backend() == "inductor"


def test_options_of_a_call_go_before_those_of_the_command_line(run) -> None:
    _, report = run("torch.compile(model, options={'sparsity': 0.25})(x)")
    assert "sparsity=0.25" in report["sites"][0]["policy"]


def test_arguments_and_exit_codes(run, capsys) -> None:
    code, _ = run("print(sys.argv[1:]); sys.exit(7)", "--steps", "3", "-o", "a=b", "--help")
    assert code == 7
    assert capsys.readouterr().out == "['--steps', '3', '-o', 'a=b', '--help']\n"
    assert run("sys.exit('no picture')")[0] == "no picture"
    assert run("raise KeyboardInterrupt")[0] == 130


def test_says_why_nothing_was_replaced(run, capsys) -> None:
    torch._dynamo.utils.counters.clear()
    assert run("torch.compile(model, backend='eager')(x)")[1]["sites"] == []
    assert "another backend that the script names" in " ".join(capsys.readouterr().err.split())
    torch._dynamo.utils.counters.clear()
    run("model(x)")
    assert "try --compile-transformers" in " ".join(capsys.readouterr().err.split())


def test_modules_run_as_with_python_m(tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").touch()
    (tmp_path / "package" / "tool.py").write_text("import sys; print(__name__, sys.argv[1:])")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        main(["run", "--quiet", "-m", "package.tool", "-x"])
    assert exit.value.code == 0
    assert capsys.readouterr().out == "__main__ ['-x']\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing.py"], "can't open 'nothing.py': No such file"),
        (["."], "'.' is a folder"),
        (["-o", "sparsty=0.9", "x.py"], "unknown option 'sparsty'; did you mean 'sparsity'"),
        (["-o", "sparsity=2", "x.py"], "sparsity must be in"),
        (["-o", "sparsity", "x.py"], "--option takes name=value"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments, words, capsys) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["run", *arguments])
    assert exit.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("pisa: ")
    assert words in line


CURIOUS = """
import atexit, os, pickle, sys
class Thing: pass
print(sys.argv[1:], __name__, __file__, sys.path[0], __spec__, __package__, len(globals()))
print(type(pickle.loads(pickle.dumps(Thing()))) is Thing, sys.modules["__main__"].Thing is Thing)
atexit.register(lambda: print("at exit", pickle.loads(pickle.dumps(Thing())).__class__))
def inner():
    try:
        {}["key"]
    except KeyError as error:
        raise ValueError("no") from error
inner()
"""


def test_behaves_as_without_it(tmp_path: Path) -> None:
    script = tmp_path / "curious.py"
    script.write_text(CURIOUS)
    plain, ours = (
        subprocess.run(
            [sys.executable, *command, "curious.py", "--a", "b"],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        )
        for command in ([], ["-m", "pisa_compile", "run", "--quiet"])
    )
    assert plain.returncode == 1
    assert "at exit" in plain.stdout
    assert (ours.returncode, ours.stdout, ours.stderr) == (1, plain.stdout, plain.stderr)


def tiny_pipeline() -> Any:
    """A pipeline without a text encoder, with random weights."""
    import diffusers

    torch.manual_seed(0)
    return diffusers.DiTPipeline(
        transformer=diffusers.DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            sample_size=16,
            patch_size=2,
        ),
        vae=diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8),
            norm_num_groups=4,
        ),
        scheduler=diffusers.DDIMScheduler(),
    )


# On this machine "cuda" may not exist; the script stays as it is.
SHIM = """
from diffusers import DiffusionPipeline
to = DiffusionPipeline.to
DiffusionPipeline.to = lambda self, device: to(self, "cpu" if device == "cuda" else device)
"""


def test_example_of_diffusers_runs_unedited(tmp_path: Path) -> None:
    """The example in the documentation of a pipeline, with tiny weights under the name it loads."""
    diffusers = pytest.importorskip("diffusers")
    pipe = tiny_pipeline()
    examples = doctest.DocTestParser().get_examples(diffusers.DiTPipeline.__call__.__doc__)
    script = "".join(example.source for example in examples)
    assert "torch.compile" not in script
    checkpoint = tmp_path / "facebook" / "DiT-XL-2-256"
    assert str(checkpoint.relative_to(tmp_path)) in script
    pipe.save_pretrained(checkpoint)
    index = json.loads((checkpoint / "model_index.json").read_text())
    labels = {"2": "great white shark, white shark", "879": "umbrella"}
    (checkpoint / "model_index.json").write_text(json.dumps({**index, "id2label": labels}))
    (tmp_path / "snippet.py").write_text(script)
    (tmp_path / "sitecustomize.py").write_text(SHIM)
    command = "run --compile-transformers -o min_tokens=0 -o inner=eager --json report.json"
    done = subprocess.run(
        [sys.executable, "-m", "pisa_compile", *command.split(), "snippet.py"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}",
        },
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["replaced"] == len(report["sites"]) == 2
    # The example takes 25 steps, with guidance in one batch.
    assert [site["calls"] for site in report["sites"]] in ([25, 25], [50], [50, 50])
    assert "2 of 2 attention sites replaced" in " ".join(done.stderr.split())


def test_transformers_that_the_script_compiles_are_left_to_it(run) -> None:
    pytest.importorskip("diffusers")
    code, report = run(
        """
        from diffusers import DiTTransformer2DModel
        def make(heads):
            return DiTTransformer2DModel(num_attention_heads=heads, attention_head_dim=8,
                in_channels=4, out_channels=8, num_layers=1, sample_size=8, patch_size=1).eval()
        def call(model):
            one = torch.ones(1, dtype=torch.long)
            model(torch.ones(1, 4, 8, 8), timestep=one, class_labels=one)
        one, two, three = make(1), make(2), make(3)
        call(torch.compile(one, backend="eager"))
        two.compile(backend="eager"); call(two)
        call(three); call(three)
        """,
        options=("--compile-transformers",),
    )
    assert code == 0
    assert [(s["query_shape"][1], s["calls"]) for s in report["sites"]] == [(3, 2)]
    from diffusers import ModelMixin

    assert "__call__" not in vars(ModelMixin)


def test_schedules_follow_the_steps_of_a_pipeline(run) -> None:
    pytest.importorskip("diffusers")
    _, report = run(
        """
        import diffusers
        from tests.cli.test_script import tiny_pipeline
        pipe = tiny_pipeline()
        # A scheduler that the pipeline gets later is followed too.
        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
        pipe(class_labels=[1], num_inference_steps=5, guidance_scale=1.0, output_type="np")
        """,
        options=("--compile-transformers", "-o", "schedule={'dense_first': 2}"),
    )
    assert sorted((s["replaced"], s["calls"]) for s in report["sites"]) == [
        (False, 2),
        (False, 2),
        (True, 3),
        (True, 3),
    ]
    from diffusers import DiffusionPipeline

    assert DiffusionPipeline.__setattr__.__module__.startswith("diffusers")


def test_name_is_listed_without_an_import() -> None:
    """As hosts find backends that list what torch.compile knows, ComfyUI's compile node for one."""
    code = (
        "import sys, torch; names = torch.compiler.list_backends();"
        "print('pisa' in names, 'pisa_compile' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["True", "False"]
