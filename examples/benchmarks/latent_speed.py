"""What do own times of every series cost a latent ODE, and what does an epoch over many observations?

One thread. Tables:

- ``path``: forward and backward through the dynamics (latent 6, hidden layers 64-64) for a batch of series with own
  times: skode's one solve with values gathered at each series' times, as it trains, beside torchdiffeq's ``odeint``
  on the union of all times (dopri5 at 1e-4, and rk4 with steps of 1/12), the states gathered from it; and skode with
  three steps instead of the four of training, which have about torchdiffeq's error. Contestants take
  turns of as many passes as fill a fifth of a second, one at least, since in training passes follow upon passes; ratios
  are medians within rounds of processor time a pass; errors are those against dopri8 at 1e-10 in float64. Needs
  torchdiffeq.
- ``epoch``: processor seconds of an epoch (every series once, in batches of 100) by ``LatentODERegressor``'s training,
  for about 400,000 observations in 15,700 series of very different lengths, for a half and for a quarter of the series,
  and for series of twice as many observations; and of making the panel from a long frame.

    python examples/benchmarks/latent_speed.py [--tables path epoch] [--rounds 5]
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from skode import Panel
from skode.estimators.series_scaling import SeriesScaling
from skode.fields import LatentField
from skode.models import LatentConfig, LatentODE, Rows
from skode.solver import solve
from skode.training import LatentData, LatentOptions, train_latent

LATENT, HIDDEN = 6, (64, 64)
TURN = 0.2  # seconds


# --- the path ---


class Contest:
    """A batch of series: their states at time 0 and their own times."""

    def __init__(self, n_series: int, n_times: int) -> None:
        generator = torch.Generator().manual_seed(0)
        config = LatentConfig(("gaussian",), latent_dim=LATENT, hidden_layer_sizes=HIDDEN, anchored=False)
        self.model = LatentODE(config, generator)
        self.z = torch.randn(n_series, LATENT, generator=generator)
        self.t = torch.rand(n_series, n_times, generator=generator, dtype=torch.float64).sort(dim=1).values
        self.weight = torch.randn(n_series, n_times, LATENT, generator=generator)

    @property
    def field(self) -> LatentField:
        return self.model.field

    def skode(self, steps_per_unit: float = 4.0) -> Tensor:
        n, m = self.t.shape
        z = self.z.clone().requires_grad_()
        rows = Rows(z, torch.zeros(n, dtype=torch.float64), torch.arange(n))
        place = torch.arange(n).repeat_interleave(m)
        return self.model.path(rows, place, self.t.reshape(-1), None, steps_per_unit=steps_per_unit).z.view(
            n, m, LATENT
        )

    def union(self, **options: object) -> Tensor:
        from torchdiffeq import odeint

        times, place = torch.unique(self.t, return_inverse=True)
        times = torch.cat([times.new_zeros(1), times]).float()
        z = self.z.clone().requires_grad_()
        everywhere = odeint(lambda t, y: self.field(t, y), z, times, **options)
        return everywhere[1 + place, torch.arange(len(z)).unsqueeze(1)]

    def exact(self) -> Tensor:
        with torch.no_grad():
            field = LatentField(LATENT, HIDDEN).double()
            field.load_state_dict(self.field.state_dict())
            start = torch.cat([torch.zeros(len(self.t), 1, dtype=torch.float64), self.t], dim=1)
            return solve(field.dynamics(), self.z.double(), start, method="dopri8", rtol=1e-10, atol=1e-10).y[:, 1:]

    def seconds(self, run: Callable[[], Tensor]) -> float:
        """Of a pass, the mean of a turn."""
        start, n = time.process_time(), 0
        while time.process_time() - start < TURN:
            (run() * self.weight).sum().backward()
            n += 1
        return (time.process_time() - start) / n


def paths(rounds: int) -> None:
    """The table of paths."""
    print("\n| series x own times | contestant | time over skode's | largest error |\n|---|---|---|---|")
    for n_series, n_times in ((20, 50), (100, 50)):
        contest = Contest(n_series, n_times)
        runs: dict[str, Callable[[], Tensor]] = {
            "skode": contest.skode,
            "skode, 3 steps": lambda c=contest: c.skode(3.0),
            "torchdiffeq dopri5, union": lambda c=contest: c.union(method="dopri5", rtol=1e-4, atol=1e-5),
            "torchdiffeq rk4 1/12, union": lambda c=contest: c.union(method="rk4", options={"step_size": 1 / 12}),
        }
        taken: dict[str, list[float]] = {name: [] for name in runs}
        for k in range(rounds + 1):
            for name in list(runs)[k % len(runs) :] + list(runs)[: k % len(runs)]:
                seconds = contest.seconds(runs[name])
                if k:
                    taken[name].append(seconds)
        exact = contest.exact()
        for name, run in runs.items():
            ratio = np.median(np.array(taken[name]) / np.array(taken["skode"]))
            with torch.no_grad():
                error = float((run().double() - exact).abs().max())
            own = f"1 ({1e3 * np.median(taken[name]):.1f} ms)" if name == "skode" else f"{ratio:.3g}"
            print(f"| {n_series} x {n_times} | {name} | {own} | {error:.0e} |", flush=True)


# --- epochs ---


def long_frame(n_series: int, mean_length: float, seed: int = 0) -> pd.DataFrame:
    """Series of very different lengths (geometric), two channels of which a third is unobserved."""
    rng = np.random.default_rng(seed)
    lengths = rng.geometric(1 / mean_length, n_series)
    total = int(lengths.sum())
    series = np.repeat(np.arange(n_series), lengths)
    t = rng.exponential(1.0, total)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    t = np.cumsum(t)
    t -= np.repeat(t[starts], lengths)
    phase = rng.uniform(0, 6.28, n_series)[series]
    values = np.column_stack([np.sin(0.3 * t + phase), np.cos(0.2 * t + phase)]) + 0.1 * rng.normal(size=(total, 2))
    values[rng.uniform(size=(total, 2)) < 1 / 3] = np.nan
    return pd.DataFrame({"id": series, "t": t, "a": values[:, 0], "b": values[:, 1]})


def epochs() -> None:
    """The table of epochs."""
    print("\n| series | rows | values | panel, CPU s | epoch, CPU s | microseconds a row |\n|---|---|---|---|---|---|")
    for n_series, mean_length in ((15_700, 25.5), (7_850, 25.5), (3_925, 25.5), (7_850, 51.0)):
        frame = long_frame(n_series, mean_length)
        start = time.process_time()
        panel = Panel.from_long(frame, "id", "t")
        made = time.process_time() - start
        families = ("gaussian", "gaussian")
        scaling = SeriesScaling.fit(panel, families)
        series = scaling.series(panel, torch.float32, torch.device("cpu"), None)
        model = LatentODE(LatentConfig(families), torch.Generator().manual_seed(0))
        data = LatentData.split(series, torch.Generator().manual_seed(0), validate=False)
        n_updates = -(-n_series // 100)
        train_latent(model, data, LatentOptions(n_updates=5), torch.Generator().manual_seed(0))
        start = time.process_time()
        train_latent(model, data, LatentOptions(n_updates=n_updates), torch.Generator().manual_seed(0))
        epoch = time.process_time() - start
        observed = int((~np.isnan(panel.values)).sum())
        a_row = 1e6 * epoch / len(panel.times)
        print(
            f"| {n_series:,} | {len(panel.times):,} | {observed:,} | {made:.2f} | {epoch:.1f} | {a_row:.0f} |",
            flush=True,
        )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tables", nargs="+", choices=["path", "epoch"], default=["path", "epoch"])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if "path" in args.tables:
        paths(args.rounds)
    if "epoch" in args.tables:
        epochs()


if __name__ == "__main__":
    main()
