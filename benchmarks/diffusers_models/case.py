"""What a case is, and how its model is made: real class, tiny sizes, every parameter random."""

from __future__ import annotations

import importlib
import pkgutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

Config = dict[str, Any]
Inputs = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One model with inputs of a few hundred tokens.

    Attributes:
        name: of the model class, with a suffix where a class has several cases.
        cls: returns the class; imports its library.
        config: keyword arguments of the constructor.
        make_inputs: keyword arguments of the forward, random from a fixed seed.
        prepare: changes the model after construction.
        tolerance: for the output at sparsity 0; wider where the model itself casts to 16 bits.
    """

    name: str
    cls: Callable[[], type[nn.Module]]
    config: Callable[[], Config]
    make_inputs: Callable[[], Inputs]
    prepare: Callable[[nn.Module], None] | None = None
    tolerance: float = 1e-4

    def build(self) -> nn.Module:
        """A model in evaluation mode, the same at every call."""
        with _seeded(0), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations inside the model library
            model = self.cls()(**self.config()).eval().requires_grad_(False)
            randomise(model)
            if self.prepare is not None:
                self.prepare(model)
        return model

    def inputs(self) -> Inputs:
        """Inputs for `model(**inputs)`, the same at every call."""
        with _seeded(1):
            return self.make_inputs()


CASES: dict[str, Case] = {}


def diffusers_case(name: str, **config: Any) -> Callable[[Callable[[], Inputs]], Case]:
    """Register the decorated function as inputs of the diffusers class `name` (before a "/")."""
    return case(name, lambda: _diffusers_class(name.partition("/")[0]), **config)


def case(
    name: str,
    cls: Callable[[], type[nn.Module]],
    prepare: Callable[[nn.Module], None] | None = None,
    tolerance: float = 1e-4,
    **config: Any,
) -> Callable[[Callable[[], Inputs]], Case]:
    """Register the decorated function as inputs of the model `cls()(**config)`."""

    def register(make_inputs: Callable[[], Inputs]) -> Case:
        assert name not in CASES, name
        CASES[name] = Case(name, cls, lambda: dict(config), make_inputs, prepare, tolerance)
        return CASES[name]

    return register


def randomise(model: nn.Module) -> None:
    """Draw every parameter anew.

    Published initialisations have zero gates and zero output layers, with which the output would
    not depend on attention at all. Scales keep activations near 1 and logits at a few units.
    """
    for name, parameter in model.named_parameters():
        leaf = name.rpartition(".")[2]
        noise = torch.randn_like(parameter)
        if parameter.dim() >= 2 and (leaf == "weight" or leaf.endswith("_proj")):
            embedding = isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Embedding)
            fan_in = 1 if embedding else parameter[0].numel() or 1
            parameter.copy_(noise * 1.2 / fan_in**0.5)
        elif leaf == "weight":  # of a norm
            parameter.copy_(1.0 + 0.2 * noise)
        else:  # biases, gates, modulation tables, learned tokens
            parameter.copy_(0.3 * noise)


def outputs(result: Any) -> list[Tensor]:
    """All tensors of a model's result."""
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


def diffusers_classes() -> dict[str, type[nn.Module]]:
    """Every model class that `diffusers.models.transformers` defines, by name."""
    from diffusers.models import transformers
    from diffusers.models.modeling_utils import ModelMixin

    found: dict[str, type[nn.Module]] = {}
    for module_info in pkgutil.iter_modules(transformers.__path__):
        module = importlib.import_module(f"{transformers.__name__}.{module_info.name}")
        for name, value in vars(module).items():
            model = isinstance(value, type) and issubclass(value, ModelMixin)
            if model and value.__module__ == module.__name__:
                found[name] = value
    return found


def _diffusers_class(name: str) -> type[nn.Module]:
    from diffusers.models import transformers

    cls: type[nn.Module] | None = getattr(transformers, name, None)
    return diffusers_classes()[name] if cls is None else cls


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
