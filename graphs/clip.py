"""CLIP's text encoder, which ends in one pooled vector per prompt.

Radford et al., "Learning Transferable Visual Models From Natural Language
Supervision", 2021, arXiv:2103.00020; weight names are transformers'.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from max.graph import TensorValue, ops

from .attending import Attending, attend
from .layers import layer_norm, linear
from .pieces import AffineNorm, Layer, project
from .processor import Activation
from .weights import WeightScope

_MASKED = -1e30


@dataclass(frozen=True)
class ClipTextConfig:
    """Sizes of a CLIP text encoder, named as in its ``config.json``."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407


def clip_host_inputs(
    config: ClipTextConfig, token_ids: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Computes inputs that follow from ids ``(B, S)`` alone, cheaper on the host.

    Returns:
        Positions int64 ``(S,)``; the causal bias float32 ``(S, S)``, 0 up to the query
        and -1e30 after it; and float32 ``(B, S)``, 1 at the token to pool.
    """
    length = token_ids.shape[1]
    bias = np.triu(np.full((length, length), _MASKED, np.float32), 1)
    # Padding may be the end token too: the first one counts. Checkpoints of before
    # 2023 say 2 for the end token and mean the highest id.
    is_end = config.eos_token_id != 2
    scores = token_ids == config.eos_token_id if is_end else token_ids
    at_end = np.arange(length) == scores.argmax(axis=1)[:, None]
    return np.arange(length), bias, at_end.astype(np.float32)


def clip_text_encoder(
    config: ClipTextConfig,
    w: WeightScope,
    token_ids: TensorValue,
    positions: TensorValue,
    causal_bias: TensorValue,
    at_end: TensorValue,
) -> TensorValue:
    """Encodes ids int64 ``(B, S)`` as the end token's state, ``(B, D)``.

    The other inputs are those of :func:`clip_host_inputs`. The bias has to be an input:
    MAX 26.7's own attention loses one that is itself computed from positions, and every
    query would see the whole prompt.
    """
    width = config.hidden_size
    embeddings = w / "embeddings"
    tokens = (embeddings / "token_embedding")("weight", config.vocab_size, width)
    places = (embeddings / "position_embedding")(
        "weight", config.max_position_embeddings, width
    )
    x = ops.gather(tokens, token_ids, axis=0) + ops.gather(places, positions, axis=0)
    for layer in range(config.num_hidden_layers):
        x = _layer(config, w / "encoder" / "layers" / layer, x, causal_bias)
    x = layer_norm(x, width, w / "final_layer_norm", epsilon=config.layer_norm_eps)
    # One-hot sum instead of a gather with two index axes.
    return ops.squeeze(ops.sum(x * ops.unsqueeze(at_end, 2).cast(x.dtype), axis=1), 1)


def _layer(
    config: ClipTextConfig, w: WeightScope, x: TensorValue, mask: TensorValue
) -> TensorValue:
    width, inner = config.hidden_size, config.intermediate_size
    heads, epsilon = config.num_attention_heads, config.layer_norm_eps
    normed = AffineNorm(w / "layer_norm1", x, "layer", epsilon)
    scope = w / "self_attn"
    layers = [Layer(name, width) for name in ("q_proj", "k_proj", "v_proj")]
    qkv = project(scope, layers, normed, width)
    head_dim = width // heads
    bias = mask
    if scope.products is not None:
        bias = ops.unsqueeze(ops.unsqueeze(mask, 0), 0)
    (mixed,) = attend(
        scope, [Attending(qkv)], heads, head_dim, scale=head_dim**-0.5, bias=bias
    )
    x = x + linear(scope / "out_proj", mixed, width, width)
    normed = AffineNorm(w / "layer_norm2", x, "layer", epsilon)
    is_quick = config.hidden_act == "quick_gelu"
    kind: Activation = "quick_gelu" if is_quick else ""
    (up,) = project(w / "mlp", [Layer("fc1", inner, kind)], normed, width)
    y = up.tensor if is_quick else ops.gelu(up.tensor)
    return x + linear(w / "mlp" / "fc2", y, inner, width)
