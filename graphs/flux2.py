"""The FLUX.2 transformer, written as ``condition`` / ``embed`` / blocks / ``output``.

Black Forest Labs, FLUX.2 (2025). As FLUX.1's, with one modulation for all blocks of a
kind, gated feed-forward layers, four axes of positions and no biases. Weight names are
those of diffusers' ``Flux2Transformer2DModel``, but for layers that it fuses: here
``up`` and ``gate`` of each feed-forward layer, and in single blocks query, key and
value, have names of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, final

from max.dtype import DType
from max.graph import DeviceRef, TensorType, TensorValue, ops

from .denoiser import AbstractDenoiser, Streams
from .layers import linear
from .mmdit import (
    AbstractDoubleBlock,
    AbstractSingleBlock,
    Heads,
    JointConditioning,
    embed_scalar,
    predicted,
)
from .pieces import Layer, ModulatedNorm, Modulation, Product, modulations, project
from .processor import Columns
from .weights import WeightScope

# The condition's modulations: name, and how many vectors.
_MODULATIONS: Final = (
    ("double_stream_modulation_img", 6),
    ("double_stream_modulation_txt", 6),
    ("single_stream_modulation", 3),
)


@final
@dataclass(frozen=True)
class Flux2Config:
    """Sizes of a FLUX.2 transformer, named as in its ``config.json``."""

    in_channels: int = 128
    num_layers: int = 8
    num_single_layers: int = 48
    attention_head_dim: int = 128
    num_attention_heads: int = 48
    joint_attention_dim: int = 15360
    mlp_ratio: float = 3.0
    axes_dims_rope: tuple[int, ...] = (32, 32, 32, 32)
    rope_theta: float = 2000.0
    guidance_embeds: bool = True

    @property
    def heads(self) -> Heads:
        """Sizes of all blocks."""
        return Heads(self.num_attention_heads, self.attention_head_dim)

    @property
    def hidden_features(self) -> int:
        """Channels between the layers of a feed-forward layer."""
        return int(self.heads.width * self.mlp_ratio)


@final
@dataclass(frozen=True)
class Flux2Conditioning:
    """What every block reads and none changes."""

    joint: JointConditioning
    """The embedding of time, and the rotary tables."""
    double: tuple[Modulation, Modulation]
    """Of all double blocks, image before text."""
    single: Modulation
    """Of all single blocks."""


@final
class Flux2Denoiser(AbstractDenoiser[Flux2Conditioning]):
    """Builds the pieces of one FLUX.2 transformer.

    Args:
        config: Sizes of the transformer.
        dtype: Dtype of weights, hidden states and prediction.
        device: Device that the graphs run on.
    """

    def __init__(self, config: Flux2Config, dtype: DType, device: DeviceRef) -> None:
        self.config = config
        self.dtype = dtype
        self.device = device
        self.num_blocks = config.num_layers + config.num_single_layers
        self.block_inputs = ("text_rotary", "image_rotary")
        self.width = config.heads.width

    def input_types(
        self,
        batch: int | str = "batch",
        image_seq_len: int | str = "image_seq_len",
        text_seq_len: int | str = "text_seq_len",
    ) -> dict[str, TensorType]:
        """Returns a step's inputs by name; integers fix a size at compile time.

        ``latents`` packed, float32 ``(B, S_img, C)``; ``timestep`` float32 ``(B,)`` in
        0..1000; ``guidance`` float32 ``(B,)``, only with a guidance embedding; ``text``
        ``(B, S_txt, joint_attention_dim)``; ``text_rotary`` and ``image_rotary``
        float32 from :func:`~.rotary.rotary_table`.
        """
        config = self.config
        head_dim = config.attention_head_dim

        def typed(dtype: DType, *shape: int | str) -> TensorType:
            return TensorType(dtype, shape, self.device)

        types = {
            "latents": typed(DType.float32, batch, image_seq_len, config.in_channels),
            "timestep": typed(DType.float32, batch),
            "text": typed(self.dtype, batch, text_seq_len, config.joint_attention_dim),
            "text_rotary": typed(DType.float32, 2, text_seq_len, head_dim),
            "image_rotary": typed(DType.float32, 2, image_seq_len, head_dim),
        }
        if config.guidance_embeds:
            types["guidance"] = typed(DType.float32, batch)
        return types

    def condition(
        self, w: WeightScope, inputs: dict[str, TensorValue]
    ) -> tuple[TensorValue, ...]:
        """Embeds time and guidance, and computes the modulations from them.

        Returns:
            ``(B, D)``, then ``(B, 6 D)`` for images, for texts, and ``(B, 3 D)``;
            float32 where the pieces take it so, see :mod:`.pieces`.
        """
        scope, width = w / "time_guidance_embed", self.width
        embedding = embed_scalar(
            scope / "timestep_embedder", inputs["timestep"], width, bias=False
        )
        if self.config.guidance_embeds:
            scaled = inputs["guidance"] * 1000.0
            embedding = embedding + embed_scalar(
                scope / "guidance_embedder", scaled, width, bias=False
            )
        embedding = ops.silu(embedding)
        vectors = [
            modulations(w / name, ["linear"], embedding, self.width, count, bias=False)
            for name, count in _MODULATIONS
        ]
        return (embedding, *(found[0].vectors for found in vectors))

    def conditioning(
        self, condition: tuple[TensorValue, ...], inputs: dict[str, TensorValue]
    ) -> Flux2Conditioning:
        """Returns these, and the rotary tables of both sequences joined."""
        tables = inputs["text_rotary"], inputs["image_rotary"]
        embedding, *vectors = condition
        image, text, single = (
            Modulation(each, self.width, 0, count)
            for each, (_, count) in zip(vectors, _MODULATIONS, strict=True)
        )
        joint = JointConditioning(embedding, *tables, ops.concat(tables, axis=1))
        return Flux2Conditioning(joint, (image, text), single)

    def embed(self, w: WeightScope, inputs: dict[str, TensorValue]) -> Streams:
        """Projects latents and text states to the model's width."""
        config, width = self.config, self.width
        image, text = (
            linear(w / name, inputs[given], channels, width, bias=False)
            for name, given, channels in (
                ("x_embedder", "latents", config.in_channels),
                ("context_embedder", "text", config.joint_attention_dim),
            )
        )
        return Streams(image, text)

    def block(
        self,
        w: WeightScope,
        index: int,
        streams: Streams,
        conditioning: Flux2Conditioning,
    ) -> AbstractDoubleBlock | AbstractSingleBlock:
        """Creates block ``index``, counting double blocks first, then single ones."""
        if index < self.config.num_layers:
            scope = w / "transformer_blocks" / index
            return _DoubleBlock(self.config, scope, streams, conditioning)
        scope = w / "single_transformer_blocks" / (index - self.config.num_layers)
        return _SingleBlock(self.config, scope, streams, conditioning)

    def output(
        self, w: WeightScope, image: TensorValue, conditioning: Flux2Conditioning
    ) -> TensorValue:
        """Turns the image stream into the velocity ``(B, S_img, C)``."""
        embedding, channels = conditioning.joint.embedding, self.config.in_channels
        return predicted(w, image, embedding, channels, bias=False)


