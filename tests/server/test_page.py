"""The page in a real browser."""

from __future__ import annotations

import base64
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import toy_video
from edit_bodies import picture, png
from playwright.sync_api import Browser, FilePayload, Page, expect, sync_playwright
from serving import Served, listening, served, wait_until
from sketcher import STEPS, Sketcher

from max_diffusion import GenerationRequest, TextToImagePipeline

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
# What it would do on the network by itself.
QUIET = (
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-quic",
    "--disable-sync",
    "--no-first-run",
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=QUIET, chromium_sandbox=False
        )
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    page = browser.new_page(viewport={"width": 1100, "height": 900})
    yield page
    page.close()


@pytest.fixture(scope="module")
def server(demo: TextToImagePipeline) -> Iterator[Served]:
    with served(demo, max_steps=3000) as server:
        yield server


def test_a_picture_forms_step_by_step(
    server: Served, page: Page, tmp_path: Path
) -> None:
    asked: list[str] = []
    errors: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on(
        "console",
        lambda message: (
            errors.append(message.text) if message.type == "error" else None
        ),
    )
    page.goto(server.url)
    page.fill("#prompt", "a red circle above a blue square")
    page.select_option("#cache", "taylorseer")
    page.fill("#steps", "40")
    page.fill("#seed", "7")
    page.click("#draw")
    page.wait_for_selector("#timeline .cell[data-action]")
    page.wait_for_selector("#picture")
    page.wait_for_selector("#picture[data-state=final]", timeout=60_000)
    cells = page.locator("#timeline .cell[data-action]")
    actions = cells.evaluate_all("cells => cells.map(cell => cell.dataset.action)")
    # Warm-up of 9, then every fifth from step 10 on.
    computed = [*range(9), *range(10, 40, 5)]
    assert [s for s, action in enumerate(actions) if action == "compute"] == computed
    assert len(actions) == 40
    expect(page.locator("#summary")).to_contain_text("seed 7")
    expect(page.locator("#summary")).to_contain_text("15 of 40 full passes")
    assert page.evaluate("document.querySelector('#picture').naturalWidth") == 128
    page.screenshot(path=tmp_path / "page.png", full_page=True)
    assert errors == []
    assert all(url.startswith((server.url, "data:", "blob:")) for url in asked), asked


def test_a_model_that_takes_no_mask_shows_no_brush(page: Page) -> None:
    sketcher = Sketcher(inputs=("image",))
    with listening(sketcher) as url:
        page.goto(url)
        page.wait_for_selector("#start-box:not([hidden])", state="attached")
        scene = np.zeros((96, 128, 3), np.uint8)
        file: FilePayload = {
            "name": "a.png",
            "mimeType": "image/png",
            "buffer": png(scene),
        }
        page.set_input_files("#start-file", files=[file])
        expect(page.locator("#start-picture")).to_be_visible()
        for name in ("mask", "mask-hint", "brush", "clear-mask", "strength"):
            expect(page.locator(f"#{name}")).to_be_hidden()
        page.fill("#prompt", "a red circle")
        page.click("#draw")
        page.wait_for_selector("#picture[data-state=final]", timeout=30_000)
        [(request, _)] = sketcher.drawn
        assert request.inputs is not None
        assert (request.inputs.mask, request.inputs.strength) == (None, None)


