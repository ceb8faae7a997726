"""Generators of toy data."""

from skode.datasets.spirals import Spirals, make_spirals

__all__ = ["Spirals", "make_spirals"]
