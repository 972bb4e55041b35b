"""Policies hold wherever a module is compiled, and a changed policy never meets stale code."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import pisa_compile as pisa
from pisa_compile.policies.annotation import Annotation
from pisa_compile.policies.policy import DEFAULT, resolve
from pisa_compile.report.recording import recording

from ..models import Attention, Block, tiny, tokens

OPTIONS = {"min_tokens": 0, "inner": "eager", "sparsity": 0.3}


def sparsities(model: nn.Module, options: dict[str, Any] | None = None) -> list[float | None]:
    """The sparsity of each site in a fresh whole-model compile; None for a dense one."""
    compiled = torch.compile(model, backend="pisa", options=options or OPTIONS)
    sites = pisa.explain(compiled, tokens()).sites
    return [site.policy.sparsity if site.replaced else None for site in sites]


def compile_blocks(model: nn.Module) -> nn.Module:
    for block in model.blocks:
        block.compile(backend="pisa", fullgraph=True, options=OPTIONS)
    return model


def regional_sparsities(model: nn.Module) -> list[float | None]:
    """The same for a model whose blocks are compiled one by one, in the order they ran."""
    sites = pisa.explain(model, tokens()).sites
    return [
        site.policy.sparsity if site.replaced else None for site in sites for _ in range(site.calls)
    ]


@pisa.policy(sparsity=0.9)
class DecoratedAttention(Attention):
    pass


class InheritingAttention(DecoratedAttention):
    def forward(self, x: Tensor) -> Tensor:  # does not call the decorated forward
        return Attention.forward(self, x)


@pisa.policy(sparsity=0.5)
class DecoratedBlock(Block):
    pass


def decorated_model(attention: type[Attention], block: type[Block] = Block) -> nn.Module:
    model = tiny()
    for i in range(2):
        model.blocks[i] = block(32, 2)
        model.blocks[i].attn = attention(32, 2)
    return model.eval()


def test_options_apply_where_nothing_else_does() -> None:
    assert sparsities(tiny()) == [0.3, 0.3]
    assert sparsities(tiny(), {"min_tokens": 0, "inner": "eager"}) == [0.7, 0.7]


@pytest.mark.parametrize("attention", [DecoratedAttention, InheritingAttention])
def test_class_policy_beats_options_and_reaches_subclasses(attention: type[Attention]) -> None:
    assert sparsities(decorated_model(attention)) == [0.9, 0.9]
    assert regional_sparsities(compile_blocks(decorated_model(attention))) == [0.9, 0.9]


def test_innermost_class_policy_wins() -> None:
    assert sparsities(decorated_model(DecoratedAttention, DecoratedBlock)) == [0.9, 0.9]
    assert sparsities(decorated_model(Attention, DecoratedBlock)) == [0.5, 0.5]


def test_class_policy_on_the_root_of_a_compiled_region() -> None:
    model = decorated_model(Attention, DecoratedBlock)
    assert regional_sparsities(compile_blocks(model)) == [0.5, 0.5]


def test_instance_policy_beats_the_class_even_from_outside() -> None:
    model = decorated_model(DecoratedAttention)
    pisa.set_policy(model, {"blocks.0": pisa.Policy(sparsity=0.1), "blocks.1": pisa.DENSE})
    assert sparsities(model) == [0.1, None]


def test_innermost_instance_policy_wins_and_switches_on_again() -> None:
    model = tiny()
    pisa.set_policy(model, {"": pisa.DENSE, "blocks.1.attn": pisa.Policy(sparsity=0.6)})
    assert sparsities(model) == [None, 0.6]


def test_fields_left_open_are_inherited() -> None:
    model = decorated_model(DecoratedAttention)
    pisa.set_policy(model, {"blocks.0": pisa.Policy(order="zeroth")})
    sites = pisa.explain(torch.compile(model, backend="pisa", options=OPTIONS), tokens()).sites
    first, second = (site.policy for site in sites)
    assert (first.sparsity, first.order, first.min_tokens) == (0.9, "zeroth", 0)
    assert (second.sparsity, second.order, second.block_size) == (0.9, "corrected", 64)


def test_decorator_on_an_instance_and_on_a_function() -> None:
    model = tiny()
    assert pisa.policy(sparsity=0.7)(model.blocks[0]) is model.blocks[0]

    @pisa.policy(sparsity=0.2)
    def last(x: Tensor) -> Tensor:
        return model.blocks[1](x)

    compiled = torch.compile(lambda x: last(model.blocks[0](x)), backend="pisa", options=OPTIONS)
    with torch.no_grad(), recording() as active:
        compiled(tokens())
    assert [decision.policy.sparsity for decision in active.decisions] == [0.7, 0.2]


def test_blocks_of_one_class_keep_their_own_policies_under_regional_compile() -> None:
    model = tiny(3)
    pisa.set_policy(
        model,
        {"blocks.[01]": pisa.Policy(sparsity=0.5), "blocks.2": pisa.Policy(sparsity=0.8)},
    )
    compile_blocks(model)
    assert regional_sparsities(model) == [0.5, 0.5, 0.8]
    assert counters["stats"]["unique_graphs"] == 2  # equal policies share compiled code
    assert regional_sparsities(model) == [0.5, 0.5, 0.8]
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("regional", [False, True], ids=["whole", "regional"])
def test_a_changed_policy_recompiles(regional: bool) -> None:
    model, x = tiny(), tokens()
    options = {**OPTIONS, "sparsity": 0.0}
    if regional:
        for block in model.blocks:
            block.compile(backend="pisa", options=options)
        run: nn.Module = model
    else:
        run = torch.compile(model, backend="pisa", options=options)
    with torch.no_grad():
        dense = run(x)
        pisa.set_policy(run, {"blocks.1": pisa.Policy(sparsity=0.9)})
        sparse = run(x)
        assert not torch.allclose(sparse, dense)
        pisa.set_policy(run, {"blocks.1": pisa.DENSE})
        torch.testing.assert_close(run(x), dense)
        pisa.set_policy(run, {"blocks.1": pisa.Policy(sparsity=0.9)})
        assert torch.equal(run(x), sparse)


def test_policies_survive_copies_and_pickles_and_stay_apart() -> None:
    model = tiny()
    pisa.set_policy(model, {"blocks.0": pisa.Policy(sparsity=0.6)})
    clone = copy.deepcopy(model)
    pisa.set_policy(clone, {"blocks.0": pisa.DENSE})
    with torch.no_grad():
        clone.blocks[0].attn.qkv.weight.zero_()
    loaded = pickle.loads(pickle.dumps(model))
    assert sparsities(model) == [0.6, 0.3]
    assert sparsities(clone) == [None, 0.3]
    assert sparsities(loaded) == [0.6, 0.3]
    with torch.no_grad():
        assert torch.equal(loaded(tokens()), model(tokens()))
        assert not torch.equal(clone(tokens()), model(tokens()))


def test_a_hooked_forward_stays_inside_the_policy() -> None:
    model = tiny(1)
    block = model.blocks[0]
    inner = block.forward
    block.forward = lambda x: inner(x) + 1.0
    pisa.set_policy(model, {"blocks.0": pisa.Policy(sparsity=0.0)})
    x = tokens()
    with torch.no_grad():
        compiled = torch.compile(model, backend="pisa", options=OPTIONS)
        torch.testing.assert_close(compiled(x), inner(x) + 1.0)
    assert sparsities(model) == [0.0]


def test_policies_do_nothing_in_eager_mode() -> None:
    model = decorated_model(DecoratedAttention)
    plain = decorated_model(Attention)
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(model(tokens()), plain(tokens()))


def test_set_policy_changes_nothing_when_a_pattern_matches_nothing() -> None:
    model = tiny()
    with pytest.raises(ValueError, match=r"no module matches 'layers\.\*'.*'blocks\.0'"):
        pisa.set_policy(model, {"blocks.0": pisa.DENSE, "layers.*": pisa.DENSE})
    assert sparsities(model) == [0.3, 0.3]


def test_set_policy_refuses_other_values() -> None:
    with pytest.raises(TypeError, match=r"'blocks\.0' must be a pisa\.Policy, got 0\.5"):
        pisa.set_policy(tiny(), {"blocks.0": 0.5})  # type: ignore[dict-item]


def test_policy_refuses_other_targets() -> None:
    with pytest.raises(TypeError, match="nn.Module class, an nn.Module instance or a function"):
        pisa.policy(sparsity=0.5)("blocks")


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"sparsity": 1.0}, ValueError),
        ({"sparsity": -0.1}, ValueError),
        ({"sparsity": float("nan")}, ValueError),
        ({"sparsity": True}, TypeError),
        ({"block_size": 65}, ValueError),
        ({"block_size": 64.0}, TypeError),
        ({"routing": "random"}, ValueError),
        ({"order": "second"}, ValueError),
        ({"exact": 5}, TypeError),
        ({"exact": (1, 2, 3)}, TypeError),
        ({"exact": (-1, 0)}, ValueError),
        ({"min_tokens": -1}, ValueError),
        ({"min_tokens": 1.5}, TypeError),
        ({"impl": "cuda"}, ValueError),
        ({"enabled": 0}, TypeError),
        ({"density": 0.5}, TypeError),
    ],
    ids=str,
)
def test_bad_policies_raise_when_built(fields: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        pisa.Policy(**fields)


def test_resolution_order() -> None:
    around = [
        Annotation("instance", {"sparsity": 0.1}),
        Annotation("class", {"sparsity": 0.2, "order": "none"}),
        Annotation("class", {"routing": "threshold"}),
    ]
    resolved = resolve(around, pisa.Policy(order="zeroth", block_size=32))
    assert resolved == dataclasses.replace(
        DEFAULT, sparsity=0.1, order="none", routing="threshold", block_size=32
    )
    assert resolve([], pisa.Policy()) == DEFAULT
