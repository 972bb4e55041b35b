from __future__ import annotations

import pytest
import torch

import pisa_compile as pisa
from pisa_compile.kernels import reference
from pisa_compile.kernels.params import AttentionParams
from pisa_compile.kernels.testing import random_inputs

from .. import models


def test_delivered_density_and_mass_of_the_op() -> None:
    inputs = random_inputs(heads=3, query_len=1000, head_dim=16)
    q, k, v, _ = inputs.astuple()
    with pisa.delivered() as deliveries:
        pisa.attention(q, k, v, sparsity=0.75, exact=(70, 0))
        pisa.attention(q, k, v, sparsity=0.75, density=torch.tensor([0.125, 0.5, 1.0]))
    pisa.attention(q, k, v, sparsity=0.75)  # outside: not seen
    first, second = deliveries.calls
    # 16 blocks: the prefix makes 2 exact for all, of the other 14 a quarter, 4. The 2 query blocks
    # of the prefix attend everything.
    expected = (2 * 1.0 + 14 * (2 + 4) / 16) / 16
    torch.testing.assert_close(first.density, torch.full((3,), expected))
    torch.testing.assert_close(second.requested, torch.tensor([0.125, 0.5, 1.0]))
    torch.testing.assert_close(second.density, torch.tensor([0.125, 0.5, 1.0]))
    assert second.mass[2] == pytest.approx(1.0)
    assert second.mass[0] < second.mass[1] < second.mass[2]


def test_mass_is_that_of_dense_attention() -> None:
    inputs = random_inputs(heads=1, query_len=100, head_dim=16, masked=0.2)
    q, k, v, mask = inputs.astuple()
    assert mask is not None
    with pisa.delivered() as deliveries:
        pisa.attention(
            q, k, v, sparsity=0.6, block_size=16, attn_mask=mask[:, None, None], order="none"
        )
        # Values that count attention: 1 on keys of block j, for each j.
        blocks = torch.eye(7).repeat_interleave(16, 0)[:100][None, None]
        out = pisa.attention(
            q, k, blocks, sparsity=0.0, block_size=16, attn_mask=mask[:, None, None]
        )
        kept = pisa.attention(
            q,
            k,
            blocks,
            sparsity=0.6,
            block_size=16,
            attn_mask=mask[:, None, None],
            order="none",
        )
    expected = (out * (kept > 0)).sum(-1).mean()
    assert float(deliveries.calls[0].mass) == pytest.approx(float(expected), rel=1e-5)


def test_heads_that_share_keys_are_routed_as_the_op_routes_them() -> None:
    """The correction takes a mean over all of them, and with it decides which blocks are exact."""
    inputs = random_inputs(heads=4, kv_heads=2, query_len=300, head_dim=16, seed=2)
    query, key, value, _ = inputs.astuple()
    query[:, ::2] *= 4.0
    key[:, :, ::48] *= 5.0  # some blocks scatter more than others
    settings = {"sparsity": 0.7, "block_size": 16, "enable_gqa": True}
    with pisa.delivered() as deliveries:
        pisa.attention(query, key, value, **settings)
    params = AttentionParams(16**-0.5, 0.7, 16, order="corrected")
    k, v = (x.repeat_interleave(2, 1) for x in (key, value))
    stats = reference.block_statistics(k, v, torch.ones(1, 300, dtype=torch.bool), 16)
    masses = []
    for kv_heads in (2, 4):  # 4: as if each head had keys of its own
        exact = reference.route(query, stats, 300, params, kv_heads=kv_heads)
        rows = torch.linspace(0, 299, 128).long()
        weight = (params.scale * query[:, :, rows] @ k.mT).softmax(-1)
        kept = exact[:, :, rows // 16].repeat_interleave(16, -1)[..., :300]
        masses.append((weight * kept).sum(-1).mean((0, 2)))
    torch.testing.assert_close(deliveries.calls[0].mass, masses[0])
    assert not torch.allclose(masses[0], masses[1], atol=1e-4)


def test_sites_of_a_compiled_model_and_the_table() -> None:
    model = models.tiny(depth=2)
    options = {"inner": "eager", "min_tokens": 0, "sparsity": 0.5}
    compiled = torch.compile(model, backend="pisa", options=options)
    with torch.no_grad(), pisa.delivered() as deliveries:
        compiled(models.tokens(256))
        compiled(models.tokens(256))
    assert [(call.module, call.call) for call in deliveries.calls] == [
        ("blocks.0.attn", 0), ("blocks.1.attn", 0), ("blocks.0.attn", 1), ("blocks.1.attn", 1),
    ]  # fmt: skip
    text = str(deliveries)
    assert "blocks.1.attn" in text
    assert "0.500 (0.500 to 0.500)" in text
