"""The border to torch: devices, dtypes, random generators, arrays to tensors and back."""

from skode.runtime.arrays import as_array, to_numpy, to_tensor
from skode.runtime.content import key_uniforms, kronecker_steps, row_keys
from skode.runtime.device import resolve_device, resolve_dtype, torch_dtype
from skode.runtime.peers import ALONE, Group, Peers, current_peers, together
from skode.runtime.random import own_randomness, seed_sequence, torch_generator

__all__ = [
    "ALONE",
    "Group",
    "Peers",
    "as_array",
    "current_peers",
    "key_uniforms",
    "kronecker_steps",
    "own_randomness",
    "resolve_device",
    "resolve_dtype",
    "row_keys",
    "seed_sequence",
    "to_numpy",
    "to_tensor",
    "together",
    "torch_dtype",
    "torch_generator",
]
