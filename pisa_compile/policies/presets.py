"""Published settings of known models, chosen by class name; `docs/presets.md` cites the sources.

A class is known by its name, so no model library is imported. The name is that of the model, or of
its transformer block, which is all that a trace shows where blocks are compiled one by one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .policy import DENSE, Policy
from .schedule import Schedule

# What PISA publishes for a model without dense steps (SD3.5-M): used where no step is known.
_WITHOUT_STEPS = 0.7


@dataclass(frozen=True)
class Preset:
    """The settings of one family of models.

    Attributes:
        policy: for every layer that is not dense.
        dense_layers: numbers of the layers that stay dense, by the class of the block.
        blocks: classes of the blocks, besides those of `dense_layers`.
        by_heads: other policies for members of the family, told by their number of heads.
    """

    policy: Policy
    dense_layers: dict[str, tuple[int, ...]] = field(default_factory=dict)
    blocks: tuple[str, ...] = ()
    by_heads: dict[int, Policy] = field(default_factory=dict)


def _video(sparsity: float, dense_first: float) -> Policy:
    schedule = Schedule(dense_first=dense_first, without_steps=min(sparsity, _WITHOUT_STEPS))
    return Policy(sparsity=sparsity, schedule=schedule)


PRESETS: dict[str, Preset] = {
    "FluxTransformer2DModel": Preset(
        Policy(sparsity=0.85),
        dense_layers={"FluxTransformerBlock": (0, 1, 2, 3)},
        blocks=("FluxSingleTransformerBlock",),
    ),
    "SD3Transformer2DModel": Preset(
        Policy(sparsity=0.7), dense_layers={"JointTransformerBlock": (0, 1, 2, 3)}
    ),
    "WanTransformer3DModel": Preset(
        _video(0.875, 0.2),
        dense_layers={"WanTransformerBlock": (0,)},
        by_heads={12: _video(0.875, 0.3)},
    ),
    "HunyuanVideoTransformer3DModel": Preset(
        _video(0.875, 0.2),
        dense_layers={"HunyuanVideoTransformerBlock": (0,)},
        blocks=("HunyuanVideoSingleTransformerBlock",),
    ),
    "CogVideoXTransformer3DModel": Preset(_video(0.75, 0.2), dense_layers={"CogVideoXBlock": (0,)}),
    "MochiTransformer3DModel": Preset(
        _video(0.5, 0.1), dense_layers={"MochiTransformerBlock": (0,)}
    ),
    "LTXVideoTransformer3DModel": Preset(
        _video(0.5, 0.1), dense_layers={"LTXVideoTransformerBlock": (0,)}
    ),
    "AllegroTransformer3DModel": Preset(
        _video(0.5, 0.1), dense_layers={"AllegroTransformerBlock": (0,)}
    ),
}

_BY_CLASS = PRESETS | {
    block: preset for preset in PRESETS.values() for block in (*preset.dense_layers, *preset.blocks)
}
_NAMES = {id(preset): name for name, preset in PRESETS.items()}


@dataclass(frozen=True)
class Place:
    """What a trace knows about where a site stands.

    Attributes:
        modules: `(class names, path)` of the modules around it, outermost first; the names are
            those of the class and its bases.
        heads: of its query, if it has been recognised.
    """

    modules: tuple[tuple[tuple[str, ...], str], ...]
    heads: int | None = None


@dataclass(frozen=True)
class Presets:
    """Which preset a compile call uses.

    Attributes:
        name: "auto" goes by the model's class, None uses none, or the name of a known class.
        root: names of the class of the module that is compiled and of its bases; a trace does not
            list it among the modules around a node.
    """

    name: str | None = "auto"
    root: tuple[str, ...] = ()

    def choose(self, place: Place) -> tuple[Policy | None, str | None]:
        """The preset's policy at a place, None without a preset, and what a user should know."""
        preset = self._preset(place)
        if preset is None:
            return None, None
        policy = preset.by_heads.get(place.heads or 0, preset.policy)
        model = _NAMES[id(preset)]
        for classes, path in place.modules:
            layer = re.search(r"(?:^|\.)(\d+)$", path)
            for block, layers in preset.dense_layers.items():
                if block in classes and layer and int(layer[1]) in layers:
                    return DENSE.over(policy), f"the preset of {model} keeps layer {layer[1]} dense"
        for block, layers in preset.dense_layers.items():
            if block in self.root:
                return policy, (
                    f"the preset of {model} would keep {_layers_text(layers)} dense, but blocks "
                    "that are compiled one by one look the same: do it with pisa.set_policy"
                )
        return policy, None

    def _preset(self, place: Place) -> Preset | None:
        if self.name is None:
            return None
        if self.name != "auto":
            return PRESETS[self.name]
        for classes in (self.root, *(classes for classes, _ in place.modules)):
            for name in classes:
                if name in _BY_CLASS:
                    return _BY_CLASS[name]
        return None


def check_preset(name: Any) -> None:
    """Raise unless `name` is a value of the option `preset`."""
    if name is not None and not isinstance(name, str):
        raise TypeError(f"option 'preset' must be a string or None, got {name!r}")
    if name not in (None, "auto", *PRESETS):
        raise ValueError(
            f"option 'preset' must be None, 'auto' or one of {sorted(PRESETS)}, got {name!r}"
        )


def class_names(cls: Any) -> tuple[str, ...]:
    """Names of a class and its bases; export knows classes by their full name in text form."""
    if isinstance(cls, type):
        return tuple(base.__name__ for base in cls.__mro__)
    return (str(cls).rsplit(".", 1)[-1],)


def _layers_text(layers: Sequence[int]) -> str:
    return f"layer{'' if len(layers) == 1 else 's'} {', '.join(map(str, layers))}"
