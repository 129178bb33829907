"""What an image says of itself, in the places that other programs look at.

| | PNG | JPEG, WebP | GIF, MP4 |
|---|---|---|---|
| for people and their programs | text ``parameters`` | EXIF ``UserComment`` | |
| all of it, as JSON | text ``max_diffusion`` | XMP ``SETTINGS_NAMESPACE`` | comment |
| the program | text ``Software`` | EXIF ``Software`` | |

The first has the form that AUTOMATIC1111's web UI gave it, which Civitai, SD Prompt
Reader and others read: the prompt, ``Negative prompt:`` and a last line of ``Key:
value`` pairs. It has no way to escape: a prompt with a line that begins with ``Negative
prompt:`` or ``Steps:`` is misread by them. No key is called ``prompt`` or ``workflow``,
which ComfyUI would take for a graph of nodes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any, Final
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..core.report import RunReport
from ..errors import RequestError

SETTINGS_KEY: Final = "max_diffusion"
SETTINGS_NAMESPACE: Final = "urn:max-diffusion:settings:1"
_PARAMETERS: Final = "parameters"
_SOFTWARE: Final = "Software"

_EXIF_SOFTWARE, _EXIF_IFD, _EXIF_USER_COMMENT = 0x0131, 0x8769, 0x9286
_EXIF_UNICODE: Final = b"UNICODE\0"
# A JPEG segment has a two-byte length, and each kind its name first.
_MAX_JPEG_EXIF, _MAX_JPEG_XMP = 65_533, 65_504
_RDF: Final = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
# What a run took and found; all other fields of a report are settings.
_MEASURED: Final = frozenset(
    (
        *("steps", "cache_bytes", "image_tokens", "text_tokens", "warnings"),
        "reference_tokens",
        *("load_seconds", "compile_seconds", "compile_count", "encode_seconds"),
        "defaults",
        *("denoise_seconds", "decode_seconds", "total_seconds"),
        *("full_passes", "total_passes"),
    )
)


def text_chunks(report: RunReport, index: int) -> dict[str, str]:
    """Returns what the file of image ``index`` says of itself, by a PNG's keywords."""
    run = report.to_dict()
    settings = {name: value for name, value in run.items() if name not in _MEASURED}
    settings["picture"] = index
    return {
        _PARAMETERS: _parameters(report, index),
        SETTINGS_KEY: json.dumps(settings, ensure_ascii=False),
        _SOFTWARE: _software(report),
    }


def png_info(text: Mapping[str, str]) -> PngInfo:
    """Creates a PNG's text chunks: plain ones where ASCII will do, else in UTF-8."""
    info = PngInfo()
    for key, value in text.items():
        if value.isascii() and "\0" not in value:
            info.add_text(key, value)  # which every reader knows
        else:
            info.add_itxt(key, value)
    return info


def exif_and_xmp(kind: str, text: Mapping[str, str]) -> dict[str, bytes]:
    """Returns the texts of a ``jpeg`` or ``webp``, as Pillow's ``save`` takes them.

    A JPEG has room for 65,533 bytes of each; what is longer is left out of it.
    """
    exif = Image.Exif()
    if _SOFTWARE in text:
        exif[_EXIF_SOFTWARE] = text[_SOFTWARE]
    if _PARAMETERS in text:
        comment = _EXIF_UNICODE + text[_PARAMETERS].encode("utf-16-be")
        exif.get_ifd(_EXIF_IFD)[_EXIF_USER_COMMENT] = comment
    found = {}
    if text:
        found["exif"] = exif.tobytes()
    if SETTINGS_KEY in text:
        found["xmp"] = _xmp(text[SETTINGS_KEY])
    if kind == "jpeg":
        limits = {"exif": _MAX_JPEG_EXIF, "xmp": _MAX_JPEG_XMP}
        found = {key: data for key, data in found.items() if len(data) <= limits[key]}
    return found


