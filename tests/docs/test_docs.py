"""Every code block of the documentation runs, every link leads somewhere, and benchmarks are those
of the records. What needs a GPU or a download gets a small stand-in here."""

from __future__ import annotations

import contextlib
import importlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import pisa_compile as pisa
from docs.tools import benchmarks_page, hooks
from pisa_compile import backend
from pisa_compile.cli import doctor, main
from pisa_compile.kernels.testing import random_inputs
from pisa_compile.policies.policy import DEFAULT_MIN_TOKENS

from ..models import tiny, tokens
from .test_readme import Repeating, Scheduler

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", flags=re.DOTALL | re.MULTILINE)
MYMODEL = """
from tests.models import tiny, tokens
def build(): return tiny()
def example(): return tokens(300)
def inputs(): return [0]
def sample(model, seed): return model(tokens(300, seed=seed))
"""


def blocks(page: Path, language: str) -> list[str]:
    found = BLOCK.findall(page.read_text())
    assert {name for _, name, _ in found} <= {"python", "sh", "text"}, page.name
    return [
        re.sub(rf"^{indent}", "", text, flags=re.M)
        for indent, name, text in found
        if name == language
    ]


class Transformer(Repeating):
    """A model of diffusers, as far as the pages use one."""

    def set_attention_backend(self, name: str) -> None:
        from diffusers.models.attention_dispatch import AttentionBackendName

        AttentionBackendName(name)  # raises for a name that is not registered

    def enable_parallelism(self, *, config: Any) -> None:
        assert config.ring_degree * config.ulysses_degree == 2


class Pipeline(SimpleNamespace):
    @classmethod
    def from_pretrained(cls, name: str, **settings: Any) -> Pipeline:
        return cls(transformer=Transformer().eval(), scheduler=Scheduler())

    def __call__(self, prompt: str, **settings: Any) -> SimpleNamespace:
        return SimpleNamespace(images=[self.transformer(tokens(200))])

    def load_lora_weights(self, weights: Any, adapter_name: str) -> None: ...

    def enable_lora_hotswap(self, target_rank: int) -> None: ...


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Many small calls: waking threads for them would take longer than the calls."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the blocks of all pages may use."""
    diffusers = pytest.importorskip("diffusers")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(diffusers, "FluxPipeline", Pipeline)
    monkeypatch.setitem(DEFAULT_MIN_TOKENS, "cpu", 0)  # small models stand in for large ones
    # Inductor and its packages have tests of their own.
    monkeypatch.setattr(backend, "compile_inner", lambda graph, inputs, settings: graph.forward)
    packages: dict[str, Any] = {}

    def package(program: Any, *, package_path: str) -> str:
        packages[package_path] = program.module()
        return package_path

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", package)
    monkeypatch.setattr(torch._inductor, "aoti_load_package", packages.__getitem__)
    inputs = random_inputs(query_len=200, head_dim=16)
    return {
        "torch": torch,
        "nn": nn,
        "pisa": pisa,
        "model": tiny(),
        "x": tokens(200),
        "pipe": Pipeline.from_pretrained(""),
        "transformer": Transformer().eval(),
        "block": tiny().blocks[0],
        "vision_model": SimpleNamespace(set_attn_implementation=lambda name: None),
        "query": inputs.query,
        "key": inputs.key,
        "value": inputs.value,
        "folder": tmp_path,
        "style": {},
        "world_size": 2,
        "mesh": None,
        "plan": {},
        "parallelize_module": lambda module, mesh, plan: module,
        "fully_shard": lambda module, mesh: module,
        "noise": lambda seed: tokens(130, seed=seed),
        "denoise": lambda model, x, index: model(x),
    }


