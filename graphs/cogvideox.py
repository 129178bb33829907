"""CogVideoX's transformer: ``condition``, ``embed``, blocks and ``output``.

Yang et al., "CogVideoX: Text-to-Video Diffusion Models with An Expert Transformer",
2024, arXiv:2408.06072; weight names are those of diffusers'
``CogVideoXTransformer3DModel``. Blocks keep a text and a video stream and attend
jointly; both have the same weights, and shifts, scales and gates of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, final

import numpy as np
from max.dtype import DType
from max.graph import DeviceRef, TensorType, TensorValue, ops

from .attending import Attending, attend
from .denoiser import AbstractBlock, AbstractDenoiser, Streams
from .layers import linear, timestep_embedding
from .pieces import (
    AffineNorm,
    Given,
    Layer,
    ModulatedNorm,
    Modulation,
    Product,
    gated,
    modulations,
    project,
)
from .processor import Columns
from .weights import WeightScope

_MLP_RATIO: Final = 4
# Of a norm's modulation: where the text's vectors begin.
_OF_TEXT: Final = 3


@final
@dataclass(frozen=True)
class CogVideoXConfig:
    """Sizes of a CogVideoX transformer, named as in its ``config.json``."""

    num_attention_heads: int = 30
    attention_head_dim: int = 64
    in_channels: int = 16
    out_channels: int = 16
    time_embed_dim: int = 512
    text_embed_dim: int = 4096
    num_layers: int = 30
    attention_bias: bool = True
    sample_width: int = 90
    sample_height: int = 60
    sample_frames: int = 49
    patch_size: int = 2
    patch_size_t: int | None = None
    temporal_compression_ratio: int = 4
    max_text_seq_length: int = 226
    norm_eps: float = 1e-5
    spatial_interpolation_scale: float = 1.875
    temporal_interpolation_scale: float = 1.0
    use_rotary_positional_embeddings: bool = False
    patch_bias: bool = True

    @property
    def width(self) -> int:
        """Model width D, the channels of each hidden state."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def frames_a_token(self) -> int:
        """Latent frames that a token stands for."""
        return self.patch_size_t or 1

    @property
    def patch_cells(self) -> int:
        """Latent cells that a token stands for."""
        return self.patch_size**2 * self.frames_a_token

    @property
    def has_patch_bias(self) -> bool:
        """Whether the patch embedding has a bias; with ``patch_size_t`` always."""
        return self.patch_bias or self.patch_size_t is not None


@final
@dataclass(frozen=True)
class CogVideoXConditioning:
    """What every block reads and none changes."""

    embedding: TensorValue
    """SiLU of the time embedding, ``(B, time_embed_dim)``."""
    rotary: TensorValue | None
    """Cosines and sines of the video tokens' rotary angles, ``(2, S_img, Dh)``."""


