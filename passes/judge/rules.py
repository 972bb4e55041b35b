"""Which attention may be sparse: one set of rules, for sites of graphs and for single calls.

The rules see a neutral record of sizes, data types, devices and flags. Each refusal is one sentence
that tells a user what to change.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_or_false, statically_known_true

from ... import cost
from ...kernels.params import DTYPES, Settings
from ...ops import dispatch
from ...policies.policy import DEFAULT_MIN_TOKENS, DEFAULT_MIN_TOKENS_GPU, Policy


@dataclass(frozen=True)
class Operand:
    """Query, key or value: sizes [B, H, T, D], each maybe symbolic, and what holds them."""

    shape: tuple[Any, ...]
    dtype: torch.dtype
    device: torch.device
    is_nested: bool = False

    @classmethod
    def of(cls, tensor: Tensor) -> Operand:
        if tensor.is_nested:
            return cls((-1,) * tensor.dim(), tensor.dtype, tensor.device, is_nested=True)
        return cls(tuple(tensor.shape), tensor.dtype, tensor.device)

    @property
    def sizes(self) -> tuple[int, ...]:
        """For a report: a symbolic size is the traced one, and -1 if it is only known when it runs.

        Installs no guard.
        """
        return tuple(
            size if isinstance(size, int) else (size.node.hint if size.node.has_hint() else -1)
            for size in self.shape
        )


@dataclass(frozen=True)
class Candidate:
    """An attention as the rules see it.

    Attributes:
        dtype: what the op computes in.
        enable_gqa: key and value may have fewer heads than the query.
        is_causal, dropout: as of `scaled_dot_product_attention`.
        gradients: whether any will be asked for.
        joint: the keys are the tokens of the queries and others; asked where lengths differ.
        mask: why its mask does more than to remove keys, or None.
        channels: channels attend channels, over a product that sums the tokens.
        alternating: ranks exchange their shares of several joined sequences, which then alternate.
    """

    query: Operand
    key: Operand
    value: Operand
    dtype: torch.dtype
    enable_gqa: bool = False
    is_causal: bool = False
    dropout: bool = False
    gradients: bool = False
    joint: bool = False
    channels: bool = False
    mask: str | None = None
    alternating: bool = False


def refusal(candidate: Candidate, policy: Policy) -> str | None:
    """Why the attention stays dense under a resolved policy, or None if it may be sparse.

    Raises:
        UnsupportedError: the policy names an implementation that cannot run it.
    """
    if not policy.enabled:
        return "its policy is DENSE"
    return (
        _operand_refusal(candidate)
        or _kind_refusal(candidate)
        or _shape_refusal(candidate)
        or candidate.mask
        or _exact_refusal(candidate, policy)
        or _length_refusal(candidate, policy)
        or _implementation_refusal(candidate, policy)
    )


def is_expected(candidate: Candidate, policy: Policy) -> bool:
    """Whether nobody would expect the attention to be sparse, whatever its spelling: by its policy,
    or because sparsity is not meant for cross-attention, for channels, and for sequences too short
    to gain.
    """
    if not policy.enabled or candidate.channels:
        return True
    least, _ = least_tokens(candidate, policy)
    length, keys = candidate.query.sizes[-2], candidate.key.sizes[-2]
    return length != keys or least is None or 0 <= length < least


def fixed_least_tokens(device: torch.device, policy: Policy) -> int:
    """The length from which sparsity is taken to pay where nothing was measured."""
    if policy.min_tokens is not None:
        return policy.min_tokens
    return DEFAULT_MIN_TOKENS.get(device.type, DEFAULT_MIN_TOKENS_GPU)


def least_tokens(candidate: Candidate, policy: Policy) -> tuple[int | None, str]:
    """The length from which sparsity pays, if there is one, and where that is from."""
    query, key, value = candidate.query, candidate.key.sizes, candidate.value.sizes
    batch, heads, _, head_dim = query.sizes
    measured: tuple[int | None] | None = None
    if policy.min_tokens is None:
        sizes: tuple[int, ...] = (batch, heads, key[1], head_dim, value[-1])
        if torch.compiler.is_dynamo_compiling():
            # A single call that is traced: sizes become constants, as those of a range do, but for
            # the batch, which hardly matters to a length.
            sizes = (1, *(len(range(size)) for size in sizes[1:]))
        measured = _break_even(
            query.device, candidate.dtype, *sizes, *policy.settings().as_arguments().items()
        )
    if measured is None:
        return fixed_least_tokens(query.device, policy), "min_tokens is {}"
    return measured[0], "on this device it pays from {} on; min_tokens overrides that"


# A look at the cache directory, or seconds of timing: nothing for Dynamo to trace.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _break_even(
    device: torch.device,
    dtype: torch.dtype,
    batch: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    value_dim: int,
    *arguments: tuple[str, Any],
) -> tuple[int | None] | None:
    """The length from which on sparsity pays, or None in a tuple if it never does.

    None where nothing is measured.

    Args:
        arguments: of `Settings.as_arguments`, which a trace can hand on.
    """
    profile = cost.profile_of(device, dtype, head_dim, value_dim)
    if profile is None:
        return None
    settings = Settings.from_arguments(dict(arguments))
    work = cost.Workload(batch, heads, kv_heads, 0, head_dim, value_dim, settings)
    return (cost.break_even(work, profile),)


def _operand_refusal(candidate: Candidate) -> str | None:
    query = candidate.query
    for name, operand in (("query", query), ("key", candidate.key), ("value", candidate.value)):
        if operand.is_nested:
            return f"its {name} is a nested tensor; pad it and pass a key-padding mask"
        if operand.dtype not in DTYPES:
            return f"its {name} has dtype {operand.dtype}; floating point is supported"
        if operand.device != query.device:
            return f"its query is on {query.device}, its {name} on {operand.device}"
    return None


def _kind_refusal(candidate: Candidate) -> str | None:
    if candidate.channels:
        return (
            "it attends channels, not tokens: query and key are multiplied along the tokens, "
            "so there are no far tokens to approximate"
        )
    if candidate.is_causal:
        return "it is causal; only bidirectional attention is approximated"
    if candidate.dropout:
        return "dropout is active; call model.eval() first"
    if candidate.gradients:
        return (
            "gradients are needed; run under torch.no_grad() or torch.inference_mode(), "
            "or call model.requires_grad_(False)"
        )
    return None


def _shape_refusal(candidate: Candidate) -> str | None:
    query, key, value = candidate.query, candidate.key, candidate.value
    if not statically_known_true(query.shape[2] == key.shape[2]) and not candidate.joint:
        lengths = f"{query.sizes[2]} query and {key.sizes[2]} key tokens"
        return f"it is cross-attention ({lengths}); only self- and joint attention is approximated"
    for name, operand in (("key", key), ("value", value)):
        same = guard_or_false(operand.shape[0] == query.shape[0])
        heads = operand.shape[1]
        if candidate.enable_gqa:
            same = same and guard_or_false(query.shape[1] % heads == 0)
        else:
            same = same and guard_or_false(heads == query.shape[1])
        if not same:
            return (
                f"its {name} {operand.sizes} broadcasts against its query {query.sizes}; "
                "expand it, or use enable_gqa=True for shared heads"
            )
    return None


def _exact_refusal(candidate: Candidate, policy: Policy) -> str | None:
    if policy.exact in (None, "auto", (0, 0)) or not candidate.alternating:
        return None
    return (
        f"exact={policy.exact} counts tokens in the order of one process, but ranks exchange their "
        "shares of several joined sequences, which then alternate; leave exact on 'auto'"
    )


def _length_refusal(candidate: Candidate, policy: Policy) -> str | None:
    minimum, why = least_tokens(candidate, policy)
    if minimum is None:
        return (
            "sparse attention was measured to be slower here at any length; "
            "min_tokens overrides that"
        )
    # A length that is only known at run time cannot be judged here, and stays dense.
    if guard_or_false(candidate.query.shape[2] >= minimum):
        return None
    return f"{candidate.query.sizes[2]} tokens is too short to gain; {why.format(minimum)}"


def _implementation_refusal(candidate: Candidate, policy: Policy) -> str | None:
    query, value = candidate.query, candidate.value
    name = policy.impl or dispatch.preferred(query.device)
    reason = dispatch.refusal(
        name,
        query.device,
        candidate.dtype,
        query.shape[3],
        value.shape[3],
        policy.settings(),
        value.shape[2],
    )
    if reason is not None and policy.impl is not None:
        raise dispatch.UnsupportedError(
            f"the policy asks for impl={name!r}, which cannot run this attention: {reason}"
        )
    return reason and f"the {name!r} implementation cannot run it: {reason}"
