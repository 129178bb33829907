"""Pipelines: the abstract one, text to image, and from a model's folder to either."""

from .context import Tokenized
from .loading import LEAN_CACHES, PipelineConfig
from .outputs import DiffusionPipelineOutput, OnEvent, OnStep
from .pipeline import DiffusionPipeline
from .registry import (
    demo_model_path,
    is_demo_model,
    load_pipeline,
    open_model,
    register_model,
)
from .text_to_image import GenerationResult, TextToImagePipeline

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
    "demo_model_path",
    "is_demo_model",
    "load_pipeline",
    "open_model",
    "register_model",
]
