"""The fidelity benchmark: its rules select what they say, its numbers are right."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import pisa_compile as pisa

for _needed in ("rich", "matplotlib", "scipy", "skimage"):
    pytest.importorskip(_needed)

from benchmarks.fidelity import (  # noqa: E402
    data,
    methods,
    metrics,
    operator,
    pictures,
    plots,
    rivals,
    tables,
)

from .conftest import TOKENS  # noqa: E402


def dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return scaled_dot_product_attention(query, key, value)


def relative(out: Tensor, expected: Tensor) -> float:
    return float((out - expected).norm() / expected.norm())


def test_attend_to_all_blocks_is_dense(head: tuple[Tensor, Tensor, Tensor]) -> None:
    everything = torch.ones(1, TOKENS // 64, TOKENS // 64, dtype=torch.bool)
    assert relative(rivals.attend(*head, everything), dense(*head)) < 1e-12


def test_dropping_is_the_package_without_approximation(head: tuple[Tensor, Tensor, Tensor]) -> None:
    query, key, value = head
    selected = rivals.top_k(query, key, 0.25)
    expected = pisa.attention(
        *(x[None] for x in head), sparsity=0.75, order="none", impl="reference"
    )[0]
    assert relative(rivals.attend(query, key, value, selected), expected) < 1e-12


def test_pasa_with_one_group_is_the_hybrid(head: tuple[Tensor, Tensor, Tensor]) -> None:
    doubled = [torch.cat((x, 0.9 * x.flip(1)), 1) for x in head]  # 32 blocks: one group
    out, delivered = rivals.pasa(*doubled, 0.25)
    expected = pisa.attention(
        *(x[None] for x in doubled), sparsity=0.75, order="hybrid", impl="reference"
    )[0]
    assert relative(out, expected) < 1e-12
    assert delivered == 0.25
    four = [torch.cat((x, 0.9 * x.flip(1)), 1) for x in doubled]  # two groups: another method
    expected = pisa.attention(
        *(x[None] for x in four), sparsity=0.75, order="hybrid", impl="reference"
    )[0]
    assert relative(rivals.pasa(*four, 0.25)[0], expected) > 1e-6


def test_psa_pools_what_it_does_not_keep(head: tuple[Tensor, Tensor, Tensor]) -> None:
    query, key, value = head
    out, cost = rivals.psa(query, key, value, 0.5)
    assert cost == pytest.approx(0.5, abs=1 / 16)
    drop = rivals.attend(query, key, value, rivals.top_k(query, key, 0.5))
    assert relative(out, dense(*head)) < relative(drop, dense(*head))
    # Keys and values that are equal within groups of eight lose nothing by pooling.
    coarse = [x.unflatten(1, (-1, 8))[:, :, :1].expand(-1, -1, 8, -1).flatten(1, 2) for x in head]
    out, _ = rivals.psa(query, *coarse[1:], 0.5)
    assert relative(out, dense(query, *coarse[1:])) < 1e-12


def test_rectified_gives_all_blocks_their_share(head: tuple[Tensor, Tensor, Tensor]) -> None:
    _, key, value = head
    key = key.unflatten(1, (-1, 64)).mean(2).repeat_interleave(64, 1)
    query = torch.ones_like(key) * torch.linspace(0.1, 2, 32, dtype=torch.float64)
    # Equal queries and equal keys in each block: pooling makes no error and its gain is positive.
    out, _ = rivals.rectified(query, key, value, 0.3)
    assert relative(out, dense(query, key, value)) < 1e-12


@pytest.mark.parametrize("rule", [rivals.top_p, rivals.spargeattn, rivals.xattention, rivals.top_k])
@pytest.mark.parametrize("density", [0.1, 0.3])
def test_rules_deliver_their_density_and_find_a_planted_block(
    head: tuple[Tensor, Tensor, Tensor], rule: rivals.Rule, density: float
) -> None:
    query, key, _ = head
    query = query.clone()
    query[:, :64] = 3 * key[:, 9 * 64 : 10 * 64]  # the first query block looks at block 9
    selected = rule(query, key, density)
    assert float(selected.float().mean()) == pytest.approx(density, abs=0.07)
    assert bool(selected.any(-1).all())
    assert bool(selected[0, 0, 9])
    assert rule is rivals.top_k or len(set(selected.sum(-1).flatten().tolist())) > 1


def test_spargeattn_always_takes_key_blocks_that_do_not_resemble_their_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    alike = torch.randn(1, 16, 1, 32, generator=generator).expand(-1, -1, 64, -1).flatten(1, 2)
    key = alike.clone()
    key[:, 5 * 64 : 6 * 64] = torch.randn(64, 32, generator=generator)
    selected = rivals.spargeattn(alike, key, 0.2)
    assert bool(selected[:, :, 5].all())


def test_smallest_set_takes_the_largest_first() -> None:
    probability = torch.tensor([[[0.1, 0.6, 0.3], [0.2, 0.2, 0.6]]])
    assert rivals.smallest_set(probability, 0.0).sum(-1).tolist() == [[1, 1]]
    assert rivals.smallest_set(probability, 0.7)[0].tolist() == [
        [False, True, True],
        [True, False, True],
    ]
    assert bool(rivals.smallest_set(probability, 1.1).all())


def test_smaller_key_blocks_pay_for_their_means_with_exact_keys() -> None:
    sample = next(data.structured())
    qkv = [x[:, :, :2048].float() for x in (sample.query, sample.key, sample.value)]
    out, _ = methods.BY_NAME[methods.FINE].run(*qkv, 0.25)
    expected = pisa.attention(*qkv, sparsity=1 - 15 / 64, key_block_size=32)
    assert out.equal(expected)


def test_every_method_delivers_no_less_than_is_asked() -> None:
    for density in (0.05, 0.1, 0.15, 0.3, 0.5):
        whole = math.ceil(density * 64 - 1e-6) / 64
        for method in methods.METHODS:
            delivered = methods.deliverable(method, density)
            assert density <= delivered <= whole
            assert delivered == whole or method.name == methods.FINE


def test_every_method_runs_at_the_density_asked_for() -> None:
    sample = next(data.structured())
    qkv = [x[:, :, :2048].float() for x in (sample.query, sample.key, sample.value)]
    expected = dense(*qkv)
    for method in methods.METHODS:
        out, delivered = method.run(*qkv, 0.25)
        assert delivered == pytest.approx(0.25, abs=0.02), method.name
        assert relative(out, expected) < 0.5, method.name


# Numbers, records and documents.


def test_metrics() -> None:
    a = torch.tensor([3.0, 4.0])
    assert metrics.relative_l2(a * 1.1, a) == pytest.approx(0.1)
    assert metrics.relative_l2(torch.tensor([math.nan, 1.0]), a) == math.inf
    assert metrics.cosine(a, torch.tensor([4.0, -3.0])) == pytest.approx(0, abs=1e-12)
    assert metrics.sqnr_db(0.1) == pytest.approx(20)
    assert metrics.geometric_mean([1, 4, 16]) == pytest.approx(4)
    mean, half = metrics.mean_interval([1.0, 2.0, 3.0])
    assert mean == 2
    assert half == pytest.approx(4.303 / math.sqrt(3), rel=1e-3)  # Student's t, two degrees
    picture = torch.rand(3, 16, 16) * 2 - 1
    assert metrics.ssim(picture, picture) == pytest.approx(1)
    assert metrics.psnr_db((picture + 0.02).clamp(-1, 1) * 2, picture * 2) > 30
    assert metrics.psnr_db(torch.full((3, 16, 16), -0.5), torch.full((3, 16, 16), 0.5)) == (
        pytest.approx(10 * math.log10(4))
    )


def test_attention_of_the_model_is_replaced_and_comes_back() -> None:
    before = torch.nn.functional.scaled_dot_product_attention
    with data.replaced_attention(lambda q, k, v: v):
        assert torch.nn.functional.scaled_dot_product_attention(1, 2, 3) == 3
    assert torch.nn.functional.scaled_dot_product_attention is before


def test_floors_are_dense_attention_in_other_words() -> None:
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(3, 1, 1, 128, 16, generator=generator)
    exact = dense(*qkv)
    assert relative(pictures.attention("math", 1.0)(*qkv), exact) < 1e-5
    assert 1e-5 < relative(pictures.attention("bfloat16", 1.0)(*qkv), exact) < 1e-2
    assert pictures.attention("dense", 1.0)(*qkv).equal(exact)


def _record() -> dict[str, Any]:
    """A record as the command writes it, with made-up numbers."""
    rows = [
        {
            "method": method.name,
            "order": order,
            "density": density,
            "group": group,
            "place": place,
            "delivered": density,
            "error": [0.1 / density * (1 + i), 0.2 / density],
            "cosine": [0.9, 0.8],
        }
        for i, method in enumerate(methods.METHODS)
        for group in ("captured", "structured", "adversarial")
        for method, order, density in [(method, o, d) for _, o, d in operator.settings(group, True)]
        for place in ("seed 0, step 2, layer 0", "seed 0, step 2, layer 1")
    ]
    unique = {json.dumps(row): row for row in rows}
    rows = operator.merged(list(unique.values()))
    for row in copy.deepcopy(rows):
        if row["density"] == 0.15 and row["order"] == "hilbert":
            rows += [row | {"density": density} for density in (0.05, 0.3)]
    times = [
        {
            "method": m.name,
            "density": d,
            "median": 0.1 + d,
            "p20": 0.1,
            "p80": 0.5,
            "of_hybrid": 1.0,
        }
        for m in methods.METHODS
        if m.settings is not None
        for d in (0.05, 0.15, 0.3)
    ]
    times.append({"method": "dense", "density": 1.0, "median": 1.0, "p20": 1.0, "p80": 1.0})
    made = [
        {"method": name, "density": density, "psnr_db": [30.0 + i, 31.0], "ssim": [0.9, 0.8]}
        for i, (name, density) in enumerate(pictures.settings(False))
        if name != "dense"
    ]
    return {
        "operator": {"rows": rows},
        "timing": {"threads": 2, "calls": times, "steps": times},
        "pictures": {"seeds": [2, 3], "labels": ["a", "b"], "steps": 1, "rows": made},
    }


def test_the_record_is_drawn_and_written_into_the_document(tmp_path: Path) -> None:
    record = _record()
    for name, density in pictures.settings(False):
        for seed in (2, 3):
            torch.save(torch.rand(3, 32, 32), tmp_path / f"{name}-{density:g}-{seed}-1.pt")
    plots.draw(record, tmp_path, tmp_path / "images")
    names = {path.name for path in (tmp_path / "images").iterdir()}
    expected = {"density", "time", "speedup", "heads", "pictures"}
    assert names == {f"fidelity-{name}.png" for name in expected}

    source = Path(__file__).parents[2] / "docs" / "fidelity.md"
    document = tmp_path / "fidelity.md"
    document.write_text(source.read_text())
    tables.write(record, document)
    text = document.read_text()
    for table in ("errors", "structured", "adversarial", "pictures", "time"):
        assert f"<!-- table {table} -->\n| " in text
    # PISA hybrid is the ninth method: 1 + 8 times the first head's error of the first one.
    ours = metrics.geometric_mean([13 / 9, 1, 13 / 9, 1])
    assert f"| **corrected (ours)** | {ours:.2f} [1.44]" in text
    tables.write(record, document)
    assert document.read_text() == text
    assert len(list(tables.terminal(record))) == 5
    document.write_text("no place for tables")
    with pytest.raises(ValueError, match="expected one place for table errors, found 0"):
        tables.write(record, document)


def test_merged_keeps_every_head_with_its_place() -> None:
    row = {
        "method": "topk",
        "order": "raster",
        "density": 0.1,
        "group": "captured",
        "delivered": 0.1,
        "cosine": [1.0, 1.0],
    }
    merged = operator.merged(
        [
            row | {"place": "layer 0", "error": [0.1, 0.01]},
            row | {"place": "layer 1", "error": [1.0, 0.1]},
        ]
    )
    assert len(merged) == 1
    assert merged[0]["head"][2] == "layer 1, head 0"
    assert merged[0]["error"] == [0.1, 0.01, 1.0, 0.1]
    assert merged[0]["sqnr_db_mean"] == pytest.approx(20)
