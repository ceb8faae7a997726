"""Training from a stream of chunks that does not fit into memory."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest

from skode import ODENetClassifier, ODENetRegressor


def _chunk(seed, n=200):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, 3))
    return X, np.sin(2 * X[:, 0]) + X[:, 1] * X[:, 2]


class Stream:
    """Chunks that are made when they are asked for; ``most`` of their arrays were alive at a time."""

    def __init__(self, n_chunks):
        self.n_chunks, self.most, self._alive = n_chunks, 0, []

    def __iter__(self):
        for seed in range(self.n_chunks):
            chunk = _chunk(seed)
            self._alive = [weakref.ref(array) for array in chunk] + [ref for ref in self._alive if ref() is not None]
            self.most = max(self.most, len(self._alive))
            yield chunk
            del chunk


@pytest.mark.parametrize("net_class", [ODENetClassifier, ODENetRegressor])
def test_a_stream_is_learned_one_chunk_at_a_time(net_class):
    stream, net, first = Stream(30), net_class(n_members=2, random_state=0), True
    gc.disable()  # what is let go is free at once, without cycles that wait for the collector
    try:
        for X, y in stream:
            if net_class is ODENetClassifier:
                net.partial_fit(X, y > 0, classes=[False, True] if first else None)
            else:
                net.partial_fit(X, y)
            first = False
            del X, y
    finally:
        gc.enable()
    assert stream.most == 2  # rows and targets of one chunk
    X, y = _chunk(1000, 500)
    assert net.n_iter_ == 30
    assert net.score(X, y > 0 if net_class is ODENetClassifier else y) > 0.8


def test_the_first_chunk_fixes_the_scale_so_that_it_should_be_a_sample_of_all():
    rng = np.random.default_rng(0)
    X = np.sort(rng.uniform(0, 10, 1500)).reshape(-1, 1)
    y = np.sin(X[:, 0])
    chunks = np.array_split(np.arange(len(X)), 10)
    scores = []
    for first in (chunks[0], rng.choice(len(X), 150)):
        net = ODENetRegressor(n_members=2, random_state=0).partial_fit(X[first], y[first])
        for i in np.concatenate([rng.permutation(len(chunks)) for _ in range(3)]):
            net.partial_fit(X[chunks[i]], y[chunks[i]])
        scores.append(net.score(X, y))
    assert scores[0] < 0.2 < 0.5 < scores[1]
