"""The vocabulary of operations: what a call of torch does to axes, values and memory.

Names are those that `calls.call_of` gives, one for all spellings. What is listed here is what walks
over graphs understand. An operation that nobody lists may return memory of any of its inputs,
unless torch's schemas say otherwise. What writes is in `writes`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import fx

from .calls import call_of

CASTS = frozenset({"to", "type", "float", "half", "bfloat16", "double"})
"""To a floating-point data type."""
INTEGER_CASTS = frozenset({"bool", "int", "long", "short", "char", "byte"})
ALIASES = frozenset({"clone", "cpu", "cuda", "positive", "real", "resolve_conj", "resolve_neg"})
"""The same elements along the same axes; whether in the same memory depends on the tensor."""
SAME = CASTS | ALIASES | {"dropout"}
"""Nothing changes but the data type; dropout, where it is inactive."""

RESHAPES = frozenset(
    {"reshape", "flatten", "unflatten", "ravel", "view_as", "reshape_as", "squeeze"}
)
PERMUTATIONS = frozenset(
    {"transpose", "permute", "movedim", "t", "numpy_T", "adjoint", ".mT", ".T", ".mH", ".H"}
)
ADDITIONS = frozenset({"unsqueeze", "atleast_1d", "atleast_2d", "atleast_3d"})
REPEATS = frozenset({"expand", "expand_as", "repeat_interleave"})
"""Copies along an axis, in memory or not."""
REARRANGEMENTS = RESHAPES | PERMUTATIONS | ADDITIONS | REPEATS
"""Axes change places, are merged, split, added or repeated: what `axes.Axes.through` follows."""

SLICES = frozenset({"getitem", "narrow", "select", "slice"})
SPLITS = frozenset(
    {
        *("chunk", "split", "split_with_sizes", "tensor_split", "unbind", "unsafe_chunk"),
        *("unsafe_split", "unsafe_split_with_sizes", "hsplit", "vsplit", "dsplit"),
    }
)
PICKS = SLICES | {"diagonal", "unfold", "as_strided"}
JOINS = frozenset({"cat", "stack"})

COMPARISONS = frozenset({"eq", "ne", "lt", "le", "gt", "ge"})
ARITHMETIC = frozenset({"add", "sub", "rsub", "mul", "div"})
LOGIC = frozenset({"bitwise_and", "bitwise_or", "bitwise_xor", "bitwise_not"})
SELECTIONS = frozenset({"where", "masked_fill"})
ELEMENTWISE = COMPARISONS | ARITHMETIC | LOGIC | SELECTIONS | {"negative", "addcmul", "lerp", "exp"}

# Composite functions whose schema does not say that they may return an input, or a view of one.
_MAY_RETURN_AN_INPUT = frozenset(
    {
        *("broadcast_tensors", "meshgrid", "einsum", "pad", "pixel_shuffle", "pixel_unshuffle"),
        *("channel_shuffle", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"),
        *("cartesian_prod", "combinations", "interpolate", "nan_to_num", "tile", "repeat"),
    }
)
# Composite too, and always a tensor of their own: the bulk of every model.
_FRESH_COMPOSITES = frozenset(
    {
        *("matmul", "linear", "softmax", "log_softmax", "layer_norm", "rms_norm", "group_norm"),
        *("scaled_dot_product_attention", "conv1d", "conv2d", "conv3d", "embedding", "bilinear"),
        *("cosine_similarity", "baddbmm", "where", "rsub", "eq", "silu", "gelu", "one_hot"),
        *("instance_norm", "normalize", "arange", "index", "max", "min", "negative", "square"),
        *("outer", "std", "var", "batch_norm", "upsample_nearest2d", "hardswish", "relu6", "zeros"),
    }
)
# Functions of Python on tensors that are nodes of their own.
_FRESH_ATTRIBUTES = frozenset({".shape", ".dtype", ".device", ".ndim", ".requires_grad", ".layout"})


def aliased_inputs(node: fx.Node) -> list[fx.Node]:
    """The inputs whose memory the result of `node` may share."""
    call = call_of(node)
    if call is None:
        return [] if _makes_new(node) else list(node.all_input_nodes)
    if isinstance(out := node.kwargs.get("out"), fx.Node):
        return [out]
    first = [x for x in call.args[:1] if isinstance(x, fx.Node)]
    if call.in_place:
        return first
    if str(getattr(node.target, "__name__", node.target)).startswith("clone"):
        return []
    if call.name in REARRANGEMENTS | PICKS | SPLITS | SAME | INTEGER_CASTS:
        return first
    if call.name in _FRESH_COMPOSITES | _FRESH_ATTRIBUTES | JOINS or is_fresh(call.name):
        return []
    return list(node.all_input_nodes)


def _makes_new(node: fx.Node) -> bool:
    """Whether an operator of another library returns memory of its own, by its schema."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.op in ("placeholder", "get_attr", "output")
    return all(result.alias_info is None for result in node.target._schema.returns)


@functools.cache
def is_fresh(name: str) -> bool:
    """Whether torch's schemas say that the operator `name` never returns memory of its inputs.

    Composite functions are not asked: they call others, and what these return they may return.
    """
    views = REARRANGEMENTS | PICKS | SPLITS | SAME | INTEGER_CASTS
    if name in _MAY_RETURN_AN_INPUT | views or name.startswith("."):
        return False
    packet = getattr(torch.ops.aten, name, None)
    if packet is None:
        return False
    overloads = [getattr(packet, overload) for overload in packet.overloads()]
    # Those of TorchScript, for numbers and lists, have no kernels.
    overloads = [x for x in overloads if torch._C._dispatch_has_kernel(x.name())]
    return bool(overloads) and all(map(_is_fresh_overload, overloads))


def _is_fresh_overload(overload: Any) -> bool:
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(
        overload.name(), "CompositeImplicitAutograd"
    )
    results = overload._schema.returns
    arguments = overload._schema.arguments
    written = any(x.alias_info is not None and x.alias_info.is_write for x in arguments)
    # `out=` variants return what they were given to write to, which is another question.
    return not composite and (written or all(result.alias_info is None for result in results))
