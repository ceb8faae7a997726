"""Arrays of other libraries at the border of the estimators: NumPy inside, the library of X outside."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from sklearn import config_context, get_config  # type: ignore[attr-defined]
from sklearn.base import BaseEstimator, clone
from sklearn.externals import array_api_compat
from sklearn.utils import Tags
from sklearn.utils._array_api import move_to

from skode.runtime import as_array

COMPATIBLE = f"{array_api_compat.__name__}."  # scikit-learn's own coats of torch, CuPy and others


class Place(NamedTuple):
    """Where an array lives, by names: they pickle, and load where the device is missing."""

    library: str = "numpy"
    device: str = "cpu"

    @classmethod
    def of(cls, X: Any) -> Place:
        """NumPy's for all that is no array of another library: lists, frames, panels."""
        if not is_foreign(X):
            return cls()
        library = array_api_compat.array_namespace(X).__name__.removeprefix(COMPATIBLE)
        return cls(library, str(array_api_compat.device(X)))

    def __str__(self) -> str:
        return "NumPy" if self == Place() else f"{self.library} on {self.device}"

    def found(self) -> tuple[Any, Any]:
        """The namespace and its device."""
        if self == Place():
            return array_api_compat.array_namespace(np.empty(0)), "cpu"
        try:
            xp = import_module(COMPATIBLE + self.library)
        except ModuleNotFoundError:
            xp = import_module(self.library)
        if self.library == "torch":
            return xp, torch.device(self.device)
        return xp, next(device for device in xp.__array_namespace_info__().devices() if str(device) == self.device)


class ArrayNamespaces(BaseEstimator):
    """Base class whose public methods of X take arrays of any library and give arrays of the same.

    Methods named X or Z by their first argument, and ``sample``, are wrapped: they see NumPy arrays and scikit-learn's
    array API dispatch switched off. Outside, with dispatch on, arrays that they return are on the namespace and device
    of X.
    """

    _place: tuple[str, str]  # of the X of the fit

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name, method in list(vars(cls).items()):
            if inspect.isfunction(method) and not name.startswith("_") and (_takes_rows(method) or name == "sample"):
                setattr(cls, name, at_the_border(method))

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.array_api_support = True
        return tags

    def __sklearn_array_api_convert__(self, converter: Callable[[Any], Any]) -> Self:
        """For scikit-learn's ``move_estimator_to``: weights are NumPy arrays anywhere, the place alone moves."""
        moved: Any = clone(self)
        vars(moved).update(vars(self), _place=tuple(Place.of(converter(np.empty(0)))))
        return moved  # type: ignore[no-any-return]


def at_the_border(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of an estimator that takes arrays of any library, and gives those of X's."""
    fits, rows_first = method.__name__ in ("fit", "partial_fit"), _takes_rows(method)

    @wraps(method)
    def bordered(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not get_config()["array_api_dispatch"]:
            result = method(self, *map(as_array, args), **{name: as_array(value) for name, value in kwargs.items()})
            if fits:
                self._place = tuple(Place())
            return result
        X = (args[0] if args else kwargs.get("X", kwargs.get("Z"))) if rows_first else None
        place = Place(*getattr(self, "_place", Place())) if X is None else Place.of(X)
        if not fits:
            _check_place(self, method.__name__, place)
        args, kwargs = tuple(map(_inside, args)), {name: _inside(value) for name, value in kwargs.items()}
        with config_context(array_api_dispatch=False):
            result = method(self, *args, **kwargs)
        if fits:
            self._place = tuple(place)
            return result
        return _outside(result, place, X)

    return bordered


def is_foreign(X: Any) -> bool:
    """Whether X is an array of another library than NumPy."""
    return not isinstance(X, np.ndarray | np.generic) and bool(array_api_compat.is_array_api_obj(X))


def _takes_rows(method: Callable[..., Any]) -> bool:
    """By the name of the first argument."""
    return list(inspect.signature(method).parameters)[1:2] in (["X"], ["Z"])


def _check_place(estimator: Any, method: str, place: Place) -> None:
    """Refuse arrays that do not live where those of the fit did, as scikit-learn asks.

    Raises
    ------
    ValueError
    """
    fitted = Place(*getattr(estimator, "_place", place))
    if place != fitted:
        raise ValueError(
            f"Inputs of {type(estimator).__name__}.{method}() must use the same namespace and the same device as those "
            f"of fit(), which were {fitted}; these are {place}. Convert them, or move the estimator to them: "
            "'from sklearn.utils._array_api import get_namespace_and_device, move_estimator_to; "
            "xp, _, device = get_namespace_and_device(X); estimator = move_estimator_to(estimator, xp, device)'."
        )


def _inside(value: Any) -> Any:
    """An argument as a NumPy array, if it is an array of another library.

    Raises
    ------
    ValueError
        If a tensor wants a gradient, which the result will not carry.
    """
    if not is_foreign(value):
        return value
    if isinstance(value, torch.Tensor):
        if value.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"a tensor of shape {tuple(value.shape)} requires a gradient, and estimators are not differentiable: "
                "pass it detached, X.detach(), or use the fitted module of to_torch()."
            )
        return as_array(value)
    return move_to(value, xp=array_api_compat.array_namespace(np.empty(0)), device="cpu")


def _outside(result: Any, place: Place, X: Any) -> Any:
    """Arrays of numbers at a place; frames, panels and strings stay what they are."""
    if place == Place():
        return result
    if isinstance(result, tuple):
        return tuple(_outside(part, place, X) for part in result)
    if not isinstance(result, np.ndarray) or result.dtype.kind not in "biuf":
        return result
    xp, device = place.found() if X is None else (array_api_compat.array_namespace(X), array_api_compat.device(X))
    return move_to(result, xp=xp, device=device)
