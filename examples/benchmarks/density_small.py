"""Thirty rows: ContinuousFlowDensity's defaults beside one fitted Gaussian.

Each set's rows are drawn, 30 for training and the others (at most 2,000) for the test, 20 times by seed. The Gaussians:
maximum likelihood (GaussianMixture(1), whose regularisation is 1e-6), and the covariance shrunk by Ledoit and Wolf's
rule, which is the harder one. The figure is the mean negative log-likelihood of test rows in nats.

    python examples/benchmarks/density_small.py [--sets moons iris] [--rows 30] [--seeds 20]
"""

from __future__ import annotations

import argparse
import os
import warnings

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from density_data import SETS, TABLES, TOYS
from scipy.stats import multivariate_normal
from sklearn.covariance import LedoitWolf
from sklearn.mixture import GaussianMixture

from skode import ContinuousFlowDensity

MOST_TEST = 2_000
COLUMNS = ("skode", "Gaussian", "shrunk Gaussian")


def rows_of(name: str, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Training and test rows, standardised by the training rows."""
    rng = np.random.default_rng([seed, 30])
    if name in TOYS:
        X = TOYS[name].draw(rng, n + MOST_TEST)
    else:
        X = TABLES[name]()
        X = X[rng.permutation(len(X))[: n + MOST_TEST]]
    mean, scale = X[:n].mean(axis=0), X[:n].std(axis=0)
    return (X[:n] - mean) / scale, (X[n:] - mean) / scale


def losses(train: np.ndarray, test: np.ndarray, seed: int) -> list[float]:
    """Of skode and of the two Gaussians."""
    shrunk = LedoitWolf().fit(train)
    return [
        -ContinuousFlowDensity(random_state=seed, discrete=None).fit(train).score(test),
        -GaussianMixture(1).fit(train).score(test),
        -float(multivariate_normal(shrunk.location_, shrunk.covariance_).logpdf(test).mean()),
    ]


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", nargs="*", default=[*SETS["confirmation"], *SETS["tuning"]])
    parser.add_argument("--rows", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    print(f"| set | columns | {' | '.join(COLUMNS)} | skode less Gaussian (s.e.) | skode less shrunk (s.e.) |")
    print("|---" * (4 + len(COLUMNS)) + "|")
    for name in args.sets:
        found, width = [], 0
        for seed in range(args.seeds):
            train, test = rows_of(name, args.rows, seed)
            width = train.shape[1]
            found.append(losses(train, test, seed))
        nll = np.array(found)
        cells = [f"{x:.3f}" for x in nll.mean(axis=0)]
        for other in (1, 2):
            gap = nll[:, 0] - nll[:, other]
            cells.append(f"{gap.mean():+.3f} ({gap.std(ddof=1) / len(gap) ** 0.5:.3f})")
        print(f"| {name} | {width} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
