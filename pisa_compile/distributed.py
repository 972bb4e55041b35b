"""Attention whose keys or heads are spread over several processes.

Where every process sees the whole sequence for some of the heads (Ulysses, tensor parallelism),
attention needs nothing: heads do not know of one another. Policies that tell heads apart need those
of the process. Ring attention sees all heads for a part of the keys at a time, and needs the
log-sum-exp to put the parts together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .ops.dispatch import UnsupportedError
from .ops.functional import attention
from .policies.policy import Policy

Group = dist.ProcessGroup | None


def merge_attention(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over all keys from attention over disjoint parts of them.

    A part's result is numerator over denominator, and its log-sum-exp the denominator's logarithm,
    also where blocks are approximated: both are sums over keys or blocks, so they add up. The
    merged result is what one softmax over the parts' exact tokens and centroids gives.

    Args:
        outputs: of each part, [B, H, T, E].
        lses: of each part, [B, H, T] in float32 or float64; -inf where a row has no valid key.

    Returns:
        The output in the dtype of the first, in [B, T, H, E] memory order, and its log-sum-exp.
        Rows without any valid key give zeros and -inf.
    """
    if len(outputs) != len(lses) or not outputs:
        raise ValueError(
            f"as many outputs as log-sum-exps are needed, at least one of each; "
            f"got {len(outputs)} and {len(lses)}"
        )
    lse = torch.stack(list(lses))  # [N, B, H, T]
    total = lse.logsumexp(0)
    # Rows without a key: all parts are -inf, and so is their sum.
    weight = (lse - total.masked_fill(total == -torch.inf, 0.0)).exp()
    merged = sum(w[..., None] * out for w, out in zip(weight, outputs, strict=True))
    assert isinstance(merged, Tensor)
    merged = merged.to(outputs[0].dtype)
    return merged.transpose(1, 2).contiguous().transpose(1, 2), total


def ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    sparsity: float,
    group: Group = None,
    attn_mask: Tensor | None = None,
    exact: tuple[int, int] = (0, 0),
    return_lse: bool = False,
    **settings: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Piecewise sparse attention of this rank's queries over the keys of all ranks of `group`.

    Keys and values travel once around the ring while attention runs on the part that has arrived;
    a rank never holds more than two parts. Sparsity applies to each part: every query block has
    its exact blocks in every part, so with routing by top-k the choice is that of the best blocks
    per part, not of the best overall, and at least one block per part is exact.

    Args:
        query: this rank's queries, [B, H, T, D].
        key, value: this rank's keys and values, [B, H, T, D] and [B, H, T, E]; every rank has the
            same number.
        sparsity: as in `pisa_compile.attention`, of each part.
        group: the ranks, in the order of the ring; the default group when None.
        attn_mask: this rank's part of a boolean key-padding mask, [B, 1, 1, T].
        exact: `(prefix, suffix)` tokens at the ends of *every rank's part* that all queries attend
            exactly, such as the rank's share of the text in a joint sequence. Ranges of the whole
            sequence do not exist here: pass the share.
        return_lse: also return the log-sum-exp over all keys, [B, H, T].
        **settings: as in `pisa_compile.attention`.

    Returns:
        [B, H, T, E] in the query's dtype, in [B, T, H, E] memory order; with `return_lse` a pair.

    Raises:
        UnsupportedError: gradients are asked for, or ranks hold different numbers of keys.
        TypeError, ValueError: as `pisa_compile.attention`.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("ring_attention needs torch.distributed.init_process_group() first")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        raise UnsupportedError(
            "ring_attention has no backward pass; run it under torch.no_grad() or on tensors that "
            "need no gradient"
        )
    group = group or dist.group.WORLD
    assert group is not None
    ranks = dist.get_world_size(group)
    if not torch.compiler.is_compiling():
        _check_lengths(key, group)
    merged: tuple[Tensor, Tensor] | None = None
    parts: list[Tensor | None] = [key, value, attn_mask]
    for step in range(ranks):
        # Sent before the computation, so that the transfer runs beside it.
        following = parts if step == ranks - 1 else [_to_next(x, group) for x in parts]
        key, value, mask = parts  # type: ignore[assignment]
        out, lse = attention(
            query,
            key,
            value,
            sparsity=sparsity,
            attn_mask=mask,
            exact=exact,
            return_lse=True,
            **settings,
        )
        out = out.to(torch.promote_types(out.dtype, torch.float32))  # rounded once, at the end
        merged = (
            (out, lse) if merged is None else merge_attention((merged[0], out), (merged[1], lse))
        )
        parts = following
    assert merged is not None
    result = merged[0].to(query.dtype)
    return (result, merged[1]) if return_lse else result


def policies_of_rank(
    policies: Mapping[str, Policy], rank: int | None = None, ranks: int | None = None
) -> dict[str, Policy]:
    """Policies for a process that computes only some of the heads.

        pisa.set_policy(model, policies_of_rank(pisa.load_policy("wan.json")))

    Sparsities that are listed per head, as calibration finds them, are cut to the heads of this
    rank: the `rank`-th of equal contiguous parts, which is how Ulysses and column-wise tensor
    parallelism hand them out. Everything else holds for all ranks as it is.

    Args:
        policies: by module name or pattern, as `set_policy` takes them.
        rank, ranks: of the group that shares the heads; those of the default group when None.

    Raises:
        ValueError: a list cannot be cut into that many equal parts.
    """
    rank = dist.get_rank() if rank is None else rank
    ranks = dist.get_world_size() if ranks is None else ranks
    return {name: _policy_of_rank(name, policy, rank, ranks) for name, policy in policies.items()}


def _policy_of_rank(name: str, policy: Policy, rank: int, ranks: int) -> Policy:
    schedule = policy.schedule
    if schedule is None or schedule.steps is None or schedule.heads is None:
        return policy
    if schedule.heads % ranks:
        raise ValueError(
            f"the policy for {name!r} lists {schedule.heads} heads, which {ranks} ranks cannot "
            "share equally"
        )
    width = schedule.heads // ranks
    mine = slice(rank * width, (rank + 1) * width)
    steps = tuple(entry[mine] if isinstance(entry, tuple) else entry for entry in schedule.steps)
    return dataclasses.replace(policy, schedule=dataclasses.replace(schedule, steps=steps))


def _to_next(tensor: Tensor | None, group: dist.ProcessGroup) -> Tensor | None:
    """The tensor of the rank before this one, while this one's goes to the rank after it."""
    if tensor is None:
        return None
    import torch.distributed._functional_collectives as collectives

    ranks = dist.get_world_size(group)
    following = [(rank + 1) % ranks for rank in range(ranks)]
    boolean = tensor.dtype == torch.bool  # not every backend sends it
    sent = tensor.to(torch.uint8) if boolean else tensor
    received = collectives.permute_tensor(sent.contiguous().flatten(), following, group)
    received = received.view(tensor.shape)
    return received.to(torch.bool) if boolean else received


def _check_lengths(key: Tensor, group: dist.ProcessGroup) -> None:
    mine = torch.tensor([key.shape[2]], device=key.device)
    everybodys = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everybodys, mine, group=group)
    lengths = [int(length) for length in everybodys]
    if len(set(lengths)) != 1:
        raise UnsupportedError(
            f"every rank must hold the same number of keys, got {lengths} on the ranks of the "
            "group; pad the shorter parts and mask the padding"
        )
