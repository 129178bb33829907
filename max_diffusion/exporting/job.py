"""One module for one target, compiled in the process that calls this."""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, final

from ..core.files import prepared_folder
from ..errors import MaxDiffusionError
from ..execution.artefacts import (
    Artefact,
    ArtefactError,
    Manifest,
    artefacts_in,
    compiler_versions,
    write_artefact,
    write_manifest,
)
from ..execution.targets import parse_target

if TYPE_CHECKING:
    from ..execution.graph_module import GraphModule
    from ..pipelines.text_to_image import TextToImagePipeline


@final
@dataclass(frozen=True)
class Model:
    """What graphs are compiled of: arguments of ``open_model``."""

    path: str = "demo"
    dtype: str | None = None
    """``float32`` or ``bfloat16``; by default the one of the target's device."""
    caches: str | None = None
    """Caches whose graphs are compiled, as ``--caches`` names them; by default those
    that are loaded with a model."""
    transformer: str | None = None
    pictures: bool = False
    """Whether the graphs for pictures that requests bring are compiled too."""
    variant: str | None = None
    revision: str | None = None
    plugins: tuple[str, ...] = ()
    """What declares the model's family or its caches; a job's process loads them."""

    def open(self, device: str) -> TextToImagePipeline:
        """Opens the model; reads no weights but their names, shapes and dtypes."""
        from ..caches import caches_from_text
        from ..pipelines.loading import LEAN_CACHES
        from ..pipelines.opening import open_model

        caches = LEAN_CACHES if self.caches is None else caches_from_text(self.caches)
        return open_model(
            self.path,
            device=device,
            dtype=self.dtype,
            caches=caches,
            transformer=self.transformer,
            takes_pictures=self.pictures,
            variant=self.variant,
            revision=self.revision,
        )


@final
@dataclass(frozen=True)
class Job:
    """One module for one target."""

    model: Model
    module: str
    target: str
    output: str

    def run(self) -> tuple[Artefact, float]:
        """Compiles the module and writes it, unless the folder has it.

        For a processor or a GPU that is not this machine's, which MAX has to be told
        before it makes a device: this process can run no graph afterwards, and a target
        that MAX knows otherwise than we do aborts it.

        Returns:
            What was written, and the seconds that compiling took, 0 if it was there.

        Raises:
            MaxDiffusionError: The model or the folder is at fault.
        """
        from max import driver

        target = parse_target(self.target)
        driver.set_virtual_cpu_target(target.host.descriptor)
        if target.gpu is not None:
            api, _, architecture = target.gpu.partition(":")
            driver.set_virtual_device_api(api)
            driver.set_virtual_device_target_arch(architecture)
            driver.set_virtual_device_count(1)
        pipeline = self.model.open("cpu" if target.gpu is None else "gpu")
        modules = {module.name: module for module in modules_of(pipeline)}
        if self.module not in modules:
            raise MaxDiffusionError(
                f"compile: {self.model.path} has no module {self.module} "
                f"({', '.join(modules)})"
            )
        module, folder = modules[self.module], Path(self.output)
        there = up_to_date(module, folder, target.name)
        if there is not None:
            return there, 0.0
        started = time.perf_counter()
        mef = _compiled(pipeline, module)
        seconds = time.perf_counter() - started
        with locked(prepared_folder(folder / target.name)):
            # Of two that compiled the same, the first one's stays.
            there = up_to_date(module, folder, target.name)
            manifest = manifest_of(module, target.name)
            return there or write_artefact(folder, manifest, mef), seconds


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other writers out of a folder, where its file system has locks."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        # Some that machines share have none; what took minutes is written all the same.
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def modules_of(pipeline: TextToImagePipeline) -> list[GraphModule]:
    """Returns every module of an opened model that its caches need."""
    return pipeline.graphs.modules(pipeline.sampler, pipeline.guidance, pipeline.dtype)


def up_to_date(module: GraphModule, folder: Path, target: str) -> Artefact | None:
    """Returns what a folder has of these very graphs; its manifest is made today's."""
    own_folder = folder / target
    for found in artefacts_in(own_folder, module.name):
        if found.manifest.key != module.key or found.manifest.target != target:
            continue
        try:
            found.packed()
        except ArtefactError:
            continue
        manifest = replace(manifest_of(module, target), sha256=found.manifest.sha256)
        if manifest == found.manifest:
            return found
        return write_manifest(Artefact(own_folder, manifest))
    return None


def manifest_of(module: GraphModule, target: str) -> Manifest:
    """Describes a module that was compiled for a target, but not its file."""
    return Manifest(
        name=module.name,
        key=module.key,
        subject=module.subject,
        recipe=module.recipe,
        target=target,
        versions=compiler_versions(),
        graphs=tuple(module.module.top_level_graph_names()),
        sha256="",
        needs=module.needs,
    )


def _compiled(pipeline: TextToImagePipeline, module: GraphModule) -> bytes:
    from ..execution.compiler import compiled_module, open_session

    session = open_session(pipeline.device)
    compiled = compiled_module(session, module)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "module.mef"
        compiled.export_mef(path)
        return path.read_bytes()
