"""Gaussian processes and mixed linear models of irregular panels; for irregular_panels.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from panel_data import Sample
from panel_peers import Predicted, Predictor
from scipy.optimize import minimize
from sklearn.preprocessing import SplineTransformer
from torch import Tensor

# --- curves in time that the series have in common ---


@dataclass(frozen=True, eq=False)
class Curve:
    """Columns of a design: powers of time or a spline of time, known inputs."""

    degree: int
    knots: int
    centre: float
    scale: float
    spline: SplineTransformer | None

    @staticmethod
    def of(train: Sample, degree: int, knots: int) -> Curve:
        t = train.t[train.seen]
        spline = None
        if knots:
            places = np.unique(np.quantile(t, np.linspace(0, 1, knots)))
            spline = SplineTransformer(knots=places[:, None], degree=3, extrapolation="linear", include_bias=False)
            spline.fit(t[:, None])
        return Curve(degree, knots, float(t.mean()), float(t.std()) or 1.0, spline)

    def design(self, sample: Sample) -> np.ndarray:
        x = (sample.t - self.centre) / self.scale
        powers = x[:, None] ** np.arange(1, self.degree + 1)
        time = powers if self.spline is None else self.spline.transform(sample.t[:, None])
        return np.hstack([np.ones((len(x), 1)), time, sample.inputs()])

    def slopes(self, sample: Sample) -> np.ndarray:
        """Of random intercepts and slopes (N, 2)."""
        return np.column_stack([np.ones(len(sample.t)), (sample.t - self.centre) / self.scale])


CURVES = ((0, 0), (1, 0), (2, 0), (3, 0), (0, 4), (0, 7))  # degree, knots


def curves(train: Sample) -> list[Curve]:
    n_times = len(np.unique(train.t))
    return [Curve.of(train, degree, knots) for degree, knots in CURVES if max(degree, knots) < n_times]


def conditioned(
    covariance: Callable[[np.ndarray, np.ndarray], np.ndarray], noise: float, mean: np.ndarray, given: Sample, c: int
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (N,) of channel ``c``, a Gaussian process of each series, given what was observed."""
    out, std = mean.copy(), np.zeros_like(mean)
    for rows in given.rows_of():
        own = rows[~np.isnan(given.values[rows, c])]
        prior = covariance(rows, rows)
        variance = np.diag(prior).copy()
        if len(own):
            cross = covariance(rows, own)
            gain = np.linalg.solve(covariance(own, own) + noise * np.eye(len(own)), cross.T).T
            out[rows] += gain @ (given.values[own, c] - mean[own])
            variance -= (gain * cross).sum(axis=1)
        std[rows] = np.sqrt(np.maximum(variance, 0.0) + noise)
    return out, std


# --- Gaussian processes ---


def _padded(train: Sample, c: int, design: np.ndarray) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Times, values, mask and design (S, n, ...) of a channel's observations."""
    parts = [rows[~np.isnan(train.values[rows, c])] for rows in train.rows_of()]
    parts = [rows for rows in parts if len(rows)]
    n = max(len(rows) for rows in parts)
    t, y, mask = (torch.zeros(len(parts), n, dtype=torch.float64) for _ in range(3))
    x = torch.zeros(len(parts), n, design.shape[1], dtype=torch.float64)
    for i, rows in enumerate(parts):
        t[i, : len(rows)], y[i, : len(rows)] = torch.tensor(train.t[rows]), torch.tensor(train.values[rows, c])
        mask[i, : len(rows)], x[i, : len(rows)] = 1.0, torch.tensor(design[rows])
    return t, y, mask, x


def _correlation(kind: str, r: Any) -> Any:
    exp = torch.exp if isinstance(r, Tensor) else np.exp
    if kind == "rbf":
        return exp(-0.5 * r * r)
    if kind == "matern12":
        return exp(-r)
    return (1 + math.sqrt(3) * r) * exp(-math.sqrt(3) * r)


