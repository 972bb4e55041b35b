"""What happens to scores before their softmax: scales, masks, and their order."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from .cases import B, Cases, D, H, Spelling, T, check_found, keys, name_of

cases = Cases()


@cases.spelling(1 / math.sqrt(D))
def scores_divided_by_square_root(q, k, v):
    return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v


@cases.spelling(D**-0.5)
def scale_from_shape(q, k, v):
    return (q.size(-1) ** -0.5 * (q @ k.mT)).softmax(-1) @ v


@cases.spelling()
def query_scaled(q, k, v):
    return ((q * 0.2) @ k.mT).softmax(-1) @ v


@cases.spelling()
def key_divided(q, k, v):
    return (q @ (k / 7).mT).softmax(-1) @ v


@cases.spelling()
def both_scaled_by_fourth_roots(q, k, v):
    scale = 1 / math.sqrt(math.sqrt(D))
    return torch.einsum("bhtc,bhsc->bhts", q * scale, k * scale).softmax(-1) @ v


@cases.spelling(0.6)
def scaled_everywhere(q, k, v):
    return ((q * 0.5) @ (k / 3).mT * 1.2 / 2).softmax(-1) @ v


@cases.spelling(-0.5)
def negative_scale(q, k, v):
    return (-(q @ k.mT) * 0.5).softmax(-1) @ v


@cases.spelling()
def scale_in_a_tensor(q, k, v):
    return (q @ k.mT / torch.sqrt(torch.tensor(float(D)))).softmax(-1) @ v


@cases.spelling(0.5)
def temperature_per_head(q, k, v):
    """As in cosine attention (Swin v2)."""
    temperature = v.new_ones(H, 1, 1).cumsum(0)
    scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * temperature
    return (scores * 0.5).softmax(-1) @ v


@cases.spelling(0.5)
def scale_in_place(q, k, v):
    scores = q @ k.mT
    scores *= 0.5
    return scores.softmax(-1) @ v


@cases.spelling(0.125)
def scale_in_place_as_statements(q, k, v):
    scores = q @ k.mT
    scores.mul_(0.5)
    scores.div_(4)
    return scores.softmax(-1) @ v


@cases.spelling(0.5)
def softmax_in_float32(q, k, v):
    q, k, v = (x.bfloat16() for x in (q, k, v))
    weights = F.softmax((q @ k.mT) * 0.5, dim=-1, dtype=torch.float32).to(q.dtype)
    return weights @ v


@cases.spelling(0.5)
def casts_around_softmax(q, k, v):
    q, k, v = (x.half() for x in (q, k, v))
    return ((q @ k.mT).float() * 0.5).softmax(-1).type_as(v) @ v


@cases.spelling(0.5)
def upcast_query_and_key(q, k, v):
    q, k, v = (x.bfloat16() for x in (q, k, v))
    weights = (q.float() @ k.float().mT * 0.5).softmax(-1).type(v.dtype)
    return weights @ v


@cases.spelling()
def attention_of_timm(q, k, v):
    """timm's Attention without fused attention."""
    x = (q * D**-0.5) @ k.transpose(-2, -1)
    return (nn.Dropout(0.5).eval()(x.softmax(dim=-1)) @ v).transpose(1, 2).reshape(B, T, H * D)


@cases.spelling()
def padding_mask_filled(q, k, v):
    return (q @ k.mT).masked_fill(~keys()[:, None, None], -math.inf).softmax(-1) @ v


@cases.spelling(0.5)
def padding_mask_filled_in_place(q, k, v):
    scores = q @ k.mT * 0.5
    scores.masked_fill_(~keys()[:, None, None], torch.finfo(scores.dtype).min)
    return scores.softmax(-1) @ v


@cases.spelling()
def padding_mask_chosen(q, k, v):
    scores = q @ k.mT
    return torch.where(keys()[:, None, None], scores, -1e9).softmax(-1) @ v


@cases.spelling(0.5)
def padding_mask_added(q, k, v):
    bias = (1.0 - keys().float())[:, None, None] * -10000.0
    return (q @ k.mT * 0.5 + bias).softmax(-1) @ v


@cases.spelling()
def padding_mask_added_by_baddbmm(q, k, v):
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    bias = torch.zeros(B, T).masked_fill(~keys(), -math.inf)
    bias = bias.repeat_interleave(H, 0)[:, None].expand(-1, T, -1)
    return torch.baddbmm(bias, q, k.mT).softmax(-1) @ v


@cases.spelling()
def padding_mask_on_token_first_scores(q, k, v):
    scores = torch.einsum("bhtd,bhsd->btsh", q, k)
    scores = scores.masked_fill(~keys()[:, None, :, None], -math.inf)
    return torch.einsum("btsh,bhsd->bthd", scores.softmax(dim=2), v)


