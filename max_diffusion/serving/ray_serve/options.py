"""Options that may be set when a service is started."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from max.driver import accelerator_count
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from ...caches import cache_from_options, caches_from_text
from ...engine import EngineConfig
from ...errors import RequestError
from ...pipelines.opening import DEMO_MODELS
from ..http import ServerSettings
from ..http.run import Model


def _names(value: Any) -> Any:
    """Splits ``none,taylorseer``, as ``serve run`` gives it; a file gives a list."""
    return tuple(value.split(",")) if isinstance(value, str) else value


def _json(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value


class Options(BaseModel):
    """Options of :func:`app`, by the names that ``max-diffusion serve`` has for them.

    Ray starts a replica when the requests that run and wait, averaged over
    ``look_back_period`` seconds, have been more than ``target_ongoing_requests`` a
    replica for ``upscale_delay`` seconds, and stops one after ``downscale_delay``
    seconds of fewer.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model: Annotated[
        str, Field(description="demo, demo-video, a diffusers folder or a hub repo id.")
    ] = "demo"
    transformer: Annotated[
        str | None,
        Field(description="File of its weights, at the same path on every node."),
    ] = None
    variant: str | None = None
    revision: str | None = None
    device: Annotated[
        Literal["auto", "cpu", "gpu"],
        Field(description="auto: gpu if the machine that builds the app has one."),
    ] = "auto"
    dtype: Literal["float32", "bfloat16"] | None = None
    cache: Annotated[str, Field(description="Of requests that name none.")] = "none"
    cache_options: Annotated[dict[str, Any], BeforeValidator(_json)] = {}
    caches: Annotated[
        tuple[str, ...],
        BeforeValidator(_names),
        Field(description="What requests may name, as in serve --caches."),
    ] = ("none", "taylorseer", "auto", "step-mask")
    calibration: str | None = None
    loras: Annotated[
        dict[str, str],
        BeforeValidator(_json),
        Field(description="LoRA files by names for requests, the same on every node."),
    ] = {}
    lora_memory: Annotated[
        int | None,
        Field(
            ge=1, description="Bytes of what they change; None: quarter of the free."
        ),
    ] = None
    precompiled: Annotated[
        tuple[str, ...],
        BeforeValidator(_names),
        Field(description="Folders of max-diffusion compile, the same on every node."),
    ] = ()
    require_precompiled: Annotated[
        bool, Field(description="Fail where graphs would have to be compiled.")
    ] = False
    pictures: Annotated[
        bool, Field(description="Take pictures to start from, as serve --pictures.")
    ] = False
    offload_text_encoders: Annotated[
        bool, Field(description="Keep them in memory only while they encode.")
    ] = False

    threads: Annotated[
        int | None,
        Field(
            ge=1,
            description="Of a replica, that compute on the CPU; None: one a CPU.",
        ),
    ] = None

    min_replicas: Annotated[int, Field(ge=1)] = 1
    max_replicas: Annotated[
        int | None,
        Field(ge=1, description="None: one a GPU of this machine, else min_replicas."),
    ] = None
    cpus: Annotated[
        float, Field(ge=0, description="CPUs that Ray reserves for a replica.")
    ] = 1.0
    target_ongoing_requests: Annotated[
        float,
        Field(gt=0, description="Requests a replica is to have; 8 fill a batch."),
    ] = 8.0
    look_back_period: Annotated[float, Field(gt=0, description="Seconds.")] = 30.0
    upscale_delay: Annotated[float, Field(ge=0, description="Seconds.")] = 30.0
    downscale_delay: Annotated[float, Field(ge=0, description="Seconds.")] = 600.0
    max_ongoing_requests: Annotated[
        int,
        Field(ge=1, description="Of a replica; more wait until any one has room."),
    ] = 64
    max_queued_requests: Annotated[
        int, Field(ge=0, description="That wait for any replica; then 429.")
    ] = 256
    drain_timeout: Annotated[
        float, Field(ge=0, description="Seconds a replica that is stopped has left.")
    ] = 30.0
    health_check_period: Annotated[
        float, Field(gt=0, description="Seconds; three failures replace a replica.")
    ] = 5.0

    access_log: Annotated[
        bool, Field(description="A line for every request, and every report.")
    ] = False

    served_model_name: str | None = None
    api_key_file: Annotated[
        str | None,
        Field(description="A key a line, where the app is built and where it runs."),
    ] = None
    cors_origins: Annotated[
        tuple[str, ...],
        BeforeValidator(_names),
        Field(description="Whose pages may ask from a browser, separated by commas."),
    ] = ()
    max_prompt_length: int = 32_000
    max_n: int = 10
    max_size: int = 2048
    max_steps: int = 200
    max_frames: Annotated[int, Field(description="Most frames of a video.")] = 161
    timeout: Annotated[
        float, Field(description="Seconds a request gets at most, a retry included.")
    ] = 600.0

    max_step_samples: int = 16
    max_batch: int = 8
    memory_limit: Annotated[
        int | None,
        Field(description="Bytes of a replica's requests; None: half of the free."),
    ] = None

    def loader(self) -> Model:
        """Returns what each replica loads.

        Raises:
            RequestError: No such cache, a setting out of range, or one of no effect.
        """
        if self.lora_memory is not None and not self.loras:
            raise RequestError(
                "ray_serve: lora_memory has no effect without loras; leave it out, or "
                "name files"
            )
        return Model(
            path=self._folder or self.model,
            device=self.kind,
            dtype=self.dtype,
            cache=cache_from_options(self.cache, self.cache_options),
            caches=caches_from_text(",".join(self.caches), "ray_serve: caches"),
            calibration=self.calibration and str(Path(self.calibration).resolve()),
            transformer=self.transformer and str(Path(self.transformer).resolve()),
            variant=self.variant,
            revision=self.revision,
            adapters={name: str(Path(f).resolve()) for name, f in self.loras.items()},
            adapter_memory_limit=self.lora_memory,
            precompiled=[str(Path(each).resolve()) for each in self.precompiled],
            require_precompiled=self.require_precompiled,
            threads=self.threads,
            takes_pictures=self.pictures,
            offload_text_encoders=self.offload_text_encoders,
        )

    def settings(self) -> ServerSettings:
        """Returns what the service allows; without keys, which others need not know.

        Raises:
            RequestError: A limit is out of range.
        """
        shown = Path(self._folder).name if self._folder else self.model
        return ServerSettings(
            model=self.served_model_name or shown,
            cors_origins=self.cors_origins,
            max_prompt_length=self.max_prompt_length,
            max_n=self.max_n,
            max_size=self.max_size,
            max_steps=self.max_steps,
            max_frames=self.max_frames,
            timeout=self.timeout,
        )

    def engine(self) -> EngineConfig:
        """Returns the limits of each replica's engine.

        Raises:
            RequestError: A limit is out of range.
        """
        return EngineConfig(
            max_running=self.max_ongoing_requests,
            max_step_samples=self.max_step_samples,
            max_batch=self.max_batch,
            memory_limit=self.memory_limit,
        )

    @property
    def kind(self) -> str:
        """Kind of device of the replicas: ``cpu`` or ``gpu``; Ray says which one."""
        if self.device != "auto":
            return self.device
        return "gpu" if accelerator_count() else "cpu"

    @property
    def most_replicas(self) -> int:
        """Largest number of replicas: ``max_replicas``, or its default."""
        if self.max_replicas is not None:
            return self.max_replicas
        devices = accelerator_count() if self.kind == "gpu" else 1
        return max(self.min_replicas, devices)

    @property
    def _folder(self) -> str | None:
        """Absolute path of the model's folder, as replicas run in other folders.

        ``None`` if the model is a name.
        """
        is_folder = self.model not in DEMO_MODELS and Path(self.model).is_dir()
        return str(Path(self.model).resolve()) if is_folder else None
