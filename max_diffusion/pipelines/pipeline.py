"""The abstract pipeline: components, one compile, caches, and the denoising loop."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from max.driver import Buffer, Device
from max.dtype import DType
from max.engine import InferenceSession, Model

from ..caches import (
    AbstractCacheConfig,
    BoundCache,
    CacheDefaults,
    DenoisingCacheConfig,
    DenoisingCacheState,
    FirstBlockConfig,
    GraphGroup,
    Run,
)
from ..core.buffers import place_steps, to_numpy
from ..core.grid import Grid
from ..denoising import Branch, DenoiserComponent, Denoising, OwnTransformer
from ..errors import MaxDiffusionError
from ..execution.batcher import Batcher
from ..execution.component import ComponentModel
from ..execution.graph_call import run
from ..sampling import (
    AbstractGuidance,
    AbstractSampler,
    FlowMatchEulerConfig,
    FlowMatchEulerSampler,
    KeptPicture,
    LinearGuidance,
    RequestSampling,
    Schedule,
)
from .adapters import AdapterSets
from .cache_support import CacheSupport, resolve_cache, wanted_caches
from .graphs import PipelineGraphs
from .loading import PipelineConfig, open_pipeline_components
from .outputs import Denoised, DiffusionPipelineOutput, OnEvent, OnStep


class DiffusionPipeline(ABC):
    """Base of every model's pipeline, by MAX's documented contract.

    A subclass names its ``components``. The constructor has two phases. It opens the
    model: makes each component, builds their graphs, checks their files and calls
    :meth:`init_remaining_components`; from then on requests can be checked. Then
    :meth:`compile` compiles all graphs, or reads them compiled, and loads the weights.
    ``execute(prepare_inputs(context))`` in a loop is the serving contract: whatever a
    request leaves behind dies with its inputs.

    A subclass with a ``DenoiserComponent`` gets every cache. One without overrides
    :meth:`run_transformer` by the documented contract.

    Args:
        pipeline_config: Components' configurations and the compute dtype.
        session: Shared session that compiles and runs. ``None`` only opens the model:
            :meth:`compile` is called later, or never.
        devices: Devices; the first one is used.
        weight_paths: Safetensors files, in folders named after the components.
        cache_config: Denoising cache of requests that bring none of their own.
        on_event: Called with ``(stage, "start" | "end")`` for load and compile.

    Raises:
        ModelLoadError: Weights missing, left over, of another shape or dtype.
        CompileError: MAX refused a graph.
    """

    components: dict[str, type[ComponentModel]] | None = None
    picture_components: Mapping[
        str, tuple[str, type[ComponentModel]]
    ] = {}  # as components
    """Components that only requests with pictures need, by name: the component whose
    configuration and files they have, and their class."""
    unprefixed_weight_component: str | None = None
    default_num_inference_steps: int = 50
    default_residual_threshold: float = 0.05
    default_taylorseer_cache_interval: int = 5
    default_taylorseer_max_order: int = 1
    default_taylorseer_warmup_steps: int = 9

    def __init__(
        self,
        pipeline_config: PipelineConfig,
        session: InferenceSession | None,
        devices: list[Device],
        weight_paths: Sequence[Path],
        cache_config: DenoisingCacheConfig | AbstractCacheConfig | None = None,
        *,
        on_event: OnEvent | None = None,
    ) -> None:
        started = time.perf_counter()
        self.pipeline_config = pipeline_config
        self.devices = devices
        on_event = on_event or (lambda stage, what: None)
        on_event("load", "start")
        self.sampler: AbstractSampler = FlowMatchEulerSampler(FlowMatchEulerConfig())
        """What :meth:`init_remaining_components` may replace by the model's own."""
        self.guidance: AbstractGuidance = LinearGuidance()
        """The same of how predictions are combined under true guidance."""
        defaults = CacheDefaults(
            self.default_residual_threshold,
            self.default_taylorseer_cache_interval,
            self.default_taylorseer_max_order,
            self.default_taylorseer_warmup_steps,
        )
        self.cache_config = resolve_cache(cache_config, defaults)
        wanted, groups = wanted_caches(pipeline_config.caches, self.cache_config)
        opened = open_pipeline_components(
            type(self).__name__,
            self.components,
            self.unprefixed_weight_component,
            pipeline_config,
            devices,
            weight_paths,
            groups,
            self.picture_components,
        )
        self.graphs = PipelineGraphs(
            opened,
            groups,
            self.device,
            on_event,
            takes_pictures=pipeline_config.takes_pictures,
            offload_text_encoders=pipeline_config.offload_text_encoders,
        )
        """Components with their graphs, compiled or not."""
        self.adapters = AdapterSets(
            self.graphs, self.device, pipeline_config.adapter_memory_limit
        )
        """LoRAs that requests choose."""
        self.loaded: Mapping[str, ComponentModel] = opened.components
        self.caches = CacheSupport(
            defaults,
            pipeline_config.calibration,
            self._transformer,
            self.denoiser,
            wanted,
            is_extensible=pipeline_config.is_extensible,
        )
        # Compiling takes minutes: what is wrong with a tokenizer is said before.
        self.init_remaining_components()
        self.caches.check(self.cache_config)
        self._open_seconds = time.perf_counter() - started
        on_event("load", "end")
        if session is not None:
            self.compile(session)

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

    @property
    def models(self) -> Mapping[str, Model]:
        """The executable graphs by name.

        Raises:
            MaxDiffusionError: The model was only opened.
        """
        return self.graphs.models

    @property
    def graph_groups(self) -> frozenset[GraphGroup]:
        """Graphs that are compiled, or will be when the pipeline is."""
        return self.graphs.groups

    @property
    def compile_count(self) -> int:
        """Modules compiled so far: 1, and 1 for each time requests needed more."""
        return self.graphs.compile_count

    @property
    def seconds(self) -> Mapping[str, float]:
        """What it took to get here, by stage: load, compile."""
        return {
            "load": self._open_seconds + self.graphs.load_seconds,
            "compile": self.graphs.compile_seconds,
        }

    @abstractmethod
    def init_remaining_components(self) -> None:
        """Sets up what is no ComponentModel: tokenizers, the sampler, guidance.

        Called before anything compiles: components are in ``loaded``, but no graph can
        run yet.
        """

    @abstractmethod
    def prepare_inputs(self, context: Any) -> Any:
        """Numbers of a request to device buffers; keeps nothing."""

    @abstractmethod
    def execute(self, model_inputs: Any, **kwargs: Any) -> DiffusionPipelineOutput:
        """Prepared inputs to pictures; keeps nothing."""

    def compile(self, session: InferenceSession | None = None) -> None:
        """Compiles all graphs and loads the weights; once, after opening.

        Args:
            session: What compiles, and runs; a new one on the device by default.

        Raises:
            ModelLoadError: A weight is not finite.
            CompileError: MAX refused a graph.
            DeviceError: The weights do not fit, or a LoRA of ``adapters`` beside them.
        """
        self.adapters.check_room()
        self.graphs.compile(session, self.sampler, self.guidance, self.dtype)
        self.adapters.check_limit()

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
        cache: BoundCache | AbstractCacheConfig | None = None,
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
            cache: This request's instead of the pipeline's.
            run: What caches may know of the request beforehand: its number of steps
                and their timesteps, for those that need them.

        Raises:
            RequestError: The cache needs to know more of the run, or its rules name
                steps that the run does not have.
        """
        run = Run() if run is None else run
        bound = self.caches.bound(cache, self.cache_config, run.num_steps)
        self.graphs.require(bound.config.graph_groups, self.denoiser)
        known = replace(run, required_steps=bound.required_steps)
        threshold = 0.0
        if isinstance(bound.config, FirstBlockConfig):
            threshold = bound.config.threshold
        return DenoisingCacheState(
            bound.policy,
            bound.policy.create_state(known),
            bound.required_steps,
            residual_threshold=threshold,
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
        routine = self._transformer.run_step(cache_state, step, kwargs)
        return run(self.models, routine)

    def denoise(
        self,
        latents: Buffer,
        schedule: Schedule,
        branches: Sequence[Branch],
        *,
        true_cfg_scale: float = 1.0,
        cache: BoundCache | AbstractCacheConfig | None = None,
        grid: Grid | None = None,
        is_timed: bool = False,
        on_step: OnStep | None = None,
    ) -> Denoised:
        """The denoising loop.

        Args:
            latents: Noise, float32 ``(B, S_img, C)``; not changed.
            schedule: Sigmas and timesteps.
            branches: The conditional branch, and the unconditional one with true
                guidance; each has a cache state of its own.
            true_cfg_scale: Weight of the conditional branch with two branches.
            cache: This request's instead of the pipeline's.
            grid: Where the image tokens lie, for caches that need to know.
            is_timed: Whether each step is timed on a GPU too.
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
            is_timed=is_timed,
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
        cache: BoundCache | AbstractCacheConfig | None = None,
        grid: Grid | None = None,
        kept: KeptPicture | None = None,
        sampling: RequestSampling | None = None,
        is_timed: bool = False,
    ) -> Denoising:
        """The denoising loop before its first step; arguments of :meth:`denoise`.

        ``kept`` is what is put back of a known picture after every step, and
        ``sampling`` what of it is the request's own.
        """
        batch, seq_len, _ = (int(size) for size in latents.shape)
        if len(branches) not in (1, 2):
            raise MaxDiffusionError(
                "denoise: expected the conditional branch, and with true guidance the "
                f"unconditional one, got {len(branches)} branches"
            )
        if grid is not None and grid.num_tokens != seq_len:
            raise MaxDiffusionError(
                f"denoise: grid must have as many cells as the latents have tokens, "
                f"{seq_len}, got {grid}"
            )
        bound = self.caches.bound(cache, self.cache_config, schedule.num_steps)
        known = Run(
            schedule.num_steps,
            tuple(float(timestep) for timestep in schedule.timesteps),
            required_steps=bound.required_steps,
            grid=grid,
            has_guidance=len(branches) == 2,
            skipped_steps=schedule.skipped_steps,
        )
        own = sampling or RequestSampling()
        rule = own.guidance or self.guidance
        config = self.pipeline_config.components.get("transformer", {})
        states = tuple(
            self.create_cache_state(
                batch,
                seq_len,
                config,
                cache=bound,
                run=replace(known, is_unconditional=index > 0),
            )
            for index in range(len(branches))
        )
        return Denoising(
            latents,
            schedule,
            place_steps(schedule.timesteps, batch, self.device),
            tuple(branches),
            states,
            bound.policy.create_guidance(known) if known.has_guidance else None,
            self.sampler.create_state(schedule, batch, self.device, own.draw_noise),
            rule,
            rule.scales(true_cfg_scale, schedule),
            self.graphs.routed(self._transformer.run_step),
            self.device,
            kept=kept,
            is_timed=is_timed or self.device.is_host,
        )

    def run_steps(self, denoising: Denoising, *, on_step: OnStep | None = None) -> None:
        """Takes all the steps that are left, alone; arguments of :meth:`denoise`."""
        batcher = Batcher(self.models, len(denoising.branches) * denoising.batch)
        while not denoising.is_done:
            batcher.run_one(denoising.advance())
            if on_step is not None:
                on_step(denoising.step, denoising.schedule.num_steps)

    def finish(self, denoising: Denoising) -> Denoised:
        """What a loop that took all its steps gives.

        Raises:
            MaxDiffusionError: The latents are not finite.
        """
        if not np.isfinite(to_numpy(denoising.latents)).all():
            raise MaxDiffusionError(
                f"{self.pipeline_config.model_name or type(self).__name__}: the "
                "latents are not finite after the last step, so there is no picture; "
                "try float32, or check the weights"
            )
        return Denoised(
            denoising.latents, tuple(denoising.records), denoising.cache_bytes
        )

    @property
    def _transformer(self) -> DenoiserComponent | OwnTransformer:
        """What runs a step: the split denoiser, unless a subclass does it itself."""
        denoiser = self.denoiser
        is_split = type(self).run_transformer is DiffusionPipeline.run_transformer
        if denoiser is not None and is_split:
            return denoiser
        return OwnTransformer(self.run_transformer, type(self).__name__, self.device)