@cases.spelling()
def padding_mask_per_head(q, k, v):
    """The op then takes heads for batches, which is the same."""
    allowed = torch.arange(T) < torch.arange(T - H, T)[:, None, None]
    return (q @ k.mT).masked_fill(~allowed, -math.inf).softmax(-1) @ v


@cases.spelling(2.0)
def scores_added_to_themselves(q, k, v):
    scores = q @ k.mT
    return (scores + scores).softmax(-1) @ v


@cases.spelling(0.5)
def mask_added_to_scaled_scores(q, k, v):
    bias = torch.zeros(B, 1, 1, T).masked_fill(~keys()[:, None, None], -1e4)
    return torch.add(bias, q @ k.mT, alpha=0.5).softmax(-1) @ v


@cases.spelling(0.5)
def scaled_sum_of_scores_and_mask(q, k, v):
    bias = torch.zeros(B, 1, 1, T).masked_fill(~keys()[:, None, None], -1e9)
    return ((q @ k.mT + bias) * 0.5).softmax(-1) @ v


@cases.spelling()
def mask_subtracted_with_a_factor(q, k, v):
    blocked = (~keys())[:, None, None].float()
    return torch.sub(q @ k.mT, blocked, alpha=1e5).softmax(-1) @ v


@cases.spelling(-1.0)
def scores_subtracted_from_a_number(q, k, v):
    return (1.0 - q @ k.mT).softmax(-1) @ v


@cases.spelling(-1.0)
def scores_subtracted_from_their_maximum(q, k, v):
    """As the channel attention of DANet has it."""
    scores = q @ k.mT
    return (scores.max(-1, keepdim=True)[0].expand_as(scores) - scores).softmax(-1) @ v


@cases.spelling(0.5)
def maximum_of_all_scores_subtracted(q, k, v):
    scores = q @ k.mT * 0.5
    return (scores - scores.max()).softmax(-1) @ v


@cases.spelling(0.5)
def mean_subtracted(q, k, v):
    scores = q @ k.mT * 0.5
    return (scores - scores.mean(-1, keepdim=True)).softmax(-1) @ v


@cases.spelling(0.5)
def scaled_after_its_maximum_was_subtracted(q, k, v):
    """As CogView keeps scores in the range of float16."""
    scores = q @ k.mT / 32
    return ((scores - scores.amax(-1, keepdim=True)) * 16).softmax(-1) @ v


@cases.spelling(0.5)
def small_number_added(q, k, v):
    return (q @ k.mT * 0.5 + 1).softmax(-1) @ v


@cases.spelling(0.5)
def number_added_then_factor_per_head(q, k, v):
    return ((q @ k.mT + 1) * (v.new_ones(H, 1, 1).cumsum(0)) * 0.5).softmax(-1) @ v


@cases.spelling()
def factor_per_head_then_mask(q, k, v):
    scores = q @ k.mT * v.new_ones(H, 1, 1).cumsum(0)
    return scores.masked_fill(~keys()[:, None, None], -math.inf).softmax(-1) @ v


@cases.spelling()
def filled_with_a_tensor_of_one_number(q, k, v):
    fill = torch.full((), -math.inf)
    return torch.where(keys()[:, None, None], q @ k.mT, fill).softmax(-1) @ v


@cases.spelling()
def filled_with_a_number_as_a_tensor(q, k, v):
    return (q @ k.mT).masked_fill(~keys()[:, None, None], torch.tensor(-math.inf)).softmax(-1) @ v


@cases.spelling()
def filled_with_a_tensor_on_the_left(q, k, v):
    fill = torch.tensor(-1e9)
    return torch.where(~keys()[:, None, None], fill, q @ k.mT).softmax(-1) @ v


@cases.spelling()
def filled_by_keywords(q, k, v):
    scores = q @ k.mT
    scores = torch.where(condition=keys()[:, None, None], input=scores, other=torch.tensor(-1e9))
    return scores.softmax(-1) @ v


@cases.spelling()
def filled_by_an_index_of_all_dimensions(q, k, v):
    scores = q @ k.mT
    scores[(~keys())[:, None, None].expand_as(scores)] = -math.inf
    return scores.softmax(-1) @ v


@cases.spelling(0.5)
def mask_added_in_place(q, k, v):
    scores = q @ k.mT
    scores *= 0.5
    scores += torch.zeros(B, 1, 1, T).masked_fill(~keys()[:, None, None], -math.inf)
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("case", cases.spellings, ids=name_of)
def test_spelling_is_replaced_once_with_its_scale(case: Spelling, dynamic: bool) -> None:
    check_found(case, dynamic=dynamic)
