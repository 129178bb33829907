"""What pictures say of themselves, read as the programs people open them in do."""

from __future__ import annotations

import io
import json
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from reports import make_report

from max_diffusion.errors import RequestError
from max_diffusion.media.metadata import read_settings, text_chunks
from max_diffusion.media.writers import encoded

PICTURE = np.random.default_rng(5).integers(0, 256, (9, 7, 3), np.uint8)
PROMPTS = [
    "a red circle",
    "",
    'three: "stars", (big:1.2), <b>&amp; a\\b',
    "zwei Sterne ★\n「赤い丸」 😀\ncafé",
    "ünïcode in Latin-1 only",
    " spaces kept inside  and\ttabs",
    "\ufffe and \uffff are no characters",
]


def raw_chunks(data: bytes) -> dict[str, tuple[str, bytes]]:
    """Text chunks of a PNG by the standard: kind and content by keyword."""
    found, at = {}, 8
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        kind, body = data[at + 4 : at + 8].decode(), data[at + 8 : at + 8 + length]
        assert zlib.crc32(data[at + 4 : at + 8 + length]) == int.from_bytes(
            data[at + 8 + length : at + 12 + length], "big"
        )
        at += 12 + length
        if kind in ("tEXt", "iTXt", "zTXt"):
            keyword, _, rest = body.partition(b"\0")
            found[keyword.decode("ascii")] = kind, rest
    return found


def text_of_png(data: bytes) -> dict[str, str]:
    """The same decoded: tEXt is Latin-1, iTXt UTF-8 after flags and two names."""
    texts = {}
    for keyword, (kind, body) in raw_chunks(data).items():
        if kind == "tEXt":
            texts[keyword] = body.decode("latin-1")
        else:
            assert (kind, body[:2]) == ("iTXt", b"\0\0")  # not compressed
            _, _, text = body[2:].split(b"\0", 2)
            texts[keyword] = text.decode("utf-8")
    return texts


def user_comment(data: bytes) -> str:
    """As EXIF 2.3 has it: an eight-byte code, then UTF-16 in this writer's order."""
    with Image.open(io.BytesIO(data)) as image:
        comment = image.getexif().get_ifd(0x8769)[0x9286]
    assert comment[:8] == b"UNICODE\0"
    return comment[8:].decode("utf-16-be")


def parameters(data: bytes, kind: str) -> str:
    return text_of_png(data)["parameters"] if kind == "png" else user_comment(data)


# The readers, written from what they do.


def read_by_a1111(text: str) -> dict[str, str]:
    """Last line of at least three pairs; lines before; quoted values are JSON."""
    pair = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
    *lines, last = text.strip().split("\n")
    if len(pair.findall(last)) < 3:
        lines, last = [*lines, last], ""
    prompt: list[str] = []
    negative: list[str] = []
    target = prompt
    for line in lines:
        words = line.strip()
        if words.startswith("Negative prompt:"):
            target, words = negative, words[len("Negative prompt:") :].strip()
        target.append(words)
    found = {"Prompt": "\n".join(prompt), "Negative prompt": "\n".join(negative)}
    for key, value in pair.findall(last):
        if value[:1] == '"' and value[-1:] == '"':
            value = json.loads(value)
        size = re.match(r"^(\d+)x(\d+)$", value)
        if size:
            found |= {f"{key}-1": size[1], f"{key}-2": size[2]}
        else:
            found[key] = value
    return found


def read_by_civitai(text: str) -> dict[str, str]:
    """The line that starts with Steps, letter by letter; empty lines are left out."""
    lines = [line for line in text.split("\n") if line.strip()]
    details = next(line for line in lines if line.startswith("Steps: "))
    lines.remove(details)
    prompt, *negative = (x.strip() for x in "\n".join(lines).split("Negative prompt:"))
    found = {"prompt": prompt, "negativePrompt": " ".join(negative)}
    key = value = ""
    is_quoted = False
    for letter in details + ",":
        if letter == '"':
            is_quoted = not is_quoted
        elif letter == ":" and not is_quoted:
            key, value = value.strip(), ""
        elif letter == "," and not is_quoted:
            if key:
                found[key] = value.strip()
            key = value = ""
        else:
            value += letter
    return found