@final
class CogVideoXDenoiser(AbstractDenoiser[CogVideoXConditioning]):
    """Builds the pieces of one CogVideoX transformer.

    Args:
        config: Sizes of the transformer.
        dtype: Dtype of weights, hidden states and prediction.
        device: Device that the graphs run on.
    """

    def __init__(
        self, config: CogVideoXConfig, dtype: DType, device: DeviceRef
    ) -> None:
        self.config = config
        self.dtype = dtype
        self.device = device
        self.num_blocks = config.num_layers
        self.width = config.width
        is_rotary = config.use_rotary_positional_embeddings
        self.block_inputs = ("rotary",) if is_rotary else ()

    def input_types(
        self,
        batch: int | str = "batch",
        image_seq_len: int | str = "image_seq_len",
        text_seq_len: int | str = "text_seq_len",
    ) -> dict[str, TensorType]:
        """Returns a step's inputs by name; integers fix a size at compile time.

        ``latents`` packed, float32 ``(B, S_img, C)``; ``timestep`` float32 ``(B,)`` in
        0..1000; ``text`` ``(B, S_txt, text_embed_dim)``; and float32 ``rotary`` from
        :func:`rotary_table`, or ``positions`` from :func:`position_table`.
        """
        config = self.config

        def typed(dtype: DType, *shape: int | str) -> TensorType:
            return TensorType(dtype, shape, self.device)

        channels = config.in_channels * config.patch_cells
        types = {
            "latents": typed(DType.float32, batch, image_seq_len, channels),
            "timestep": typed(DType.float32, batch),
            "text": typed(self.dtype, batch, text_seq_len, config.text_embed_dim),
        }
        if config.use_rotary_positional_embeddings:
            head_dim = config.attention_head_dim
            types["rotary"] = typed(DType.float32, 2, image_seq_len, head_dim)
        else:
            types["positions"] = typed(DType.float32, image_seq_len, self.width)
        return types

    def condition(
        self, w: WeightScope, inputs: dict[str, TensorValue]
    ) -> tuple[TensorValue]:
        """Embeds the timestep as one vector ``(B, time_embed_dim)``.

        float32 where the pieces take it so, see :mod:`.pieces`.
        """
        dtype = self.dtype if w.products is None else DType.float32
        scope, size = w / "time_embedding", self.config.time_embed_dim
        x = timestep_embedding(inputs["timestep"], self.width)
        x = linear(
            scope / "linear_1", x, self.width, size, activation="silu", dtype=dtype
        )
        return (ops.silu(linear(scope / "linear_2", x, size, size, dtype=dtype)),)

    def conditioning(
        self, condition: tuple[TensorValue, ...], inputs: dict[str, TensorValue]
    ) -> CogVideoXConditioning:
        """Returns that vector, and the rotary table of models that have one."""
        return CogVideoXConditioning(condition[0], inputs.get("rotary"))

    def embed(self, w: WeightScope, inputs: dict[str, TensorValue]) -> Streams:
        """Projects latents and text states to the model's width."""
        config, scope = self.config, w / "patch_embed"
        image = linear(
            scope / "proj",
            inputs["latents"],
            config.in_channels * config.patch_cells,
            self.width,
            bias=config.has_patch_bias,
        )
        if "positions" in inputs:
            image = image + inputs["positions"].cast(image.dtype)
        text = linear(
            scope / "text_proj", inputs["text"], config.text_embed_dim, self.width
        )
        return Streams(image, text)

    def block(
        self,
        w: WeightScope,
        index: int,
        streams: Streams,
        conditioning: CogVideoXConditioning,
    ) -> CogVideoXBlock:
        """Creates the block ``index``."""
        scope = w / "transformer_blocks" / index
        return CogVideoXBlock(self.config, scope, streams, conditioning)

    def output(
        self, w: WeightScope, image: TensorValue, conditioning: CogVideoXConditioning
    ) -> TensorValue:
        """Turns the video stream into the prediction of v, ``(B, S_img, C)``."""
        config, width = self.config, self.width
        x = AffineNorm(w / "norm_final", image, "layer", config.norm_eps).tensor
        scope = w / "norm_out"
        (mod,) = modulations(scope, ["linear"], conditioning.embedding, width, 2)
        mod = _with_affine(scope / "norm", mod, (0,))
        normed = ModulatedNorm(x, mod, epsilon=config.norm_eps)
        channels = config.out_channels * config.patch_cells
        return project(w, [Layer("proj_out", channels)], normed, width)[0].tensor


