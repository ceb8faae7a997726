"""Fitted estimators as modules of torch: the same predictions, gradients, exports."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch

from skode import (
    ContinuousFlowDensity,
    ContinuousFlowRegressor,
    LatentODERegressor,
    ODENetClassifier,
    ODENetRegressor,
    Panel,
)
from skode.exceptions import SolverError

NET = {"max_iter": 5, "random_state": 0, "early_stopping": False}
FLOW = {"max_iter": 10, "random_state": 0, "early_stopping": False, "hidden_layer_sizes": (8,)}
# Short fits warn that they are short.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Maximum iterations"),
    pytest.mark.filterwarnings("ignore:.*the density leaves it out"),
    pytest.mark.filterwarnings("ignore:log-densities of the training rows"),
]


def table(n: int = 40, seed: int = 0) -> np.ndarray[Any, Any]:
    """Two continuous columns, counts, odd levels, a constant and a sum."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 2))
    levels = np.array([0.1, 0.4, 2.0])[rng.integers(3, size=n)]
    return np.column_stack([x, rng.integers(5, size=n), levels, np.ones(n), x[:, 0] + 2 * x[:, 1]])


def labels(X: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.where(X[:, 0] > 0, "up", "down")


def assert_equal(found: torch.Tensor, expected: Any, tolerance: float = 1e-10) -> None:
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=tolerance, atol=tolerance)


class Linear(torch.nn.Module):
    def __init__(self, n_dims: int) -> None:
        super().__init__()
        self.map = torch.nn.Linear(n_dims, n_dims)

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.map(y)) * t


NETS: list[dict[str, Any]] = [
    {},
    {"n_members": 1, "augment_dim": 2, "method": "rk4", "hidden_layer_sizes": 8},
    {"n_members": 2, "hidden_layer_sizes": 8, "order": 2, "method": "midpoint", "step_size": 0.3},
    {"image_shape": (1, 2, 3), "n_members": 2, "hidden_layer_sizes": 4},
    {"field": Linear, "n_members": 2, "rtol": 1e-5},
]


@pytest.mark.parametrize("options", NETS)
def test_a_network_as_a_module_predicts_the_same(options: dict[str, Any]) -> None:
    X = table()
    classifier = ODENetClassifier(**NET, **options).fit(X, labels(X))
    assert_equal(classifier.to_torch()(torch.tensor(X)), classifier.predict_proba(X))
    for y in (X[:, 0], X[:, :2] * 100):
        regressor = ODENetRegressor(**NET, **options).fit(X, y)
        assert_equal(regressor.to_torch()(torch.tensor(X)), regressor.predict(X))


def test_a_module_of_float32_stays_so_and_moves() -> None:
    X = table().astype(np.float32)
    net = ODENetRegressor(**NET).fit(X, X[:, 0])
    module = net.to_torch(method="rk4")
    assert {tensor.dtype for tensor in module.parameters()} == {torch.float32}
    expected = net.set_params(method="rk4").predict(X)
    assert_equal(module(torch.tensor(X)), expected, 1e-5)
    assert_equal(module.double()(torch.tensor(X).double()), expected, 1e-5)


@pytest.mark.parametrize(
    "options", [{}, {"n_members": 2}, {"net": "planar"}, {"base": "student_t"}, {"rtol": 0.5, "discrete": None}]
)
@pytest.mark.parametrize("columns", [slice(0, 2), slice(0, 6), slice(4, 5)])
def test_a_density_as_a_module_scores_the_same(options: dict[str, Any], columns: slice) -> None:
    X = table()[:, columns]
    density = ContinuousFlowDensity(**FLOW, **options).fit(X)
    rows = table(20, seed=1)[:, columns]
    rows[:3, -1] += 0.7  # off the lattice, off the constant, off the sum
    rows[3] *= 20
    assert_equal(density.to_torch()(torch.tensor(rows)), density.score_samples(rows), 1e-9)


def test_rows_that_need_tighter_solves_get_them() -> None:
    X = table()[:, :2]
    density = ContinuousFlowDensity(**FLOW).fit(X)
    flow = density._flows[0]
    assert flow is not None
    rng = np.random.default_rng(0)
    for array in flow.field_arrays.values():
        array[...] = 4 * rng.normal(size=array.shape)  # a field that is hard to solve
    module = density.to_torch()
    rungs = module.flows._rungs(module.flows.flows[0], module.table.places(torch.tensor(X))[0], None)
    assert len(rungs.unique()) > 1
    rows = X[torch.cat([torch.nonzero(rungs > 0)[:2, 0], torch.arange(3)])]
    assert_equal(module(torch.tensor(rows)), density.score_samples(rows))


