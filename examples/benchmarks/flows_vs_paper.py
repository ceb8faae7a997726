"""Continuous against planar normalizing flows: section 4 of Chen et al. 2018 (arXiv:1806.07366).

The paper's claims: a continuous flow of M hidden units does better than a planar normalizing flow of K = M layers, in
density matching (its figure 4) and by maximum likelihood on two circles and two moons, 64 units or layers (figure 5).

Maximum likelihood: n rows of the generator; the gap is the mean of log p - log q over fresh rows, p by quadrature. The
planar flow is trained from the data to the base, its cheap direction, with the learning rate of the grid that does best
on held-out rows after a sixth of the updates. The continuous flows are ContinuousFlowDensity by its parameters.

Density matching: KL(q || p), p = exp(-U) / Z for potentials of Rezende & Mohamed 2015 (table 1); Z is found by
quadrature, so that the KL told is true, on fresh points. Potentials 2 to 4 have infinite mass and are given walls at
abs(z_1) = 4. All are trained by Adam with the same schedule and annealing, each with its learning rates of RATES
(searched by ``--rates`` on potential 1 and a seed of its own).

    python examples/benchmarks/flows_vs_paper.py [--quick] [--only likelihood matching] [--rates] [--figures]
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from planar_flow import POTENTIALS, PlanarFlow, Toy, grid, log_normal, log_partition, toys
from torch import Tensor, nn

from skode import ContinuousFlowDensity
from skode.fields import FlowField, PlanarField
from skode.solver import solve

Array = NDArray[np.float64]
PAPER = "CNF, planar"
PAPERS = {"net": "planar", "hidden_layer_sizes": 64, "objective": "likelihood", "base": "normal"}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    f"{PAPER}, 64 units, likelihood": PAPERS | {"learning_rate_init": 0.05, "max_iter": 800},
    "CNF, default net, normal base": {"base": "normal", "max_iter": 400},
    "ContinuousFlowDensity() as it is": {},
}
GRID = (2e-3, 5e-3, 1e-2, 2e-2)  # learning rates of the planar flow, by likelihood
SIZES = (2, 8, 32)  # M and K
TARGETS = ("1", "3", "4")
RATES = {  # for each size
    "NF": (3e-2, 3e-2, 1e-2),
    PAPER: (3e-3, 3e-3, 3e-3),
    "CNF, perceptron": (3e-2, 3e-2, 1e-2),
}


class Effort(NamedTuple):
    """How much to do."""

    n_rows: int
    n_test: int
    share: float  # of the estimators' max_iter
    nf_likelihood: int
    updates: dict[str, int]
    n_seeds: int
    n_fresh: int


FULL = Effort(10_000, 5_000, 1.0, 12_000, {"NF": 4000, PAPER: 1200, "CNF, perceptron": 1000}, 3, 20_000)
QUICK = Effort(1_000, 500, 0.1, 600, {"NF": 150, PAPER: 30, "CNF, perceptron": 40}, 1, 2_000)


def _schedule(optimizer: torch.optim.Optimizer, n: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Constant for half of the updates, then falling to 0, after a short warm-up."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: min((k + 1) / 20, 1.0, 2 * (1 - k / n)))


def _descend(parts: list[nn.Parameter], rate: float, n: int, loss_of: Callable[[int], Tensor]) -> None:
    optimizer = torch.optim.Adam(parts, rate, fused=True)
    schedule = _schedule(optimizer, n)
    for k in range(n):
        optimizer.zero_grad()
        loss_of(k).backward()
        nn.utils.clip_grad_norm_(parts, 5.0)
        optimizer.step()
        schedule.step()


# --- maximum likelihood ---


class FittedPlanar(NamedTuple):
    """A planar flow from standardised rows to N(0, I)."""

    flow: PlanarFlow
    loc: Array
    scale: Array
    rate: float

    @torch.no_grad()
    def log_density(self, X: Array) -> Array:
        """In nats and the units of X."""
        z, log_det = self.flow(torch.from_numpy((X - self.loc) / self.scale))
        found: Array = (log_normal(z) + log_det).numpy() - np.log(self.scale).sum()
        return found


def fit_planar(X: Array, n_updates: int, seed: int, n_layers: int = 64) -> FittedPlanar:
    """By maximum likelihood, at the rate that does best on a tenth of the rows."""
    loc, scale = X.mean(0), X.std(0)
    held, rest = X[: len(X) // 10], X[len(X) // 10 :]
    Z = torch.from_numpy((rest - loc) / scale).float()

    def train(rate: float, n: int) -> FittedPlanar:
        generator = torch.Generator().manual_seed(seed)
        flow = PlanarFlow(n_layers, generator)

        def loss(k: int) -> Tensor:
            z, log_det = flow(Z[torch.randint(len(Z), (512,), generator=generator)])
            return -(log_normal(z) + log_det).mean()

        _descend(list(flow.parameters()), rate, n, loss)
        return FittedPlanar(flow.double(), loc, scale, rate)

    def score(fitted: FittedPlanar) -> float:
        mean = float(fitted.log_density(held).mean())
        return mean if math.isfinite(mean) else -math.inf

    tried = sorted((train(rate, n_updates // 6) for rate in GRID), key=score, reverse=True)
    for short in tried:
        fitted = train(short.rate, n_updates)
        if score(fitted) >= score(short):  # else the rate was too high for a long run
            return fitted
    return tried[0]


def fit_all(toy: Toy, effort: Effort, seed: int) -> dict[str, tuple[Any, int, float]]:
    """By name: what was fitted, its updates, processor seconds."""
    X, start = toy.draw(effort.n_rows, seed), time.process_time()
    fitted = fit_planar(X, effort.nf_likelihood, seed)
    name = f"planar NF, 64 layers, rate {fitted.rate:g}"
    found: dict[str, tuple[Any, int, float]] = {name: (fitted, effort.nf_likelihood, time.process_time() - start)}
    for name, parameters in CONFIGURATIONS.items():
        start = time.process_time()
        max_iter = max(1, round(effort.share * parameters.get("max_iter", 200)))
        density = ContinuousFlowDensity(random_state=seed).set_params(**parameters | {"max_iter": max_iter}).fit(X)
        found[name] = (density, density.n_iter_, time.process_time() - start)
    return found


def likelihood(effort: Effort, seed: int = 0) -> dict[str, dict[str, tuple[Any, int, float]]]:
    """Fit all to both toys, print the table and return what was fitted."""
    print(f"\n### Maximum likelihood, {effort.n_rows:,} rows, gap on {effort.n_test:,} fresh ones\n")
    print("| data | model | gap, nat | s.e. | updates | fit, CPU s |")
    print("|---" * 6 + "|")
    kept, masses = {}, []
    for data, toy in toys().items():
        fresh = toy.draw(effort.n_test, 10_000 + seed)
        true = toy.log_density(fresh)
        masses.append(f"{data} {np.exp(toy.log_density(grid(-3, 4, 500).numpy())).sum() * (7 / 500) ** 2:.8f}")
        kept[data] = fit_all(toy, effort, seed)
        for name, (model, updates, seconds) in kept[data].items():
            known = model.log_density if isinstance(model, FittedPlanar) else model.score_samples
            gaps = true - known(fresh)
            error = gaps.std(ddof=1) / math.sqrt(len(gaps))
            print(f"| {data} | {name} | {gaps.mean():.4f} | {error:.4f} | {updates:,} | {seconds:.0f} |", flush=True)
    print(f"\nMass of the true densities on a grid: {', '.join(masses)}.")
    return kept


# --- density matching ---


def make(kind: str, size: int, generator: torch.Generator) -> nn.Module:
    """A flow with ``size`` layers or hidden units."""
    if kind == "NF":
        return PlanarFlow(size, generator)
    if kind == PAPER:
        return PlanarField(2, size, generator=generator)
    return FlowField(2, (size,), zero_output=True, generator=generator)


class Pushed(NamedTuple):
    """Points of the base carried on, their log-determinants, squared solver errors, the next first step."""

    y: Tensor
    log_det: Tensor
    error: Tensor | float
    next_step: float | None


def push(flow: nn.Module, z: Tensor, first_step: float | None = None, tight: bool = False) -> Pushed:
    """All rows take the steps of the batch: the planar field is then computed once a stage, not once a row."""
    if isinstance(flow, PlanarFlow):
        return Pushed(*flow(z), 0.0, None)
    assert isinstance(flow, PlanarField | FlowField)
    solution = solve(
        flow.dynamics(),
        z,
        [0.0, 1.0],
        method="dopri5" if tight else "bosh3",
        rtol=1e-6 if tight else 1e-2,
        atol=1e-7 if tight else 1e-3,
        step_control="batch",
        n_quadratures=1,
        error_estimate=not tight,
        first_step=first_step,
    )
    if not solution.success:
        raise RuntimeError(f"a flow could not be solved: {solution.failures()}")
    assert solution.quadratures is not None
    error = 0.0 if tight or solution.error_estimate is None else solution.error_estimate
    return Pushed(solution.y1, solution.quadratures[:, -1, 0], error, min(solution.next_step, 1.0))


def match(kind: str, size: int, target: str, rate: float, n: int, seed: int) -> nn.Module:
    """Minimise KL(q || p) from the base, the potential's weight rising from 0.01 to 1 in two fifths of the updates."""
    generator = torch.Generator().manual_seed(seed)
    flow, potential = make(kind, size, generator), POTENTIALS[target]
    first: list[float | None] = [None]

    def loss(k: int) -> Tensor:
        z = torch.randn(256, 2, generator=generator)
        found = push(flow, z, first[0])
        first[0] = found.next_step
        weight = min(1.0, 0.01 + k / (0.4 * n))
        # The penalty keeps a continuous flow from living on its solver's errors.
        return (log_normal(z) - found.log_det + weight * potential(found.y) + 1e-3 * found.error).mean()

    _descend(list(flow.parameters()), rate, n, loss)
    return flow.double()


