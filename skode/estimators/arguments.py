"""What all estimators share: constraints of arguments, with scikit-learn's names and meanings; links to the docs."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any, ClassVar

import numpy as np
import torch
from sklearn.utils._param_validation import Interval, StrOptions

from skode.fields import ACTIVATIONS
from skode.solver import METHODS
from skode.solver.strategies import STRATEGIES

DOCUMENTATION = "https://skode.readthedocs.io/en/stable/"


class DocumentationLink:
    """Where scikit-learn's notebook representation of an estimator finds its page; goes before ``BaseEstimator``."""

    _doc_link_module: ClassVar[str] = "skode"
    _doc_link_template: ClassVar[str] = DOCUMENTATION + "api/generated/skode.{estimator_name}.html"


SHARED_CONSTRAINTS: dict[str, Any] = {
    "activation": [StrOptions(set(ACTIVATIONS))],
    "field": [None, callable],
    "energy_penalty": [Interval(Real, 0, None, closed="left")],
    "error_penalty": [Interval(Real, 0, None, closed="left")],
    "method": [StrOptions({"auto", *METHODS})],
    "rtol": [Interval(Real, 0, None, closed="neither")],
    "atol": [Interval(Real, 0, None, closed="left")],
    "step_size": [None, Interval(Real, 0, None, closed="neither")],
    "max_num_steps": [Interval(Integral, 1, None, closed="left")],
    "gradient": [StrOptions(set(STRATEGIES))],
    "device": [str, torch.device],
    "dtype": "no_validation",
    "alpha": [Interval(Real, 0, None, closed="left")],
    "learning_rate_init": [Interval(Real, 0, None, closed="neither")],
    "shuffle": ["boolean"],
    "random_state": ["random_state", np.random.Generator],
    "tol": [Interval(Real, 0, None, closed="left")],
    "verbose": ["verbose"],
    "warm_start": ["boolean"],
    "early_stopping": [StrOptions({"auto"}), "boolean"],
    "validation_fraction": [Interval(Real, 0, 1, closed="neither")],
    "n_iter_no_change": [Interval(Integral, 1, None, closed="left")],
}
