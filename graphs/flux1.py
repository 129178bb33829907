"""The FLUX.1 transformer, written as ``condition`` / ``embed`` / blocks / ``output``.

Black Forest Labs, FLUX.1 (2024); weight names are those of diffusers'
``FluxTransformer2DModel``. Double blocks keep a text and an image stream with weights
of their own and attend jointly; single blocks run both streams as one sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np
from max.dtype import DType
from max.graph import DeviceRef, TensorType, TensorValue, ops

from .denoiser import AbstractBlock, AbstractDenoiser, Streams
from .layers import linear, timestep_embedding
from .pieces import (
    Attending,
    Given,
    Layer,
    ModulatedNorm,
    Modulation,
    Product,
    attend,
    computed,
    cut,
    gated,
    modulations,
    project,
)
from .processor import Columns
from .weights import WeightScope

_TIMESTEP_CHANNELS = 256
_MLP_RATIO = 4
_THETA = 10000.0


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
    def width(self) -> int:
        """Model width D, the channels of each hidden state."""
        return self.num_attention_heads * self.attention_head_dim


@dataclass(frozen=True)
class Flux1Conditioning:
    """What every block reads and none changes."""

    embedding: TensorValue
    """SiLU of the time, guidance and text embedding, ``(B, D)``."""
    text_rotary: TensorValue
    """Cosines and sines of the text tokens' rotary angles, ``(2, S_txt, Dh)``."""
    image_rotary: TensorValue
    """Those of the image tokens, ``(2, S_img, Dh)``."""
    joint_rotary: TensorValue
    """Both, text before image."""


@final
class Flux1Denoiser(AbstractDenoiser[Flux1Conditioning]):
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
        self.width = config.width

    def input_types(
        self,
        batch: int | str = "batch",
        image_seq_len: int | str = "image_seq_len",
        text_seq_len: int | str = "text_seq_len",
    ) -> dict[str, TensorType]:
        """Returns a step's inputs by name; integers fix a size at compile time.

        ``latents`` packed, float32 ``(B, S_img, C)``; ``timestep`` float32 ``(B,)`` in
        0..1000; ``guidance`` float32 ``(B,)``, only with a guidance embedding; ``text``
        ``(B, S_txt, joint_attention_dim)``; ``pooled_text`` ``(B,
        pooled_projection_dim)``; ``text_rotary`` and ``image_rotary`` float32 from
        :func:`rotary_table`.
        """
        config = self.config
        head_dim = config.attention_head_dim

        def typed(dtype: DType, *shape: int | str) -> TensorType:
            return TensorType(dtype, shape, self.device)

        types = {
            "latents": typed(DType.float32, batch, image_seq_len, config.in_channels),
            "timestep": typed(DType.float32, batch),
            "text": typed(self.dtype, batch, text_seq_len, config.joint_attention_dim),
            "pooled_text": typed(self.dtype, batch, config.pooled_projection_dim),
            "text_rotary": typed(DType.float32, 2, text_seq_len, head_dim),
            "image_rotary": typed(DType.float32, 2, image_seq_len, head_dim),
        }
        if config.guidance_embeds:
            types["guidance"] = typed(DType.float32, batch)
        return types

    def condition(
        self, w: WeightScope, inputs: dict[str, TensorValue]
    ) -> tuple[TensorValue]:
        """Combines time, guidance and pooled text in one vector ``(B, D)``.

        float32 where the pieces take it so, see :mod:`.pieces`.
        """
        scope = w / "time_text_embed"
        embedding = self._embed_scalar(scope / "timestep_embedder", inputs["timestep"])
        if self.config.guidance_embeds:
            scaled = inputs["guidance"] * 1000.0
            guidance = self._embed_scalar(scope / "guidance_embedder", scaled)
            embedding = embedding + guidance
        embedding = embedding + self._two_linears(
            scope / "text_embedder",
            inputs["pooled_text"],
            self.config.pooled_projection_dim,
        )
        return (ops.silu(embedding),)

    def conditioning(
        self, condition: tuple[TensorValue, ...], inputs: dict[str, TensorValue]
    ) -> Flux1Conditioning:
        """Returns that vector, and the rotary tables of both sequences joined."""
        tables = inputs["text_rotary"], inputs["image_rotary"]
        return Flux1Conditioning(condition[0], *tables, ops.concat(tables, axis=1))

    def embed(self, w: WeightScope, inputs: dict[str, TensorValue]) -> Streams:
        """Projects latents and text states to the model's width."""
        config = self.config
        latents = inputs["latents"]
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
        conditioning: Flux1Conditioning,
    ) -> DoubleBlock | SingleBlock:
        """Creates block ``index``, counting double blocks first, then single ones."""
        if index < self.config.num_layers:
            scope = w / "transformer_blocks" / index
            return DoubleBlock(self.config, scope, streams, conditioning)
        scope = w / "single_transformer_blocks" / (index - self.config.num_layers)
        return SingleBlock(self.config, scope, streams, conditioning)

    def output(
        self, w: WeightScope, image: TensorValue, conditioning: Flux1Conditioning
    ) -> TensorValue:
        """Turns the image stream into the velocity ``(B, S_img, C)``."""
        config = self.config
        # The final norm stores scale before shift, unlike the blocks.
        embedding, width = conditioning.embedding, self.width
        (mod,) = modulations(w / "norm_out", ["linear"], embedding, width, 2)
        x = ModulatedNorm(image, mod, shift=1, scale=0)
        channels = config.patch_size**2 * config.out_channels
        return project(w, [Layer("proj_out", channels)], x, width)[0].tensor

    def _embed_scalar(self, w: WeightScope, value: TensorValue) -> TensorValue:
        sinusoid = timestep_embedding(value, _TIMESTEP_CHANNELS)
        return self._two_linears(w, sinusoid, _TIMESTEP_CHANNELS)

    def _two_linears(
        self, w: WeightScope, x: TensorValue, in_features: int
    ) -> TensorValue:
        dtype = self.dtype if w.products is None else DType.float32
        hidden = linear(
            w / "linear_1",
            x,
            in_features,
            self.width,
            activation="silu",
            dtype=dtype,
        )
        return linear(w / "linear_2", hidden, self.width, self.width, dtype=dtype)


