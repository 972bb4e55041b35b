"""Policies: how sparse a site may be, and how they are attached to modules.

Precedence for a site, field by field: policies on instances (innermost module first), then on
classes and functions (innermost first), then the options of the compile call, then the defaults.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import nn

from . import validation
from .annotation import Annotation, Origin, call_annotated, encode
from .kernels.params import AttentionParams

_Target = TypeVar("_Target")
_KEY = "_pisa_policy"
_OUTER_FORWARD = "_pisa_outer_forward"
_FORWARD_CLASS = "_pisa_forward_class"


@dataclass(frozen=True, kw_only=True)
class Policy:
    """How attention inside a module is approximated. A field left at None is inherited.

    Attributes:
        sparsity: fraction of key blocks that is approximated, in [0, 1). Default 0.85.
        block_size: tokens per block: 16, 32, 64 or 128. Default 64.
        routing: "topk", "topk_covariance" or "threshold". Default "topk".
        order: "none", "zeroth", "hybrid" or "blockwise". Default "hybrid".
        exact: `(prefix, suffix)` tokens that stay exact, for text in a joint sequence. Default
            `(0, 0)`.
        min_tokens: sequences shorter than this stay dense. By default 4,096 on a GPU and 2,048 on
            a CPU.
        impl: "reference", "cpu" or "triton". Default: by device.
        enabled: False keeps every attention inside the module dense; see `DENSE`. Not inherited:
            a policy on an inner module switches it on again.

    Raises:
        TypeError, ValueError: a field is not what is described above.
    """

    sparsity: float | None = None
    block_size: int | None = None
    routing: str | None = None
    order: str | None = None
    exact: tuple[int, int] | None = None
    min_tokens: int | None = None
    impl: str | None = None
    enabled: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.enabled, bool):
            raise TypeError(f"enabled must be a bool, got {self.enabled!r}")
        if self.exact is not None:
            validation.check_exact(self.exact)
            object.__setattr__(self, "exact", tuple(self.exact))
        for name, check in _FIELD_CHECKS.items():
            if getattr(self, name) is not None:
                check(getattr(self, name))

    def over(self, outer: Policy) -> Policy:
        """This policy with the fields it leaves open taken from `outer`."""
        fields = {
            field.name: getattr(outer, field.name)
            for field in dataclasses.fields(self)
            if getattr(self, field.name) is None
        }
        return dataclasses.replace(self, **fields)

    def params(self, scale: float) -> AttentionParams:
        """The settings of a call. Only a resolved policy, with no field open, has them."""
        if (
            self.sparsity is None
            or self.block_size is None
            or self.routing is None
            or self.order is None
            or self.exact is None
        ):
            raise ValueError(f"the policy leaves fields open: {self!r}")
        return AttentionParams(
            scale=scale,
            sparsity=self.sparsity,
            block_size=self.block_size,
            routing=self.routing,
            order=self.order,
            exact=self.exact,
        )

    def __str__(self) -> str:
        if not self.enabled:
            return "dense"
        named = (f"{name}={value}" for name, value in self._given().items() if name != "sparsity")
        sparsity = [] if self.sparsity is None else [f"sparsity={self.sparsity:g}"]
        return ", ".join([*sparsity, *named]) or "default"

    def _given(self) -> dict[str, Any]:
        """The fields that differ from a policy that says nothing."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        }


_FIELD_CHECKS: dict[str, Callable[[Any], None]] = {
    "sparsity": validation.check_sparsity,
    "block_size": validation.check_block_size,
    "routing": validation.check_routing,
    "order": validation.check_order,
    "min_tokens": functools.partial(validation.check_count, "min_tokens"),
    "impl": validation.check_impl,
}

DENSE = Policy(enabled=False)
"""Keeps every attention inside a module dense."""

DEFAULT = Policy(sparsity=0.85, block_size=64, routing="topk", order="hybrid", exact=(0, 0))

DEFAULT_MIN_TOKENS = {"cpu": 2048}
DEFAULT_MIN_TOKENS_GPU = 4096

POLICY_FIELDS = tuple(field.name for field in dataclasses.fields(Policy))


def resolve(annotations: list[Annotation], options: Policy) -> Policy:
    """The policy of a site from the annotations around it (outermost first) and the options."""
    policies = [options.over(DEFAULT)]
    for origin in ("class", "instance"):
        policies += [Policy(**a.fields) for a in annotations if a.origin == origin]
    resolved = policies[0]
    for policy in policies[1:]:
        resolved = policy.over(resolved)
    return resolved


