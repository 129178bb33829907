"""Picture files: whole or absent, in the format asked for, and refused early."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import numpy as np
import pytest
from pictures import open_png
from PIL import Image

from max_diffusion.errors import RequestError
from max_diffusion.media.images import (
    check_writable,
    output_paths,
    save_atomically,
)
from max_diffusion.media.writers import FORMATS, check_sides, save_frames

PICTURE = np.random.default_rng(5).integers(0, 256, (9, 7, 3), np.uint8)


def test_a_saved_image_keeps_every_pixel_and_any_text(tmp_path: Path) -> None:
    text = {"prompt": "zwei Sterne ★\n「赤い丸」", "seed": "7", "empty": ""}
    save_frames(tmp_path / "x.png", PICTURE[None], text)
    with open_png(tmp_path / "x.png") as image:
        assert image.format == "PNG"
        assert np.array_equal(np.asarray(image), PICTURE)
        assert image.text == text
    assert os.listdir(tmp_path) == ["x.png"]


def test_a_saved_image_replaces_one_with_usual_permissions(
    tmp_path: Path,
) -> None:
    (tmp_path / "x.png").write_bytes(b"old")
    other = tmp_path / "plain"
    other.touch()
    save_frames(tmp_path / "x.png", PICTURE[None], {})
    with Image.open(tmp_path / "x.png") as image:
        assert image.size == (7, 9)
    assert stat.S_IMODE((tmp_path / "x.png").stat().st_mode) == stat.S_IMODE(
        other.stat().st_mode
    )


def test_a_saved_image_that_fails_leaves_the_old_file_alone(tmp_path: Path) -> None:
    class Broken(Image.Image):
        def save(self, fp: object, *args: object, **kwargs: object) -> None:
            fp.write(b"half")  # type: ignore[attr-defined]
            raise OSError(28, "No space left on device")

    (tmp_path / "x.png").write_bytes(b"old")
    with pytest.raises(RequestError, match=r"x\.png cannot be written \(No space"):
        save_atomically(tmp_path / "x.png", Broken())
    assert os.listdir(tmp_path) == ["x.png"]
    assert (tmp_path / "x.png").read_bytes() == b"old"


def test_a_saved_image_stopped_half_way_leaves_nothing(tmp_path: Path) -> None:
    class Stopped(Image.Image):
        def save(self, fp: object, *args: object, **kwargs: object) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_atomically(tmp_path / "x.png", Stopped())
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("x.jpg", "must end in .png"),
        ("x", "must end in .png"),
        ("missing/x.png", "missing does not exist"),
        ("file/x.png", "file is not a folder"),
        ("folder.png", "is a folder; give a file name"),
        (f"{'n' * 300}.png", "cannot be written"),
    ],
)
def test_check_writable_refuses_in_one_line(
    tmp_path: Path, path: str, message: str
) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(RequestError, match=message) as caught:
        check_writable(tmp_path / path, "output")
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_check_writable_refuses_a_closed_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(RequestError, match="no permission"):
        check_writable(tmp_path / "x.png", "output")


def test_check_writable_takes_new_and_old_files_and_makes_none(tmp_path: Path) -> None:
    (tmp_path / "old.PNG").touch()
    check_writable(tmp_path / "old.PNG", "output")
    check_writable(tmp_path / "new.png", "output")
    assert os.listdir(tmp_path) == ["old.PNG"]


def test_output_paths_number_several_pictures() -> None:
    assert output_paths(Path("a/x.png"), 1) == [Path("a/x.png")]
    assert output_paths(Path("a/x.y.png"), 3) == [
        Path("a/x.y-1.png"),
        Path("a/x.y-2.png"),
        Path("a/x.y-3.png"),
    ]


@pytest.mark.parametrize(
    ("name", "form", "error"),
    [
        ("x.png", "PNG", 0),
        ("x.JPG", "JPEG", 8),
        ("x.jpeg", "JPEG", 8),
        ("x.webp", "WEBP", 8),
    ],
)
def test_the_suffix_is_the_format(
    tmp_path: Path, name: str, form: str, error: float
) -> None:
    rows, columns = np.mgrid[:64, :48]
    smooth = np.stack([rows * 3, columns * 5, rows + columns], axis=2).astype(np.uint8)
    save_frames(tmp_path / name, smooth[None], {})
    with Image.open(tmp_path / name) as image:
        assert image.format == form
        shown = np.asarray(image.convert("RGB")).astype(int)
    assert shown.shape == smooth.shape
    assert np.abs(shown - smooth).mean() <= error


def test_check_writable_names_all_formats(tmp_path: Path) -> None:
    for name in ("x.png", "x.jpg", "x.JPEG", "x.webp"):
        check_writable(tmp_path / name, "output", *FORMATS)
    for name, got in (("x.bmp", ".bmp"), ("x", "no suffix"), ("x.avif", ".avif")):
        message = (
            f"output: {tmp_path / name} must end in .png, .jpg, .jpeg, .webp, .gif "
            f"or .mp4, the formats written, got {got}"
        )
        with pytest.raises(RequestError) as caught:
            check_writable(tmp_path / name, "output", *FORMATS)
        assert str(caught.value) == message


@pytest.mark.parametrize(
    ("name", "most"), [("x.webp", 16_383), ("x.jpg", 65_535), ("x.png", 2**31 - 1)]
)
def test_a_side_that_the_format_has_no_room_for_is_refused(
    name: str, most: int
) -> None:
    check_sides(Path(name), most, None, "output")
    with pytest.raises(RequestError, match=f"width of at most {most} pixels"):
        check_sides(Path(name), 16, most + 1, "output")
