"""Irregular series between pandas and estimators."""

from skode.panel.panel import Panel
from skode.panel.queries import Queries

__all__ = ["Panel", "Queries"]
