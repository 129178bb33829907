"""Pictures that are brought, from whatever they are in."""

from __future__ import annotations

import io
import pickle
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from processes import run_python

from max_diffusion import GenerationRequest, RequestError
from max_diffusion.core.pictures import MAX_PIXELS, Picture, PictureInputs
from max_diffusion.media.pictures import read_inputs, read_mask, read_picture


def colours(height: int = 8, width: int = 12) -> np.ndarray:
    rng = np.random.default_rng(1)
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def file_of(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True})]
)
def test_a_file_is_its_pixels(
    tmp_path: Path, kind: str, options: dict[str, Any]
) -> None:
    pixels = colours()
    data = file_of(Image.fromarray(pixels), kind, **options)
    path = tmp_path / "picture.of.some.kind"
    path.write_bytes(data)
    for given in (data, path, str(path), Image.fromarray(pixels), pixels):
        assert np.array_equal(read_picture(given).pixels, pixels)
    assert read_picture(data) == Picture(pixels)
    assert hash(read_picture(data)) == hash(Picture(pixels))
    assert read_picture(data) != Picture(pixels[::-1])
    assert not read_picture(data).pixels.flags.writeable
    assert pickle.loads(pickle.dumps(read_picture(data))) == Picture(pixels)


def test_a_jpeg_is_as_pillow_reads_it() -> None:
    data = file_of(Image.fromarray(colours()), "JPEG", quality=80)
    with Image.open(io.BytesIO(data)) as image:
        assert np.array_equal(read_picture(data).pixels, np.asarray(image))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_file_is_turned_upright(orientation: int) -> None:
    image = Image.fromarray(colours())
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = read_picture(file_of(image, "PNG", exif=exif)).pixels
    turns = [
        lambda x: x,
        lambda x: x[:, ::-1],
        lambda x: x[::-1, ::-1],
        lambda x: x[::-1],
        lambda x: x.transpose(1, 0, 2),
        lambda x: np.rot90(x, -1),
        lambda x: x[::-1, ::-1].transpose(1, 0, 2),
        lambda x: np.rot90(x),
    ]
    assert np.array_equal(pixels, turns[orientation - 1](colours()))


def test_what_is_transparent_is_laid_over_white() -> None:
    pixels = np.dstack([colours(), np.zeros((8, 12), np.uint8)])
    pixels[:4, :, 3] = 255
    read = read_picture(file_of(Image.fromarray(pixels))).pixels
    assert np.array_equal(read[:4], colours()[:4])
    assert (read[4:] == 255).all()


