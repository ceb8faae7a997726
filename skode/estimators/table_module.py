"""What :class:`Columns` does to tables, in torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from skode.estimators.column_kinds import Lattice, Relation
from skode.estimators.columns import BROKEN_RELATION, RELATION_TOLERANCE, Columns


class LatticeModule(nn.Module):
    """A discrete column: its nearest values and their cells, see :class:`Lattice`."""

    levels: Tensor
    edges: Tensor

    def __init__(self, lattice: Lattice) -> None:
        super().__init__()
        self._origin, self._spacing, self._per_unit = lattice.origin, lattice.spacing, lattice.per_unit
        self._has_levels = lattice.levels is not None
        if self._has_levels:
            self.register_buffer("levels", torch.tensor(lattice.levels))
            self.register_buffer("edges", torch.tensor(lattice.edges))

    def snap(self, x: Tensor) -> Tensor:
        """The nearest values (n,)."""
        if self._has_levels:
            return self.levels[self._cell(x)]
        if self._per_unit is not None:
            return torch.round(x * self._per_unit) / self._per_unit
        return self._origin + torch.round((x - self._origin) / self._spacing) * self._spacing

    def spread(self, x: Tensor, u: Tensor) -> Tensor:
        """Places (k, n) at the fractions ``u (k, 1)`` of the cells around values (n,)."""
        if not self._has_levels:
            return x + (u - 0.5) * self._spacing
        cell = self._cell(x)
        return self.edges[cell] * (1 - u) + self.edges[cell + 1] * u

    def _cell(self, x: Tensor) -> Tensor:
        return torch.searchsorted(self.edges[1:-1].contiguous(), x.contiguous())


class RelationModule(nn.Module):
    """A column that others give, see :class:`Relation`."""

    sources: Tensor
    coefficients: Tensor

    def __init__(self, relation: Relation) -> None:
        super().__init__()
        self.target, self._intercept = int(relation.target), float(relation.intercept)
        self.register_buffer("sources", torch.tensor(relation.sources))
        self.register_buffer("coefficients", torch.tensor(relation.coefficients))

    def rebuild(self, X: Tensor) -> Tensor:
        """The column (n,) of a table."""
        return X[:, self.sources] @ self.coefficients + self._intercept

    def broken(self, X: Tensor) -> Tensor:
        """Which rows (n,) break the relation."""
        target = X[:, self.target]
        sizes = torch.cat([(X[:, self.sources] * self.coefficients).abs(), target.abs().unsqueeze(1)], dim=1)
        size = sizes.amax(dim=1).clamp(min=abs(self._intercept))
        return (target - self.rebuild(X)).abs() > RELATION_TOLERANCE * size


class TableModule(nn.Module):
    """Between rows of a table and standardised places.

    Parameters
    ----------
    columns : Columns
    k : int
        Places in a row's cell that its density is averaged over, where there are cells.
    """

    kept: Tensor
    mean: Tensor
    scale: Tensor
    u: Tensor

    def __init__(self, columns: Columns, k: int) -> None:
        super().__init__()
        self._n_columns = len(columns.kinds)
        self.register_buffer("kept", torch.tensor(columns.found.kept))
        self.register_buffer("mean", torch.tensor(columns.mean))
        self.register_buffer("scale", torch.tensor(columns.scale))
        places, lattices, wide = columns.cells()
        self._places, self._wide = places, wide
        self.lattices = nn.ModuleList(LatticeModule(lattice) for lattice in lattices)
        self.relations = nn.ModuleList(RelationModule(relation) for relation in columns.found.relations)
        self.register_buffer("u", torch.tensor(columns.cell_points(k) if wide else np.empty((1, 0))))

    def places(self, X: Tensor) -> Tensor:
        """Standardised places (k, n, n_kept) in the cells of rows (n, n_columns)."""
        parts = list(X[:, self.kept].unbind(dim=1))
        parts = [part.expand(len(self.u), -1) for part in parts]
        for place, lattice in zip(self._places, self.lattices, strict=True):
            centre = lattice.snap(parts[place][0])  # type: ignore[operator]
            column = self._wide.index(place) if place in self._wide else None
            spread = centre if column is None else lattice.spread(centre, self.u[:, column : column + 1])  # type: ignore[operator]
            parts[place] = spread.expand(len(self.u), -1)
        if not parts:
            return X.new_zeros(len(self.u), X.shape[0], 0)
        return (torch.stack(parts, dim=2) - self.mean) / self.scale

    def log_density(self, X: Tensor, log_standardised: Tensor) -> Tensor:
        """Of rows (n, n_columns), from those (k, n) of their places."""
        found = log_standardised.logsumexp(dim=0) - float(np.log(len(self.u))) - self.scale.log().sum()
        for relation in self.relations:
            found = found + BROKEN_RELATION * relation.broken(X).to(found)  # type: ignore[operator]
        return found

    def restore(self, Z: Tensor) -> Tensor:
        """Rows of the table (n, n_columns), nothing rounded, at standardised places (n, n_kept)."""
        X = Z.new_zeros(Z.shape[0], self._n_columns).index_copy(1, self.kept, Z * self.scale + self.mean)
        for relation in self.relations:
            one: Any = relation
            X = X.index_copy(1, torch.tensor([one.target], device=X.device), one.rebuild(X).unsqueeze(1))
        return X
