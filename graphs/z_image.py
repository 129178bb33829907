"""Z-Image's transformer, written as ``condition`` / ``embed`` / blocks / ``output``.

Z-Image Team, "Z-Image: An Efficient Image Generation Foundation Model with
Single-Stream Diffusion Transformer", 2025, arXiv:2511.22699; weight names are those of
diffusers' ``ZImageTransformer2DModel``. Text and image are one sequence, after some
blocks of each alone, which are part of ``embed``. Blocks have RMS norms before and
after attention and feed-forward, which is gated, and no biases.

Both sequences are filled up to a multiple of 32 tokens with learned ones, which are
attended to. Those of the image stand before the text here: a token's place in memory
means nothing, its position does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Final, final

from max.dtype import DType
from max.graph import DeviceRef, Dim, TensorType, TensorValue, ops

from .attending import Attending, attend
from .denoiser import AbstractBlock, AbstractDenoiser, Streams
from .layers import linear, rms_norm, timestep_embedding
from .mmdit import TIMESTEP_CHANNELS, Heads
from .padding import KeyMask
from .pieces import (
    AffineNorm,
    Given,
    Layer,
    Normed,
    Product,
    ScaledNorm,
    computed,
    cut,
    project,
)
from .processor import Columns
from .weights import WeightScope

# The widths of the embedding of time, and of what is between its two layers.
_CONDITION: Final = 256
_INNER: Final = 1024
_TRAIN_TIMESTEPS: Final = 1000.0
# Pixels a side of a patch of latents, and frames: the one size there is.
_PATCH: Final = 2
_PATCH_NAME: Final = "2-1"


@dataclass(frozen=True)
class ZImageConfig:
    """Sizes of a Z-Image transformer, named as in its ``config.json``."""

    in_channels: int = 16
    dim: int = 3840
    n_layers: int = 30
    n_refiner_layers: int = 2
    n_heads: int = 30
    norm_eps: float = 1e-5
    qk_norm: bool = True
    cap_feat_dim: int = 2560
    rope_theta: float = 256.0
    t_scale: float = 1000.0
    axes_dims: tuple[int, ...] = (32, 48, 48)

    @property
    def heads(self) -> Heads:
        """Sizes of all blocks."""
        return Heads(self.n_heads, self.dim // self.n_heads)

    @property
    def condition_width(self) -> int:
        """Columns of the embedding of time."""
        return min(self.dim, _CONDITION)

    @property
    def feed_forward_width(self) -> int:
        """Columns inside of the feed-forward layers."""
        return int(self.dim / 3 * 8)

    @property
    def token_channels(self) -> int:
        """Channels of an image token's latents."""
        return _PATCH * _PATCH * self.in_channels


@final
@dataclass(frozen=True)
class ZImageConditioning:
    """What every block reads and none changes."""

    embedding: TensorValue
    """Of time, ``(B, 256)``."""
    rotary: tuple[TensorValue, TensorValue]
    """Tables of text and of image, each ``(B, 2, S, Dh)``."""
    mask: KeyMask
    """Of the text."""

    @cached_property
    def joint_rotary(self) -> TensorValue:
        """Both, text before image."""
        return ops.concat(self.rotary, axis=2)


