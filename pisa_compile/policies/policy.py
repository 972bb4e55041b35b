"""Policies: how sparse a site may be, and which policy holds for one.

Precedence for a site, field by field: policies on instances (innermost module first), then on
classes and functions (innermost first), then the options of the compile call, then the defaults.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ..kernels.params import DEFAULT_BLOCK_SIZE, DEFAULT_ORDER, DEFAULT_ROUTING, SETTINGS, Settings
from ..ops import validation
from ..ops.dispatch import UnsupportedError
from .annotation import Annotation
from .schedule import Schedule, Step

_Target = TypeVar("_Target")
_KEY = "_pisa_policy"
_OUTER_FORWARD = "_pisa_outer_forward"
_FORWARD_CLASS = "_pisa_forward_class"


class PolicyError(ValueError):
    """A policy does not fit the attention that it is for."""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """How attention inside a module is approximated. A field left at None is inherited.

    Attributes:
        sparsity: fraction of key blocks that is approximated, in [0, 1). Default 0.7, or
            that of the model's preset (docs/presets.md).
        block_size: tokens per query block, and per key block: 16, 32, 64 or 128. Default 64.
        key_block_size: tokens per key block, where that is to be another number of the same four.
            Default: `block_size`. For when 32 pays, see docs/fidelity.md.
        routing: "topk", "topk_covariance" or "threshold". Default "topk".
        order: "none", "zeroth", "hybrid", "corrected" or "blockwise". Default "corrected".
        exact: tokens of a joint sequence that stay exact, for text: `(prefix, suffix)`, or "auto"
            for those that the graph joins with the image. Default "auto".
        grid: the picture or video that the other tokens show, row by row: `(t, h, w)`, `(h, w)`, or
            "auto" for what graph and model tell. Default "auto".
        curve: "hilbert" or "tile" cuts those tokens into blocks along a curve through the grid,
            "raster" leaves them as they are. Default "raster".
        min_tokens: sequences shorter than this stay dense. By default those for which the cost
            model of the device predicts no gain; without one (`PISA_COST_MODEL=0`), 4,096 on a GPU
            and 2,048 on a CPU.
        impl: "reference", "cpu" or "triton". Default: by device.
        schedule: a `Schedule`: sparsity by denoising step and head. Where an inner policy gives a
            `sparsity` alone, only the dense steps of an outer schedule hold.
        enabled: False keeps every attention inside the module dense; see `DENSE`. Not inherited:
            a policy on an inner module switches it on again.

    Raises:
        TypeError, ValueError: a field is not what is described above.
    """

    sparsity: float | None = None
    block_size: int | None = None
    key_block_size: int | None = None
    routing: str | None = None
    order: str | None = None
    exact: tuple[int, int] | str | None = None
    grid: tuple[int, ...] | str | None = None
    curve: str | None = None
    min_tokens: int | None = None
    impl: str | None = None
    schedule: Schedule | None = None
    enabled: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.enabled, bool):
            raise TypeError(f"enabled must be a bool, got {self.enabled!r}")
        for name, check in _FIELD_CHECKS.items():
            if getattr(self, name) is not None:
                check(getattr(self, name))
        if self.schedule is not None:
            object.__setattr__(self, "schedule", Schedule.of(self.schedule))
        for name in ("exact", "grid"):  # lists, as a policy in text form has them
            if isinstance(getattr(self, name), Sequence) and not isinstance(
                getattr(self, name), str
            ):
                object.__setattr__(self, name, tuple(getattr(self, name)))

    def over(self, outer: Policy) -> Policy:
        """This policy with the fields it leaves open taken from `outer`."""
        fields = {
            field.name: getattr(outer, field.name)
            for field in dataclasses.fields(self)
            if getattr(self, field.name) is None
        }
        if fields.get("schedule") is not None and self.sparsity is not None:
            fields["schedule"] = fields["schedule"].dense_steps_alone
        return dataclasses.replace(self, **fields)

    @property
    def varying(self) -> Schedule | None:
        """The schedule of a resolved policy, if it is more than one number."""
        if self.schedule is None or not self.schedule.varies(self.sparsity or 0.0):
            return None
        return self.schedule

    def sparsity_at(self, step: Step | None) -> float:
        """The sparsity of a resolved policy at a denoising step, mean over heads."""
        sparsity = self.sparsity or 0.0
        if self.schedule is None:
            return sparsity
        densities = self.schedule.densities(step, sparsity)
        return round(1.0 - sum(densities) / len(densities), 9)

    @property
    def steady_sparsity(self) -> float:
        """The sparsity of a resolved policy where no denoising step is known, mean over heads."""
        return self.sparsity_at(None)

    @property
    def nominal_sparsity(self) -> float:
        """The one number that stands for a resolved policy: the mean over the steps of its
        schedule, those left out that are dense for another reason than their number."""
        if self.schedule is None:
            return self.sparsity or 0.0
        steps_alone = dataclasses.replace(self.schedule, without_steps=None)
        return dataclasses.replace(self, schedule=steps_alone).steady_sparsity

    def without_schedule(self) -> Policy:
        """A resolved policy for where no step is ever known.

        Raises:
            UnsupportedError: the schedule tells heads apart.
        """
        if self.schedule is not None and self.schedule.heads is not None:
            raise UnsupportedError(
                "a sparsity per head needs a compiled model; an exported program has one per site"
            )
        return dataclasses.replace(self, sparsity=self.steady_sparsity, schedule=None)

    def settings(self) -> Settings:
        """What the kernels are told. Only a resolved policy, with no field open, can say.

        Raises:
            ValueError: a field that has no other meaning when it is None is open.
        """
        given = {name: getattr(self, name) for name in SETTINGS}
        if any(given[name] is None for name in given.keys() - {"key_block_size"}):
            raise ValueError(f"the policy leaves fields open: {self!r}")
        given["sparsity"] = self.nominal_sparsity
        if isinstance(self.exact, str):
            given["exact"] = (0, 0)
        return Settings(**given)

    def __str__(self) -> str:
        if not self.enabled:
            return "dense"
        named = (f"{name}={value}" for name, value in self.given().items() if name != "sparsity")
        sparsity = [] if self.sparsity is None else [f"sparsity={self.sparsity:g}"]
        return ", ".join([*sparsity, *named]) or "default"

    def given(self) -> dict[str, Any]:
        """The fields that differ from a policy that says nothing."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        }


