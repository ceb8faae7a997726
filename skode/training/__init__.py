"""Batches, loop, stopping, history."""

from skode.training.data import TrainingRows
from skode.training.loop import Epoch, History, TrainingOptions, train
from skode.training.tasks import Classification, Regression

__all__ = ["Classification", "Epoch", "History", "Regression", "TrainingOptions", "TrainingRows", "train"]
