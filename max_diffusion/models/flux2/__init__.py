"""FLUX.2-klein: a smaller relative of FLUX.1 that reads pictures as tokens."""

from .pipeline import Flux2KleinPipeline

__all__ = ["Flux2KleinPipeline"]