def read_settings(path: Path) -> dict[str, Any]:
    """Reads the settings that an image or video of this package was drawn with.

    Args:
        path: A PNG, JPEG, WebP, GIF or MP4 file.

    Returns:
        Fields of the :class:`RunReport` that are no measurements, and ``picture``, the
        0-based index of this image among those of its request.

    Raises:
        RequestError: It cannot be read, or holds no settings.
    """
    try:
        text = _from_mp4(path) if _is_mp4(path) else _from_image(path)
    except OSError as err:
        reason = err.strerror or "it is no picture"
        raise RequestError(
            f"{path}: expected a PNG, JPEG, WebP, GIF or MP4 file, but {reason}; give "
            "one that max-diffusion has written"
        ) from err
    except Exception as err:  # Pillow's plugins raise what they like on damaged files
        raise RequestError(
            f"{path}: expected a picture, but it is damaged; give another"
        ) from err
    try:
        settings = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise RequestError(
            f"{path}: expected the settings that max-diffusion writes into pictures, "
            "got none; was the file written by another program since?"
        )
    return settings


def _parameters(report: RunReport, index: int) -> str:
    """Returns an image's settings in the form of AUTOMATIC1111's web UI."""
    place = index * len(report.prompts) // report.num_images
    lines, negative = [report.prompts[place]], report.negative_prompt
    if isinstance(negative, tuple):
        negative = negative[place]
    if negative:
        lines.append(f"Negative prompt: {negative}")
    values: dict[str, object] = {
        "Steps": report.num_inference_steps,  # first, as all readers expect
    }
    # Other programs know it by its name without the models that it is of.
    sampler = report.sampler.removeprefix("FlowMatch").removeprefix("CogVideoX")
    if sampler:
        values["Sampler"] = sampler
    values["CFG scale"] = f"{report.true_cfg_scale:g}"
    if report.guidance_scale is not None:
        values["Distilled CFG Scale"] = f"{report.guidance_scale:g}"
    values |= {"Seed": report.seed_of(index), "Size": f"{report.width}x{report.height}"}
    if report.num_images > 1 and not report.seeds:  # else the seed draws it alone
        values |= {"Batch size": report.num_images, "Batch pos": index}
    if report.cache.get("name", "none") != "none":
        values["Denoising cache"] = report.cache["name"]
    if report.loras:
        values["Loras"] = ", ".join(
            f"{PurePath(name).stem}:{weight:g}" for name, weight in report.loras.items()
        )
    values["Model"] = PurePath(report.model).name or report.model
    values["Version"] = _software(report)
    lines.append(", ".join(f"{key}: {_quoted(str(v))}" for key, v in values.items()))
    # None of the places can hold a zero byte.
    return "\n".join(lines).replace("\0", "")


def _quoted(value: str) -> str:
    """Quotes a value as readers of that form unquote it."""
    is_plain = not any(mark in value for mark in ',:\n"')
    return value if is_plain else json.dumps(value, ensure_ascii=False)


def _software(report: RunReport) -> str:
    return f"max_diffusion {report.versions.get('max-diffusion', '')}".strip()


def _xmp(settings: str) -> bytes:
    """Creates an XMP packet of one property that holds the settings."""
    # XML has no way to write these; JSON has.
    plain = re.sub(
        "[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]",
        lambda match: f"\\u{ord(match[0]):04x}",
        settings,
    )
    packet = (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
        '<x:xmpmeta xmlns:x="adobe:ns:meta/">'
        f'<rdf:RDF xmlns:rdf="{_RDF}"><rdf:Description rdf:about="" '
        f'xmlns:{SETTINGS_KEY}="{SETTINGS_NAMESPACE}"><{SETTINGS_KEY}:settings>'
        f"{escape(plain)}</{SETTINGS_KEY}:settings></rdf:Description></rdf:RDF>"
        '</x:xmpmeta><?xpacket end="w"?>'
    )
    return packet.encode()


def _from_image(path: Path) -> object:
    with Image.open(path) as image:
        if image.format == "GIF":
            comment = image.info.get("comment", b"")
            return bytes(comment).decode("utf-8", errors="replace")
        text = image.info.get(SETTINGS_KEY)
        if text is None and isinstance(image.info.get("xmp"), bytes):
            return _from_xmp(image.info["xmp"])
        return text


def _is_mp4(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(8)[4:] == b"ftyp"


def _from_mp4(path: Path) -> object:
    import av  # takes a while, and few need it

    with av.open(path) as container:
        return container.metadata.get("comment")


def _from_xmp(packet: bytes) -> str | None:
    start, end = packet.find(b"<x:xmpmeta"), packet.rfind(b"</x:xmpmeta>")
    if start < 0 or end < 0 or b"<!" in packet:  # no entities
        return None
    tree = ElementTree.fromstring(packet[start : end + len(b"</x:xmpmeta>")])
    return tree.findtext(f".//{{{SETTINGS_NAMESPACE}}}settings")
