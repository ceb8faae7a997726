"""Ctrl-C ends training; what was found until then is kept."""

import numpy as np
import pytest
from sklearn.datasets import load_iris, make_moons

from skode import ContinuousFlowDensity, LatentODERegressor, ODENetRegressor

SERIES = np.sin(np.linspace(0, 6, 12)) + 0.1 * np.random.default_rng(0).normal(size=(12, 12))
MOONS, _ = make_moons(60, noise=0.1, random_state=0)


class Interrupt:
    """A callback in whose n-th task the user has had enough."""

    def __init__(self, n):
        self.n, self.ended = n, []

    def setup(self, estimator, context):
        pass

    def on_fit_task_begin(self, estimator, context, **given):
        pass

    def on_fit_task_end(self, estimator, context, **given):
        self.ended.append(context.task_name)
        if len(self.ended) == self.n:
            raise KeyboardInterrupt

    def teardown(self, estimator, context):
        pass


def test_an_interrupted_flow_is_usable_and_no_other_member_is_begun():
    callback = Interrupt(2)
    flow = ContinuousFlowDensity(hidden_layer_sizes=8, max_iter=16, n_members=3, random_state=0).set_callbacks(callback)
    with pytest.warns(UserWarning, match="interrupted"):
        flow.fit(MOONS)
    assert callback.ended == ["round", "round", "member", "fit"]
    assert flow.n_iter_ == 42  # 40 by flow matching from a mixture, 2 by likelihood
    assert np.isfinite(flow.score(MOONS))


def test_an_interrupted_latent_ode_is_usable_and_not_refitted():
    callback = Interrupt(1)
    model = LatentODERegressor(latent_dim=2, max_iter=40, random_state=0).set_callbacks(callback)
    with pytest.warns(UserWarning, match="interrupted"):
        model.fit(SERIES)
    assert callback.ended == ["round", "fit"]
    assert model.n_iter_ == 10
    assert np.isfinite(model.predict(SERIES)).all()


def test_a_net_interrupted_before_its_first_epoch_has_no_loss():
    class AtOnce(Interrupt):
        def on_fit_task_begin(self, estimator, context, **given):
            if context.task_name == "epoch":
                raise KeyboardInterrupt

    X, y = load_iris(return_X_y=True)
    net = ODENetRegressor(n_members=1, max_iter=3, tol=1.0, random_state=0, warm_start=True).fit(X, y)
    with pytest.warns(UserWarning, match="interrupted"):
        net.set_callbacks(AtOnce(0)).fit(X, y)
    assert (net.n_iter_, net.loss_curve_, net.loss_, net.best_loss_) == (0, [], None, None)
