"""`compare`: what each of several policies does to a model's own result, and where it errs.

The error of the result says which policy to take; the error of each attention says where it comes
from. The two need not agree: a site may err much and matter little.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from ..kernels.testing import relative_l2
from ..ops.observation import OpCall, observed
from ..policies.policy import Policy
from ..report.compilation import check_not_compiled
from ..report.explain import Site, sites_of
from ..report.names import ModuleNames
from ..report.recording import recording
from ..report.tables import TOP_LEVEL, table_text
from .stand_ins import Generate, StandIns, call_model, flat

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Named = Mapping[str, Policy]
Settings = Policy | Named | str | os.PathLike[str]  # a policy, policies by module, or their file
_SITE_COLUMNS = ("module", "error", "worst head", "sparsity", "calls")
_COLUMNS = ("policy", "error", "cosine", "attention FLOPs saved", "sites", "worst site")
_WORST = 8


@dataclass(frozen=True)
class SiteError:
    """How far one attention is from dense attention on the inputs that it gets.

    Attributes:
        module: name of the module, as in `model.named_modules()` where it is known.
        error: relative L2 distance to dense attention, over all calls and heads.
        head_error: the same for every head.
        calls: how often it ran.
        policy: the policy in force there, every field resolved.
    """

    module: str
    error: float
    head_error: tuple[float, ...]
    calls: int
    policy: Policy


@dataclass(frozen=True)
class PolicyResult:
    """What one policy does.

    Attributes:
        name: of the policy.
        error: relative L2 distance of the model's result to the dense one, over all inputs; `inf`
            if any value of it is not finite.
        cosine: of the angle between the two.
        sites: the attention that is approximated, the largest error first.
        report: every attention, dense ones too, as in `pisa.Report.sites`.
    """

    name: str
    error: float
    cosine: float
    sites: tuple[SiteError, ...]
    report: tuple[Site, ...]

    @property
    def flops_saved(self) -> float:
        """Share of all attention FLOPs of the model that is saved."""
        dense = sum(site.dense_flops for site in self.report)
        return 1.0 - sum(site.flops for site in self.report) / dense if dense else 0.0

    @property
    def denser(self) -> dict[str, Policy]:
        """The sites to make denser first: at most half of them, with half of the squared error.

        Maps module names to policies with twice the density, for `pisa.set_policy`; empty where
        nothing is approximated.
        """
        total, held, found = sum(site.error**2 for site in self.sites), 0.0, {}
        for site in self.sites[: max(1, len(self.sites) // 2)]:
            if held >= total / 2:
                break
            held += site.error**2
            density = 1.0 - site.policy.steady_sparsity
            found[site.module] = Policy(sparsity=round(max(0.0, 1.0 - 2.0 * density), 6))
        return found

    def __str__(self) -> str:
        lines = [f"{self.name}: error {_number(self.error)}, cosine {self.cosine:.6f}"]
        rows = [
            (
                site.module or TOP_LEVEL,
                _number(site.error),
                f"{max(range(len(site.head_error)), key=site.head_error.__getitem__)}: "
                f"{_number(max(site.head_error))}",
                f"{site.policy.steady_sparsity:g}",
                str(site.calls),
            )
            for site in self.sites
        ]
        lines.append(table_text(_SITE_COLUMNS, rows))
        if self.denser:
            told = ", ".join(f"{n or TOP_LEVEL} to {p.sparsity:g}" for n, p in self.denser.items())
            lines.append(f"to make denser first, sparsity of: {told}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Comparison:
    """What `compare` found. Prints as a table; `results` is the same as data, in your order."""

    results: tuple[PolicyResult, ...]

    @property
    def best(self) -> PolicyResult:
        """The policy whose result is closest to the dense one."""
        return min(self.results, key=lambda result: result.error)

    def __getitem__(self, name: str) -> PolicyResult:
        for result in self.results:
            if result.name == name:
                return result
        raise KeyError(f"{name!r}; the policies are {[result.name for result in self.results]}")

    def __str__(self) -> str:
        return "\n\n".join([table_text(_COLUMNS, self._rows()), *map(str, self.results)])

    def _rows(self) -> Iterator[tuple[str, ...]]:
        for result in self.results:
            worst = result.sites[0] if result.sites else None
            yield (
                result.name,
                _number(result.error),
                f"{result.cosine:.6f}",
                f"{result.flops_saved:.0%}",
                f"{len(result.sites)} of {len(result.report)}",
                f"{worst.module or TOP_LEVEL} {_number(worst.error)}" if worst else "",
            )

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Draw the error of the result by policy, and the error of the worst sites by policy.

        Args:
            path: where to save it, if anywhere.

        Returns:
            A matplotlib figure.

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("plots need matplotlib: pip install 'pisa-compile[cli]'") from error
        names = [result.name for result in self.results]
        by_module = [{site.module: site.error for site in r.sites} for r in self.results]
        worst = sorted(
            {module for sites in by_module for module in sites},
            key=lambda module: -max(sites.get(module, 0.0) for sites in by_module),
        )[:_WORST]
        height = 1.4 + 0.42 * max(len(names), len(worst), 3)
        figure = Figure(figsize=(11.0, height), layout="constrained")
        ends, sites = figure.subplots(1, 2)
        finite = [math.isfinite(result.error) for result in self.results]
        errors = [r.error if ok else 0.0 for r, ok in zip(self.results, finite, strict=True)]
        bars = ends.barh(names, errors, color="#1565c0")
        ends.bar_label(bars, ["" if ok else " not finite" for ok in finite])
        ends.invert_yaxis()
        ends.set_xlabel("relative L2 error of the result")
        grid = [[sites_.get(module, float("nan")) for sites_ in by_module] for module in worst]
        sites.set_title("error of the worst sites")
        if grid:
            image = sites.imshow(grid, aspect="auto", cmap="magma_r", vmin=0.0)
            figure.colorbar(image, ax=sites)
        sites.set_yticks(range(len(worst)), [module or TOP_LEVEL for module in worst])
        sites.set_xticks(range(len(names)), names, rotation=20, ha="right")
        if path is not None:
            figure.savefig(path, dpi=110)
        return figure


def compare(
    model: nn.Module,
    inputs: Sequence[Any],
    *,
    policies: Sequence[Settings] | Mapping[str, Settings],
    generate: Generate | None = None,
) -> Comparison:
    """Run a model densely and with every policy, and measure the result and every attention.

    Args:
        model: not compiled. It is left as it is; policies on its modules are followed.
        inputs: a list of what the model is called with: a tensor, a tuple of arguments or a dict of
            keyword arguments each. Noise that a model draws itself has to be seeded in `generate`.
        policies: each a `Policy` for the whole model, a dict from module names to policies or the
            path of such a policy file. Give a dict to name them.
        generate: `generate(model, input)` returns a tensor or a structure with tensors: a whole
            sampling loop, say. By default one call of the model.

    Returns:
        A `Comparison`: `print`, `plot`, `best.denser`.

    Raises:
        TypeError, ValueError: an argument is not what is described above.
    """
    _check(model, inputs)
    named = policies if isinstance(policies, Mapping) else _names(policies)
    if not named:
        raise ValueError("policies is empty; give at least one")
    run = generate or call_model
    names = ModuleNames(model)
    with torch.no_grad(), StandIns(model) as stand_ins:
        dense = [flat(run(model, input_)) for input_ in inputs]
        return Comparison(
            tuple(
                _result(name, stand_ins.of(_options(settings)), names, inputs, run, dense)
                for name, settings in named.items()
            )
        )


def _check(model: nn.Module, inputs: Sequence[Any]) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    check_not_compiled(model)
    if isinstance(inputs, (Tensor, str, Mapping, tuple)) or not isinstance(inputs, Sequence):
        raise TypeError(
            f"inputs must be a list of inputs, got {type(inputs).__name__}; [x] for a single one"
        )
    if not inputs:
        raise ValueError("inputs is empty; give at least one")


def _names(policies: Sequence[Settings]) -> dict[str, Settings]:
    if isinstance(policies, (str, Policy)) or not isinstance(policies, Sequence):
        raise TypeError(
            f"policies must be a list or a dict of policies, got {type(policies).__name__}"
        )
    named: dict[str, Settings] = {}
    for number, settings in enumerate(policies):
        name = str(settings) if isinstance(settings, Policy) else f"policies {number}"
        if isinstance(settings, (str, os.PathLike)):
            name = os.fspath(settings)
        named[name if name not in named else f"{name} ({number})"] = settings
    return named


def _options(settings: Settings) -> dict[str, Any]:
    """What `torch.compile(options=...)` is told."""
    if isinstance(settings, Policy):
        return settings.given()
    return {"policy": os.fspath(settings) if isinstance(settings, os.PathLike) else settings}


def _result(
    name: str,
    compiled: Any,
    names: ModuleNames,
    inputs: Sequence[Any],
    run: Generate,
    dense: list[Tensor],
) -> PolicyResult:
    found: dict[str, _Sums] = {}

    def observe(call: OpCall) -> None:
        if call.site is not None:
            found.setdefault(names.of(call.site), _Sums(call.site.policy)).add(call)

    with observed(observe), recording() as active:
        results = [flat(run(compiled, input_)) for input_ in inputs]
    out, expected = torch.cat(results).double(), torch.cat(dense).double()
    return PolicyResult(
        name=name,
        error=relative_l2(out, expected),
        cosine=float(torch.cosine_similarity(out, expected, dim=0)),
        sites=tuple(
            sorted((sums.of(module) for module, sums in found.items()), key=lambda s: -s.error)
        ),
        report=sites_of(active.decisions, names),
    )


@dataclass
class _Sums:
    """Squared errors and signals of one site, per head, summed over calls."""

    policy: Policy
    error: Tensor | None = None
    signal: Tensor | None = None
    calls: int = field(default=0)

    def add(self, call: OpCall) -> None:
        mask = None if call.key_mask is None else call.key_mask[:, None, None]
        query, key, value = (x.to(torch.float32) for x in (call.query, call.key, call.value))
        dense = scaled_dot_product_attention(
            query, key, value, mask, scale=call.params.scale, enable_gqa=True
        )
        error, signal = (
            x.double().square().sum((0, 2, 3)).cpu() for x in (call.out.float() - dense, dense)
        )
        self.error = error if self.error is None else self.error + error
        self.signal = signal if self.signal is None else self.signal + signal
        self.calls += 1

    def of(self, module: str) -> SiteError:
        assert self.error is not None
        assert self.signal is not None
        heads = zip(self.error.sqrt(), self.signal.sqrt(), strict=True)
        return SiteError(
            module=module,
            error=_ratio(self.error.sum().sqrt(), self.signal.sum().sqrt()),
            head_error=tuple(_ratio(a, b) for a, b in heads),
            calls=self.calls,
            policy=self.policy,
        )


def _ratio(error: Tensor, signal: Tensor) -> float:
    return float(error / signal) if float(signal) else float(error)


def _number(value: float) -> str:
    return f"{value:.4g}"
