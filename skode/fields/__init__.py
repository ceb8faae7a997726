"""Vector fields: value, vector-Jacobian products and parameter gradients."""

from skode.fields.activations import ACTIVATIONS
from skode.fields.conv import ConvField
from skode.fields.energy import EnergyDynamics
from skode.fields.members import MemberDynamics
from skode.fields.mlp import MLPField
from skode.fields.second_order import SecondOrderDynamics

__all__ = ["ACTIVATIONS", "ConvField", "EnergyDynamics", "MLPField", "MemberDynamics", "SecondOrderDynamics"]
