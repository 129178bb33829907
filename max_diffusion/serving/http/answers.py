"""Creates what is sent to clients from what the engine tells."""

from __future__ import annotations

import base64
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

import numpy as np

from ...core.report import RunReport
from ...engine import Event, Failed, Finished, Preview, Started, StepTaken
from ...media.metadata import text_chunks
from ...media.writers import encoded
from ...pipelines.outputs import GenerationResult, images_of
from .errors import api_error
from .schemas import (
    ImageData,
    ImageGenerationRequest,
    ImagesResponse,
    Summary,
    TokenDetails,
    Usage,
)
from .store import ImageStore

_QUALITY: Final = 90


@dataclass(frozen=True)
class Answers:
    """Creates the answers to one request from the engine's results and events."""

    body: ImageGenerationRequest
    model: str
    store: ImageStore
    address: str
    """URL, up to the name, where images that are kept can be fetched."""
    task: Literal["image_generation", "image_edit"] = "image_generation"
    """What names of events begin with."""

    @property
    def kind(self) -> str:
        """Format of the images: ``png``, ``jpeg`` or ``webp``."""
        return self.body.output_format or "png"

    def response(self, result: GenerationResult) -> ImagesResponse:
        """Creates the answer to a request without a stream."""
        report = replace(result.report, model=self.model)
        data = []
        for index, picture in enumerate(result.images):
            file = self._file(picture, text_chunks(report, index))
            if self.body.response_format == "url":
                name = self.store.put(file, self.kind)
                data.append(ImageData(url=self.address + name))
            else:
                data.append(ImageData(b64_json=base64.b64encode(file).decode()))
        return ImagesResponse(
            created=int(time.time()),
            data=data,
            output_format=self.body.output_format or "png",
            size=f"{report.width}x{report.height}",
            usage=_usage(report),
            max_diffusion=self._summary(report),
        )

    def events(self, event: Event) -> list[dict[str, Any]]:
        """Returns what a stream sends for an event of the engine."""
        if isinstance(event, Started) and self.body.progress:
            return [{"type": f"{self.task}.started"}]
        if isinstance(event, StepTaken) and self.body.progress:
            return [{"type": f"{self.task}.progress", **_progress(event)}]
        if isinstance(event, Preview):
            return [
                self._image_event("partial_image", picture, {}, index)
                | {"partial_image_index": event.index, "step": event.step}
                for index, picture in enumerate(images_of(event.frames))
            ]
        if isinstance(event, Finished):
            report = replace(event.result.report, model=self.model)
            usage = _usage(report).model_dump()
            summary = self._summary(report).model_dump(exclude_none=True)
            return [
                self._image_event(
                    "completed", picture, text_chunks(report, index), index
                )
                | {"usage": usage, "max_diffusion": summary}
                for index, picture in enumerate(event.result.images)
            ]
        if isinstance(event, Failed):
            return [{"type": "error", **api_error(event.error).body}]
        return []

    def _image_event(
        self, kind: str, picture: np.ndarray, text: Mapping[str, str], index: int
    ) -> dict[str, Any]:
        height, width = picture.shape[:2]
        return {
            "type": f"{self.task}.{kind}",
            "b64_json": base64.b64encode(self._file(picture, text)).decode(),
            "background": "opaque",
            "created_at": int(time.time()),
            "output_format": self.kind,
            "quality": "auto",
            "size": f"{width}x{height}",
            "image_index": index,
        }

    def _file(self, picture: np.ndarray, text: Mapping[str, str]) -> bytes:
        quality = self.body.output_compression
        return encoded(
            picture, self.kind, _QUALITY if quality is None else quality, text
        )

    def _summary(self, report: RunReport) -> Summary:
        return summary_of(report, bool(self.body.report), self.body.warnings())


def summary_of(
    report: RunReport, is_whole: bool, warnings: Iterable[str] = ()
) -> Summary:
    """Creates what every answer tells of a run.

    Args:
        report: Of the run.
        is_whole: Whether the report itself is told, too.
        warnings: Warnings beside those of the run.
    """
    return Summary(
        seed=report.seed,
        steps=report.num_steps,
        cache=str(report.cache["name"]),
        full_passes=report.full_passes,
        total_passes=report.total_passes,
        cache_bytes=report.cache_bytes,
        seconds=report.total_seconds,
        warnings=[*warnings, *report.warnings],
        report=report.to_dict() if is_whole else None,
    )


def _progress(event: StepTaken) -> dict[str, Any]:
    return {
        "step": event.step,
        "num_steps": event.num_steps,
        "branches": [
            {
                "branch": record.branch,
                "actions": list(record.actions),
                "signal": _finite(record.signal),
                "milliseconds": record.milliseconds,
                "is_time_shared": record.is_time_shared,
                "sigma": record.sigma,
            }
            for record in event.records
        ],
    }


def _finite(values: tuple[float, ...] | None) -> list[float | None] | None:
    if values is None:
        return None
    return [value if np.isfinite(value) else None for value in values]


def _usage(report: RunReport) -> Usage:
    text = report.text_tokens * len(report.prompts)
    drawn = report.image_tokens * report.num_images
    # A reference is read at a size of its own, a picture to start from at the image's.
    read = report.reference_tokens or report.image_tokens * len(report.images)
    return Usage(
        input_tokens=text + read,
        output_tokens=drawn,
        total_tokens=text + read + drawn,
        input_tokens_details=TokenDetails(text_tokens=text, image_tokens=read),
    )
