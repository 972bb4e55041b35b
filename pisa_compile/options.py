"""What `torch.compile(..., backend="pisa", mode=..., options={...})` may say."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .policies.file import load_policy
from .policies.policy import POLICY_FIELDS, Policy
from .policies.presets import check_preset

INNER_COMPILERS = ("inductor", "aot_eager", "eager")


@dataclass(frozen=True)
class CompileOptions:
    """One compile call's settings.

    Attributes:
        policy: the policy for every site that no decorator or `set_policy` covers.
        named: policies by module name or pattern, from the option "policy".
        preset: "auto", None, or the name of a model class; see `presets`.
        strict: whether attention that stays dense for no choice of the user's is an error.
        inner: what compiles the rewritten graph, one of `INNER_COMPILERS`.
        inductor: Inductor configuration, the presets of `mode` included.
    """

    policy: Policy
    named: dict[str, Policy]
    preset: str | None
    strict: bool
    inner: str
    inductor: dict[str, Any]


def parse(mode: str | None, options: dict[str, Any] | None) -> CompileOptions:
    """Sort the options of a compile call into ours and Inductor's.

    Raises:
        ValueError: an unknown option or mode, a bad value, or Inductor settings without Inductor.
        TypeError: a value of the wrong type.
    """
    remaining = {name.replace("-", "_"): value for name, value in (options or {}).items()}
    policy = Policy(**{name: remaining.pop(name) for name in POLICY_FIELDS if name in remaining})
    named = _named(remaining.pop("policy", None))
    preset = remaining.pop("preset", "auto")
    check_preset(preset)
    strict = remaining.pop("strict", False)
    if not isinstance(strict, bool):
        raise TypeError(f"option 'strict' must be a bool, got {strict!r}")
    inner = remaining.pop("inner", "inductor")
    if inner not in INNER_COMPILERS:
        raise ValueError(f"option 'inner' must be one of {INNER_COMPILERS}, got {inner!r}")
    inductor = _mode_settings(mode)
    for name, value in remaining.items():
        _check_inductor_option(name, value)
        inductor[name] = value
    if inductor and inner != "inductor":
        raise ValueError(
            f"mode and Inductor options need inner='inductor', got inner={inner!r} "
            f"with {sorted(inductor)}"
        )
    return CompileOptions(policy, named, preset, strict, inner, inductor)


def _named(value: Any) -> dict[str, Policy]:
    if value is None:
        return {}
    if isinstance(value, (str, os.PathLike)):
        return load_policy(value)
    if isinstance(value, Mapping) and all(isinstance(v, Policy) for v in value.values()):
        return dict(value)
    raise TypeError(
        "option 'policy' must be the path of a policy file, or a dict from module names to "
        f"pisa.Policy, got {value!r}"
    )


def _mode_settings(mode: str | None) -> dict[str, Any]:
    if mode is None or mode == "default":
        return {}
    from torch._inductor import list_mode_options

    modes = list_mode_options()
    if mode not in modes:
        raise ValueError(f"mode must be one of {sorted(modes)}, got {mode!r}")
    return dict(modes[mode])


def _check_inductor_option(name: str, value: Any) -> None:
    from torch._inductor import config

    known = config.get_config_copy()
    if name not in known:
        ours = [*POLICY_FIELDS, "policy", "preset", "strict", "inner"]
        close = difflib.get_close_matches(name, [*ours, *known], n=3)
        hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise ValueError(
            f"unknown option {name!r}{hint} Known options are {', '.join(ours)}, and every option "
            "of Inductor (torch._inductor.list_options())"
        )
    expected = type(known[name])
    if known[name] is not None and not isinstance(value, expected):
        raise TypeError(
            f"Inductor option {name!r} must be {expected.__name__}, "
            f"got {type(value).__name__} {value!r}"
        )
