"""Pictures to PNG files that say how they were made."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from .errors import RequestError
from .files import write_file, written_file
from .report import RunReport


def check_writable(path: Path, where: str, suffix: str = ".png") -> None:
    """Refuses a path that could not be written, before anything is computed.

    Raises:
        RequestError: A folder, of another suffix, or in a folder that is missing or
            closed.
    """
    try:
        folder = written_file(path).parent
        if path.is_dir():
            raise RequestError(f"{where}: {path} is a folder; give a file name in it")
        if path.suffix.lower() != suffix:
            raise RequestError(
                f"{where}: {path} must end in {suffix}, the only format written"
            )
        if not folder.is_dir():
            what = "is not a folder" if folder.exists() else "does not exist"
            raise RequestError(f"{where}: {folder} {what}; make it or choose another")
        is_closed = path.exists() and not os.access(path, os.W_OK)
    except OSError as err:  # a name too long, a folder that may not be looked into
        raise RequestError(
            f"{where}: {path} cannot be written ({err.strerror}); choose another path"
        ) from err
    if is_closed or not os.access(folder, os.W_OK | os.X_OK):
        raise RequestError(
            f"{where}: {path} cannot be written (no permission); choose another path"
        )


def output_paths(path: Path, count: int) -> list[Path]:
    """``out.png`` for one picture, ``out-1.png`` ... for several."""
    if count == 1:
        return [path]
    return [path.with_stem(f"{path.stem}-{index + 1}") for index in range(count)]


def text_chunks(report: RunReport, index: int) -> dict[str, str]:
    """What the PNG of picture ``index`` says of itself.

    ``prompt`` and ``seed`` alone, for people; ``parameters`` all of it as JSON.
    """
    place = index * len(report.prompts) // report.num_images
    prompt, seed = report.prompts[place], report.seed_of(index)
    run = report.to_dict()
    shared = (
        "num_inference_steps",
        "guidance_scale",
        "true_cfg_scale",
        "max_sequence_length",
        "height",
        "width",
        "model",
        "device",
        "dtype",
        "cache",
        "versions",
    )
    own = {
        name: texts[place] if isinstance(texts, tuple) else texts
        for name, texts in (
            ("prompt_2", report.prompt_2),
            ("negative_prompt", report.negative_prompt),
            ("negative_prompt_2", report.negative_prompt_2),
        )
    }
    settings = {
        "prompt": prompt,
        **own,
        "picture": index,
        "num_images": report.num_images,
        "seed": seed,
        # Whether the seed draws this picture alone, or only all of them together.
        "has_own_seed": bool(report.seeds) or report.num_images == 1,
        **{name: run[name] for name in shared},
    }
    return {
        "prompt": prompt,
        "seed": str(seed),
        "parameters": json.dumps(settings),
        "Software": f"max_diffusion {report.versions.get('max-diffusion', '')}".strip(),
    }


def encoded(
    picture: np.ndarray, kind: str, quality: int, text: Mapping[str, str]
) -> bytes:
    """One picture as the bytes of a file.

    Args:
        picture: uint8 ``(H, W, 3)``.
        kind: ``png``, ``jpeg`` or ``webp``.
        quality: 0 to 100, of the latter two.
        text: Text chunks of a PNG, by keyword.
    """
    buffer = io.BytesIO()
    image = Image.fromarray(picture)
    if kind == "png":
        # Half the default's time; a fifth larger.
        image.save(buffer, "PNG", pnginfo=_png_info(text), compress_level=3)
    else:
        image.save(buffer, kind.upper(), quality=quality)
    return buffer.getvalue()


def save_png(path: Path, picture: np.ndarray, text: Mapping[str, str]) -> None:
    """Writes one picture with text chunks; whole or not at all.

    Args:
        path: File to write; replaced if it is there.
        picture: uint8 ``(H, W, 3)``.
        text: Text chunks by keyword; any Unicode.

    Raises:
        RequestError: The file cannot be written.
    """
    save_atomically(path, Image.fromarray(picture), _png_info(text))


def _png_info(text: Mapping[str, str]) -> PngInfo:
    info = PngInfo()
    for key, value in text.items():
        info.add_itxt(key, value)
    return info


def save_atomically(
    path: Path, image: Image.Image, info: PngInfo | None = None
) -> None:
    """Writes a PNG, whole or not at all.

    Raises:
        RequestError: The file cannot be written.
    """
    write_file(path, lambda file: image.save(file, "PNG", pnginfo=info))
