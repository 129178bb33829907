"""The sizes of the transformer's graphs, from its ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graphs.flux1 import Flux1Config

from ...components import select_fields
from ...errors import ModelLoadError


def flux1_config(config: Mapping[str, Any]) -> Flux1Config:
    """Returns the sizes of a ``FluxTransformer2DModel`` from its ``config.json``."""
    known = dict(config)
    known["out_channels"] = config.get("out_channels") or config.get("in_channels")
    sizes = select_fields(Flux1Config, known, "transformer")
    if sum(sizes.axes_dims_rope) != sizes.attention_head_dim:
        raise ModelLoadError(
            f"transformer: axes_dims_rope must add up to attention_head_dim "
            f"{sizes.attention_head_dim}, got {sizes.axes_dims_rope}"
        )
    return sizes
