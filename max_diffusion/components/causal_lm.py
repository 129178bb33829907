"""A causal language model as a text encoder: from a prompt to one state per token."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
from max.driver import Buffer
from max.dtype import DType
from max.graph import Graph, Module, TensorType

from graphs.causal_lm import CausalLMConfig, causal_lm, causal_lm_host_inputs
from graphs.weights import WeightScope

from ..checkpoint import ComponentWeights
from ..core.buffers import to_device
from ..errors import ModelLoadError
from ..execution.component import ComponentModel
from .config import require_one_of, select_fields

# Whether queries, keys and values have biases without a word of it in the
# configuration, and whether queries and keys are normed, by model type.
_KINDS = {
    "qwen2": (True, False),
    "qwen2_5_vl": (True, False),
    "qwen3": (False, True),
    "mistral": (False, False),
    "mistral3": (False, False),
}


def causal_lm_config(
    config: Mapping[str, Any], where: str = "text_encoder"
) -> CausalLMConfig:
    """Returns the sizes of a language model from its ``config.json``.

    Those of a model that also sees are under ``text_config``, in newer folders.

    Raises:
        ModelLoadError: It is another kind of model, or its sizes do not fit each other.
    """
    text = _mapping(config.get("text_config"), where, "text_config")
    for given in (config, text or config):
        kind = str(given.get("model_type", "")).removesuffix("_text")
        require_one_of(where, "model_type", kind, tuple(_KINDS))
    given = {**config, **text}
    known = {name: value for name, value in given.items() if value is not None}
    require_one_of(where, "hidden_act", known.get("hidden_act", "silu"), ("silu",))
    # Mistral's has no word of its own for whether it is used.
    window = "sliding_window" if "mistral" in kind else "use_sliding_window"
    if known.get(window):
        raise ModelLoadError(
            f"{where}: {window} must be false or null, got {known[window]!r}; tokens "
            "see all before them here"
        )
    # transformers 5 keeps what was rope_scaling and rope_theta in one place.
    rope = known.get("rope_parameters") or known.get("rope_scaling")
    rope = _mapping(rope, where, "rope_parameters")
    scaling = rope.get("rope_type", rope.get("type", "default"))
    require_one_of(where, "rope_type", scaling, ("default", "mrope"))
    if rope.get("rope_theta") is not None:
        known["rope_theta"] = rope["rope_theta"]
    heads, width = known.get("num_attention_heads"), known.get("hidden_size")
    if "head_dim" not in known and isinstance(heads, int) and isinstance(width, int):
        known["head_dim"] = width // max(heads, 1)
    known.setdefault("num_key_value_heads", heads)
    has_bias, has_norm = _KINDS[kind]
    known["has_qkv_bias"] = has_bias or bool(known.get("attention_bias", False))
    known["has_output_bias"] = not has_bias and known["has_qkv_bias"]
    known["has_qk_norm"] = has_norm
    sizes = select_fields(CausalLMConfig, known, where)
    if not 1 < sizes.rope_theta < float("inf"):
        raise ModelLoadError(
            f"{where}: rope_theta must be above 1, got {sizes.rope_theta:g}"
        )
    if sizes.num_attention_heads % sizes.num_key_value_heads or sizes.head_dim % 2:
        raise ModelLoadError(
            f"{where}: config.json's num_attention_heads must be a multiple of "
            f"num_key_value_heads, and head_dim even, got {sizes.num_attention_heads}, "
            f"{sizes.num_key_value_heads} and {sizes.head_dim}"
        )
    return sizes


def causal_lm_weights(
    config: Mapping[str, Any], weights: ComponentWeights
) -> ComponentWeights:
    """Finds the language model's tensors among those of a model that does more.

    transformers has saved them under ``model.`` and under ``model.language_model.``,
    and those of a model that only encodes under their own names; what it sees and
    predicts with is left over.
    """
    names = weights.tensors
    prefixes = ("language_model.model.", "model.language_model.", "model.", "")
    prefix = next(
        (p for p in prefixes if any(name.startswith(p) for name in names)), ""
    )
    left = ("visual.*", "vision_tower.*", "multi_modal_projector.*", "lm_head.*")
    rest = weights.without(
        *left, *(f"model.{each}" for each in left), "language_model.lm_head.*"
    )
    return rest.renamed(lambda name: prefix + name)


def _mapping(value: object, where: str, name: str) -> Mapping[str, Any]:
    """A part of ``config.json`` that holds settings by name; empty where it is null."""
    if value is not None and not isinstance(value, Mapping):
        raise ModelLoadError(
            f"{where}: config.json's {name} must be an object, got {value!r:.80}; "
            "download it again"
        )
    return value or {}


class CausalLMTextEncoder(ComponentModel):
    """Encodes each prompt as one state per token.

    Final but for what a family chooses.
    """

    output_layers: tuple[int, ...] = (-1,)
    """See :class:`~graphs.causal_lm.CausalLMConfig`."""
    num_dropped: int = 0
    """Tokens at the front, of a template, whose states are left out."""
    keeps_padding: bool = False
    """Whether states of padding are of use: then no token sees any."""
    pads_before: bool = False
    """Whether such padding comes before texts, where it sees nothing."""

    is_text_encoder = True

    def build_graphs(self, module: Module) -> WeightScope:
        """Adds one graph: ids ``(B, S)`` to ``(B, S - num_dropped, D)``."""
        scope = self.weight_scope()
        length = "tokens"
        types = [
            TensorType(DType.int64, ("batch", length), self.device_ref),
            TensorType(
                DType.float32, (2, length, self._sizes.head_dim), self.device_ref
            ),
            TensorType(
                DType.float32,
                ("batch", length, length) if self.keeps_padding else (length, length),
                self.device_ref,
            ),
        ]
        if self.pads_before:
            types.append(
                TensorType(DType.float32, ("batch", length, 1), self.device_ref)
            )
        with Graph(self.name, input_types=types, module=module) as graph:
            inputs = [value.tensor for value in graph.inputs]
            states = causal_lm(self._sizes, scope, *inputs)
            if self.num_dropped:
                states = states[:, self.num_dropped :, :]
            graph.output(states)
        return scope

    @cached_property
    def _sizes(self) -> CausalLMConfig:
        sizes = causal_lm_config(self.config, self.name)
        return replace(sizes, output_layers=self.output_layers)

    def load_model(self) -> Callable[[np.ndarray], Buffer]:
        """Returns :meth:`encode`, which runs the loaded graph."""
        return self.encode

    def encode(self, ids: np.ndarray, is_text: np.ndarray | None = None) -> Buffer:
        """Encodes token ids int64 ``(B, S)``, texts padded at their ends.

        Args:
            ids: With any id for padding, unless its states are of use.
            is_text: Which of them are no padding, bool ``(B, S)``; given where
                :attr:`keeps_padding`.

        Returns:
            States ``(B, S - num_dropped, D)``.
        """
        assert (is_text is not None) is self.keeps_padding
        arrays = [ids, *causal_lm_host_inputs(self._sizes, ids.shape[1], is_text)]
        if self.pads_before:
            assert is_text is not None
            arrays.append(is_text[..., None].astype(np.float32))
        inputs = (to_device(array, self.device) for array in arrays)
        return self.models[self.name].execute(*inputs)[0]
