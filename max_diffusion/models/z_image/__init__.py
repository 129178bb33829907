"""Z-Image: text and image as one sequence, with FLUX.1's autoencoder."""

from .pipeline import ZImagePipeline

__all__ = ["ZImagePipeline"]
