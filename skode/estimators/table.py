"""The table that ``verbose`` prints."""

from __future__ import annotations

from skode.training import Epoch


class Table:
    """Prints a line an epoch.

    Parameters
    ----------
    validated : bool
        Whether there is a validation score.
    """

    def __init__(self, validated: bool) -> None:
        self._validated = validated
        score = "  validation" if validated else ""
        print(f"{'epoch':>6}{'loss':>12}{score}{'evals/row':>11}{'seconds':>9}")

    def __call__(self, epoch: Epoch) -> None:
        """Print the line of ``epoch``."""
        score = f"{'' if epoch.validation_score is None else format(epoch.validation_score, '.4f'):>12}"
        shown = score if self._validated else ""
        print(f"{epoch.number:>6}{epoch.loss:>12.5f}{shown}{epoch.n_evals:>11.1f}{epoch.seconds:>9.1f}")