class Flux1Block(AbstractBlock):
    """Base of double and single blocks, with what both need."""

    def __init__(
        self,
        config: Flux1Config,
        w: WeightScope,
        streams: Streams,
        conditioning: Flux1Conditioning,
    ) -> None:
        self.config, self.w = config, w
        self.width = config.width
        self.streams, self.conditioning = streams, conditioning

    def modulations(self, *names: str, count: int) -> list[Modulation]:
        """Computes ``count`` vectors from the condition, of each linear layer."""
        embedding = self.conditioning.embedding
        return modulations(self.w, names, embedding, self.width, count)

    def attend(self, *streams: Attending) -> list[TensorValue]:
        """Computes attention with rotary positions, of each stream ``(B, S, D)``."""
        head_dim = self.config.attention_head_dim
        return attend(
            self.w / "attn",
            streams,
            self.config.num_attention_heads,
            head_dim,
            scale=head_dim**-0.5,
            joint_rotary=self.conditioning.joint_rotary,
        )


@final
class DoubleBlock(Flux1Block):
    """A block of two streams with weights of their own and joint attention."""

    def __init__(
        self,
        config: Flux1Config,
        w: WeightScope,
        streams: Streams,
        conditioning: Flux1Conditioning,
    ) -> None:
        super().__init__(config, w, streams, conditioning)
        names = "norm1.linear", "norm1_context.linear"
        self._image_mod, self._text_mod = self.modulations(*names, count=6)

    def modulated_input(self) -> TensorValue:
        """Returns the image stream's input of attention, ``(B, S_img, D)``."""
        return ModulatedNorm(self.streams.image, self._image_mod).tensor

    def attention(self) -> tuple[Product, ...]:
        """Returns the image's and the text's attention after their own projections."""
        names = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")
        image = self._qkv(self.streams.image, self._image_mod, names[0])
        text = self._qkv(self.streams.text, self._text_mod, names[1])
        norms = "norm_added_q", "norm_added_k"
        of_text, of_image = self.attend(
            Attending(text, self.conditioning.text_rotary, norms),
            Attending(image, self.conditioning.image_rotary, ("norm_q", "norm_k")),
        )
        scope = self.w / "attn"
        return (
            Product(scope / "to_out" / 0, [Columns.all_of(of_image)], self.width),
            Product(scope / "to_add_out", [Columns.all_of(of_text)], self.width),
        )

    def outputs(self, attention: tuple[Given, ...]) -> tuple[Given, ...]:
        """Returns attention and feed-forward outputs, image before text each."""
        image, text = self._attended(attention)
        image_ff = self._feed_forward("ff", image, self._image_mod)
        text_ff = self._feed_forward("ff_context", text, self._text_mod)
        return (*attention, image_ff, text_ff)

    def add(self, outputs: tuple[Given, ...]) -> Streams:
        """Adds each output to its stream, through its own gate."""
        image, text = self._attended(outputs[:2])
        return Streams(
            gated(image, self._image_mod, 5, outputs[2]),
            gated(text, self._text_mod, 5, outputs[3]),
        )

    def _qkv(
        self, x: TensorValue, modulation: Modulation, names: tuple[str, ...]
    ) -> list[Columns]:
        layers = [Layer(name, self.width) for name in names]
        normed = ModulatedNorm(x, modulation)
        return project(self.w / "attn", layers, normed, self.width)

    def _attended(
        self, attention: tuple[Given, ...]
    ) -> tuple[TensorValue, TensorValue]:
        image, text = attention
        return (
            gated(self.streams.image, self._image_mod, 2, image),
            gated(self.streams.text, self._text_mod, 2, text),
        )

    def _feed_forward(self, name: str, x: TensorValue, mod: Modulation) -> Product:
        w, hidden = self.w / name / "net", _MLP_RATIO * self.width
        normed = ModulatedNorm(x, mod, shift=3, scale=4)
        layer = Layer("0.proj", hidden, "gelu_tanh")
        return Product(w / 2, project(w, [layer], normed, self.width), self.width)