@pytest.mark.parametrize("targets", [[0], [0, 2, 4]])
def test_a_conditional_density_as_a_module_predicts_and_scores_the_same(targets: list[int]) -> None:
    X = table(24)
    Y = X[:, targets] if len(targets) > 1 else X[:, 0]
    model = ContinuousFlowRegressor(**FLOW, n_members=2).fit(X[:, 1:4], Y)
    module, rows = model.to_torch(), torch.tensor(X[:, 1:4])
    assert_equal(module(rows), model.predict(X[:, 1:4]))
    assert_equal(module.log_density(rows, torch.tensor(Y)), model.score_samples(X[:, 1:4], Y), 1e-9)


def test_a_conditional_density_of_few_rows_has_no_network_for_the_mean() -> None:
    X = table(8)
    model = ContinuousFlowRegressor(**FLOW, n_members=1).fit(X[:, :1], X[:, 1])
    assert_equal(model.to_torch()(torch.tensor(X[:, :1])), model.predict(X[:, :1]))


def series() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], Panel]:
    rng = np.random.default_rng(0)
    t = np.sort(rng.uniform(0, 6, (6, 9)), axis=1)
    values = np.stack([np.sin(t), 3 + np.cos(t)], axis=2)
    values[rng.random(values.shape) < 0.2] = np.nan
    values[2] = np.nan  # a series without any observation
    return t, values, Panel.from_dense(values, times=t, origin=0.0)


LATENT = {
    "max_iter": 10,
    "latent_dim": 2,
    "encoder_layer_sizes": (8,),
    "hidden_layer_sizes": (8,),
    "random_state": 0,
}


@pytest.mark.parametrize("options", [{}, {"encoder": "ode_rnn", "likelihood": ["student_t", "gaussian"]}])
def test_a_latent_ode_as_a_module_predicts_the_same(options: dict[str, Any]) -> None:
    t, values, panel = series()
    model = LatentODERegressor(**LATENT, **options).fit(panel)
    module, given = model.to_torch(), torch.tensor(values, requires_grad=True)
    query = [0.5, 3.0, 6.5, 9.0]
    found = module(torch.tensor(t), given, torch.tensor(query, dtype=torch.float64).repeat(6, 1))
    assert_equal(found, model.predict(panel, times=query))
    found[0].sum().backward()
    assert given.grad is not None
    slopes = given.grad[0][~torch.isnan(given.detach()[0])]
    assert bool(slopes.isfinite().all()) and bool((slopes != 0).any())
    moved = values.copy()
    channel = int(np.flatnonzero(~np.isnan(values[0, 4]))[0])
    moved[0, 4, channel] += 1e-5
    forecast = model.predict(Panel.from_dense(moved, times=t, origin=0.0), times=query)
    difference = (forecast - model.predict(panel, times=query)).sum() / 1e-5
    assert given.grad[0, 4, channel].item() == pytest.approx(difference, rel=2e-2, abs=1e-4)
    with pytest.raises(ValueError, match="needs query_times"):
        module(torch.tensor(t), given)


def test_modules_of_targets_have_second_derivatives_by_values_and_weights() -> None:
    t, values, panel = series()
    module = LatentODERegressor(**LATENT).fit(panel, np.arange(len(panel), dtype=float)).to_torch()
    times, given = torch.tensor(t), torch.nan_to_num(torch.tensor(values))
    weight = next(x for name, x in module.named_parameters() if name.endswith("encoder.offset"))

    def slopes(x: torch.Tensor) -> torch.Tensor:
        asked = x.clone().requires_grad_()
        (found,) = torch.autograd.grad(module(times, asked).square().sum(), asked)
        return found

    def steepness(create_graph: bool) -> torch.Tensor:
        (found,) = torch.autograd.grad(module(times, given).square().sum(), weight, create_graph=create_graph)
        return found.square().sum()

    asked = given.clone().requires_grad_()
    (first,) = torch.autograd.grad(module(times, asked).square().sum(), asked, create_graph=True)
    torch.testing.assert_close(torch.func.grad(lambda x: module(times, x).square().sum())(given), first)
    (second,) = torch.autograd.grad(first.sum(), asked)
    torch.testing.assert_close(second, (slopes(given + 1e-5) - slopes(given - 1e-5)) / 2e-5, rtol=1e-5, atol=1e-7)
    (by_weight,) = torch.autograd.grad(steepness(create_graph=True), weight)
    with torch.no_grad():
        weight[3] += 1e-6
    high = steepness(create_graph=False)
    with torch.no_grad():
        weight[3] -= 2e-6
    difference = float(high - steepness(create_graph=False)) / 2e-6
    assert float(by_weight[3]) == pytest.approx(difference, rel=1e-3) and difference != 0


