"""T5's text encoder.

Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text
Transformer", 2020, arXiv:1910.10683; weight names are transformers'. No attention mask:
FLUX.1 was trained with padding as part of the input.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from max.dtype import DType
from max.graph import TensorValue, ops

from .attending import Attending, attend
from .layers import linear, rms_norm
from .pieces import AffineNorm, Layer, project
from .processor import Activation
from .weights import WeightScope


@dataclass(frozen=True)
class T5Config:
    """Sizes of a T5 encoder, named as in its ``config.json``."""

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "relu"


def t5_relative_buckets(config: T5Config, length: int) -> np.ndarray:
    """Returns buckets of key minus query position, int64 ``(S_txt, S_txt)``.

    The query is the first axis. Half the buckets for each direction; in each, half
    exact, the rest logarithmic up to ``relative_attention_max_distance``.
    """
    per_side = config.relative_attention_num_buckets // 2
    exact = per_side // 2
    distance = np.arange(length)[None, :] - np.arange(length)[:, None]
    size = np.abs(distance)
    # float32 throughout, as the reference, so that bucket borders agree.
    ratio = np.log(np.maximum(size, 1).astype(np.float32) / np.float32(exact))
    span = np.float32(math.log(config.relative_attention_max_distance / exact))
    far = exact + (ratio / span * np.float32(per_side - exact)).astype(np.int64)
    bucket = np.where(size < exact, size, np.minimum(far, per_side - 1))
    return np.where(distance > 0, per_side, 0) + bucket


def t5_encoder(
    config: T5Config,
    w: WeightScope,
    token_ids: TensorValue,
    relative_buckets: TensorValue,
    *,
    embedding_name: str = "shared.weight",
) -> TensorValue:
    """Encodes token ids int64 ``(B, S_txt)`` as states ``(B, S_txt, D)``.

    Args:
        config: Sizes of the encoder.
        w: Its weights.
        token_ids: Token ids, int64 ``(B, S_txt)``.
        relative_buckets: From :func:`t5_relative_buckets`.
        embedding_name: The token table's name in the checkpoint.
    """
    width = config.d_model
    table = w(embedding_name, config.vocab_size, width)
    blocks = w / "encoder" / "block"
    biases = (blocks / 0 / "layer" / 0 / "SelfAttention" / "relative_attention_bias")(
        "weight", config.relative_attention_num_buckets, config.num_heads
    )
    bias = ops.gather(biases.cast(DType.float32), relative_buckets, axis=0)
    bias = ops.unsqueeze(ops.permute(bias, [2, 0, 1]), 0)  # 1, heads, S, S
    # The residual stream outgrows bfloat16's precision in deep models: float32.
    x = ops.gather(table, token_ids, axis=0).cast(DType.float32)
    for index in range(config.num_layers):
        layer = blocks / index / "layer"
        epsilon = config.layer_norm_epsilon
        normed = AffineNorm(layer / 0 / "layer_norm", x, "rms", epsilon)
        x = x + _attend(config, layer / 0 / "SelfAttention", normed, bias)
        normed = AffineNorm(layer / 1 / "layer_norm", x, "rms", epsilon)
        x = x + _feed_forward(config, layer / 1 / "DenseReluDense", normed)
    final = w / "encoder" / "final_layer_norm"
    return rms_norm(final, x, width, epsilon=config.layer_norm_epsilon).cast(w.dtype)


def _attend(
    config: T5Config, w: WeightScope, x: AffineNorm, bias: TensorValue
) -> TensorValue:
    width, inner = config.d_model, config.num_heads * config.d_kv
    layers = [Layer(name, inner) for name in ("q", "k", "v")]
    qkv = project(w, layers, x, width, bias=False)
    # T5 folds the usual 1/sqrt(d) into its initialisation.
    (mixed,) = attend(
        w, [Attending(qkv)], config.num_heads, config.d_kv, scale=1.0, bias=bias
    )
    return linear(w / "o", mixed, inner, width, bias=False, dtype=DType.float32)


def _feed_forward(config: T5Config, w: WeightScope, x: AffineNorm) -> TensorValue:
    width, inner = config.d_model, config.d_ff

    def up(name: str, activation: Activation) -> TensorValue:
        layer = Layer(name, inner, activation)
        return project(w, [layer], x, width, bias=False)[0].tensor

    if config.feed_forward_proj == "relu":
        y = up("wi", "relu")
    else:
        y = up("wi_0", "gelu_tanh") * up("wi_1", "")
    return linear(w / "wo", y, inner, width, bias=False, dtype=DType.float32)
