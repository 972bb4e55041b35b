"""How a policy travels from a module's forward to the graph nodes it traced.

This is the only user of `torch.fx.traceback.annotate`, an API that torch marks experimental. While
Dynamo traces a wrapped forward, every node gets an entry in `node.meta["custom"]` whose key is the
policy itself in text form. The text is read from a module attribute or a closure, and Dynamo guards
on both: another policy, or another instance of the class with another policy, is another graph.
Nothing is registered anywhere, so a key never goes stale.

Dynamo takes two nested compiled regions for one if their nodes are equal, and does not look at
annotations. So a traced wrapper also leaves a call of `torch.ops.pisa.policy` with the same text,
which computes nothing and makes regions with different policies inside them different.
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
_mark = torch.library.Library("pisa", "FRAGMENT")  # type: ignore[no-untyped-call]
_mark.define("policy(str key) -> ()")  # type: ignore[no-untyped-call]
_mark.impl("policy", lambda key: None, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
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
    if not torch.compiler.is_dynamo_compiling():
        # Export without Dynamo runs this very code, and drops annotations unless told to keep them.
        with traceback.preserve_node_meta(), traceback.annotate({key: ""}):
            return function(*args, **kwargs)
    with traceback.annotate({key: ""}):
        if not torch.compiler.is_exporting():
            torch.ops.pisa.policy(key)
        return function(*args, **kwargs)


def policy_keys(node: fx.Node) -> tuple[str, ...]:
    """The policies around the code that made `node`, in text form, outermost first."""
    custom = node.meta.get("custom") or {}
    return tuple(key for key in custom if isinstance(key, str) and key.startswith(_PREFIX))


def policies_around(node: fx.Node) -> list[Annotation]:
    """The policies around the code that made `node`, outermost first."""
    return [Annotation(*json.loads(key[len(_PREFIX) :])) for key in policy_keys(node)]


def erase_marks(graph: fx.Graph) -> None:
    """Erase the calls of `torch.ops.pisa.policy`, which have done their work once traced."""
    for target in (torch.ops.pisa.policy, torch.ops.pisa.policy.default):
        for node in graph.find_nodes(op="call_function", target=target):
            graph.erase_node(node)
