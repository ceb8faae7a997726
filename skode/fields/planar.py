"""The paper's flow: a gated sum of planar units whose parameters come from a hypernetwork of the time.

Symbols (Chen et al. 2018, section 4): unit m adds ``sigma_m u_m h(w_m . z + b_m)``; here ``p = W z + b``, ``e`` are
the gated slopes ``sigma h'(p)``, ``a`` cotangents. Parameters have r rows: one for each time, or 1 for a shared time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from skode.exceptions import FieldError
from skode.fields.activations import get_activation
from skode.fields.flow_dynamics import once
from skode.fields.integrands import Cotangents, Integrands, as_probe, check_rows
from skode.fields.mlp import MLPField
from skode.solver.dynamics import OffersVjp, Weight


class Units(NamedTuple):
    """Planar units: ``W, U`` (r, M, d), ``b`` (r, M), gates in (0, 1) over M and their slopes with what makes them."""

    W: Tensor
    U: Tensor
    b: Tensor
    gate: Tensor
    gate_slope: Tensor

    @staticmethod
    def of(numbers: Tensor, d: int) -> Units:
        """From the hypernetwork's outputs (r, M (2 d + 2)), a unit's parameters side by side."""
        parts = numbers.unflatten(1, (-1, 2 * d + 2))
        open_ = torch.sigmoid(parts[..., -1])
        gate = open_ / parts.shape[1]
        return Units(parts[..., :d], parts[..., d : 2 * d], parts[..., -2], gate, gate * (1 - open_))


class _Tape:
    """One evaluation, with the last cotangents that were pulled through it."""

    __slots__ = ("a", "d", "e", "hyper", "saved", "tangents", "units", "v", "y")

    def __init__(self, y: Tensor, v: Tensor, units: Units, hyper: Any, saved: Tensor, d: Tensor, e: Tensor) -> None:
        self.y, self.v, self.units, self.hyper = y, v, units, hyper
        self.saved, self.d, self.e = saved, d, e
        self.tangents: tuple[Tensor, Tensor] | None = None
        self.a: Cotangents | None = None

    @property
    def nbytes(self) -> int:
        numbers = 3 * self.v.numel() + 4 * self.e.numel() + sum(x.numel() for x in self.units)
        numbers += sum(x.numel() for x in self.tangents or ())
        return numbers * self.v.element_size() + int(self.hyper.nbytes)


class PlanarDynamics:
    """Velocity of a :class:`PlanarField` and integrands behind it, for ``solve(..., n_quadratures=q)``.

    Parameters
    ----------
    field : PlanarField
    integrands : Integrands
    probe : tensor of shape (d,) or (n, d), optional
        Direction for the Jacobian's norm; exact if not given.

    Examples
    --------
    >>> import torch
    >>> from skode.fields import PlanarField
    >>> from skode.solver import solve
    >>> dynamics = PlanarField(2, n_units=8, generator=torch.Generator().manual_seed(0)).dynamics(trace=True)
    >>> solve(dynamics, torch.ones(3, 2), [0.0, 1.0], n_quadratures=1, step_control="batch").quadratures.shape
    torch.Size([3, 2, 1])
    """

    def __init__(self, field: PlanarField, integrands: Integrands, probe: Tensor | None) -> None:
        self._field, self._integrands, self._activation = field, integrands, get_activation(field.activation)
        self._probe = as_probe(probe, field.n_dims)
        self.any_rows = self._probe is None or len(self._probe) == 1

    @property
    def n_quadratures(self) -> int:
        """Integrands."""
        return self._integrands.n

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        self._field.check(y)
        return self._evaluate(y, self._field.hypernet(once(t), once(t)), None)[0]

    def linearize(self, t: Tensor, y: Tensor) -> tuple[Tensor, _Tape]:
        self._field.check(y)
        return self._evaluate(y, *self._field.hypernet.linearize(once(t), once(t)))

    def trainable(self) -> tuple[Tensor, ...]:
        return self._field.hypernet.trainable()

    def _evaluate(self, y: Tensor, numbers: Tensor, hyper: Any) -> tuple[Tensor, _Tape]:
        activation = self._activation
        units = Units.of(numbers, y.shape[1])
        p = _onto(y, units.W) + units.b
        h = activation.forward(p)
        saved = h if activation.saves_output else p
        d = activation.slope(saved)
        v, e = _along(units.gate * h, units.U), units.gate * d
        tape = _Tape(y, v, units, hyper, saved, d, e)
        trace = norm = None
        if self._integrands.trace:
            trace = (e * (units.U * units.W).sum(dim=2)).sum(dim=1, keepdim=True)
        if self._integrands.jacobian:
            before = self._start(y) @ units.W.mT
            end = (before * e.unsqueeze(1)) @ units.U
            tape.tangents = before, end
            norm = end.square().sum(dim=(1, 2)).unsqueeze(1) / y.shape[1]
        return self._integrands.beside(v, trace, norm), tape

    def _start(self, y: Tensor) -> Tensor:
        """The directions (1 or n, p, d) that the norm asks about."""
        if self._probe is not None:
            check_rows("probes", None if self.any_rows else self._probe, y)
            return self._probe.to(y).unsqueeze(1)
        return torch.eye(y.shape[1], dtype=y.dtype, device=y.device).unsqueeze(0)

    def pull(self, tape: _Tape, a: Tensor, *, time: bool = False) -> tuple[Tensor, Tensor | None]:
        tape.a = self._integrands.pull(tape.v, a)
        _, of_p = self._of_units(tape, tape.a)
        dy = _along(of_p, tape.units.W)
        return dy, self._time_cotangent(tape, tape.a) if time else None

    def _of_units(self, tape: _Tape, a: Cotangents) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Cotangents (n, M) of gates and slopes, and of p."""
        units, curve = tape.units, self._activation.curve
        along = _onto(a.v, units.U)
        of_p = along * tape.e
        of_e: Tensor = torch.zeros_like(of_p)
        if a.trace is not None:
            of_e = of_e + a.trace * (units.U * units.W).sum(dim=2)
        if a.norm is not None:
            assert tape.tangents is not None
            before, _ = tape.tangents
            of_e = of_e + ((self._of_end(tape, a) @ units.U.mT) * before).sum(dim=1)
        if curve is not None and self._integrands.n:
            of_p = of_p + of_e * units.gate * curve(tape.saved, tape.d)
        return (along, of_e), of_p

    @staticmethod
    def _of_end(tape: _Tape, a: Cotangents) -> Tensor:
        assert tape.tangents is not None and a.norm is not None
        return tape.tangents[1] * (a.norm * (2.0 / tape.v.shape[1])).unsqueeze(2)

    def _of_numbers(self, tape: _Tape, a: Cotangents, by_row: bool) -> Tensor:
        """The cotangent of the hypernetwork's outputs, of all rows (n, ...), or summed where they share a time."""
        units, activation = tape.units, self._activation
        (along, of_e), of_p = self._of_units(tape, a)
        h = tape.saved if activation.saves_output else activation.forward(tape.saved)
        by_row = by_row or len(units.b) == len(tape.v)
        of_W, of_U = _outer(of_p, tape.y, by_row), _outer(units.gate * h, a.v, by_row)
        if a.trace is not None:
            of_overlap = _summed(a.trace * tape.e, by_row).unsqueeze(2)
            of_W, of_U = of_W + of_overlap * units.U, of_U + of_overlap * units.W
        if a.norm is not None:
            assert tape.tangents is not None
            of_end, after = self._of_end(tape, a), tape.tangents[0] * tape.e.unsqueeze(1)
            of_before = (of_end @ units.U.mT) * tape.e.unsqueeze(1)
            of_W = of_W + _summed(of_before.mT @ self._start(tape.y), by_row)
            of_U = of_U + _summed(after.mT @ of_end, by_row)
        of_gate = _summed((along * h + of_e * tape.d) * units.gate_slope, by_row)
        parts = [of_W, of_U, _summed(of_p, by_row).unsqueeze(2), of_gate.unsqueeze(2)]
        return torch.cat(parts, dim=2).flatten(1)

    def _time_cotangent(self, tape: _Tape, a: Cotangents) -> Tensor:
        # Where one time serves all rows, the cotangents of the rows go back through its one evaluation.
        return self._field.hypernet.pull(tape.hyper, self._of_numbers(tape, a, by_row=True))[0]

    def accumulate(self, tapes: Sequence[_Tape], weights: Sequence[Weight] | None = None) -> tuple[Tensor, ...]:
        hypernet = self._field.hypernet
        for i, tape in enumerate(tapes):
            assert tape.a is not None
            weight = 1.0 if weights is None else weights[i]
            a = Cotangents(*(None if x is None else x * weight for x in tape.a))  # type: ignore[arg-type]
            hypernet.pull(tape.hyper, self._of_numbers(tape, a, by_row=False))
        return hypernet.accumulate([tape.hyper for tape in tapes])


