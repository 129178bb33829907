"""Blocks of a text and an image stream that attend jointly, double and single ones.

Esser et al., "Scaling Rectified Flow Transformers for High-Resolution Image
Synthesis", 2024, arXiv:2403.03206 (MMDiT); Dehghani et al., "Scaling Vision
Transformers to 22 Billion Parameters", 2023, arXiv:2302.05442 (attention and
feed-forward layer side by side). What FLUX.1, FLUX.2 and Qwen-Image share.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, final

from max.dtype import DType
from max.graph import TensorValue, ops

from .attending import Attending, attend
from .denoiser import AbstractBlock, Streams
from .layers import linear, timestep_embedding
from .padding import KeyMask
from .pieces import (
    Given,
    Layer,
    ModulatedNorm,
    Modulation,
    Product,
    computed,
    cut,
    gated,
    modulations,
    project,
)
from .processor import Columns
from .weights import WeightScope

MLP_RATIO: Final = 4
TIMESTEP_CHANNELS: Final = 256


@final
@dataclass(frozen=True)
class Heads:
    """Sizes that all blocks of a transformer have."""

    count: int
    """Attention heads."""
    size: int
    """Channels of each."""

    @property
    def width(self) -> int:
        """Model width D, the channels of each hidden state."""
        return self.count * self.size


@final
@dataclass(frozen=True)
class JointConditioning:
    """What every block reads and none changes."""

    embedding: TensorValue
    """SiLU of the embedding of time and whatever else, ``(B, D)``."""
    text_rotary: TensorValue
    """Cosines and sines of the text tokens' rotary angles, ``(2, S_txt, Dh)``."""
    image_rotary: TensorValue
    """Those of the image tokens, ``(2, S_img, Dh)``."""
    joint_rotary: TensorValue
    """Both, text before image."""
    mask: KeyMask | None = None
    """Which text tokens count; ``None`` where all do."""


@final
@dataclass(frozen=True)
class DoubleBlockNames:
    """What a double block's weights are called, image before text each."""

    modulations: tuple[str, str]
    feed_forwards: tuple[str, str]


class JointBlock(AbstractBlock):
    """Base of blocks of a text and an image stream."""

    has_bias: bool = True
    """Whether linear layers have biases."""

    def __init__(
        self,
        heads: Heads,
        w: WeightScope,
        streams: Streams,
        conditioning: JointConditioning,
    ) -> None:
        self.heads, self.w = heads, w
        self.width = heads.width
        self.streams, self.conditioning = streams, conditioning

    def attend(self, *streams: Attending) -> list[TensorValue]:
        """Computes attention with rotary positions, of each stream ``(B, S, D)``."""
        return attend(
            self.w / "attn",
            streams,
            self.heads.count,
            self.heads.size,
            scale=self.heads.size**-0.5,
            joint_rotary=self.conditioning.joint_rotary,
            mask=self.conditioning.mask,
        )


class AbstractDoubleBlock(JointBlock):
    """A block of two streams with weights of their own and joint attention.

    Args:
        heads: Sizes.
        w: The block's weights.
        streams: Hidden states before it.
        conditioning: What it reads beside them.
        modulations: Six vectors for the image and six for the text.
    """

    def __init__(
        self,
        heads: Heads,
        w: WeightScope,
        streams: Streams,
        conditioning: JointConditioning,
        modulations: Sequence[Modulation],
    ) -> None:
        super().__init__(heads, w, streams, conditioning)
        self._image_mod, self._text_mod = modulations

    @abstractmethod
    def feed_forward(self, is_image: bool, x: ModulatedNorm) -> Product:
        """Returns a stream's feed-forward layer."""

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
        scope, size, bias = self.w / "attn", self.width, self.has_bias
        of_both = Columns.all_of(of_image), Columns.all_of(of_text)
        return (
            Product(scope / "to_out" / 0, [of_both[0]], size, bias=bias),
            Product(scope / "to_add_out", [of_both[1]], size, bias=bias),
        )

    def outputs(self, attention: tuple[Given, ...]) -> tuple[Given, ...]:
        """Returns attention and feed-forward outputs, image before text each."""
        image, text = self._attended(attention)
        of_image = ModulatedNorm(image, self._image_mod, shift=3, scale=4)
        image_ff = self.feed_forward(True, of_image)
        of_text = ModulatedNorm(text, self._text_mod, shift=3, scale=4)
        text_ff = self.feed_forward(False, of_text)
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
        scope, bias = self.w / "attn", self.has_bias
        return project(scope, layers, normed, self.width, bias=bias)

    def _attended(
        self, attention: tuple[Given, ...]
    ) -> tuple[TensorValue, TensorValue]:
        image, text = attention
        return (
            gated(self.streams.image, self._image_mod, 2, image),
            gated(self.streams.text, self._text_mod, 2, text),
        )


@final
class DoubleBlock(AbstractDoubleBlock):
    """A double block with modulations of its own and GELU.

    Args:
        heads: Sizes.
        w: The block's weights.
        streams: Hidden states before it.
        conditioning: What it reads beside them.
        names: Of those weights that models name differently.
    """

    def __init__(
        self,
        heads: Heads,
        w: WeightScope,
        streams: Streams,
        conditioning: JointConditioning,
        names: DoubleBlockNames,
    ) -> None:
        embedding = conditioning.embedding
        own = modulations(w, names.modulations, embedding, heads.width, 6)
        super().__init__(heads, w, streams, conditioning, own)
        self._names = names

    def feed_forward(self, is_image: bool, x: ModulatedNorm) -> Product:
        """Returns a stream's feed-forward layer."""
        of_image, of_text = self._names.feed_forwards
        w = self.w / (of_image if is_image else of_text) / "net"
        layer = Layer("0.proj", MLP_RATIO * self.width, "gelu_tanh")
        return Product(w / 2, project(w, [layer], x, self.width), self.width)


