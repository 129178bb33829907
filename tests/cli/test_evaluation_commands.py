"""``compare`` and ``tune``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import processes
import pytest
from painters import Painter
from PIL import Image

from max_diffusion import (
    CACHES,
    AbstractCacheConfig,
    RequestError,
    StepMaskConfig,
    TaylorSeerConfig,
    TeaCacheConfig,
    TextToImagePipeline,
    demo_model_path,
    read_cache_file,
)
from max_diffusion.caches.cache_file import write_cache_file
from max_diffusion.cli.evaluating import read_prompts
from max_diffusion.demo import Verdict, held_out_clip_prompts, held_out_prompts
from max_diffusion.evaluation.calibration import PROMPTS as PLAIN_PROMPTS

COMMAND = str(Path(sys.executable).with_name("max-diffusion"))
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], dict[str, Any]]:
    """Puts a pipeline in place of what would be loaded."""

    def put(pipeline: Any) -> dict[str, Any]:
        given: dict[str, Any] = {}

        def open_model(*args: object, **options: Any) -> Any:
            given.update(options, model=args[0])
            pipeline.compile = lambda: given.update(is_compiled=True)
            return pipeline

        monkeypatch.setattr("max_diffusion.pipelines.opening.open_model", open_model)
        return given

    return put


def behave(cache: AbstractCacheConfig, steps: int, prompt: str) -> tuple[float, float]:
    if isinstance(cache, TeaCacheConfig):
        return steps / 10 / (1 + 2 * cache.threshold), 0.5 + 30 * cache.threshold**2
    return steps / 10, 30 * (1 - steps / 50)


# Arguments: whatever is wrong with them is told before a model is compiled.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare"], "compare: expected prompts, or a --prompts-file"),
        (
            ["compare", "a", "--caches", "tea"],
            f"--caches: expected all, or {', '.join(CACHES)}",
        ),
        (
            ["compare", "a", "--caches", ""],
            "--caches: expected all, or none, taylorseer",
        ),
        (
            ["compare", "a", "--caches", "pab:interval=2:interval=3"],
            "--caches: interval is given twice",
        ),
        (["compare", "a", "--caches", "pab:x=1"], "--caches: pab has no option 'x'"),
        (["compare", "a", "--fewer-steps", "5,x"], "--fewer-steps: expected whole num"),
        (["compare", "a", "--fewer-steps", "28"], "--fewer-steps must be at most 27"),
        (["compare", "a", "--fewer-steps", "0"], "--fewer-steps must be at least 1"),
        (["compare", "a", "--runs", "0"], "--runs must be at least 1, got 0"),
        (["compare", "a", "--runs", "x"], "--runs: invalid int value: 'x'"),
        (["compare", "a", "--steps", "0"], "num_inference_steps must be at least 1"),
        (["compare", "a", "--seed", str(2**65)], "seed"),
        (["compare", "a", "a"], "prompts: 'a' is there twice; give each once"),
        (["compare", "a", "--height", "0"], "height must be at least 1"),
        (["compare", "a", "--height", "100"], "height must be a multiple of 16 pixels"),
        (["compare", "a", "--lpips", "no.onnx"], "lpips: no.onnx is no file"),
        (["compare", "a", "--prompts-file", "x"], "give prompts there or as words"),
        (["compare", "--prompts-file", "no.txt"], "no.txt cannot be read (No such"),
        (["compare", "a", "--output", "/dev/null"], "output: /dev/null cannot be made"),
        (["compare", "a", "--device", "tpu"], "expected auto, cpu, gpu or gpu:INDEX"),
        (["compare", "a", "--cache", "pab"], "unrecognized arguments: --cache"),
        (
            ["tune"],
            "one of --target-psnr, --target-speedup and --max-seconds, got none",
        ),
        (
            ["tune", "--target-psnr", "40", "--max-seconds", "1"],
            "one of --target-psnr, --target-speedup and --max-seconds, got 2",
        ),
        (["tune", "--target-psnr", "-1"], "target: psnr must be a number above 0"),
        (["tune", "--target-psnr", "x"], "--target-psnr: invalid float value: 'x'"),
        (["tune", "--target-speedup", "1"], "target: speedup must be a number above 1"),
        (["tune", "--max-seconds", "nan"], "target: seconds must be a number above 0"),
    ],
)
@pytest.mark.usefixtures("no_compile")
def test_bad_arguments_are_one_line(
    run: Run, tmp_path: Path, arguments: list[str], message: str
) -> None:
    code, output, errors = run(*arguments)
    assert message in errors
    assert (code, output, errors.count("\n")) == (2, "", 1)
    assert errors.startswith("error: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--caches", "none"], "tune: expected taylorseer, first-block, auto"),
        (["--caches", "auto,tea"], "got 'tea'"),
        (["--caches", "taylorseer:max_order=1"], "got 'taylorseer:max_order=1'"),
        (["--budget", "0"], "--budget: expected seconds above 0, got 0"),
        (["--budget", "nan"], "--budget: expected seconds above 0, got nan"),
        (["--steps", "0"], "num_inference_steps must be at least 1, got 0"),
        (["--seed", "-" + "9" * 30], "seed"),
        (["--height", "100"], "height must be a multiple of 16 pixels"),
        (["a", "b", "a"], "prompts: 'a' is there twice; give each once"),
        (["a", "--prompts-file", "x"], "give prompts there or as words"),
        (["--validation-file", "no.txt"], "no.txt cannot be read (No such"),
        (["--output", "/dev/null/x"], "cannot be made (/dev/null is no folder)"),
    ],
)
@pytest.mark.usefixtures("no_compile")
def test_bad_arguments_of_a_search_are_one_line(
    run: Run, tmp_path: Path, arguments: list[str], message: str
) -> None:
    code, output, errors = run("tune", "--target-psnr", "40", *arguments)
    assert message in errors
    assert (code, output, errors.count("\n")) == (2, "", 1)
    assert errors.startswith("error: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "x.txt holds no prompt; write one a line"),
        (b" \n\n", "x.txt holds no prompt; write one a line"),
        (b"\xff", "x.txt is no UTF-8 text; write one prompt a line"),
        (b"a\nb\na\n", "prompts: 'a' is there twice; give each once"),
    ],
)
def test_files_of_prompts_hold_one_a_line(
    run: Run, tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "x.txt").write_bytes(content)
    for words in (
        ["compare", "--prompts-file", "x.txt"],
        ["tune", "--target-psnr", "40", "--prompts-file", "x.txt"],
        ["tune", "--target-psnr", "40", "--validation-file", "x.txt"],
    ):
        code, output, errors = run(*words)
        assert message in errors
        assert (code, output, errors.count("\n")) == (2, "", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["x.txt"]


def test_prompts_of_a_file_of_another_system(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\n\r\nt\xe2\x80\xa8wo\r\n  three\x0c, four\n")
    assert read_prompts((), str(path)) == ("one", "t\u2028wo", "three\x0c, four")
    path.write_bytes(b"\xef\xbb\xbf\r\n")
    with pytest.raises(RequestError, match="holds no prompt"):
        read_prompts((), str(path))


def test_prompts_to_tune_and_to_validate_on_may_not_overlap(
    run: Run, tmp_path: Path
) -> None:
    (tmp_path / "x.txt").write_text("b\na\n")
    words = ("tune", "a", "--target-psnr", "40", "--validation-file", "x.txt")
    code, output, errors = run(*words)
    assert "prompts: 'a' is there twice; give each once" in errors
    assert (code, output, errors.count("\n")) == (2, "", 1)


def test_help_names_every_target_and_every_cache_option(run: Run) -> None:
    code, output, _ = run("compare", "--help")
    assert code == 0
    for name in (*CACHES, "cache_interval=5", "--lpips", "--fewer-steps"):
        assert name in output
    _, output, _ = run("tune", "--help")
    for name in ("--target-psnr", "--target-speedup", "--max-seconds", "--budget"):
        assert name in output


# With a pipeline that is there already.


def test_compare_prints_a_table_and_writes_a_page(
    run: Run, load: Callable[[Any], dict[str, Any]], tmp_path: Path
) -> None:
    painter = Painter(behave, names=("teacache", "pab"))
    given = load(painter)
    code, output, errors = run(
        *("compare", "a", "b", "--runs", 1, "--steps", 24, "--fewer-steps", "9,20")
    )
    assert (code, errors) == (0, "")
    for words in ("no cache", "teacache", "pab", "9 steps", "20 steps", "PSNR worst"):
        assert words in output
    assert "taylorseer was not run: cache: no taylorseer here" in output
    assert "comparison/report.html: open it in a browser" in output
    assert max(map(len, output.splitlines())) <= 160
    assert (tmp_path / "comparison" / "report.html").is_file()
    assert given["caches"] == tuple(CACHES)
    assert given["model"] == "demo"
    # The size is checked before the compile, and again before anything is drawn.
    assert len(painter.contexts) == 4
    assert {request.num_inference_steps for request in painter.drawn} >= {20, 9}


def test_a_narrow_table_leaves_columns_out_and_says_which(
    run: Run, load: Callable[[Any], dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    load(Painter(behave, names=("pab",)))
    cache = "pab:interval=3:min_timestep=120.5"
    words = ("compare", "a", "--runs", 1, "--steps", 24, "--caches", cache)
    _, wide, _ = run(*words)
    assert "for want of room" not in wide
    monkeypatch.setattr("max_diffusion.cli.compare._FILE_WIDTH", 120)
    _, narrow, _ = run(*words)
    table, _, rest = narrow.partition("not shown for want of room: ")
    assert max(map(len, table.splitlines())) <= 120
    for name in ("ms", "speed-up", "same time", "PSNR worst", "pab:interval=3:min"):
        assert name in table
    hidden = rest.splitlines()[0].split(", ")
    assert {"SSIM median", "cache state"} <= {*hidden}
    assert all(name in wide and name not in table for name in hidden)
    monkeypatch.setattr("max_diffusion.cli.compare._FILE_WIDTH", 60)
    _, narrowest, _ = run(*words)
    assert "pab:interval" in narrowest  # settings are named however narrow it is
    assert max(map(len, narrowest.partition("not shown")[0].splitlines())) <= 60
    monkeypatch.setattr("max_diffusion.cli.compare._FILE_WIDTH", 120)
    # A long name takes more lines, not the place of figures.
    _, narrow, _ = run(*words[:-1], f"{cache}:max_timestep=700.5")
    assert narrow.partition("want of room: ")[2].splitlines()[0].split(", ") == hidden


def test_compare_gives_its_options_on(
    run: Run, load: Callable[[Any], dict[str, Any]], tmp_path: Path
) -> None:
    painter = Painter(behave, names=("teacache", "magcache"))
    given = load(painter)
    (tmp_path / "x.txt").write_text("a\n\n  b c \n", encoding="utf-8")
    code, output, errors = run(
        *("compare", "--prompts-file", "x.txt", "--runs", 2, "--steps", 12),
        *("--caches", "teacache:threshold=0.5,magcache:ratios=1,0.5", "--seed", 8),
        *("--height", 32, "--width", 48, "--guidance", 2, "--json", "--output", "y/z"),
        *("--device", "cpu", "--dtype", "float32", "--calibration", "c.json"),
    )
    assert (code, errors) == (0, "")
    found = json.loads(output)
    assert found["files"][0] == "y/z/report.html"
    assert all((tmp_path / name).is_file() for name in found["files"])
    report = json.loads((tmp_path / "y/z/report.json").read_text())
    assert report == {key: value for key, value in found.items() if key != "files"}
    assert found["prompts"] == ["a", "b c"]
    assert (found["runs"], found["num_inference_steps"]) == (2, 12)
    labels = ["teacache:threshold=0.5", "magcache:ratios=1.0,0.5"]
    assert [row["label"] for row in found["rows"]][1:3] == labels
    assert [type(cache) for cache in given["caches"][1:]] == [
        CACHES["teacache"],
        CACHES["magcache"],
    ]
    assert (given["caches"][0], given["device"], given["dtype"]) == (
        *("none", "cpu", "float32"),
    )
    assert given["calibration"] == "c.json"
    for request in painter.drawn:
        assert (request.height, request.width, request.guidance_scale) == (32, 48, 2)
        assert request.seed == {"a": 8, "b c": 9}[request.prompts[0]]


def test_a_cache_that_the_model_cannot_run_is_told_before_compiling(
    run: Run, load: Callable[[Any], dict[str, Any]], tmp_path: Path
) -> None:
    painter = Painter(behave, names=("teacache",))
    given = load(painter)
    code, output, errors = run("compare", "a", "--caches", "teacache,pab")
    assert (code, output, errors) == (2, "", "error: cache: no pab here\n")
    code, output, errors = run("compare", "a", "--height", "17")
    assert "must be a multiple of 16, got 17" in errors
    code, output, errors = run("tune", "--target-psnr", "40", "--height", "17")
    assert "must be a multiple of 16, got 17" in errors
    assert "is_compiled" not in given
    assert list(tmp_path.iterdir()) == []


def test_tune_writes_a_cache_that_generate_takes(
    run: Run, load: Callable[[Any], dict[str, Any]], tmp_path: Path
) -> None:
    painter = Painter(behave, names=("teacache",))
    given = load(painter)
    (tmp_path / "x.txt").write_text("u\nv\n")
    code, output, errors = run(
        *("tune", "a", "b", "--target-psnr", 40, "--validation-file", "x.txt"),
        *("--output", "y", "--steps", 50, "--seed", 3),
    )
    assert (code, errors) == (0, "")
    config = read_cache_file(tmp_path / "y" / "cache.json")
    assert isinstance(config, TeaCacheConfig)
    lines = output.splitlines()
    assert "settings tried, and the best" in lines[0]
    assert lines[1].startswith(f"y/cache.json: teacache:threshold={config.threshold}, ")
    assert lines[2] == "y/report.html: open it in a browser"
    assert given["caches"] == tuple(CACHES)
    prompts = {request.prompts[0]: request.seed for request in painter.drawn}
    assert prompts == {"a": 3, "b": 4, "u": 5, "v": 6}


def test_tune_that_misses_its_target_ends_with_1_and_says_the_nearest(
    run: Run, load: Callable[[Any], dict[str, Any]], tmp_path: Path
) -> None:
    given = load(Painter(behave, names=("teacache",)))
    words = ("tune", "a", "--target-speedup", "50", "--caches", "teacache", "--json")
    code, output, errors = run(*words)
    assert code == 1
    assert errors.count("\n") == 1
    assert errors.startswith(
        "error: tune: no setting reaches 50 times as fast; the nearest, "
        "teacache:threshold=0.8, has "
    )
    assert errors.endswith("and is in tuning/cache.json\n")
    found = json.loads(output)
    assert found["is_met"] is False
    assert found["files"][0] == "tuning/cache.json"
    assert found["winner"]["label"] == "teacache:threshold=0.8"
    config = read_cache_file(tmp_path / "tuning" / "cache.json")
    assert config == TeaCacheConfig(0.8)
    assert given["caches"] == ("none", "teacache")


def test_the_demo_model_is_tuned_on_what_it_was_not_trained_on(
    run: Run, load: Callable[[Any], dict[str, Any]], tmp_path: Path
) -> None:
    texts = held_out_prompts(12)
    (tmp_path / "x.txt").write_text("u\n")

    def drawn(path: Path | None, *words: str) -> dict[str, list[str]]:
        painter = Painter(behave, names=("teacache",))
        painter.pipeline_config.path = path
        load(painter)
        goal = ("--target-psnr", 40, "--caches", "teacache", "--json")
        code, output, errors = run("tune", *words, *goal)
        assert (code, errors) == (0, "")
        found = json.loads(output)
        return {"on": found["prompts"], "by": found["validation"]["prompts"]}

    plain, own = None, demo_model_path()
    assert drawn(own) == {"on": [*texts[:6]], "by": [*texts[6:]]}
    assert drawn(own, texts[7], "a") == {
        "on": [texts[7], "a"],
        "by": [texts[6], *texts[8:]],
    }
    validation = ("--validation-file", "x.txt")
    assert drawn(own, *validation) == {"on": [*texts[:6]], "by": ["u"]}
    assert drawn(own, "a", *validation) == {"on": ["a"], "by": ["u"]}
    clips = held_out_clip_prompts(12)
    assert drawn(demo_model_path("demo-video")) == {
        "on": [*clips[:6]],
        "by": [*clips[6:]],
    }
    assert drawn(plain) == {"on": [*PLAIN_PROMPTS[:4]], "by": [*PLAIN_PROMPTS[4:]]}
    assert drawn(plain, "a")["by"] == [*PLAIN_PROMPTS[4:]]


@pytest.mark.parametrize("is_demo", [True, False])
def test_the_demo_models_judge_is_handed_in_for_it_alone(
    run: Run,
    load: Callable[[Any], dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    is_demo: bool,
) -> None:
    asked: list[str] = []

    def judge(prompt: str, frames: np.ndarray) -> Verdict | None:
        asked.append(prompt)
        is_right = bool(frames.sum() % 2)
        return Verdict(is_right, True, True, True, (), "" if is_right else "odd")

    monkeypatch.setattr("max_diffusion.demo.judge", judge)
    painter = Painter(behave, names=("teacache",))
    painter.pipeline_config.path = demo_model_path() if is_demo else Path("other")
    load(painter)
    code, output, _ = run("compare", "a", "b", "--runs", 1, "--json")
    found = json.loads(output)
    assert (code, found["num_judged"]) == (0, 2 if is_demo else 0)
    assert set(asked) == ({"a", "b"} if is_demo else set())
    assert all((row["right"] is not None) == is_demo for row in found["rows"])
    asked.clear()
    words = ("--target-psnr", 40, "--caches", "teacache", "--json")
    _, output, _ = run("tune", "c", *words)
    validation = json.loads(output)["validation"]
    assert validation["num_judged"] == (len(validation["prompts"]) if is_demo else 0)
    assert set(asked) == (set(validation["prompts"]) if is_demo else set())


def test_tune_of_the_demo_model(
    run: Run,
    load: Callable[[Any], dict[str, Any]],
    tmp_path: Path,
    demo: TextToImagePipeline,
) -> None:
    load(demo)
    (tmp_path / "x.txt").write_text("a green heart\n")
    code, output, errors = run(
        *("tune", "a red circle", "two stars", "--validation-file", "x.txt"),
        *("--target-psnr", 25, "--caches", "taylorseer", "--steps", 8),
        *("--budget", 0.5, "--json", "--seed", 2),
    )
    found = json.loads(output)
    assert (code, bool(errors)) == ((0, False) if found["is_met"] else (1, True))
    config = read_cache_file(tmp_path / "tuning" / "cache.json")
    assert isinstance(config, TaylorSeerConfig)
    assert found["winner"]["options"] == {**vars(config), "compute_steps": []}
    assert found["prompts"] == ["a red circle", "two stars"]
    validation = found["validation"]
    assert validation["prompts"] == ["a green heart"]
    assert validation["rows"][1]["label"] == found["winner"]["label"]
    drawn = [
        demo.generate("a green heart", seed=4, num_inference_steps=8, cache=cache)
        for cache in (config, "none")
    ]
    passes = drawn[0].report.full_passes
    assert validation["rows"][1]["full_passes"] == passes
    error = np.subtract(*(result.images.astype(float) for result in drawn))
    wanted = 10 * np.log10(255**2 / np.mean(error**2)) if error.any() else None
    assert validation["rows"][1]["psnr_worst"] == pytest.approx(wanted)
    best = [trial for trial in found["trials"] if not trial["given_up"]]
    assert best[0]["label"] == found["winner"]["label"] or found["num_validated"] > 1


# Whole runs of the demo model. The fixture has compiled it, so these find it compiled.


def test_compare_from_the_command_line(
    demo: TextToImagePipeline, tmp_path: Path
) -> None:
    done = processes.run(
        *(COMMAND, "compare", "a red circle", "--steps", 8, "--runs", 1, "--json"),
        *("--caches", "step-mask:compute_steps=0,1,4,7", "--seed", 6),
        cwd=tmp_path,
    )
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    baseline, cached, *_ = found["rows"]
    assert (baseline["full_passes"], baseline["right"]) == (8, 1)
    assert (cached["full_passes"], cached["total_passes"]) == (4, 8)
    wanted = demo.generate(
        "a red circle",
        num_inference_steps=8,
        seed=6,
        cache=StepMaskConfig(compute_steps=(0, 1, 4, 7)),
    )
    steps = [record["actions"] for record in cached["first_prompt_steps"]]
    assert steps == [list(record.actions) for record in wanted.report.steps]
    for name in found["files"]:
        assert (tmp_path / name).is_file()


def test_generate_with_a_cache_file(demo: TextToImagePipeline, tmp_path: Path) -> None:
    config = TaylorSeerConfig(cache_interval=3, warmup_steps=2)
    write_cache_file(tmp_path / "cache.json", config)
    done = processes.run(
        *(COMMAND, "generate", "a red circle", "--steps", 8, "--seed", 6, "--json"),
        *("--cache-file", "cache.json", "--output", "x.png", "--dtype", "float32"),
        cwd=tmp_path,
    )
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert report["cache"]["name"] == "taylorseer"
    assert report["cache"]["cache_interval"] == 3
    wanted = demo.generate("a red circle", num_inference_steps=8, seed=6, cache=config)
    assert report["full_passes"] == wanted.report.full_passes < 8
    with Image.open(tmp_path / "x.png") as image:
        assert np.array_equal(np.asarray(image), wanted.images[0])
