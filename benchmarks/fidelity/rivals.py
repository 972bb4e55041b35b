"""What other methods do, written to be read: selection rules, and what becomes of the rest.

Everything works on blocks of 64 x 64 tokens, as fine as the finest of them, so that none loses by
its block size. A rule with a threshold gets the threshold that delivers the density asked for.
Shapes: H heads, T tokens, D head_dim, M query blocks, N key blocks, B = 64 tokens each.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 64
Rule = Callable[[Tensor, Tensor, float], Tensor]
"""(query [H, T, D], key [H, T, D], density) -> selected blocks, boolean [H, M, N]."""


def blocks(x: Tensor, size: int = BLOCK) -> Tensor:
    """[H, T, D] -> [H, T / size, size, D]."""
    return x.reshape(x.shape[0], -1, size, x.shape[2])


def scale_of(query: Tensor) -> float:
    return float(query.shape[-1] ** -0.5)


def mean_scores(query: Tensor, key: Tensor) -> Tensor:
    """Logits of mean query and mean key. [H, M, N]"""
    return scale_of(query) * blocks(query).mean(2) @ blocks(key).mean(2).transpose(1, 2)


def matched(select: Callable[[float], Tensor], density: float) -> Tensor:
    """The selection whose threshold in [0, 1] comes closest to `density`, by bisection.

    `select` has to select more for a higher threshold.
    """
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        if float(select(middle).float().mean()) < density:
            low = middle
        else:
            high = middle
    return min((select(low), select(high)), key=lambda s: abs(float(s.float().mean()) - density))


def smallest_set(probability: Tensor, mass: float) -> Tensor:
    """The fewest blocks of each row whose probabilities reach `mass`; never none. [H, M, N]"""
    ordered, index = probability.sort(dim=-1, descending=True)
    needed = ordered.cumsum(-1) - ordered < mass
    needed[..., 0] = True
    return torch.zeros_like(needed).scatter(-1, index, needed)


def top_p(query: Tensor, key: Tensor, density: float) -> Tensor:
    """Blocks that together hold a share p of the estimated attention."""
    probability = mean_scores(query, key).softmax(-1)
    return matched(lambda mass: smallest_set(probability, mass), density)


def spargeattn(query: Tensor, key: Tensor, density: float) -> Tensor:
    """SpargeAttn (arXiv 2502.18137): top-p among blocks that resemble their mean.

    Key blocks whose tokens differ (mean cosine similarity up to 0.1) are always taken, and query
    blocks that do attend everything; where that alone exceeds the density, the similarity test is
    left out. Keys are centred first, as its smoothing does.
    """
    key = key - key.mean(1, keepdim=True)

    def alike(x: Tensor) -> Tensor:
        unit = torch.nn.functional.normalize(blocks(x), dim=-1)
        return unit.mean(2).square().sum(-1) > 0.1  # mean cosine over all pairs

    forced = ~alike(query)[:, :, None] | ~alike(key)[:, None, :]
    if float(forced.float().mean()) >= density:
        forced = torch.zeros_like(forced)
    score = mean_scores(query, key).masked_fill(forced, -math.inf)
    probability = score.softmax(-1).nan_to_num()  # a row that is forced as a whole
    return matched(lambda mass: smallest_set(probability, mass) | forced, density)


def xattention(query: Tensor, key: Tensor, density: float, stride: int = 8) -> Tensor:
    """XAttention (arXiv 2503.16428): top-p on sums of logits along strided antidiagonals."""
    reversed_query = blocks(query, stride).flip(2).flatten(2)  # [H, T / stride, stride * D]
    logits = reversed_query @ blocks(key, stride).flatten(2).transpose(1, 2)
    weight = (logits * scale_of(query) / stride).softmax(-1)
    side = BLOCK // stride
    count = weight.shape[1] // side
    tiles = weight.reshape(-1, count, side, count, side).sum((2, 4))
    probability = tiles / side
    return matched(lambda mass: smallest_set(probability, mass), density)


@dataclass(frozen=True)
class Tail:
    """What stands in for the blocks that are not exact, for one query block of one head.

    keys [P, D] with logarithms of weights `bias` [P] and `values` [P, E] join the softmax;
    `extra(query [B, D], weight [B, P])` is added to the output.
    """

    keys: Tensor
    bias: Tensor
    values: Tensor
    extra: Callable[[Tensor, Tensor], Tensor] | None = None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    selected: Tensor,
    tail: Callable[[int, int], Tail] | None = None,
) -> Tensor:
    """Exact attention to the selected blocks, in one softmax with a tail. [H, T, E]

    `tail(head, query block)` gives the tail; without one, all other blocks are dropped.
    """
    out = torch.empty(*query.shape[:2], value.shape[2], dtype=query.dtype)
    scale, rows = scale_of(query), blocks(out)
    queries, keys, values = blocks(query), blocks(key), blocks(value)
    for head, block in torch.cartesian_prod(*map(torch.arange, selected.shape[:2])).tolist():
        chosen = selected[head, block]
        k, v = keys[head, chosen].flatten(0, 1), values[head, chosen].flatten(0, 1)
        q = queries[head, block]
        if tail is None:
            rows[head, block] = (scale * q @ k.T).softmax(-1) @ v
            continue
        rest = tail(head, block)
        logit = torch.cat((scale * q @ k.T, scale * q @ rest.keys.T + rest.bias), dim=-1)
        weight = logit.softmax(-1)
        rows[head, block] = weight @ torch.cat((v, rest.values))
        if rest.extra is not None:
            rows[head, block] += rest.extra(q, weight[:, len(k) :])
    return out


def top_k(query: Tensor, key: Tensor, density: float) -> Tensor:
    """The blocks with the highest scores, as many for every row."""
    score = mean_scores(query, key)
    count = max(1, math.ceil(density * score.shape[-1] - 1e-6))
    return torch.zeros_like(score, dtype=torch.bool).scatter(-1, score.topk(count).indices, True)


def pasa(query: Tensor, key: Tensor, value: Tensor, density: float) -> tuple[Tensor, float]:
    """PASA (arXiv 2604.12219): a first-order matrix for every 32 blocks instead of one for all."""
    group = 32 * BLOCK
    selected = top_k(query, key, density)
    key_mean, value_mean = blocks(key).mean(2), blocks(value).mean(2)
    centred = (blocks(key) - key_mean[:, :, None]).flatten(1, 2)
    moments = blocks(centred, group).transpose(2, 3) @ blocks(value, group)  # [H, T / group, D, E]

    def tail(head: int, block: int) -> Tail:
        rest = ~selected[head, block]
        owner = torch.arange(len(rest))[rest] // 32

        def first_order(q: Tensor, weight: Tensor) -> Tensor:
            mass = torch.zeros(len(q), moments.shape[1], dtype=q.dtype).index_add(1, owner, weight)
            terms = scale_of(query) * q @ moments[head]  # [T / group, B, E]
            return torch.einsum("bg,gbe->be", mass / group, terms)

        bias = torch.full((len(owner),), math.log(BLOCK), dtype=query.dtype)
        return Tail(key_mean[head, rest], bias, value_mean[head, rest], first_order)

    return attend(query, key, value, selected, tail), float(selected.float().mean())


def psa(query: Tensor, key: Tensor, value: Tensor, density: float) -> tuple[Tensor, float]:
    """PSA (arXiv 2512.04025): a pyramid of key and value blocks pooled by 2 and by 8.

    The published shares, of all blocks 10 % whole, 5 % pooled by 2 and 20 % pooled by 8, cost as
    much as a density of 0.15; here they are scaled to the density asked for.
    """
    score = mean_scores(query, key)
    count = score.shape[-1]
    whole = max(1, round(density * count * 2 / 3))
    halves = min(round(density * count / 3), count - whole)
    eighths = min(max(0, round(8 * (density * count - whole - halves / 2))), count - whole - halves)
    rank = score.argsort(dim=-1, descending=True)
    chosen = torch.zeros_like(score, dtype=torch.bool).scatter(-1, rank[..., :whole], True)
    pooled = {
        by: tuple(blocks(blocks(x, by).mean(2), BLOCK // by) for x in (key, value)) for by in (2, 8)
    }

    def tail(head: int, block: int) -> Tail:
        order = rank[head, block, whole:]
        keys, values, bias = [], [], []
        for by, index in ((2, order[:halves]), (8, order[halves : halves + eighths])):
            keys.append(pooled[by][0][head, index].flatten(0, 1))
            values.append(pooled[by][1][head, index].flatten(0, 1))
            bias.append(torch.full((len(keys[-1]),), math.log(by), dtype=query.dtype))
        return Tail(torch.cat(keys), torch.cat(bias), torch.cat(values))

    cost = (whole + halves / 2 + eighths / 8) / count
    return attend(query, key, value, chosen, tail), cost


def rectified(query: Tensor, key: Tensor, value: Tensor, density: float) -> tuple[Tensor, float]:
    """Rectified SpaAttn (arXiv 2511.19835): block-sparse attention, rescaled to the share that
    pooled attention gives its blocks, plus pooled attention to those others where the estimated
    gain of pooling exceeds its error."""
    selected = top_p(query, key, density)
    query_mean, key_mean = blocks(query).mean(2), blocks(key).mean(2)
    score = query_mean @ key_mean.transpose(1, 2)
    probability = (scale_of(query) * score).softmax(-1)
    spread_q = (blocks(query) - query_mean[:, :, None]).abs().mean(2)
    spread_k = (blocks(key) - key_mean[:, :, None]).abs().mean(2)
    error = (spread_q @ key_mean.transpose(1, 2)).abs() + (
        query_mean @ spread_k.transpose(1, 2)
    ).abs()
    pooled = ~selected & (score.abs() > error)
    kept = probability.masked_fill(pooled, 0.0).sum(-1).repeat_interleave(BLOCK, 1)
    rest = probability.masked_fill(~pooled, 0.0) @ blocks(value).mean(2)
    out = attend(query, key, value, selected) * kept[..., None]
    return out + rest.repeat_interleave(BLOCK, 1), float(selected.float().mean())