def png_with_key(values: np.ndarray, bits: int, key: tuple[int, ...]) -> bytes:
    """A PNG of ``(H, W)`` or ``(H, W, 3)`` in which one colour is transparent."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checked = kind + data
        size, check = len(data), zlib.crc32(checked)
        return struct.pack(">I", size) + checked + struct.pack(">I", check)

    flat = values.reshape(len(values), -1).astype(np.uint16)
    digits = flat[..., None] >> np.arange(bits)[::-1] & 1
    rows = np.packbits(digits.astype(np.uint8).reshape(len(flat), -1), axis=1)
    colour = 2 if values.ndim == 3 else 0
    head = struct.pack(">2I5B", values.shape[1], len(values), bits, colour, 0, 0, 0)
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", head),
            chunk(b"tRNS", struct.pack(f">{len(key)}H", *key)),
            chunk(b"IDAT", zlib.compress(np.insert(rows, 0, 0, axis=1).tobytes())),
            chunk(b"IEND", b""),
        )
    )


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_a_shade_that_is_transparent_is_so_at_any_depth(bits: int) -> None:
    rng = np.random.default_rng(bits)
    most = 2**bits - 1
    values = rng.integers(0, most, (5, 7), dtype=np.uint16, endpoint=True)
    values[1, 2:4] = values[0, 0]
    values[2, 2] = values[0, 0] ^ 1  # at 16 bits alike in the upper half
    key = int(values[0, 0])
    data, is_clear = png_with_key(values, bits, (key,)), values == key
    shades = values >> 8 if bits == 16 else values * (255 // most)
    wanted = np.where(is_clear, 255, shades)
    for given in (data, Image.open(io.BytesIO(data))):
        if bits in (2, 4) and not isinstance(given, bytes):
            continue  # Pillow's own, which does not know the depth
        read = read_picture(given).pixels
        assert np.array_equal(read, np.repeat(wanted[..., None], 3, axis=2))
        assert np.array_equal(read_mask(given).pixels[..., 0], is_clear * 255)


def test_a_colour_that_is_transparent_is_honoured_at_8_bits_and_refused_at_16() -> None:
    pixels = colours()
    key = tuple(int(value) for value in pixels[3, 4])
    is_clear = (pixels == pixels[3, 4]).all(axis=2)
    data = png_with_key(pixels, 8, key)
    wanted = np.where(is_clear[..., None], 255, pixels)
    assert np.array_equal(read_picture(data).pixels, wanted)
    assert np.array_equal(read_mask(data).pixels[..., 0], is_clear * 255)
    for wide in (pixels.astype(np.uint16), pixels.astype(np.uint16) * 257):
        data = png_with_key(wide, 16, tuple(int(value) for value in wide[3, 4]))
        for given in (data, Image.open(io.BytesIO(data))):
            for read in (read_picture, read_mask):
                with pytest.raises(RequestError, match=r"16 bits .* \(tRNS\)"):
                    read(given)


def test_other_modes_become_rgb() -> None:
    gray = colours()[..., 0]
    wanted = np.repeat(gray[..., None], 3, axis=2)
    for image in (
        Image.fromarray(gray),
        Image.fromarray(gray.astype(np.uint16) * 256 + 255),  # its upper half
        Image.merge("LA", [Image.fromarray(gray), Image.new("L", (12, 8), 255)]),
    ):
        assert np.array_equal(read_picture(file_of(image)).pixels, wanted)
    palette = Image.fromarray(colours()).quantize(7)
    rgb = np.asarray(palette.convert("RGB"))
    assert np.array_equal(read_picture(file_of(palette)).pixels, rgb)
    clear = file_of(palette, transparency=bytes([0, *[255] * 6]))
    is_clear = np.asarray(palette) == 0
    assert np.array_equal(
        read_picture(clear).pixels, np.where(is_clear[..., None], 255, rgb)
    )
    ink = Image.fromarray(colours()).convert("CMYK")
    data = file_of(ink, "JPEG", quality=95)
    with Image.open(io.BytesIO(data)) as image:
        assert image.mode == "CMYK"
        assert np.array_equal(
            read_picture(data).pixels, np.asarray(image.convert("RGB"))
        )


def test_32_bits_that_hold_16_are_read_as_such() -> None:
    gray = colours()[..., 0]
    for values in (gray.astype(np.int32) * 256 + 3, np.zeros((8, 12), np.int32)):
        image = Image.fromarray(values)
        assert image.mode == "I"
        wanted = np.repeat((values >> 8)[..., None], 3, axis=2)
        assert np.array_equal(read_picture(image).pixels, wanted)


def test_lab_is_a_space_of_colours_without_transparency() -> None:
    pytest.importorskip("PIL.ImageCms")

    def lab(*values: int) -> Image.Image:
        bands = [Image.new("L", (4, 4), value) for value in values]
        return Image.merge("LAB", bands)

    for read in (read_picture, read_mask):
        gray = read(lab(136, 128, 128)).pixels.astype(int)
        light = ((136 / 2.55 + 16) / 116) ** 3  # CIE's lightness
        level = 255 * (1.055 * light ** (1 / 2.4) - 0.055)  # in sRGB
        assert gray.shape == (4, 4, 3)
        assert np.abs(gray - level).max() <= 2
        coloured = lab(136, 140, 110)
        wanted = np.asarray(coloured.convert("RGB"))
        assert 0 < wanted.min() < wanted.max() < 255
        assert np.array_equal(read(coloured).pixels, wanted)


def test_a_mask_is_light_or_transparent() -> None:
    marks = np.zeros((8, 12), np.uint8)
    marks[2:5, 3:9] = 255
    white = read_mask(file_of(Image.fromarray(marks)))
    assert np.array_equal(white.marked(8, 12), marks == 255)
    hole = Image.merge(
        "RGBA",
        [
            *[Image.fromarray(marks)] * 3,
            Image.eval(Image.fromarray(marks), lambda value: 255 - value),
        ],
    )
    assert np.array_equal(read_mask(file_of(hole)).marked(8, 12), marks == 255)
    opaque = hole.copy()
    opaque.putalpha(255)
    assert np.array_equal(read_mask(file_of(opaque)).marked(8, 12), marks == 255)


def test_pictures_are_scaled_as_diffusers_scales_them() -> None:
    from diffusers.image_processor import VaeImageProcessor

    image = Image.fromarray(colours(37, 50))
    wanted = VaeImageProcessor(vae_scale_factor=16).preprocess(image, 32, 48)
    ours = read_picture(image).scaled(32, 48)
    assert np.array_equal(ours, wanted.permute(0, 2, 3, 1).numpy())
    masks = VaeImageProcessor(
        vae_scale_factor=16,
        do_normalize=False,
        do_binarize=True,
        do_convert_grayscale=True,
    )
    for mask in (image, image.convert("L")):
        marked = masks.preprocess(mask, 32, 48)[0, 0].numpy()
        assert np.array_equal(read_mask(mask).marked(32, 48), marked == 1)


def huge_png(width: int, height: int) -> bytes:
    """A few bytes that say they are a large picture."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + rows + chunk(b"IEND", b"")