@final
class ZImageDenoiser(AbstractDenoiser[ZImageConditioning]):
    """Builds the pieces of one Z-Image transformer.

    Args:
        config: Sizes of the transformer.
        dtype: Dtype of weights, hidden states and prediction.
        device: Device that the graphs run on.
    """

    def __init__(self, config: ZImageConfig, dtype: DType, device: DeviceRef) -> None:
        self.config = config
        self.dtype = dtype
        self.device = device
        self.num_blocks = config.n_layers
        self.block_inputs = ("text_rotary", "image_rotary", "text_mask")
        self.width = config.dim

    def input_types(
        self,
        batch: int | str = "batch",
        image_seq_len: int | str = "image_seq_len",
        text_seq_len: int | str = "text_seq_len",
    ) -> dict[str, TensorType]:
        """Returns a step's inputs by name; integers fix a size at compile time.

        ``latents`` packed, float32 ``(B, S_img, C)``; ``timestep`` float32 ``(B,)`` in
        0..1000; ``text`` ``(B, L, cap_feat_dim)``, states of the prompt's tokens, and
        ``text_filling`` float32 ``(B, L)``, 1 at what fills them up to a multiple of
        32. ``S_txt`` is what fills the image up, then ``L``: ``text_mask`` float32
        ``(B, S_txt)``, -1e30 after a shorter text than others; ``text_rotary`` and
        ``image_rotary`` float32 ``(B, 2, S, head_dim)``.
        """
        config = self.config
        table = config.heads.size

        def typed(dtype: DType, *shape: int | str) -> TensorType:
            return TensorType(dtype, shape, self.device)

        length = "prompt_len"
        return {
            "latents": typed(
                DType.float32, batch, image_seq_len, config.token_channels
            ),
            "timestep": typed(DType.float32, batch),
            "text": typed(self.dtype, batch, length, config.cap_feat_dim),
            "text_filling": typed(DType.float32, batch, length),
            "text_mask": typed(DType.float32, batch, text_seq_len),
            "text_rotary": typed(DType.float32, batch, 2, text_seq_len, table),
            "image_rotary": typed(DType.float32, batch, 2, image_seq_len, table),
        }

    def condition(
        self, w: WeightScope, inputs: dict[str, TensorValue]
    ) -> tuple[TensorValue]:
        """Embeds the time, of which the model is told what is left, ``(B, 256)``."""
        left = (_TRAIN_TIMESTEPS - inputs["timestep"]) / _TRAIN_TIMESTEPS
        y = timestep_embedding(left * self.config.t_scale, TIMESTEP_CHANNELS)
        dtype = self.dtype if w.products is None else DType.float32
        scope = w / "t_embedder" / "mlp"
        y = linear(
            scope / 0, y, TIMESTEP_CHANNELS, _INNER, activation="silu", dtype=dtype
        )
        return (linear(scope / 2, y, _INNER, self.config.condition_width, dtype=dtype),)

    def conditioning(
        self, condition: tuple[TensorValue, ...], inputs: dict[str, TensorValue]
    ) -> ZImageConditioning:
        """Returns that embedding, the rotary tables, and which tokens count."""
        tables = inputs["text_rotary"], inputs["image_rotary"]
        mask = KeyMask.of(inputs["text_mask"], tables[1].shape[2])
        return ZImageConditioning(condition[0], tables, mask)

    def embed(self, w: WeightScope, inputs: dict[str, TensorValue]) -> Streams:
        """Projects both sequences, fills them up, and runs the blocks of each alone."""
        table, of_image = inputs["text_rotary"], inputs["image_rotary"]
        batch, _, total, _ = table.shape
        missing = total - inputs["text"].shape[1]
        # The image with what fills it up, and the text, likewise.
        image = self._embed_image(w, inputs["latents"], missing)
        text = self._embed_text(w, inputs["text"], inputs["text_filling"])
        filling_table, text_table = table[:, :, :missing, :], table[:, :, missing:, :]
        image_table = ops.concat([filling_table, of_image], axis=2)
        (embedding,) = self.condition(w, inputs)
        bias = ops.unsqueeze(
            ops.unsqueeze(inputs["text_mask"][:, missing:], 1), 1
        )  # B, 1, 1, L
        for index in range(self.config.n_refiner_layers):
            scope = w / "noise_refiner" / index
            image = _refined(self.config, scope, image, image_table, embedding)
            scope = w / "context_refiner" / index
            text = _refined(self.config, scope, text, text_table, bias=bias)
        filling, image = cut(image, missing)
        text = ops.concat([filling, text], axis=1)
        shape = batch, of_image.shape[2], self.width
        return Streams(
            ops.rebind(image, shape), ops.rebind(text, (batch, total, self.width))
        )

    def block(
        self,
        w: WeightScope,
        index: int,
        streams: Streams,
        conditioning: ZImageConditioning,
    ) -> ZImageBlock:
        """Creates block ``index`` of both sequences together."""
        scope = w / "layers" / index
        return ZImageBlock(self.config, scope, streams, conditioning)

    def output(
        self, w: WeightScope, image: TensorValue, conditioning: ZImageConditioning
    ) -> TensorValue:
        """Turns the image stream into the velocity ``(B, S_img, C)``.

        The model predicts what leads to the image, the sampler takes what leads away.
        """
        config, scope = self.config, w / "all_final_layer" / _PATCH_NAME
        scale = linear(
            scope / "adaLN_modulation" / 1,
            ops.silu(conditioning.embedding),
            config.condition_width,
            self.width,
            dtype=DType.float32,
        )
        normed = ScaledNorm(image, 1.0 + scale, "layer")
        layer = Layer("linear", config.token_channels)
        (y,) = project(scope, [layer], normed, self.width)
        # Pixels, then channels, as the model has them; channels first, as latents are.
        batch, length, _ = y.tensor.shape
        cells = ops.reshape(
            -y.tensor, (batch, length, _PATCH, _PATCH, config.in_channels)
        )
        cells = ops.permute(cells, [0, 1, 4, 2, 3])
        return ops.reshape(cells, (batch, length, config.token_channels))

    def _embed_image(
        self, w: WeightScope, latents: TensorValue, missing: Dim
    ) -> TensorValue:
        """What fills the image up, then its tokens, ``(B, missing + S_img, D)``."""
        channels = self.config.in_channels
        batch, length, _ = latents.shape
        cells = ops.reshape(latents, (batch, length, channels, _PATCH, _PATCH))
        cells = ops.permute(cells, [0, 1, 3, 4, 2])
        x = ops.reshape(cells, (batch, length, self.config.token_channels))
        scope = w / "all_x_embedder" / _PATCH_NAME
        image = linear(scope, x, self.config.token_channels, self.width)
        token = ops.unsqueeze(w("x_pad_token", 1, self.width).cast(image.dtype), 0)
        filling = ops.broadcast_to(token, (batch, missing, self.width))
        return ops.concat([filling, image], axis=1)

    def _embed_text(
        self, w: WeightScope, text: TensorValue, filling: TensorValue
    ) -> TensorValue:
        """The prompt's tokens and what fills them up, ``(B, L, D)``."""
        scope, width = w / "cap_embedder", self.config.cap_feat_dim
        normed = AffineNorm(scope / 0, text, "rms", self.config.norm_eps)
        (y,) = project(scope, [Layer("1", self.width)], normed, width)
        token = ops.unsqueeze(w("cap_pad_token", 1, self.width).cast(w.dtype), 0)
        is_filling = ops.unsqueeze(filling, 2) > 0.5
        return ops.where(is_filling, token, y.tensor)


