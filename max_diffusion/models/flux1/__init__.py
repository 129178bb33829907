"""FLUX.1: text to image with a CLIP and a T5 encoder and a 16-channel autoencoder."""

from .pipeline import Flux1FillPipeline, Flux1KontextPipeline, Flux1Pipeline

__all__ = ["Flux1FillPipeline", "Flux1KontextPipeline", "Flux1Pipeline"]
