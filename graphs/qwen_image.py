"""Qwen-Image's transformer, written as ``condition`` / ``embed`` / blocks / ``output``.

Wu et al., "Qwen-Image Technical Report", 2025, arXiv:2508.02324; weight names are those
of diffusers' ``QwenImageTransformer2DModel``. All its blocks are FLUX.1's double
blocks. It differs from FLUX.1 in that it reads one text, of any length, normed first,
and no pooled one; and in that it is told sigma, times 1000 once it is embedded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, final

from max.dtype import DType
from max.graph import DeviceRef, TensorType, TensorValue, ops

from .denoiser import AbstractDenoiser, Streams
from .layers import linear
from .mmdit import (
    DoubleBlock,
    DoubleBlockNames,
    Heads,
    JointConditioning,
    embed_scalar,
    predicted,
)
from .padding import KeyMask
from .pieces import AffineNorm, Layer, project
from .weights import WeightScope

_DOUBLE: Final = DoubleBlockNames(("img_mod.1", "txt_mod.1"), ("img_mlp", "txt_mlp"))
_TRAIN_TIMESTEPS: Final = 1000.0


@dataclass(frozen=True)
class QwenImageConfig:
    """Sizes of a Qwen-Image transformer, named as in its ``config.json``."""

    patch_size: int = 2
    in_channels: int = 64
    out_channels: int = 16
    num_layers: int = 60
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 3584
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)

    @property
    def heads(self) -> Heads:
        """Sizes of all blocks."""
        return Heads(self.num_attention_heads, self.attention_head_dim)


@final
class QwenImageDenoiser(AbstractDenoiser[JointConditioning]):
    """Builds the pieces of one Qwen-Image transformer.

    Args:
        config: Sizes of the transformer.
        dtype: Dtype of weights, hidden states and prediction.
        device: Device that the graphs run on.
    """

    def __init__(
        self, config: QwenImageConfig, dtype: DType, device: DeviceRef
    ) -> None:
        self.config = config
        self.dtype = dtype
        self.device = device
        self.num_blocks = config.num_layers
        self.block_inputs = ("text_rotary", "image_rotary", "text_mask")
        self.width = config.heads.width

    def input_types(
        self,
        batch: int | str = "batch",
        image_seq_len: int | str = "image_seq_len",
        text_seq_len: int | str = "text_seq_len",
    ) -> dict[str, TensorType]:
        """Returns a step's inputs by name; integers fix a size at compile time.

        ``latents`` packed, float32 ``(B, S_img, C)``; ``timestep`` float32 ``(B,)`` in
        0..1000; ``text`` ``(B, S_txt, joint_attention_dim)``; ``text_mask`` float32
        ``(B, S_txt)``, 0 at tokens and -1e30 at the padding after a shorter text;
        ``text_rotary`` and ``image_rotary`` float32 from
        :func:`~.rotary.rotary_table`.
        """
        config = self.config

        def typed(dtype: DType, *shape: int | str) -> TensorType:
            return TensorType(dtype, shape, self.device)

        return {
            "latents": typed(DType.float32, batch, image_seq_len, config.in_channels),
            "timestep": typed(DType.float32, batch),
            "text": typed(self.dtype, batch, text_seq_len, config.joint_attention_dim),
            "text_mask": typed(DType.float32, batch, text_seq_len),
            "text_rotary": typed(
                DType.float32, 2, text_seq_len, config.attention_head_dim
            ),
            "image_rotary": typed(
                DType.float32, 2, image_seq_len, config.attention_head_dim
            ),
        }

    def condition(
        self, w: WeightScope, inputs: dict[str, TensorValue]
    ) -> tuple[TensorValue]:
        """Embeds the time as one vector ``(B, D)``.

        float32 where the pieces take it so, see :mod:`.pieces`.
        """
        scope = w / "time_text_embed" / "timestep_embedder"
        sigma = inputs["timestep"] / _TRAIN_TIMESTEPS
        embedding = embed_scalar(scope, sigma, self.width, factor=_TRAIN_TIMESTEPS)
        return (ops.silu(embedding),)

    def conditioning(
        self, condition: tuple[TensorValue, ...], inputs: dict[str, TensorValue]
    ) -> JointConditioning:
        """Returns that vector, the rotary tables, and which text tokens count."""
        tables = inputs["text_rotary"], inputs["image_rotary"]
        return JointConditioning(
            condition[0],
            *tables,
            ops.concat(tables, axis=1),
            KeyMask.of(inputs["text_mask"], tables[1].shape[1]),
        )

    def embed(self, w: WeightScope, inputs: dict[str, TensorValue]) -> Streams:
        """Projects latents and normed text states to the model's width."""
        config = self.config
        latents = inputs["latents"]
        image = linear(w / "img_in", latents, config.in_channels, self.width)
        normed = AffineNorm(w / "txt_norm", inputs["text"], "rms")
        layers = [Layer("txt_in", self.width)]
        (text,) = project(w, layers, normed, config.joint_attention_dim)
        return Streams(image, text.tensor)

    def block(
        self,
        w: WeightScope,
        index: int,
        streams: Streams,
        conditioning: JointConditioning,
    ) -> DoubleBlock:
        """Creates block ``index``."""
        scope = w / "transformer_blocks" / index
        return DoubleBlock(self.config.heads, scope, streams, conditioning, _DOUBLE)

    def output(
        self, w: WeightScope, image: TensorValue, conditioning: JointConditioning
    ) -> TensorValue:
        """Turns the image stream into the velocity ``(B, S_img, C)``."""
        channels = self.config.patch_size**2 * self.config.out_channels
        return predicted(w, image, conditioning.embedding, channels)