@contextlib.contextmanager
def one_process() -> Iterator[None]:
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_blocks_run(page: Path, names: dict[str, Any]) -> None:
    code = blocks(page, "python")
    if page.stem == "scaling-out":  # the file that the page on calibration made
        pisa.save_policy("policy.json", {"blocks.*": pisa.Policy(sparsity=0.8)})
    with torch.no_grad(), one_process() if page.stem == "scaling-out" else contextlib.nullcontext():
        for block in code:
            exec(compile(block, str(page), "exec"), names)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the files that the commands name."""
    (tmp_path / "script.py").write_text("import sys; assert '--help' not in sys.argv")
    (tmp_path / "mymodel.py").write_text(MYMODEL)
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "module.py").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "CHECKS", ())  # they have their own test
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setattr(sys, "argv", sys.argv)
    main_module: ModuleType = sys.modules["__main__"]
    yield tmp_path
    sys.modules["__main__"] = main_module
    for name in ("mymodel", "package"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.stem)
def test_shell_blocks_run(page: Path, folder: Path) -> None:
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            run_command(line.split("  #")[0].strip())


def run_command(line: str) -> None:
    """Run a command of ours; of the others, check what they name."""
    import shlex

    words = shlex.split(line)
    if words[0] == "torchrun" and "pisa_compile" in words:
        words = ["pisa", *words[words.index("pisa_compile") + 1 :]]
    if words[0] == "pisa":
        quick = ["--rounds", "1"] if words[1] == "bench" else []
        with pytest.raises(SystemExit) as exit:
            main([*words[1:], *quick])
        assert not exit.value.code, line
    elif words[:2] == ["pip", "install"]:
        text = (ROOT / "pyproject.toml").read_text()
        for extra in re.findall(r"\[(\w+)\]", line):
            assert re.search(rf"^{extra} = \[", text, flags=re.M), line
    elif words[:2] == ["python", "-m"]:
        path = ROOT / words[2].replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), line
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), flags=re.M), line
    else:
        raise AssertionError(f"no test for {line!r}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, heading = target.partition("#")
        goal = page.parent / path if path else page
        assert goal.exists(), target
        if heading:
            assert heading in anchors(goal), target


def anchors(page: Path) -> set[str]:
    """Of the headings, as the site makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.M)
    kept = (re.sub(r"[^\w\s-]", "", heading.lower()).strip() for heading in headings)
    return {re.sub(r"[-\s]+", "-", heading) for heading in kept}


def test_site_shows_links_to_the_repository_as_names() -> None:
    shown: Callable[[str], str] = lambda text: hooks.on_page_markdown(text, None, None, None)  # noqa: E731
    assert shown("see [`a.py`](../benchmarks/a.py).") == "see `benchmarks/a.py`."
    assert shown("see [the code](../kernels/a.py)") == "see the code (`kernels/a.py`)"
    assert shown("[page](a.md#b) [web](https://c.d)") == "[page](a.md#b) [web](https://c.d)"


def test_benchmarks_are_those_of_the_records() -> None:
    assert benchmarks_page.PAGE.read_text() == benchmarks_page.page(benchmarks_page.records())


@pytest.mark.parametrize("name", ["calibration", "compile_time"])
def test_tables_are_those_of_the_records(name: str) -> None:
    benchmark = importlib.import_module(f"benchmarks.{name}")
    record = json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())
    text = benchmark.PAGE.read_text()
    assert benchmark.page(record, text) == text


def test_navigation_leaves_out_what_does_not_exist(tmp_path: Path) -> None:
    (tmp_path / "a.md").touch()
    config = SimpleNamespace(
        nav=["a.md", "b.md", {"B": "b.md"}, {"Part": [{"A": "a.md"}, "c.md"]}], docs_dir=tmp_path
    )
    assert hooks.on_config(config).nav == ["a.md", {"Part": [{"A": "a.md"}]}]


def test_every_page_is_in_the_navigation() -> None:
    listed = re.findall(r"- (?:\w+: )?([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.M)
    assert {page.name for page in PAGES} <= set(listed)


def test_the_walks_in_the_design_lead_through_files_and_functions_that_exist() -> None:
    text = (ROOT / "DESIGN.md").read_text()
    hops = re.findall(r"^\d+\. (?:`([\w/.]+)` )`?([\w.]*)", text, flags=re.MULTILINE)
    assert len(hops) >= 20
    for path, function in hops:
        file = next(
            (ROOT / top / path for top in ("", "pisa_compile") if (ROOT / top / path).exists()),
            None,
        )
        assert file is not None, path
        sources = file.rglob("*.py") if file.is_dir() else [file]
        name = function.split(".")[-1]
        found = any(re.search(rf"(def|class) {name}\b", source.read_text()) for source in sources)
        assert found, f"{path} has no {function}"