def read_by_sd_prompt_reader(text: str) -> tuple[str, str, str]:
    """Positive, negative, settings, at the first line breaks before their words."""
    steps = text.index("\nSteps:")
    negative = text.find("\nNegative prompt:")
    if negative < 0:
        return text[:steps].strip(), "", text[steps:].strip()
    start = negative + len("\nNegative prompt:")
    return text[:negative].strip(), text[start:steps].strip(), text[steps:].strip()


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("negative", [None, "dull, grey: 日本", "two\nlines"])
def test_readers_find_prompt_and_settings(
    kind: str, prompt: str, negative: str | None
) -> None:
    report = make_report(
        prompts=(prompt,),
        negative_prompt=negative,
        true_cfg_scale=2.5,
        seed=2**40 + 1,
        model="black-forest-labs/FLUX.1-dev",
        cache={"name": "taylorseer", "max_order": 1},
    )
    text = parameters(encoded(PICTURE, kind, 90, text_chunks(report, 0)), kind)
    wanted = {
        "Steps": "1",
        "Sampler": "Euler",
        "CFG scale": "2.5",
        "Distilled CFG Scale": "3.5",
        "Seed": str(2**40 + 1),
        "Denoising cache": "taylorseer",
        "Model": "FLUX.1-dev",
        "Version": "max_diffusion 0.1.0",
    }
    stripped = "\n".join(line.strip() for line in prompt.strip().split("\n"))
    assert read_by_a1111(text) == {
        "Prompt": stripped,
        "Negative prompt": negative or "",
        "Size-1": "96",
        "Size-2": "128",
        **wanted,
    }
    assert read_by_civitai(text) == {
        "prompt": prompt.strip(),
        "negativePrompt": negative or "",
        "Size": "96x128",
        **wanted,
    }
    positive, other, settings = read_by_sd_prompt_reader(text)
    assert (positive, other) == (prompt.strip(), negative or "")
    assert "Seed: 1099511627777, Size: 96x128" in settings


def test_a_value_with_a_comma_is_quoted_and_a_model_without_guidance_has_none() -> None:
    report = make_report(model='/models/a, "b": c', guidance_scale=None)
    found = read_by_a1111(text_chunks(report, 0)["parameters"])
    assert found["Model"] == 'a, "b": c'
    assert "Distilled CFG Scale" not in found
    assert found["CFG scale"] == "1"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("FlowMatchEuler", "Steps: 1, Sampler: Euler, CFG scale"),
        ("CogVideoXDDIM", "Steps: 1, Sampler: DDIM, CFG scale"),
        ("CogVideoXDPM", "Steps: 1, Sampler: DPM, CFG scale"),
        ("", "Steps: 1, CFG scale"),
    ],
)
def test_the_sampler_is_the_one_that_ran(name: str, said: str) -> None:
    text = text_chunks(make_report(sampler=name), 0)["parameters"]
    assert said in text


def test_pictures_of_a_batch_say_which_they_are() -> None:
    report = make_report(prompts=("one", "two", ""), num_images=6)
    found = [read_by_a1111(text_chunks(report, i)["parameters"]) for i in range(6)]
    assert [each["Prompt"] for each in found] == ["one", "one", "two", "two", "", ""]
    assert [each["Batch pos"] for each in found] == list("012345")
    assert {each["Batch size"] for each in found} == {"6"}


def test_what_is_of_each_picture_is_told_of_each() -> None:
    report = make_report(
        prompts=("one", "two"),
        num_images=4,
        seeds=(5, 6, 7, 2**40),
        prompt_2=("first", "second"),
        negative_prompt=("no", ""),
    )
    found = [
        read_by_a1111(text_chunks(report, index)["parameters"]) for index in range(4)
    ]
    assert [each["Seed"] for each in found] == ["5", "6", "7", str(2**40)]
    assert [each["Prompt"] for each in found] == ["one", "one", "two", "two"]
    assert [each["Negative prompt"] for each in found] == ["no", "no", "", ""]
    assert not any("Batch pos" in each for each in found)  # each seed draws it alone
    settings = json.loads(text_chunks(report, 2)["max_diffusion"])
    assert (settings["picture"], settings["seeds"]) == (2, [5, 6, 7, 2**40])
    assert settings["prompt_2"] == ["first", "second"]


def test_comfyui_takes_no_text_of_ours_for_a_workflow() -> None:
    """It reads the keys workflow and prompt of a PNG, and of EXIF in a WebP what stands
    before the first colon."""
    chunks = text_chunks(make_report(prompts=("workflow:{}",)), 0)
    texts = text_of_png(encoded(PICTURE, "png", 0, chunks))
    assert set(texts) == {"parameters", "max_diffusion", "Software"}
    with Image.open(io.BytesIO(encoded(PICTURE, "webp", 90, chunks))) as image:
        values = [str(value) for value in image.getexif().values()]
    assert values
    assert all(
        value.partition(":")[0].lower() not in ("workflow", "prompt")
        for value in values
    )


