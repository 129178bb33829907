"""Which caches a pipeline can run, and what they take there."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, final

from ..caches import (
    CACHES,
    AbstractCache,
    AbstractCacheConfig,
    BoundCache,
    CacheDefaults,
    Calibration,
    DenoisingCacheConfig,
    GraphGroup,
    cache_from_options,
    label_of,
)
from ..core.loras import Loras
from ..errors import CacheNotLoadedError, RequestError

if TYPE_CHECKING:
    from ..denoising import DenoiserComponent, OwnTransformer

Shape = tuple[int, int, int]
"""``(B, S_img, S_txt)`` of a request."""


@final
class CacheSupport:
    """Checks caches against one pipeline, without a compiled graph.

    Args:
        defaults: What flat settings mean where they leave something open.
        calibration: What was measured of the model.
        transformer: What runs the steps: the split denoiser, or the adapter of an
            override of ``run_transformer``.
        denoiser: The split denoiser, if there is one: only of this is the memory of a
            cache known.
        loaded: Caches whose graphs are compiled when the pipeline is.
        is_extensible: Whether graphs of other groups are compiled when a request first
            needs them, or such a request is refused.
    """

    def __init__(
        self,
        defaults: CacheDefaults,
        calibration: Calibration,
        transformer: DenoiserComponent | OwnTransformer,
        denoiser: DenoiserComponent | None,
        loaded: Sequence[AbstractCacheConfig],
        *,
        is_extensible: bool,
    ) -> None:
        self._defaults, self._calibration = defaults, calibration
        self._transformer, self._denoiser = transformer, denoiser
        self._loaded = tuple(loaded)
        self._graph_groups = frozenset(g for c in loaded for g in c.graph_groups)
        self._is_extensible = is_extensible

    def bind(
        self, config: AbstractCacheConfig, num_inference_steps: int | None
    ) -> BoundCache:
        """A cache for one request.

        Args:
            config: Its options.
            num_inference_steps: Steps of the request; ``None`` where they are not
                known, which caches with rules about them refuse.

        Raises:
            RequestError: The pipeline has not the graphs, the model lacks a
                measurement, an option has no effect here, or the rules name steps that
                the request does not have.
        """
        policy = self.check(config)
        return BoundCache(config, policy, config.required_steps(num_inference_steps))

    def bound(
        self,
        cache: BoundCache | AbstractCacheConfig | None,
        default: AbstractCacheConfig,
        num_inference_steps: int | None,
    ) -> BoundCache:
        """:meth:`bind` of a cache in any form.

        Args:
            cache: One that is bound is taken as it is; ``None`` stands for ``default``.
            default: The pipeline's own.
            num_inference_steps: As for :meth:`bind`.
        """
        if isinstance(cache, BoundCache):
            return cache
        config = default if cache is None else self.resolve(cache)
        return self.bind(config, num_inference_steps)

    def check(self, config: AbstractCacheConfig) -> AbstractCache:
        """A cache's policy, if this pipeline can run it in some request.

        Raises:
            RequestError: It cannot.
        """
        if not self._is_extensible:
            self._check_graphs(config)
        return self._policy(config)

    def resolve(
        self, cache: DenoisingCacheConfig | AbstractCacheConfig | None
    ) -> AbstractCacheConfig:
        """Settings of any form to one method's options, by this model's defaults.

        Raises:
            RequestError: Two methods at once, a value out of range, or no settings.
        """
        return resolve_cache(cache, self._defaults)

    def given(
        self, cache: str | DenoisingCacheConfig | AbstractCacheConfig | None
    ) -> AbstractCacheConfig | None:
        """A call's cache in any form; ``None`` stays the pipeline's.

        Raises:
            RequestError: There is no such cache, or as of :meth:`resolve`.
        """
        if cache is None:
            return None
        if isinstance(cache, str):
            return cache_from_options(cache)
        return self.resolve(cache)

    def reason_against(self, config: AbstractCacheConfig) -> str:
        """Why this model cannot run a cache, in one line; empty where it can."""
        try:
            self._policy(config)
        except RequestError as err:
            return str(err)
        return ""

    @property
    def loaded(self) -> tuple[AbstractCacheConfig, ...]:
        """Caches whose graphs are compiled when the pipeline is."""
        return self._loaded

    def notes(self, config: AbstractCacheConfig, loras: Loras) -> tuple[str, ...]:
        """What is said of a cache that decides by measurements with other LoRAs.

        Args:
            config: The cache.
            loras: Names of the files that a request draws with, each with its weight.
        """
        measured = self._calibration.loras
        if measured == loras or not self._is_measured(config):
            return ()
        command = " --lora FILE:WEIGHT --output FILE" if loras else ""
        return (
            f"{config.name} decides by what was measured {_with(measured)}, and this "
            f"is {_with(loras)}; measure anew by max-diffusion calibrate{command}, and "
            "load the model with that file as calibration",
        )

    def _is_measured(self, config: AbstractCacheConfig) -> bool:
        """Whether a cache runs here for what was measured of the model alone."""

        def runs(calibration: Calibration) -> bool:
            try:
                config.create_cache(calibration)
            except RequestError:
                return False
            return True

        return runs(self._calibration) and not runs(Calibration())

    def supported(self) -> dict[str, AbstractCacheConfig]:
        """Caches that requests may use, at their defaults, by name."""
        found: dict[str, AbstractCacheConfig] = {}
        for name, kind in CACHES.items():
            with suppress(RequestError):
                self.check(kind())
                found[name] = kind()
        return found

    def state_bytes(
        self,
        config: AbstractCacheConfig,
        shape: Shape,
        branches: int = 1,
        reference_tokens: int = 0,
    ) -> int:
        """Most bytes of state that a request holds, of all branches.

        Args:
            config: The cache.
            shape: ``(B, S_img, S_txt)`` of the request.
            branches: 2 with true guidance.
            reference_tokens: Of a reference picture.

        Raises:
            RequestError: It is not known of this pipeline.
        """
        if self._denoiser is None:
            raise RequestError(
                "cache: the transformer of this pipeline is not split into blocks, so "
                "the memory of a cache is not known beforehand; leave the limit out"
            )
        sizes = self._denoiser.sizes.of(
            shape, branches, config.graph_groups, reference_tokens
        )
        return config.state_bytes(sizes)

    def check_memory(
        self,
        config: AbstractCacheConfig,
        limit: int,
        shape: Shape,
        branches: int = 1,
        reference_tokens: int = 0,
    ) -> None:
        """Whether a cache's state fits a limit.

        Args:
            config: The cache.
            limit: Bytes of state, of all branches of the request.
            shape: ``(B, S_img, S_txt)`` of the request.
            branches: 2 with true guidance.
            reference_tokens: Of a reference picture.

        Raises:
            RequestError: It does not fit; names the caches that do.
        """
        needed = self.state_bytes(config, shape, branches, reference_tokens)
        if needed <= limit:
            return
        fitting = self.fitting(limit, shape, branches, reference_tokens)
        raise RequestError(
            f"cache: {config.name} would keep {needed} bytes of state, more than the "
            f"limit of {limit}; at their defaults these run here and fit: "
            f"{', '.join(fitting)}"
        )

    def fitting(
        self,
        limit: int,
        shape: Shape,
        branches: int = 1,
        reference_tokens: int = 0,
        among: Collection[GraphGroup] | None = None,
    ) -> list[str]:
        """Names of the caches that run here, and whose state fits at their defaults.

        Args:
            limit: Bytes of state, of all branches of the request.
            shape: As for :meth:`state_bytes`.
            branches: As for :meth:`state_bytes`.
            reference_tokens: As for :meth:`state_bytes`.
            among: Graphs that a cache may need; ``None`` for any.
        """
        return [
            name
            for name, known in self.supported().items()
            if (among is None or frozenset(among).issuperset(known.graph_groups))
            and self.state_bytes(known, shape, branches, reference_tokens) <= limit
        ]

    def _policy(self, config: AbstractCacheConfig) -> AbstractCache:
        policy = config.create_cache(self._calibration)
        self._transformer.check(config, policy)
        return policy

    def _check_graphs(self, config: AbstractCacheConfig) -> None:
        if not self._graph_groups.issuperset(config.graph_groups):
            wanted = label_of(config)
            raise CacheNotLoadedError(
                f"cache: {wanted} needs graphs that the model was loaded without; it "
                f"has those of {', '.join(map(label_of, self._loaded))}",
                wanted,
            )


def wanted_caches(
    named: Sequence[str | AbstractCacheConfig], own: AbstractCacheConfig
) -> tuple[Sequence[AbstractCacheConfig], frozenset[GraphGroup]]:
    """Returns the caches that a model is loaded for, and the graphs that they need.

    Args:
        named: Names stand for their defaults.
        own: Of requests that bring none.
    """
    kinds = [CACHES[each]() if isinstance(each, str) else each for each in named]
    wanted = tuple(dict.fromkeys((*kinds, own)))
    return wanted, frozenset(group for kind in wanted for group in kind.graph_groups)


def resolve_cache(
    cache: DenoisingCacheConfig | AbstractCacheConfig | None, defaults: CacheDefaults
) -> AbstractCacheConfig:
    """Settings of any form to one method's options.

    Raises:
        RequestError: Two methods at once, a value out of range, or no settings.
    """
    if cache is None:
        cache = DenoisingCacheConfig()
    if isinstance(cache, DenoisingCacheConfig):
        return cache.resolve(defaults)
    if not isinstance(cache, AbstractCacheConfig):
        raise RequestError(
            "cache: expected a cache configuration such as TaylorSeerConfig(), got "
            f"{cache!r}"
        )
    return cache


def _with(loras: Loras) -> str:
    shown = ", ".join(f"{name}:{weight:g}" for name, weight in loras)
    return f"with {shown}" if shown else "without LoRAs"