class _Sandwich:
    """Attention and feed-forward of one sequence, a norm before and after each.

    Args:
        config: Sizes.
        w: The block's weights.
        x: The sequence, ``(B, S, D)``.
        embedding: Of time, which the norms before are scaled and the outputs gated by;
            ``None`` for a block without.
    """

    def __init__(
        self,
        config: ZImageConfig,
        w: WeightScope,
        x: TensorValue,
        embedding: TensorValue | None,
    ) -> None:
        self.config, self.w, self.x = config, w, x
        self._parts: list[TensorValue] | None = None
        if embedding is not None:
            layer = Layer("adaLN_modulation.0", 4 * config.dim)
            width = config.condition_width
            (found,) = project(w, [layer], embedding, width, dtype=DType.float32)
            # Scale and gate of attention, then of feed-forward.
            self._parts = ops.split(found.tensor, [config.dim] * 4, axis=1)
        self._after: tuple[Given, TensorValue] | None = None

    @cached_property
    def normed(self) -> Normed:
        """What attention reads."""
        return self._normed("attention_norm1", self.x, 0)

    def attention(self, mix: Callable[[list[Columns]], TensorValue]) -> Product:
        """The attention's output, its mixing of queries, keys and values given."""
        layers = [Layer(name, self.config.dim) for name in ("to_q", "to_k", "to_v")]
        scope = self.w / "attention"
        qkv = project(scope, layers, self.normed, self.config.dim, bias=False)
        mixed = [Columns.all_of(mix(qkv))]
        return Product(scope / "to_out" / 0, mixed, self.config.dim, bias=False)

    def attended(self, attention: Given) -> TensorValue:
        """The sequence after attention."""
        if self._after is None or self._after[0] is not attention:
            after = self._added("attention_norm2", self.x, attention, 1)
            self._after = attention, after
        return self._after[1]

    def feed_forward(self, attention: Given) -> Product:
        """The output of the feed-forward layers."""
        width, inner = self.config.dim, self.config.feed_forward_width
        normed = self._normed("ffn_norm1", self.attended(attention), 2)
        scope = self.w / "feed_forward"
        layers = [Layer("w3", inner), Layer("w1", inner, "silu")]
        up, gate = project(scope, layers, normed, width, bias=False)
        y = Columns.all_of(gate.alone * up.alone)
        return Product(scope / "w2", [y], width, bias=False)

    def fed(self, attention: Given, feed_forward: Given) -> TensorValue:
        """The sequence after both."""
        return self._added("ffn_norm2", self.attended(attention), feed_forward, 3)

    def _normed(self, name: str, x: TensorValue, part: int) -> Normed:
        epsilon = self.config.norm_eps
        if self._parts is None:
            return AffineNorm(self.w / name, x, "rms", epsilon)
        weight = (self.w / name)("weight", self.config.dim).cast(DType.float32)
        return ScaledNorm(x, (1.0 + self._parts[part]) * weight, "rms", epsilon)

    def _added(self, name: str, x: TensorValue, y: Given, part: int) -> TensorValue:
        y = computed(y).cast(DType.float32)
        y = rms_norm(self.w / name, y, self.config.dim, epsilon=self.config.norm_eps)
        if self._parts is not None:
            y = ops.unsqueeze(ops.tanh(self._parts[part]), 1) * y
        return (x.cast(DType.float32) + y).cast(x.dtype)


