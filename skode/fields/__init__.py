"""Vector fields: value, vector-Jacobian products and parameter gradients."""

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
