"""How the two products are written, and how their operands lie."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from .cases import B, Cases, D, H, NearMiss, Spelling, T, check_dense, check_found, keys, name_of

cases = Cases()


# `.T` beyond two dimensions is to be recognised all the same.
pytestmark = pytest.mark.filterwarnings("ignore:The use of `x.T` on tensors:UserWarning")


@cases.spelling(0.25)
def matmul_operator(q, k, v):
    return (q @ k.transpose(-2, -1) * 0.25).softmax(dim=-1) @ v


@cases.spelling(0.25)
def matmul_function_and_method(q, k, v):
    return torch.matmul(F.softmax(q.matmul(k.mT) * 0.25, dim=-1), v)


@cases.spelling(0.3)
def bmm_on_flattened_heads(q, k, v):
    q, k, v = (x.reshape(B * H, T, D) for x in (q, k, v))
    weights = torch.softmax(torch.bmm(q, k.transpose(1, 2)) * 0.3, dim=-1)
    return torch.bmm(weights, v).view(B, H, T, D)


@cases.spelling(0.3)
def scores_viewed_as_four_dimensions(q, k, v):
    scores = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2)).view(B, H, T, T)
    weights = F.softmax(scores * 0.3, dim=-1).view(B * H, T, T)
    return torch.bmm(weights, v.flatten(0, 1)).unflatten(0, (B, H)).transpose(1, 2)


@cases.spelling(0.3)
def baddbmm_with_beta_zero(q, k, v):
    """As in the attention of old diffusers."""
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    empty = torch.empty(B * H, T, T)
    scores = torch.baddbmm(empty, q, k.transpose(-1, -2), beta=0, alpha=0.3)
    return torch.bmm(scores.softmax(dim=-1), v)


@cases.spelling(0.5)
def einsum_in_head_first_letters(q, k, v):
    scores = torch.einsum("b h i d, b h j d -> b h i j", q, k) * 0.5
    return torch.einsum("b h i j, b h j d -> b h i d", scores.softmax(-1), v)


@cases.spelling(0.5)
def einsum_on_token_first_tensors(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = torch.einsum("bqhc,bkhc->bhqk", q, k) * 0.5
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


@cases.spelling(0.5)
def einsum_with_keys_before_queries(q, k, v):
    scores = torch.einsum("zhsd,zhtd->zhst", k, q) * 0.5
    return torch.einsum("zhst,zhse->zhte", scores.softmax(dim=-2), v)


@cases.spelling(0.5)
def einsum_with_scattered_letters(q, k, v):
    scores = torch.einsum("ahxc,ahyc->xhay", q, k) * 0.5
    return torch.einsum("xhay,ahyv->hxav", torch.softmax(scores, -1), v)


@cases.spelling(0.5)
def einsum_with_ellipsis(q, k, v):
    weights = torch.einsum("...id,...jd->...ij", q, k).mul(0.5).softmax(-1)
    return torch.einsum("...ij,...jd->...id", weights, v)


@cases.spelling(0.5)
def einsum_then_matmul_without_batch(q, k, v):
    weights = torch.einsum("thd,shd->hts", q[0].transpose(0, 1), k[0].transpose(0, 1))
    return (weights * 0.5).softmax(-1) @ v[0]


@cases.spelling()
def one_head_of_channel_first_pixels(q, k, v):
    """As in the attention block of latent diffusion's autoencoder."""
    q, k, v = (x[:, 0].transpose(1, 2) for x in (q, k, v))  # [B, C, T]
    weights = F.softmax(torch.bmm(q.permute(0, 2, 1), k), dim=2).permute(0, 2, 1)
    return torch.bmm(v, weights)


@cases.spelling()
def matrices_of_one_head(q, k, v):
    return torch.mm(torch.mm(q[0, 0], k[0, 0].T).softmax(-1), v[0, 0])


@cases.spelling()
def values_on_the_left(q, k, v):
    return v.transpose(-1, -2) @ (q @ k.transpose(-1, -2)).softmax(-1).transpose(-1, -2)


@cases.spelling()
def keys_on_the_left(q, k, v):
    return (k @ q.mT).transpose(-1, -2).softmax(-1) @ v


@cases.spelling()
def one_key_head_for_all(q, k, v):
    return (q @ k[:, :1].mT).softmax(-1) @ v[:, :1]


@cases.spelling()
def windows_in_a_dimension_of_their_own(q, k, v):
    q, k, v = (x.unflatten(2, (2, -1)).transpose(1, 2) for x in (q, k, v))
    return (q @ k.mT).softmax(-1) @ v


