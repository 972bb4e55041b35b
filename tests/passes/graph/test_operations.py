"""The vocabulary of operations: every view that torch has, in every place around attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from pisa_compile.kernels.testing import relative_l2
from pisa_compile.passes import Decision
from pisa_compile.passes.graph.operations import is_fresh
from pisa_compile.report.recording import recording

View = Callable[[Tensor], Tensor]
OPTIONS = {"sparsity": 0.0, "min_tokens": 1, "block_size": 16, "inner": "eager", "preset": None}

# A tensor of rank four through the operation, and back to its own shape.
VIEWS: dict[str, View] = {
    "adjoint": lambda x: x.adjoint().adjoint(),
    "alias": torch.ops.aten.alias.default,
    "as_strided": lambda x: x.as_strided(x.shape, x.stride()),
    "broadcast_to": lambda x: torch.broadcast_to(x[None], (1, *x.shape))[0],
    "chunk": lambda x: x.chunk(1, dim=1)[0],
    "conj": lambda x: x.conj(),
    "contiguous": lambda x: x.contiguous(),
    "detach": lambda x: x.detach(),
    "diagonal": lambda x: x[None, None].diagonal(0, 0, 1).movedim(-1, 0)[0],
    "dsplit": lambda x: torch.cat(x.dsplit([7]), dim=2),
    "expand": lambda x: x.expand(*x.shape),
    "expand_as": lambda x: x[:1].expand_as(x) if x.shape[0] == 1 else x.expand_as(x),
    "flatten": lambda x: x.flatten(0, 1).unflatten(0, x.shape[:2]),
    "hsplit": lambda x: x.hsplit(1)[0],
    "linalg_diagonal": lambda x: torch.linalg.diagonal(x[..., None, None])[..., 0],
    "mH": lambda x: x.mH.mH,
    "mT": lambda x: x.mT.mT,
    "matrix_H": lambda x: torch.stack([m.H.H for m in x.flatten(0, 1)]).view(x.shape),
    "moveaxis": lambda x: torch.moveaxis(torch.moveaxis(x, 1, 2), 2, 1),
    "movedim": lambda x: x.movedim((1, 2), (3, 1)).movedim((3, 1), (1, 2)),
    "narrow": lambda x: x.narrow(2, 0, x.shape[2]),
    "numpy_T": lambda x: torch.stack([m.T.T for m in x.flatten(0, 1)]).view(x.shape),
    "permute": lambda x: x.permute(2, 0, 3, 1).permute(1, 3, 0, 2),
    "positive": lambda x: +x,
    "ravel": lambda x: x.ravel().view(x.shape),
    "real": lambda x: x.real,
    "reshape": lambda x: x.reshape(-1, *x.shape[2:]).reshape(x.shape),
    "reshape_as": lambda x: x.flatten(0, 1).reshape_as(x),
    "resolve_conj": lambda x: x.resolve_conj(),
    "resolve_neg": lambda x: x.resolve_neg(),
    "select": lambda x: x[None].select(0, 0),
    "slice": lambda x: x[:, :, :, : x.shape[3]],
    "split": lambda x: torch.cat(x.split(1, dim=1), dim=1),
    "split_with_sizes": lambda x: torch.cat(x.split([1, 1], dim=1), dim=1),
    "squeeze": lambda x: x[:, :, None].squeeze(2),
    "swapaxes": lambda x: x.swapaxes(1, 2).swapaxes(2, 1),
    "swapdims": lambda x: x.swapdims(1, 2).swapdims(2, 1),
    "t": lambda x: torch.stack([m.t().t() for m in x.flatten(0, 1)]).view(x.shape),
    "tensor_split": lambda x: torch.cat(x.tensor_split(2, dim=1), dim=1),
    "to": lambda x: x.to(torch.float32),
    "transpose": lambda x: x.transpose(1, 2).transpose(1, 2),
    "unbind": lambda x: torch.stack(x.unbind(1), dim=1),
    "unflatten": lambda x: x.unflatten(2, (-1, 10)).flatten(2, 3),
    "unfold": lambda x: x.unfold(2, x.shape[2], 1)[:, :, 0].transpose(2, 3),
    "unsqueeze": lambda x: x.unsqueeze(1).squeeze(1),
    "view": lambda x: x.view(x.shape),
    "view_as": lambda x: x.view_as(x),
    "view_as_complex": lambda x: torch.view_as_real(
        torch.view_as_complex(x.unflatten(3, (-1, 2)).contiguous())
    ).flatten(3),
    "view_as_real": lambda x: torch.view_as_real(torch.complex(x, x))[..., 0],
    "vsplit": lambda x: x.vsplit(1)[0],
    # Not in the schemas, or under other names there:
    ".data": lambda x: x.data,
    "atleast_1d": torch.atleast_1d,
    "atleast_3d": torch.atleast_3d,
    "broadcast_tensors": lambda x: torch.broadcast_tensors(x, x[:1])[0],
    "cpu": lambda x: x.cpu(),
    "dropout": lambda x: F.dropout(x, 0.5, training=False),
    "einsum": lambda x: torch.einsum("bhtd->bhtd", x),
    "type_as": lambda x: x.type_as(x),
    "unsafe_chunk": lambda x: x.unsafe_chunk(1, 1)[0],
    "unsafe_split": lambda x: x.unsafe_split(2, 1)[0],
}
# Views that take no dense tensor of real numbers, or no node of a graph.
NOT_FOR_DENSE = {
    *("_indices", "_values", "indices", "values", "coalesce", "ccol_indices", "col_indices"),
    *("crow_indices", "row_indices", "_sparse_broadcast_to"),  # sparse
    *("_nested_get_values", "_nested_view_from_buffer", "_nested_view_from_jagged"),  # nested
    *("_fw_primal", "_make_dual", "_unpack_dual"),  # of forward-mode derivatives
    *("_conj", "_neg_view", "imag"),  # complex
    *("_autocast_to_full_precision", "_autocast_to_reduced_precision"),  # of TorchScript
    *("_reshape_alias", "slice_inverse", "lift_fresh", "pin_memory"),  # inserted by torch alone
    "_test_autograd_multiple_dispatch_view",
}
# What nobody would follow a token through; the attention stays dense, with a reason.
PLACES = ("query", "key", "value", "scores", "weights", "result")


def unchanged(x: Tensor) -> Tensor:
    return x


def attention(view: View, place: str, by_hand: bool) -> Callable[..., Tensor]:
    at = {name: view if name == place else unchanged for name in PLACES}

    def function(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # Tensors of the graph's own, as they are in models.
        query, key, value = (
            at[name](x * 1.5) for name, x in (("query", query), ("key", key), ("value", value))
        )
        if not by_hand:
            return at["result"](F.scaled_dot_product_attention(query, key, value)) + 1
        scores = at["scores"](query @ key.transpose(-2, -1) * 0.3)
        return at["result"](at["weights"](scores.softmax(-1)) @ value) + 1

    return function


def inputs(tokens: int = 20) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 2, tokens, 20, generator=generator) for _ in range(3)]


def decisions_on(function: Callable[..., Tensor], *args: Any) -> tuple[Tensor, list[Decision]]:
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="pisa", options=OPTIONS, fullgraph=True)
    with torch.no_grad(), recording() as active:
        out = compiled(*args)
    return out, active.decisions


@pytest.mark.parametrize("name", VIEWS)
def test_attention_behind_a_view_is_found_or_refused_with_a_reason(name: str) -> None:
    for by_hand in (False, True):
        for place in PLACES:
            if not by_hand and place in ("scores", "weights"):
                continue
            function = attention(VIEWS[name], place, by_hand)
            out, decisions = decisions_on(function, *inputs())
            where = f"{name} on {place}{' by hand' if by_hand else ''}"
            assert relative_l2(out, function(*inputs())) < 1e-5, where
            assert len(decisions) == 1, where
            assert decisions[0].replaced or len(decisions[0].reason) > 10, where


def test_no_view_of_torch_is_forgotten() -> None:
    found = set()
    for operator in torch._C._dispatch_get_all_op_names():
        space, _, name = operator.partition("::")
        packet = getattr(torch.ops.aten, name.partition(".")[0], None) if space == "aten" else None
        for overload in () if packet is None else packet.overloads():
            schema = getattr(packet, overload)._schema
            writes = any(x.alias_info and x.alias_info.is_write for x in schema.arguments)
            if not writes and any(result.alias_info for result in schema.returns):
                found.add(name.partition(".")[0])
    assert found - VIEWS.keys() - NOT_FOR_DENSE == set()


def test_what_torch_calls_a_view_is_never_fresh() -> None:
    for name in VIEWS.keys() - {"positive", "conj", "real"}:
        assert not is_fresh(name), name
