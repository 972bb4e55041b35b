"""Derivatives forward: the op has none, so tangents must not be lost in it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from pisa_compile import compiled as compiled_graphs

OPTIONS = {"sparsity": 0.5, "min_tokens": 1, "block_size": 16}


def called(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value)


def by_hand(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return (query @ key.mT * 0.3).softmax(-1) @ value


@pytest.mark.parametrize("attention", [called, by_hand])
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("which", [0, 2])
def test_tangents_are_those_of_dense_attention(
    attention, inner: str, which: int, caplog: pytest.LogCaptureFixture
) -> None:
    compiled_graphs._tell_of_tangents.cache_clear()
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, 2, 40, 8, generator=generator) for _ in range(3)]
    tangent = torch.randn(1, 2, 40, 8, generator=generator)
    run = torch.compile(attention, backend="pisa", options={**OPTIONS, "inner": inner})
    with torch.no_grad():
        sparse = run(*inputs)  # compiled without tangents, then called with some
    results = []
    for function in (attention, run):
        with torch.no_grad(), forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
            dual = list(inputs)
            dual[which] = forward_ad.make_dual(inputs[which], tangent)
            results.append(forward_ad.unpack_dual(function(*dual)))
    torch.testing.assert_close(results[1].primal, results[0].primal)
    torch.testing.assert_close(results[1].tangent, results[0].tangent)
    assert [r.levelname for r in caplog.records if "tangents" in r.message] == ["WARNING"]
    with torch.no_grad():
        assert torch.equal(run(*inputs), sparse)