class AbstractSingleBlock(JointBlock):
    """A block of one joint sequence, attention and feed-forward side by side.

    Args:
        heads: Sizes.
        w: The block's weights.
        streams: Hidden states before it.
        conditioning: What it reads beside them.
    """

    output_name: str
    """Of the layer that attention and feed-forward layer end in."""

    def __init__(
        self,
        heads: Heads,
        w: WeightScope,
        streams: Streams,
        conditioning: JointConditioning,
    ) -> None:
        super().__init__(heads, w, streams, conditioning)
        joint = streams.joint
        if joint is None:
            joint = ops.concat([streams.text, streams.image], axis=1)
        self._joint, self._mod = joint, self.modulation()
        self._normed = ModulatedNorm(joint, self._mod)
        self._layers = [
            *(Layer(f"attn.{name}", self.width) for name in ("to_q", "to_k", "to_v")),
            *self.feed_forward_layers(),
        ]
        # Known where attention has been computed with it.
        self._inner: list[Columns] | None = None

    @abstractmethod
    def modulation(self) -> Modulation:
        """Returns the block's shift, scale and gate."""

    @abstractmethod
    def feed_forward_layers(self) -> list[Layer]:
        """Returns the first linear layers of the feed-forward layer."""

    @abstractmethod
    def feed_forward(self, projected: list[Columns]) -> Columns:
        """Returns what becomes of their outputs before the last layer."""

    def modulated_input(self) -> TensorValue:
        """Returns the joint input of attention, ``(B, S_txt + S_img, D)``."""
        return self._normed.tensor

    def attention(self) -> tuple[TensorValue, ...]:
        """Returns the joint attention, before the block's one projection."""
        query, key, value, *self._inner = self._projected(0)
        rotary, norms = self.conditioning.joint_rotary, ("norm_q", "norm_k")
        return tuple(self.attend(Attending([query, key, value], rotary, norms)))

    def outputs(self, attention: tuple[Given, ...]) -> tuple[Product, ...]:
        """Returns the one projection of attention and feed-forward together."""
        inner = self._projected(3) if self._inner is None else self._inner
        parts = [Columns.all_of(computed(attention[0])), self.feed_forward(inner)]
        scope, bias = self.w / self.output_name, self.has_bias
        return (Product(scope, parts, self.width, bias=bias),)

    def add(self, outputs: tuple[Given, ...]) -> Streams:
        """Adds the output to the joint sequence, through the gate."""
        joint = gated(self._joint, self._mod, 2, outputs[0])
        text, image = cut(joint, self.streams.text.shape[1])
        return Streams(image, text, joint)

    def _projected(self, first: int) -> list[Columns]:
        layers, bias = self._layers, self.has_bias
        normed, width = self._normed, self.width
        return project(self.w, layers, normed, width, first=first, bias=bias)


def embed_scalar(
    w: WeightScope,
    value: TensorValue,
    width: int,
    *,
    factor: float | None = None,
    bias: bool = True,
) -> TensorValue:
    """Embeds a number of each sample, ``(B,)`` to ``(B, width)``.

    Args:
        w: Scope of two linear layers.
        value: Times in 0..1000, or other numbers in such units.
        width: Columns of the result.
        factor: On the angles, see :func:`~.layers.timestep_embedding`.
        bias: Whether the layers have one.
    """
    sinusoid = timestep_embedding(value, TIMESTEP_CHANNELS, factor=factor)
    return two_linears(w, sinusoid, TIMESTEP_CHANNELS, width, bias=bias)


def two_linears(
    w: WeightScope, x: TensorValue, in_features: int, width: int, *, bias: bool = True
) -> TensorValue:
    """Two linear layers with SiLU between them; in float32 where pieces take it so."""
    dtype = w.dtype if w.products is None else DType.float32
    hidden = linear(
        w / "linear_1",
        x,
        in_features,
        width,
        bias=bias,
        activation="silu",
        dtype=dtype,
    )
    return linear(w / "linear_2", hidden, width, width, bias=bias, dtype=dtype)


def predicted(
    w: WeightScope,
    image: TensorValue,
    embedding: TensorValue,
    channels: int,
    *,
    bias: bool = True,
) -> TensorValue:
    """Turns the image stream ``(B, S_img, D)`` into a prediction of ``channels``.

    Args:
        w: Scope of ``norm_out`` and ``proj_out``.
        image: After the last block.
        embedding: What blocks are conditioned on, ``(B, D)``.
        channels: Columns of the result.
        bias: Whether the layers have one.
    """
    width = int(image.shape[-1])
    # The final norm stores scale before shift, unlike the blocks.
    scope = w / "norm_out"
    (mod,) = modulations(scope, ["linear"], embedding, width, 2, bias=bias)
    x = ModulatedNorm(image, mod, shift=1, scale=0)
    return project(w, [Layer("proj_out", channels)], x, width, bias=bias)[0].tensor
