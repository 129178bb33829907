"""Double blocks: a text and an image stream, each with weights, attending jointly.

Esser et al., "Scaling Rectified Flow Transformers for High-Resolution Image
Synthesis", 2024, arXiv:2403.03206 (MMDiT). What FLUX.1 and Qwen-Image share; names of
weights are data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, final

from max.dtype import DType
from max.graph import TensorValue

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

    def modulations(self, *names: str, count: int) -> list[Modulation]:
        """Computes ``count`` vectors from the condition, of each linear layer."""
        embedding = self.conditioning.embedding
        return modulations(self.w, names, embedding, self.width, count)

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


@final
class DoubleBlock(JointBlock):
    """A block of two streams with weights of their own and joint attention.

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
        super().__init__(heads, w, streams, conditioning)
        self._names = names
        self._image_mod, self._text_mod = self.modulations(*names.modulations, count=6)

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
        of_image, of_text = self._names.feed_forwards
        image_ff = self._feed_forward(of_image, image, self._image_mod)
        text_ff = self._feed_forward(of_text, text, self._text_mod)
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
        w, hidden = self.w / name / "net", MLP_RATIO * self.width
        normed = ModulatedNorm(x, mod, shift=3, scale=4)
        layer = Layer("0.proj", hidden, "gelu_tanh")
        return Product(w / 2, project(w, [layer], normed, self.width), self.width)


def embed_scalar(
    w: WeightScope, value: TensorValue, width: int, *, factor: float | None = None
) -> TensorValue:
    """Embeds a number of each sample, ``(B,)`` to ``(B, width)``.

    Args:
        w: Scope of two linear layers.
        value: Times in 0..1000, or other numbers in such units.
        width: Columns of the result.
        factor: On the angles, see :func:`~.layers.timestep_embedding`.
    """
    sinusoid = timestep_embedding(value, TIMESTEP_CHANNELS, factor=factor)
    return two_linears(w, sinusoid, TIMESTEP_CHANNELS, width)


def two_linears(
    w: WeightScope, x: TensorValue, in_features: int, width: int
) -> TensorValue:
    """Two linear layers with SiLU between them; in float32 where pieces take it so."""
    dtype = w.dtype if w.products is None else DType.float32
    hidden = linear(
        w / "linear_1", x, in_features, width, activation="silu", dtype=dtype
    )
    return linear(w / "linear_2", hidden, width, width, dtype=dtype)


def predicted(
    w: WeightScope, image: TensorValue, embedding: TensorValue, channels: int
) -> TensorValue:
    """Turns the image stream ``(B, S_img, D)`` into a prediction of ``channels``.

    Args:
        w: Scope of ``norm_out`` and ``proj_out``.
        image: After the last block.
        embedding: What blocks are conditioned on, ``(B, D)``.
        channels: Columns of the result.
    """
    width = int(image.shape[-1])
    # The final norm stores scale before shift, unlike the blocks.
    (mod,) = modulations(w / "norm_out", ["linear"], embedding, width, 2)
    x = ModulatedNorm(image, mod, shift=1, scale=0)
    return project(w, [Layer("proj_out", channels)], x, width)[0].tensor
