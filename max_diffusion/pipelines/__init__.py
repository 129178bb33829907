"""Pipelines: the abstract one, text to image, and from a model's folder to either."""

from .context import Tokenized
from .families import register_model
from .loading import LEAN_CACHES, PipelineConfig
from .opening import demo_model_name, demo_model_path, load_pipeline, open_model
from .outputs import DiffusionPipelineOutput, GenerationResult, OnEvent, OnStep
from .pipeline import DiffusionPipeline
from .text_to_image import TextToImagePipeline

__all__ = [
    "LEAN_CACHES",
    "DiffusionPipeline",
    "DiffusionPipelineOutput",
    "GenerationResult",
    "OnEvent",
    "OnStep",
    "PipelineConfig",
    "TextToImagePipeline",
    "Tokenized",
    "demo_model_name",
    "demo_model_path",
    "load_pipeline",
    "open_model",
    "register_model",
]
