"""FLUX.2, and FLUX.2-klein, its smaller relative: both read pictures as tokens."""

from .dev import Flux2Pipeline
from .klein import Flux2KleinPipeline

__all__ = ["Flux2KleinPipeline", "Flux2Pipeline"]
