"""Errors of single attention calls against dense attention, head by head."""

import statistics
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import metrics
from .data import Sample
from .methods import METHODS, Method, deliverable, in_order, order_of_tokens

DENSITIES = {"hilbert": (0.05, 0.1, 0.15, 0.3, 0.5), "raster": (0.1, 0.15)}
SLOW = ("hilbert", 0.15)
ADVERSARIAL_DENSITIES = (0.05, 0.15, 0.5)


def settings(group: str, quick: bool) -> Iterator[tuple[Method, str, float]]:
    """Method, order of tokens and density of every row of the record."""
    chosen = {"hilbert": ADVERSARIAL_DENSITIES} if group == "adversarial" else DENSITIES
    for order, densities in chosen.items():
        for density in densities:
            for method in METHODS:
                if (quick and density != 0.15) or (method.slow and (order, density) != SLOW):
                    continue
                yield method, order, density


@torch.no_grad()
def measure(sample: Sample, quick: bool = False) -> list[dict[str, Any]]:
    """One row per method, order and density, with a number per head of the sample."""
    query, key, value = (x.float() for x in (sample.query, sample.key, sample.value))
    dense = _dense(sample)
    rows = []
    for method, order, density in settings(sample.group, quick):
        target = deliverable(method, density)
        out, delivered = in_order(method, query, key, value, target, order_of_tokens(order))
        heads = list(zip(out[0], dense[0], strict=True))
        rows.append(
            {
                "method": method.name,
                "order": order,
                "density": density,
                "group": sample.group,
                "place": sample.place,
                "delivered": round(delivered, 5),
                "error": [round(metrics.relative_l2(a, b), 6) for a, b in heads],
                "cosine": [round(metrics.cosine(a, b), 6) for a, b in heads],
            }
        )
    return rows


def _dense(sample: Sample) -> Tensor:
    """Dense attention a head at a time; in float64 where outliers ask for it."""
    query, key, value = (x[0] for x in (sample.query, sample.key, sample.value))
    if sample.group == "adversarial":
        query, key, value = (x.double() for x in (query, key, value))
    scale = query.shape[-1] ** -0.5
    heads = [(scale * q @ k.T).softmax(-1) @ v for q, k, v in zip(query, key, value, strict=True)]
    return torch.stack(heads)[None]


def merged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of many samples as one row per method, order, density and group."""
    by_key: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("method", "order", "density", "group"))
        whole = by_key.setdefault(
            key,
            {name: row[name] for name in ("method", "order", "density", "group")}
            | {"delivered": [], "error": [], "cosine": [], "head": []},
        )
        whole["delivered"].append(row["delivered"])
        whole["error"] += row["error"]
        whole["cosine"] += row["cosine"]
        count = len(row["error"])
        whole["head"] += [
            f"{row['place']}, head {i}" if count > 1 else row["place"] for i in range(count)
        ]
    for whole in by_key.values():
        whole["delivered"] = round(statistics.fmean(whole["delivered"]), 5)
        whole["cosine_mean"] = round(statistics.fmean(whole.pop("cosine")), 6)
        whole["sqnr_db_mean"] = round(statistics.fmean(map(metrics.sqnr_db, whole["error"])), 3)
    return list(by_key.values())
