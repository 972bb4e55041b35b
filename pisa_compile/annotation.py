"""How a policy travels from a module's forward to the graph nodes it traced.

This is the only user of `torch.fx.traceback.annotate`, an API that torch marks experimental. While
Dynamo traces a wrapped forward, every node gets an entry in `node.meta["custom"]` whose key is the
policy itself in text form. The text is read from a module attribute or a closure, and Dynamo guards
on both: another policy, or another instance of the class with another policy, is another graph.
Nothing is registered anywhere, so a key never goes stale.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import fx
from torch.fx import traceback

_PREFIX = "pisa_compile.policy:"
_Result = TypeVar("_Result")

Origin = Literal["instance", "class"]


@dataclass(frozen=True)
class Annotation:
    """A policy's fields as they were found on a node, and what they were attached to."""

    origin: Origin
    fields: dict[str, Any]


def encode(origin: Origin, fields: dict[str, Any]) -> str:
    """The text form of a policy. Equal policies give equal text and so share compiled code."""
    return _PREFIX + json.dumps([origin, fields], sort_keys=True)


def call_annotated(
    key: str, function: Callable[..., _Result], *args: Any, **kwargs: Any
) -> _Result:
    """Call `function`; if it is being traced, mark the nodes it makes with `key`."""
    if not torch.compiler.is_compiling():
        return function(*args, **kwargs)
    with traceback.annotate({key: ""}):
        return function(*args, **kwargs)


def policies_around(node: fx.Node) -> list[Annotation]:
    """The policies around the code that made `node`, outermost first."""
    found = []
    for key in node.meta.get("custom", {}):
        if isinstance(key, str) and key.startswith(_PREFIX):
            origin, fields = json.loads(key[len(_PREFIX) :])
            found.append(Annotation(origin, fields))
    return found
