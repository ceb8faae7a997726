"""The velocity of a continuous normalizing flow, its divergence in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from skode.fields.activations import get_activation
from skode.fields.flow_dynamics import FlowDynamics
from skode.fields.integrands import Integrands
from skode.solver.dynamics import OffersVjp, Weight


class FlowLayer(nn.Module):
    """An affine map whose shift, and gate if it is hidden, are lines in time; a context shifts hidden layers too."""

    weight: nn.Parameter
    bias: nn.Parameter
    drift: nn.Parameter
    gate: nn.Parameter
    context: nn.Parameter

    def __init__(self, n_in: int, n_out: int, n_context: int, hidden: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n_out, n_in))
        self.bias = nn.Parameter(torch.zeros(n_out))
        self.drift = nn.Parameter(torch.zeros(n_out))
        if hidden:
            self.gate = nn.Parameter(torch.zeros(n_out))
        if hidden and n_context:
            self.context = nn.Parameter(torch.zeros(n_out, n_context))


class FlowField(OffersVjp, nn.Module):
    """v(t, y) = W_{L+1} h_L + c_{L+1}(t), h_l = s(g_l(t) * (W_l h_{l-1}) + c_l(t)): a network with exact divergence.

    Gates g_l and shifts c_l are lines in time, a gate and a shift for each hidden unit and a shift for each output.
    Lines suffice: with a shift in time in its first layer the network is a perceptron of (t, y), which approximates any
    velocity; they cost no matrix product for times of the rows' own; and the field stays as smooth in time as its
    activation. An output has no gate: the trace would no longer be one product of slopes with a matrix that all
    rows share.

    With slopes ``e_l = s'(.) g_l(t)`` the divergence, which changes the log-density along the flow [1]_, is
    ``e_1 . diag(W_1 W_2)`` for one hidden layer and ``e_2^T K e_1`` with ``K = W_2 * (W_1 W_3)^T`` (entry by entry) for
    two; for more layers the Jacobian is carried forward.

    Parameters
    ----------
    n_dims : int
        Dimension of the state.
    hidden_layer_sizes : sequence of int, default=(64, 64)
        Units of the hidden layers, of which there is at least one.
    activation : str, default="tanh"
        As for :class:`MLPField`.
    n_context : int, default=0
        Numbers each row is conditioned on; see :meth:`given`.
    zero_output : bool, default=False
        Whether the last layer is zero at the start: the flow is then the identity.
    generator : torch.Generator, optional
        Draws the initial weights; fresh entropy if not given. torch's global generator is not used.

    Raises
    ------
    ValueError
        If a layer has no units, there is no hidden layer, or the activation is unknown.

    References
    ----------
    .. [1] Chen et al., "Neural Ordinary Differential Equations", NeurIPS 2018, section 4, eq. 8. arXiv:1806.07366

    Examples
    --------
    >>> import torch
    >>> from skode.fields import FlowField
    >>> from skode.solver import solve
    >>> field = FlowField(2, (16, 16), generator=torch.Generator().manual_seed(0))
    >>> y0 = torch.ones(5, 2)
    >>> solution = solve(field.dynamics(), y0, [0.0, 1.0], n_quadratures=1)
    >>> solution.y1.shape, solution.quadratures[:, -1].shape  # where rows go, and how much log-density they lose
    (torch.Size([5, 2]), torch.Size([5, 1]))
    """

    def __init__(
        self,
        n_dims: int,
        hidden_layer_sizes: Sequence[int] = (64, 64),
        activation: str = "tanh",
        *,
        n_context: int = 0,
        zero_output: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        sizes = [n_dims, *hidden_layer_sizes, n_dims]
        if len(sizes) < 3 or min(sizes) < 1 or n_context < 0:
            raise ValueError(
                f"a flow needs at least one hidden layer, and a unit in each; got n_dims={n_dims}, "
                f"hidden_layer_sizes={tuple(hidden_layer_sizes)}, n_context={n_context}."
            )
        self.n_dims, self.n_context = n_dims, n_context
        get_activation(activation)  # refuses what is unknown
        self.activation = activation
        pairs = list(pairwise(sizes))
        self.layers = nn.ModuleList(FlowLayer(*pair, n_context, i < len(pairs) - 1) for i, pair in enumerate(pairs))
        if generator is None:
            generator = torch.Generator()
            generator.seed()
        self.draw(generator, zero_output=zero_output)

    def draw(self, generator: torch.Generator, *, zero_output: bool = False) -> None:
        """Draw all parameters anew.

        Weights are uniform with variance 1 / fan_in, context and shifts are in the first layer alone, gates are 1.
        """
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.zero_()
            for layer in self.flow_layers[: -1 if zero_output else None]:
                _draw_uniform(layer.weight, (3.0 / layer.weight.shape[1]) ** 0.5, generator)
            first = self.flow_layers[0]
            for line in (first.bias, first.drift):
                _draw_uniform(line, self.n_dims**-0.5, generator)
            if self.n_context:
                _draw_uniform(first.context, (3.0 / self.n_context) ** 0.5, generator)

    @property
    def flow_layers(self) -> list[FlowLayer]:
        """The layers, hidden ones first."""
        return list(self.layers)  # type: ignore[arg-type]

    @property
    def any_rows(self) -> bool:
        """Whether rows may be copied to make more of them."""
        return self.n_context == 0

    def dynamics(
        self,
        context: Tensor | None = None,
        *,
        trace: bool = True,
        energy: bool = False,
        jacobian: bool = False,
        probe: Tensor | None = None,
    ) -> FlowDynamics:
        """Velocity and integrands, for ``solve(..., n_quadratures=q)``; they stand in the arguments' order.

        Parameters
        ----------
        context : tensor of shape (n, n_context), optional
            Conditions of the rows of the batch, in their order.
        trace : bool, default=True
            The divergence.
        energy : bool, default=False
            abs(v)^2 / d.
        jacobian : bool, default=False
            The Jacobian's squared Frobenius norm, over d: exact for one hidden layer, and without a probe; else its
            estimate by the probe.
        probe : tensor of shape (d,) or (n, d), optional
            One direction for all rows or one each, fixed for the solve: see :func:`draw_probe`.

        Returns
        -------
        FlowDynamics

        Raises
        ------
        FieldError
            If the context has the wrong shape.
        ValueError
            If the probe has.
        """
        return FlowDynamics(self, context, integrands=Integrands(trace, energy, jacobian), probe=probe)

    def is_zero(self) -> bool:
        """Whether the velocity is 0 at all places and times, since the last layer is."""
        return not any(bool(x.any()) for x in self.flow_layers[-1].parameters(recurse=False))

    def given(self, context: Tensor) -> FlowDynamics:
        """The velocity alone for rows with these conditions ``(n, n_context)``."""
        return self.dynamics(context, trace=False)

    def forward(self, t: Tensor, y: Tensor, context: Tensor | None = None) -> Tensor:
        """Velocity ``(n, d)`` at times ``t (n, 1)``, states ``y (n, d)`` and conditions ``(n, n_context)``."""
        return self.dynamics(context, trace=False)(t, y)

    def trace(self, t: Tensor, y: Tensor, context: Tensor | None = None) -> Tensor:
        """The exact divergence ``(n, 1)``, the trace of the Jacobian with the state."""
        return self.dynamics(context)(t, y)[:, -1:]

    # --- what the solver asks of a velocity without conditions ---

    def linearize(self, t: Tensor, y: Tensor) -> tuple[Tensor, Any]:
        """Value, and a tape for :meth:`pull`."""
        return self.dynamics(trace=False).linearize(t, y)

    def pull(self, tape: Any, a: Tensor, *, time: bool = False) -> tuple[Tensor, Tensor | None]:
        """The cotangents of the state and, if asked for, of the time ``(n, 1)``."""
        return self.dynamics(trace=False).pull(tape, a, time=time)

    def accumulate(self, tapes: Sequence[Any], weights: Sequence[Weight] | None = None) -> tuple[Tensor, ...]:
        """The parameters' gradients, summed over evaluations."""
        return self.dynamics(trace=False).accumulate(tapes, weights)

    def trainable(self) -> tuple[Tensor, ...]:
        """All parameters, in the order of :meth:`accumulate`."""
        return tuple(self.parameters())


def _draw_uniform(parameter: Tensor, bound: float, generator: torch.Generator) -> None:
    numbers = torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
    parameter.copy_((numbers * 2 - 1) * bound)
