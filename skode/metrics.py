"""Scorers for searches: what a prediction costs.

Both have the signature of a scikit-learn scorer, so they go into ``scoring={...}`` as they are.
"""

from __future__ import annotations

from typing import Any

__all__ = ["n_evals_score", "neg_n_evals_score"]


def n_evals_score(estimator: Any, X: Any, y: Any = None) -> float:
    """Mean number of evaluations of the field that predicting a row of X takes.

    Parameters
    ----------
    estimator : fitted estimator with ``solver_stats``, or a Pipeline that ends in one
    X : array-like of shape (n_samples, n_features)
    y : ignored

    Returns
    -------
    float

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from sklearn.model_selection import cross_validate
    >>> from skode import ODENetClassifier
    >>> from skode.metrics import n_evals_score
    >>> X, y = load_iris(return_X_y=True)
    >>> scores = cross_validate(
    ...     ODENetClassifier(tol=1.0, random_state=0), X, y, scoring={"accuracy": "accuracy", "cost": n_evals_score}
    ... )
    >>> sorted(scores)
    ['fit_time', 'score_time', 'test_accuracy', 'test_cost']
    """
    steps = getattr(estimator, "steps", None)
    if steps is not None:
        X, estimator = estimator[:-1].transform(X) if len(steps) > 1 else X, steps[-1][1]
    return float(estimator.solver_stats(X)["n_evals"].mean())


def neg_n_evals_score(estimator: Any, X: Any, y: Any = None) -> float:
    """``-n_evals_score``: greater is better, for ``refit``.

    Parameters
    ----------
    estimator : fitted estimator with ``solver_stats``, or a Pipeline that ends in one
    X : array-like of shape (n_samples, n_features)
    y : ignored

    Returns
    -------
    float

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from skode import ODENetClassifier
    >>> from skode.metrics import n_evals_score, neg_n_evals_score
    >>> X, y = load_iris(return_X_y=True)
    >>> model = ODENetClassifier(tol=1.0, random_state=0).fit(X, y)
    >>> neg_n_evals_score(model, X) == -n_evals_score(model, X)
    True
    """
    return -n_evals_score(estimator, X, y)
