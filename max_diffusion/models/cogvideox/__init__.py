"""CogVideoX: text to video with a T5 encoder and a causal 3-D autoencoder."""

from .pipeline import CogVideoXPipeline

__all__ = ["CogVideoXPipeline"]
