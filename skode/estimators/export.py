"""``to_torch`` of ODE networks: from raw X to predictions."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace

import torch
from sklearn.utils.validation import check_is_fitted

from skode.estimators.fitted import FittedNet
from skode.estimators.stored import Stored
from skode.models import ODENet, SolverOptions
from skode.models.export import NetModule
from skode.runtime import torch_dtype
from skode.solver import METHODS

CPU = torch.device("cpu")


def chosen_solver(solver: SolverOptions, method: str | None, step_size: float | None, length: float) -> SolverOptions:
    """The solver of a module: the estimator's, or another method.

    Raises
    ------
    ValueError
        If the method is unknown, or adapts its steps and gets a step size.
    """
    name = solver.method if method is None else method
    if name not in METHODS:
        raise ValueError(f"method={name!r} is unknown; use one of {', '.join(METHODS)}.")
    if not METHODS[name].adaptive:
        step = solver.step_size or length / 10 if step_size is None else float(step_size)
        return replace(solver, method=name, step_size=step, gradient="discrete")
    if step_size is not None:
        raise ValueError(
            f"step_size={step_size} goes with fixed-step methods, but {name!r} "
            "adapts its steps; give a method such as 'rk4'."
        )
    return replace(solver, method=name, step_size=None, gradient="discrete")


class NetExport(Stored):
    """``to_torch`` of ODE networks."""

    _net: FittedNet

    @abstractmethod
    def _solver_options(self, *, training: bool = False) -> SolverOptions:
        """Of predictions."""

    @abstractmethod
    def _module(self, net: ODENet, solver: SolverOptions) -> NetModule:
        """From raw X to predictions."""

    def to_torch(self, *, method: str | None = None, step_size: float | None = None) -> NetModule:
        """The fitted model as a module of torch.

        Parameters
        ----------
        method : str, optional
            Solver, see :func:`skode.solver.solve`; that of predictions by default. A fixed-step method ("rk4",
            "midpoint", ...) makes a module that ``torch.export`` and ``torch.onnx.export`` take.
        step_size : float, optional
            Of a fixed-step method; the estimator's by default, else a tenth of the interval.

        Returns
        -------
        torch.nn.Module
            In evaluation mode on the CPU, with weights of its own in the dtype of the fit; ``.to()`` moves it. It maps
            raw rows (n, n_features), tensors of its dtype, to what ``predict_proba`` (classifier) or ``predict``
            (regressor) gives. Rows take steps of their own. Gradients reach X and the parameters.

        Raises
        ------
        ValueError
            If ``step_size`` is given and the method adapts its steps.

        Examples
        --------
        >>> import torch
        >>> from sklearn.datasets import load_iris
        >>> from skode import ODENetClassifier
        >>> X, y = load_iris(return_X_y=True)
        >>> module = ODENetClassifier(max_iter=20, tol=0.01, random_state=0).fit(X, y).to_torch()
        >>> module(torch.tensor(X[:4])).shape
        torch.Size([4, 3])
        """
        check_is_fitted(self)
        return self._exported(torch_dtype(self.dtype_), method, step_size)

    def _exported(self, dtype: torch.dtype, method: str | None, step_size: float | None) -> NetModule:
        net = self._net.build(dtype, CPU)
        module = self._module(net, chosen_solver(self._solver_options(), method, step_size, net.config.t1))
        return module.to(dtype).eval()
