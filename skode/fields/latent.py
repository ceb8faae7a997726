"""Latent dynamics that cannot run away: a stable linear part and a bounded network.

Symbols: ``z (n, d)`` states, ``u (n, k)`` known inputs, ``r (n, 1)`` the rows' durations, ``m`` the network's value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from skode.fields.mlp import MLPField
from skode.solver.dynamics import Weight

Inputs = Callable[[Tensor], Tensor]


class LatentField(nn.Module):
    """dz/dt = A z + s tanh(net(z, u)) with A = S - S^T - diag(softplus(c)).

    A's symmetric part is negative, so that abs(z) never exceeds abs(s) / min(softplus(c)) for long, whatever the
    network learned: predictions far ahead stay where the decoder knows its way.

    Parameters
    ----------
    n_dims : int
        d.
    hidden_layer_sizes : sequence of int, default=(64, 64)
    activation : str, default="tanh"
        As for :class:`MLPField`.
    n_inputs : int, default=0
        k; see :meth:`dynamics`.
    intensity : bool, default=False
        Whether there is a second network for a rate of events.
    base_rate : float, default=1
        The rate where that network says 0.
    generator : torch.Generator, optional
        Draws the initial weights; fresh entropy if not given.

    Examples
    --------
    >>> import torch
    >>> from skode.fields import LatentField
    >>> from skode.solver import solve
    >>> field = LatentField(4, (16,), generator=torch.Generator().manual_seed(0))
    >>> solve(field.dynamics(), torch.ones(3, 4), [0.0, 10.0]).y1.shape
    torch.Size([3, 4])
    """

    def __init__(
        self,
        n_dims: int,
        hidden_layer_sizes: Sequence[int] = (64, 64),
        activation: str = "tanh",
        *,
        n_inputs: int = 0,
        intensity: bool = False,
        base_rate: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.rate_unit = base_rate / math.log(2.0)
        if generator is None:
            generator = torch.Generator()
            generator.seed()
        self.n_dims, self.n_inputs = n_dims, n_inputs
        self.network = MLPField(
            n_dims + n_inputs, hidden_layer_sizes, activation, False, n_outputs=n_dims, generator=generator
        )
        turn = torch.randn(n_dims, n_dims, generator=generator, dtype=torch.float64) * (0.5 / n_dims**0.5)
        self.turn = nn.Parameter(turn.to(torch.get_default_dtype()))
        self.damping = nn.Parameter(torch.full((n_dims,), -2.0))
        self.reach = nn.Parameter(torch.ones(n_dims))
        self.intensity: MLPField | None = None
        if intensity:
            self.intensity = MLPField(n_dims + n_inputs, (32,), activation, False, n_outputs=1, generator=generator)

    def matrix(self) -> Tensor:
        """A ``(d, d)``."""
        return self.turn - self.turn.mT - torch.diag(softplus(self.damping))

    def rate(self, z: Tensor, inputs: Tensor | None = None) -> Tensor:
        """The rate of events at states ``(n, d)`` and known inputs ``(n, n_inputs)``: ``(n,)``, positive.

        Raises
        ------
        ValueError
            If the field was made without ``intensity``.
        """
        if self.intensity is None:
            raise ValueError("this field was made without intensity=True.")
        seen = z if inputs is None else torch.cat([z, inputs], dim=1)
        return self.rate_unit * softplus(self.intensity(z.new_zeros(len(z), 1), seen)).squeeze(1)

    def dynamics(
        self, durations: Tensor | None = None, inputs: Inputs | None = None, *, intensity: bool = False
    ) -> LatentDynamics:
        """The right-hand side for a batch of rows.

        Parameters
        ----------
        durations : tensor of shape (n, 1), optional
            Rows whose time runs through such a length, of either sign, while the solver's runs from 0 to 1.
        inputs : callable, optional
            Gives ``(n, n_inputs)`` at the solver's times ``(n, 1)``. They get no gradients.
        intensity : bool, default=False
            Whether the rate of events follows, as the integrand of ``solve(..., n_quadratures=1)``.

        Returns
        -------
        LatentDynamics
        """
        return LatentDynamics(self, durations, inputs, intensity=intensity)

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        """The derivative ``(n, d)`` without inputs."""
        return self.dynamics()(t, z)


class _Tape:
    """One evaluation, and after ``pull`` the cotangents of the derivative and, times the reach, of tanh's argument."""

    __slots__ = ("a", "bounded", "inner", "rate", "rate_inner", "z")

    def __init__(self, z: Tensor, bounded: Tensor, inner: Any, rate: Tensor | None, rate_inner: Any) -> None:
        self.z, self.bounded, self.inner, self.rate, self.rate_inner = z, bounded, inner, rate, rate_inner
        self.a: Tensor | None = None

    @property
    def nbytes(self) -> int:
        own = 3 * self.bounded.numel() * self.bounded.element_size() + int(self.inner.nbytes)
        return own if self.rate_inner is None else own + int(self.rate_inner.nbytes)