def test_a_picture_is_dropped_and_painted(page: Page, tmp_path: Path) -> None:
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    sketcher = Sketcher(inputs=("image", "mask", "strength"))
    with listening(sketcher) as url:
        page.goto(url)
        page.wait_for_selector("#start-box:not([hidden])", state="attached")
        # What a browser makes of a file that is dropped on it.
        page.evaluate(
            """async () => {
              const canvas = document.createElement("canvas");
              Object.assign(canvas, { width: 128, height: 96 });
              const pen = canvas.getContext("2d");
              pen.fillStyle = "#d8d2c4"; pen.fillRect(0, 0, 128, 96);
              pen.fillStyle = "#2456c8"; pen.fillRect(20, 40, 40, 40);
              const blob = await new Promise((done) => canvas.toBlob(done));
              const files = new DataTransfer();
              files.items.add(new File([blob], "scene.png", { type: "image/png" }));
              const event = { dataTransfer: files, bubbles: true, cancelable: true };
              document.dispatchEvent(new DragEvent("drop", event));
            }"""
        )
        page.wait_for_selector("#mask")
        box = page.locator("#mask").bounding_box()
        assert box is not None
        page.mouse.move(box["x"] + 0.6 * box["width"], box["y"] + 20)
        page.mouse.down()
        page.mouse.move(box["x"] + 0.8 * box["width"], box["y"] + 60, steps=5)
        page.mouse.up()
        page.fill("#prompt", "a red circle above a blue square")
        page.fill("#steps", "10")
        page.fill("#seed", "7")
        page.locator("#strength").fill("0.8")
        page.click("#draw")
        page.wait_for_selector("#picture[data-state=final]", timeout=60_000)
        assert page.locator("#timeline .cell[data-action]").count() == STEPS
        [(request, _)] = sketcher.drawn
        inputs = request.inputs
        assert inputs is not None
        assert (inputs.strength, request.seed) == (0.8, 7)
        assert (request.width, request.height) == (None, None)
        [image], mask = inputs.images, inputs.mask
        assert image.pixels[60, 40].tolist() == [0x24, 0x56, 0xC8]
        assert mask is not None
        marked = mask.marked(96, 128)
        assert marked[10:40, 75:105].any()
        assert not marked[:, :60].any()
        page.screenshot(path=tmp_path / "edit.png", full_page=True)
        page.click("#remove-start")
        expect(page.locator("#width")).to_have_value("128")
        page.set_input_files(
            "#start-file", {"name": "x.png", "mimeType": "image/png", "buffer": b"x"}
        )
        expect(page.locator("#error")).to_contain_text("x.png is no picture")
    assert errors == []


def files(*sizes: tuple[int, int]) -> list[FilePayload]:
    """Pictures of these heights and widths, as a browser chooses them."""
    return [
        {"name": f"{i}.png", "mimeType": "image/png", "buffer": png(picture(*size))}
        for i, size in enumerate(sizes)
    ]


def drop(page: Page, *chosen: FilePayload) -> None:
    """What a browser makes of files that are dropped on it."""
    page.evaluate(
        """files => {
          const dropped = new DataTransfer();
          for (const [name, letters] of files) {
            const bytes = Uint8Array.from(atob(letters), (each) => each.charCodeAt(0));
            dropped.items.add(new File([bytes], name, { type: "image/png" }));
          }
          const event = { dataTransfer: dropped, bubbles: true, cancelable: true };
          document.dispatchEvent(new DragEvent("drop", event));
        }""",
        [(f["name"], base64.b64encode(f["buffer"]).decode()) for f in chosen],
    )


def drawn(page: Page, sketcher: Sketcher) -> GenerationRequest:
    """What reaches the server when Draw is pressed."""
    before = len(sketcher.drawn)
    page.fill("#prompt", "a red circle")
    page.click("#draw")
    page.wait_for_selector("#picture[data-state=final]", timeout=30_000)
    wait_until(lambda: len(sketcher.drawn) == before + 1)
    expect(page.locator("#draw")).to_be_visible()
    return sketcher.drawn[-1][0]


def pictures_of(request: GenerationRequest) -> list[np.ndarray]:
    return [] if request.inputs is None else [p.pixels for p in request.inputs.images]


