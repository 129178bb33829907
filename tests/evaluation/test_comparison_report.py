"""The page, the pictures and the table of a comparison."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pages import Page, check_alone
from painters import STEPS, Painter, halving
from PIL import Image

from max_diffusion import (
    AbstractCacheConfig,
    AutoConfig,
    MagCacheConfig,
    PabConfig,
    RequestError,
    TaylorSeerConfig,
)
from max_diffusion.evaluation import Comparison, compare, save_comparison
from max_diffusion.evaluation.comparison_report import (
    comparison_chart,
    contact_sheet,
    difference,
    digits,
    summary_table,
    timeline_names,
)
from max_diffusion.media.timeline import draw_timeline

PROMPTS = ("a & b", "<script>alert(1)</script>", "third")
CACHES = ("auto", TaylorSeerConfig(cache_interval=3))


def paint(prompts: Any = PROMPTS, caches: Any = CACHES, **options: Any) -> Comparison:
    painter: Any = options.pop("painter", Painter())
    return compare(painter, prompts, caches, **{"runs": 1, "seed": 3} | options)


def has(pictures: list[np.ndarray], wanted: np.ndarray) -> bool:
    return any(np.array_equal(picture, wanted) for picture in pictures)


# The page.


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Comparison, list[Path]]:
    comparison = paint(caches=None)
    folder = tmp_path_factory.mktemp("report") / "new"
    return comparison, save_comparison(comparison, str(folder))


def test_all_files_are_written_and_named(
    saved: tuple[Comparison, list[Path]],
) -> None:
    _, files = saved
    assert [path.name for path in files] == [
        *("report.html", "report.json", "contact-sheet.png", "quality.png"),
        *("timeline-taylorseer.png", "timeline-auto.png"),
    ]
    assert set(files[0].parent.iterdir()) == set(files)
    for path in files[2:]:
        with Image.open(path) as image:
            image.load()
            assert (image.format, image.mode) == ("PNG", "RGB")
            assert min(image.size) > 100


def test_the_json_is_the_comparison(saved: tuple[Comparison, list[Path]]) -> None:
    comparison, files = saved
    assert json.loads(files[1].read_text()) == comparison.to_dict()


def test_the_page_holds_every_picture_and_needs_nothing_else(
    saved: tuple[Comparison, list[Path]],
) -> None:
    comparison, files = saved
    text = files[0].read_text(encoding="utf-8")
    check_alone(text)
    pictures = Page(text).pictures
    baseline = comparison.baseline.images
    for row in comparison.rows:
        for picture, plain in zip(row.images, baseline, strict=True):
            assert has(pictures, picture)
            if row is not comparison.baseline:
                assert has(pictures, difference(picture, plain))
    for path in files[3:]:
        with Image.open(path) as image:
            assert has(pictures, np.asarray(image))
    # A chart; and of each cache a timeline, and five pictures a prompt.
    assert len(pictures) == 1 + 2 * (1 + 5 * len(PROMPTS))


def test_words_on_the_page_are_escaped(saved: tuple[Comparison, list[Path]]) -> None:
    _, files = saved
    text = files[0].read_text(encoding="utf-8")
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    words = Page(text).words
    for prompt in PROMPTS:
        assert words.count(prompt) == 2  # of each cache
    assert "a &amp; b" in text


def test_the_page_tells_why_a_cache_was_not_run(
    saved: tuple[Comparison, list[Path]], tmp_path: Path
) -> None:
    comparison, files = saved
    words = Page(files[0].read_text(encoding="utf-8")).words
    assert "Not run" in words
    assert len(comparison.refused) == 6
    for name, reason in comparison.refused.items():
        assert f"{name} : {reason}" in words
    assert "Not run" not in words_of(paint(), tmp_path)


def words_of(comparison: Comparison, folder: Path) -> str:
    path, *_ = save_comparison(comparison, folder)
    return Page(path.read_text(encoding="utf-8")).words


def test_the_page_tells_caches_and_controls_apart(tmp_path: Path) -> None:
    def behave(
        cache: AbstractCacheConfig, steps: int, prompt: str
    ) -> tuple[float, float]:
        seconds, error = halving(cache, steps, prompt)
        if isinstance(cache, TaylorSeerConfig):
            return 3.0, 0.0
        return seconds, error

    words = words_of(paint(painter=Painter(behave)), tmp_path)
    assert "2.00 times as fast, 10 of 20 full passes." in words
    # Errors of 0.5 and 10 levels squared.
    assert "Against 10 steps, which take 1000 ms to its 1000:" in words
    assert re.search(r"51\.\d dB to 38\.\d dB", words)
    assert "It saves no time, so that its control is all steps." in words
    assert "cached, equal" in words


def test_verdicts_are_told(tmp_path: Path) -> None:
    comparison = paint(prompts="a", caches=["auto"])
    rows = []
    for row, is_right in zip(comparison.rows, (True, False, True), strict=True):
        why = "" if is_right else "expected <star>"
        score = replace(row.scores[0], is_right=is_right, why_not=why)
        rows.append(replace(row, scores=(score,)))
    judged = replace(comparison, rows=tuple(rows), num_judged=1)
    words = words_of(judged, tmp_path)
    assert "wrong: expected <star>" in words
    assert ", right" in words
    assert summary_table(judged)["right"] == ["1 of 1", "0 of 1", "1 of 1"]
    assert "right" not in summary_table(comparison)


def test_files_are_replaced_and_others_are_kept(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("old")
    (tmp_path / "other").write_text("kept")
    save_comparison(paint(prompts="a"), tmp_path)
    assert "old" not in (tmp_path / "report.html").read_text()[:20]
    assert (tmp_path / "other").read_text() == "kept"
    (tmp_path / "file").touch()
    with pytest.raises(RequestError, match="cannot be made"):
        save_comparison(paint(prompts="a"), tmp_path / "file")


def test_a_comparison_without_caches_is_a_page_too(tmp_path: Path) -> None:
    files = save_comparison(paint(prompts="a", caches=[]), tmp_path)
    assert len(files) == 4
    check_alone(files[0].read_text(encoding="utf-8"))


# Timelines.


def test_timelines_are_of_their_caches(tmp_path: Path) -> None:
    comparison = paint()
    save_comparison(comparison, tmp_path)
    names = timeline_names(comparison)
    assert names == {
        "auto": "timeline-auto.png",
        "taylorseer:cache_interval=3": "timeline-taylorseer-cache-interval-3.png",
    }
    for row in comparison.of_kind("cache"):
        with Image.open(tmp_path / names[row.label]) as image:
            wanted = draw_timeline(row.reports[0])
            assert np.array_equal(np.asarray(image), np.asarray(wanted))


def test_no_two_timelines_have_one_name_or_one_too_long(tmp_path: Path) -> None:
    ratios = tuple(1 + i / 1000 for i in range(50))
    caches = [
        PabConfig(min_timestep=1.0),
        PabConfig(min_timestep=-1.0),  # the sign goes
        MagCacheConfig(ratios=ratios),
        MagCacheConfig(ratios=(*ratios, 2.0)),
    ]
    painter = Painter(names=("pab", "magcache"))
    comparison = paint(prompts="a", caches=caches, painter=painter)
    names = list(timeline_names(comparison).values())
    assert len(set(names)) == 4
    assert max(map(len, names)) < 150
    save_comparison(comparison, tmp_path)
    assert set(names) <= {path.name for path in tmp_path.iterdir()}


# Pictures.


def test_differences_are_amplified_and_clipped() -> None:
    reference = np.array([[[0, 100, 255]]], np.uint8)
    picture = np.array([[[1, 90, 0]]], np.uint8)
    assert difference(picture, reference).tolist() == [[[8, 80, 255]]]
    assert difference(reference, picture).tolist() == [[[8, 80, 255]]]
    assert difference(picture, picture).max() == 0


LEFT, TOP, HEAD, GAP = 130, 108, 30, 8


def cell(sheet: Image.Image, column: int, line: int, prompt: int, side: int) -> Any:
    """A picture of the sheet, by its place."""
    x = LEFT + column * (side + GAP)
    y = TOP + prompt * (HEAD + 4 * (side + GAP)) + HEAD + line * (side + GAP)
    return np.asarray(sheet.crop((x, y, x + side, y + side)))


def enlarged(picture: np.ndarray) -> np.ndarray:
    image = Image.fromarray(picture)
    return np.asarray(image.resize((160, 160), Image.Resampling.LANCZOS))


def test_the_sheet_shows_every_picture_in_its_place() -> None:
    comparison = paint(num_images=2)
    sheet = contact_sheet(comparison)
    baseline = comparison.baseline.images
    for prompt in range(2):
        plain = baseline[prompt]
        assert np.array_equal(cell(sheet, 0, 0, prompt, 160), enlarged(plain))
        for line in (1, 2, 3):
            assert cell(sheet, 0, line, prompt, 160).min() == 255
        for column, row in enumerate(comparison.of_kind("cache"), start=1):
            control = comparison.control_of(row)
            assert control.label == "10 steps"
            mine, theirs = row.images[prompt], control.images[prompt]
            for line, wanted in enumerate(
                (mine, difference(mine, plain), theirs, difference(theirs, plain))
            ):
                found = cell(sheet, column, line, prompt, 160)
                assert np.array_equal(found, enlarged(wanted)), (prompt, column, line)
    assert sheet.height == TOP + 2 * (HEAD + 4 * (160 + GAP)) + 12
    assert sheet.width == LEFT + 3 * (160 + GAP) + 16


@pytest.mark.parametrize(("side", "shown"), [(16, 160), (200, 200), (500, 384)])
def test_the_sheets_cells_are_of_a_size_to_look_at(side: int, shown: int) -> None:
    small = paint(prompts="a", caches=["auto"])
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (1, 1, side, side, 3), dtype=np.uint8)
    rows = tuple(replace(row, frames=picture) for row in small.rows)
    sheet = contact_sheet(replace(small, rows=rows))
    assert sheet.width == LEFT + 2 * (shown + GAP) + 16
    if side == shown:
        assert np.array_equal(cell(sheet, 0, 0, 0, side), picture[0, 0])


def test_long_labels_end_at_their_column() -> None:
    cache = MagCacheConfig(ratios=tuple(1 + i / 1000 for i in range(50)))
    painter = Painter(names=("magcache",))
    sheet = contact_sheet(paint(prompts="a", caches=[cache], painter=painter))
    assert np.asarray(sheet)[:, LEFT + 2 * (160 + GAP) :].min() == 255


def test_the_chart_has_a_mark_for_every_cache() -> None:
    def marks(caches: Any) -> int:
        chart = np.asarray(comparison_chart(paint(prompts="a", caches=caches)))
        blue = (chart == (0x24, 0x56, 0xC8)).all(axis=2).sum()
        red = (chart == (0xD1, 0x49, 0x5B)).all(axis=2).sum()
        return (blue > 50) + 2 * (red > 50)

    assert [marks(c) for c in ([], ["taylorseer"], ["auto"], CACHES)] == [0, 1, 2, 3]


# The table.


def test_the_table_has_a_row_for_every_setting() -> None:
    table = summary_table(paint(caches=[AutoConfig()], fewer_steps=(5,)))
    assert table[""] == ["no cache", "auto", "10 steps", "5 steps"]
    assert table["ms"] == ["2000", "1000", "1000", "500"]
    assert table["speed-up"] == ["1.00", "2.00", "2.00", "4.00"]
    assert table["same time"] == ["", "10 steps", "", ""]
    assert table["full passes"] == [
        *(f"{STEPS} of {STEPS}", "10 of 20", "10 of 10", "5 of 5")
    ]
    assert table["PSNR median"][0] == table["PSNR worst"][0] == ""
    assert [float(cell) for cell in table["PSNR worst"][1:]] == [51.1, 38.1, 36.4]
    assert table["cache state"] == ["0 KiB", "5 KiB", "0 KiB", "0 KiB"]
    assert len({len(cells) for cells in table.values()}) == 1
    assert not any("LPIPS" in name for name in table)


def test_long_times_have_no_powers_of_ten() -> None:
    assert [*map(digits, (101448.2, 999.96, 317.44, 27.5, 50.0))] == [
        *("101448", "1000", "317.4", "27.5", "50")
    ]


def test_the_table_has_lpips_where_there_is_a_network() -> None:
    lpips: Any = lambda a, b: float(np.mean(a != b))  # noqa: E731
    table = summary_table(paint(prompts="a", caches=["auto"], lpips=lpips))
    assert table["LPIPS median"] == ["", "0.0078", "0.1562"]


def test_equal_pictures_have_no_decibels_in_the_table() -> None:
    def behave(
        cache: AbstractCacheConfig, steps: int, prompt: str
    ) -> tuple[float, float]:
        return halving(cache, steps, prompt)[0], 0.0

    table = summary_table(paint(caches=["auto"], painter=Painter(behave)))
    assert table["PSNR median"] == ["", "equal", "equal"]
