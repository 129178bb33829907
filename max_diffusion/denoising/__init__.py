"""The denoising loop, and the transformers it runs."""

from .denoiser import DenoiserComponent
from .loop import Branch, Denoising
from .own_transformer import OwnTransformer

__all__ = ["Branch", "DenoiserComponent", "Denoising", "OwnTransformer"]
