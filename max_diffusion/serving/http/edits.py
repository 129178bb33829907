"""``POST /v1/images/edits``: pictures from pictures, as OpenAI's clients send them."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Final

from fastapi import FastAPI, Request
from pydantic import Field

from ...core.pictures import PictureInputs
from ...media.pictures import read_inputs
from .backend import Backend, ModelDescription
from .desk import ERRORS, STREAM, Desk, described, documented_key
from .errors import ApiError, checked
from .forms import Form, is_form, read_form, values_of
from .schemas import ImageGenerationRequest, ImagesResponse
from .settings import ServerSettings
from .store import ImageStore

EDITS: Final = "/v1/images/edits"
VARIATIONS: Final = "/v1/images/variations"
UPLOAD_PATHS: Final = frozenset((EDITS, VARIATIONS))
"""Paths whose bodies may be forms with pictures."""
_FILES: Final = ("image", "mask")


class ImageEditRequest(ImageGenerationRequest):
    """Fields of ``POST /v1/images/edits`` beside its files, ``image`` and ``mask``."""

    strength: Annotated[
        float | None,
        Field(
            gt=0,
            le=1,
            allow_inf_nan=False,
            description="Share of the picture that is lost in noise, and of the steps "
            "that are run; default: the model's own.",
        ),
    ] = None


def add_edits(
    app: FastAPI,
    backend: Backend,
    settings: ServerSettings,
    store: ImageStore,
    schema: type[ImageEditRequest],
) -> None:
    """Adds the paths that take pictures.

    Args:
        app: The application.
        backend: Who draws.
        settings: Limits.
        store: Keeps pictures for ``response_format`` ``url``.
        schema: Of the text fields.
    """
    # A picture may take 600 MB while it is read: one after the other.
    reading = asyncio.Lock()

    @app.post(
        EDITS,
        dependencies=documented_key(settings),
        response_model=ImagesResponse,
        response_model_exclude_none=True,
        responses={**ERRORS, 200: STREAM},
        summary="Draw from a picture, or in a part of it",
        openapi_extra={"requestBody": _documented(schema)},
    )
    async def edit(request: Request) -> Any:
        """Draws from a picture, or where a mask of it is transparent or white."""
        model = await described(backend)
        form = await _form(request)
        _check_files(form, model)
        body = checked(values_of(form.texts, schema), schema)
        async with reading:
            inputs = await asyncio.to_thread(_inputs, form, body.strength)
        answer = Desk(backend, settings, store, request).answer(
            body, model, inputs, "image_edit"
        )
        del form, inputs  # the answer may be long in coming
        return await answer

    @app.post(VARIATIONS, include_in_schema=False)
    async def variations() -> None:
        raise ApiError(
            400,
            "variations: these models read text, not pictures, so that nothing says "
            f"what to vary; POST {EDITS} draws from a picture and a prompt",
            code="unsupported",
        )


async def _form(request: Request) -> Form:
    kind = request.headers.get("content-type", "")
    if not is_form(kind):
        raise ApiError(
            422,
            "body: expected multipart/form-data with the file image, got "
            f"{kind[:80] or 'no Content-Type'}",
            code="content_type",
            param="body",
        )
    # Not by body(), which keeps it for as long as there is the request.
    body = b"".join([chunk async for chunk in request.stream()])
    return await asyncio.to_thread(read_form, kind, body)


def _check_files(form: Form, model: ModelDescription) -> None:
    """Refuses files that the model does not take, before they are decoded."""
    if "image" not in model.inputs:
        raise ApiError(
            400,
            "image: this server draws from text alone; start it with --pictures, and a "
            "model that takes them",
            code="unsupported",
            param="image",
        )
    counts = {name: sum(file.field == name for file in form.files) for name in _FILES}
    for name, limit in (("image", model.max_pictures), ("mask", 1)):
        if counts[name] > limit:
            raise _bad(name, f"expected at most {limit} here, got {counts[name]}")
        if {name, f"{name}[]"} & form.texts.keys():
            raise _bad(name, "expected a file, got text; send it with a filename")
    for file in form.files:
        if file.field not in counts:
            raise _bad(file.field[:80], "expected no file; files are image and mask")
    for name in ("image", *model.needed_inputs):
        if not counts.get(name, 1):
            raise _bad(name, "a file is required, a PNG, JPEG or WebP")


def _inputs(form: Form, strength: float | None) -> PictureInputs | None:
    images = [file.data for file in form.files if file.field == "image"]
    masks = [file.data for file in form.files if file.field == "mask"]
    return read_inputs(images, masks[0] if masks else None, strength)


def _documented(schema: type[ImageEditRequest]) -> dict[str, Any]:
    """The form, for the document of the interface."""
    known = schema.model_json_schema()
    file = {"type": "string", "format": "binary"}
    known["properties"] = {
        "image": {
            **file,
            "description": "The picture: PNG, JPEG or WebP; several as image[], of "
            "models whose max_pictures in GET /v1/models is above 1.",
        },
        "mask": {
            **file,
            "description": "Where it is drawn anew: transparent, or white.",
        },
        **known["properties"],
    }
    known["required"] = ["image", *known.get("required", ())]
    return {
        "required": True,
        "content": {"multipart/form-data": {"schema": known}},
    }


def _bad(name: str, what: str) -> ApiError:
    return ApiError(400, f"{name}: {what}", code="invalid_value", param=name)