class PlanarField(OffersVjp, nn.Module):
    """The paper's continuous normalizing flow: dz/dt = 1/M sum_m sigma_m(t) u_m(t) h(w_m(t) . z + b_m(t)).

    A gated sum of M planar units [1]_ (section 4, eq. 9 and 10); gates sigma in (0, 1), directions u, normals w and
    offsets b come from a hypernetwork of the time. Its divergence ``1/M sum_m sigma_m h'(.) u_m . w_m`` costs no matrix
    product. The sum is a mean, so that the flow's size does not grow with M.

    Parameters
    ----------
    n_dims : int
        Dimension of the state.
    n_units : int, default=64
        M.
    hypernet_layer_sizes : sequence of int, default=(32, 32)
        Hidden layers of the hypernetwork, tanh.
    activation : str, default="tanh"
        h, as for :class:`MLPField`.
    generator : torch.Generator, optional
        Draws the initial weights; fresh entropy if not given. torch's global generator is not used.

    Raises
    ------
    ValueError
        If there are no units, or the activation is unknown.

    Notes
    -----
    Where rows have times of their own each row's units are computed for it, at the hypernetwork's cost a row; steps
    that all rows share (``step_control="batch"``) are much cheaper here.

    References
    ----------
    .. [1] Chen et al., "Neural Ordinary Differential Equations", NeurIPS 2018, section 4. arXiv:1806.07366

    Examples
    --------
    >>> import torch
    >>> from skode.fields import PlanarField
    >>> field = PlanarField(2, n_units=8, generator=torch.Generator().manual_seed(0))
    >>> t, z = torch.zeros(5, 1), torch.ones(5, 2)
    >>> field(t, z).shape, field.trace(t, z).shape
    (torch.Size([5, 2]), torch.Size([5, 1]))
    """

    def __init__(
        self,
        n_dims: int,
        n_units: int = 64,
        hypernet_layer_sizes: Sequence[int] = (32, 32),
        activation: str = "tanh",
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if n_units < 1 or n_dims < 1:
            raise ValueError(f"a planar flow needs units and dimensions; got n_units={n_units}, n_dims={n_dims}.")
        self.n_dims, self.n_units = n_dims, n_units
        get_activation(activation)  # refuses what is unknown
        self.activation = activation
        self.hypernet = MLPField(
            1,
            hypernet_layer_sizes,
            time_dependent=False,
            n_outputs=n_units * (2 * n_dims + 2),
            generator=generator,
        )

    any_rows = True
    """Rows may be copied: each is treated on its own."""

    def dynamics(
        self, *, trace: bool = True, energy: bool = False, jacobian: bool = False, probe: Tensor | None = None
    ) -> PlanarDynamics:
        """Velocity and integrands, for ``solve(..., n_quadratures=q)``; arguments as of :meth:`FlowField.dynamics`.

        The Jacobian's norm is exact without a probe.
        """
        return PlanarDynamics(self, Integrands(trace, energy, jacobian), probe)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """Velocity ``(n, d)`` at times ``t (n, 1)`` and states ``y (n, d)``."""
        return self.dynamics(trace=False)(t, y)

    def trace(self, t: Tensor, y: Tensor) -> Tensor:
        """The exact divergence ``(n, 1)``, the trace of the Jacobian with the state."""
        return self.dynamics()(t, y)[:, -1:]

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
        return self.hypernet.trainable()

    def check(self, y: Tensor) -> None:
        """Whether states fit.

        Raises
        ------
        FieldError
            If they do not.
        """
        dtype = self.hypernet.trainable()[0].dtype
        if y.shape[-1] != self.n_dims or y.dtype != dtype:
            raise FieldError(
                f"the field takes states of {self.n_dims} components in {dtype}; got {y.shape[-1]} in {y.dtype}."
            )


# --- products with units of each row's own, or with those that all rows share ---


def _onto(x: Tensor, W: Tensor) -> Tensor:
    """From (n, d) to the units (n, M)."""
    return x @ W[0].mT if len(W) == 1 else (W @ x.unsqueeze(2)).squeeze(2)


def _along(h: Tensor, U: Tensor) -> Tensor:
    """From the units (n, M) to (n, d)."""
    return h @ U[0] if len(U) == 1 else (h.unsqueeze(1) @ U).squeeze(1)


def _outer(h: Tensor, x: Tensor, by_row: bool) -> Tensor:
    """Products of (n, M) with (n, d): (n, M, d), or their sum (1, M, d)."""
    return h.unsqueeze(2) * x.unsqueeze(1) if by_row else (h.mT @ x).unsqueeze(0)


def _summed(x: Tensor, by_row: bool) -> Tensor:
    return x if by_row else x.sum(dim=0, keepdim=True)