@final
class _DoubleBlock(AbstractDoubleBlock):
    has_bias = False

    def __init__(
        self,
        config: Flux2Config,
        w: WeightScope,
        streams: Streams,
        conditioning: Flux2Conditioning,
    ) -> None:
        super().__init__(
            config.heads, w, streams, conditioning.joint, conditioning.double
        )
        self._hidden = config.hidden_features

    def feed_forward(self, is_image: bool, x: ModulatedNorm) -> Product:
        scope = self.w / ("ff" if is_image else "ff_context")
        layers = _gated_layers(self._hidden)
        inner = _gated(project(scope, layers, x, self.width, bias=False))
        return Product(scope / "linear_out", [inner], self.width, bias=False)


@final
class _SingleBlock(AbstractSingleBlock):
    has_bias = False
    output_name = "attn.to_out"

    def __init__(
        self,
        config: Flux2Config,
        w: WeightScope,
        streams: Streams,
        conditioning: Flux2Conditioning,
    ) -> None:
        self._hidden, self._shared = config.hidden_features, conditioning.single
        super().__init__(config.heads, w, streams, conditioning.joint)

    def modulation(self) -> Modulation:
        return self._shared

    def feed_forward_layers(self) -> list[Layer]:
        return _gated_layers(self._hidden, "attn.")

    def feed_forward(self, projected: list[Columns]) -> Columns:
        return _gated(projected)


def _gated_layers(features: int, prefix: str = "") -> list[Layer]:
    """The two halves of a gated layer; activated ones last, as products want them."""
    return [Layer(f"{prefix}up", features), Layer(f"{prefix}gate", features, "silu")]


def _gated(projected: list[Columns]) -> Columns:
    up, gate = projected
    return Columns.all_of(gate.alone * up.alone)
