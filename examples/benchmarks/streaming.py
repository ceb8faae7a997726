"""What does it cost to see the data only as a stream of chunks? Held-out accuracy of ``partial_fit`` against ``fit``.

Two problems: scikit-learn's digits in chunks of 128 rows, and 5000 rows one of whose columns drifts from 0 to 10, in
chunks of 500 rows, shuffled or in the order of the drift. "Sample first": the first call is given 500 rows of the whole
stream. ``fit`` makes its usual number of epochs on the digits, 20 on the others.

    python examples/benchmarks/streaming.py
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from skode import ODENetClassifier

PASSES = (1, 10, 30)


def drifting(n: int = 5000) -> tuple[np.ndarray, np.ndarray]:
    """Rows in the order of a drift, and labels that depend on where it is."""
    rng = np.random.default_rng(0)
    X = rng.normal(size=(n, 8))
    X[:, 0] = np.linspace(0, 10, n) + 0.3 * X[:, 0]
    return X, (np.sin(2 * X[:, 0]) + X[:, 1] * X[:, 2] > 0).astype(int)


def streamed(X: np.ndarray, y: np.ndarray, size: int, first: np.ndarray | None) -> Iterator[ODENetClassifier]:
    """The model after each pass through the chunks."""
    model, classes = ODENetClassifier(random_state=0), np.unique(y)
    if first is not None:
        model.partial_fit(X[first], y[first], classes=classes)
    while True:
        for rows in np.array_split(np.arange(len(X)), len(X) // size):
            model.partial_fit(X[rows], y[rows], classes=classes)
        yield model


def scores(models: Iterator[ODENetClassifier], X: np.ndarray, y: np.ndarray) -> list[float]:
    """After so many PASSES."""
    return [model.score(X, y) for _, model in zip(range(max(PASSES)), models, strict=False) if _ + 1 in PASSES]


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print("| data | `fit` |" + "".join(f" {n} passes |" for n in PASSES) + "\n|---|---|" + "---|" * len(PASSES))
    for name, (X, y), size, epochs in (
        ("digits", load_digits(return_X_y=True), 128, None),
        ("drift", drifting(), 500, 20),
    ):
        X, X_test, y, y_test = train_test_split(X, y, random_state=0)
        whole = ODENetClassifier(random_state=0, max_iter=epochs).fit(X, y).score(X_test, y_test)
        orders = {"shuffled": (np.arange(len(X)), None)}
        if name == "drift":
            sample = np.random.default_rng(0).choice(len(X), size, replace=False)
            in_order = np.argsort(X[:, 0])
            orders |= {"in order": (in_order, None), "in order, sample first": (in_order, np.argsort(in_order)[sample])}
        for order, (rows, first) in orders.items():
            found = scores(streamed(X[rows], y[rows], size, first), X_test, y_test)
            print(f"| {name}, {order} | {whole:.3f} |" + "".join(f" {score:.3f} |" for score in found), flush=True)


if __name__ == "__main__":
    main()
