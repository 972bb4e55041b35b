"""The CPU path without a compiler: torch operators, one attention head per worker thread.

Many small operators on few cores lose more to OpenMP regions than they gain, and collapse when
another process holds a core. So every worker runs with a single intra-op thread and takes whole
heads. Written per head, independently of the specification that it is tested against.

Shapes: Tq and Tk tokens, D and E head dimensions of key and value, N key blocks of S tokens, M
query blocks of R tokens, C query blocks in a chunk, P gathered key blocks per query block.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..params import (
    MASS_FACTOR_LIMIT,
    ROUTING_WEIGHT,
    AttentionParams,
    free_key_blocks,
    free_query_blocks,
)
from ..permutation import check_values
from ..reference import COVARIANCE_EPS
from .budget import Budget, budgets

# Gathered keys and values and the logits of one chunk, per worker: about what a cache holds.
_CHUNK_ELEMENTS = 1 << 20
_COVARIANCE_BLOCKS = 64  # block matrices that are formed at a time
# The number of intra-op threads is partly global, so only one call at a time may change it.
_THREADS_LOCK = threading.Lock()


@dataclass(frozen=True)
class _Head:
    """Keys and values of one head, cut into zero-padded blocks; masked tokens are zero."""

    key: Tensor  # [N, S, D]
    value: Tensor  # [N, S, E]
    valid: Tensor  # [N, S]
    length: Tensor  # [N]
    key_mean: Tensor  # [N, D]
    value_mean: Tensor  # [N, E]

    def centred(self, blocks: slice = slice(None)) -> Tensor:
        """Keys minus the mean of their block, zero where masked. [N, S, D]"""
        centred = self.key[blocks] - self.key_mean[blocks, None]
        return centred.masked_fill_(~self.valid[blocks, :, None], 0.0)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    params: AttentionParams,
    *,
    density: Tensor | None = None,
    permutation: Tensor | None = None,
    threads: int | None = None,
) -> tuple[Tensor, Tensor]:
    """As `kernels.reference.attention`, for CPU tensors of any float dtype.

    `threads` is the number of workers, `torch.get_num_threads()` by default.

    Raises:
        ValueError: `permutation` does not list every token once.
    """
    if permutation is not None:
        check_values(permutation)
    batch, heads, query_len, _ = query.shape
    key_len, value_dim = value.shape[2:]
    out = query.new_empty(batch, query_len, heads, value_dim).transpose(1, 2)
    lse = torch.empty(batch, heads, query_len, dtype=torch.float32)
    if out.numel() == 0 or key_len == 0:
        return out.zero_(), lse.fill_(-torch.inf)
    group = heads // key.shape[1]
    first, last = free_key_blocks(key_len, params)
    shares = budgets(density, heads, last - first, params)

    def head(b: int, h: int) -> None:
        g = h // group
        energy = None
        if params.order == "corrected":
            energy = _energy(query[b, g * group : (g + 1) * group])
        q, k, v = query[b, h], key[b, g], value[b, g]
        mask = None if key_mask is None else key_mask[b]
        if permutation is not None:
            q, k, v = (x.index_select(0, permutation) for x in (q, k, v))
            mask = None if mask is None else mask.index_select(0, permutation)
        rows = _head_attention(q, k, v, mask, params, shares[h], energy)
        for places, block_out, block_lse in rows:
            tokens = places if permutation is None else permutation[places]
            out[b, h][tokens] = block_out.to(out.dtype)
            lse[b, h][tokens] = block_lse.to(lse.dtype)

    jobs = [partial(head, b, h) for b in range(batch) for h in range(heads)]
    _run(jobs, torch.get_num_threads() if threads is None else threads)
    return out, lse


def _run(jobs: Sequence[Callable[[], None]], threads: int) -> None:
    """Run the jobs on `threads` workers with one intra-op thread each."""
    threads = min(threads, len(jobs))
    if threads <= 1:
        for job in jobs:
            job()
        return

    def work(job: Callable[[], None]) -> None:
        # Both modes are thread-local; `out` may be an inference tensor, which only inference
        # mode may write to.
        with torch.inference_mode():
            job()

    with _THREADS_LOCK:
        before = torch.get_num_threads()
        try:
            with ThreadPoolExecutor(
                threads, initializer=torch.set_num_threads, initargs=(1,)
            ) as pool:
                for future in [pool.submit(work, job) for job in jobs]:
                    future.result()
        finally:
            torch.set_num_threads(before)


def _head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    params: AttentionParams,
    budget: Budget,
    energy: Tensor | None,
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """One head: `query` [Tq, D], `key` [Tk, D], `value` [Tk, E], `energy` [D] for "corrected".

    Yields the places of some query rows, their output [t, E] and their log-sum-exp [t].
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    tokens, key_size = query.shape[0], params.key_size
    head = _cut(key, value, mask, key_size, dtype)
    q = _blocks(query.to(dtype), params.block_size)  # [M, R, D]
    log_weight = head.length.clamp(min=1).to(dtype).log()  # [N]
    first_order = None
    if params.first_order:
        valid_keys = head.length.sum().clamp(min=1)
        centred = head.centred()
        first_order = centred.flatten(0, 1).T @ head.value.flatten(0, 1)
        first_order *= params.scale / valid_keys
        if energy is not None:
            scatter = centred.square_().sum(1) / head.length.clamp(min=1)[:, None]  # [N, D]
            beta = 0.5 * params.scale**2 * (scatter @ energy)
            limited = beta.nan_to_num(torch.inf).clamp(max=MASS_FACTOR_LIMIT - 1)
            log_weight += limited.log1p()
    selected = _select(q, tokens, key.shape[0], head, log_weight, params, budget)  # [M, N]
    ragged = mask is not None or key.shape[0] % key_size != 0

    memory = key_size * (key.shape[1] + value.shape[1] + params.block_size)
    for chunk in _chunks(selected.sum(1), memory):
        rows, row_lse = _attend(
            q[chunk], selected[chunk], head, log_weight, first_order, params, ragged
        )
        for i, block in enumerate(chunk.tolist()):
            start = block * params.block_size
            end = min(tokens, start + params.block_size)
            yield slice(start, end), rows[i, : end - start], row_lse[i, : end - start]