class LatentDynamics:
    """A :class:`LatentField` for a batch of rows, derivatives written by hand; ``field.dynamics(...)`` makes it.

    Parameters
    ----------
    field : LatentField
    durations : tensor of shape (n, 1), optional
    inputs : callable, optional
    intensity : bool

    Examples
    --------
    >>> import torch
    >>> from skode.fields import LatentField
    >>> from skode.solver import solve
    >>> field = LatentField(3, generator=torch.Generator().manual_seed(0))
    >>> durations = torch.tensor([[1.0], [2.0]])  # the second series lasts twice as long
    >>> solve(field.dynamics(durations=durations), torch.ones(2, 3), [0.0, 1.0]).y1.shape
    torch.Size([2, 3])
    """

    def __init__(
        self, field: LatentField, durations: Tensor | None, inputs: Inputs | None, *, intensity: bool = False
    ) -> None:
        if (inputs is None) != (field.n_inputs == 0):
            raise ValueError(f"a field with n_inputs={field.n_inputs} needs inputs exactly if it takes any.")
        if intensity and field.intensity is None:
            raise ValueError("this field was made without intensity=True.")
        self._field, self._durations, self._inputs = field, durations, inputs
        self._network = field.network
        self._rate = field.intensity if intensity else None
        self.any_rows = durations is None and inputs is None
        self.n_quadratures = int(intensity)
        with torch.no_grad():
            self._matrix = field.matrix()

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        matrix = self._field.matrix() if torch.is_grad_enabled() else self._matrix
        seen = self._seen(t, y)
        bounded = torch.tanh(self._network(t, seen))
        f = torch.addcmul(y @ matrix.mT, self._field.reach, bounded)
        if self._rate is not None:
            f = torch.cat([f, self._field.rate_unit * softplus(self._rate(t, seen))], dim=1)
        return f if self._durations is None else f * self._durations

    def linearize(self, t: Tensor, y: Tensor) -> tuple[Tensor, _Tape]:
        seen = self._seen(t, y)
        value, inner = self._network.linearize(t, seen)
        bounded = value.tanh_()
        f = torch.addcmul(y @ self._matrix.mT, self._field.reach, bounded)
        before, rate_inner = None, None
        if self._rate is not None:
            before, rate_inner = self._rate.linearize(t, seen)
            f = torch.cat([f, self._field.rate_unit * softplus(before)], dim=1)
        tape = _Tape(y, bounded, inner, before, rate_inner)
        return (f if self._durations is None else f.mul_(self._durations)), tape

    def pull(self, tape: _Tape, a: Tensor, *, time: bool = False) -> tuple[Tensor, Tensor | None]:
        if self._durations is not None:
            a = a * self._durations
        d = self._field.n_dims
        own = a[:, :d] if self._rate is not None else a.clone()
        delta = own * self._field.reach
        delta = torch.addcmul(delta, delta, tape.bounded.square(), value=-1)
        through, _ = self._network.pull(tape.inner, delta)
        dy = torch.addmm(through[:, :d], own, self._matrix)
        if self._rate is not None:
            assert tape.rate is not None
            through, _ = self._rate.pull(tape.rate_inner, a[:, d:] * (self._field.rate_unit * tape.rate.sigmoid()))
            dy = dy + through[:, :d]
        tape.a = own
        return dy, a.new_zeros(len(a), 1) if time else None

    def accumulate(self, tapes: Sequence[_Tape], weights: Sequence[Weight] | None = None) -> tuple[Tensor, ...]:
        field = self._field
        turn, reach = torch.zeros_like(field.turn), torch.zeros_like(field.reach)
        for i, tape in enumerate(tapes):
            assert tape.a is not None
            a = tape.a if weights is None else tape.a * weights[i]
            turn.addmm_(a.mT, tape.z)
            reach += (a * tape.bounded).sum(dim=0)
        damping = -turn.diagonal() * field.damping.sigmoid()
        gradients = (turn - turn.mT, damping, reach, *self._network.accumulate([t.inner for t in tapes], weights))
        if self._rate is None:
            return gradients
        return (*gradients, *self._rate.accumulate([tape.rate_inner for tape in tapes], weights))

    def trainable(self) -> tuple[Tensor, ...]:
        field = self._field
        own = (field.turn, field.damping, field.reach, *self._network.trainable())
        return own if self._rate is None else (*own, *self._rate.trainable())

    def _seen(self, t: Tensor, y: Tensor) -> Tensor:
        return y if self._inputs is None else torch.cat([y, self._inputs(t)], dim=1)
