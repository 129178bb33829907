"""CLIP's text encoder: from a prompt to one pooled vector."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, final

import numpy as np
from max.driver import Buffer
from max.dtype import DType
from max.graph import Graph, Module, TensorType

from graphs.clip import ClipTextConfig, clip_host_inputs, clip_text_encoder
from graphs.weights import WeightScope

from ..core.buffers import to_device
from ..execution.component import ComponentModel
from .config import require_one_of, select_fields


def clip_config(
    config: Mapping[str, Any], where: str = "text_encoder"
) -> ClipTextConfig:
    """Returns the sizes of a ``CLIPTextModel`` from its ``config.json``."""
    sizes = select_fields(ClipTextConfig, config, where)
    require_one_of(where, "hidden_act", sizes.hidden_act, ("quick_gelu", "gelu"))
    return sizes


@final
class ClipTextEncoder(ComponentModel):
    """Encodes each prompt as one pooled vector."""

    is_text_encoder = True

    def build_graphs(self, module: Module) -> WeightScope:
        """Adds one graph: ids ``(B, S)`` to pooled ``(B, D)``."""
        scope = self.weight_scope()
        # Published checkpoints nest the weights, transformers 5 writes them flat.
        is_nested = any(name.startswith("text_model.") for name in self.weights.names)
        types = [
            TensorType(DType.int64, ("batch", "tokens"), self.device_ref),
            TensorType(DType.int64, ("tokens",), self.device_ref),
            TensorType(DType.float32, ("tokens", "tokens"), self.device_ref),
            TensorType(DType.float32, ("batch", "tokens"), self.device_ref),
        ]
        with Graph(self.name, input_types=types, module=module) as graph:
            inputs = [value.tensor for value in graph.inputs]
            w = scope / "text_model" if is_nested else scope
            graph.output(clip_text_encoder(self._sizes, w, *inputs))
        return scope

    @cached_property
    def _sizes(self) -> ClipTextConfig:
        return clip_config(self.config, self.name)

    def load_model(self) -> Callable[[np.ndarray], Buffer]:
        """Returns :meth:`encode`, which runs the loaded graph."""
        return self.encode

    def encode(self, ids: np.ndarray) -> Buffer:
        """Encodes token ids int64 ``(B, S)`` as pooled vectors ``(B, D)``."""
        arrays = (ids, *clip_host_inputs(self._sizes, ids))
        inputs = (to_device(array, self.device) for array in arrays)
        return self.models[self.name].execute(*inputs)[0]