def _energy(queries: Tensor) -> Tensor:
    """Mean of `q_d^2` over the rows of all heads that share a key head, `queries` [H/G, Tq, D]."""
    dtype = torch.promote_types(queries.dtype, torch.float32)
    parts = [head.to(dtype).square().mean(0) for head in queries]
    return torch.stack(parts).mean(0)


def _cut(key: Tensor, value: Tensor, mask: Tensor | None, size: int, dtype: torch.dtype) -> _Head:
    tokens = key.shape[0]
    valid = torch.ones(tokens, dtype=torch.bool) if mask is None else mask
    valid = _blocks(valid[:, None], size)  # [N, S, 1]
    key, value = _blocks(key.to(dtype), size), _blocks(value.to(dtype), size)
    if mask is not None:  # a masked key may hold anything, NaN included
        key, value = key.masked_fill(~valid, 0.0), value.masked_fill(~valid, 0.0)
    length = valid.sum((1, 2))
    divisor = length.clamp(min=1)[:, None]
    return _Head(key, value, valid[..., 0], length, key.sum(1) / divisor, value.sum(1) / divisor)


def _blocks(x: Tensor, size: int) -> Tensor:
    """`x` [T, D] as zero-padded contiguous blocks [ceil(T / size), size, D]."""
    pad = -x.shape[0] % size
    if pad:
        x = torch.cat([x, x.new_zeros(pad, x.shape[1])])
    return x.contiguous().view(-1, size, x.shape[1])


def _select(
    q: Tensor,
    query_len: int,
    key_len: int,
    head: _Head,
    log_weight: Tensor,
    params: AttentionParams,
    budget: Budget,
) -> Tensor:
    """The exact key blocks of every query block, boolean [M, N]."""
    selected = head.length.gt(0).repeat(q.shape[0], 1)
    first, last = free_key_blocks(key_len, params)
    if budget.count == 0:
        return selected
    rows = torch.full((q.shape[0], 1), params.block_size, dtype=q.dtype)
    rows[-1] -= -query_len % params.block_size
    score = params.scale * ((q.sum(1) / rows) @ head.key_mean[first:last].T)
    if params.routing == "topk_covariance":
        score += _log_covariance(head)[first:last]
    elif params.weighs_routing:
        score += ROUTING_WEIGHT * log_weight[first:last]
    valid = selected[:, first:last].clone()
    score.masked_fill_(~valid, -torch.inf)
    if params.routing == "threshold":
        count = valid.sum(1, keepdim=True).clamp(min=1)
        mean = score.masked_fill(~valid, 0.0).sum(1, keepdim=True) / count
        deviation = (score - mean).masked_fill_(~valid, 0.0)
        sigma = (deviation.square().sum(1, keepdim=True) / count).sqrt()
        free = score > mean + budget.beta * sigma
        free.scatter_(1, score.argmax(1, keepdim=True), True)
    else:
        # Of blocks that score alike the first ones, as in the specification; `topk` takes any.
        best = score.argsort(dim=1, descending=True, stable=True)[:, : budget.count]
        free = torch.zeros_like(valid).scatter_(1, best, True)
    selected[:, first:last] = free & valid
    if query_len == key_len and params.exact != (0, 0):
        dense = torch.ones(q.shape[0], 1, dtype=torch.bool)
        dense[slice(*free_query_blocks(query_len, params))] = False
        selected |= dense & head.length.gt(0)
    return selected