def test_ascii_is_plain_text_and_all_else_is_utf_8() -> None:
    plain = raw_chunks(encoded(PICTURE, "png", 0, text_chunks(make_report(), 0)))
    assert {kind for kind, _ in plain.values()} == {"tEXt"}
    chunks = text_chunks(make_report(prompts=("café",)), 0)
    other = raw_chunks(encoded(PICTURE, "png", 0, chunks))
    assert other["parameters"][0] == other["max_diffusion"][0] == "iTXt"


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
@pytest.mark.parametrize("prompt", [*PROMPTS, "a\0b\x01\x1f\x7f\x85\u2028c", "\r\n"])
def test_our_settings_come_back_exactly(tmp_path: Path, kind: str, prompt: str) -> None:
    report = make_report(
        prompts=("first", prompt), num_images=4, seed=2**64 - 1, sigmas=(1.0, 0.3)
    )
    path = tmp_path / "x"
    path.write_bytes(encoded(PICTURE, kind, 90, text_chunks(report, 3)))
    settings = read_settings(path)
    assert settings["prompts"] == ["first", prompt]
    assert settings["picture"] == 3
    assert settings["seed"] == 2**64 - 1
    assert settings["sigmas"] == [1.0, 0.3]
    assert settings["versions"] == {"max-diffusion": "0.1.0"}
    assert "total_seconds" not in settings


def test_every_field_of_a_report_is_a_setting_or_a_measurement() -> None:
    """A new one comes along by itself; a new measurement must be named as one."""
    settings = json.loads(text_chunks(make_report(), 0)["max_diffusion"])
    assert set(settings) == {
        *("model", "device", "dtype", "prompts", "negative_prompt", "height", "width"),
        *("num_inference_steps", "guidance_scale", "true_cfg_scale", "seed"),
        *("num_images", "cache", "versions", "sigmas", "picture", "seeds"),
        *("prompt_2", "negative_prompt_2", "transformer", "loras"),
        *("images", "mask", "strength", "sampler"),
    }
    own = make_report(options={"max_sequence_length": 7})
    settings = json.loads(text_chunks(own, 0)["max_diffusion"])
    assert settings["max_sequence_length"] == 7
    assert "options" not in settings


@pytest.mark.parametrize(("length", "parts"), [(30_000, 2), (40_000, 1), (70_000, 0)])
def test_a_jpeg_is_written_also_where_its_settings_have_no_room(
    length: int, parts: int
) -> None:
    chunks = text_chunks(make_report(prompts=("x" * length,)), 0)
    with Image.open(io.BytesIO(encoded(PICTURE, "jpeg", 90, chunks))) as image:
        assert len({"exif", "xmp"} & set(image.info)) == parts
        assert image.size == (7, 9)
    with Image.open(io.BytesIO(encoded(PICTURE, "webp", 90, chunks))) as image:
        assert {"exif", "xmp"} <= set(image.info)


def damaged(path: Path) -> None:
    path.write_bytes(encoded(PICTURE, "png", 0, {})[:40])


def foreign(path: Path) -> None:
    Image.fromarray(PICTURE).save(path, "PNG")


def text_file(path: Path) -> None:
    path.write_text("hello")


def broken_json(path: Path) -> None:
    path.write_bytes(encoded(PICTURE, "png", 0, {"max_diffusion": "{"}))


def other_json(path: Path) -> None:
    path.write_bytes(encoded(PICTURE, "jpeg", 90, {"max_diffusion": "[1]"}))


def deep_json(path: Path) -> None:
    path.write_bytes(encoded(PICTURE, "webp", 90, {"max_diffusion": "[" * 100_000}))


def entities(path: Path) -> None:
    packet = b"<!DOCTYPE x [<!ENTITY a 'b'>]><x:xmpmeta xmlns:x='adobe:ns:meta/'/>"
    Image.fromarray(PICTURE).save(path, "JPEG", xmp=packet)


def broken_xml(path: Path) -> None:
    Image.fromarray(PICTURE).save(path, "JPEG", xmp=b"<x:xmpmeta><a></x:xmpmeta>")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (damaged, "it is no picture|damaged"),
        (foreign, "expected the settings that max-diffusion writes"),
        (
            text_file,
            "expected a PNG, JPEG, WebP, GIF or MP4 file, but it is no picture",
        ),
        (broken_json, "expected the settings that max-diffusion writes"),
        (other_json, "expected the settings that max-diffusion writes"),
        (deep_json, "expected the settings that max-diffusion writes"),
        (entities, "expected the settings that max-diffusion writes"),
        (broken_xml, "damaged|expected the settings"),
        (lambda path: None, "No such file or directory"),
        (lambda path: path.mkdir(), "Is a directory"),
    ],
)
def test_what_has_no_settings_is_one_line(
    tmp_path: Path, make: Callable[[Path], Any], message: str
) -> None:
    make(tmp_path / "x")
    with pytest.raises(RequestError, match=message) as caught:
        read_settings(tmp_path / "x")
    assert str(caught.value).startswith(f"{tmp_path / 'x'}: ")
    assert "\n" not in str(caught.value)
