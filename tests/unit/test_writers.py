"""Videos in every format that holds them, and what no format holds."""

from __future__ import annotations

import io
import json
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image, ImageSequence
from PIL.GifImagePlugin import GifImageFile

from max_diffusion.errors import RequestError
from max_diffusion.media.metadata import SETTINGS_KEY, read_settings
from max_diffusion.media.writers import (
    FORMATS,
    check_frames,
    check_sides,
    encoded_video,
    save_frames,
)

SETTINGS = {"prompts": ["ein Stern ★ 「赤い丸」"], "seed": 2**64 - 1, "picture": 0}
TEXT = {SETTINGS_KEY: json.dumps(SETTINGS, ensure_ascii=False)}


def moving(num_frames: int, height: int, width: int) -> np.ndarray:
    """A smooth ground over which a bright bar moves, ``(F, H, W, 3)``."""
    rows, columns = np.mgrid[:height, :width]
    ground = np.stack([rows * 2, columns * 2, 40 + 0 * rows], axis=2)
    frames = np.repeat(ground[None], num_frames, axis=0).clip(0, 200)
    for index, frame in enumerate(frames):
        start = index * width // num_frames
        frame[:, start : start + width // 4] = (240, 230, 220)
    return frames.astype(np.uint8)


def read_back(path: Path) -> tuple[np.ndarray, float]:
    """Frames and frames a second, by other programs' readers."""
    if path.suffix == ".mp4":
        with av.open(path) as container:
            stream = container.streams.video[0]
            frames = [f.to_ndarray(format="rgb24") for f in container.decode(stream)]
            assert stream.average_rate is not None
            return np.stack(frames), float(stream.average_rate)
    with Image.open(path) as image:
        shown, lasts = [], []
        for frame in ImageSequence.Iterator(image):
            shown.append(np.asarray(frame.convert("RGB")))
            lasts.append(frame.info["duration"])
        return np.stack(shown), 1000 * len(lasts) / sum(lasts)


@pytest.mark.parametrize("fps", [8.0, 25.0, 12.5])
@pytest.mark.parametrize("size", [(48, 64), (33, 47)])
@pytest.mark.parametrize("suffix", [".gif", ".webp", ".mp4"])
def test_a_video_is_read_back(
    tmp_path: Path, suffix: str, size: tuple[int, int], fps: float
) -> None:
    frames = moving(9, *size)
    path = tmp_path / f"x{suffix}"
    save_frames(path, frames, TEXT, fps)
    shown, rate = read_back(path)
    assert shown.shape == frames.shape
    assert rate == pytest.approx(fps, rel=0.02)
    # Frame by frame: none is dropped, doubled or out of place.
    off = np.abs(shown[:, None].astype(int) - frames[None].astype(int))
    errors = off.mean(axis=(2, 3, 4))
    assert (errors.argmin(axis=1) == np.arange(9)).all()
    assert errors.diagonal().max() < 6
    assert read_settings(path) == SETTINGS
    assert [found.name for found in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_images_that_repeat_say_so(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"x{suffix}"
    save_frames(path, moving(3, 16, 16), {}, None)
    with Image.open(path) as image:
        assert image.info["loop"] == 0
    assert read_back(path)[1] == pytest.approx(8, rel=0.02)  # where it is not known


def test_the_index_of_an_mp4_comes_first(tmp_path: Path) -> None:
    data = encoded_video(moving(5, 32, 32), "mp4", 8.0, {})
    assert data.index(b"moov") < data.index(b"mdat")
    with av.open(io.BytesIO(data)) as container:
        assert container.streams.video[0].codec_context.pix_fmt == "yuv420p"


def test_an_mp4_takes_no_temporary_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> str:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr("tempfile.gettempdir", refuse)
    frames = moving(40, 96, 128)
    data = encoded_video(frames, "mp4", 8.0, TEXT)
    assert data.index(b"moov") < data.index(b"mdat")
    with av.open(io.BytesIO(data), "r") as container:
        shown = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
    assert np.abs(np.stack(shown).astype(int) - frames).mean() < 6


def test_a_single_frame_may_be_a_gif(tmp_path: Path) -> None:
    path = tmp_path / "x.gif"
    save_frames(path, moving(1, 16, 24), TEXT, None)
    with Image.open(path) as image:
        assert isinstance(image, GifImageFile)
        assert (image.format, image.size, image.n_frames) == ("GIF", (24, 16), 1)
    assert read_settings(path) == SETTINGS


@pytest.mark.parametrize(
    ("name", "num_frames", "message"),
    [
        ("x.png", 2, "png cannot hold a video of 2 frames; write .webp, .gif or .mp4"),
        ("x.JPG", 17, "jpeg cannot hold a video of 17 frames; write .webp, .gif or"),
        ("x.mp4", 1, "mp4 cannot hold an image; write .png, .jpg, .jpeg, .webp or"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(
    name: str, num_frames: int, message: str
) -> None:
    with pytest.raises(RequestError) as caught:
        check_frames(Path(name), num_frames, "--output")
    assert str(caught.value).startswith(f"--output: {name}: {message}")


@pytest.mark.parametrize(
    ("name", "fps", "message"),
    [
        ("x.gif", 60.0, "gif shows 0.1 to 50 frames a second, got 60; set fps, or"),
        ("x.webp", 1001.0, "webp shows 0.1 to 1000 frames a second, got 1001"),
        ("x.mp4", 1e-3, "mp4 shows 0.1 to 1000 frames a second, got 0.001"),
    ],
)
def test_a_rate_that_no_player_shows_is_refused(
    name: str, fps: float, message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        check_frames(Path(name), 3, "--output", fps)
    check_frames(Path(name), 3, "--output", 50.0)
    check_frames(Path(name), 3, "--output")


def test_a_video_is_known_by_its_contents(tmp_path: Path) -> None:
    path = tmp_path / "video"
    path.write_bytes(encoded_video(moving(3, 16, 16), "mp4", 8.0, TEXT))
    assert read_settings(path) == SETTINGS


def test_a_comment_in_other_letters_is_no_damage(tmp_path: Path) -> None:
    path = tmp_path / "x.gif"
    Image.new("P", (4, 4)).save(path, comment=b"caf\xe9")
    with pytest.raises(RequestError, match="expected the settings"):
        read_settings(path)


def test_every_format_holds_something() -> None:
    for suffix, known in FORMATS.items():
        for is_held, num_frames in ((known.holds_image, 1), (known.holds_video, 2)):
            if is_held:
                check_frames(Path(f"x{suffix}"), num_frames, "output")
        check_sides(Path(f"x{suffix}"), known.max_side, known.max_side, "output")
        with pytest.raises(RequestError, match=f"at most {known.max_side} pixels"):
            check_sides(Path(f"x{suffix}"), known.max_side + 1, None, "output")


@pytest.mark.parametrize("content", [b"", b"not a video" * 50])
def test_a_damaged_video_is_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.mp4"
    path.write_bytes(content)
    with pytest.raises(RequestError) as caught:
        read_settings(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_video_of_another_program_has_no_settings(tmp_path: Path) -> None:
    for suffix in (".mp4", ".gif", ".webp"):
        path = tmp_path / f"x{suffix}"
        save_frames(path, moving(3, 16, 16), {}, 8.0)
        with pytest.raises(RequestError, match="expected the settings"):
            read_settings(path)


@pytest.mark.parametrize("size", [(64, 64), (768, 1360), (33, 47)])
def test_an_mp4_says_its_colours_and_has_them(size: tuple[int, int]) -> None:
    colour = np.array([200, 30, 60])
    frames = np.broadcast_to(colour, (2, *size, 3)).astype(np.uint8)
    data = encoded_video(frames, "mp4", 8.0, {})
    with av.open(io.BytesIO(data), "r") as container:
        frame = next(container.decode(video=0))
        context = container.streams.video[0].codec_context
        # All of ITU-R BT.709, in the range of video: code point 1 of each.
        told = (context.colorspace, context.color_primaries, context.color_trc)
        assert (*told, context.color_range) == (1, 1, 1, 1)
        y, u, v = (float(bytes(plane)[0]) for plane in frame.planes)
    luma, blue, red = (y - 16) / 219, (u - 128) / 112, (v - 128) / 112
    r, b = luma + (1 - 0.2126) * red, luma + (1 - 0.0722) * blue
    g = (luma - 0.2126 * r - 0.0722 * b) / 0.7152
    assert np.abs(255 * np.array([r, g, b]) - colour).max() <= 3