def _log_covariance(head: _Head) -> Tensor:
    """`log(||H_j - Hbar|| + eps)` of every block. [N]"""
    blocks = head.key.shape[0]
    parts = [
        slice(i, min(i + _COVARIANCE_BLOCKS, blocks)) for i in range(0, blocks, _COVARIANCE_BLOCKS)
    ]
    mean = head.centred().flatten(0, 1).T @ head.value.flatten(0, 1)
    mean /= head.length.gt(0).sum().clamp(min=1)
    norms = [
        (head.centred(part).transpose(1, 2) @ head.value[part] - mean).flatten(1).norm(dim=1)
        for part in parts
    ]
    return (torch.cat(norms) + COVARIANCE_EPS).log()


def _chunks(counts: Tensor, elements: int) -> Iterator[Tensor]:
    """Query blocks in chunks of about equal numbers of exact blocks and bounded memory.

    `counts` [M] exact blocks per query block, `elements` memory per exact block.
    """
    order = counts.argsort(descending=True, stable=True)
    sorted_counts = counts[order].tolist()
    start = 0
    while start < len(sorted_counts):
        length = max(1, _CHUNK_ELEMENTS // max(1, sorted_counts[start] * elements))
        yield order[start : start + length]
        start += length


def _attend(
    q: Tensor,
    selected: Tensor,
    head: _Head,
    log_weight: Tensor,
    first_order: Tensor | None,
    params: AttentionParams,
    ragged: bool,
) -> tuple[Tensor, Tensor]:
    """Attention of `q` [C, R, D] with the exact blocks `selected` [C, N]: [C, R, E], [C, R].

    `log_weight` [N] is added to the logits of the other blocks' means.
    """
    counts = selected.sum(1)  # [C]
    width = int(counts.max())
    # Exact blocks first, in order; rows with fewer are filled up with blocks that are masked.
    index = selected.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :width]
    key = head.key[index].flatten(1, 2)  # [C, P * S, D]
    logit = params.scale * (q @ key.transpose(1, 2))  # [C, R, P * S]
    if ragged or int(counts.min()) < width:
        used = torch.arange(width) < counts[:, None]  # [C, P]
        keep = (head.valid[index] & used[..., None]).flatten(1)
        logit.masked_fill_(~keep[:, None], -torch.inf)
    approximated = (head.length > 0) & ~selected  # [C, N]
    with_blocks = params.order != "none" and bool(approximated.any())
    tokens = logit.shape[2]
    if with_blocks:
        block_logit = params.scale * (q @ head.key_mean.T)  # [C, R, N]
        bias = log_weight.masked_fill(~approximated, -torch.inf)
        logit = torch.cat([logit, block_logit + bias[:, None]], dim=2)

    if logit.shape[2] == 0:  # no valid key at all
        return q.new_zeros(*q.shape[:2], head.value.shape[2]), q.new_full(q.shape[:2], -torch.inf)
    peak = logit.amax(2)  # [C, R]
    weight = logit.softmax(2)
    # The largest weight is exp(peak - lse); both maxima are cheaper than a second exponential.
    lse = peak - weight.amax(2).log()
    nothing = peak == -torch.inf
    if bool(nothing.any()):
        weight.masked_fill_(nothing[..., None], 0.0)
        lse.masked_fill_(nothing, -torch.inf)

    out = weight[..., :tokens] @ head.value[index].flatten(1, 2)
    if with_blocks:
        block_weight = weight[..., tokens:]  # [C, R, N]
        out += block_weight @ head.value_mean
        if first_order is not None:
            out += block_weight.sum(2, keepdim=True) * (q @ first_order)
    return out, lse