_FIELD_CHECKS: dict[str, Callable[[Any], None]] = {
    **validation.SETTINGS,
    "exact": validation.check_policy_exact,
    "grid": validation.check_grid,
    "curve": validation.check_curve,
    "min_tokens": functools.partial(validation.check_count, "min_tokens"),
}

DENSE = Policy(enabled=False)
"""Keeps every attention inside a module dense."""

# The sparsity is for models that nobody has published settings for: see docs/presets.md.
DEFAULT = Policy(
    sparsity=0.7,
    block_size=DEFAULT_BLOCK_SIZE,
    routing=DEFAULT_ROUTING,
    order=DEFAULT_ORDER,
    exact="auto",
    grid="auto",
    curve="raster",
)

DEFAULT_MIN_TOKENS = {"cpu": 2048}
DEFAULT_MIN_TOKENS_GPU = 4096

POLICY_FIELDS = tuple(field.name for field in dataclasses.fields(Policy))


def resolve(annotations: list[Annotation], options: Policy, preset: Policy | None = None) -> Policy:
    """The policy of a site from the annotations around it (outermost first), the options and what
    a preset says of its place."""
    base = DEFAULT if preset is None else preset.over(DEFAULT)
    enabled = options.enabled and base.enabled  # options do not name layers, presets do
    policies = [dataclasses.replace(options.over(base), enabled=enabled)]
    for origin in ("class", "instance"):
        policies += [Policy(**a.fields) for a in annotations if a.origin == origin]
    resolved = policies[0]
    for policy in policies[1:]:
        resolved = policy.over(resolved)
    return resolved


def named_policies(policies: Mapping[str, Policy], paths: Sequence[str]) -> list[Annotation]:
    """What policies by name or pattern say of a place, as if they were attached to instances.

    Args:
        policies: as `set_policy` takes them.
        paths: names of the modules around the place, outermost first.
    """
    found = []
    for path in paths:
        matches = [p for name, p in policies.items() if fnmatch.fnmatchcase(path, name)]
        found += [Annotation("instance", policy.given()) for policy in matches[-1:]]
    return found
