"""Block masks of `flex_attention`, as the dense masks that they were made from.

A block mask is a function of single indices, and lists of the blocks in which it allows anything.
The lists may leave out blocks that the function allows, so both have to be read. Where
`create_block_mask` is in the same graph, so is the dense mask that it computes the lists from.
"""

from __future__ import annotations

from typing import Any

from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..graph.axes import SAME
from ..graph.calls import Call, call_of
from ..graph.fake import example, is_tensor
from ..graph.writes import Writes
from .vmapped import HIDE, SHOW

_INDICES = 4  # batch, head, query and key index: the first inputs of a mask function
_SYMMETRIC = {"add", "mul", "eq", "ne", "bitwise_and", "bitwise_or"}
_ADVICE = (
    "for padding, pass a boolean key-padding mask to F.scaled_dot_product_attention, or call "
    "create_block_mask in the compiled code"
)
OUTSIDE = f"its block mask was made outside of the compiled code; {_ADVICE}"
UNKNOWN = f"its block mask is not provably made by create_block_mask; {_ADVICE}"


def dense_mask(flex: fx.Node, writes: Writes) -> fx.Node | str:
    """The boolean [B or 1, H or 1, Tq, Tk] that the block mask of a call of flex_attention stands
    for, or why that is unknown."""
    block_mask: Any = flex.args[4]
    buffers: Any = flex.args[8]
    lists, body = block_mask[2:6], body_of(block_mask[-1])
    if any(isinstance(x, fx.Node) and x.op == "placeholder" for x in lists):
        return OUTSIDE
    mask = _listed(lists, block_mask[-3:-1])
    if mask is None or body is None or not _is_made_by(mask, body, buffers):
        return UNKNOWN
    read = [mask, *(x for x in (*lists, *buffers) if is_tensor(x))]
    if any(writes.between(x, min(x, mask), flex) for x in read):
        return UNKNOWN
    query, key = flex.args[:2]
    assert isinstance(query, fx.Node)
    assert isinstance(key, fx.Node)
    expected = example(query).shape[-2], example(key).shape[-2]
    given = example(mask).shape[-2:]
    if not all(statically_known_true(a == b) for a, b in zip(given, expected, strict=True)):
        return UNKNOWN
    return mask


