"""CLIP's text encoder, pooled.

Radford et al., "Learning Transferable Visual Models From Natural Language
Supervision", 2021, arXiv:2103.00020; weight names are transformers'.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from max.dtype import DType
from max.graph import TensorValue, ops

from .layers import attention, layer_norm, linear, merge_heads, split_heads
from .weights import WeightScope

_MASKED = -1e30
# More than any position, and exact with one added in float32.
_FAR = 65536.0


@dataclass(frozen=True)
class ClipTextConfig:
    """Sizes, named as in ``config.json``."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407


def clip_causal_bias(length: int) -> np.ndarray:
    """What a query may not see: float32 ``(S, S)``, 0 up to itself, -1e30 after it."""
    return np.triu(np.full((length, length), _MASKED, np.float32), 1)


def clip_text_encoder(
    config: ClipTextConfig,
    w: WeightScope,
    token_ids: TensorValue,
    causal_bias: TensorValue,
) -> TensorValue:
    """Token ids int64 ``(B, S)`` to the state at the end token, ``(B, D)``.

    Args:
        config: Sizes.
        w: Weights.
        token_ids: int64 ``(B, S)``.
        causal_bias: From :func:`clip_causal_bias`. An input, because MAX 26.7 on CPU
            fuses the attention below into one kernel and loses a bias which is itself
            computed from positions: every query would then see the whole prompt.
    """
    width = config.hidden_size
    embeddings = w / "embeddings"
    table = (embeddings / "token_embedding")("weight", config.vocab_size, width)
    positions = (embeddings / "position_embedding")(
        "weight", config.max_position_embeddings, width
    )
    length = token_ids.shape[1]
    index = ops.range(
        0,
        ops.shape_to_tensor([length])[0],
        1,
        out_dim=length,
        dtype=DType.int64,
        device=token_ids.device,
    )
    x = ops.gather(table, token_ids, axis=0) + ops.gather(positions, index, axis=0)
    for layer in range(config.num_hidden_layers):
        x = _layer(config, w / "encoder" / "layers" / layer, x, causal_bias)
    x = layer_norm(x, width, w / "final_layer_norm", epsilon=config.layer_norm_eps)
    # One-hot sum instead of a gather with two index axes.
    at_end = _end_mask(config, token_ids, index)
    return ops.squeeze(ops.sum(x * ops.unsqueeze(at_end, 2).cast(x.dtype), axis=1), 1)


def _end_mask(
    config: ClipTextConfig, token_ids: TensorValue, index: TensorValue
) -> TensorValue:
    """1 at each row's end token: the first one, or the highest id where it is 2.

    Checkpoints of before 2023 say 2 for the end token and mean the highest id.
    """
    if config.eos_token_id == 2:
        wanted = ops.max(token_ids, axis=1)  # B, 1
    else:
        wanted = ops.constant(config.eos_token_id, DType.int64, token_ids.device)
    # Padding may be the end token too, so the first one is searched by position:
    # argmax promises nothing for ties.
    position = ops.unsqueeze(index, 0).cast(DType.float32)
    penalty = ops.equal(token_ids, wanted).cast(DType.float32) * -_FAR
    place = ops.min(position + penalty, axis=1)  # B, 1: least position, less _FAR
    return ops.equal(position + penalty, place).cast(DType.float32)


def _layer(
    config: ClipTextConfig, w: WeightScope, x: TensorValue, mask: TensorValue
) -> TensorValue:
    width, inner = config.hidden_size, config.intermediate_size
    heads, epsilon = config.num_attention_heads, config.layer_norm_eps
    y = layer_norm(x, width, w / "layer_norm1", epsilon=epsilon)
    scope = w / "self_attn"
    query, key, value = (
        split_heads(linear(scope / name, y, width, width), heads)
        for name in ("q_proj", "k_proj", "v_proj")
    )
    scale = (width // heads) ** -0.5
    mixed = merge_heads(attention(query, key, value, scale=scale, bias=mask))
    x = x + linear(scope / "out_proj", mixed, width, width)
    y = layer_norm(x, width, w / "layer_norm2", epsilon=epsilon)
    y = linear(w / "mlp" / "fc1", y, width, inner)
    y = y * ops.sigmoid(y * 1.702) if config.hidden_act == "quick_gelu" else ops.gelu(y)
    return x + linear(w / "mlp" / "fc2", y, inner, width)