@final
class ZImageBlock(AbstractBlock):
    """A block of text and image as one sequence."""

    def __init__(
        self,
        config: ZImageConfig,
        w: WeightScope,
        streams: Streams,
        conditioning: ZImageConditioning,
    ) -> None:
        joint = streams.joint
        if joint is None:
            joint = ops.concat([streams.text, streams.image], axis=1)
        self._streams, self._conditioning = streams, conditioning
        self._sandwich = _Sandwich(config, w, joint, conditioning.embedding)

    def modulated_input(self) -> TensorValue:
        """Returns the joint input of attention, ``(B, S_txt + S_img, D)``."""
        return self._sandwich.normed.tensor

    def attention(self) -> tuple[Product, ...]:
        """Returns the joint attention after its projection, before its norm."""
        return (self._sandwich.attention(self._mix),)

    def outputs(self, attention: tuple[Given, ...]) -> tuple[Given, ...]:
        """Returns attention and feed-forward outputs, before their norms."""
        return attention[0], self._sandwich.feed_forward(attention[0])

    def add(self, outputs: tuple[Given, ...]) -> Streams:
        """Adds each output to the sequence, normed and through its own gate."""
        joint = self._sandwich.fed(outputs[0], outputs[1])
        text, image = cut(joint, self._streams.text.shape[1])
        return Streams(image, text, joint)

    def _mix(self, qkv: list[Columns]) -> TensorValue:
        config, w, given = self._sandwich.config, self._sandwich.w, self._conditioning
        if w.products is not None or not w.device.is_gpu():
            return _mixed(config, w, qkv, given.joint_rotary, given.mask.joint)
        # In two, of which the first may end in padding.
        length = self._streams.text.shape[1]
        halves = zip(*(cut(each.alone, length) for each in qkv), strict=True)
        streams = [
            Attending(list(map(Columns.all_of, half)), table, _norms(config))
            for half, table in zip(halves, given.rotary, strict=True)
        ]
        scope, heads = w / "attention", config.heads
        mixed = attend(
            scope,
            streams,
            heads.count,
            heads.size,
            scale=heads.size**-0.5,
            epsilon=_QK_EPSILON,
            mask=given.mask,
        )
        return ops.concat(mixed, axis=1)


# Of the norms of queries and keys, whatever the others' is.
_QK_EPSILON: Final = 1e-5


def _refined(
    config: ZImageConfig,
    w: WeightScope,
    x: TensorValue,
    rotary: TensorValue,
    embedding: TensorValue | None = None,
    bias: TensorValue | None = None,
) -> TensorValue:
    """A sequence after a block of its own."""
    block = _Sandwich(config, w, x, embedding)
    attention = block.attention(lambda qkv: _mixed(config, w, qkv, rotary, bias))
    return block.fed(attention, block.feed_forward(attention))


def _mixed(
    config: ZImageConfig,
    w: WeightScope,
    qkv: list[Columns],
    rotary: TensorValue,
    bias: TensorValue | None,
) -> TensorValue:
    """Attention of one sequence, ``(B, S, D)``."""
    heads = config.heads
    stream = Attending(qkv, rotary, _norms(config))
    (mixed,) = attend(
        w / "attention",
        [stream],
        heads.count,
        heads.size,
        scale=heads.size**-0.5,
        epsilon=_QK_EPSILON,
        bias=bias,
        joint_rotary=rotary,
    )
    return mixed


def _norms(config: ZImageConfig) -> tuple[str, str] | None:
    return ("norm_q", "norm_k") if config.qk_norm else None
