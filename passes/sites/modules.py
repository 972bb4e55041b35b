"""The modules around a node, as the trace names them."""

from __future__ import annotations

from torch import fx

from ...policies.presets import Place, class_names


def place_of(node: fx.Node, heads: int | None) -> Place:
    """Where `node` was traced, for a preset."""
    stack = node.meta.get("nn_module_stack") or {}
    modules = tuple((class_names(cls), _readable(str(path))) for path, cls in stack.values())
    return Place(modules, heads)


def module_stack(node: fx.Node) -> tuple[tuple[str, str], ...]:
    """`(id, path)` of the modules that `node` was traced in, outermost first."""
    stack = node.meta.get("nn_module_stack") or {}
    return tuple((str(key), _readable(str(path))) for key, (path, *_) in stack.items())


def _readable(path: str) -> str:
    """`L['self']._modules['blocks']._modules['0'].attn` as `blocks.0.attn`."""
    # set_policy puts a bound forward on instances, through which Dynamo then names what is inside.
    path = path.replace(".forward.args[0]", "")
    # Modules of a class with a `__getattr__` of its own, such as all models of diffusers.
    path = path.replace(".__dict__['_modules']", "")
    for old, new in (("._modules['", "."), ("['", "."), ("']", ""), ("[", "."), ("]", "")):
        path = path.replace(old, new)
    parts = path.split(".")
    return ".".join(parts[2:] if parts[0] in ("L", "G") else parts)
