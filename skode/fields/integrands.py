"""What a flow's dynamics give beside the velocity: integrands, in columns behind it.

Symbols: v velocity ``(n, d)``, J its Jacobian with the state, ``a`` cotangents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from skode.exceptions import FieldError


class Cotangents(NamedTuple):
    """Of the velocity ``(n, d)``, the energy taken in, and of trace and squared norm ``(n, 1)`` where there is one."""

    v: Tensor
    trace: Tensor | None
    norm: Tensor | None


@dataclass(frozen=True)
class Integrands:
    """Which integrands there are, in this order.

    Parameters
    ----------
    trace : bool
        tr J, what the log-density loses (Chen et al. 2018, eq. 8).
    energy : bool
        abs(v)^2 / d, the kinetic energy of Finlay et al. 2020 (arXiv:2002.02798), eq. 6.
    jacobian : bool
        The squared Frobenius norm of J, over d (eq. 7 there).
    """

    trace: bool = True
    energy: bool = False
    jacobian: bool = False

    @property
    def n(self) -> int:
        """How many."""
        return int(self.trace) + int(self.energy) + int(self.jacobian)

    def beside(self, v: Tensor, trace: Tensor | None, norm: Tensor | None) -> Tensor:
        """Velocity and integrands ``(n, d + q)``."""
        energy = v.square().mean(dim=1, keepdim=True) if self.energy else None
        columns = [x for x in (trace, energy, norm) if x is not None]
        return torch.cat([v, *columns], dim=1) if columns else v

    def pull(self, v: Tensor, a: Tensor) -> Cotangents:
        """The cotangents of what :meth:`beside` was given."""
        d = v.shape[1]
        if a.shape[1] != d + self.n:
            raise FieldError(f"a cotangent needs {d + self.n} columns; got {a.shape[1]}.")
        if not self.n:
            return Cotangents(a, None, None)
        columns = list(a[:, d:].split(1, dim=1))
        trace = columns.pop(0) if self.trace else None
        a_v = a[:, :d].contiguous()
        if self.energy:
            a_v = torch.addcmul(a_v, columns.pop(0), v, value=2.0 / d)
        return Cotangents(a_v, trace, columns.pop(0) if self.jacobian else None)


def as_probe(probe: Tensor | None, n_dims: int) -> Tensor | None:
    """A probe ``(d,)`` for all rows or ``(n, d)``, a row each, as the latter or ``(1, d)``.

    Raises
    ------
    ValueError
        If it has another shape.
    """
    if probe is None:
        return None
    if probe.dim() not in (1, 2) or probe.shape[-1] != n_dims:
        raise ValueError(
            f"a probe has shape ({n_dims},), or (n, {n_dims}) with one for each row; got {tuple(probe.shape)}."
        )
    return probe.detach().reshape(-1, n_dims)


def check_rows(what: str, given: Tensor | None, y: Tensor) -> None:
    """Whether rows' contexts or probes belong to this batch.

    Raises
    ------
    FieldError
        If there are others than its rows.
    """
    if given is not None and len(given) != len(y):
        raise FieldError(
            f"the field was given {what} of {len(given)} rows and is asked for {len(y)}; give it those of each batch."
        )


def draw_probe(
    *shape: int,
    generator: torch.Generator,
    kind: str = "rademacher",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Random directions with mean 0 and unit covariance, for estimates of traces and norms.

    Parameters
    ----------
    *shape : int
        ``(d,)`` for one that all rows share, ``(n, d)`` for one each.
    generator : torch.Generator
        Where the numbers come from, on the CPU, so that all devices and dtypes have the same.
    kind : {"rademacher", "gaussian"}, default="rademacher"
        Signs, whose estimate of a trace varies least (Hutchinson 1989), or normal numbers.
    dtype : torch.dtype, default=torch.float32
    device : torch.device, optional

    Returns
    -------
    tensor of that shape

    Raises
    ------
    ValueError
        If the kind is unknown.

    Examples
    --------
    >>> import torch
    >>> from skode.fields import draw_probe
    >>> draw_probe(3, generator=torch.Generator().manual_seed(0)).abs()
    tensor([1., 1., 1.])
    """
    if kind == "gaussian":
        numbers = torch.randn(shape, generator=generator, dtype=torch.float64)
    elif kind == "rademacher":
        numbers = torch.randint(2, shape, generator=generator).double() * 2 - 1
    else:
        raise ValueError(f"kind={kind!r} is unknown; use 'rademacher' or 'gaussian'.")
    return numbers.to(device=device, dtype=dtype)
