"""The caches there are, by name: the package's own, and those that others bring."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from types import MappingProxyType
from typing import Final, TypeVar, get_type_hints

from ..errors import RequestError
from .auto import AutoConfig
from .config import AbstractCacheConfig
from .converters import CONVERTERS
from .fastercache import FasterCacheConfig
from .first_block import FirstBlockConfig
from .magcache import MagCacheConfig
from .none import NoCacheConfig
from .pab import PabConfig
from .step_mask import StepMaskConfig
from .taylorseer import TaylorSeerConfig
from .teacache import TeaCacheConfig

ConfigT = TypeVar("ConfigT", bound=AbstractCacheConfig)

_BUILT_IN: Final[Sequence[type[AbstractCacheConfig]]] = (
    NoCacheConfig,
    TaylorSeerConfig,
    FirstBlockConfig,
    AutoConfig,
    StepMaskConfig,
    MagCacheConfig,
    TeaCacheConfig,
    PabConfig,
    FasterCacheConfig,
)
# The one thing that grows: like an import, a registration is of the whole process.
_kinds: Final = {kind.name: kind for kind in _BUILT_IN}

CACHES: Final[Mapping[str, type[AbstractCacheConfig]]] = MappingProxyType(_kinds)
"""Configuration class of each cache by its name; a live view that also shows caches
registered later."""


def register_cache(kind: type[ConfigT]) -> type[ConfigT]:
    """Makes a cache known by its name; usable as a decorator.

    From then on ``generate --cache NAME``, ``--caches``, the server, ``compare`` and
    ``tune`` know it as they know the package's own. A pipeline decides when it is
    loaded which graphs it compiles, so register before.

    Args:
        kind: A frozen dataclass; see :class:`AbstractCacheConfig`.

    Returns:
        ``kind`` itself.

    Raises:
        RequestError: It declares something wrongly, or the name is taken.
    """
    _check(kind)
    known = _kinds.get(kind.name)
    if known is not None and known is not kind:
        raise RequestError(
            f"register_cache: {kind.name} is {known.__module__}.{known.__qualname__} "
            "already; choose another name"
        )
    _kinds[kind.name] = kind
    return kind


def _check(kind: type[AbstractCacheConfig]) -> None:
    """Raises RequestError where a class does not declare what it must."""
    where = f"register_cache: {getattr(kind, '__qualname__', repr(kind))}"
    if not (isinstance(kind, type) and issubclass(kind, AbstractCacheConfig)):
        raise RequestError(f"{where}: expected a subclass of AbstractCacheConfig")
    params = vars(kind).get("__dataclass_params__")  # not an inherited one
    if params is None or not params.frozen:
        raise RequestError(f"{where}: expected a frozen dataclass; decorate it so")
    for attribute, pattern, words in (
        ("name", r"[a-z0-9]+(-[a-z0-9]+)*", "lower-case words joined by hyphens"),
        ("summary", r"\S.*", "one sentence"),
    ):
        value = getattr(kind, attribute, None)
        if not isinstance(value, str) or not re.fullmatch(pattern, value):
            raise RequestError(f"{where}: {attribute} must be {words}, got {value!r}")
    hints = get_type_hints(kind)
    for item in fields(kind):
        if hints[item.name] not in CONVERTERS:
            allowed = "int, float, str, bool or a tuple of int or float"
            raise RequestError(
                f"{where}: option {item.name} must be {allowed}, got {hints[item.name]}"
            )
    try:
        defaults = vars(kind())
    except TypeError as err:
        raise RequestError(
            f"{where}: every option needs a default, and the class all methods of the "
            f"contract ({err})"
        ) from err
    for ladders in (kind.ladders, kind.coarse):
        for option in ladders:
            if option not in defaults:
                raise RequestError(f"{where}: {option} on a ladder is no option")
    for option, values in kind.ladders.items():
        if option not in kind.coarse and defaults[option] not in values:
            raise RequestError(
                f"{where}: the ladder of {option} must hold its default "
                f"{defaults[option]!r}, got {values}"
            )
    for option, values in kind.coarse.items():
        if not set(values) <= set(kind.ladders.get(option, ())):
            raise RequestError(
                f"{where}: coarse values of {option} must be on its ladder, got "
                f"{values}"
            )
