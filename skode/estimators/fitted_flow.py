"""A flow that was fitted: as arrays, and its log-densities with a bound on the solver's error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from skode.estimators.stored import stored
from skode.exceptions import SolverError
from skode.fields import FlowField, PlanarField
from skode.models import Base, Mixture, Normal, SolverOptions, StudentT
from skode.models.blocks import block_size, blocks
from skode.models.flow import ContinuousFlow
from skode.models.odenet import FieldFactory, users_field
from skode.runtime import to_numpy

Array = NDArray[np.float64]
BASES: dict[str, type[Base]] = {"normal": Normal, "student_t": StudentT, "mixture": Mixture}
SCORE_ERROR = 0.01  # nats: what the solver may add to a log-density
LOOSEST, TIGHTEST = 1e-5, 1e-10  # tolerances of scores
CHECK = 0.01  # of a score's tolerance: the second solve, whose own error is then far below the difference
FLOOR = 1e-8  # nats; the second solve's error, where both are smaller than any tolerance asks for
BLOCK_ROWS = 512  # of a solve: as fast a row as larger blocks, and a single row, which fills one, costs the least then
CHUNK_ROWS, CHUNK_NUMBERS = 2**16, 2**21  # at most, of what is worked on at a time: it bounds the memory
CONTEXT_START = 0.1  # of the usual weights: conditions are let in slowly, since few rows are soon learned by heart
LOWEST = -1e300  # nats: log-densities of rows so far away that squares overflow


@stored
class FieldPlan(NamedTuple):
    """How to make a flow's field."""

    net: str
    n_dims: int
    sizes: tuple[int, ...]
    activation: str
    n_context: int = 0
    field: FieldFactory | None = None

    def make(self, generator: torch.Generator) -> torch.nn.Module:
        """A field; the package's own are 0 at the start, or nearly so."""
        if self.field is not None:
            return users_field(self.field, self.n_dims, generator)
        if self.net == "planar":
            return PlanarField(self.n_dims, self.sizes[0], activation=self.activation, generator=generator)
        field = FlowField(
            self.n_dims,
            self.sizes,
            self.activation,
            n_context=self.n_context,
            zero_output=True,
            generator=generator,
        )
        if self.n_context:
            with torch.no_grad():
                field.flow_layers[0].context.mul_(CONTEXT_START)
        return field


@stored
class FittedFlow(NamedTuple):
    """A flow as NumPy arrays."""

    plan: FieldPlan
    field_arrays: dict[str, NDArray[Any]]
    base: str
    base_arrays: dict[str, NDArray[Any]]

    def build(self, dtype: torch.dtype, device: torch.device) -> ContinuousFlow:
        """The module."""
        field = self.plan.make(torch.Generator().manual_seed(0))
        field.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in self.field_arrays.items()})
        base = BASES[self.base].from_arrays(self.base_arrays, dtype, device)
        return ContinuousFlow(field.to(dtype).to(device), base).eval()

    @staticmethod
    def of(flow: ContinuousFlow, plan: FieldPlan) -> FittedFlow:
        """What a trained module holds."""
        arrays = {name: to_numpy(tensor) for name, tensor in flow.field.state_dict().items()}
        base = next(name for name, kind in BASES.items() if type(flow.base) is kind)
        return FittedFlow(plan, arrays, base, flow.base.arrays())

    @property
    def n_parameters(self) -> int:
        """Numbers that describe the field."""
        return sum(array.size for array in self.field_arrays.values())


