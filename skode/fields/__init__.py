"""Vector fields: value, vector-Jacobian products and parameter gradients.

>>> import torch
>>> from skode.fields import ACTIVATIONS, MLPField
>>> "silu" in ACTIVATIONS
True
>>> field = MLPField(2, hidden_layer_sizes=(16,), activation="silu", generator=torch.Generator().manual_seed(0))
>>> field(torch.zeros(3, 1), torch.ones(3, 2)).shape
torch.Size([3, 2])
"""

from skode.fields.activations import ACTIVATIONS
from skode.fields.conv import ConvField
from skode.fields.energy import EnergyDynamics
from skode.fields.flow_dynamics import FlowDynamics
from skode.fields.flow_field import FlowField
from skode.fields.integrands import draw_probe
from skode.fields.latent import LatentDynamics, LatentField
from skode.fields.members import MemberDynamics
from skode.fields.mlp import MLPField
from skode.fields.planar import PlanarDynamics, PlanarField
from skode.fields.second_order import SecondOrderDynamics
from skode.fields.trace import TracedDynamics, traced

__all__ = [
    "ACTIVATIONS",
    "ConvField",
    "EnergyDynamics",
    "FlowDynamics",
    "FlowField",
    "LatentDynamics",
    "LatentField",
    "MLPField",
    "MemberDynamics",
    "PlanarDynamics",
    "PlanarField",
    "SecondOrderDynamics",
    "TracedDynamics",
    "draw_probe",
    "traced",
]
