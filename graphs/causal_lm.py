"""A causal language model as a text encoder: states of chosen layers, no prediction.

The decoder of Qwen2.5, Qwen3 and Mistral: RMS norms, grouped queries, rotary positions
by halves of a head, a gated feed-forward layer. Ainslie et al., "GQA: Training
Generalized Multi-Query Transformer Models from Multi-Head Checkpoints", 2023,
arXiv:2305.13245; Shazeer, "GLU Variants Improve Transformer", 2020, arXiv:2002.05202.
Weight names are those that transformers saves.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from max.dtype import DType
from max.graph import TensorValue, ops

from . import processor
from .layers import attention, linear, merge_heads, rms_norm, split_heads
from .pieces import AffineNorm, Layer, project
from .processor import TokenStream
from .weights import WeightScope

_MASKED = -1e30


@dataclass(frozen=True)
class CausalLMConfig:
    """Sizes of a language model, named as in its ``config.json``."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    has_qkv_bias: bool = False
    """Whether queries, keys and values have biases."""
    has_output_bias: bool = False
    """Whether the attention's output has one."""
    has_qk_norm: bool = False
    """Whether each head's queries and keys are normed before they are rotated."""
    output_layers: tuple[int, ...] = (-1,)
    """Layers whose states are wanted, side by side, counted as transformers'
    ``hidden_states``: 0 is the embedding, ``num_hidden_layers`` and -1 the last layer's
    after the final norm, all others are not normed."""

    @property
    def wanted(self) -> tuple[int, ...]:
        """Those layers, counted from the embedding."""
        count = self.num_hidden_layers + 1
        return tuple(index % count for index in self.output_layers)


