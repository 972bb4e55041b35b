"""What the arguments of a model say about the grid of its tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pisa_compile.caller import tokens_of_caller
from pisa_compile.ops.token_order import NO_CALLER, CallerTokens


class Model(nn.Module):
    """Packed or latent tokens and a block that sees nothing else."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config = config
        self.block = nn.Identity()
        self.seen = NO_CALLER

    def forward(self, hidden_states: Tensor | None = None, img_ids: Any = None, **_: Any) -> None:
        self.seen = tokens_of_caller()


def ids(frames: int, height: int, width: int) -> Tensor:
    return torch.cartesian_prod(*map(torch.arange, (frames, height, width))).float()


CALLS: list[tuple[str, dict[str, Any], dict[str, Any], CallerTokens]] = [
    ("ids", {}, {"img_ids": ids(1, 6, 9)}, CallerTokens(((6, 9),))),
    ("ids_batch", {}, {"img_ids": ids(2, 6, 9)[None]}, CallerTokens(((2, 6, 9),))),
    ("ids_shuffled", {}, {"img_ids": ids(1, 6, 9).flip(0)}, NO_CALLER),
    (
        "text_ids",
        {},
        {"img_ids": ids(1, 6, 9), "txt_ids": torch.zeros(7, 3)},
        CallerTokens(((6, 9),), 7),
    ),
    ("shapes", {}, {"img_shapes": [[(1, 6, 9)]] * 2}, CallerTokens(((6, 9),))),
    ("two_pictures", {}, {"img_shapes": [[(1, 6, 9), (1, 4, 4)]]}, NO_CALLER),
    ("sizes", {}, {"num_frames": 3, "height": 6, "width": 9}, CallerTokens(((3, 6, 9),))),
    (
        "image",
        {"patch_size": 2},
        {"hidden_states": torch.zeros(1, 4, 12, 18)},
        CallerTokens(((6, 9),)),
    ),
    ("no_patch_size", {}, {"hidden_states": torch.zeros(1, 4, 12, 18)}, NO_CALLER),
    ("packed", {"patch_size": 1}, {"hidden_states": torch.zeros(1, 54, 8)}, NO_CALLER),
]


@pytest.mark.parametrize(
    ("config", "arguments", "expected"),
    [case[1:] for case in CALLS],
    ids=[case[0] for case in CALLS],
)
def test_what_a_call_says(
    config: dict[str, Any], arguments: dict[str, Any], expected: CallerTokens
) -> None:
    model = Model(**config)
    model(**arguments)
    assert model.seen == expected
    assert tokens_of_caller() == NO_CALLER  # the call is over


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        ({"patch_size": (1, 2, 2)}, (1, 16, 3, 12, 18)),
        ({"patch_size": 2, "patch_size_t": 1}, (1, 16, 3, 12, 18)),
        ({"patch_size": 2, "patch_size_t": None}, (1, 3, 16, 12, 18)),
        ({"patch_size": [1, 2, 2]}, (1, 3, 12, 18, 16)),
    ],
    ids=["Wan", "HunyuanVideo", "CogVideoX", "Kandinsky"],
)
def test_videos_in_any_order(config: dict[str, Any], shape: tuple[int, ...]) -> None:
    model = Model(**config)
    model(torch.zeros(shape))
    assert (3, 6, 9) in model.seen.grids


def test_ids_are_read_once() -> None:
    model, positions = Model(), ids(1, 6, 9)
    model(img_ids=positions)
    positions.data.zero_()  # does not count as a change
    model(img_ids=positions)
    assert model.seen.grids == ((6, 9),)
    positions.copy_(ids(1, 9, 6))
    model(img_ids=positions)
    assert model.seen.grids == ((9, 6),)


# Real geometry, tiny width: 1024x1024 and 832x1248 pixels, 720p with 81 and 129 frames.
