"""The contestants of the density benchmark: scikit-learn's densities, zuko's flows and an FFJORD-like flow.

Each is a function (training rows, seed, configuration) that returns a function from rows to log-densities; rows are
standardised. Packages of flows have no trainer: ``train`` is one for all of zuko's (AdamW, cosine decay, averaged
weights, early stopping on 15 % of the training rows, best weights restored). Needs zuko and torchdiffeq.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import GridSearchCV, KFold
from sklearn.neighbors import KernelDensity
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

Array = np.ndarray
LogDensity = Callable[[Array], Array]
HELD_OUT = 0.15


class Fitted(NamedTuple):
    """A fitted density, its held-out log-likelihood (nan where none is needed) and what it chose, in words."""

    score_samples: LogDensity
    validation: float
    chosen: str


# --- scikit-learn ---


def kernel_density(X: Array, seed: int, config: dict[str, Any]) -> Fitted:
    """Gaussian kernels; bandwidth by 5-fold cross-validation on a coarse and then a fine grid."""
    folds = KFold(5, shuffle=True, random_state=seed)
    grid = np.geomspace(0.02, 2.0, 14)
    for _ in range(2):
        search = GridSearchCV(KernelDensity(rtol=1e-4), {"bandwidth": grid}, cv=folds, refit=False).fit(X)
        best = search.best_params_["bandwidth"]
        grid = best * np.geomspace(0.75, 1.33, 7)
    model = KernelDensity(bandwidth=best).fit(X)
    return Fitted(model.score_samples, float("nan"), f"bandwidth {best:.3f}")


SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48)
ADDED = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1)  # to the variances of standardised columns
# Folds and starts of the search by the numbers in the table; small tables are searched more thoroughly.
SEARCHES = {3_000: (5, 3), 10_000: (3, 2), 10**9: (3, 1)}


def _sizes(X: Array) -> list[int]:
    """Numbers of components that leave rows enough for a full covariance: with fewer, BIC falls for singular ones."""
    return [k for k in SIZES if k == 1 or k * (X.shape[1] + 1) <= len(X) / 2]


def mixture_bic(X: Array, seed: int, config: dict[str, Any]) -> Fitted:
    """Components (up to 48) and type of covariance by BIC."""
    models = [
        GaussianMixture(k, covariance_type=kind, n_init=2, max_iter=200, random_state=seed).fit(X)
        for kind in ("full", "tied", "diag", "spherical")
        for k in _sizes(X)
    ]
    best = models[int(np.argmin([model.bic(X) for model in models]))]
    return Fitted(best.score_samples, float("nan"), f"{best.n_components} {best.covariance_type}")


def mixture_cv(X: Array, seed: int, config: dict[str, Any]) -> Fitted:
    """Components and what is added to variances by cross-validation; full covariances; ten starts of the last fit.

    Sizes go up to 48, until three in a row bring nothing.
    """
    n_folds, n_starts = next(search for numbers, search in SEARCHES.items() if X.size <= numbers)
    folds = list(KFold(n_folds, shuffle=True, random_state=seed).split(X))
    scores: dict[tuple[int, float], float] = {}
    worse, before = 0, -np.inf
    for k in _sizes(X):
        for added in ADDED:
            model = GaussianMixture(k, reg_covar=added, n_init=n_starts, max_iter=200, random_state=seed)
            scores[k, added] = float(np.mean([model.fit(X[a]).score(X[b]) for a, b in folds]))
        worse = 0 if max(scores.values()) > before else worse + 1
        before = max(scores.values())
        if worse == 3:
            break
    k, added = max(scores, key=lambda choice: scores[choice])
    model = GaussianMixture(k, reg_covar=added, n_init=10, max_iter=500, random_state=seed).fit(X)
    return Fitted(model.score_samples, float("nan"), f"{k} components, {added:g}")


# --- zuko ---

# Of each, one is chosen per data set by the validation likelihood of its first split.
NSF_GRID: list[dict[str, Any]] = [
    {"transforms": 3, "bins": 8, "hidden_features": (64, 64), "lr": 3e-3, "weight_decay": 1e-2},
    {"transforms": 2, "bins": 8, "hidden_features": (32, 32), "lr": 3e-3, "weight_decay": 1.0},
    {"transforms": 5, "bins": 8, "hidden_features": (64, 64), "lr": 2e-3, "weight_decay": 1e-1},
    {"transforms": 3, "bins": 16, "hidden_features": (128, 128), "lr": 1e-3, "weight_decay": 1e-1},
]
MAF_GRID: list[dict[str, Any]] = [
    {"transforms": 5, "hidden_features": (64, 64), "lr": 3e-3, "weight_decay": 1e-2},
    {"transforms": 3, "hidden_features": (32, 32), "lr": 3e-3, "weight_decay": 1.0},
    {"transforms": 8, "hidden_features": (64, 64), "lr": 2e-3, "weight_decay": 1e-1},
]
BATCH, CHECK_EVERY, PATIENCE = 256, 50, 400
MANY_ROWS = 2500  # beyond which twice the updates bring 0.1 nat


def _most_updates(n_rows: int) -> int:
    return 4000 if n_rows > MANY_ROWS else 2000


def _held_out(X: Array, seed: int) -> tuple[Tensor, Tensor]:
    """Training and validation rows, float32."""
    rows = torch.from_numpy(X[np.random.default_rng(seed).permutation(len(X))]).to(torch.float32)
    n = max(1, round(HELD_OUT * len(X)))
    return rows[n:], rows[:n]


def _batches(n: int, size: int, seed: int) -> Any:
    """Numbers of rows, one shuffled pass after another."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(n, generator=generator)
        yield from order[: max(1, n // size) * size].split(size)


def _train(flow: nn.Module, X: Array, seed: int, lr: float, weight_decay: float) -> tuple[nn.Module, float, int]:
    """Maximum likelihood; the averaged weights of the best validation likelihood, that, and the updates made."""
    inside, outside = _held_out(X, seed)
    optimizer = torch.optim.AdamW(flow.parameters(), lr=lr, weight_decay=weight_decay)
    n_updates = _most_updates(len(X))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_updates)
    averaged = AveragedModel(flow, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    best, state, last = -np.inf, copy.deepcopy(averaged.module.state_dict()), 0
    batches = _batches(len(inside), min(BATCH, len(inside)), seed)
    for update in range(1, n_updates + 1):
        loss = -flow().log_prob(inside[next(batches)]).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(flow.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        averaged.update_parameters(flow)
        if update % CHECK_EVERY == 0:
            with torch.no_grad():
                value = float(averaged.module().log_prob(outside).mean())
            if value > best:
                best, state, last = value, copy.deepcopy(averaged.module.state_dict()), update
            elif update - last >= PATIENCE:
                break
    flow.load_state_dict(state)
    return flow, best, update


def _zuko(name: str, X: Array, seed: int, config: dict[str, Any]) -> Fitted:
    import zuko

    torch.manual_seed(seed)
    options = {k: v for k, v in config.items() if k not in ("lr", "weight_decay")}
    flow = getattr(zuko.flows, name)(X.shape[1], **options)
    flow, best, updates = _train(flow, X, seed, config["lr"], config["weight_decay"])

    def score_samples(rows: Array) -> Array:
        with torch.no_grad():
            found: Array = flow().log_prob(torch.from_numpy(rows).to(torch.float32)).double().numpy()
        return found

    return Fitted(score_samples, best, f"{updates} updates")


def neural_spline_flow(X: Array, seed: int, config: dict[str, Any]) -> Fitted:
    """Autoregressive neural spline flow."""
    return _zuko("NSF", X, seed, config)


def masked_autoregressive_flow(X: Array, seed: int, config: dict[str, Any]) -> Fitted:
    """Masked autoregressive flow."""
    return _zuko("MAF", X, seed, config)


# --- FFJORD's way ---

FFJORD_UPDATES, FFJORD_SECONDS, FFJORD_CHECK, FFJORD_PATIENCE = 300, 60.0, 15, 90


class ConcatSquash(nn.Module):
    """A linear layer, gated and shifted by the time."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.linear, self.gate, self.shift = nn.Linear(n_in, n_out), nn.Linear(1, n_out), nn.Linear(1, n_out, False)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        t = t.reshape(1, 1)
        out: Tensor = self.linear(x) * torch.sigmoid(self.gate(t)) + self.shift(t)
        return out


class FFJORD(nn.Module):
    """d(x, log-density) / dt with the trace by autograd, exact or by one Hutchinson probe a solve."""

    def __init__(self, n_dims: int) -> None:
        super().__init__()
        sizes = [n_dims, 64, 64, n_dims]
        self.layers = nn.ModuleList(ConcatSquash(a, b) for a, b in pairwise(sizes))
        self.probe: Tensor | None = None

    def forward(self, t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        graph = torch.is_grad_enabled()
        with torch.enable_grad():
            x = (state[0] if graph else state[0].detach()).requires_grad_(True)
            v = x
            for layer in self.layers:
                v = layer(t, v) if layer is self.layers[-1] else torch.tanh(layer(t, v))
            if self.probe is not None:
                (back,) = torch.autograd.grad(v, x, self.probe, create_graph=graph, retain_graph=True)
                trace = (back * self.probe).sum(1)
            else:
                column = lambda i: torch.autograd.grad(  # noqa: E731
                    v[:, i].sum(), x, create_graph=graph, retain_graph=True
                )[0][:, i]
                trace = torch.stack([column(i) for i in range(x.shape[1])]).sum(0)
        return (v, -trace) if graph else (v.detach(), -trace)

    def log_prob(self, x: Tensor, exact: bool) -> Tensor:
        from torchdiffeq import odeint_adjoint

        self.probe = None if exact else torch.randn_like(x)
        start = (x, torch.zeros(len(x)))
        z, change = odeint_adjoint(self, start, torch.tensor([1.0, 0.0]), method="dopri5", rtol=1e-5, atol=1e-5)
        normal = -0.5 * (z[-1] ** 2).sum(1) - 0.5 * x.shape[1] * np.log(2 * np.pi)
        return normal - change[-1]


def ffjord(X: Array, seed: int, config: dict[str, Any]) -> Fitted:
    """torchdiffeq's adjoint by dopri5 at 1e-5, 64-64 tanh units; at most 300 updates or 60 CPU seconds."""
    torch.manual_seed(seed)
    inside, outside = _held_out(X, seed)
    model, exact = FFJORD(X.shape[1]), X.shape[1] == 2
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    batches = _batches(len(inside), min(BATCH, len(inside)), seed)
    probes = torch.Generator().manual_seed(seed)
    best, state, last, start = -np.inf, copy.deepcopy(model.state_dict()), 0, time.process_time()
    for update in range(1, FFJORD_UPDATES + 1):
        optimizer.zero_grad()
        (-model.log_prob(inside[next(batches)], exact).mean()).backward()
        optimizer.step()
        if update % FFJORD_CHECK == 0:
            with torch.no_grad():
                torch.manual_seed(int(probes.initial_seed()) + 1)  # the same probes at every check
                value = float(model.log_prob(outside, exact).mean())
            torch.manual_seed(1000 * (seed + 1) + update)
            if value > best:
                best, state, last = value, copy.deepcopy(model.state_dict()), update
            elif update - last >= FFJORD_PATIENCE:
                break
            if time.process_time() - start > FFJORD_SECONDS:
                break
    model.load_state_dict(state)

    def score_samples(rows: Array) -> Array:
        blocks = torch.from_numpy(rows).to(torch.float32).split(1000)
        with torch.no_grad():
            return torch.cat([model.log_prob(block, exact=True) for block in blocks]).double().numpy()

    return Fitted(score_samples, best, f"{update} updates")


Fit = Callable[[Array, int, dict[str, Any]], Fitted]
PEERS: dict[str, Fit] = {
    "KDE": kernel_density,
    "GMM-BIC": mixture_bic,
    "GMM-CV": mixture_cv,
    "NSF": neural_spline_flow,
    "MAF": masked_autoregressive_flow,
    "FFJORD": ffjord,
}
GRIDS: dict[str, list[dict[str, Any]]] = {"NSF": NSF_GRID, "MAF": MAF_GRID}
MOST_SPLITS = {"FFJORD": 2}