def body_of(node: Any) -> fx.GraphModule | None:
    """The graph of a function that flex_attention is given."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    body = getattr(node.graph.owning_module, str(node.target), None)
    return body if isinstance(body, fx.GraphModule) else None


def _listed(lists: tuple[Any, ...], block: tuple[Any, ...]) -> fx.Node | None:
    """The mask whose partly and wholly allowed blocks the lists name."""
    counts, indices, full_counts, full_indices = lists
    some, every = _blocks(counts, indices), _blocks(full_counts, full_indices)
    if some is None:
        return None
    area = block[0] * block[1]
    if full_counts is None:
        total = _compared(some, "gt", 0)
    else:
        both = call_of(some)
        if both is None or both.name != "bitwise_and" or every is None:
            return None
        total = _compared(both.args[0], "gt", 0)
        if total is None or total is not _compared(both.args[1], "lt", area):
            return None
        if total is not _compared(every, "eq", area):
            return None
    return None if total is None else _tiled(total, block)


def _blocks(counts: Any, indices: Any) -> fx.Node | None:
    """The boolean [B, H, blocks, blocks] that is listed as counts and sorted indices."""
    count, index = call_of(_uncast(counts)), call_of(_uncast(indices))
    if count is None or index is None or (count.name, index.name) != ("sum", "argsort"):
        return None
    if count.argument(1, "dim") != -1 or index.argument(1, "dim") != -1:
        return None
    if not (index.kwargs.get("descending") and index.kwargs.get("stable")):
        return None
    return _uncast(count.args[0]) if count.args[0] is index.args[0] else None


def _compared(node: Any, name: str, number: Any) -> fx.Node | None:
    call = call_of(node)
    matches = call is not None and call.name == name and call.args[1] == number
    return call.args[0] if call is not None and matches else None


def _tiled(total: fx.Node, block: tuple[Any, ...]) -> fx.Node | None:
    """The mask whose allowed elements are counted per block in `total`."""
    chain: list[Call] = []
    node: Any = total
    for name in ("sum", "permute", "reshape", "pad"):
        call = call_of(node)
        if call is None or call.name != name:
            return None
        chain.append(call)
        node = call.args[0]
    summed, permuted, viewed, padded = chain
    shape = example(permuted.args[0]).shape
    right = (
        tuple(summed.argument(1, "dim") or ()) == (-2, -1)
        and tuple(permuted.rest(1, "dims")) == (0, 1, 2, 4, 3, 5)
        and (shape[3], shape[5]) == tuple(block)
        and example(viewed.args[0]).dim() == 4
        and tuple(padded.args[1])[::2] == (0, 0)
        and not padded.argument(3, "value")
    )
    return node if right and is_tensor(node) else None


def _uncast(node: Any) -> Any:
    while (call := call_of(node)) is not None and call.name in SAME:
        node = call.args[0]
    return node


def _is_made_by(mask: fx.Node, body: fx.GraphModule, buffers: tuple[Any, ...]) -> bool:
    """Whether `mask` holds the mask function's result for every batch, head, query and key."""
    element: Any = mask
    for level in range(1, _INDICES + 1):
        call = call_of(element)
        if call is None or call.name != SHOW or (call.args[1], call.args[3]) != (level, 0):
            return False
        element = call.args[0]
    inputs = body.graph.find_nodes(op="placeholder")
    meanings: dict[fx.Node, Any] = dict(zip(inputs[_INDICES:], buffers, strict=True))
    meanings |= {index: level for level, index in enumerate(inputs[:_INDICES], start=1)}
    (output,) = body.graph.find_nodes(op="output")
    result = output.args[0]
    return _agree(element, result[0] if isinstance(result, tuple) else result, meanings)


def _agree(here: Any, there: Any, meanings: dict[fx.Node, Any]) -> bool:
    """Whether an expression of the graph is one of the mask function, whose inputs mean `meanings`:
    nodes of the graph, or levels of indices."""
    if isinstance(there, (tuple, list)):
        return (
            isinstance(here, (tuple, list))
            and len(here) == len(there)
            and all(_agree(a, b, meanings) for a, b in zip(here, there, strict=True))
        )
    if not isinstance(there, fx.Node):
        made = call_of(here)
        if made is not None and made.name == "tensor":  # what `vmap` makes of an index
            here = made.args[0]
        return type(here) is type(there) and bool(here == there)
    if there in meanings:
        meaning = meanings[there]
        return _is_index(here, meaning) if isinstance(meaning, int) else here is meaning
    first, second = call_of(here), call_of(there)
    if first is None or second is None or first.in_place or second.in_place:
        return False
    if _name(first) != _name(second) or first.kwargs.keys() != second.kwargs.keys():
        return False
    if not all(_agree(first.kwargs[key], second.kwargs[key], meanings) for key in first.kwargs):
        return False
    mine, its = _operands(first), _operands(second)
    # `2 + x` calls a method of x inside of `vmap`.
    swapped = first.name in _SYMMETRIC and _agree(mine[::-1], its, meanings)
    return swapped or _agree(mine, its, meanings)


def _name(call: Call) -> str:
    return "getitem" if call.name == "index" else call.name


def _operands(call: Call) -> list[Any]:
    """`aten.index(x, [i, j])` and `x[i, j]` alike."""
    if call.name == "index" or (call.name == "getitem" and isinstance(call.args[1], tuple)):
        return [call.args[0], *call.args[1]]
    return list(call.args)


def _is_index(node: Any, level: int) -> bool:
    """Whether `node` counts 0, 1, 2, ... over the axis that is mapped at `level`."""
    hidden = call_of(node)
    if hidden is None or hidden.name != HIDE or hidden.args[1:] != (0, level):
        return False
    counted = call_of(hidden.args[0])
    if counted is None or counted.name != "arange" or counted.in_place:
        return False
    return len(counted.args) == 1 or (len(counted.args) == 2 and counted.args[0] == 0)
