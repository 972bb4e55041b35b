"""Which attention a call of the op belongs to: told by the op itself, wherever it stands."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import pisa_compile as pisa
from pisa_compile.kernels.testing import relative_l2
from pisa_compile.ops.observation import OpCall, observed

from ..models import Attention, Block, tokens

INNER = ["eager", "aot_eager", "inductor"]
OPTIONS = {"sparsity": 0.5, "min_tokens": 1, "block_size": 16}


class Cond(nn.Module):
    """One of two attentions runs, as the data say; with `dense`, the second one is causal."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = Attention(32, 2), Attention(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, self.first, self.second, (x,))


class Independent(nn.Module):
    """Two attentions that do not depend on one another, used in the other order."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.late, self.early = Attention(32, 2), Attention(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        late, early = self.late(x), self.early(x.flip(1))
        return torch.cat([early, late], dim=-1)


class Region(Block):
    @torch.compiler.nested_compile_region
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Regions(nn.Module):
    """Blocks that share one compiled region."""

    def __init__(self, kind: type[Block] = Region, depth: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(kind(32, 2) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Pair(nn.Module):
    """A region with two regions inside."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Regions(depth=2)

    @torch.compiler.nested_compile_region
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pairs = nn.ModuleList([Pair(), Pair()])

    def forward(self, x: Tensor) -> Tensor:
        for pair in self.pairs:
            x = pair(x)
        return x


def heads_seen(model: nn.Module, x: Tensor, inner: str) -> tuple[Any, list[OpCall]]:
    calls: list[OpCall] = []
    compiled = torch.compile(model, backend="pisa", options={**OPTIONS, "inner": inner})
    with torch.no_grad(), observed(calls.append):
        return compiled(x), calls


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize(("sign", "ran"), [(1.0, "first"), (-1.0, "second")])
def test_the_branch_that_ran_is_the_one_that_is_named(inner: str, sign: float, ran: str) -> None:
    model, x = Cond().eval(), sign * tokens(100).abs()
    compiled = torch.compile(model, backend="pisa", options={**OPTIONS, "inner": inner})
    with pisa.delivered() as deliveries, torch.no_grad():
        compiled(x)
    assert list(deliveries.sites()) == [ran]
    report = pisa.explain(compiled, x)
    assert [(site.module, site.calls, site.replaced) for site in report.sites] == [(ran, 1, True)]


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_comparison_and_calibration_name_the_branch_that_ran(sign: float) -> None:
    model, x = Cond().eval(), sign * tokens(320).abs()
    ran = "first" if sign > 0 else "second"
    policy = pisa.Policy(sparsity=0.5, min_tokens=1, block_size=16)
    result = pisa.compare(model, [x], policies=[policy]).results[0]
    assert [site.module for site in result.sites] == [ran]
    found = pisa.calibrate(
        model, [x], sparsity=0.5, policy=policy, sensitivity=False, show_progress=False
    )
    assert list(found.policies) == [ran]


@pytest.mark.parametrize("inner", INNER)
def test_independent_attentions_keep_their_names_in_any_order(inner: str) -> None:
    model, x = Independent().eval(), tokens(100)
    _, calls = heads_seen(model, x, inner)
    heads = {call.site.module: call.query.shape[1] for call in calls}
    assert heads == {"late": 2, "early": 4}


def weights_of(model: nn.Module, name: str) -> Tensor:
    return model.get_submodule(f"{name}.qkv").weight


def names_by_data(model: nn.Module, x: Tensor) -> list[str]:
    """The attention modules in the order in which they really run."""
    names: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, Attention):
            module.register_forward_pre_hook(lambda *_, name=name: names.append(name))
    with torch.no_grad():
        model(x)
    for module in model.modules():
        module._forward_pre_hooks.clear()
    return names


# Inductor itself cannot lower a region inside a region yet (torch 2.13).
@pytest.mark.parametrize(
    ("make", "inner"),
    [*((Regions, inner) for inner in INNER), (Nested, "eager"), (Nested, "aot_eager")],
)
def test_calls_of_a_shared_region_are_told_apart(make: Callable[[], nn.Module], inner: str) -> None:
    model, x = make().eval(), tokens(100)
    expected = names_by_data(model, x)
    _, calls = heads_seen(model, x, inner)
    assert [call.site.module for call in calls] == expected
    options = {**OPTIONS, "sparsity": 0.0, "inner": inner}
    with torch.no_grad():
        out = torch.compile(model, backend="pisa", options=options)(x)
        assert relative_l2(out, model(x)) < 1e-5
    # What each call saw is what its own module was given.
    seen: dict[str, Tensor] = {call.site.module: call.out for call in calls}
    assert len({out.sum().item() for out in seen.values()}) == len(expected)


def test_numbers_are_no_recompilation_and_no_input_without_shared_regions() -> None:
    from pisa_compile.ops.token_order import NO_CALLER
    from pisa_compile.passes import Context, rewritten
    from pisa_compile.policies.policy import Policy
    from pisa_compile.policies.presets import Presets

    graphs = []

    def backend(gm: Any, example_inputs: Any) -> Any:
        context = Context(Policy(**OPTIONS), {}, Presets(None), NO_CALLER)
        graphs.append(rewritten(gm, context, "input"))
        return gm.forward

    for make in (Independent, Regions):
        with torch.no_grad():
            torch.compile(make().eval(), backend=backend)(tokens(100))
        torch._dynamo.reset()
    assert [graph.numbers is None for graph in graphs] == [True, False]
    assert [len(graph.inputs) for graph in graphs] == [0, 1]


def test_a_branch_with_dense_attention_counts_as_run() -> None:
    class Causal(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            q = x[:, None]
            return F.scaled_dot_product_attention(q, q, q, is_causal=True)[:, 0]

    class Either(Cond):
        def __init__(self) -> None:
            super().__init__()
            self.second = Causal()

    report = pisa.explain(
        torch.compile(Either().eval(), backend="pisa", options={**OPTIONS, "inner": "eager"}),
        -tokens(100).abs(),
    )
    counted = Counter((site.module, site.replaced) for site in report.sites)
    assert counted == {("second", False): 1}
