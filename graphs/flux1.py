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
from max.graph import DeviceRef, Dim, TensorType, TensorValue, ops

from .denoiser import AbstractBlock, AbstractDenoiser, Streams
from .layers import (
    attention,
    layer_norm,
    linear,
    merge_heads,
    rms_norm,
    split_heads,
    timestep_embedding,
)
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
    rotary: tuple[TensorValue, TensorValue]
    """Cosines and sines of the rotary angles for text then image tokens, each ``(S_txt
    + S_img, 1, Dh)``."""


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
        """Combines time, guidance and pooled text in one vector ``(B, D)``."""
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
        table = ops.concat([inputs["text_rotary"], inputs["image_rotary"]], axis=1)
        table = ops.unsqueeze(table, 2)  # 2, S_txt + S_img, 1, Dh
        return Flux1Conditioning(condition[0], (table[0], table[1]))

    def embed(self, w: WeightScope, inputs: dict[str, TensorValue]) -> Streams:
        """Projects latents and text states to the model's width."""
        config = self.config
        latents = inputs["latents"].cast(self.dtype)
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
        scope = w / "norm_out" / "linear"
        scale, shift = _modulation(scope, conditioning, self.width, 2)
        x = _modulate(layer_norm(image, self.width), shift, scale)
        channels = config.patch_size**2 * config.out_channels
        return linear(w / "proj_out", x, self.width, channels)

    def _embed_scalar(self, w: WeightScope, value: TensorValue) -> TensorValue:
        sinusoid = timestep_embedding(value, _TIMESTEP_CHANNELS).cast(self.dtype)
        return self._two_linears(w, sinusoid, _TIMESTEP_CHANNELS)

    def _two_linears(
        self, w: WeightScope, x: TensorValue, in_features: int
    ) -> TensorValue:
        hidden = ops.silu(linear(w / "linear_1", x, in_features, self.width))
        return linear(w / "linear_2", hidden, self.width, self.width)


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

    def modulation(self, w: WeightScope, count: int) -> list[TensorValue]:
        """Computes ``count`` tensors ``(B, 1, D)`` from the conditioning."""
        return _modulation(w, self.conditioning, self.width, count)

    def qkv(
        self, w: WeightScope, x: TensorValue, names: tuple[str, str, str], norm: str
    ) -> tuple[TensorValue, TensorValue, TensorValue]:
        """Computes normed query and key, and value, ``(B, S, heads, head_dim)``."""
        heads, head_dim = (
            self.config.num_attention_heads,
            self.config.attention_head_dim,
        )
        query, key, value = (
            split_heads(linear(w / name, x, self.width, self.width), heads)
            for name in names
        )
        query = rms_norm(w / f"{norm}q", query, head_dim)
        return query, rms_norm(w / f"{norm}k", key, head_dim), value

    def attend(
        self, query: TensorValue, key: TensorValue, value: TensorValue
    ) -> TensorValue:
        """Computes attention with rotary positions, ``(B, S, D)``."""
        query = _rotate(query, self.conditioning.rotary)
        key = _rotate(key, self.conditioning.rotary)
        scale = self.config.attention_head_dim**-0.5
        return merge_heads(attention(query, key, value, scale=scale))


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
        self._image_mod = self.modulation(w / "norm1" / "linear", 6)
        self._text_mod = self.modulation(w / "norm1_context" / "linear", 6)

    def modulated_input(self) -> TensorValue:
        """Returns the image stream's input of attention, ``(B, S_img, D)``."""
        x = layer_norm(self.streams.image, self.width)
        return _modulate(x, *self._image_mod[:2])

    def attention(self) -> tuple[TensorValue, ...]:
        """Returns the image's and the text's attention after their own projections."""
        text = self.streams.text
        text_in = _modulate(layer_norm(text, self.width), *self._text_mod[:2])
        scope = self.w / "attn"
        names = ("to_q", "to_k", "to_v")
        image_qkv = self.qkv(scope, self.modulated_input(), names, "norm_")
        names = ("add_q_proj", "add_k_proj", "add_v_proj")
        text_qkv = self.qkv(scope, text_in, names, "norm_added_")
        query, key, value = (
            ops.concat([t, i], axis=1) for t, i in zip(text_qkv, image_qkv, strict=True)
        )  # B, S_txt + S_img, heads, head_dim
        mixed = self.attend(query, key, value)
        text_mixed, image_mixed = _cut(mixed, text.shape[1])
        return (
            linear(scope / "to_out" / 0, image_mixed, self.width, self.width),
            linear(scope / "to_add_out", text_mixed, self.width, self.width),
        )

    def outputs(self, attention: tuple[TensorValue, ...]) -> tuple[TensorValue, ...]:
        """Returns attention and feed-forward outputs, image before text each."""
        image, text = self._attended(attention)
        image_ff = self._feed_forward(self.w / "ff", image, self._image_mod)
        text_ff = self._feed_forward(self.w / "ff_context", text, self._text_mod)
        return (*attention, image_ff, text_ff)

    def add(self, outputs: tuple[TensorValue, ...]) -> Streams:
        """Adds each output to its stream, through its own gate."""
        image, text = self._attended(outputs[:2])
        return Streams(
            image + self._image_mod[5] * outputs[2],
            text + self._text_mod[5] * outputs[3],
        )

    def _attended(
        self, attention: tuple[TensorValue, ...]
    ) -> tuple[TensorValue, TensorValue]:
        image, text = attention
        return (
            self.streams.image + self._image_mod[2] * image,
            self.streams.text + self._text_mod[2] * text,
        )

    def _feed_forward(
        self, w: WeightScope, x: TensorValue, modulation: list[TensorValue]
    ) -> TensorValue:
        shift, scale = modulation[3:5]
        hidden = _MLP_RATIO * self.width
        y = _modulate(layer_norm(x, self.width), shift, scale)
        y = linear(w / "net" / 0 / "proj", y, self.width, hidden)
        y = ops.gelu(y, approximate="tanh")
        return linear(w / "net" / 2, y, hidden, self.width)


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
        shift, scale, self._gate = self.modulation(w / "norm" / "linear", 3)
        self._normed = _modulate(layer_norm(joint, self.width), shift, scale)

    def modulated_input(self) -> TensorValue:
        """Returns the joint input of attention, ``(B, S_txt + S_img, D)``."""
        return self._normed

    def attention(self) -> tuple[TensorValue, ...]:
        """Returns the joint attention, before the block's one projection."""
        names = ("to_q", "to_k", "to_v")
        return (self.attend(*self.qkv(self.w / "attn", self._normed, names, "norm_")),)

    def outputs(self, attention: tuple[TensorValue, ...]) -> tuple[TensorValue, ...]:
        """Returns the one projection of attention and feed-forward together."""
        width, hidden = self.width, _MLP_RATIO * self.width
        mlp = linear(self.w / "proj_mlp", self._normed, width, hidden)
        mlp = ops.gelu(mlp, approximate="tanh")
        # One matrix in the checkpoint, two here: joining attention and MLP along the
        # channels copies both, and takes longer than the product on CPU.
        w_out = self.w / "proj_out"
        total = width + hidden
        first = w_out.columns("weight", width, total, 0, width)
        second = w_out.columns("weight", width, total, width, total)
        out = attention[0] @ ops.transpose(first, 0, 1) + w_out("bias", width)
        return (out + mlp @ ops.transpose(second, 0, 1),)

    def add(self, outputs: tuple[TensorValue, ...]) -> Streams:
        """Adds the output to the joint sequence, through the gate."""
        joint = self._joint + self._gate * outputs[0]
        text, image = _cut(joint, self.streams.text.shape[1])
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