def causal_lm_host_inputs(
    config: CausalLMConfig, length: int, is_seen: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Computes inputs that follow from lengths alone, cheaper on the host.

    Args:
        config: Sizes of the model.
        length: Tokens of every text, padding included.
        is_seen: Which tokens of each text others see, bool ``(B, S)``; all, by default.

    Returns:
        Cosines and sines of the rotary angles, float32 ``(2, S, head_dim)``, each angle
        for both halves of a head; and the causal bias float32 ``(S, S)``, with
        ``is_seen`` ``(B, S, S)``: 0 up to the query and -1e30 after it, and for what
        nothing sees.
    """
    even = np.arange(0, config.head_dim, 2, dtype=np.float32)
    # float32 throughout, as transformers does.
    power = np.float32(config.rope_theta) ** (even / np.float32(config.head_dim))
    angles = np.arange(length, dtype=np.float32)[:, None] / power[None]
    both = np.concatenate([angles, angles], axis=1)
    bias = np.triu(np.full((length, length), _MASKED, np.float32), 1)
    if is_seen is not None:
        bias = np.where(is_seen[:, None], bias[None], np.float32(_MASKED))
    return np.stack([np.cos(both), np.sin(both)]).astype(np.float32), bias


def causal_lm(
    config: CausalLMConfig,
    w: WeightScope,
    token_ids: TensorValue,
    rotary: TensorValue,
    causal_bias: TensorValue,
    attends: TensorValue | None = None,
) -> TensorValue:
    """Encodes token ids int64 ``(B, S)``.

    Texts are padded at their ends, where no token sees what comes after it, or at their
    beginnings. The other inputs are those of :func:`causal_lm_host_inputs`; the bias
    has to be one, see :func:`~.clip.clip_text_encoder`, and may be ``(B, S, S)``.

    Args:
        config: Sizes of the model.
        w: Its weights.
        token_ids: Of texts and padding.
        rotary: Angles of all positions.
        causal_bias: What each token sees.
        attends: float32 ``(B, S, 1)``, 0 for padding that comes before a text, which
            sees no token at all, and 1 for others; all, by default.

    Returns:
        States of :attr:`CausalLMConfig.output_layers` side by side, ``(B, S, layers *
        hidden_size)``.
    """
    width, wanted = config.hidden_size, config.wanted
    table = (w / "embed_tokens")("weight", config.vocab_size, width)
    # The residual stream outgrows bfloat16's precision in deep models: float32.
    x = ops.gather(table, token_ids, axis=0).cast(DType.float32)
    states = {0: x}
    for index in range(max(wanted)):
        scope = w / "layers" / index
        normed = AffineNorm(scope / "input_layernorm", x, "rms", config.rms_norm_eps)
        x = x + _attend(
            config, scope / "self_attn", normed, rotary, causal_bias, attends
        )
        after = scope / "post_attention_layernorm"
        normed = AffineNorm(after, x, "rms", config.rms_norm_eps)
        x = x + _feed_forward(config, scope / "mlp", normed)
        states[index + 1] = x
    last = config.num_hidden_layers
    if last in wanted:
        states[last] = rms_norm(w / "norm", x, width, epsilon=config.rms_norm_eps)
    found = [states[index].cast(w.dtype) for index in wanted]
    return found[0] if len(found) == 1 else ops.concat(found, axis=2)


def _attend(
    config: CausalLMConfig,
    w: WeightScope,
    x: AffineNorm,
    rotary: TensorValue,
    causal_bias: TensorValue,
    attends: TensorValue | None,
) -> TensorValue:
    heads, shared = config.num_attention_heads, config.num_key_value_heads
    size, scale = config.head_dim, config.head_dim**-0.5
    inner = heads * size
    layers = [
        Layer("q_proj", inner),
        Layer("k_proj", shared * size),
        Layer("v_proj", shared * size),
    ]
    found = project(w, layers, x, config.hidden_size, bias=config.has_qkv_bias)
    query, key, value = (
        split_heads(each.alone, int(each.size) // size) for each in found
    )
    if config.has_qk_norm:
        epsilon = config.rms_norm_eps
        query = rms_norm(w / "q_norm", query, size, epsilon=epsilon)
        key = rms_norm(w / "k_norm", key, size, epsilon=epsilon)
    query, key = _rotate_halves(query, rotary), _rotate_halves(key, rotary)
    key, value = (_repeated(each, heads // shared) for each in (key, value))
    if causal_bias.rank == 3:
        causal_bias = ops.unsqueeze(causal_bias, 1)
    if w.products is None:
        mixed = merge_heads(attention(query, key, value, scale=scale, bias=causal_bias))
    else:
        parts = [merge_heads(each) for each in (query, key, value)]
        tokens = TokenStream(ops.concat(parts, axis=2))
        bias = causal_bias
        if bias.rank == 2:
            bias = ops.unsqueeze(ops.unsqueeze(bias, 0), 0)
        (mixed,) = processor.attention([tokens], heads, size, scale=scale, bias=bias)
    if attends is not None:
        mixed = mixed * attends.cast(mixed.dtype)
    return linear(
        w / "o_proj",
        mixed,
        inner,
        config.hidden_size,
        bias=config.has_output_bias,
        dtype=DType.float32,
    )


def _feed_forward(config: CausalLMConfig, w: WeightScope, x: AffineNorm) -> TensorValue:
    width, inner = config.hidden_size, config.intermediate_size
    layers = [Layer("up_proj", inner), Layer("gate_proj", inner, "silu")]
    up, gate = project(w, layers, x, width, bias=False)
    y = gate.alone * up.alone
    return linear(w / "down_proj", y, inner, width, bias=False, dtype=DType.float32)


def _rotate_halves(x: TensorValue, rotary: TensorValue) -> TensorValue:
    """Rotates channels ``i`` and ``i + Dh / 2`` of ``(B, S, heads, Dh)``."""
    half = int(x.shape[3]) // 2
    first, second = ops.split(x.cast(DType.float32), [half, half], axis=3)
    table = ops.unsqueeze(rotary, 2)  # 2, S, 1, Dh
    turned = ops.concat([-second, first], axis=3)
    rotated = x.cast(DType.float32) * table[0] + turned * table[1]
    return rotated.cast(x.dtype)


def _repeated(x: TensorValue, times: int) -> TensorValue:
    """Repeats each head of ``(B, S, heads, Dh)``, to ``(B, S, heads * times, Dh)``."""
    if times == 1:
        return x
    batch, length, heads, size = x.shape
    x = ops.reshape(x, (batch, length, heads, 1, size))
    x = ops.broadcast_to(x, (batch, length, heads, times, size))
    return ops.reshape(x, (batch, length, int(heads) * times, size))
