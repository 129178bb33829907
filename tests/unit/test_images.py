"""PNG files: whole or absent, refused early, and able to say how they were made."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_report import make_report

from max_diffusion.errors import RequestError
from max_diffusion.images import (
    check_writable,
    output_paths,
    save_atomically,
    save_png,
    text_chunks,
)

PICTURE = np.random.default_rng(5).integers(0, 256, (9, 7, 3), np.uint8)


def test_save_png_keeps_every_pixel_and_any_text(tmp_path: Path) -> None:
    text = {"prompt": "zwei Sterne ★\n「赤い丸」", "seed": "7", "empty": ""}
    save_png(tmp_path / "x.png", PICTURE, text)
    with Image.open(tmp_path / "x.png") as image:
        assert image.format == "PNG"
        assert np.array_equal(np.asarray(image), PICTURE)
        assert image.text == text
    assert os.listdir(tmp_path) == ["x.png"]


def test_save_png_replaces_a_picture_with_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"old")
    other = tmp_path / "plain"
    other.touch()
    save_png(tmp_path / "x.png", PICTURE, {})
    with Image.open(tmp_path / "x.png") as image:
        assert image.size == (7, 9)
    assert stat.S_IMODE((tmp_path / "x.png").stat().st_mode) == stat.S_IMODE(
        other.stat().st_mode
    )


def test_save_png_that_fails_leaves_the_old_file_alone(tmp_path: Path) -> None:
    class Broken(Image.Image):
        def save(self, fp: object, *args: object, **kwargs: object) -> None:
            fp.write(b"half")  # type: ignore[attr-defined]
            raise OSError(28, "No space left on device")

    (tmp_path / "x.png").write_bytes(b"old")
    with pytest.raises(RequestError, match=r"x\.png cannot be written \(No space"):
        save_atomically(tmp_path / "x.png", Broken())
    assert os.listdir(tmp_path) == ["x.png"]
    assert (tmp_path / "x.png").read_bytes() == b"old"


def test_save_png_stopped_half_way_leaves_nothing(tmp_path: Path) -> None:
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


def test_text_chunks_name_the_prompt_of_each_picture() -> None:
    report = make_report(prompts=("one", "two", ""), num_images=6)
    prompts = [text_chunks(report, index)["prompt"] for index in range(6)]
    assert prompts == ["one", "one", "two", "two", "", ""]


def test_text_chunks_tell_what_is_of_each_picture() -> None:
    report = make_report(
        prompts=("one", "two"),
        num_images=4,
        seed=5,
        seeds=(5, 6, 7, 2**40),
        prompt_2=("first", "second"),
        negative_prompt=("no", ""),
        negative_prompt_2="never",
        max_sequence_length=32,
    )
    chunks = [text_chunks(report, index) for index in range(4)]
    assert [chunk["seed"] for chunk in chunks] == ["5", "6", "7", str(2**40)]
    settings = [json.loads(chunk["parameters"]) for chunk in chunks]
    assert [one["seed"] for one in settings] == [5, 6, 7, 2**40]
    assert [one["prompt_2"] for one in settings] == ["first"] * 2 + ["second"] * 2
    assert [one["negative_prompt"] for one in settings] == ["no"] * 2 + [""] * 2
    assert {one["negative_prompt_2"] for one in settings} == {"never"}
    assert {one["max_sequence_length"] for one in settings} == {32}
    assert all(one["has_own_seed"] for one in settings)


@pytest.mark.parametrize(("count", "is_own"), [(1, True), (2, False)])
def test_text_chunks_tell_whether_the_seed_is_shared(count: int, is_own: bool) -> None:
    chunks = text_chunks(make_report(num_images=count), count - 1)
    settings = json.loads(chunks["parameters"])
    assert (settings["seed"], settings["has_own_seed"]) == (7, is_own)


def test_text_chunks_hold_the_settings_as_json() -> None:
    report = make_report(cache={"name": "taylorseer", "max_order": 1}, seed=2**33)
    chunks = text_chunks(report, 0)
    settings = json.loads(chunks["parameters"])
    assert chunks["seed"] == str(2**33)
    assert settings["seed"] == 2**33
    assert settings["cache"] == {"name": "taylorseer", "max_order": 1}
    assert (settings["height"], settings["width"]) == (128, 96)
    assert settings["picture"] == 0
    assert chunks["Software"] == "max_diffusion 0.1.0"
