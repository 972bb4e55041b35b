"""What eight GPUs should give, on paper: arithmetic from shapes and assumed rates, not measured.

    python benchmarks/scaling.py                  write the record and the table in the page

The formulas are in docs/scaling-out.md; change `ASSUMED` to the rates of another machine.
"""

from __future__ import annotations

import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import records

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "benchmarks" / "results" / "scaling.json"
PAGE = ROOT / "docs" / "scaling-out.md"
BEGIN, END = "<!-- table: python benchmarks/scaling.py -->", "<!-- end -->"


@dataclass(frozen=True)
class Rates:
    """What a GPU and its links are taken to do.

    Attributes:
        attention: FLOP/s of dense attention in 16 bits.
        sparse_attention: FLOP/s of the sparse kernel, on the FLOPs that it does.
        linear: FLOP/s of matrix products in 16 bits.
        link: bytes/s that a rank sends to the others together, in one direction.
    """

    attention: float = 500e12
    sparse_attention: float = 350e12
    linear: float = 600e12
    link: float = 300e9


@dataclass(frozen=True)
class Model:
    """Sizes of one transformer.

    Attributes:
        linear: FLOPs of its linear layers per token and layer.
    """

    name: str
    tokens: int
    heads: int
    head_dim: int
    layers: int
    linear: int

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


ASSUMED = Rates()
GPUS = 8
SPARSITY, BLOCK = 0.85, 64
BYTES = 2  # of an element
MODELS = (
    # Two matrix products of the MLP and four of attention, 2 FLOPs per multiply-add.
    Model("FLUX.1-dev, 1024 x 1024", 4096 + 512, 24, 128, 57, 24 * 3072**2),
    Model("HunyuanVideo, 720p, 129 frames", 118_800 + 256, 24, 128, 60, 24 * 3072**2),
    # Cross-attention adds two products for the video's tokens.
    Model(
        "Wan2.1-14B, 720p, 81 frames", 75_600, 40, 128, 40, 2 * (6 * 5120**2 + 2 * 5120 * 13_824)
    ),
)


def attention_flops(tokens: int, width: int, head_dim: int, sparsity: float) -> float:
    """Of one layer: exact blocks, means of the others, routing, first-order matrix."""
    exact = 4 * tokens**2 * width * (1 - sparsity)
    if sparsity == 0:
        return exact
    blocks = tokens / BLOCK
    means = 4 * tokens * blocks * width * sparsity
    routing = 2 * blocks**2 * width
    return exact + means + routing + 4 * tokens * width * head_dim


def layer(model: Model, rates: Rates, gpus: int, sparsity: float) -> dict[str, float]:
    """Seconds of a layer on one of so many GPUs with Ulysses, nothing overlapped."""
    flops = attention_flops(model.tokens, model.width, model.head_dim, sparsity) / gpus
    sent = 4 * (gpus - 1) / gpus**2 * model.tokens * model.width * BYTES
    return {
        "attention": flops / (rates.sparse_attention if sparsity else rates.attention),
        "linear": model.tokens * model.linear / gpus / rates.linear,
        "communication": sent / rates.link,
    }


def expected(model: Model, rates: Rates) -> dict[str, Any]:
    """Speed-ups over one GPU with dense attention, and the tokens that hide a ring's transfers."""
    variants = {
        "sparse, 1 GPU": layer(model, rates, 1, SPARSITY),
        f"dense, {GPUS} GPUs": layer(model, rates, GPUS, 0.0),
        f"sparse, {GPUS} GPUs": layer(model, rates, GPUS, SPARSITY),
    }
    base = sum(layer(model, rates, 1, 0.0).values())
    return {
        "model": asdict(model),
        "variants": {
            name: {
                "seconds": seconds,
                "speedup": base / sum(seconds.values()),
                "communication_share": seconds["communication"] / sum(seconds.values()),
            }
            for name, seconds in variants.items()
        },
    }


def ring_tokens(rates: Rates, density: float) -> float:
    """Tokens per rank from which a ring's transfers take no longer than attention."""
    rate = rates.attention if density == 1 else rates.sparse_attention
    return BYTES * rate / (2 * density * rates.link)


def table(record: dict[str, Any]) -> str:
    names = list(record["rows"][0]["variants"])
    lines = [
        f"| model | tokens | {' | '.join(names)} |",
        "|---|--:|" + "--:|" * len(names),
    ]
    for row in record["rows"]:
        cells = [
            f"{v['speedup']:.1f}x ({v['communication_share']:.0%})"
            for v in row["variants"].values()
        ]
        lines.append(
            f"| {row['model']['name']} | {row['model']['tokens']:,} | {' | '.join(cells)} |"
        )
    rates = record["rates"]
    lines += [
        "",
        f"Arithmetic, not measured: sparsity {record['sparsity']}, blocks of {record['block']}, "
        f"16-bit elements; assumed {rates['attention'] / 1e12:.0f} TFLOP/s for dense attention, "
        f"{rates['sparse_attention'] / 1e12:.0f} for the sparse kernel, "
        f"{rates['linear'] / 1e12:.0f} for linear layers, {rates['link'] / 1e9:.0f} GB/s per "
        "direction between GPUs. In brackets: share of communication, none of it overlapped. "
        f"With these rates a ring hides its transfers from "
        f"{record['ring_tokens']['dense']:,.0f} tokens per rank on with dense attention and from "
        f"{record['ring_tokens']['sparse']:,.0f} with sparse.",
    ]
    return "\n".join(lines)


def main() -> None:
    record = {
        "benchmark": "scaling",
        "environment": records.environment("python benchmarks/scaling.py"),
        "kind": "arithmetic from shapes and assumed rates; nothing was measured",
        "rates": asdict(ASSUMED),
        "gpus": GPUS,
        "sparsity": SPARSITY,
        "block": BLOCK,
        "rows": [expected(model, ASSUMED) for model in MODELS],
        "ring_tokens": {
            "dense": ring_tokens(ASSUMED, 1.0),
            "sparse": ring_tokens(ASSUMED, 1 - SPARSITY),
        },
    }
    records.write(RECORD, record)
    PAGE.write_text(page(record, PAGE.read_text()))


def page(record: dict[str, Any], old: str) -> str:
    """The page with this record's table in place of the one that it shows."""
    new = f"{BEGIN}\n{table(record)}\n{END}"
    pattern = re.escape(BEGIN) + ".*?" + re.escape(END)
    return re.sub(pattern, lambda match: new, old, flags=re.DOTALL)


if __name__ == "__main__":
    main()
