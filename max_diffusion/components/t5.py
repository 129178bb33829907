"""T5's encoder: from a prompt to one state per token."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, final

import numpy as np
from max.driver import Buffer
from max.dtype import DType
from max.graph import Graph, Module, TensorType

from graphs.t5 import T5Config, t5_encoder, t5_relative_buckets
from graphs.weights import WeightScope

from ..core.buffers import to_device
from ..execution.component import ComponentModel
from .config import require_one_of, select_fields


def t5_config(config: Mapping[str, Any], where: str = "text_encoder_2") -> T5Config:
    """Returns the sizes of a ``T5EncoderModel`` from its ``config.json``."""
    sizes = select_fields(T5Config, config, where)
    require_one_of(
        where,
        "feed_forward_proj",
        sizes.feed_forward_proj,
        ("gated-gelu", "relu"),
    )
    return sizes


@final
class T5TextEncoder(ComponentModel):
    """Encodes each prompt as one state per token."""

    is_text_encoder = True

    def build_graphs(self, module: Module) -> WeightScope:
        """Adds one graph: ids ``(B, S_txt)`` to ``(B, S_txt, D)``."""
        scope = self.weight_scope()
        # One table under two names; a file holds either.
        names = ("shared.weight", "encoder.embed_tokens.weight")
        embedding = next((n for n in names if n in self.weights), names[0])
        types = [
            TensorType(DType.int64, ("batch", "text_seq_len"), self.device_ref),
            TensorType(DType.int64, ("text_seq_len", "text_seq_len"), self.device_ref),
        ]
        with Graph(self.name, input_types=types, module=module) as graph:
            ids, buckets = (value.tensor for value in graph.inputs)
            graph.output(
                t5_encoder(self._sizes, scope, ids, buckets, embedding_name=embedding)
            )
        return scope

    @cached_property
    def _sizes(self) -> T5Config:
        return t5_config(self.config, self.name)

    def load_model(self) -> Callable[[np.ndarray], Buffer]:
        """Returns :meth:`encode`, which runs the loaded graph."""
        return self.encode

    def encode(self, ids: np.ndarray) -> Buffer:
        """Encodes token ids int64 ``(B, S_txt)`` as states ``(B, S_txt, D)``."""
        buckets = t5_relative_buckets(self._sizes, ids.shape[1])
        return self.models[self.name].execute(
            to_device(ids, self.device), to_device(buckets, self.device)
        )[0]
