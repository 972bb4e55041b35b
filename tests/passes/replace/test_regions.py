"""Nested compiled regions, which Dynamo shares between blocks, under policies that differ."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import pisa_compile as pisa

from ..tracing import Rewritten, rewrite

POLICIES = (pisa.Policy(sparsity=0.5), pisa.Policy(sparsity=0.25), pisa.DENSE)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.project(x), x, x)


class Region(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()

    @torch.compiler.nested_compile_region
    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x)


class Model(nn.Module):
    def __init__(self, count: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Region() for _ in range(count)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def tokens() -> Tensor:
    return torch.randn(1, 2, 128, 16, generator=torch.Generator().manual_seed(0))


def outcome(result: Rewritten) -> list[float | None]:
    """The sparsity of every call, None where it stays dense."""
    return [d.policy.sparsity if d.replaced else None for d in result.decisions]


def test_blocks_without_policies_share_one_graph() -> None:
    result = rewrite(Model().eval(), tokens())
    assert len(result.ops) == 1
    assert len(result.decisions) == 3
    assert result.error < 1e-5


@pytest.mark.parametrize("inside", ["", ".attn"], ids=["on_the_region", "inside_the_region"])
def test_every_block_keeps_its_own_policy(inside: str) -> None:
    model = Model().eval()
    pisa.set_policy(model, {f"blocks.{i}{inside}": policy for i, policy in enumerate(POLICIES)})
    assert outcome(rewrite(model, tokens())) == [0.5, 0.25, None]


@pytest.mark.parametrize("policies", [False, True], ids=["one_graph", "graphs_apart"])
def test_every_call_is_reported_under_its_own_modules(policies: bool) -> None:
    model = Model().eval()
    if policies:
        pisa.set_policy(model, {"blocks.1": POLICIES[0], "blocks.2": POLICIES[1]})
    result = rewrite(model, tokens())
    names = [f"blocks.{i}.attn" for i in range(3)]
    assert [decision.module for decision in result.decisions] == names
    options = {"inner": "eager", "min_tokens": 0}
    sites = pisa.explain(torch.compile(model, backend="pisa", options=options), tokens()).sites
    assert [(site.module, site.calls) for site in sites] == [(name, 1) for name in names]


def test_equal_policies_still_share() -> None:
    model = Model(4).eval()
    pisa.set_policy(model, {"blocks.*": POLICIES[0], "blocks.3": POLICIES[1]})
    result = rewrite(model, tokens())
    assert outcome(result) == [0.5, 0.5, 0.5, 0.25]
    assert len(result.ops) == 2


def test_policy_of_the_whole_model_is_followed_inside() -> None:
    model = Model().eval()
    pisa.set_policy(model, {"": POLICIES[0], "blocks.1": pisa.DENSE})
    assert outcome(rewrite(model, tokens())) == [0.5, None, 0.5]


@pytest.mark.parametrize("inner", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_later_stages_do_not_merge_them_again(inner: str) -> None:
    model, x = Model().eval(), tokens()
    pisa.set_policy(model, dict(zip(("blocks.0", "blocks.1", "blocks.2"), POLICIES, strict=True)))

    def run(inner: str) -> Tensor:
        torch._dynamo.reset()
        options = {"inner": inner, "min_tokens": 0, "block_size": 16, "impl": "reference"}
        with torch.no_grad():
            out: Tensor = torch.compile(model, backend="pisa", options=options)(x)
        return out

    torch.testing.assert_close(run(inner), run("eager"))


def test_no_mark_is_left_in_the_graph() -> None:
    model = Model().eval()
    pisa.set_policy(model, {"blocks.*.attn": POLICIES[0]})
    result = rewrite(model, tokens())
    children = [m for m in result.graphs[0].modules() if isinstance(m, torch.fx.GraphModule)]
    assert len(children) == 2
    targets = [str(node.target) for child in children for node in child.graph.nodes]
    assert not [target for target in targets if "policy" in target]
