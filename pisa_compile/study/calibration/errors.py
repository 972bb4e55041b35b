"""How far each density moves the output of each attention, measured while the model runs densely.

Query, key and value are used where they occur and never kept, so memory is bounded by one call.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ...cost import Workload
from ...ops import dispatch
from ...ops.observation import OpCall, observed
from ...policies.policy import Policy
from ...report.names import ModuleNames
from ...steps.clock import current_step


@dataclass
class SiteErrors:
    """One site's squared errors, summed over calls.

    Attributes:
        work: sizes of a call.
        error: per step [candidates, H], squared distance to dense attention.
        signal: per step [H], squared norm of the dense output.
        calls: per step, how often the site ran.
    """

    work: Workload
    dtype: torch.dtype
    device: torch.device
    error: dict[int, Tensor] = field(default_factory=dict)
    signal: dict[int, Tensor] = field(default_factory=dict)
    calls: dict[int, int] = field(default_factory=dict)

    def relative(self, step: int) -> Tensor:
        """Squared error as a part of the whole output's squared norm. [candidates, H]"""
        return self.error[step] / self.signal[step].sum().clamp(min=1e-30)


@dataclass
class ErrorTable:
    """The sites by module name, and the densities that were tried."""

    densities: tuple[float, ...]
    sites: dict[str, SiteErrors] = field(default_factory=dict)
    steps: int = 1


@contextmanager
def measuring(table: ErrorTable, model: nn.Module, base: Policy) -> Iterator[None]:
    """Fill `table` from every dense call of the op inside.

    Args:
        model: names the sites.
        base: a resolved policy, which says how what is not exact is approximated.
    """
    names = ModuleNames(model)

    @torch.no_grad()
    def observe(call: OpCall) -> None:
        if call.site is None or call.params.sparsity != 0 or call.density is not None:
            return  # a site with a policy of its own
        step = current_step()
        index = 0 if step is None else step.index
        count = None if step is None else step.count
        table.steps = max(table.steps, index + 1, count or 1)
        _add(table, names.of(call.site), index, call, base)

    with observed(observe):
        yield


def _add(table: ErrorTable, name: str, step: int, call: OpCall, base: Policy) -> None:
    batch, heads, tokens, head_dim = call.query.shape
    site = table.sites.get(name)
    if site is None:
        settings = replace(base.settings(), exact=call.params.exact)
        work = Workload(
            batch, heads, call.key.shape[1], tokens, head_dim, call.value.shape[3], settings
        )
        site = table.sites[name] = SiteErrors(work, call.query.dtype, call.query.device)
    if step not in site.error:
        site.error[step] = torch.zeros(len(table.densities), heads, dtype=torch.float64)
        site.signal[step] = torch.zeros(heads, dtype=torch.float64)
        site.calls[step] = 0
    site.calls[step] += 1
    dense = call.out.to(torch.float32)
    site.signal[step] += _energy(dense)
    for index, density in enumerate(table.densities):
        settings = replace(site.work.settings, sparsity=1.0 - density)
        params = settings.scaled(call.params.scale)
        out, _ = dispatch.attention(
            call.query, call.key, call.value, call.key_mask, params, permutation=call.permutation
        )
        site.error[step][index] += _energy(out.to(torch.float32) - dense)


def _energy(x: Tensor) -> Tensor:
    """Sum of squares per head of [B, H, T, E], on the host. [H]"""
    return x.square().sum(dim=(0, 2, 3), dtype=torch.float64).cpu()
