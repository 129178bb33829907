"""The abstract pipeline: components, one compile, caches, and the denoising loop."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from max.driver import Buffer, Device
from max.dtype import DType
from max.engine import InferenceSession, Model
from max.graph import DeviceRef, Module

from graphs.sampler import add_euler_step, add_guidance

from .buffers import to_numpy
from .caches import (
    CACHES,
    AbstractModuleCache,
    AbstractStepCache,
    CacheConfig,
    CacheDefaults,
    DenoisingCacheConfig,
    FirstBlockCache,
    FirstBlockConfig,
    GraphGroup,
    NoCacheConfig,
    Run,
    StepRules,
    add_series_graphs,
    cache_name,
    label_of,
)
from .calls import Routine, on_device, run
from .compile import compile_graphs, in_graph_context, memory_errors_said
from .component import ComponentModel
from .denoising import (
    Branch,
    DenoiserComponent,
    DenoisingCacheState,
    Inputs,
    latents_shape,
    run_module_cache,
    run_own_decision,
    run_residual_cache,
    run_step_cache,
)
from .errors import CacheNotLoadedError, MaxDiffusionError, RequestError
from .loading import PipelineConfig, build_components, files_by_component
from .loop import Denoising
from .report import StepRecord
from .schedulers import Schedule

OnStep = Callable[[int, int], None]
OnEvent = Callable[[str, str], None]


@dataclass(frozen=True)
class DiffusionPipelineOutput:
    """Finished pictures."""

    images: np.ndarray
    """uint8 ``(B, H, W, 3)``."""
    steps: tuple[StepRecord, ...] = ()
    """What each step did."""
    cache_bytes: int = 0
    """Most bytes of cache state held at once, all branches together."""
    seconds: Mapping[str, float] | None = None
    """By stage: encode, denoise, decode."""


@dataclass(frozen=True)
class Denoised:
    """Result of the denoising loop."""

    latents: Buffer
    """float32 ``(B, S_img, C)``."""
    steps: tuple[StepRecord, ...]
    cache_bytes: int


class DiffusionPipeline(ABC):
    """Base of every model's pipeline, by MAX's documented contract.

    A subclass names its ``components``; the constructor makes each, calls
    :meth:`init_remaining_components`, and compiles all their graphs as one module in
    the given session. ``execute(prepare_inputs(context))`` in a loop is
    the serving contract: whatever a request leaves behind dies with its inputs.

    A subclass with a ``DenoiserComponent`` gets every cache. One without overrides
    :meth:`run_transformer` by the documented contract.

    Args:
        pipeline_config: Components' configurations and the compute dtype.
        session: Shared session; all graphs are compiled in it, once.
        devices: Devices; the first one is used.
        weight_paths: Safetensors files, in folders named after the components.
        cache_config: Denoising cache of requests that bring none of their own.
        on_event: Called with ``(stage, "start" | "end")`` for load and compile.
        before_compile: Called with the pipeline when all but its graphs is there, to
            check a request, say; what it raises ends the construction.

    Raises:
        ModelLoadError: Weights missing, left over, of another shape or dtype.
        CompileError: MAX refused a graph.
    """

    components: dict[str, type[ComponentModel]] | None = None
    unprefixed_weight_component: str | None = None
    default_num_inference_steps: int = 50
    default_residual_threshold: float = 0.05
    default_taylorseer_cache_interval: int = 5
    default_taylorseer_max_order: int = 1
    default_taylorseer_warmup_steps: int = 9

    def __init__(
        self,
        pipeline_config: PipelineConfig,
        session: InferenceSession,
        devices: list[Device],
        weight_paths: Sequence[Path],
        cache_config: DenoisingCacheConfig | CacheConfig | None = None,
        *,
        on_event: OnEvent | None = None,
        before_compile: Callable[[Any], object] | None = None,
    ) -> None:
        if not self.components:
            raise MaxDiffusionError(
                f"{type(self).__name__}: components must map names to ComponentModel "
                "classes, got none; set the class attribute"
            )
        self.pipeline_config = pipeline_config
        self.session = session
        self.devices = devices
        self.cache_config = self.resolve_cache(cache_config)
        kinds = [
            CACHES[cache]() if isinstance(cache, str) else cache
            for cache in pipeline_config.caches
        ]
        self.graph_groups: frozenset[GraphGroup] = frozenset(
            group for kind in (*kinds, self.cache_config) for group in kind.graph_groups
        )
        self.seconds: dict[str, float] = {}
        self.models: Mapping[str, Model] = {}
        self._weights: Mapping[str, Any] = {}
        self.compile_count = 0
        self.loaded: dict[str, ComponentModel] = {}
        self._load(weight_paths, on_event or _ignore, before_compile)

    @property
    def device(self) -> Device:
        """The device the pipeline runs on."""
        return self.devices[0]

    @property
    def dtype(self) -> DType:
        """Compute dtype of the transformer."""
        return self.denoiser.dtype if self.denoiser else DType.float32

    @property
    def denoiser(self) -> DenoiserComponent | None:
        """The split transformer, if a component is one."""
        for component in self.loaded.values():
            if isinstance(component, DenoiserComponent):
                return component
        return None

    @abstractmethod
    def init_remaining_components(self) -> None:
        """Sets up what is no ComponentModel: tokenizers, schedulers.

        Called before anything compiles: components are in ``loaded``, but no graph can
        run yet.
        """

    @abstractmethod
    def prepare_inputs(self, context: Any) -> Any:
        """Numbers of a request to device buffers; keeps nothing."""

    @abstractmethod
    def execute(self, model_inputs: Any, **kwargs: Any) -> DiffusionPipelineOutput:
        """Prepared inputs to pictures; keeps nothing."""

    def run_transformer(
        self, cache_state: DenoisingCacheState, **kwargs: Any
    ) -> tuple[Buffer, ...]:
        """One full transformer pass.

        The default runs the pipeline's split denoiser on ``kwargs`` as named inputs. An
        override returns ``(noise_pred,)``, or ``(new_residual, noise_pred)`` under
        first-block caching, where it decides in a graph of its own from
        ``cache_state.prev_residual``, ``prev_output`` and ``residual_threshold``.
        """
        if self.denoiser is None:
            raise MaxDiffusionError(
                f"{type(self).__name__}: without a DenoiserComponent, override "
                "run_transformer to return (noise_pred,)"
            )
        return (run(self.models, self.denoiser.full(kwargs)),)

    def create_cache_state(
        self,
        batch_size: int,
        seq_len: int,
        transformer_config: Any,
        text_seq_len: int = 0,
        *,
        cache: CacheConfig | None = None,
        run: Run | None = None,
    ) -> DenoisingCacheState:
        """Fresh cache state of one request's guidance branch.

        Nothing is allocated before the first computed step, so the sizes only document
        what is to come.

        Args:
            batch_size: Samples of the request.
            seq_len: Image tokens.
            transformer_config: The transformer's configuration.
            text_seq_len: Text tokens.
            cache: This request's cache instead of the pipeline's.
            run: What caches may know of the request beforehand: its number of steps
                and their timesteps, for those that need them.

        Raises:
            RequestError: The pipeline was compiled without this cache, or its rules
                name steps that the request does not have.
        """
        config = self.cache_config if cache is None else self.resolve_cache(cache)
        run = Run() if run is None else run
        required = self.check_cache(config, run.num_steps)
        run = replace(run, required_steps=required)
        policy = config.create_cache(self.pipeline_config.calibration)
        return DenoisingCacheState(policy, policy.create_state(run), required)

    def check_cache(
        self, config: CacheConfig, num_inference_steps: int | None
    ) -> frozenset[int]:
        """Whether this pipeline can run a cache; needs no compiled graph.

        Returns:
            Steps that must be computed by the cache's rules.

        Raises:
            RequestError: The pipeline was compiled without this cache, an option has
                no effect here, or rules name steps that the request does not have.
        """
        config = self.resolve_cache(config)
        self._check_supported(config)
        if isinstance(config, StepRules):
            return config.required_steps(num_inference_steps)
        return frozenset()

    def _check_supported(self, config: CacheConfig) -> None:
        """Whether this pipeline can run a cache in some request."""
        if not self.graph_groups.issuperset(config.graph_groups):
            loaded = ", ".join(
                cache if isinstance(cache, str) else label_of(cache)
                for cache in self.pipeline_config.caches
            )
            wanted = label_of(config)
            raise CacheNotLoadedError(
                f"cache: {wanted} needs graphs that the model was loaded without; it "
                f"has those of {loaded}",
                wanted,
            )
        policy = config.create_cache(self.pipeline_config.calibration)
        if self._runs_split and self.denoiser:
            self.denoiser.check_policy(policy)
        elif isinstance(policy, FirstBlockCache):
            self._check_own_decision(config)
        elif not isinstance(policy, AbstractStepCache):
            raise RequestError(
                f"cache: {cache_name(config)} has no effect on "
                f"{type(self).__name__}, whose transformer is not split into blocks; "
                "use a cache that forecasts the prediction"
            )

    def supported_caches(self) -> dict[str, CacheConfig]:
        """Caches that requests may use, at their defaults, by name."""
        supported: dict[str, CacheConfig] = {}
        for name, kind in CACHES.items():
            with suppress(RequestError):
                self._check_supported(kind())
                supported[name] = kind()
        return supported

    def check_cache_memory(
        self,
        config: CacheConfig,
        limit: int,
        shape: tuple[int, int, int],
        branches: int = 1,
    ) -> None:
        """Whether a cache's state fits a limit; needs no compiled graph.

        Args:
            config: The cache.
            limit: Bytes of state, of all branches of the request.
            shape: ``(B, S_img, S_txt)`` of the request.
            branches: 2 with true guidance.

        Raises:
            RequestError: It does not fit; names the caches that do.
        """
        if self.denoiser is None:
            raise RequestError(
                f"cache: the transformer of {type(self).__name__} is not split into "
                "blocks, so the memory of a cache is not known beforehand; leave the "
                "limit out"
            )
        sizes = self.denoiser.state_sizes(shape, branches, config.graph_groups)
        needed = config.state_bytes(sizes)
        if needed <= limit:
            return
        sizes = self.denoiser.state_sizes(shape, branches)
        fitting = [
            name
            for name, known in self.supported_caches().items()
            if known.state_bytes(sizes) <= limit
        ]
        raise RequestError(
            f"cache: {cache_name(config)} would keep {needed} bytes of state, more "
            f"than the limit of {limit}; at their defaults these run here and fit: "
            f"{', '.join(fitting)}"
        )

    def run_denoising_step(
        self,
        step: int,
        cache_state: DenoisingCacheState,
        device: Device,
        **kwargs: Any,
    ) -> Buffer:
        """One step: the transformer, or what the cache knows instead.

        Args:
            step: 0-based index, from the loop, never counted by calls.
            cache_state: State of this request and branch; changed in place.
            device: Where the step runs; the pipeline's own device.
            kwargs: Inputs of the transformer, by name; ``latents`` ``(B, S_img, C)``.

        Returns:
            The prediction ``(B, S_img, C)``. Do not write to it: a cache may hold it.
        """
        return run(self.models, self.denoising_step(step, cache_state, kwargs))

    def denoising_step(
        self,
        step: int,
        cache_state: DenoisingCacheState,
        inputs: Inputs,
    ) -> Routine[Buffer]:
        """:meth:`run_denoising_step` as a routine, for whoever runs several at once."""
        cache = cache_state.cache
        denoiser = self.denoiser if self._runs_split else None
        if isinstance(cache, AbstractStepCache):

            def compute(rows: Sequence[int] | None) -> Routine[Buffer]:
                if denoiser is None:
                    yield from ()
                    return self.run_transformer(cache_state, **self._placed(inputs))[0]
                given = inputs if rows is None else denoiser.rows_of(inputs, rows)
                return (yield from denoiser.full(given))

            return run_step_cache(
                cache,
                cache_state,
                step,
                latents_shape(inputs),
                compute,
                is_divisible=denoiser is not None,
            )
        if denoiser is None:
            own = partial(self.run_transformer, cache_state, **self._placed(inputs))
            return run_own_decision(cache_state, step, latents_shape(inputs), own)
        if isinstance(cache, AbstractModuleCache):
            return run_module_cache(cache, cache_state, step, denoiser, inputs)
        return run_residual_cache(cache, cache_state, step, denoiser, inputs)

    def resolve_cache(
        self, cache: DenoisingCacheConfig | CacheConfig | None
    ) -> CacheConfig:
        """Settings of any form to one method's configuration, by this model's defaults.

        Raises:
            RequestError: Two methods at once, or a value out of range.
        """
        if cache is None:
            cache = DenoisingCacheConfig()
        if isinstance(cache, DenoisingCacheConfig):
            return cache.resolve(
                CacheDefaults(
                    self.default_residual_threshold,
                    self.default_taylorseer_cache_interval,
                    self.default_taylorseer_max_order,
                    self.default_taylorseer_warmup_steps,
                )
            )
        if not isinstance(cache, NoCacheConfig | StepRules):
            raise RequestError(
                "cache: expected a cache configuration such as TaylorSeerConfig(), got "
                f"{cache!r}"
            )
        return cache

    def denoise(
        self,
        latents: Buffer,
        schedule: Schedule,
        branches: Sequence[Branch],
        *,
        true_cfg_scale: float = 1.0,
        cache: CacheConfig | None = None,
        grid: tuple[int, int] | None = None,
        on_step: OnStep | None = None,
    ) -> Denoised:
        """The denoising loop.

        Args:
            latents: Noise, float32 ``(B, S_img, C)``; not changed.
            schedule: Sigmas and timesteps.
            branches: The conditional branch, and the unconditional one with true
                guidance; each has a cache state of its own.
            true_cfg_scale: Weight of the conditional branch with two branches.
            cache: This request's cache instead of the pipeline's.
            grid: Rows and columns of the image tokens, for caches that need them.
            on_step: Called with ``(steps done, steps)`` after each step; what it
                raises ends the request.
        """
        denoising = self.begin(
            latents,
            schedule,
            branches,
            true_cfg_scale=true_cfg_scale,
            cache=cache,
            grid=grid,
        )
        self.run_steps(denoising, on_step=on_step)
        return self.finish(denoising)

    def begin(
        self,
        latents: Buffer,
        schedule: Schedule,
        branches: Sequence[Branch],
        *,
        true_cfg_scale: float = 1.0,
        cache: CacheConfig | None = None,
        grid: tuple[int, int] | None = None,
    ) -> Denoising:
        """The denoising loop before its first step; arguments of :meth:`denoise`."""
        batch, seq_len, _ = (int(size) for size in latents.shape)
        if len(branches) not in (1, 2):
            raise MaxDiffusionError(
                "denoise: expected the conditional branch, and with true guidance the "
                f"unconditional one, got {len(branches)} branches"
            )
        if grid is not None and grid[0] * grid[1] != seq_len:
            raise MaxDiffusionError(
                f"denoise: grid must have as many cells as the latents have tokens, "
                f"{seq_len}, got {grid}"
            )
        known = Run(
            schedule.num_steps,
            tuple(float(timestep) for timestep in schedule.timesteps),
            grid=grid,
            has_guidance=len(branches) == 2,
        )
        states = tuple(
            self.create_cache_state(
                batch,
                seq_len,
                self._transformer_config,
                cache=cache,
                run=replace(known, is_unconditional=index > 0),
            )
            for index in range(len(branches))
        )
        return Denoising(
            latents,
            schedule,
            tuple(branches),
            states,
            states[0].create_guidance(known),
            true_cfg_scale,
            self.denoising_step,
            self.device,
        )

    def run_steps(self, denoising: Denoising, *, on_step: OnStep | None = None) -> None:
        """Takes all the steps that are left, alone; arguments of :meth:`denoise`."""
        while not denoising.is_done:
            run(self.models, denoising.advance())
            if on_step is not None:
                on_step(denoising.step, denoising.schedule.num_steps)

    def finish(self, denoising: Denoising) -> Denoised:
        """What a loop that took all its steps gives.

        Raises:
            MaxDiffusionError: The latents are not finite.
        """
        self._check_finite(denoising.latents)
        return Denoised(
            denoising.latents, tuple(denoising.records), denoising.cache_bytes
        )

    def _placed(self, inputs: Inputs) -> dict[str, Buffer]:
        """Inputs as a ``run_transformer`` is given them."""
        return {name: on_device(x, self.device) for name, x in inputs.items()}

    def _check_own_decision(self, config: CacheConfig) -> None:
        """Whether a ``run_transformer`` that decides by itself knows all options."""
        decided = ("threshold", "warmup_steps", "compute_steps", "compute_last")
        defaults = FirstBlockConfig()
        for name, value in vars(config).items():
            if name not in decided and value != vars(defaults)[name]:
                raise RequestError(
                    f"first-block: {name} has no effect on {type(self).__name__}, "
                    "which decides by itself; leave it out"
                )

    @property
    def _runs_split(self) -> bool:
        """Whether a subclass left the transformer to the split denoiser."""
        return type(self).run_transformer is DiffusionPipeline.run_transformer

    @property
    def _transformer_config(self) -> Mapping[str, Any]:
        return self.pipeline_config.components.get("transformer", {})

    def _check_finite(self, latents: Buffer) -> None:
        if not np.isfinite(to_numpy(latents)).all():
            raise MaxDiffusionError(
                f"{self.pipeline_config.model_name or type(self).__name__}: the "
                "latents are not finite after the last step, so there is no picture; "
                "try float32, or check the weights"
            )

    @in_graph_context
    def _load(
        self,
        weight_paths: Sequence[Path],
        on_event: OnEvent,
        before_compile: Callable[[Any], object] | None,
    ) -> None:
        """Constructs the components, loads their weights, compiles once, binds."""
        assert self.components is not None
        started = time.perf_counter()
        on_event("load", "start")
        files = files_by_component(
            weight_paths, self.components, self.unprefixed_weight_component
        )
        module = Module()
        built = build_components(
            self.components,
            self.pipeline_config,
            self.devices,
            files,
            self.graph_groups,
            module,
        )
        self.loaded = built.components
        device_ref = DeviceRef.from_device(self.device)
        add_euler_step(module, "euler_step", self.dtype, device_ref)
        add_guidance(module, "guidance", self.dtype, device_ref)
        if "series" in self.graph_groups:
            add_series_graphs(module, self.dtype, device_ref)
        # Compiling takes minutes: what is wrong with a tokenizer is said before.
        self.init_remaining_components()
        self._check_supported(self.cache_config)
        if before_compile is not None:
            with memory_errors_said():
                before_compile(self)
        on_event("load", "end")
        on_event("compile", "start")
        compiled = compile_graphs(
            self.session, module, built.weights, built.expected, self.device
        )
        on_event("compile", "end")
        self.models = compiled.models
        self._weights = compiled.weights
        self.compile_count += 1
        self.seconds["compile"] = compiled.compile_seconds
        for component in self.loaded.values():
            component.bind(self.models)
            component.load_model()
        self.seconds["load"] = time.perf_counter() - started - compiled.compile_seconds


def _ignore(stage: str, what: str) -> None:
    """Progress that nobody asked for."""