def animation(kind: str) -> bytes:
    frames = [Image.fromarray(colours()), Image.fromarray(colours()[::-1])]
    return file_of(frames[0], kind, save_all=True, append_images=frames[1:])


PNG = file_of(Image.fromarray(colours(64, 64)))
JPEG = file_of(Image.fromarray(colours(64, 64)), "JPEG")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (b"", "expected a PNG, JPEG or WebP, got an empty file"),
        (b"a text about pictures", "expected a PNG, JPEG or WebP, got text"),
        (bytes(range(256)), "expected a PNG, JPEG or WebP, got something else"),
        (file_of(Image.fromarray(colours()), "GIF"), "got a GIF"),
        (file_of(Image.fromarray(colours()), "TIFF"), "got a TIFF"),
        (file_of(Image.fromarray(colours()), "BMP"), "got a BMP"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "got an SVG"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "got an HEIC"),
        (b"RIFF\x24\0\0\0WAVEfmt ", "got something else"),
        (PNG[: len(PNG) // 2], "it is damaged or cut off"),
        (JPEG[: len(JPEG) // 2], "it is damaged or cut off"),
        (PNG[:20], "it is damaged or cut off"),
        (PNG[:60] + bytes(40) + PNG[100:], "it is damaged or cut off"),
        (huge_png(20_000, 20_000), f"1 to {MAX_PIXELS} pixels, got 20000 x 20000"),
        (huge_png(2**31 - 1, 2**31 - 1), f"must have 1 to {MAX_PIXELS} pixels"),
        (animation("PNG"), "got an animation of 2 frames"),
        (animation("WEBP"), "got an animation of 2 frames"),
        (np.zeros((8, 8, 3)), "got float64 .*multiply 0..1 by 255 and round"),
        (np.zeros((8, 8, 2), np.uint8), r"got uint8 \[8, 8, 2\]"),
        (np.zeros((0, 8, 3), np.uint8), "got 8 x 0"),
        (Image.new("F", (8, 8)), "mode F, whose range is not known; convert it to L"),
        (Image.new("I", (8, 8), 200), "8 or 16 bits, got Pillow's mode I, whose"),
        (Image.new("I", (8, 8), 2**16), "8 or 16 bits, got Pillow's mode I, whose"),
        (Image.new("I", (8, 8), -1), "8 or 16 bits, got Pillow's mode I, whose"),
        (7, "expected a path, bytes, .*got int"),
        ("no/such/file.png", "^(image|mask) no/such/file.png: there is no such file"),
        (".", "it is no file; give a PNG"),
        ("\0", "cannot be read"),
    ],
)
def test_what_is_no_picture_is_one_line(given: Any, said: str) -> None:
    for read in (read_picture, read_mask):
        with pytest.raises(RequestError, match=said) as info:
            read(given)
        assert "\n" not in str(info.value)
        assert str(info.value).startswith(("image", "mask", "'"))


def test_what_does_not_go_together_is_refused() -> None:
    picture, other = Picture(colours()), Picture(colours(8, 8))
    for values, said in (
        ({"mask": colours()}, "mask must come with an image"),
        ({"strength": 0.5}, "strength must come with an image"),
    ):
        with pytest.raises(RequestError, match=said):
            read_inputs(None, **values)
    with pytest.raises(RequestError, match="of the image's size, 12 x 8, got 8 x 8"):
        PictureInputs((picture,), other)
    for strength in (0, -0.1, 1.01, float("nan"), True, "x"):
        with pytest.raises(RequestError, match="request: strength must be"):
            PictureInputs((picture,), strength=strength)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="image must be a picture or several"):
        PictureInputs(())
    with pytest.raises(RequestError, match="inputs must be PictureInputs, got Picture"):
        GenerationRequest(("a",), inputs=picture)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="image 2: expected a PNG"):
        read_inputs([picture, b"x"])
    with pytest.raises(RequestError, match=r"uint8 of shape .*got float32 \[2, 2, 3\]"):
        Picture(np.zeros((2, 2, 3), np.float32))
    inputs = read_inputs([picture, other], None, 1)
    assert inputs is not None
    assert inputs.images == (picture, other)
    assert repr(picture) == "Picture('image', 12 x 8)"


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "L", "P", "CMYK", "1", "I;16"])
def test_what_is_read_in_bands_is_what_is_read_at_once(
    monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    pixels = np.random.default_rng(8).integers(0, 256, (37, 23, 4), np.uint8)
    pixels[:20, :, 3] = 255  # the first bands are opaque
    image = Image.fromarray(pixels)
    if mode == "I;16":
        image = Image.fromarray(pixels[..., :2].copy().view("<u2")[..., 0])
    elif mode == "P":
        image = image.convert("RGB").quantize(8)
        image.info["transparency"] = 3
    elif mode != "RGBA":
        image = image.convert("LA").convert(mode) if mode == "LA" else image
        image = image.convert("RGB").convert(mode) if mode != "LA" else image
    whole = [read(image).pixels for read in (read_picture, read_mask)]
    for rows in (1, 5, 36):
        monkeypatch.setattr("max_diffusion.media.pictures._BAND_PIXELS", rows * 23)
        for read, wanted in zip((read_picture, read_mask), whole, strict=True):
            assert np.array_equal(read(image).pixels, wanted)


_PEAK = """
import io, re
from pathlib import Path
from PIL import Image
from max_diffusion.media.pictures import read_inputs
data = io.BytesIO()
size = 4096, 4096
Image.new("RGBA", size, (9, 9, 9, 100)).save(data, "PNG", compress_level=1)
read_inputs(data.getvalue())
# Again: that it was made, and what is loaded for it, is behind.
status = Path("/proc/self/status")
Path("/proc/self/clear_refs").write_text("5")
found = lambda name: int(re.search(name + ":\\s+(\\d+)", status.read_text())[1]) * 1024
before = found("VmRSS")
read_inputs(data.getvalue())
print((found("VmHWM") - before) / (size[0] * size[1]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_reading_takes_the_picture_and_its_pixels_once() -> None:
    done = run_python(_PEAK)
    assert done.returncode == 0, done.stderr
    # RGBA as Pillow has it, RGB as it is kept, and little more.
    assert 5 <= float(done.stdout) <= 9


def test_pixels_that_nobody_can_change_are_not_copied() -> None:
    pixels = np.zeros((4, 4, 3), np.uint8)
    assert not np.shares_memory(Picture(pixels).pixels, pixels)
    pixels.flags.writeable = False
    assert Picture(pixels).pixels is pixels
    assert not np.shares_memory(Picture(pixels[:2]).pixels, pixels)  # of another's
