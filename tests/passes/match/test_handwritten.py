"""Spellings of attention that must be recognised, and look-alikes that must not.

Every function takes q, k, v as [B, H, T, D] and spells the same kind of attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from ..tracing import check_metadata, rewrite

# `.T` beyond two dimensions is to be recognised all the same.
pytestmark = pytest.mark.filterwarnings("ignore:The use of `x.T` on tensors:UserWarning")

B, H, T, D = 2, 3, 20, 8
softmax = nn.Softmax(dim=-1)
inactive = nn.Dropout(0.0)
evaluated = nn.Dropout(0.5).eval()
active = nn.Dropout(0.5).train()


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, T, H, D, generator=generator).transpose(1, 2) for _ in range(3))
    return q, k, v


@dataclass(frozen=True)
class Spelling:
    """A way to write attention, and the scale that the op must be given."""

    name: str
    function: Callable[[Tensor, Tensor, Tensor], Tensor]
    scale: float = 1.0


SPELLINGS: list[Spelling] = []
NEAR_MISSES: list[tuple[str, Callable[[Tensor, Tensor, Tensor], object], str]] = []


def spelling(scale: float = 1.0) -> Callable[[Callable[..., Tensor]], None]:
    return lambda f: SPELLINGS.append(Spelling(f.__name__, f, scale))


def near_miss(reason: str) -> Callable[[Callable[..., object]], None]:
    return lambda f: NEAR_MISSES.append((f.__name__, f, reason))


# --- how the products are written


@spelling(0.25)
def matmul_operator(q, k, v):
    return (q @ k.transpose(-2, -1) * 0.25).softmax(dim=-1) @ v


@spelling(0.25)
def matmul_function_and_method(q, k, v):
    return torch.matmul(F.softmax(q.matmul(k.mT) * 0.25, dim=-1), v)


@spelling(0.3)
def bmm_on_flattened_heads(q, k, v):
    q, k, v = (x.reshape(B * H, T, D) for x in (q, k, v))
    weights = torch.softmax(torch.bmm(q, k.transpose(1, 2)) * 0.3, dim=-1)
    return torch.bmm(weights, v).view(B, H, T, D)


@spelling(0.3)
def scores_viewed_as_four_dimensions(q, k, v):
    scores = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2)).view(B, H, T, T)
    weights = softmax(scores * 0.3).view(B * H, T, T)
    return torch.bmm(weights, v.flatten(0, 1)).unflatten(0, (B, H)).transpose(1, 2)


@spelling(0.3)
def baddbmm_with_beta_zero(q, k, v):
    """As in the attention of old diffusers."""
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    empty = torch.empty(B * H, T, T)
    scores = torch.baddbmm(empty, q, k.transpose(-1, -2), beta=0, alpha=0.3)
    return torch.bmm(scores.softmax(dim=-1), v)


@spelling(0.5)
def einsum_in_head_first_letters(q, k, v):
    scores = torch.einsum("b h i d, b h j d -> b h i j", q, k) * 0.5
    return torch.einsum("b h i j, b h j d -> b h i d", scores.softmax(-1), v)


@spelling(0.5)
def einsum_on_token_first_tensors(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = torch.einsum("bqhc,bkhc->bhqk", q, k) * 0.5
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


@spelling(0.5)
def einsum_with_keys_before_queries(q, k, v):
    scores = torch.einsum("zhsd,zhtd->zhst", k, q) * 0.5
    return torch.einsum("zhst,zhse->zhte", scores.softmax(dim=-2), v)


@spelling(0.5)
def einsum_with_scattered_letters(q, k, v):
    scores = torch.einsum("ahxc,ahyc->xhay", q, k) * 0.5
    return torch.einsum("xhay,ahyv->hxav", torch.softmax(scores, -1), v)


@spelling(0.5)
def einsum_with_ellipsis(q, k, v):
    weights = torch.einsum("...id,...jd->...ij", q, k).mul(0.5).softmax(-1)
    return torch.einsum("...ij,...jd->...id", weights, v)


@spelling(0.5)
def einsum_then_matmul_without_batch(q, k, v):
    weights = torch.einsum("thd,shd->hts", q[0].transpose(0, 1), k[0].transpose(0, 1))
    return (weights * 0.5).softmax(-1) @ v[0]


@spelling()
def one_head_of_channel_first_pixels(q, k, v):
    """As in the attention block of latent diffusion's autoencoder."""
    q, k, v = (x[:, 0].transpose(1, 2) for x in (q, k, v))  # [B, C, T]
    weights = F.softmax(torch.bmm(q.permute(0, 2, 1), k), dim=2).permute(0, 2, 1)
    return torch.bmm(v, weights)


