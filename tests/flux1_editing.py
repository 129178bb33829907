"""Models of FLUX.1 that take pictures otherwise, in this package and in diffusers."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from folders import TRANSFORMER, copy_folder

from max_diffusion import GenerationRequest, TextToImagePipeline
from max_diffusion.core.buffers import to_numpy


def as_pipeline(source: Path, target: Path, class_name: str) -> Path:
    """A copy of a model folder that another pipeline of diffusers has saved."""
    folder = copy_folder(source, target)
    index = folder / "model_index.json"
    known = json.loads(index.read_text())
    index.write_text(json.dumps(known | {"_class_name": class_name}))
    return folder


def make_fill_folder(source: Path, target: Path) -> Path:
    """The random FLUX.1 folder with the transformer of a FLUX.1-Fill, with guidance.

    Its blocks are the same but for their weights, so that they compile as one.
    """
    from diffusers import FluxTransformer2DModel
    from folders import roughen

    folder = as_pipeline(source, target, "FluxFillPipeline")
    latents, cell = TRANSFORMER["in_channels"], 4
    torch.manual_seed(12)
    transformer = FluxTransformer2DModel(
        **TRANSFORMER
        | {
            "in_channels": 2 * latents + cell * cell,
            "out_channels": latents,
            "guidance_embeds": True,
        }
    )
    roughen(transformer)
    transformer.save_pretrained(folder / "transformer")
    return folder


@dataclass(frozen=True)
class Twins:
    """One model folder in both implementations."""

    ours: TextToImagePipeline
    theirs: Any

    @classmethod
    def of(cls, ours: TextToImagePipeline) -> Twins:
        """With the pipeline of diffusers that the folder is of."""
        import diffusers

        config = ours.pipeline_config
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the oracle's own
            kind = getattr(diffusers, config.class_name)
            theirs = kind.from_pretrained(config.path, torch_dtype=torch.float32)
        theirs.set_progress_bar_config(disable=True)
        return cls(ours, theirs)

    def draw(
        self, prompt: str | list[str], seed: int | list[int], **settings: Any
    ) -> np.ndarray:
        """Their pictures, uint8; of Kontext at the size and reference asked for."""
        settings = {"output_type": "np", **settings}
        if self.ours.pipeline_config.class_name == "FluxKontextPipeline":
            area = settings["height"] * settings["width"]
            settings = {"max_area": area, "_auto_resize": False, **settings}
        seeds = seed if isinstance(seed, list) else [seed]
        generators = [torch.Generator("cpu").manual_seed(one) for one in seeds]
        drawn = self.theirs(
            prompt=prompt,
            generator=generators if isinstance(seed, list) else generators[0],
            max_sequence_length=self.theirs.tokenizer_2.model_max_length,
            **settings,
        ).images
        if settings["output_type"] == "latent":
            return drawn.numpy()
        return (drawn * 255).round().astype(np.uint8)


def latents_of(pipeline: TextToImagePipeline, request: GenerationRequest) -> np.ndarray:
    """The latents of a request after its last step, float32 ``(B, S_img, C)``."""
    context = pipeline.create_context(request)
    denoising = pipeline.encode(pipeline.prepare_inputs(context))
    pipeline.run_steps(denoising)
    return to_numpy(pipeline.finish(denoising).latents)