def test_several_pictures_are_chosen_dropped_and_sent(
    page: Page, tmp_path: Path
) -> None:
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    sizes = [(48, 96), (96, 64), (64, 64), (32, 80)]
    sketcher = Sketcher(inputs=("image",), max_pictures=3)
    first, second, third, fourth = files(*sizes)
    with listening(sketcher) as url:
        page.goto(url)
        expect(page.locator("#start-label")).to_have_text(
            "Draw from pictures (up to 3)"
        )
        page.set_input_files("#start-file", files=[first, second])
        thumbnails = page.locator("#references img")
        expect(thumbnails).to_have_count(2)
        for name in ("easel", "mask", "strength", "auto-resize", "max-area"):
            expect(page.locator(f"#{name}")).to_be_hidden()
        expect(page.locator("#width")).to_have_value("")
        sent = pictures_of(drawn(page, sketcher))
        assert [each.shape[:2] for each in sent] == sizes[:2]
        for pixels, size in zip(sent, sizes, strict=False):
            np.testing.assert_array_equal(pixels, picture(*size))
        page.fill("#width", "64")
        drop(page, third, fourth)
        expect(thumbnails).to_have_count(3)
        expect(page.locator("#error")).to_have_text(
            "3.png was left out: this model takes up to 3 pictures."
        )
        expect(page.locator("#start-file")).to_be_hidden()
        for name, width in (("wide", 1100), ("phone", 390)):
            page.set_viewport_size({"width": width, "height": 900})
            page.screenshot(path=tmp_path / f"{name}.png", full_page=True)
            scrolls = "document.documentElement.scrollWidth > innerWidth"
            assert not page.evaluate(scrolls)
        page.get_by_label("Remove picture 2").click()
        expect(page.locator("#width")).to_have_value("64")  # of the first, which stays
        request = drawn(page, sketcher)
        assert (request.width, request.height) == (64, 128)
        assert [each.shape[:2] for each in pictures_of(request)] == [sizes[0], sizes[2]]
        page.get_by_label("Remove picture 1").click()
        expect(page.locator("#width")).to_have_value("")
        page.click("#remove-start")
        expect(page.locator("#references img")).to_have_count(0)
        expect(page.locator("#width")).to_have_value("128")
        assert drawn(page, sketcher).inputs is None
    assert errors == []


def test_a_mask_is_of_the_first_of_several(page: Page) -> None:
    sketcher = Sketcher(inputs=("image", "mask"), max_pictures=2)
    with listening(sketcher) as url:
        page.goto(url)
        page.set_input_files("#start-file", files=files((64, 96), (96, 64)))
        expect(page.locator("#references img")).to_have_count(2)
        page.locator("#mask").click()
        request = drawn(page, sketcher)
        assert request.inputs is not None
        assert request.inputs.mask is not None
        assert request.inputs.mask.marked(64, 96).any()
        page.get_by_label("Remove picture 1").click()
        request = drawn(page, sketcher)
        assert request.inputs is not None
        assert request.inputs.mask is None
        assert [each.shape[:2] for each in pictures_of(request)] == [(96, 64)]


def test_one_picture_takes_the_place_of_another(page: Page) -> None:
    sketcher = Sketcher(inputs=("image",), options=("auto_resize", "max_area"))
    with listening(sketcher) as url:
        page.goto(url)
        expect(page.locator("#max-area")).to_be_visible()
        expect(page.locator("#auto-resize")).to_be_hidden()
        page.fill("#max-area", "4096")
        assert drawn(page, sketcher).options == {"max_area": 4096}
        drop(page, *files((64, 96), (96, 64)))
        expect(page.locator("#error")).to_have_text(
            "1.png was left out: this model takes one picture."
        )
        expect(page.locator("#start-picture")).to_be_visible()
        expect(page.locator("#references")).to_be_hidden()
        drop(page, *files((32, 64)))
        expect(page.locator("#error")).to_be_hidden()
        page.uncheck("#auto-resize")
        page.fill("#max-area", "")
        request = drawn(page, sketcher)
        assert request.options == {"auto_resize": False}
        assert [each.shape[:2] for each in pictures_of(request)] == [(32, 64)]
        page.check("#auto-resize")
        assert drawn(page, sketcher).options == {}
        page.click("#gallery button >> nth=1")
        page.click("#again")
        expect(page.locator("#auto-resize")).not_to_be_checked()