@spelling()
def matrices_of_one_head(q, k, v):
    return torch.mm(torch.mm(q[0, 0], k[0, 0].T).softmax(-1), v[0, 0])


@spelling()
def values_on_the_left(q, k, v):
    return v.transpose(-1, -2) @ (q @ k.transpose(-1, -2)).softmax(-1).transpose(-1, -2)


@spelling()
def keys_on_the_left(q, k, v):
    return (k @ q.mT).transpose(-1, -2).softmax(-1) @ v


@spelling()
def one_key_head_for_all(q, k, v):
    return (q @ k[:, :1].mT).softmax(-1) @ v[:, :1]


@spelling()
def windows_in_a_dimension_of_their_own(q, k, v):
    q, k, v = (x.unflatten(2, (2, -1)).transpose(1, 2) for x in (q, k, v))
    return (q @ k.mT).softmax(-1) @ v


@spelling()
def query_heads_in_groups(q, k, v):
    q = torch.stack([q, 2 * q], dim=2)  # [B, G, H / G, T, D]
    return ((q @ k[:, :, None].mT).softmax(-1) @ v[:, :, None]).flatten(1, 2)


@spelling()
def query_heads_in_groups_by_einsum(q, k, v):
    q = torch.stack([q, 2 * q], dim=2)
    weights = torch.einsum("bgntd,bgsd->bgnts", q, k).softmax(-1)
    return torch.einsum("bgnts,bgsd->btgnd", weights, v)


# --- how keys are transposed


@spelling()
def key_permuted(q, k, v):
    return torch.softmax(q @ k.permute(0, 1, 3, 2), -1) @ v


@spelling()
def key_reversed_in_three_dimensions(q, k, v):
    """`.T` turns [H, T, D] into [D, T, H]."""
    weights = torch.einsum("htd,dsh->hts", q[0], k[0].T).softmax(-1)
    return weights @ v[0]


@spelling()
def key_transposed_before_it_is_named(q, k, v):
    transposed = k.permute(0, 1, 3, 2).contiguous()
    return torch.softmax(torch.matmul(q, transposed), -1) @ v


# --- where the scale is, and what it is


@spelling(1 / math.sqrt(D))
def scores_divided_by_square_root(q, k, v):
    return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v


@spelling(D**-0.5)
def scale_from_shape(q, k, v):
    return (q.size(-1) ** -0.5 * (q @ k.mT)).softmax(-1) @ v


@spelling()
def query_scaled(q, k, v):
    return ((q * 0.2) @ k.mT).softmax(-1) @ v


@spelling()
def key_divided(q, k, v):
    return (q @ (k / 7).mT).softmax(-1) @ v


@spelling()
def both_scaled_by_fourth_roots(q, k, v):
    scale = 1 / math.sqrt(math.sqrt(D))
    return torch.einsum("bhtc,bhsc->bhts", q * scale, k * scale).softmax(-1) @ v


@spelling(0.6)
def scaled_everywhere(q, k, v):
    return ((q * 0.5) @ (k / 3).mT * 1.2 / 2).softmax(-1) @ v


@spelling(-0.5)
def negative_scale(q, k, v):
    return (-(q @ k.mT) * 0.5).softmax(-1) @ v


@spelling()
def scale_in_a_tensor(q, k, v):
    return (q @ k.mT / torch.sqrt(torch.tensor(float(D)))).softmax(-1) @ v


@spelling(0.5)
def temperature_per_head(q, k, v):
    """As in cosine attention (Swin v2)."""
    temperature = v.new_ones(H, 1, 1).cumsum(0)
    scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * temperature
    return (scores * 0.5).softmax(-1) @ v


