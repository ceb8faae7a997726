"""A flow that was fitted: as arrays, and its log-densities with a bound on the solver's error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from skode.exceptions import SolverError
from skode.fields import FlowField, PlanarField
from skode.models import Base, Mixture, Normal, SolverOptions, StudentT
from skode.models.blocks import block_size, blocks
from skode.models.flow import ContinuousFlow
from skode.runtime import to_numpy

Array = NDArray[np.float64]
BASES: dict[str, type[Base]] = {"normal": Normal, "student_t": StudentT, "mixture": Mixture}
SCORE_ERROR = 0.01  # nats: what the solver may add to a log-density
LOOSEST, TIGHTEST = 1e-5, 1e-10  # tolerances of scores
CHECK = 0.01  # of a score's tolerance: the second solve, whose own error is then far below the difference
FLOOR = 1e-8  # nats; the second solve's error, where both are smaller than any tolerance asks for
LOWEST = -1e300  # nats: log-densities of rows so far away that squares overflow


class FittedFlow(NamedTuple):
    """A flow as NumPy arrays."""

    net: str
    sizes: tuple[int, ...]
    activation: str
    base: str
    n_dims: int
    field_arrays: dict[str, NDArray[Any]]
    base_arrays: dict[str, NDArray[Any]]

    def build(self, dtype: torch.dtype, device: torch.device) -> ContinuousFlow:
        """The module."""
        field = make_field(self.net, self.n_dims, self.sizes, self.activation, torch.Generator().manual_seed(0))
        field.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in self.field_arrays.items()})
        base = BASES[self.base].from_arrays(self.base_arrays, dtype, device)
        return ContinuousFlow(field.to(dtype).to(device), base).eval()

    @staticmethod
    def of(flow: ContinuousFlow, net: str, sizes: tuple[int, ...], activation: str, base: str) -> FittedFlow:
        """What a trained module holds."""
        arrays = {name: to_numpy(tensor) for name, tensor in flow.field.state_dict().items()}
        return FittedFlow(net, sizes, activation, base, flow.base.n_dims, arrays, flow.base.arrays())


def make_field(
    net: str, n_dims: int, sizes: tuple[int, ...], activation: str, generator: torch.Generator
) -> torch.nn.Module:
    """A field that is 0 at the start, or nearly so."""
    if net == "planar":
        return PlanarField(n_dims, sizes[0], activation=activation, generator=generator)
    return FlowField(n_dims, sizes, activation, zero_output=True, generator=generator)


def bounded_log_density(fitted: FittedFlow | None, Z: Array) -> tuple[Array, Array]:
    """Of standardised rows, with a bound on the solver's error from a second solve.

    That is of another method and of a hundredth of the tolerance: errors of one method at neighbouring tolerances
    go together, and their difference is now and then far smaller than both.
    """
    if fitted is None:
        return np.zeros(len(Z)), np.zeros(len(Z))
    flow = fitted.build(torch.float64, torch.device("cpu"))
    z = torch.from_numpy(np.ascontiguousarray(Z))
    values, errors = torch.zeros(len(z), dtype=z.dtype), torch.zeros(len(z), dtype=z.dtype)
    rtol, open_ = LOOSEST, torch.arange(len(z))
    while len(open_) and rtol >= TIGHTEST / 2:
        found, check = (_solved(flow, z[open_], tolerance) for tolerance in (rtol, rtol * CHECK))
        values[open_], errors[open_] = found, 2 * (found - check).abs() + FLOOR
        open_ = open_[~(errors[open_] <= SCORE_ERROR / 2)]
        rtol /= 10
    errors[values == -torch.inf] = FLOOR
    return values.clamp(min=LOWEST).numpy(), errors.numpy()


def _solved(flow: ContinuousFlow, z: Tensor, rtol: float) -> Tensor:
    solver = exact_solver(rtol)
    return in_blocks(z, lambda block: flow.densities(block, solver).log_density)


def exact_solver(rtol: float) -> SolverOptions:
    """For densities and samples."""
    return SolverOptions("dopri5" if rtol > 2e-7 else "dopri8", rtol, rtol * 0.1, None, 100_000)


def refuse_nan(found: Array, what: str) -> Array:
    """What was found for rows, (n, ...), unless the solver failed for some of them."""
    rows = np.flatnonzero(np.isnan(found).any(axis=1)).tolist()
    if rows:
        raise SolverError(
            f"no {what} was found for row {rows[0]} and {len(rows) - 1} others: the solver left the finite numbers or "
            "came to no end; such rows lie too far from those of the fit.",
            rows,
        )
    return found


@torch.no_grad()
def in_blocks(z: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """A function of rows in blocks of one fixed shape: a row's result has the same bits in any company."""
    size = block_size(1, z.shape[1])
    parts = [function(block)[: rows.stop - rows.start] for rows, block in blocks(z, size)]
    return torch.cat(parts) if parts else function(z)
