"""Batches, loop, stopping, history."""

from skode.training.data import TrainingRows
from skode.training.latent import LatentData, LatentHistory, LatentOptions, train_latent
from skode.training.loop import Epoch, History, TrainingOptions, Watcher, train
from skode.training.shards import ShardedRows
from skode.training.tasks import Classification, Regression

__all__ = [
    "Classification",
    "Epoch",
    "History",
    "LatentData",
    "LatentHistory",
    "LatentOptions",
    "Regression",
    "ShardedRows",
    "TrainingOptions",
    "TrainingRows",
    "Watcher",
    "train",
    "train_latent",
]
