"""What is checked and what is timed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from pisa_compile.kernels.testing import Inputs, random_inputs


@dataclass(frozen=True)
class Shape:
    name: str
    tokens: int
    heads: int
    head_dim: int


SHAPES = (
    Shape("flux", 4608, 24, 128),
    Shape("sd35", 4429, 38, 64),
    Shape("pixart", 4096, 16, 72),
    Shape("wan_14b_480p", 32_760, 40, 128),
    Shape("wan_14b_720p", 75_600, 40, 128),
    Shape("hunyuan_video", 119_056, 24, 128),
)
TOYS = (Shape("toy", 200, 2, 16), Shape("toy_ragged", 150, 1, 24))
DENSITIES = (0.05, 0.10, 0.125, 0.15, 0.25)
# Small enough for the specification in float64, and every feature that has a branch of its own.
CHECKS: dict[str, dict[str, Any]] = {
    "hybrid": {},
    "zeroth": {"order": "zeroth"},
    "none": {"order": "none"},
    "threshold": {"routing": "threshold"},
    "covariance": {"routing": "topk_covariance"},
    "head_dim_72": {"head_dim": 72},
    "head_dim_256": {"head_dim": 256},
    "value_narrower_gqa": {"head_dim": 96, "value_dim": 40, "heads": 4, "kv_heads": 2},
    "masked_exact": {"masked": 0.3, "exact": (70, 20)},
    "cross_block_32": {"query_len": 100, "key_len": 333, "block_size": 32},
    "cross_keys_16": {"query_len": 100, "key_len": 333, "key_block_size": 16},
    "corrected": {"order": "corrected"},
    "corrected_keys_32": {"order": "corrected", "key_block_size": 32},
    "corrected_gqa_masked": {"order": "corrected", "masked": 0.3, "heads": 4, "kv_heads": 2},
    "corrected_threshold": {"order": "corrected", "routing": "threshold"},
    "density": {"heads": 3, "density": (1.0, 0.4, 0.05)},
    "density_threshold": {"heads": 3, "density": (1.0, 0.4, 0.05), "routing": "threshold"},
    "permuted": {"permuted": True},
    "permuted_threshold_masked": {"permuted": True, "routing": "threshold", "masked": 0.3},
    "permuted_corrected_head_dim_72": {"permuted": True, "order": "corrected", "head_dim": 72},
    "permuted_exact_density": {"permuted": True, "exact": (70, 20), "density": (0.4,)},
}
SETTINGS = ("routing", "order", "exact", "block_size", "key_block_size")
PERMUTATION_TOKENS = 32_760  # about 32k: where a permutation must cost little


def inputs_of(shape: Shape, device: torch.device) -> Inputs:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return random_inputs(
        heads=shape.heads, query_len=shape.tokens, head_dim=shape.head_dim, dtype=dtype,
        device=str(device),
    )  # fmt: skip
