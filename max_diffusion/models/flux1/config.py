"""``config.json`` of the transformer to the sizes its graphs are built from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graphs.flux1 import Flux1Config

from ...components import select_fields
from ...errors import ModelLoadError


def flux1_config(config: Mapping[str, Any]) -> Flux1Config:
    """Sizes of a ``FluxTransformer2DModel``."""
    known = dict(config)
    known["out_channels"] = config.get("out_channels") or config.get("in_channels")
    sizes = select_fields(Flux1Config, known, "transformer")
    if sum(sizes.axes_dims_rope) != sizes.attention_head_dim:
        raise ModelLoadError(
            f"transformer: axes_dims_rope must add up to attention_head_dim "
            f"{sizes.attention_head_dim}, got {sizes.axes_dims_rope}"
        )
    return sizes