def test_a_latent_ode_of_targets_as_a_module_predicts_them() -> None:
    t, values, panel = series()
    model = LatentODERegressor(**LATENT).fit(panel, np.arange(6.0))
    assert_equal(model.to_torch()(torch.tensor(t), torch.tensor(values)), model.predict(panel))


# --- what a module is ---


@pytest.mark.parametrize(
    "fit",
    [
        lambda X: ODENetClassifier(**NET, n_members=1).fit(X, labels(X)),
        lambda X: ODENetRegressor(**NET, n_members=1).fit(X, X[:, 0]),
        lambda X: ContinuousFlowDensity(**FLOW).fit(X),
        lambda X: ContinuousFlowRegressor(**FLOW, n_members=1).fit(X, X[:, 0]),
    ],
)
def test_modules_have_weights_of_their_own_and_gradients_reach_rows_and_weights(fit: Any) -> None:
    X = table(12)[:, :2]
    model = fit(X)
    module = model.to_torch(method="rk4", step_size=0.25)
    assert not module.training
    # Not the rows of the fit: encodings of columns have their kinks there.
    x = torch.tensor(table(12, seed=1)[:, :2], requires_grad=True)
    first = module(x)[..., 0] if module(x).dim() > 1 else module(x)
    first.sum().backward()
    assert x.grad is not None and bool((x.grad != 0).any())
    assert all(parameter.grad is not None for parameter in module.parameters())
    with torch.no_grad():
        step = torch.zeros_like(x)
        step[:, 0] = 1e-6
        near = module(x + step)
        near = near[..., 0] if near.dim() > 1 else near
    np.testing.assert_allclose(((near - first) / 1e-6).detach(), x.grad[:, 0], rtol=1e-3, atol=1e-5)
    before = model.to_torch()(x)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert torch.equal(model.to_torch()(x), before)


def test_a_module_names_rows_that_fail() -> None:
    X = table()
    net = ODENetClassifier(**SMALL).fit(X, labels(X)).set_params(max_num_steps=1, rtol=1e-9, atol=1e-12)
    with pytest.raises(SolverError, match="first: row 0, which"):
        net.to_torch()(torch.tensor(X))


def test_methods_and_steps_that_do_not_go_together_are_refused() -> None:
    X = table()
    net = ODENetClassifier(**NET).fit(X, labels(X))
    with pytest.raises(ValueError, match="fixed-step methods, but 'tsit5' adapts"):
        net.to_torch(step_size=0.1)
    with pytest.raises(ValueError, match="method='rk5' is unknown"):
        net.to_torch(method="rk5")


# --- exports ---

SMALL = {**NET, "hidden_layer_sizes": 4}
SIZES = {"X": {0: torch.export.Dim("n", min=2)}}


def exported(module: torch.nn.Module, rows: torch.Tensor) -> Any:
    return torch.export.export(module, (rows,), dynamic_shapes=SIZES).module()


@pytest.mark.parametrize(
    "fit",
    [
        lambda X: ODENetClassifier(**SMALL, n_members=2).fit(X, labels(X)),
        lambda X: ODENetRegressor(**SMALL, n_members=2, field=Linear).fit(X, X[:, 0]),
        lambda X: ContinuousFlowDensity(**FLOW).fit(X),
    ],
    ids=["classifier", "field", "density"],
)
def test_an_exported_module_takes_any_number_of_rows(fit: Any) -> None:
    X = table()
    X[0, 0] = 1e30
    module = fit(X[1:, :3]).to_torch(method="midpoint", step_size=0.5)
    rows = torch.tensor(X[:, :3])
    program = exported(module, rows[1:6])
    assert_equal(program(rows[1:]), module(rows[1:]).detach())
    if not hasattr(module, "flows"):  # a row this far is beyond what a density's squares can hold
        assert_equal(program(rows), module(rows).detach())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("Net", [ODENetClassifier, ODENetRegressor])
def test_onnx_runs_an_exported_network_on_any_number_of_rows(Net: Any) -> None:
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    X = table()
    net = Net(**SMALL, n_members=2, method="euler", step_size=0.5).fit(
        X, labels(X) if Net is ODENetClassifier else X[:, :2]
    )
    rows = torch.tensor(X)
    program = torch.onnx.export(
        net.to_torch(), (rows[:5],), dynamo=True, dynamic_shapes={"X": {0: torch.export.Dim("n")}}, verbose=False
    )
    file = io.BytesIO()
    program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    predict = net.predict_proba if Net is ODENetClassifier else net.predict
    for part in (X, X[:1], X[:7]):
        (found,) = session.run(None, {session.get_inputs()[0].name: part})
        np.testing.assert_allclose(found, predict(part), rtol=1e-6, atol=1e-6)