@spelling(0.5)
def scale_in_place(q, k, v):
    scores = q @ k.mT
    scores *= 0.5
    return scores.softmax(-1) @ v


@spelling(0.125)
def scale_in_place_as_statements(q, k, v):
    scores = q @ k.mT
    scores.mul_(0.5)
    scores.div_(4)
    return scores.softmax(-1) @ v


# --- how softmax is written


@spelling(0.5)
def softmax_in_float32(q, k, v):
    q, k, v = (x.bfloat16() for x in (q, k, v))
    weights = F.softmax((q @ k.mT) * 0.5, dim=-1, dtype=torch.float32).to(q.dtype)
    return weights @ v


@spelling(0.5)
def casts_around_softmax(q, k, v):
    q, k, v = (x.half() for x in (q, k, v))
    return ((q @ k.mT).float() * 0.5).softmax(-1).type_as(v) @ v


@spelling(0.5)
def upcast_query_and_key(q, k, v):
    q, k, v = (x.bfloat16() for x in (q, k, v))
    weights = (q.float() @ k.float().mT * 0.5).softmax(-1).type(v.dtype)
    return weights @ v


@spelling(0.5)
def softmax_module(q, k, v):
    return softmax(q @ k.mT * 0.5) @ v


@spelling(0.5)
def softmax_written_out(q, k, v):
    weights = torch.exp(q @ k.mT * 0.5)
    return (weights / weights.sum(dim=-1, keepdim=True)) @ v


@spelling(0.5)
def softmax_written_out_with_maximum(q, k, v):
    scores = q @ k.mT * 0.5
    scores = scores - scores.max(dim=-1, keepdim=True)[0]
    weights = scores.exp()
    return torch.matmul(weights / torch.sum(weights, -1, True), v)


@spelling(0.5)
def softmax_written_out_with_values_of_the_maximum(q, k, v):
    scores = q @ k.mT * 0.5
    weights = (scores - scores.max(-1, keepdim=True).values.detach()).exp()
    return weights.div(weights.sum(-1, keepdim=True)) @ v


@spelling(0.5)
def maximum_subtracted_before_softmax(q, k, v):
    scores = q @ k.mT * 0.5
    return (scores - torch.amax(scores, dim=-1, keepdim=True)).softmax(-1) @ v


@spelling(0.5)
def softmax_written_out_with_a_new_dimension(q, k, v):
    weights = torch.exp(q @ k.mT * 0.5)
    return (weights / weights.sum(dim=-1)[..., None]) @ v


@spelling(0.5)
def product_normalised_afterwards(q, k, v):
    weights = torch.exp(q @ k.mT * 0.5)
    return (weights @ v) / weights.sum(dim=-1, keepdim=True)


@spelling(0.5)
def product_normalised_afterwards_by_einsum(q, k, v):
    scores = torch.einsum("bhtd,bhsd->bhts", q, k) * 0.5
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return torch.einsum("bhts,bhsd->bhtd", weights, v) / weights.sum(-1).unsqueeze(-1)


@spelling(0.5)
def product_normalised_in_place(q, k, v):
    weights = (q @ k.mT * 0.5).masked_fill(~keys()[:, None, None], -math.inf).exp()
    out = weights @ v
    out /= weights.sum(-1, keepdim=True)
    return out


@spelling(0.5)
def exponential_of_log_softmax(q, k, v):
    return (q @ k.mT * 0.5).log_softmax(-1).exp() @ v


@spelling(0.5)
def exponential_minus_logsumexp(q, k, v):
    scores = q @ k.mT * 0.5
    return (scores - scores.logsumexp(-1, keepdim=True)).exp() @ v


# --- what else may stand there


@spelling()
def dropout_of_zero(q, k, v):
    return inactive((q @ k.mT).softmax(-1)) @ v


@spelling()
def dropout_in_eval(q, k, v):
    return evaluated((q @ k.mT).softmax(-1)) @ v


@spelling()
def functional_dropout_not_training(q, k, v):
    return F.dropout((q @ k.mT).softmax(-1), p=0.3, training=False) @ v