@cases.spelling()
def query_heads_in_groups(q, k, v):
    q = torch.stack([q, 2 * q], dim=2)  # [B, G, H / G, T, D]
    return ((q @ k[:, :, None].mT).softmax(-1) @ v[:, :, None]).flatten(1, 2)


@cases.spelling()
def query_heads_in_groups_by_einsum(q, k, v):
    q = torch.stack([q, 2 * q], dim=2)
    weights = torch.einsum("bgntd,bgsd->bgnts", q, k).softmax(-1)
    return torch.einsum("bgnts,bgsd->btgnd", weights, v)


@cases.spelling()
def key_permuted(q, k, v):
    return torch.softmax(q @ k.permute(0, 1, 3, 2), -1) @ v


@cases.spelling()
def key_reversed_in_three_dimensions(q, k, v):
    """`.T` turns [H, T, D] into [D, T, H]."""
    weights = torch.einsum("htd,dsh->hts", q[0], k[0].T).softmax(-1)
    return weights @ v[0]


@cases.spelling()
def key_transposed_before_it_is_named(q, k, v):
    transposed = k.permute(0, 1, 3, 2).contiguous()
    return torch.softmax(torch.matmul(q, transposed), -1) @ v


@cases.near_miss("cannot be brought to [B, H, T, D]")
def windows_that_share_their_keys(q, k, v):
    """A batch of windows on one batch of keys, [B, W, H, T, D] on [B, 1, H, T, D]."""
    q = torch.stack([q, 2 * q], dim=1)
    return (q @ k[:, None].mT).softmax(-1) @ v[:, None]


@cases.near_miss("`abs` stands between")
def complex_numbers(q, k, v):
    q, k = (
        torch.view_as_complex(q.unflatten(-1, (-1, 2))),
        torch.view_as_complex(k.unflatten(-1, (-1, 2))),
    )
    return (q @ k.mH).abs().softmax(-1) @ v


@cases.near_miss("cross-attention (20 query and 7 key tokens)")
def cross_attention(q, k, v):
    return (q @ k[:, :, :7].mT).softmax(-1) @ v[:, :, :7]


@cases.spelling()
def addmm_with_a_bias_of_zeros(q, k, v):
    return torch.addmm(v.new_zeros(T, T), q[0, 0], k[0, 0].T).softmax(-1) @ v[0, 0]


@cases.spelling(0.5)
def baddbmm_with_another_beta(q, k, v):
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    bias = torch.zeros(B, T).masked_fill(~keys(), -math.inf).repeat_interleave(H, 0)[:, None]
    return torch.baddbmm(bias, q, k.mT, beta=2, alpha=0.5).softmax(-1) @ v


@cases.spelling()
def queries_for_all_batches(q, k, v):
    """As the learned queries of attention pooling."""
    return (q[:1] @ k.mT).softmax(-1) @ v


@cases.spelling()
def queries_for_all_heads(q, k, v):
    return (q[:, :1] @ k.mT).softmax(-1) @ v


@cases.spelling()
def queries_for_all_batches_and_heads(q, k, v):
    return (q[0, 0] @ k.mT).softmax(-1) @ v


@cases.spelling()
def queries_for_all_by_einsum(q, k, v):
    weights = torch.einsum("td,bhsd->bhts", q[0, 0], k).softmax(-1)
    return torch.einsum("bhts,bhsd->bhtd", weights, v)


@cases.spelling()
def keys_for_all_batches(q, k, v):
    return (q @ k[0].mT).softmax(-1) @ v


@cases.spelling()
def values_for_all_batches(q, k, v):
    return (q @ k.mT).softmax(-1) @ v[:1]


@cases.near_miss("cross-attention (4 query and 20 key tokens)")
def pooling_by_a_few_queries(q, k, v):
    return (q[0, 0, :4] @ k.mT).softmax(-1) @ v


@cases.near_miss("is multiplied by 0")
def baddbmm_of_nothing(q, k, v):
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    return torch.baddbmm(v[:, :1, :1], q, k.mT, alpha=0).softmax(-1) @ v


@cases.near_miss("its product with the values is scaled or added to something")
def product_added_to_something(q, k, v):
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    return torch.baddbmm(v, (q @ k.mT).softmax(-1), v)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("case", cases.spellings, ids=name_of)
def test_spelling_is_replaced_once_with_its_scale(case: Spelling, dynamic: bool) -> None:
    check_found(case, dynamic=dynamic)


@pytest.mark.parametrize("case", cases.near_misses, ids=name_of)
def test_near_miss_stays_dense_and_says_why(case: NearMiss) -> None:
    check_dense(case)
