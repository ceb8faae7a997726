"""Random trajectories of a latent ODE, from the posterior and the prior, and bounds of likelihoods.

Symbols: K samples; otherwise as in :mod:`skode.models.forecast`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from skode.models.latent import LatentODE, Rows
from skode.models.odenet import SolverOptions
from skode.models.series import HeldInputs, Series
from skode.solver import solve

ROWS_AT_ONCE = 100_000  # observations times samples


class Prior(NamedTuple):
    """A normal for the latent state in the middle of a series: mean (d,), lower triangle of the covariance (d, d)."""

    mean: Tensor
    factor: Tensor

    def sample(self, eps: Tensor) -> Tensor:
        """States of standard normal numbers (..., d)."""
        return self.mean + eps @ self.factor.mT

    def log_prob(self, z: Tensor) -> Tensor:
        """Log-densities of states (..., d)."""
        u = torch.linalg.solve_triangular(self.factor, (z - self.mean).reshape(-1, z.shape[-1]).mT, upper=False)
        constant = self.factor.diagonal().log().sum() + 0.5 * z.shape[-1] * math.log(2 * math.pi)
        log_prob: Tensor = (-0.5 * u.square().sum(dim=0) - constant).view(z.shape[:-1])
        return log_prob


def middle(series: Series) -> Tensor:
    """The times (B,) that priors are about."""
    return 0.5 * (series.first + series.last)


@torch.no_grad()
def fit_prior(model: LatentODE, series: Series, longest: int) -> Prior:
    """The normal with the moments of all series' posteriors, weakly drawn to N(0, I).

    Of longer series the ``longest`` rows about the middle count. A density that was learned from the training series
    is as good a prior as N(0, I) for bounds of others' likelihood, and a tighter one.
    """
    t = middle(series)
    every = torch.arange(series.n_series, device=t.device)
    mean, log_std = model.encode(series.around(every, t, longest), t.unsqueeze(1))
    mean, variance = mean[:, 0].double(), (2 * log_std[:, 0].double()).exp()
    n, d = mean.shape
    centre = mean.mean(dim=0)
    covariance = (mean - centre).mT @ (mean - centre) / n + torch.diag(variance.mean(dim=0))
    share = n / (n + d + 1.0)
    covariance = share * covariance + (1 - share) * torch.eye(d, dtype=torch.float64, device=t.device)
    dtype = model.field.turn.dtype
    return Prior((share * centre).to(dtype), torch.linalg.cholesky(covariance).to(dtype))


@torch.no_grad()
def prior_eta(
    model: LatentODE,
    prior: Prior,
    offsets: Tensor,
    t: Tensor,
    static: Tensor,
    inputs: HeldInputs | None,
    solver: SolverOptions,
    eps: Tensor,
) -> Tensor:
    """The decoder's values (N, c) along series that were never seen: one of the prior's states for each.

    Parameters
    ----------
    model : LatentODE
    prior : Prior
    offsets : int64 tensor of shape (B + 1,)
    t : tensor of shape (N,)
        Ascending times of each series; its state is drawn for the middle of them.
    static : tensor of shape (B, s)
    inputs : HeldInputs, optional
        Of the same series.
    solver : SolverOptions
    eps : tensor of shape (B, d)
        Standard normal numbers.

    Returns
    -------
    tensor of shape (N, c)
    """
    empty = static.new_zeros(len(t), 0)
    asked = Series.of(offsets, t, empty, static=static)
    every = torch.arange(asked.n_series, device=t.device)
    rows = Rows(prior.sample(eps.to(prior.mean)), middle(asked), every)
    return model.decode(model.exact_path(rows, asked.index, t, inputs, solver).z, static[asked.index])


@torch.no_grad()
def posterior_eta(
    model: LatentODE,
    series: Series,
    query: Tensor,
    t: Tensor,
    inputs: HeldInputs | None,
    eta: Tensor,
    spread: Tensor,
    eps: Tensor,
    solver: SolverOptions,
    longest: int,
) -> Tensor:
    """Trajectories of the decoder's values, (n_samples, Q, c): ``eta`` (Q, c) with standard deviation ``spread``.

    How they move together along a series is that of the latent state's posterior at its last observation; how far they
    are apart is what was calibrated.

    Parameters
    ----------
    model : LatentODE
    series : Series
        What may be used.
    query : int64 tensor of shape (Q,)
        The series of each query.
    t : tensor of shape (Q,)
    inputs : HeldInputs, optional
    eta, spread : tensors of shape (Q, c)
        As :func:`skode.models.forecast.outlook` and a calibration give them.
    eps : tensor of shape (B, n_samples, d)
        Standard normal numbers; 32 samples or more tell how far trajectories are apart.
    solver : SolverOptions
    longest : int

    Returns
    -------
    tensor of shape (n_samples, Q, c)
    """
    k = eps.shape[1]
    every, last = torch.arange(series.n_series, device=t.device), series.last
    mean, log_std = model.encode(series.around(every, last, longest), last.unsqueeze(1))
    z = mean + log_std.exp() * eps.to(mean)
    out = eta.new_zeros(k, *eta.shape)
    # All samples of a series stay together.
    order = torch.argsort(query, stable=True)
    for own in order.split(max(1, ROWS_AT_ONCE // k)):
        ids, number = torch.unique(query[own], return_inverse=True)
        owner = ids.repeat_interleave(k)
        rows = Rows(z[ids].flatten(0, 1), last[owner], owner)
        place = (number.unsqueeze(1) * k + torch.arange(k, device=t.device)).reshape(-1)
        states = model.exact_path(rows, place, t[own].repeat_interleave(k), inputs, solver).z
        drawn = model.decode(states, series.static[owner[place]]).view(len(own), k, -1)
        away = drawn - drawn.mean(dim=1, keepdim=True)
        away = away / away.square().mean(dim=1, keepdim=True).sqrt().clamp(min=1e-6)
        out[:, own] = (eta[own].unsqueeze(1) + spread[own].unsqueeze(1) * away).transpose(0, 1)
    return out


@torch.no_grad()
def path_counts(
    model: LatentODE, series: Series, until: Tensor, inputs: HeldInputs | None, solver: SolverOptions, longest: int
) -> Tensor:
    """Evaluations, steps, rejected steps and the worst status (B, 4) from each last observation to the first, and on.

    Parameters
    ----------
    model : LatentODE
    series : Series
        Observed rows.
    until : tensor of shape (B,)
        Where the way ahead ends.
    inputs : HeldInputs, optional
    solver : SolverOptions
    longest : int

    Returns
    -------
    int64 tensor of shape (B, 4)
    """
    every, last = torch.arange(series.n_series, device=until.device), series.last
    z = model.encode(series.around(every, last, longest), last.unsqueeze(1)).mean[:, 0]
    counts = torch.zeros(series.n_series, 4, dtype=torch.int64, device=until.device)
    for end in (series.first, until):
        known = None if inputs is None else inputs.along(every, last, torch.ones_like(last).unsqueeze(1))
        solution = solve(
            model.field.dynamics(None, known),
            z,
            torch.stack([torch.zeros_like(last), end - last], dim=1),
            method=solver.method,
            rtol=solver.rtol,
            atol=solver.atol,
            step_size=solver.step_size,
            max_num_steps=solver.max_num_steps,
        )
        names = ("n_evals", "n_steps", "n_rejected")
        counts[:, :3] += torch.stack([getattr(solution, name).long() for name in names], dim=1)
        counts[:, 3] = torch.maximum(counts[:, 3], solution.status.long())
    return counts


@torch.no_grad()
def log_bound(
    model: LatentODE,
    prior: Prior,
    series: Series,
    inputs: HeldInputs | None,
    eps: Tensor,
    solver: SolverOptions,
    longest: int,
    windows: Tensor | None = None,
) -> Tensor:
    """The importance-weighted bound (Burda et al. 2016) of each series' log-likelihood, (B,), in nats.

    log p(x) >= E log mean_k p(x | z_k) p(z_k) / q(z_k | x), z the state in the series' middle, from which the path goes
    to all its observations. It rises with K; a series without observations has 0.

    Parameters
    ----------
    model : LatentODE
    prior : Prior
    series : Series
    inputs : HeldInputs, optional
    eps : tensor of shape (K, B, d)
        Standard normal numbers.
    solver : SolverOptions
    longest : int
        Rows about the middle that the encoder reads.
    windows : tensor of shape (B, 2), optional
        Times over which events were counted; from the first to the last row if not given (point processes).

    Returns
    -------
    tensor of shape (B,)
    """
    t, n = middle(series), series.n_series
    every = torch.arange(n, device=t.device)
    posterior = model.encode(series.around(every, t, longest), t.unsqueeze(1))
    mean, log_std = (x[:, 0] for x in posterior)
    n_samples, eps = len(eps), eps.to(mean)
    z = mean + log_std.exp() * eps
    density = (-0.5 * eps.square() - log_std - 0.5 * math.log(2 * math.pi)).sum(dim=2)
    ratio = prior.log_prob(z) - density
    at_once = max(1, ROWS_AT_ONCE // max(len(series.times), 1))
    for some in torch.arange(n_samples, device=t.device).split(at_once):
        many = series.take(every.repeat(len(some)))
        rows = Rows(z[some].flatten(0, 1), t.repeat(len(some)), every.repeat(len(some)))
        own = None if windows is None else windows.repeat(len(some), 1)
        ratio[some] += _log_likelihood(model, rows, many, inputs, solver, own).view(len(some), n)
    return torch.where(series.lengths > 0, torch.logsumexp(ratio, dim=0) - math.log(n_samples), 0.0)


def _log_likelihood(
    model: LatentODE,
    rows: Rows,
    series: Series,
    inputs: HeldInputs | None,
    solver: SolverOptions,
    windows: Tensor | None,
) -> Tensor:
    """Of each series (B,), given its state."""
    index = series.index
    z = model.exact_path(rows, index, series.times, inputs, solver).z
    eta = model.decode(z, series.static[index])
    each = (model.likelihood.log_prob(eta, series.values) * series.mask).sum(dim=1)
    expected: Tensor | None = None
    if model.config.point_process:
        if windows is None:
            windows = torch.stack([series.first, series.last], dim=1)
        expected = model.path(rows, index[:0], series.times[:0], inputs, steps_per_unit=16, window=windows).expected
        known = None if inputs is None else inputs.at(rows.series[index], series.times)
        each = each + model.field.rate(z, known).log()
    total = each.new_zeros(series.n_series).index_add(0, index, each)
    return total if expected is None else total - expected