def _fit_kernel(kind: str, train: Sample, c: int, design: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """Evidence of all training series, log parameters (length, amplitude, level, noise), the mean's coefficients.

    The coefficients are the generalised least squares ones at each step (so the evidence is profiled).
    """
    t, y, mask, x = _padded(train, c, design)
    both = mask[:, :, None] * mask[:, None, :]
    gap = (t[:, :, None] - t[:, None, :]).abs()
    off = torch.diag_embed(1 - mask)
    span = float(np.ptp(train.t)) or 1.0

    def evidence(log_values: Tensor) -> tuple[Tensor, Tensor]:
        length, amplitude, level, noise = log_values.exp()
        cov = (amplitude * _correlation(kind, gap / length) + level) * both + torch.diag_embed(noise * mask) + off
        chol = torch.linalg.cholesky(cov + 1e-8 * torch.eye(cov.shape[1], dtype=torch.float64))
        white_y = torch.linalg.solve_triangular(chol, y[:, :, None], upper=False)[:, :, 0]
        white_x = torch.linalg.solve_triangular(chol, x, upper=False)
        flat_x, flat_y = white_x.reshape(-1, x.shape[2]), white_y.reshape(-1)
        normal = flat_x.T @ flat_x + 1e-6 * torch.eye(x.shape[2], dtype=torch.float64)
        beta = torch.linalg.solve(normal, flat_x.T @ flat_y)
        rest = (flat_y - flat_x @ beta).square().sum()
        logdet = 2 * chol.diagonal(dim1=1, dim2=2).log().sum()
        return -0.5 * (rest + logdet + mask.sum() * math.log(2 * math.pi)), beta

    def loss(theta: np.ndarray) -> tuple[float, np.ndarray]:
        values = torch.tensor(theta, requires_grad=True)
        found, _ = evidence(values)
        (gradient,) = torch.autograd.grad(-found, values)
        return -float(found), gradient.numpy()

    bounds = [(math.log(span * 1e-3), math.log(span * 10))] + [(-12.0, 5.0)] * 2 + [(-10.0, 3.0)]
    starts = [np.log([span * share, 0.5, 0.3, 0.1]) for share in (0.05, 0.4)]
    best = min((minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds) for start in starts), key=_loss_of)
    with torch.no_grad():
        value, beta = evidence(torch.tensor(best.x))
    return float(value), best.x, beta.numpy()


def _loss_of(result: Any) -> float:
    return float(result.fun)


def gaussian_process(train: Sample, seed: int) -> Predictor:
    """Kernel (squared exponential, Matern 1/2 and 3/2), its parameters and the mean's curve by evidence (BIC)."""
    chosen = []
    candidates = curves(train)
    for c in range(train.values.shape[1]):
        n = int((~np.isnan(train.values[:, c])).sum())
        found = []
        # The curve by the first kernel, then the kernel: not all pairs.
        for curve in candidates:
            design = curve.design(train)
            value, theta, beta = _fit_kernel("matern32", train, c, design)
            found.append((value - 0.5 * math.log(n) * design.shape[1], "matern32", curve, theta, beta))
        curve = max(found, key=lambda one: one[0])[2]
        design = curve.design(train)
        for kind in ("rbf", "matern12"):
            value, theta, beta = _fit_kernel(kind, train, c, design)
            found.append((value - 0.5 * math.log(n) * design.shape[1], kind, curve, theta, beta))
        chosen.append(max(found, key=lambda one: one[0])[1:])

    def predict(given: Sample) -> Predicted:
        mean, std = np.zeros_like(given.values), np.zeros_like(given.values)
        for c, (kind, curve, theta, beta) in enumerate(chosen):
            length, amplitude, level, noise = np.exp(theta)

            def covariance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
                gap = np.abs(given.t[a][:, None] - given.t[b][None, :])
                return np.asarray(amplitude * _correlation(kind, gap / length) + level)  # noqa: B023

            mean[:, c], std[:, c] = conditioned(covariance, float(noise), curve.design(given) @ beta, given, c)
        return Predicted(mean, std)

    return predict


# --- mixed linear models ---


def mixed_model(train: Sample, seed: int) -> Predictor:
    """Random intercepts and slopes around a common curve that is chosen by BIC; conditional on what was observed."""
    from statsmodels.regression.mixed_linear_model import MixedLM

    chosen = []
    for c in range(train.values.shape[1]):
        own = ~np.isnan(train.values[:, c])
        y, groups = train.values[own, c], train.series[own]
        best: tuple[float, Curve, Any] | None = None
        for curve in curves(train):
            design, slopes = curve.design(train)[own], curve.slopes(train)[own]
            try:
                fitted = MixedLM(y, design, groups, slopes).fit(reml=False, method=["lbfgs", "powell"])
                score = -2 * fitted.llf + math.log(len(y)) * design.shape[1]
            except (np.linalg.LinAlgError, ValueError):
                continue
            if np.isfinite(score) and (best is None or score < best[0]):
                best = score, curve, fitted
        if best is None:
            raise RuntimeError(f"no mixed model of channel {c} could be fitted.")
        _, curve, fitted = best
        try:
            again = MixedLM(y, curve.design(train)[own], groups, curve.slopes(train)[own]).fit(method=["lbfgs"])
            fitted = again if np.isfinite(again.scale) and np.isfinite(again.fe_params).all() else fitted
        except (np.linalg.LinAlgError, ValueError):
            pass
        chosen.append((curve, np.asarray(fitted.fe_params), np.asarray(fitted.cov_re), float(fitted.scale)))

    def predict(given: Sample) -> Predicted:
        mean, std = np.zeros_like(given.values), np.zeros_like(given.values)
        for c, (curve, beta, cov, noise) in enumerate(chosen):
            z = curve.slopes(given)

            def covariance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
                return np.asarray(z[a] @ cov @ z[b].T)  # noqa: B023

            mean[:, c], std[:, c] = conditioned(covariance, noise, curve.design(given) @ beta, given, c)
        return Predicted(mean, std)

    return predict
