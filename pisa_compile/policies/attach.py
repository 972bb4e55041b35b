"""Policies on modules: the decorator `policy`, and `set_policy` by name.

On an instance the policy is a plain string attribute, and `forward` a `functools.partial`: Dynamo
guards on the string, and both pickle and deep-copy together with the module.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import types
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import nn

from .annotation import Origin, call_annotated, encode
from .policy import Policy

_Target = TypeVar("_Target")
_KEY = "_pisa_policy"
_OUTER_FORWARD = "_pisa_outer_forward"
_FORWARD_CLASS = "_pisa_forward_class"


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
    given = value.given()
    if value.schedule is not None:
        given["schedule"] = value.schedule.fields()
    return encode(origin, given)


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
        holder, name = _own_forward(module)
        held = vars(holder).get(name)
        own = isinstance(held, types.MethodType) and held.__self__ is module
        setattr(module, _OUTER_FORWARD, None if own else held)
        owner = next(cls for cls in type(module).__mro__ if "forward" in vars(cls))
        setattr(module, _FORWARD_CLASS, owner)
        setattr(holder, name, functools.partial(_instance_forward, module))
    setattr(module, _KEY, _key("instance", value))


def _own_forward(module: nn.Module) -> tuple[Any, str]:
    """Where a module keeps the forward that its hooks, if it has any, are wrapped around.

    Hooks of diffusers and accelerate for caches and offloading break graphs. A policy outside of
    them would not be seen by what is traced inside; ours goes where the class's forward was.
    """
    references = getattr(getattr(module, "_diffusers_hook", None), "_fn_refs", None)
    if references:
        replaced = references[0].original_forward is not None
        return references[0], "original_forward" if replaced else "forward"
    return module, "_old_forward" if "_old_forward" in vars(module) else "forward"


def _instance_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    forward = getattr(self, _OUTER_FORWARD)
    if forward is None:
        # Not `type(self).forward`: Dynamo cannot trace that for a class marked `allow_in_graph`, as
        # the transformer blocks of diffusers are. It does not trace a walk over `__mro__` either.
        function = getattr(self, _FORWARD_CLASS).__dict__["forward"]
        forward = functools.partial(function, self)
    return call_annotated(getattr(self, _KEY), forward, *args, **kwargs)
