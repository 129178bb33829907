"""The documented flat cache settings, resolved to one method's configuration."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import RequestError
from .config import AbstractCacheConfig
from .first_block import FirstBlockConfig
from .none import NoCacheConfig
from .taylorseer import TaylorSeerConfig


@dataclass(frozen=True)
class CacheDefaults:
    """A model's own defaults for the cache settings that are left open."""

    residual_threshold: float = 0.05
    taylorseer_cache_interval: int = 5
    taylorseer_max_order: int = 1
    taylorseer_warmup_steps: int = 9


@dataclass(frozen=True)
class DenoisingCacheConfig:
    """Cache settings by MAX's documented names; ``None`` means the model's default.

    Attributes:
        first_block_caching: Use the first-block cache.
        taylorseer: Use TaylorSeer; not both.
        taylorseer_cache_interval: ``cache_interval`` of :class:`TaylorSeerConfig`.
        taylorseer_warmup_steps: ``warmup_steps`` of :class:`TaylorSeerConfig`.
        taylorseer_max_order: ``max_order`` of :class:`TaylorSeerConfig`.
        residual_threshold: ``threshold`` of :class:`FirstBlockConfig`.
    """

    first_block_caching: bool = False
    taylorseer: bool = False
    taylorseer_cache_interval: int | None = None
    taylorseer_warmup_steps: int | None = None
    taylorseer_max_order: int | None = None
    residual_threshold: float | None = None

    def resolve(self, defaults: CacheDefaults | None = None) -> AbstractCacheConfig:
        """Returns the complete options of the one method that the settings select.

        Raises:
            RequestError: Both methods are on, or a value is out of range.
        """
        if self.first_block_caching and self.taylorseer:
            raise RequestError(
                "cache: taylorseer and first_block_caching are both on; enable one"
            )
        known = defaults or CacheDefaults()
        if self.taylorseer:
            return TaylorSeerConfig(
                _first(self.taylorseer_cache_interval, known.taylorseer_cache_interval),
                _first(self.taylorseer_warmup_steps, known.taylorseer_warmup_steps),
                _first(self.taylorseer_max_order, known.taylorseer_max_order),
            )
        if self.first_block_caching:
            threshold = self.residual_threshold
            return FirstBlockConfig(
                known.residual_threshold if threshold is None else threshold
            )
        return NoCacheConfig()


def _first(value: int | None, default: int) -> int:
    return default if value is None else value
