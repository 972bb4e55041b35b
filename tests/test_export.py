"""Programs of `torch.export`: rewritten, validated, saved and loaded."""

from __future__ import annotations

import io

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import pisa_compile as pisa
from pisa_compile.kernels.testing import relative_l2

from .models import tiny, tokens

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch's own

DENSE_ENOUGH = pisa.Policy(sparsity=0.0, min_tokens=0, impl="reference")
SPARSE = pisa.Policy(sparsity=0.5, min_tokens=0, impl="reference")


class Spelled(nn.Module):
    """Attention with a key-padding mask, written out, straight to the output."""

    def forward(self, q: Tensor, mask: Tensor) -> Tensor:
        scores = (q @ q.transpose(-1, -2) * 0.3).masked_fill(~mask[:, None, None], -torch.inf)
        return scores.softmax(-1) @ q


class Merged(nn.Module):
    """Heads merged into the batch, and an encoder layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = x.unflatten(-1, (2, 16)).transpose(1, 2).flatten(0, 1)
        y = torch.bmm(torch.bmm(y, y.mT).softmax(-1), y)
        return self.layer(y.unflatten(0, (-1, 2)).transpose(1, 2).flatten(2))


def export(model: nn.Module, *inputs: Tensor, dynamic: bool = False) -> ExportedProgram:
    shapes = tuple({1: Dim("tokens", min=32, max=4096)} for _ in inputs) if dynamic else None
    with torch.no_grad():
        return torch.export.export(model.eval(), inputs, dynamic_shapes=shapes)


def sites(program: ExportedProgram) -> int:
    return len(
        program.graph.find_nodes(op="call_function", target=torch.ops.pisa.attention.default)
    )


def saved_and_loaded(program: ExportedProgram) -> ExportedProgram:
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    return torch.export.load(buffer)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_program_is_replaced_saved_and_loaded(dynamic: bool) -> None:
    model, x = tiny().eval(), tokens(100)
    program = pisa.rewrite(export(model, x, dynamic=dynamic), DENSE_ENOUGH)
    assert sites(program) == 2
    loaded = saved_and_loaded(program)
    for count in (100, 77) if dynamic else (100,):
        x = tokens(count)
        with torch.no_grad():
            assert relative_l2(loaded.module()(x), model(x)) < 1e-5


@pytest.mark.parametrize(
    ("model", "inputs", "expected"),
    [
        (Spelled(), (torch.randn(2, 3, 40, 8), torch.rand(2, 40) > 0.3), 1),
        (Merged(), (torch.randn(2, 40, 32),), 2),
        (nn.MultiheadAttention(32, 4, batch_first=True), (torch.randn(2, 40, 32),) * 3, 0),
    ],
    ids=["spelled", "merged", "weights_returned"],
)
def test_other_spellings(model: nn.Module, inputs: tuple[Tensor, ...], expected: int) -> None:
    program = pisa.rewrite(export(model, *inputs), DENSE_ENOUGH)
    assert sites(program) == expected
    with torch.no_grad():
        out = saved_and_loaded(program).module()(*inputs)
        torch.testing.assert_close(out, model(*inputs), rtol=1e-4, atol=1e-5)


def test_original_stays_as_it_is_and_sparsity_takes_effect() -> None:
    model, x = tiny().eval(), tokens(256)
    program = export(model, x)
    sparse = pisa.rewrite(program, SPARSE)
    assert (sites(program), sites(sparse)) == (0, 2)
    with torch.no_grad():
        assert relative_l2(program.module()(x), model(x)) < 1e-6
        assert 1e-4 < relative_l2(sparse.module()(x), model(x)) < 1.0


def test_decompositions_keep_the_op() -> None:
    model, x = tiny().eval(), tokens(64)
    program = pisa.rewrite(export(model, x), DENSE_ENOUGH).run_decompositions()
    assert sites(program) == 2
    with torch.no_grad():
        assert relative_l2(program.module()(x), model(x)) < 1e-5


@pytest.mark.parametrize("strict", [False, True])
def test_policies_on_modules_are_followed(strict: bool) -> None:
    model, x = tiny().eval(), tokens(64)
    pisa.set_policy(model, {"blocks.1": pisa.DENSE})
    with torch.no_grad():
        program = torch.export.export(model, (x,), strict=strict)
    assert sites(pisa.rewrite(program, DENSE_ENOUGH)) == 1


def test_default_policy_keeps_short_programs_dense() -> None:
    model, x = tiny().eval(), tokens(64)
    assert sites(pisa.rewrite(export(model, x))) == 0


def test_plain_modules_are_refused() -> None:
    with pytest.raises(TypeError, match="backend='pisa'"):
        pisa.rewrite(tiny())  # type: ignore[arg-type]


def test_written_out_functional_is_exported_as_the_op() -> None:
    class Sparse(nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            return pisa.attention(q, q, q, sparsity=0.0, impl="reference")

    q = torch.randn(1, 2, 40, 8)
    program = pisa.rewrite(export(Sparse(), q), DENSE_ENOUGH)
    torch.testing.assert_close(program.module()(q), F.scaled_dot_product_attention(q, q, q))