@final
class CogVideoXBlock(AbstractBlock):
    """A block of two streams with the same weights and joint attention."""

    def __init__(
        self,
        config: CogVideoXConfig,
        w: WeightScope,
        streams: Streams,
        conditioning: CogVideoXConditioning,
    ) -> None:
        self.config, self.w, self.width = config, w, config.width
        self.streams, self._rotary = streams, conditioning.rotary
        names = "norm1", "norm2"
        found = modulations(
            w,
            [f"{name}.linear" for name in names],
            conditioning.embedding,
            self.width,
            6,
        )
        self._attention_mod, self._mlp_mod = (
            _with_affine(w / name / "norm", mod, (0, _OF_TEXT))
            for name, mod in zip(names, found, strict=True)
        )

    def modulated_input(self) -> TensorValue:
        """Returns the video stream's input of attention, ``(B, S_img, D)``."""
        return self._normed(self.streams.image, self._attention_mod, 0).tensor

    def attention(self) -> tuple[Product, ...]:
        """Returns the video's and the text's attention after their projection."""
        scope, head_dim = self.w / "attn1", self.config.attention_head_dim
        text_rotary = joint_rotary = None
        if self._rotary is not None:
            text_rotary = self._no_rotation(self.streams.text)
            joint_rotary = ops.concat([text_rotary, self._rotary], axis=1)
        norms = "norm_q", "norm_k"
        text = self._qkv(self.streams.text, _OF_TEXT)
        image = self._qkv(self.streams.image, 0)
        of_text, of_image = attend(
            scope,
            [
                Attending(text, text_rotary, norms),
                Attending(image, self._rotary, norms),
            ],
            self.config.num_attention_heads,
            head_dim,
            scale=head_dim**-0.5,
            norm="layer",
            joint_rotary=joint_rotary,
        )
        out = scope / "to_out" / 0
        return (
            Product(out, [Columns.all_of(of_image)], self.width),
            Product(out, [Columns.all_of(of_text)], self.width),
        )

    def outputs(self, attention: tuple[Given, ...]) -> tuple[Given, ...]:
        """Returns attention and feed-forward outputs, video before text each."""
        image, text = self._attended(attention)
        return (
            *attention,
            self._feed_forward(image, 0),
            self._feed_forward(text, _OF_TEXT),
        )

    def add(self, outputs: tuple[Given, ...]) -> Streams:
        """Adds each output to its stream, through its own gate."""
        image, text = self._attended(outputs[:2])
        return Streams(
            gated(image, self._mlp_mod, 2, outputs[2]),
            gated(text, self._mlp_mod, _OF_TEXT + 2, outputs[3]),
        )

    def _normed(self, x: TensorValue, mod: Modulation, first: int) -> ModulatedNorm:
        epsilon = self.config.norm_eps
        return ModulatedNorm(x, mod, first, first + 1, epsilon)

    def _qkv(self, x: TensorValue, first: int) -> list[Columns]:
        layers = [Layer(name, self.width) for name in ("to_q", "to_k", "to_v")]
        normed = self._normed(x, self._attention_mod, first)
        bias = self.config.attention_bias
        return project(self.w / "attn1", layers, normed, self.width, bias=bias)

    def _attended(
        self, attention: tuple[Given, ...]
    ) -> tuple[TensorValue, TensorValue]:
        image, text = attention
        mod = self._attention_mod
        return (
            gated(self.streams.image, mod, 2, image),
            gated(self.streams.text, mod, _OF_TEXT + 2, text),
        )

    def _feed_forward(self, x: TensorValue, first: int) -> Product:
        w, hidden = self.w / "ff" / "net", _MLP_RATIO * self.width
        normed = self._normed(x, self._mlp_mod, first)
        layer = Layer("0.proj", hidden, "gelu_tanh")
        return Product(w / 2, project(w, [layer], normed, self.width), self.width)

    def _no_rotation(self, text: TensorValue) -> TensorValue:
        """The rotary table of tokens that are not rotated, ``(2, S_txt, Dh)``."""
        size = self.config.attention_head_dim
        table = np.stack([np.ones((1, size)), np.zeros((1, size))]).astype(np.float32)
        one = ops.constant(table, DType.float32, text.device)
        return ops.broadcast_to(one, (2, text.shape[1], size))


def _with_affine(
    w: WeightScope, modulation: Modulation, starts: tuple[int, ...]
) -> Modulation:
    """Takes a norm's own weight and bias into the modulation that follows it.

    ``(n weight + bias) (1 + scale) + shift`` is ``n (1 + s') + shift'``.

    Args:
        w: Scope of the norm.
        modulation: Shifts, each with its scale after it, and others.
        starts: Where the shifts are.
    """
    width = modulation.width
    weight = w.joined(["weight"], width)
    bias = w.joined(["bias"], width)
    parts = [part.cast(DType.float32) for part in modulation.parts]
    for start in starts:
        shift, scale = parts[start], 1 + parts[start + 1]
        parts[start : start + 2] = bias * scale + shift, weight * scale - 1
    vectors = ops.concat([ops.squeeze(part, 1) for part in parts], axis=1)
    return Modulation(vectors, width, 0, modulation.count)
