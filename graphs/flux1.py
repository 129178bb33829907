"""The FLUX.1 transformer, written as ``condition`` / ``embed`` / blocks / ``output``.

Black Forest Labs, FLUX.1 (2024); weight names are those of diffusers'
``FluxTransformer2DModel``. Double blocks keep a text and an image stream with weights
of their own and attend jointly; single blocks run both streams as one sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, final

from max.dtype import DType
from max.graph import DeviceRef, TensorType, TensorValue, ops

from .denoiser import AbstractDenoiser, Streams
from .layers import linear
from .mmdit import (
    MLP_RATIO,
    AbstractSingleBlock,
    DoubleBlock,
    DoubleBlockNames,
    Heads,
    JointConditioning,
    embed_scalar,
    predicted,
    two_linears,
)
from .pieces import Layer, Modulation, modulations
from .processor import Columns
from .weights import WeightScope

_DOUBLE: Final = DoubleBlockNames(
    ("norm1.linear", "norm1_context.linear"), ("ff", "ff_context")
)


@dataclass(frozen=True)
class Flux1Config:
    """Sizes of a FLUX.1 transformer, named as in its ``config.json``."""

    in_channels: int = 64
    out_channels: int = 64
    num_layers: int = 19
    num_single_layers: int = 38
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 768
    guidance_embeds: bool = False
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)
    patch_size: int = 1

    @property
    def known_channels(self) -> int:
        """Channels that the transformer reads beside an image token's latents."""
        return self.in_channels - self.out_channels

    @property
    def heads(self) -> Heads:
        """Sizes of all blocks."""
        return Heads(self.num_attention_heads, self.attention_head_dim)


@final
class Flux1Denoiser(AbstractDenoiser[JointConditioning]):
    """Builds the pieces of one FLUX.1 transformer.

    Args:
        config: Sizes of the transformer.
        dtype: Dtype of weights, hidden states and prediction.
        device: Device that the graphs run on.
    """

    def __init__(self, config: Flux1Config, dtype: DType, device: DeviceRef) -> None:
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
        0..1000; ``known`` float32 ``(B, S_img, in_channels - C)``, only where more is
        read than predicted, as by FLUX.1-Fill; ``guidance`` float32 ``(B,)``, only with
        a guidance embedding; ``text`` ``(B, S_txt, joint_attention_dim)``;
        ``pooled_text`` ``(B, pooled_projection_dim)``; ``text_rotary`` and
        ``image_rotary`` float32 from :func:`~.rotary.rotary_table`.
        """
        config = self.config
        head_dim = config.attention_head_dim

        def typed(dtype: DType, *shape: int | str) -> TensorType:
            return TensorType(dtype, shape, self.device)

        types = {
            "latents": typed(DType.float32, batch, image_seq_len, config.out_channels),
            "timestep": typed(DType.float32, batch),
            "text": typed(self.dtype, batch, text_seq_len, config.joint_attention_dim),
            "pooled_text": typed(self.dtype, batch, config.pooled_projection_dim),
            "text_rotary": typed(DType.float32, 2, text_seq_len, head_dim),
            "image_rotary": typed(DType.float32, 2, image_seq_len, head_dim),
        }
        if config.guidance_embeds:
            types["guidance"] = typed(DType.float32, batch)
        if config.known_channels:
            shape = batch, image_seq_len, config.known_channels
            types["known"] = typed(DType.float32, *shape)
        return types

    def condition(
        self, w: WeightScope, inputs: dict[str, TensorValue]
    ) -> tuple[TensorValue]:
        """Combines time, guidance and pooled text in one vector ``(B, D)``.

        float32 where the pieces take it so, see :mod:`.pieces`.
        """
        scope = w / "time_text_embed"
        embedding = embed_scalar(
            scope / "timestep_embedder", inputs["timestep"], self.width
        )
        if self.config.guidance_embeds:
            scaled = inputs["guidance"] * 1000.0
            guidance = embed_scalar(scope / "guidance_embedder", scaled, self.width)
            embedding = embedding + guidance
        embedding = embedding + two_linears(
            scope / "text_embedder",
            inputs["pooled_text"],
            self.config.pooled_projection_dim,
            self.width,
        )
        return (ops.silu(embedding),)

    def conditioning(
        self, condition: tuple[TensorValue, ...], inputs: dict[str, TensorValue]
    ) -> JointConditioning:
        """Returns that vector, and the rotary tables of both sequences joined."""
        tables = inputs["text_rotary"], inputs["image_rotary"]
        return JointConditioning(condition[0], *tables, ops.concat(tables, axis=1))

    def embed(self, w: WeightScope, inputs: dict[str, TensorValue]) -> Streams:
        """Projects latents and text states to the model's width."""
        config = self.config
        latents = inputs["latents"]
        if config.known_channels:
            latents = ops.concat([latents, inputs["known"]], axis=2)
        image = linear(w / "x_embedder", latents, config.in_channels, self.width)
        text = linear(
            w / "context_embedder",
            inputs["text"],
            config.joint_attention_dim,
            self.width,
        )
        return Streams(image, text)

    def block(
        self,
        w: WeightScope,
        index: int,
        streams: Streams,
        conditioning: JointConditioning,
    ) -> DoubleBlock | SingleBlock:
        """Creates block ``index``, counting double blocks first, then single ones."""
        heads = self.config.heads
        if index < self.config.num_layers:
            scope = w / "transformer_blocks" / index
            return DoubleBlock(heads, scope, streams, conditioning, _DOUBLE)
        scope = w / "single_transformer_blocks" / (index - self.config.num_layers)
        return SingleBlock(heads, scope, streams, conditioning)

    def output(
        self, w: WeightScope, image: TensorValue, conditioning: JointConditioning
    ) -> TensorValue:
        """Turns the image stream into the velocity ``(B, S_img, C)``."""
        channels = self.config.patch_size**2 * self.config.out_channels
        return predicted(w, image, conditioning.embedding, channels)


@final
class SingleBlock(AbstractSingleBlock):
    """A single block with modulations of its own and GELU."""

    output_name = "proj_out"

    def modulation(self) -> Modulation:
        """Returns the block's own."""
        embedding = self.conditioning.embedding
        (own,) = modulations(self.w, ["norm.linear"], embedding, self.width, 3)
        return own

    def feed_forward_layers(self) -> list[Layer]:
        """Returns the first layer of the feed-forward layer."""
        return [Layer("proj_mlp", MLP_RATIO * self.width, "gelu_tanh")]

    def feed_forward(self, projected: list[Columns]) -> Columns:
        """Returns its output, which is what the last layer takes."""
        (found,) = projected
        return found
