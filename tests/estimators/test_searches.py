"""Searches: by halving, at random, by Optuna, over a dask cluster; of nets on tables and latent ODEs on panels."""

from collections.abc import Iterator
from pathlib import Path

import joblib
import numpy as np
import optuna
import pytest
from distributed import Client, LocalCluster
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna_integration import OptunaSearchCV
from sklearn.base import BaseEstimator, clone
from sklearn.experimental import enable_halving_search_cv  # noqa: F401
from sklearn.model_selection import GridSearchCV, HalvingGridSearchCV, RandomizedSearchCV
from sklearn.utils import estimator_html_repr

from skode import LatentODERegressor, ODENetClassifier, Panel
from tests.estimators.series import SMALL, panel_of

# Short fits warn that they are short; what is tested here is something else.
pytestmark = pytest.mark.filterwarnings("ignore:Maximum iterations")
# Optuna says so of every OptunaSearchCV, and its integration reports scores through a module that Optuna will drop.
from_optuna = pytest.mark.filterwarnings(
    "ignore:OptunaSearchCV is experimental:optuna.exceptions.ExperimentalWarning",
    "ignore:`optuna.terminator` module has been deprecated:FutureWarning",
)

NET = ODENetClassifier(n_members=1, max_iter=10, learning_rate_init=0.05, random_state=0)
SERIES = LatentODERegressor(**SMALL, max_iter=3, early_stopping=False, random_state=0)
SIZES = {"hidden_layer_sizes": [2, 8, 16]}
SEARCHES = {
    "grid": GridSearchCV(NET, SIZES, cv=2),
    "random": RandomizedSearchCV(NET, SIZES | {"energy_penalty": [0.0, 0.1]}, n_iter=3, cv=2, random_state=0),
    "halving rows": HalvingGridSearchCV(NET, SIZES, cv=2, factor=2, random_state=0),
    "halving epochs": HalvingGridSearchCV(
        NET, SIZES, cv=2, factor=2, resource="max_iter", min_resources=4, max_resources=8, random_state=0
    ),
    "grid of series": GridSearchCV(SERIES, {"latent_dim": [2, 3]}, cv=2),
}


def table(n: int = 80) -> tuple[np.ndarray, np.ndarray]:
    """Points on the two sides of a noisy wave."""
    rng = np.random.default_rng(0)
    X = rng.uniform(-2, 2, (n, 2))
    return X, (X[:, 1] + 0.2 * rng.normal(size=n) > np.sin(2 * X[:, 0])).astype(int)


def data_of(search: BaseEstimator) -> tuple[object, object]:
    return (panel_of(6, 0), None) if isinstance(search.estimator, LatentODERegressor) else table()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """Two worker processes of one thread each, on this machine alone."""
    folder: Path = tmp_path_factory.mktemp("dask")
    with (
        LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            processes=True,
            host="127.0.0.1",
            dashboard_address=None,
            local_directory=str(folder),
        ) as workers,
        Client(workers) as client,
    ):
        yield client


@pytest.mark.parametrize("name", ["grid", "random", "halving rows", "grid of series"])
def test_a_search_on_a_dask_cluster_equals_the_one_in_this_process(cluster: Client, name: str) -> None:
    here = clone(SEARCHES[name])
    X, y = data_of(here)
    here.fit(X, y)
    there = clone(SEARCHES[name]).set_params(n_jobs=-1)
    with joblib.parallel_config("dask"):
        there.fit(X, y)
    assert there.best_params_ == here.best_params_
    assert np.ptp(here.cv_results_["mean_test_score"]) > 0
    np.testing.assert_array_equal(there.cv_results_["mean_test_score"], here.cv_results_["mean_test_score"])


@pytest.mark.parametrize("name", ["halving rows", "halving epochs"])
def test_halving_gives_more_to_fewer_candidates(name: str) -> None:
    search = clone(SEARCHES[name])
    search.fit(*data_of(search))
    assert search.n_candidates_ == [3, 2]
    assert search.n_resources_[1] == 2 * search.n_resources_[0]
    assert search.best_estimator_.get_params().items() >= search.best_params_.items()


@from_optuna
@pytest.mark.parametrize(
    ("estimator", "name", "values"),
    [(NET, "hidden_layer_sizes", [2, 8, 16]), (SERIES, "latent_dim", [2, 3])],
    ids=["net", "series"],
)
def test_optuna_finds_what_a_grid_finds_among_the_same_candidates(
    estimator: BaseEstimator, name: str, values: list[int]
) -> None:
    grid = GridSearchCV(estimator, {name: values}, cv=2)
    X, y = data_of(grid)
    grid.fit(X, y)
    study = optuna.create_study(direction="maximize")
    for value in values:
        study.enqueue_trial({name: value})
    search = OptunaSearchCV(
        estimator, {name: CategoricalDistribution(values)}, cv=2, n_trials=len(values), study=study, random_state=0
    ).fit(X, y)
    assert [trial.params[name] for trial in search.trials_] == values
    assert [trial.value for trial in search.trials_] == list(grid.cv_results_["mean_test_score"])
    assert search.best_params_ == grid.best_params_
    expected = grid.predict(X)
    found = search.predict(X)
    assert found == expected if isinstance(X, Panel) else np.array_equal(found, expected)


@from_optuna
def test_optuna_draws_the_same_candidates_for_the_same_seed() -> None:
    space = {"learning_rate_init": FloatDistribution(1e-3, 1e-1, log=True), "rtol": FloatDistribution(1e-4, 0.1)}
    one, two = (OptunaSearchCV(NET, space, cv=2, n_trials=3, random_state=1).fit(*table()) for _ in range(2))
    assert [trial.params for trial in one.trials_] == [trial.params for trial in two.trials_]
    assert one.best_score_ == two.best_score_
    assert len({trial.params["rtol"] for trial in one.trials_}) == 3


@pytest.mark.parametrize("name", ["grid", "grid of series"])
def test_a_notebook_shows_a_search_and_the_estimator_in_it(name: str) -> None:
    search = clone(SEARCHES[name])
    inner = type(search.estimator).__name__
    for shown in (search, search.fit(*data_of(search))):
        page = estimator_html_repr(shown)
        assert "GridSearchCV" in page
        assert inner in page
        assert inner in repr(shown)
    assert "best_estimator_" in page
