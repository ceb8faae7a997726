"""What a fit leaves behind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray

from skode.estimators.stored import stored
from skode.models import ODENet, ODENetConfig


@stored
@dataclass(frozen=True)
class FittedNet:
    """What a fit leaves behind: a configuration and NumPy arrays, nothing of torch."""

    config: ODENetConfig
    arrays: dict[str, NDArray[Any]]
    gradient: str
    moments: tuple[NDArray[Any], ...] = ()

    def build(self, dtype: torch.dtype, device: torch.device) -> ODENet:
        """The torch module on a device, in evaluation mode."""
        model = ODENet(self.config, torch.Generator().manual_seed(0)).to(dtype)
        model.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in self.arrays.items()})
        return model.to(device).eval()
