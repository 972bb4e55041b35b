"""Heads and weights spread over ranks: tensor parallelism, FSDP, policies per rank."""

from __future__ import annotations

import os
from typing import Any
from unittest import mock

import torch
import torch._dynamo.backends.debugging
import torch._functorch.aot_autograd
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import pisa_compile as pisa
from pisa_compile import cost
from pisa_compile.distributed import policies_of_rank
from pisa_compile.passes.judge.rules import Candidate, Operand, least_tokens
from pisa_compile.policies.policy import DEFAULT

from .shared import (
    HEADS,
    OPTIONS,
    SPARSITY,
    close,
    compiled,
    counted_op,
    different,
    from_rank_zero,
    run,
    scenario,
    small,
    ulysses,
)


class Attention(nn.Module):
    """With separate projections, as tensor parallelism wants them."""

    def __init__(self, width: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.to_q, self.to_k, self.to_v)
        )
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int = 64, head_dim: int = 16) -> None:
        super().__init__()
        self.attn = Attention(width, head_dim)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        return x + self.down(F.gelu(self.up(x)))


class Transformer(nn.Module):
    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(depth)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def transformer() -> Transformer:
    torch.manual_seed(0)
    model = Transformer().eval().requires_grad_(False)
    for block in model.blocks:
        block.attn.to_q.weight.mul_(4.0)
        block.attn.to_k.weight.mul_(4.0)
    return model


def expectations(rank: int, x: Tensor) -> dict[float, Tensor]:
    """Dense and sparse result of one process for the small transformer, by sparsity."""

    def make() -> dict[float, Tensor]:
        results = {0.0: transformer()(x), SPARSITY: compiled(transformer(), sparsity=SPARSITY)(x)}
        different(results[SPARSITY], results[0.0])
        return results

    results: dict[float, Tensor] = from_rank_zero(rank, make)
    return results


@scenario
def lengths_are_the_same_on_every_rank(rank: int, ranks: int) -> None:
    """However fast each of them is just now."""
    with mock.patch.dict(os.environ):
        del os.environ["PISA_COST_MODEL"]
        assert cost.profile_of(torch.device("cpu"), torch.float32, 64, 64) is None
        operand = Operand((1, 2, 512, 64), torch.float32, torch.device("cpu"))
        candidate = Candidate(operand, operand, operand, torch.float32)
        least, _ = least_tokens(candidate, pisa.Policy(sparsity=0.9).over(DEFAULT))
    found = [torch.empty(1, dtype=torch.long) for _ in range(ranks)]
    dist.all_gather(found, torch.tensor([least]))
    assert {int(length) for length in found} == {least}


@scenario
def tensor_parallel(rank: int, ranks: int) -> None:
    """`parallelize_module`: every rank has some of the heads, as DTensors."""
    x = torch.randn(1, 250, 64, generator=torch.Generator().manual_seed(1))
    plan = {
        **dict.fromkeys(("attn.to_q", "attn.to_k", "attn.to_v", "up"), ColwiseParallel()),
        **dict.fromkeys(("attn.to_out", "down"), RowwiseParallel()),
    }
    mesh = init_device_mesh("cpu", (ranks,))
    for sparsity, expected in expectations(rank, x).items():
        model = transformer()
        for block in model.blocks:
            parallelize_module(block, mesh, plan)
        with counted_op() as shapes:
            close(compiled(model, sparsity=sparsity)(x), expected)
        assert shapes == [(1, HEADS // ranks, 250, 16)] * 2, shapes


@scenario
def fully_sharded(rank: int, ranks: int) -> None:
    """FSDP2: every rank has some rows of every weight, and a sample of its own."""
    x = torch.randn(ranks, 250, 64, generator=torch.Generator().manual_seed(1))
    mesh = init_device_mesh("cpu", (ranks,))
    for sparsity, expected in expectations(rank, x).items():
        torch._dynamo.reset()
        model: Any = transformer()
        whole = model.blocks[0].up.weight.numel()
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        assert model.blocks[0].up.weight.to_local().numel() * ranks == whole
        for module in model.blocks if sparsity else [model]:  # by block, and as a whole
            module.compile(backend="pisa", options={**OPTIONS, "sparsity": sparsity})
        with counted_op() as shapes:
            close(model(x[rank : rank + 1]), expected[rank : rank + 1])
        assert shapes == [(1, HEADS, 250, 16)] * 2, shapes


@scenario
def policies_on_every_rank(rank: int, ranks: int) -> None:
    """A policy file holds on every rank: also inside hooks, and for the heads that a rank has."""
    case = small("WanTransformer3DModel", num_layers=2)
    listed = pisa.Schedule(steps=[[0.2, 0.4, 0.6, 0.8]])
    policies = {"blocks.0": pisa.DENSE, "blocks.1": pisa.Policy(schedule=listed)}

    def expected_result() -> Tensor:
        model = case.build()
        pisa.set_policy(model, policies)
        return run(compiled(model), case)

    expected = from_rank_zero(rank, expected_result)
    torch._dynamo.reset()
    with ulysses(case.build(), ranks) as model, counted_op() as shapes:
        pisa.set_policy(model, policies_of_rank(policies))
        model.compile_repeated_blocks(backend="pisa", options=OPTIONS)
        close(run(model, case), expected)
    assert len(shapes) == 1, shapes
