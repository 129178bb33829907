"""Pictures that are brought: files, bytes, Pillow's images and arrays, to pixels."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, TypeAlias

import numpy as np
from PIL import Image, ImageOps, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from ..core.pictures import Picture, PictureInputs, check_pixels
from ..errors import RequestError

PictureLike: TypeAlias = (
    Picture | str | os.PathLike[str] | bytes | Image.Image | np.ndarray
)
"""A picture as a caller has it."""
MAX_FILE_BYTES: Final = 2**28
_BAND_PIXELS: Final = 2**20
_WITH_ALPHA: Final = ("LA", "La", "PA", "RGBA", "RGBa")
# Read without Image.open, which only warns of pictures that are too large.
_READERS: Final[Mapping[bytes, Any]] = MappingProxyType(
    {
        b"\x89PNG\r\n\x1a\n": PngImagePlugin.PngImageFile,
        b"\xff\xd8\xff": JpegImagePlugin.jpeg_factory,
        b"RIFF": WebPImagePlugin.WebPImageFile,
    }
)
# Bits of the shades of gray that Pillow spreads over 8, but not that which a PNG calls
# transparent.
_FEW_BITS: Final[Mapping[str, int]] = MappingProxyType({"L;2": 2, "L;4": 4})
# What else there is, to be refused by its name.
_OTHERS: Final[Mapping[bytes, str]] = MappingProxyType(
    {
        b"GIF8": "a GIF",
        b"BM": "a BMP",
        b"II*\0": "a TIFF",
        b"MM\0*": "a TIFF",
        b"%PDF": "a PDF",
        b"<svg": "an SVG",
        b"<?xml": "XML",
        b"8BPS": "a Photoshop file",
    }
)
_BRANDS: Final[Mapping[bytes, str]] = MappingProxyType(
    {b"avif": "an AVIF", b"heic": "an HEIC", b"mif1": "an HEIC"}
)


def read_picture(given: PictureLike, where: str = "image") -> Picture:
    """Reads a picture to RGB.

    A file is turned as its EXIF orientation says. What is transparent is laid over
    white; palettes, gray and CMYK become RGB, and of 16 bits the upper 8 are kept. Of
    16 bits a single transparent colour (tRNS) is refused, a shade of gray is not.
    Pillow's images and arrays are taken as they lie.

    Args:
        given: A path, a file's bytes, an image of Pillow's, or uint8 ``(H, W)``,
            ``(H, W, 3)`` or ``(H, W, 4)``.
        where: What messages call it.

    Raises:
        RequestError: It is no such thing, damaged, animated or too large.
    """
    if isinstance(given, Picture):
        return given
    image, name = _opened(given, where)
    pixels = _guarded(name, lambda: _rgb(image, name))
    return Picture(pixels, name)


def read_mask(given: PictureLike, where: str = "mask") -> Picture:
    """Reads a mask, which is light where the picture is drawn anew.

    One that is transparent anywhere marks what is transparent, as in OpenAI's
    interface, and its colours say nothing.

    Args:
        given: As for :func:`read_picture`.
        where: What messages call it.

    Raises:
        RequestError: As for :func:`read_picture`.
    """
    if isinstance(given, Picture):
        return given
    image, name = _opened(given, where)
    return Picture(_guarded(name, lambda: _marks(image, name)), name)


def read_inputs(
    image: PictureLike | Sequence[PictureLike] | None,
    mask: PictureLike | None = None,
    strength: float | None = None,
) -> PictureInputs | None:
    """Returns what a request brings of pictures; ``None`` if it brings none.

    Args:
        image: One picture, or several.
        mask: What of it is drawn anew.
        strength: How much of it is lost in noise.

    Raises:
        RequestError: One of them is malformed, or there is no image.
    """
    if image is None:
        for name, value in (("mask", mask), ("strength", strength)):
            if value is not None:
                raise RequestError(
                    f"request: {name} must come with an image, which it is about; give "
                    "one, or leave it out"
                )
        return None
    given: Sequence[PictureLike] = (image,)  # type: ignore[assignment]
    if isinstance(image, list | tuple):
        given = image
    images = tuple(
        read_picture(each, "image" if len(given) == 1 else f"image {index + 1}")
        for index, each in enumerate(given)
    )
    return PictureInputs(images, None if mask is None else read_mask(mask), strength)


def _opened(given: PictureLike, where: str) -> tuple[Image.Image, str]:
    """The picture as Pillow has it, and what to call it."""
    if isinstance(given, Image.Image):
        check_pixels(where, *given.size)
        _check_key(given, where)
        return given, where
    if isinstance(given, np.ndarray):
        return _from_array(given, where), where
    if isinstance(given, str | os.PathLike):
        name = f"{where} {os.fspath(given)}"
        return _from_bytes(_file(Path(given), name), name), name
    if isinstance(given, bytes | bytearray | memoryview):
        return _from_bytes(bytes(given), where), where
    raise RequestError(
        f"{where}: expected a path, bytes, an image of Pillow's or a uint8 array, got "
        f"{type(given).__name__}"
    )


def _file(path: Path, name: str) -> bytes:
    if "\0" in name:
        raise RequestError(f"{name!r}: it cannot be read; there is a zero byte in it")
    try:
        if not path.is_file():
            reason = "it is no file" if path.exists() else "there is no such file"
            raise RequestError(f"{name}: {reason}; give a PNG, JPEG or WebP")
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise RequestError(
                f"{name}: a file must have at most {MAX_FILE_BYTES} bytes, got {size}"
            )
        return path.read_bytes()
    except OSError as err:
        raise RequestError(f"{name}: it cannot be read ({err.strerror})") from err


def _from_bytes(data: bytes, name: str) -> Image.Image:
    is_riff = data.startswith(b"RIFF") and data[8:12] != b"WEBP"
    readers = [r for magic, r in _READERS.items() if data.startswith(magic)]
    if not readers or is_riff:
        raise RequestError(f"{name}: expected a PNG, JPEG or WebP, got {_kind(data)}")
    image: Image.Image = _guarded(name, lambda: readers[0](io.BytesIO(data)))
    check_pixels(name, *image.size)  # its header's: nothing is decoded yet
    frames = getattr(image, "n_frames", 1)
    # A camera's JPEG may hold a preview, or another eye's picture, beside the first.
    if frames > 1 and image.format != "MPO":
        raise RequestError(
            f"{name}: expected one picture, got an animation of {frames} frames; give "
            "one of them"
        )
    _check_key(image, name)
    bits, key = _FEW_BITS.get(_stored_mode(image)), image.info.get("transparency")
    if bits and key is not None:
        most = 2**bits - 1
        image.info["transparency"] = (key & most) * 0xFF // most
    return _guarded(name, lambda: _upright(image))


def _stored_mode(image: Image.Image) -> str:
    """How a PNG that is not decoded yet has its pixels; of all others no mode."""
    tiles = getattr(image, "tile", ())
    mode = tiles[0][3] if tiles else ""
    return mode if isinstance(mode, str) else ""


def _check_key(image: Image.Image, name: str) -> None:
    """Refuses a transparent colour of 16 bits, which Pillow compares with 8."""
    key = image.info.get("transparency")
    if isinstance(key, tuple) and (
        _stored_mode(image).startswith("RGB;16") or max(key) > 0xFF
    ):
        raise RequestError(
            f"{name}: it has 16 bits a channel and one colour that is transparent "
            "(tRNS), which is not read; save it with an alpha channel, or 8 bits"
        )


def _upright(image: Image.Image) -> Image.Image:
    image.load()
    return ImageOps.exif_transpose(image)


def _guarded(name: str, action: Any) -> Any:
    """Runs a piece of Pillow, whose plugins raise what they like on damaged files."""
    try:
        return action()
    except RequestError:
        raise
    except Exception as err:
        reason = " ".join(str(err).split()) or type(err).__name__
        raise RequestError(
            f"{name}: it is damaged or cut off ({reason:.120}); give another"
        ) from err


def _kind(data: bytes) -> str:
    if not data:
        return "an empty file"
    if data[4:8] == b"ftyp":
        return _BRANDS.get(data[8:12], "a video")
    for magic, kind in _OTHERS.items():
        if data.startswith(magic):
            return kind
    is_text = b"\0" not in data[:512] and data[:512].decode("utf-8", "ignore").strip()
    return "text" if is_text and data[:512].isascii() else "something else"


def _from_array(array: np.ndarray, where: str) -> Image.Image:
    shape = [int(size) for size in array.shape]
    is_picture = len(shape) == 2 or (len(shape) == 3 and shape[2] in (1, 3, 4))
    if array.dtype != np.uint8 or not is_picture:
        fix = "; multiply 0..1 by 255 and round" if array.dtype.kind == "f" else ""
        raise RequestError(
            f"{where}: expected uint8 of shape (H, W), (H, W, 3) or (H, W, 4), got "
            f"{array.dtype} {shape}{fix}"
        )
    check_pixels(where, shape[1], shape[0])
    plain = array.reshape(shape[:2]) if shape[2:] == [1] else array
    return Image.fromarray(np.ascontiguousarray(plain))


def _has_alpha(image: Image.Image) -> bool:
    # Not by the bands' names: one of LAB's is called A.
    return image.mode in _WITH_ALPHA or "transparency" in image.info


def _eight_bits(image: Image.Image, name: str) -> Image.Image:
    """The upper half of 16 bits, as Pillow keeps of colours; all else as it is.

    A shade that is transparent is one of 16 bits, and becomes an alpha channel.
    Mode I holds 32 bits, of which a picture uses 8 or 16: 16 where a value says so.
    """
    if image.mode.startswith("I;16") or image.mode == "I":
        values = np.asarray(image)
        is_known = image.mode != "I" or values.max() > 0xFF or not values.any()
        if is_known and 0 <= values.min() <= values.max() <= 0xFFFF:
            upper = Image.fromarray((values >> 8).astype(np.uint8))
            key = image.info.get("transparency")
            if key is None:
                return upper
            opaque = Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8))
            return Image.merge("LA", (upper, opaque))
    if image.mode in ("I", "F"):
        raise RequestError(
            f"{name}: expected 8 or 16 bits, got Pillow's mode {image.mode}, whose "
            "range is not known; convert it to L, or give a uint8 array"
        )
    return image


def _rgb(image: Image.Image, name: str) -> np.ndarray:
    image = _eight_bits(image, name)
    return _by_bands(image, 3, _on_white if _has_alpha(image) else _colours)


def _marks(image: Image.Image, name: str) -> np.ndarray:
    image = _eight_bits(image, name)
    if _has_alpha(image):
        marks = _by_bands(image, 1, _transparent)
        if marks.any():
            return marks
    if image.mode in ("1", "L", "LA"):
        return _by_bands(image, 1, lambda band: np.asarray(band.convert("L")))
    return _by_bands(image, 3, _colours)


def _by_bands(
    image: Image.Image, channels: int, convert: Callable[[Image.Image], np.ndarray]
) -> np.ndarray:
    """Converts some rows after the other, so that only these are there several times.

    Args:
        image: As it was decoded.
        channels: Of what comes out.
        convert: To uint8 ``(h, W)`` or ``(h, W, channels)``, each pixel for itself.

    Returns:
        uint8 ``(H, W, channels)``, read-only.
    """
    pixels = np.empty((image.height, image.width, channels), np.uint8)
    rows = max(1, _BAND_PIXELS // image.width)
    for top in range(0, image.height, rows):
        bottom = min(top + rows, image.height)
        band = convert(image.crop((0, top, image.width, bottom)))
        pixels[top:bottom] = band.reshape(bottom - top, image.width, channels)
    pixels.flags.writeable = False
    return pixels


def _colours(band: Image.Image) -> np.ndarray:
    return np.asarray(band.convert("RGB"))


def _on_white(band: Image.Image) -> np.ndarray:
    colours = band.convert("RGBA")
    if colours.getchannel("A").getextrema() != (255, 255):
        paper = Image.new("RGBA", colours.size, "white")
        colours = Image.alpha_composite(paper, colours)
    return _colours(colours)


def _transparent(band: Image.Image) -> np.ndarray:
    return 255 - np.asarray(band.convert("RGBA").getchannel("A"))