def _modulation(
    w: WeightScope, conditioning: Flux1Conditioning, width: int, count: int
) -> list[TensorValue]:
    y = linear(w, conditioning.embedding, width, count * width)
    return ops.split(ops.unsqueeze(y, 1), [width] * count, axis=2)


def _modulate(x: TensorValue, shift: TensorValue, scale: TensorValue) -> TensorValue:
    return x * (1 + scale) + shift


def _rotate(x: TensorValue, rotary: tuple[TensorValue, TensorValue]) -> TensorValue:
    """Rotates neighbouring channel pairs of ``(B, S, heads, Dh)`` in float32."""
    cos, sin = rotary
    head_dim = int(x.shape[3])
    # (a, b) to (-b, a) for every pair. A product with 0 and 1 is exact, and on CPU an
    # order of magnitude faster than taking every second channel.
    turn = np.zeros((head_dim, head_dim), np.float32)
    even = np.arange(0, head_dim, 2)
    turn[even + 1, even], turn[even, even + 1] = -1, 1
    turned = x @ ops.constant(turn, DType.float32, x.device).cast(x.dtype)
    rotated = x.cast(DType.float32) * cos + turned.cast(DType.float32) * sin
    return rotated.cast(x.dtype)


def _cut(x: TensorValue, first: Dim) -> tuple[TensorValue, TensorValue]:
    """Splits ``(B, S, D)`` into the first tokens and the others."""
    # By their sizes: bounds that are tensors would each be compiled to be folded.
    return x[:, :first, :], x[:, first:, :]