@spelling()
def attention_of_timm(q, k, v):
    """timm's Attention without fused attention."""
    x = (q * D**-0.5) @ k.transpose(-2, -1)
    return (evaluated(x.softmax(dim=-1)) @ v).transpose(1, 2).reshape(B, T, H * D)


@spelling()
def padding_mask_filled(q, k, v):
    return (q @ k.mT).masked_fill(~keys()[:, None, None], -math.inf).softmax(-1) @ v


@spelling(0.5)
def padding_mask_filled_in_place(q, k, v):
    scores = q @ k.mT * 0.5
    scores.masked_fill_(~keys()[:, None, None], torch.finfo(scores.dtype).min)
    return scores.softmax(-1) @ v


@spelling()
def padding_mask_chosen(q, k, v):
    scores = q @ k.mT
    return torch.where(keys()[:, None, None], scores, -1e9).softmax(-1) @ v


@spelling(0.5)
def padding_mask_added(q, k, v):
    bias = (1.0 - keys().float())[:, None, None] * -10000.0
    return (q @ k.mT * 0.5 + bias).softmax(-1) @ v


@spelling()
def padding_mask_added_by_baddbmm(q, k, v):
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    bias = torch.zeros(B, T).masked_fill(~keys(), -math.inf)
    bias = bias.repeat_interleave(H, 0)[:, None].expand(-1, T, -1)
    return torch.baddbmm(bias, q, k.mT).softmax(-1) @ v


@spelling()
def padding_mask_on_token_first_scores(q, k, v):
    scores = torch.einsum("bhtd,bhsd->btsh", q, k)
    scores = scores.masked_fill(~keys()[:, None, :, None], -math.inf)
    return torch.einsum("btsh,bhsd->bthd", scores.softmax(dim=2), v)


@spelling()
def padding_mask_per_head(q, k, v):
    """The op then takes heads for batches, which is the same."""
    allowed = torch.arange(T) < torch.arange(T - H, T)[:, None, None]
    return (q @ k.mT).masked_fill(~allowed, -math.inf).softmax(-1) @ v


def keys() -> Tensor:
    """Boolean [B, T]; only the first tokens take part, more of them in later batches."""
    return torch.arange(T) < torch.arange(T - B + 1, T + 1)[:, None] - 5


@spelling()
def value_changed_afterwards(q, k, v):
    values = v.clone()
    out = (q @ k.mT).softmax(-1) @ values
    values.zero_()
    return out + values


# --- what must stay dense


@near_miss("attention weights are also returned or used by")
def weights_returned(q, k, v):
    weights = (q @ k.mT).softmax(-1)
    return weights @ v, weights


@near_miss("attention weights are also returned or used by")
def weights_averaged(q, k, v):
    weights = (q @ k.mT).softmax(-1)
    return weights @ v, weights.mean(1)


@near_miss("scores are also returned or used by")
def scores_returned(q, k, v):
    scores = q @ k.mT
    return scores.softmax(-1) @ v, scores


@near_miss("scores are also returned or used by")
def scores_used_twice(q, k, v):
    scores = q @ k.mT
    return scores.softmax(-1) @ v + scores.sum()


@near_miss("call model.eval()")
def dropout_active(q, k, v):
    return active((q @ k.mT).softmax(-1)) @ v


@near_miss("call model.eval()")
def functional_dropout_by_default(q, k, v):
    return F.dropout((q @ k.mT).softmax(-1), 0.1) @ v


@near_miss("does not run over the dimension that the product with the values sums")
def softmax_over_queries(q, k, v):
    return (q @ k.mT).softmax(-2) @ v


@near_miss("over a batch dimension")
def softmax_over_heads(q, k, v):
    return (q @ k.mT).softmax(1) @ v


@near_miss("has another layout")
def product_normalised_over_queries(q, k, v):
    weights = (q @ k.mT).exp()
    return (weights @ wide(v)) / weights.sum(dim=-2, keepdim=True)


@near_miss("has another layout")
def product_normalised_across_channels(q, k, v):
    """The sums of the queries on the channels of a result that has them in columns."""
    weights = (q @ k.mT).exp()
    return (wide(v).mT @ weights.mT) / weights.sum(-1, keepdim=True)