@final
class SingleBlock(Flux1Block):
    """A block of one joint sequence, attention and feed-forward side by side."""

    def __init__(
        self,
        config: Flux1Config,
        w: WeightScope,
        streams: Streams,
        conditioning: Flux1Conditioning,
    ) -> None:
        super().__init__(config, w, streams, conditioning)
        joint = streams.joint
        if joint is None:
            joint = ops.concat([streams.text, streams.image], axis=1)
        self._joint = joint
        (self._mod,) = self.modulations("norm.linear", count=3)
        self._normed = ModulatedNorm(joint, self._mod)
        self._layers = [
            *(Layer(f"attn.{name}", self.width) for name in ("to_q", "to_k", "to_v")),
            Layer("proj_mlp", _MLP_RATIO * self.width, "gelu_tanh"),
        ]
        # Known where attention has been computed with it.
        self._mlp: Columns | None = None

    def modulated_input(self) -> TensorValue:
        """Returns the joint input of attention, ``(B, S_txt + S_img, D)``."""
        return self._normed.tensor

    def attention(self) -> tuple[TensorValue, ...]:
        """Returns the joint attention, before the block's one projection."""
        *qkv, self._mlp = project(self.w, self._layers, self._normed, self.width)
        rotary, norms = self.conditioning.joint_rotary, ("norm_q", "norm_k")
        return tuple(self.attend(Attending(qkv, rotary, norms)))

    def outputs(self, attention: tuple[Given, ...]) -> tuple[Product, ...]:
        """Returns the one projection of attention and feed-forward together."""
        mlp = self._mlp
        if mlp is None:
            (mlp,) = project(self.w, self._layers, self._normed, self.width, first=3)
        mixed = Columns.all_of(computed(attention[0]))
        return (Product(self.w / "proj_out", [mixed, mlp], self.width),)

    def add(self, outputs: tuple[Given, ...]) -> Streams:
        """Adds the output to the joint sequence, through the gate."""
        joint = gated(self._joint, self._mod, 2, outputs[0])
        text, image = cut(joint, self.streams.text.shape[1])
        return Streams(image, text, joint)


def rotary_table(ids: np.ndarray, axes_dims: tuple[int, ...]) -> np.ndarray:
    """Computes cosines and sines of the rotary angles for token positions.

    Angles are formed in float64 as diffusers does on CPU.

    Args:
        ids: Positions ``(S, number of axes)``: for FLUX.1 (0, row, column).
        axes_dims: Channels of one head given to each axis; all even.

    Returns:
        float32 ``(2, S, head_dim)``, cosines first, each angle for both channels of
        its pair.
    """
    angles = [
        ids[:, axis, None].astype(np.float64)
        * _THETA ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
        for axis, dim in enumerate(axes_dims)
    ]
    joined = np.repeat(np.concatenate(angles, axis=1), 2, axis=1)
    return np.stack([np.cos(joined), np.sin(joined)]).astype(np.float32)


def image_ids(rows: int, columns: int) -> np.ndarray:
    """Returns packed latents' positions by row, float32 ``(rows * columns, 3)``."""
    ids = np.zeros((rows, columns, 3), np.float32)
    ids[..., 1] = np.arange(rows)[:, None]
    ids[..., 2] = np.arange(columns)[None, :]
    return ids.reshape(-1, 3)