@torch.no_grad()
def divergence(flow: nn.Module, target: str, n: int) -> float:
    """KL(q || p) in nats, on fresh points."""
    z = torch.randn(n, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(999))
    found = push(flow, z, tight=True)
    log_q = log_normal(z) - found.log_det
    return float((log_q + POTENTIALS[target](found.y)).mean()) + log_partition(POTENTIALS[target])


def n_parameters(module: nn.Module) -> int:
    """Trained numbers."""
    return sum(parameter.numel() for parameter in module.parameters())


def matching(effort: Effort) -> dict[tuple[str, str, int], nn.Module]:
    """Print the table; return the flows of the median seeds."""
    print(f"\n### Density matching: KL(q || p) in nats, median of {effort.n_seeds} seeds (lowest, highest)\n")
    print("| potential | flow | " + " | ".join(f"M = K = {size}" for size in SIZES) + " | CPU s a fit |")
    print("|---" * (3 + len(SIZES)) + "|")
    kept = {}
    for target in TARGETS:
        for kind, rates in RATES.items():
            cells, start = [], time.process_time()
            for size, rate in zip(SIZES, rates, strict=True):
                flows = [match(kind, size, target, rate, effort.updates[kind], s) for s in range(effort.n_seeds)]
                ranked = sorted((divergence(flow, target, effort.n_fresh), i) for i, flow in enumerate(flows))
                value, i = ranked[len(ranked) // 2]
                kept[target, kind, size] = flows[i]
                cells.append(f"{value:.3f} ({ranked[0][0]:.3f}, {ranked[-1][0]:.3f})")
            seconds = (time.process_time() - start) / len(SIZES) / effort.n_seeds
            print(f"| {target} | {kind} | " + " | ".join(cells) + f" | {seconds:.0f} |", flush=True)
    told = ", ".join(
        f"{kind} {' '.join(str(n_parameters(kept[TARGETS[0], kind, size])) for size in SIZES)}" for kind in RATES
    )
    print(f"\nUpdates {effort.updates}; rates {RATES}; trained numbers by size: {told}.")
    return kept


def search_rates(effort: Effort, target: str = "1") -> None:
    """Print the KL of a seed of its own for a grid of learning rates."""
    print("\n### Learning rates in density matching\n\n| flow | rate | " + " | ".join(map(str, SIZES)) + " |")
    print("|---" * (2 + len(SIZES)) + "|")
    for kind in RATES:
        for rate in (3e-3, 1e-2, 3e-2):
            flows = [match(kind, size, target, rate, effort.updates[kind], 100) for size in SIZES]
            cells = [f"{divergence(flow, target, effort.n_fresh):.3f}" for flow in flows]
            print(f"| {kind} | {rate:g} | " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    """Parse arguments and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a minute's run, its numbers mean nothing")
    parser.add_argument("--only", nargs="+", choices=["likelihood", "matching"], default=["likelihood", "matching"])
    parser.add_argument("--rates", action="store_true", help="only search the learning rates of density matching")
    parser.add_argument("--figures", action="store_true", help="write docs/figures/flows_*.png")
    options = parser.parse_args()
    torch.set_num_threads(1)
    effort = QUICK if options.quick else FULL
    if options.rates:
        search_rates(effort)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if options.quick else "default")
        fitted = likelihood(effort) if "likelihood" in options.only else None
        matched = matching(effort) if "matching" in options.only else None
    if options.figures:
        from flows_figures import draw_likelihood, draw_matching

        if fitted is not None:
            for data, models in fitted.items():
                planar, paper, *_ = (model for model, _, _ in models.values())
                draw_likelihood(data, toys()[data], paper, planar)
        if matched is not None:
            draw_matching(matched, {"NF": "NF, K", PAPER: "CNF, M"}, TARGETS, SIZES)


if __name__ == "__main__":
    main()
