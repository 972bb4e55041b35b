"""`--compile-transformers`: transformers of diffusers that a script leaves eager are compiled when
they are first called.

Not when they are made: by the first call they are on their device, LoRA weights and offloading are
in place, and it is known whether the script compiles them itself.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from weakref import WeakSet

import torch
from torch import nn

from ...policies.attach import policy
from ...policies.policy import DENSE
from ...policies.presets import Place, Presets, class_names
from ..common.errors import UserError
from .after_import import after_import

log = logging.getLogger("pisa_compile")

_HOME = "diffusers.models.modeling_utils"  # of the class that all models of diffusers inherit


@contextmanager
def compiled_on_first_call() -> Iterator[None]:
    """Compile every eager transformer of diffusers that is called inside.

    Raises:
        UserError: diffusers is not installed.
    """
    if importlib.util.find_spec("diffusers") is None:
        raise UserError("--compile-transformers needs diffusers; pip install diffusers")
    seen: WeakSet[nn.Module] = WeakSet()

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling() and self not in seen:
            seen.add(self)
            if _is_eager_transformer(self):
                _compile(self)
        return nn.Module.__call__(self, *args, **kwargs)

    patched: list[Any] = []

    def patch(module: ModuleType) -> None:
        mixin: Any = vars(module)["ModelMixin"]
        mixin.__call__ = call
        patched.append(mixin)

    with after_import(_HOME, patch):
        try:
            yield
        finally:
            for mixin in patched:
                del mixin.__call__


def _is_eager_transformer(model: nn.Module) -> bool:
    """Whether it is a transformer, and neither it nor a part of it is compiled."""
    home = "diffusers.models.transformers"
    if not any(cls.__module__.startswith(home) for cls in type(model).__mro__):
        return False
    return all(module._compiled_call_impl is None for module in model.modules())


def _compile(model: nn.Module) -> None:
    """Block by block where the model names its blocks: much less to compile, and offloading of
    single blocks goes on working."""
    name = type(model).__name__
    if getattr(model, "_repeated_blocks", None):
        _keep_dense_layers(model)
        try:
            model.compile_repeated_blocks()  # type: ignore[operator]
        except ValueError as error:  # none of the named blocks is there
            log.info("%s is compiled as a whole: %s", name, error)
        else:
            log.info("compiling the repeated blocks of %s", name)
            return
    log.info("compiling %s", name)
    model.compile()


def _keep_dense_layers(model: nn.Module) -> None:
    """Say which layers a preset keeps dense: a block that is compiled by itself does not know its
    number."""
    presets = Presets(root=class_names(type(model)))
    blocks = model._repeated_blocks
    for name, module in model.named_modules():
        if type(module).__name__ not in blocks:  # type: ignore[operator]
            continue
        chosen, _ = presets.choose(Place(((class_names(type(module)), name),)))
        if chosen is not None and not chosen.enabled:
            policy(DENSE)(module)
