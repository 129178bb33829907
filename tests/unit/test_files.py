"""Folders and text files: whole or not at all, and errors before the work."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from max_diffusion import RequestError
from max_diffusion.core.files import (
    check_folder,
    prepared_folder,
    read_lines,
    write_text,
)
from max_diffusion.media.images import check_writable


def test_a_folder_is_made_with_those_above_it(tmp_path: Path) -> None:
    wanted = tmp_path / "a" / "b"
    assert prepared_folder(str(wanted)) == wanted
    assert wanted.is_dir()
    (wanted / "kept").touch()
    assert prepared_folder(wanted) == wanted
    assert (wanted / "kept").exists()


def test_a_folder_is_checked_without_being_made(tmp_path: Path) -> None:
    wanted = tmp_path / "a" / "b"
    assert check_folder(str(wanted)) == wanted
    assert list(tmp_path.iterdir()) == []
    assert check_folder(tmp_path) == tmp_path
    with pytest.raises(RequestError, match="expected a folder, got ''"):
        check_folder("")
    assert check_folder("of-that-name-is-none") == Path("of-that-name-is-none")


@pytest.mark.parametrize("make", [prepared_folder, check_folder])
@pytest.mark.parametrize("below", ["file", "file/b/c", "x" * 300])
def test_a_folder_that_cannot_be_made_is_an_error(
    tmp_path: Path, below: str, make: object
) -> None:
    (tmp_path / "file").touch()
    assert callable(make)
    with pytest.raises(RequestError, match=r"output: .* cannot be made \(.+\); choose"):
        make(tmp_path / below)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_closed_folder_is_an_error(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    with pytest.raises(RequestError, match="cannot be written to"):
        prepared_folder(closed)
    with pytest.raises(RequestError, match=r"cannot be made \(no permission\)"):
        check_folder(closed)
    with pytest.raises(RequestError, match=r"cannot be made \(Permission denied\)"):
        prepared_folder(closed / "a")


def test_text_is_written_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    for text in ("first\n", "zweiter: größer ✓\n"):
        write_text(path, text)
        assert path.read_bytes() == text.encode()
    assert [file.name for file in tmp_path.iterdir()] == ["x.txt"]


def test_what_fails_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.txt"
    path.write_text("old")

    def full(self: Path, target: Path) -> None:
        assert self.read_text() == "new"
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(RequestError, match=r"x\.txt cannot be written \(No space left"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["x.txt"]


def test_text_in_place_of_a_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x.txt").mkdir()
    with pytest.raises(RequestError, match=r"x\.txt cannot be written"):
        write_text(tmp_path / "x.txt", "new")
    with pytest.raises(RequestError, match=r"no/y\.txt cannot be written"):
        write_text(tmp_path / "no" / "y.txt", "new")
    assert [file.name for file in tmp_path.iterdir()] == ["x.txt"]


def test_a_symbolic_link_stays_and_its_target_is_written(tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / "target.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to(Path("inner") / "target.txt")
    (tmp_path / "chain.txt").symlink_to("link.txt")
    (tmp_path / "new.txt").symlink_to(inner / "made.txt")
    for name, text in (("link.txt", "one"), ("chain.txt", "two")):
        write_text(tmp_path / name, text)
        assert (tmp_path / name).is_symlink()
        assert (inner / "target.txt").read_text() == text
    write_text(tmp_path / "new.txt", "three")
    assert not (inner / "made.txt").is_symlink()
    assert (inner / "made.txt").read_text() == "three"
    assert sorted(path.name for path in inner.iterdir()) == ["made.txt", "target.txt"]


def test_links_that_lead_to_no_file_are_errors(tmp_path: Path) -> None:
    circle, pipe, lost = (tmp_path / name for name in ("circle", "pipe", "lost"))
    circle.symlink_to("circle")
    os.mkfifo(tmp_path / "fifo")
    pipe.symlink_to("fifo")
    lost.symlink_to(tmp_path / "no" / "x.txt")
    for path, reason in (
        (circle, "Too many levels of symbolic links"),
        (pipe, "no regular file"),
        (lost, "No such file or directory"),
    ):
        with pytest.raises(RequestError) as caught:
            write_text(path, "new")
        assert str(caught.value) == f"output: {path} cannot be written ({reason})"
        assert path.is_symlink()
    assert (tmp_path / "fifo").is_fifo()
    assert len(list(tmp_path.iterdir())) == 4


def test_a_link_to_a_folder_that_is_missing_is_told_first(tmp_path: Path) -> None:
    (tmp_path / "lost.png").symlink_to(tmp_path / "no" / "x.png")
    (tmp_path / "circle.png").symlink_to("circle.png")
    (tmp_path / "fine.png").symlink_to(tmp_path / "x.png")
    check_writable(tmp_path / "fine.png", "--output")
    with pytest.raises(RequestError, match=r"--output: .*/no does not exist; make it"):
        check_writable(tmp_path / "lost.png", "--output")
    with pytest.raises(RequestError, match=r"circle\.png cannot be written \(Too many"):
        check_writable(tmp_path / "circle.png", "--output")


@pytest.mark.parametrize(
    ("data", "lines"),
    [
        (b"", [""]),
        (b"one\ntwo", ["one", "two"]),
        (b"one\r\ntwo\r\n", ["one", "two", ""]),
        (b"\xef\xbb\xbfone\r\n\xef\xbb\xbftwo", ["one", "\ufefftwo"]),
        (
            "a\u2028b\u2029c\x0bd\x0ce\x1cf\x1dg\x1eh\x85i\rj\nk".encode(),
            ["a\u2028b\u2029c\x0bd\x0ce\x1cf\x1dg\x1eh\x85i\rj", "k"],
        ),
        (b"\r\r\n\n", ["\r", "", ""]),
    ],
)
def test_only_line_feeds_end_a_line_and_a_mark_of_byte_order_is_no_text(
    tmp_path: Path, data: bytes, lines: list[str]
) -> None:
    (tmp_path / "x.txt").write_bytes(data)
    assert read_lines(tmp_path / "x.txt") == lines
