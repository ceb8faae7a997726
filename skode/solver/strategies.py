"""The gradients' names, and what each goes together with."""

from __future__ import annotations

from skode.solver.adjoint import AdjointGradient
from skode.solver.discrete import DiscreteGradient
from skode.solver.gradients import GradientStrategy
from skode.solver.reversible import ReversibleGradient

STRATEGIES: dict[str, GradientStrategy] = {
    "discrete": DiscreteGradient(),
    "adjoint": AdjointGradient(),
    "reversible": ReversibleGradient(),
}


def as_strategy(gradient: str | GradientStrategy) -> GradientStrategy:
    """What ``solve`` was given.

    Raises
    ------
    ValueError
        If it is an unknown name.
    """
    if not isinstance(gradient, str):
        return gradient
    if gradient not in STRATEGIES:
        raise ValueError(f"gradient={gradient!r} is unknown; use one of {', '.join(map(repr, STRATEGIES))}.")
    return STRATEGIES[gradient]


def require_interpolant(strategy: GradientStrategy, **asked: bool) -> None:
    """Refuse arguments of ``solve`` that were ``asked`` for and need dense output, where there is none.

    Raises
    ------
    ValueError
        If there are any.
    """
    for name, wanted in asked.items():
        if wanted and not strategy.interpolates:
            raise ValueError(
                f"{name}= does not go with gradient='reversible', whose steps have no interpolant; use "
                "gradient='discrete'."
            )
