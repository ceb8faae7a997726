"""Which of the flows that were begun are trained on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from skode.training.flow import FAR_BEHIND, _train


class Run:
    """A candidate whose held-out scores and promises are written down."""

    def __init__(self, matched: float, rises: list[float], promised: float) -> None:
        self.best, self._rises, self.promised, self.rounds = matched, list(rises), promised, 0
        self.options = SimpleNamespace(n_likelihood=1)

    def check(self) -> None: ...

    match = restore_best = check

    def maximise(self) -> bool:
        self.rounds += 1
        self.best += self._rises.pop(0)
        return bool(self._rises)


@pytest.mark.parametrize(
    ("behind", "promised", "rounds"),
    [(FAR_BEHIND + 0.01, 9.0, 0), (FAR_BEHIND - 0.01, -9.0, 1), (FAR_BEHIND - 0.01, 9.0, 3)],
    ids=["far behind after flow matching", "cannot catch up", "may catch up"],
)
def test_a_candidate_is_trained_as_long_as_it_may_win(behind: float, promised: float, rounds: int) -> None:
    leader, other = Run(0.0, [0.0] * 3, 0.0), Run(-behind, [0.01] * 3, promised)
    runs: list[Any] = [leader, other]
    _train(runs, None)
    assert (leader.rounds, other.rounds) == (3, rounds)
