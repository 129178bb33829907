"""Model folders in the diffusers layout, and the tensors in them."""

from .folder import ModelFolder
from .hub import find_model
from .weights import ComponentWeights

__all__ = ["ComponentWeights", "ModelFolder", "find_model"]
