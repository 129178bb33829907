"""Model folders in the diffusers layout, single files, and the tensors in them."""

from .float8 import without_float8
from .folder import ModelFolder
from .hub import find_model
from .reading import shown
from .single_file import CheckpointFile, PartsOfFile
from .tensors import AbstractStoredTensor, AbstractTensor, joined
from .weights import ComponentWeights, WeightTransform

__all__ = [
    "AbstractStoredTensor",
    "AbstractTensor",
    "CheckpointFile",
    "ComponentWeights",
    "ModelFolder",
    "PartsOfFile",
    "WeightTransform",
    "find_model",
    "joined",
    "shown",
    "without_float8",
]
