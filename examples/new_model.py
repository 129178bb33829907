"""A new model family from outside, in 200 lines: a toy, with every cache.

It paints the gray that its prompt names: the velocity points from the present latents
to that gray. A real family differs in its pieces (``embed``, ``block``, ``output``) and
in what encodes text and decodes latents.

    python examples/new_model.py toy_model  # writes a model folder, and draws from it
    max-diffusion generate "gray 120" --model toy_model --plugin examples/new_model.py
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from max.driver import Buffer
from max.dtype import DType
from max.graph import DeviceRef, TensorType, TensorValue, ops

import max_diffusion as md
from graphs.denoiser import AbstractBlock, AbstractDenoiser, Streams
from graphs.weights import WeightScope

WIDTH = 12  # channels of an image token: 2 x 2 pixels of 3 colours
CLASSES = {
    "transformer": "ToyTransformer2DModel",
    "scheduler": "FlowMatchEulerDiscreteScheduler",
}


class ToyBlock(AbstractBlock):
    """Takes a share of the target away from the image stream."""

    def __init__(self, streams: Streams, share: float) -> None:
        self.streams, self.share = streams, share

    def modulated_input(self) -> TensorValue:
        """The image stream, as it is."""
        return self.streams.image

    def attention(self) -> tuple[TensorValue, ...]:
        """What the image sees of the text: its mean."""
        mean = ops.mean(self.streams.text, axis=1)
        return (ops.broadcast_to(mean, self.streams.image.shape),)

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

    def __init__(self, dtype: DType, device: DeviceRef) -> None:
        self.dtype, self.device = dtype, device

    def input_types(
        self,
        batch: int | str = "batch",
        image_seq_len: int | str = "image_seq_len",
        text_seq_len: int | str = "text_seq_len",
    ) -> dict[str, TensorType]:
        """Latents, timestep and the target, ``(B, S_txt, C)``."""
        image, text = (batch, image_seq_len, WIDTH), (batch, text_seq_len, WIDTH)
        return {
            "latents": TensorType(DType.float32, image, self.device),
            "timestep": TensorType(DType.float32, (batch,), self.device),
            "text": TensorType(self.dtype, text, self.device),
        }

    def condition(
        self, w: WeightScope, inputs: dict[str, TensorValue]
    ) -> tuple[TensorValue]:
        """Sigma, ``(B,)``."""
        return ((inputs["timestep"] / 1000.0).cast(self.dtype),)

    def conditioning(
        self, condition: tuple[TensorValue, ...], inputs: dict[str, TensorValue]
    ) -> TensorValue:
        """Sigma as ``(B, 1, 1)``."""
        return condition[0].reshape((-1, 1, 1))

    def embed(self, w: WeightScope, inputs: dict[str, TensorValue]) -> Streams:
        """Both streams unchanged."""
        return Streams(inputs["latents"].cast(self.dtype), inputs["text"])

    def block(
        self, w: WeightScope, index: int, streams: Streams, conditioning: TensorValue
    ) -> ToyBlock:
        """The same three times."""
        return ToyBlock(streams, 1 / self.num_blocks)

    def output(
        self, w: WeightScope, image: TensorValue, conditioning: TensorValue
    ) -> TensorValue:
        """The remaining difference over sigma, times a weight."""
        return image / conditioning * w("gain", WIDTH)


class ToyTransformer(md.DenoiserComponent):
    """Names the pieces; the base class makes every step graph of them."""

    def denoiser(self) -> ToyDenoiser:
        """The pieces."""
        return ToyDenoiser(self.dtype, self.device_ref)


class ToyPipeline(md.TextToImagePipeline):
    """Paints the gray that the prompt names, 0 to 255."""

    components = {"transformer": ToyTransformer}  # noqa: RUF012
    class_names = {role: (name,) for role, name in CLASSES.items()}  # noqa: RUF012
    default_num_inference_steps = 20
    default_size = (4, 6)
    cell = 2
    token_channels = WIDTH

    def init_remaining_components(self) -> None:
        """Nothing else is needed: the sampler is flow matching's by default."""

    def text_length(self, options: md.RequestOptions) -> int:
        """One token."""
        return 1

    def tokenize(self, texts: md.PromptTexts, length: int, what: str) -> md.Tokenized:
        """The number in each text."""
        found = [re.search(r"\d+", text) for text in texts.first]
        levels = [int(match[0]) if match else 256 for match in found]
        if max(levels) > 255:
            raise md.RequestError(f"toy: {what} must name a gray of 0 to 255")
        return md.Tokenized({"gray": np.array(levels, np.int64)[:, None]})

    def draw_noise(self, request: md.GenerationRequest, grid: md.Grid) -> np.ndarray:
        """Of the seed, or a seed each, ``(B, S_img, C)``."""
        seeds = request.seeds or [request.seed]
        shape = request.num_images // len(seeds), grid.num_tokens, WIDTH
        rngs = [np.random.default_rng(seed % 2**64) for seed in seeds]
        return np.concatenate([rng.standard_normal(shape, np.float32) for rng in rngs])

    def encode_text(
        self, tokens: Mapping[str, np.ndarray], context: md.GenerationContext
    ) -> Mapping[str, Buffer]:
        """The level in every channel, ``(B, 1, C)``."""
        level = tokens["gray"].astype(np.float32)[:, :, None]
        return {"text": Buffer.from_numpy(np.repeat(level, WIDTH, axis=2))}

    def decode(self, context: md.GenerationContext, latents: Buffer) -> np.ndarray:
        """A token's 12 channels are 2 x 2 pixels of 3 colours."""
        grid, shape = context.grid, (-1, 1, context.height, context.width, 3)
        cells = latents.to_numpy().reshape(-1, grid.rows, grid.columns, 2, 2, 3)
        pixels = cells.transpose(0, 1, 3, 2, 4, 5).reshape(shape)
        return np.clip(pixels.round(), 0, 255).astype(np.uint8)

    def decode_bytes(self, height: int, width: int, num_frames: int) -> int:
        """Three floats a pixel, twice."""
        return 24 * num_frames * height * width


def write_folder(path: Path) -> Path:
    """A model folder in the diffusers layout, weights included."""
    for role, name in CLASSES.items():
        (path / role).mkdir(parents=True, exist_ok=True)
        file = "scheduler_config.json" if role == "scheduler" else "config.json"
        (path / role / file).write_text(json.dumps({"_class_name": name}))
    roles = {role: ["diffusers", name] for role, name in CLASSES.items()}
    index = json.dumps({"_class_name": "ToyPipeline", **roles})
    (path / "model_index.json").write_text(index)
    data = np.ones(WIDTH, np.float32).tobytes()
    gain = {"dtype": "F32", "shape": [WIDTH], "data_offsets": [0, len(data)]}
    header = json.dumps({"gain": gain}).encode()
    (path / "transformer/diffusion_pytorch_model.safetensors").write_bytes(
        len(header).to_bytes(8, "little") + header + data
    )
    return path


md.register_model("ToyPipeline", ToyPipeline)


def main(folder: Path, show: Callable[[str], None] = print) -> None:
    """Serves three requests."""
    pipeline = md.load_pipeline(write_folder(folder), device="cpu")
    for gray in (10, 120, 250):
        images = pipeline.generate(f"gray {gray}").images
        show(f"asked for gray {gray}, drew {images.mean():.0f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
