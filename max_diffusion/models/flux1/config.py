"""``config.json`` of each component to the sizes its graphs are built from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from graphs.autoencoder_kl import AutoencoderKLConfig
from graphs.clip import ClipTextConfig
from graphs.flux1 import Flux1Config
from graphs.t5 import T5Config

from ...errors import ModelLoadError

ConfigT = TypeVar("ConfigT")


def flux1_config(config: Mapping[str, Any]) -> Flux1Config:
    """Sizes of a ``FluxTransformer2DModel``."""
    known = dict(config)
    known["out_channels"] = config.get("out_channels") or config.get("in_channels")
    sizes = _select(Flux1Config, known, "transformer")
    if sum(sizes.axes_dims_rope) != sizes.attention_head_dim:
        raise ModelLoadError(
            f"transformer: axes_dims_rope must add up to attention_head_dim "
            f"{sizes.attention_head_dim}, got {sizes.axes_dims_rope}"
        )
    return sizes


def clip_config(config: Mapping[str, Any]) -> ClipTextConfig:
    """Sizes of a ``CLIPTextModel``."""
    sizes = _select(ClipTextConfig, config, "text_encoder")
    _one_of("text_encoder", "hidden_act", sizes.hidden_act, ("quick_gelu", "gelu"))
    return sizes


def t5_config(config: Mapping[str, Any]) -> T5Config:
    """Sizes of a ``T5EncoderModel``."""
    sizes = _select(T5Config, config, "text_encoder_2")
    _one_of(
        "text_encoder_2",
        "feed_forward_proj",
        sizes.feed_forward_proj,
        ("gated-gelu", "relu"),
    )
    return sizes


def autoencoder_config(config: Mapping[str, Any]) -> AutoencoderKLConfig:
    """Sizes of an ``AutoencoderKL``."""
    _one_of("vae", "act_fn", config.get("act_fn", "silu"), ("silu",))
    for key, block in (
        ("down_block_types", "DownEncoderBlock2D"),
        ("up_block_types", "UpDecoderBlock2D"),
    ):
        for kind in config.get(key, ()):
            _one_of("vae", key, kind, (block,))
    known = {key: value for key, value in config.items() if value is not None}
    return _select(AutoencoderKLConfig, known, "vae")


def _select(kind: type[ConfigT], config: Mapping[str, Any], where: str) -> ConfigT:
    """The dataclass's fields out of a larger mapping, lists as tuples."""
    values, hints = {}, get_type_hints(kind)
    for item in fields(kind):  # type: ignore[arg-type]  # every caller's is one
        if item.name in config:
            values[item.name] = _typed(
                f"{where}: config.json's {item.name}",
                config[item.name],
                hints[item.name],
            )
        elif item.default is MISSING and item.default_factory is MISSING:
            raise ModelLoadError(
                f"{where}: config.json has no {item.name}; is it the config of a "
                "FLUX.1 model?"
            )
    return kind(**values)


def _typed(where: str, value: Any, kind: Any) -> Any:
    """``value`` if it is what a field of type ``kind`` holds; sizes are positive."""
    if get_origin(kind) is tuple:
        if isinstance(value, list) and value:
            return tuple(_typed(where, item, get_args(kind)[0]) for item in value)
        wanted = "a list"
    elif kind is int:
        if type(value) is int and value > 0:
            return value
        wanted = "a whole number above 0"
    elif kind is float:
        if type(value) in (int, float):
            return float(value)
        wanted = "a number"
    else:
        if isinstance(value, kind):
            return value
        wanted = {bool: "true or false", str: "text"}[kind]
    raise ModelLoadError(f"{where} must be {wanted}, got {value!r}")


def _one_of(where: str, key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ModelLoadError(
            f"{where}: {key} must be {' or '.join(choices)}, got {value!r}"
        )
