"""What each of the two processes of test_data_parallel.py does: `python -m tests.estimators.ranks RANK FOLDER`."""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from skode import ContinuousFlowDensity, ODENetClassifier, ODENetRegressor
from skode.models import ODENet
from skode.parallel import data_parallel

# The first process holds so many rows, the second one the others.
CUT, N_ROWS, N_FEATURES = 100, 240, 4
SHORT = {"max_iter": 3, "batch_size": 64, "random_state": 0}


def whole():
    """All rows; a process of several makes only its own of them."""
    return parts(0, N_ROWS)


def parts(first, last):
    """Rows, labels, two targets and weights: each row is drawn from its own number."""
    X = np.array([np.random.default_rng(i).normal(size=N_FEATURES) for i in range(first, last)])
    labels = np.where(X[:, 0] * X[:, 1] > 0.3, "above", np.where(X[:, 2] > 0, "right", "left"))
    weights = np.where(np.arange(first, last) % 7 == 0, 0.0, 1.0 + X[:, 3] ** 2)
    return X, labels, np.column_stack([X[:, 0] + X[:, 1] ** 2, 100 * np.sin(X[:, 2])]), weights


class Fails(torch.nn.Module):
    """A field that fails in the second process, in the midst of training."""

    def __init__(self, n_dims):
        super().__init__()
        self.layer, self.n_calls = torch.nn.Linear(n_dims, n_dims), 0

    def forward(self, t, y):
        self.n_calls += 1
        if self.n_calls > 20 and dist.is_initialized() and dist.get_rank() == 1:
            raise OSError("the disk is full")
        return torch.tanh(self.layer(y))


FITS = {
    "weighted classes": lambda X, labels, Y, w: ODENetClassifier(n_members=4, class_weight="balanced", **SHORT).fit(
        X, labels, sample_weight=w
    ),
    "two targets": lambda X, labels, Y, w: ODENetRegressor(n_members=3, energy_penalty=0.1, **SHORT).fit(X, Y),
    "one batch": lambda X, labels, Y, w: ODENetClassifier(
        n_members=2, early_stopping=False, gradient="adjoint", **{**SHORT, "batch_size": 500}
    ).fit(X, labels),
    "an image": lambda X, labels, Y, w: ODENetRegressor(
        image_shape=(1, 2, 2), hidden_layer_sizes=2, method="kvaerno3", rtol=0.1, **{**SHORT, "max_iter": 1}
    ).fit(X, Y[:, 0]),
    "chunks": lambda X, labels, Y, w: (
        ODENetRegressor(n_members=2, **SHORT).partial_fit(X[::2], Y[::2]).partial_fit(X[1::2], Y[1::2])
    ),
}

BAD_FITS = {
    "columns": lambda rank, X, labels: ODENetClassifier(**SHORT).fit(X[:, : 4 - rank], labels),
    "arguments": lambda rank, X, labels: ODENetClassifier(alpha=0.1 * rank, **SHORT).fit(X, labels),
    "invalid arguments": lambda rank, X, labels: ODENetClassifier(alpha=0.1 - rank, **SHORT).fit(X, labels),
    "no rows": lambda rank, X, labels: ODENetClassifier(**SHORT).fit(X[: (1 - rank) * 50], labels[: (1 - rank) * 50]),
    "in training": lambda rank, X, labels: ODENetClassifier(field=Fails, **SHORT).fit(X, labels),
    "only one fits": lambda rank, X, labels: None if rank else ODENetClassifier(**SHORT).fit(X, labels),
    "a density": lambda rank, X, labels: ContinuousFlowDensity().fit(X),
}


@contextlib.contextmanager
def counted():
    """A dictionary of rows of the largest batch, and evaluations of single rows, all members together."""
    found, original = {"n_evals": 0.0, "largest": 0}, ODENet.forward

    def forward(net, X, *args, **kwargs):
        output = original(net, X, *args, **kwargs)
        found["n_evals"] += output.n_evals * X.shape[-2]
        found["largest"] = max(found["largest"], X.shape[-2])
        return output

    ODENet.forward = forward
    try:
        yield found
    finally:
        ODENet.forward = original


def fits(block, rows, folder, who):
    """All good fits: what they found goes to a file for each."""
    X, labels, Y, weights = rows
    facts = {}
    for name, fit in FITS.items():
        with block(), counted() as found:
            net = fit(X, labels, Y, weights)
        facts[name] = {"n_rows": len(X), **found}
        outputs = net.predict_proba(whole()[0]) if hasattr(net, "classes_") else net.predict(whole()[0])
        scores = net.validation_scores_ or []
        np.savez(folder / f"{name} {who}.npz", outputs=outputs, curve=net.loss_curve_, scores=scores)
    return facts


def failures(rank, X, labels):
    """What each bad fit said, and a good one after all of them."""
    told = {}
    for name, fit in BAD_FITS.items():
        try:
            with data_parallel():
                fit(rank, X, labels)
        except Exception as error:
            told[name] = [type(error).__name__, str(error)]
    with data_parallel():
        net = ODENetClassifier(n_members=1, **{**SHORT, "random_state": None}).fit(X, labels)
    told["a good one"] = net.loss_curve_
    return told


def main(rank, folder):
    """Take part as process ``rank`` of two."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    rows = parts(*((0, CUT), (CUT, N_ROWS))[rank])
    facts = {"fits": fits(data_parallel, rows, folder, rank), "failures": failures(rank, *rows[:2])}
    dist.destroy_process_group()
    (folder / f"{rank}.json").write_text(json.dumps(facts), encoding="utf-8")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