def test_a_video_is_drawn_and_played(page: Page, tmp_path: Path) -> None:
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda said: errors.append(said.text))
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    with toy_video.registered():
        pipeline = toy_video.load(toy_video.write_folder(tmp_path / "model"))
        with served(pipeline, api_keys=("sk-page",), max_steps=9999) as server:
            page.goto(server.url)
            page.fill("#api-key", "sk-page")
            page.press("#api-key", "Enter")
            errors.clear()  # of the answer that asked for the key
            expect(page.locator("#num-frames")).to_have_attribute("placeholder", "3")
            expect(page.locator("#fps")).to_have_attribute("placeholder", "8")
            expect(page.locator("#steps")).to_have_value("20")
            expect(page.locator("#n")).to_be_hidden()
            page.fill("#prompt", "gray 90")
            page.fill("#width", "32")
            page.fill("#height", "32")
            page.fill("#num-frames", "8")
            page.fill("#fps", "16")
            page.fill("#steps", "9999")
            page.click("#draw")
            wait_until(lambda: server.engine.stats().running == 1)
            page.click("#stop")
            expect(page.locator("#status")).to_have_text("Stopped.")
            wait_until(lambda: server.engine.stats().running == 0)
            page.fill("#steps", "7")
            page.click("#draw")
            video = page.locator("video#picture[data-state=final]")
            video.wait_for(timeout=60_000)
            page.wait_for_function("document.querySelector('video').readyState >= 2")
            shape = "video => [video.videoWidth, video.videoHeight, video.duration]"
            assert video.evaluate(shape) == [32, 32, 0.5]
            # The video last: a server that is to end waits until that is fetched.
            of_api = [url for url in asked if "/v1/videos/" in url]
            assert of_api[-1].endswith("/content?variant=video")
            expect(page.locator("#summary")).to_contain_text("7 of 7 full passes")
            expect(page.locator("#progress")).to_have_attribute("aria-valuenow", "100")
            page.locator("#gallery button").click()
            expect(video).to_be_visible()
            page.screenshot(path=tmp_path / "video.png", full_page=True)
    assert errors == []


def test_comments_in_a_stream_are_skipped(
    demo: TextToImagePipeline, page: Page
) -> None:
    with served(demo, keep_alive_seconds=0.002) as server:
        page.goto(server.url)
        page.fill("#prompt", "a star")
        page.fill("#steps", "8")
        page.click("#draw")
        page.wait_for_selector("#picture[data-state=final]", timeout=60_000)
        assert page.locator("#timeline .cell[data-action]").count() == 8
        assert page.locator("#error").is_hidden()


def test_stop_cancels(server: Served, page: Page) -> None:
    page.goto(server.url)
    page.fill("#prompt", "a star")
    page.fill("#steps", "3000")
    page.click("#draw")
    page.wait_for_selector("#timeline .cell[data-action]")
    assert server.engine.stats().running == 1
    page.click("#stop")
    for _ in range(100):
        if server.engine.stats().running == 0:
            break
        page.wait_for_timeout(50)
    assert server.engine.stats().running == 0


def test_an_error_is_shown(server: Served, page: Page) -> None:
    page.goto(server.url)
    page.fill("#prompt", "a star")
    page.fill("#width", "100")
    page.click("#draw")
    expect(page.locator("#error")).to_contain_text("must be a multiple of 16")


def test_a_key_is_asked_for(demo: TextToImagePipeline, page: Page) -> None:
    with served(demo, api_keys=("sk-page",)) as server:
        page.goto(server.url)
        page.fill("#api-key", "sk-page")
        page.press("#api-key", "Enter")
        page.wait_for_selector("#cache option[value=taylorseer]", state="attached")
        page.fill("#prompt", "a star")
        page.fill("#steps", "4")
        page.click("#draw")
        page.wait_for_selector("#picture[data-state=final]", timeout=60_000)
        width = page.evaluate("document.querySelector('#picture').naturalWidth")
        assert width == 128


def test_the_documentation_page_lists_the_fields(server: Served, page: Page) -> None:
    page.goto(f"{server.url}/docs")
    for word in ("/v1/images/generations", "cache_options", "partial_images"):
        expect(page.locator("body")).to_contain_text(word)