def policy(base: Policy | None = None, /, **fields: Any) -> Callable[[_Target], _Target]:
    """Attach a policy to an `nn.Module` class, to a function, or to a module instance.

        @pisa.policy(sparsity=0.85)
        class VideoSelfAttention(nn.Module): ...

        pisa.policy(pisa.DENSE)(model.blocks[0])

    It covers every attention that runs inside the module's `forward`, also in subclasses, and takes
    effect when the module is compiled with `backend="pisa"`. Without compilation it does nothing.

    Args:
        base: a `Policy` to start from.
        **fields: fields of `Policy`.
    """
    chosen = dataclasses.replace(base, **fields) if base is not None else Policy(**fields)

    def attach(target: _Target) -> _Target:
        if isinstance(target, nn.Module):
            _attach_to_instance(target, chosen)
            return target
        if isinstance(target, type) and issubclass(target, nn.Module):
            _attach_to_class(target, chosen)
            return target
        if isinstance(target, types.FunctionType):
            return _wrap(target, _key("class", chosen))  # type: ignore[return-value]
        raise TypeError(
            "policy() decorates an nn.Module class, an nn.Module instance or a function, "
            f"got {type(target).__name__} {target!r}"
        )

    return attach


def set_policy(model: nn.Module, policies: Mapping[str, Policy]) -> None:
    """Attach policies to the submodules of `model` that match names or patterns.

        pisa.set_policy(model, {"blocks.*.attn1": pisa.Policy(sparsity=0.9),
                                "blocks.0.*": pisa.DENSE})

    Names are those of `model.named_modules()`; `*` also crosses dots, and "" is the model itself.
    Where several patterns match one module the last one wins. May be called again at any time, also
    after compilation: the modules concerned are compiled again on their next call.

    Raises:
        ValueError: a pattern matches no module. Nothing has been changed then.
        TypeError: a value is not a `Policy`.
    """
    model = getattr(model, "_orig_mod", model)
    modules = dict(model.named_modules())
    chosen: dict[str, Policy] = {}
    for pattern, value in policies.items():
        if not isinstance(value, Policy):
            raise TypeError(f"the policy for {pattern!r} must be a pisa.Policy, got {value!r}")
        matches = [name for name in modules if fnmatch.fnmatchcase(name, pattern)]
        if not matches:
            known = ", ".join(repr(name) for name in list(modules)[1:9])
            raise ValueError(f"no module matches {pattern!r}; modules are named like {known}")
        chosen.update(dict.fromkeys(matches, value))
    for name, value in chosen.items():
        _attach_to_instance(modules[name], value)


def _key(origin: Origin, value: Policy) -> str:
    return encode(origin, value._given())


def _wrap(function: Callable[..., Any], key: str) -> Callable[..., Any]:
    # Wrapping again replaces the policy: two layers would leave the older one in force, inside.
    function = getattr(function, "_pisa_wrapped", function)

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return call_annotated(key, function, *args, **kwargs)

    wrapped._pisa_wrapped = function  # type: ignore[attr-defined]
    return wrapped


def _attach_to_class(cls: type[nn.Module], value: Policy) -> None:
    key = _key("class", value)
    cls.forward = _wrap(cls.forward, key)
    inherited = cls.__init_subclass__

    def init_subclass(subclass: type[nn.Module], /, **kwargs: Any) -> None:
        # A subclass with a forward of its own would silently lose the policy.
        inherited(**kwargs)
        if "forward" in vars(subclass):
            subclass.forward = _wrap(vars(subclass)["forward"], key)

    cls.__init_subclass__ = classmethod(init_subclass)  # type: ignore[assignment]


def _attach_to_instance(module: nn.Module, value: Policy) -> None:
    # Plain strings on the module: Dynamo guards on their value, deepcopy and pickle carry them.
    if _KEY not in vars(module):
        # A hook may have put its own forward on the instance; ours goes around it.
        setattr(module, _OUTER_FORWARD, vars(module).get("forward"))
        owner = next(cls for cls in type(module).__mro__ if "forward" in vars(cls))
        setattr(module, _FORWARD_CLASS, owner)
        module.forward = functools.partial(_instance_forward, module)
    setattr(module, _KEY, _key("instance", value))


def _instance_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    forward = getattr(self, _OUTER_FORWARD)
    if forward is None:
        # Not `type(self).forward`: Dynamo cannot trace that for a class marked `allow_in_graph`, as
        # the transformer blocks of diffusers are. It does not trace a walk over `__mro__` either.
        function = getattr(self, _FORWARD_CLASS).__dict__["forward"]
        forward = functools.partial(function, self)
    return call_annotated(getattr(self, _KEY), forward, *args, **kwargs)