def bounded_log_density(
    fitted: FittedFlow | None, Z: Array, device: torch.device, context: Array | None = None, *, check: bool = True
) -> tuple[Array, Array]:
    """Of standardised rows, given their contexts, with a bound on the solver's error from a second solve.

    That is of another method and of a hundredth of the tolerance: errors of one method at neighbouring tolerances
    go together, and their difference is now and then far smaller than both. A planar field, dear where rows have times
    of their own, takes fixed steps, of which a hundredth of the error takes three times as many. Without ``check``
    there is the first solve alone, and no error is told.
    """
    values, errors = np.zeros(len(Z)), np.zeros(len(Z))
    if fitted is None:
        return values, errors
    flow = fitted.build(torch.float64, device)
    # A block takes as many steps as its slowest row: rows as far from the middle as each other need about as many.
    with np.errstate(over="ignore"):
        order = np.linalg.norm(Z, axis=1).argsort(kind="stable")
    if not check:
        values[order] = _solved(flow, Z[order], None if context is None else context[order], device, LOOSEST)
        return np.maximum(values, LOWEST), errors
    rtol, open_ = LOOSEST, order
    while len(open_) and rtol >= TIGHTEST / 2:
        some = None if context is None else context[open_]
        found, closer = (_solved(flow, Z[open_], some, device, tolerance) for tolerance in (rtol, rtol * CHECK))
        values[open_], errors[open_] = found, 2 * np.abs(found - closer) + FLOOR
        open_ = open_[~(errors[open_] <= SCORE_ERROR / 2)]
        rtol /= 10
    errors[values == -np.inf] = FLOOR
    return np.maximum(values, LOWEST), errors


def _solved(flow: ContinuousFlow, Z: Array, context: Array | None, device: torch.device, rtol: float) -> Array:
    solver = shared_solver(rtol) if isinstance(flow.field, PlanarField) else exact_solver(rtol)
    return in_blocks(Z, lambda block, given: flow.densities(block, solver, context=given).log_density, device, context)


def exact_solver(rtol: float) -> SolverOptions:
    """For densities and samples."""
    return SolverOptions("dopri5" if rtol > 2e-7 else "dopri8", rtol, rtol * 0.1, None, 100_000)


def shared_solver(rtol: float) -> SolverOptions:
    """For densities, by steps that all rows share: their number grows as a method of order 4 needs it."""
    return SolverOptions("rk4", rtol, rtol * 0.1, 1 / round(32 * (LOOSEST / rtol) ** 0.25), 100_000)


def refuse_nan(found: Array, what: str, numbers: NDArray[np.int64] | None = None) -> Array:
    """What was found for rows, (n, ...), unless the solver failed for some of them; ``numbers`` are the rows' in X."""
    failed = np.flatnonzero(np.isnan(found).any(axis=1))
    rows = np.unique(failed if numbers is None else numbers[failed]).tolist()
    if rows:
        raise SolverError(
            f"no {what} was found for row {rows[0]} and {len(rows) - 1} others: the solver left the finite numbers or "
            "took more than max_num_steps steps. Such rows may lie too far from those of the fit; else raise "
            "max_num_steps or rtol.",
            rows,
        )
    return found


@torch.no_grad()
def in_blocks(
    Z: Any,
    function: Callable[[Tensor, Tensor | None], Tensor],
    device: torch.device,
    context: Array | None = None,
) -> Array:
    """A function of rows and their contexts in blocks of one fixed shape: a row's result has the same bits anywhere."""
    d, size = Z.shape[1], _block_rows(Z.shape[1])
    both = torch.as_tensor(Z if context is None else np.concatenate([Z, context], axis=1))
    parts = []
    for rows, block in blocks(both, size):
        state, given = block.to(device).split([d, block.shape[1] - d], dim=1)
        found = function(state.contiguous(), None if context is None else given.contiguous())
        parts.append(to_numpy(found[: rows.stop - rows.start]))
    return np.concatenate(parts) if parts else to_numpy(function(both[:, :d].to(device), both[:, d:].to(device)))


def chunks(n_rows: int, n_dims: int, places: int = 1) -> Iterator[slice]:
    """Rows to work on at a time, of whole blocks: more rows need no more memory.

    ``places`` is how many points of ``n_dims`` components each row has.
    """
    size = _block_rows(n_dims)
    rows = min(CHUNK_ROWS, CHUNK_NUMBERS // (places * max(n_dims, 1)))
    rows = max(size, rows // size * size)
    for start in range(0, n_rows, rows):
        yield slice(start, min(start + rows, n_rows))


def _block_rows(n_dims: int) -> int:
    return min(BLOCK_ROWS, block_size(1, max(n_dims, 1)))