def wide(v: Tensor) -> Tensor:
    """As many channels as tokens."""
    return torch.cat([v, v, v], -1)[..., :T]


@near_miss("attention weights are also returned or used by")
def product_used_before_it_is_normalised(q, k, v):
    weights = (q @ k.mT).exp()
    out = weights @ v
    return out / weights.sum(-1, keepdim=True), out


@near_miss("between its softmax and the product with the values")
def weights_scaled(q, k, v):
    return ((q @ k.mT).softmax(-1) * 0.9) @ v


@near_miss("between its softmax and the product with the values")
def weights_masked(q, k, v):
    return ((q @ k.mT).softmax(-1) * keys()[:, None, None].float()) @ v


@near_miss("between its softmax and the product with the values")
def weights_gated(q, k, v):
    return (q @ k.mT).softmax(-1).square() @ v


@near_miss("`tanh` stands between the product of query and key and its softmax")
def scores_capped(q, k, v):
    return (10 * torch.tanh(q @ k.mT / 10)).softmax(-1) @ v


@near_miss("`clamp` stands between the product of query and key and its softmax")
def scores_clamped(q, k, v):
    return (q @ k.mT).clamp(min=-5).softmax(-1) @ v


@near_miss("relative positions or ALiBi")
def relative_position_bias(q, k, v):
    position = torch.arange(T, dtype=torch.float)
    return (q @ k.mT + (position[:, None] - position[None]).sin()).softmax(-1) @ v


@near_miss("relative positions or ALiBi")
def alibi(q, k, v):
    slope = 2.0 ** -torch.arange(1, H + 1)
    return (q @ k.mT + slope[:, None, None] * torch.arange(T)).softmax(-1) @ v


@near_miss("relative positions or ALiBi")
def bias_from_a_second_product(q, k, v):
    return (q @ k.mT + q @ v.mT).softmax(-1) @ v


@near_miss("varies over queries")
def causal(q, k, v):
    allowed = torch.ones(T, T, dtype=torch.bool).tril()
    return (q @ k.mT).masked_fill(~allowed, -math.inf).softmax(-1) @ v


@near_miss("differs between heads")
def mask_per_batch_and_head(q, k, v):
    allowed = torch.rand(B, H, 1, T) > -1
    return (q @ k.mT).masked_fill(~allowed, -math.inf).softmax(-1) @ v


@near_miss("filled with 0 where masked")
def scores_zeroed(q, k, v):
    return (q @ k.mT).masked_fill(~keys()[:, None, None], 0.0).softmax(-1) @ v


@near_miss("filled with 1e+09 where masked")
def masked_scores_negated(q, k, v):
    return (-(q @ k.mT).masked_fill(~keys()[:, None, None], -1e9)).softmax(-1) @ v


@near_miss("filled with -10 where masked")
def masked_scores_scaled_down(q, k, v):
    scores = (q @ k.mT).masked_fill(~keys()[:, None, None], -10000.0)
    return (scores / 1000).softmax(-1) @ v


@near_miss("add -inf to remove a key")
def added_mask_scaled_down(q, k, v):
    bias = (1 - keys().float())[:, None, None] * -10000.0
    return ((q @ k.mT + bias) / 1000).softmax(-1) @ v


@near_miss("add -inf to remove a key")
def baddbmm_mask_scaled_down(q, k, v):
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    bias = ((1 - keys().float()) * -10000.0).repeat_interleave(H, 0)[:, None]
    return (torch.baddbmm(bias, q, k.mT) / 1000).softmax(-1) @ v


@near_miss("`mul` stands")
def masked_scores_scaled_by_a_tensor(q, k, v):
    scores = (q @ k.mT).masked_fill(~keys()[:, None, None], -10000.0)
    return (scores * torch.full((1,), 0.001)).softmax(-1) @ v


@near_miss("`abs` stands between")
def complex_numbers(q, k, v):
    q, k = (
        torch.view_as_complex(q.unflatten(-1, (-1, 2))),
        torch.view_as_complex(k.unflatten(-1, (-1, 2))),
    )
    return (q @ k.mH).abs().softmax(-1) @ v


