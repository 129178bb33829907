"""A new model in 200 lines, comments included: a toy denoiser with every cache.

The model's velocity points from the present latents to a target that depends on the
token ids, so a finished picture is the target and nothing else. A real model differs in
its pieces (``embed``, ``block``, ``output``) and in reading weights from a checkpoint.

    python examples/new_model.py
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from max.driver import CPU, Buffer
from max.dtype import DType
from max.engine import InferenceSession
from max.graph import DeviceRef, TensorType, TensorValue

from graphs.denoiser import AbstractBlock, AbstractDenoiser, Streams
from graphs.weights import WeightScope
from max_diffusion import (
    DenoiserComponent,
    DiffusionPipeline,
    DiffusionPipelineOutput,
    GenerationContext,
    PipelineConfig,
)
from max_diffusion.denoising import Branch
from max_diffusion.sampling import Schedule

WIDTH = 12


class ToyBlock(AbstractBlock):
    """Takes a share of the target away from the image stream."""

    def __init__(self, streams: Streams, share: float) -> None:
        self.streams, self.share = streams, share

    def modulated_input(self) -> TensorValue:
        """The image stream, as it is."""
        return self.streams.image

    def attention(self) -> tuple[TensorValue, ...]:
        """What the image sees of the text."""
        return (self.streams.text.rebind(self.streams.image.shape),)

    def outputs(self, attention: tuple[TensorValue, ...]) -> tuple[TensorValue, ...]:
        """The share."""
        return (attention[0] * -self.share,)

    def add(self, outputs: tuple[TensorValue, ...]) -> Streams:
        """To the image stream."""
        return Streams(self.streams.image + outputs[0], self.streams.text)


class ToyDenoiser(AbstractDenoiser[TensorValue]):
    """Velocity ``(latents - target) / sigma``, in three blocks."""

    num_blocks = 3
    width = WIDTH
    dtype = DType.float32
    device = DeviceRef.CPU()

    def input_types(
        self,
        batch: int | str = "batch",
        image_seq_len: int | str = "image_seq_len",
        text_seq_len: int | str = "text_seq_len",
    ) -> dict[str, TensorType]:
        """Latents, timestep and the target, ``(B, S_txt = S_img, C)``."""
        shape = (batch, image_seq_len, WIDTH)
        return {
            "latents": TensorType(self.dtype, shape, self.device),
            "timestep": TensorType(self.dtype, (batch,), self.device),
            "text": TensorType(self.dtype, (batch, text_seq_len, WIDTH), self.device),
        }

    def condition(
        self, w: WeightScope, inputs: dict[str, TensorValue]
    ) -> tuple[TensorValue]:
        """Sigma, ``(B,)``."""
        return (inputs["timestep"] / 1000.0,)

    def conditioning(
        self, condition: tuple[TensorValue, ...], inputs: dict[str, TensorValue]
    ) -> TensorValue:
        """Sigma as ``(B, 1, 1)``."""
        return condition[0].reshape((-1, 1, 1))

    def embed(self, w: WeightScope, inputs: dict[str, TensorValue]) -> Streams:
        """Both streams unchanged."""
        return Streams(inputs["latents"], inputs["text"])

    def block(
        self, w: WeightScope, index: int, streams: Streams, conditioning: TensorValue
    ) -> ToyBlock:
        """The same three times."""
        return ToyBlock(streams, 1 / self.num_blocks)

    def output(
        self, w: WeightScope, image: TensorValue, conditioning: TensorValue
    ) -> TensorValue:
        """The remaining difference over sigma."""
        return image / conditioning


class ToyTransformer(DenoiserComponent):
    """Names the pieces; the base class makes every step graph of them."""

    def denoiser(self) -> ToyDenoiser:
        """The pieces."""
        return ToyDenoiser()


@dataclass(frozen=True)
class ToyInputs:
    """A request on the device."""

    latents: Buffer
    target: Buffer
    context: GenerationContext


class ToyPipeline(DiffusionPipeline):
    """Draws ``height x width`` pictures whose gray is set by the tokens."""

    components = {"transformer": ToyTransformer}  # noqa: RUF012

    def init_remaining_components(self) -> None:
        """Nothing else is needed."""

    def prepare_inputs(self, context: GenerationContext) -> ToyInputs:
        """The tokens, spread over all cells, are the target."""
        level = context.tokens.astype(np.float32).reshape(-1, 1, 1)
        target = np.broadcast_to(level, context.latents.shape).copy()
        noise = Buffer.from_numpy(context.latents.copy())
        return ToyInputs(noise, Buffer.from_numpy(target), context)

    def execute(
        self, model_inputs: ToyInputs, **kwargs: Any
    ) -> DiffusionPipelineOutput:
        """Denoises; a cell's 12 channels are 2 x 2 pixels of 3 colours."""
        context = model_inputs.context
        denoised = self.denoise(
            model_inputs.latents,
            Schedule(context.sigmas, context.timesteps),
            [Branch("conditional", {"text": model_inputs.target})],
            cache=context.cache,
            **kwargs,
        )
        rows, columns = context.height // 2, context.width // 2
        cells = denoised.latents.to_numpy().reshape(-1, rows, columns, 2, 2, 3)
        pixels = cells.transpose(0, 1, 3, 2, 4, 5).reshape(
            -1, context.height, context.width, 3
        )
        images = np.clip(pixels.round(), 0, 255).astype(np.uint8)
        return DiffusionPipelineOutput(images, denoised.steps, denoised.cache_bytes)


def make_context(gray: int, **changes: Any) -> GenerationContext:
    """A request for one 4 x 6 picture of that gray."""
    sigmas = np.linspace(1, 0, 21, dtype=np.float32)
    noise = np.random.default_rng(gray).standard_normal((1, 6, WIDTH), np.float32)
    values: dict[str, Any] = {
        "cache": None,
        "tokens": np.array([[gray]], np.int64),
        "tokens_2": np.array([[gray]], np.int64),
        "negative_tokens": None,
        "negative_tokens_2": None,
        "latents": noise,
        "sigmas": sigmas,
        "timesteps": sigmas[:-1] * 1000,
        "height": 4,
        "width": 6,
        "num_inference_steps": 20,
        "guidance_scale": 1.0,
    }
    return GenerationContext(**(values | changes))


def make_pipeline(kind: type[ToyPipeline] = ToyPipeline, **kwargs: Any) -> ToyPipeline:
    """Compiles the toy on the CPU."""
    device = CPU()
    session = InferenceSession(devices=[device])
    config = PipelineConfig(components={"transformer": {}})
    return kind(config, session, [device], [], **kwargs)


def main(show: Callable[[str], None] = print) -> None:
    """Serves three requests."""
    pipeline = make_pipeline()
    for gray in (10, 120, 250):
        output = pipeline.execute(pipeline.prepare_inputs(make_context(gray)))
        show(f"asked for gray {gray}, drew {output.images.mean():.0f}")


if __name__ == "__main__":
    main()
