"""Pictures to PNG files that say how they were made."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from .errors import RequestError
from .report import RunReport


def check_writable(path: Path) -> None:
    """Refuses a path that could not be written, before anything is computed.

    Raises:
        RequestError: Not ``.png``, a folder, or in a folder that is missing or closed.
    """
    folder = path.parent
    if path.suffix.lower() != ".png":
        raise RequestError(f"output: {path} must end in .png, the format written")
    if path.is_dir():
        raise RequestError(f"output: {path} is a folder; give a file name in it")
    if not folder.is_dir():
        raise RequestError(f"output: the folder {folder} does not exist; make it first")
    if not os.access(folder, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise RequestError(f"output: {path} cannot be written; choose another folder")


def output_paths(path: Path, count: int) -> list[Path]:
    """``out.png`` for one picture, ``out-1.png`` ... for several."""
    if count == 1:
        return [path]
    return [path.with_stem(f"{path.stem}-{index + 1}") for index in range(count)]


def text_chunks(report: RunReport, index: int) -> dict[str, str]:
    """What the PNG of picture ``index`` says of itself.

    ``prompt`` and ``seed`` alone, for people; ``parameters`` all of it as JSON.
    """
    per_prompt = report.num_images // len(report.prompts)
    prompt = report.prompts[index // per_prompt]
    settings = {
        "prompt": prompt,
        "negative_prompt": report.negative_prompt,
        "seed": report.seed,
        "picture": index,
        "num_inference_steps": report.num_inference_steps,
        "guidance_scale": report.guidance_scale,
        "true_cfg_scale": report.true_cfg_scale,
        "height": report.height,
        "width": report.width,
        "model": report.model,
        "dtype": report.dtype,
        "cache": dict(report.cache),
        "versions": dict(report.versions),
    }
    return {
        "prompt": prompt,
        "seed": str(report.seed),
        "parameters": json.dumps(settings),
        "Software": f"max_diffusion {report.versions.get('max-diffusion', '')}".strip(),
    }


def save_png(path: Path, picture: np.ndarray, text: Mapping[str, str]) -> None:
    """Writes uint8 ``(H, W, 3)`` with text chunks; whole or not at all.

    Raises:
        RequestError: The file cannot be written.
    """
    info = PngInfo()
    for key, value in text.items():
        info.add_itxt(key, value)
    save_atomically(path, Image.fromarray(picture), info)


def save_atomically(path: Path, image: Image.Image, info: PngInfo | None = None) -> None:
    """Writes beside the target, then renames: an interrupted run leaves no half file."""
    partial = None
    try:
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=".", suffix=".png", delete=False
        ) as file:
            partial = Path(file.name)
            image.save(file, "PNG", pnginfo=info)
        # Temporary files are private; a picture has the usual permissions.
        mask = os.umask(0)
        os.umask(mask)
        partial.chmod(0o666 & ~mask)
        partial.replace(path)
    except OSError as err:
        raise RequestError(f"output: {path} cannot be written ({err.strerror})") from err
    finally:
        if partial is not None and partial.exists():
            partial.unlink()