@near_miss("cannot be brought to [B, H, T, D]")
def windows_that_share_their_keys(q, k, v):
    """A batch of windows on one batch of keys, [B, W, H, T, D] on [B, 1, H, T, D]."""
    q = torch.stack([q, 2 * q], dim=1)
    return (q @ k[:, None].mT).softmax(-1) @ v[:, None]


@near_miss("scales its scores differently per key")
def temperature_per_key(q, k, v):
    return (q @ k.mT * torch.arange(1.0, T + 1)).softmax(-1) @ v


@near_miss("in place")
def query_changed_after_its_product(q, k, v):
    q = q + 1
    scores = q @ k.mT
    q.zero_()
    return scores.softmax(-1) @ v + q


@near_miss("through a view")
def scores_changed_through_a_view(q, k, v):
    scores = q @ k.mT
    scores[:, :, :, 0].mul_(2)
    return scores.softmax(-1) @ v


@near_miss("`setitem` stands")
def scores_partly_overwritten(q, k, v):
    scores = q @ k.mT
    scores[:, :, :, 15:] = -1e9
    return scores.softmax(-1) @ v


@near_miss("cross-attention (20 query and 7 key tokens)")
def cross_attention(q, k, v):
    return (q @ k[:, :, :7].mT).softmax(-1) @ v[:, :, :7]


NOT_ATTENTION: list[Callable[[Tensor, Tensor, Tensor], object]] = [
    lambda q, k, v: (q @ k.mT).softmax(-1),
    lambda q, k, v: q.softmax(-1) @ v.mT,
    lambda q, k, v: F.softmax(q, dim=-1) @ (F.softmax(k, dim=-2).mT @ v),
    lambda q, k, v: (q @ k.mT).sigmoid() @ v,
    lambda q, k, v: F.relu(q @ k.mT) @ v,
    lambda q, k, v: (q @ k.mT) / (q @ k.mT).sum(-1, keepdim=True) @ v,
]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("case", SPELLINGS, ids=lambda case: case.name)
def test_spelling_is_replaced_once_with_its_scale(case: Spelling, dynamic: bool) -> None:
    if dynamic:
        # One input, so that the lengths are one symbol; the functions above name B, H and D.
        qkv = torch.stack(inputs())
        result = rewrite(lambda qkv: case.function(*qkv.unbind()), qkv, dynamic_dims=(3,))
    else:
        result = rewrite(case.function, *inputs())
        names = [node.name for node in result.graphs[0].graph.find_nodes(op="placeholder")]
        by_name = dict(zip(("l_q_", "l_k_", "l_v_"), inputs(), strict=True))
        check_metadata(result.graphs[0], *(by_name[name] for name in names))
    assert result.reasons == []
    assert len(result.ops) == 1
    assert result.ops[0].kwargs["scale"] == pytest.approx(case.scale)
    low_precision = result.output.dtype != torch.float32
    assert result.error < (2e-2 if low_precision else 1e-5)
    assert not _softmax_left(result.graphs[0])


@pytest.mark.parametrize(
    ("function", "reason"),
    [case[1:] for case in NEAR_MISSES],
    ids=[case[0] for case in NEAR_MISSES],
)
def test_near_miss_stays_dense_and_says_why(
    function: Callable[[Tensor, Tensor, Tensor], object], reason: str
) -> None:
    torch.manual_seed(0)
    result = rewrite(function, *inputs())
    assert result.ops == []
    assert len(result.decisions) == 1
    assert reason in result.decisions[0].reason
    if "eval()" not in reason:
        assert result.error == 0.0


@pytest.mark.parametrize("function", NOT_ATTENTION)
def test_what_is_not_attention_is_not_reported(
    function: Callable[[Tensor, Tensor, Tensor], object],
) -> None:
    assert rewrite(function, *inputs()).decisions == []


def test_as_many_spellings_must_not_match_as_families_exist() -> None:
    assert len(SPELLINGS) >= 45
    assert len(NEAR_MISSES) + len(NOT_ATTENTION) >= 28


def _softmax_left(gm: torch.fx.GraphModule) -> list[str]:
    names = (str(node.target) for node in gm.graph.nodes)
    return [name for name in names if "softmax" in name or name in ("exp", "matmul", "bmm")]
