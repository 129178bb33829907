"""Qwen-Image: text to image with a language model as encoder, and Wan's autoencoder."""

from .pipeline import QwenImagePipeline

__all__ = ["QwenImagePipeline"]
