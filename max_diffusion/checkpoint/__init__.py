"""Model folders in the diffusers layout, and the tensors in them."""

from .folder import ModelFolder
from .hub import find_model
from .tensors import AbstractStoredTensor, AbstractTensor, joined
from .weights import ComponentWeights, WeightTransform

__all__ = [
    "AbstractStoredTensor",
    "AbstractTensor",
    "ComponentWeights",
    "ModelFolder",
    "WeightTransform",
    "find_model",
    "joined",
]
