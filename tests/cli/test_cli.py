"""The command line, in processes of its own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import new_model
import numpy as np
import processes
import pytest
from commands import COMMAND, parse, run
from new_model import write_folder
from pictures import open_png, psnr
from PIL import Image

from max_diffusion import (
    CACHES,
    FirstBlockConfig,
    NoCacheConfig,
    RequestError,
    TaylorSeerConfig,
    TextToImagePipeline,
)
from max_diffusion.caches import cache_from_text
from max_diffusion.caches.converters import CONVERTERS
from max_diffusion.core.setting_names import SHORT_FORMS

ROOT = Path(__file__).parents[2]


# Arguments, without a model.


def test_arguments_become_a_job(tmp_path: Path) -> None:
    job = parse(
        *("one", "", "--steps", "7", "--width", "96", "--seed", str(2**40)),
        *("--true-cfg", "2.5", "--negative-prompt", "dull", "--num-images", "3"),
        *("--cache", "first-block", "--output", str(tmp_path / "x.png")),
        *("--timeline", str(tmp_path / "t.png"), "--guidance", "0"),
    )
    request = job.request
    assert request.prompts == ("one", "")
    assert (request.num_inference_steps, request.width, request.height) == (7, 96, None)
    assert (request.true_cfg_scale, request.guidance_scale) == (2.5, 0.0)
    assert (request.seed, request.negative_prompt) == (2**40, "dull")
    assert job.num_images == 6
    assert job.cache == FirstBlockConfig()
    assert list(tmp_path.iterdir()) == []


def test_a_random_seed_may_be_one_of_several(tmp_path: Path) -> None:
    words = ("a", "b", "--output", str(tmp_path / "x.png"), "--seed=-1,7")
    first, second = (parse(*words).request.seeds for _ in range(2))
    assert first[1] == second[1] == 7
    assert first[0] != second[0]
    assert min(first[0], second[0]) >= 0


def test_help_lists_the_options_of_plugins(tmp_path: Path) -> None:
    plugin = tmp_path / "video_plugin.py"
    plugin.write_text(
        "import sys\n"
        f"sys.path += {[str(ROOT / 'tests'), str(ROOT / 'examples')]!r}\n"
        "import max_diffusion, toy_video\n"
        "max_diffusion.register_model('ToyVideo', toy_video.ToyVideoPipeline)\n"
    )
    done = run("--help", "--plugin", plugin)
    assert done.returncode == 0, done.stderr
    assert "--num-frames" in done.stdout
    assert "--max-sequence-length" in done.stdout


def test_settings_have_diffusers_names_and_short_ones(tmp_path: Path) -> None:
    output = ("--output", str(tmp_path / "x.png"), "--seed", "1")
    values = {"steps": "7", "guidance": "2.5", "true-cfg": "3", "num-images": "2"}
    assert [short.replace("-", "_") for short in values] == list(SHORT_FORMS.values())
    short = [word for name, value in values.items() for word in (f"--{name}", value)]
    pairs = zip(SHORT_FORMS, values.values(), strict=True)
    long = [word for name, value in pairs for word in (f"--{name}", value)]
    hyphens = [word.replace("_", "-") for word in long]
    one = parse("a", *output, *short).request
    assert one == parse("a", *output, *hyphens).request
    assert (one.num_inference_steps, one.guidance_scale) == (7, 2.5)
    assert (one.true_cfg_scale, one.num_images_per_prompt) == (3.0, 2)


def test_texts_and_seeds_of_each_picture(tmp_path: Path) -> None:
    request = parse(
        *("one", "two", "--seed", "3,-4", "--max-sequence-length", "256"),
        *("--prompt-2", "first", "--prompt-2", "second", "--negative-prompt", "dull"),
        *("--negative-prompt-2", "", "--negative-prompt-2", "gray"),
        *("--output", str(tmp_path / "x.png")),
    ).request
    assert (request.seed, request.seeds) == (3, (3, -4))
    assert request.options == {"max_sequence_length": 256}
    assert request.prompt_2 == ("first", "second")
    assert request.negative_prompt == "dull"
    assert request.negative_prompt_2 == ("", "gray")
    one = parse("one", "two", "--seed", "3", "--output", str(tmp_path / "x.png"))
    assert (one.request.seed, one.request.seeds) == (3, None)
    assert (one.request.prompt_2, one.request.negative_prompt) == (None, None)


def test_a_seed_not_given_is_another_every_time(tmp_path: Path) -> None:
    output = ("--output", str(tmp_path / "x.png"))
    ways: list[tuple[str, ...]] = [(), ("--seed", "-1")]
    seeds = {parse("a", *output, *way).request.seed for way in ways for _ in range(4)}
    assert len(seeds) == 8
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_steps_are_timed_for_those_who_look_at_the_times(tmp_path: Path) -> None:
    output = ("a", "--output", str(tmp_path / "x.png"))
    assert not parse(*output).request.is_timed
    assert parse(*output, "--json").request.is_timed
    assert parse(*output, "--timeline", str(tmp_path / "t.png")).request.is_timed


def test_cache_options_are_parsed_by_their_types() -> None:
    options = ["cache_interval=3", "max_order=2"]
    assert cache_from_text("taylorseer", options) == TaylorSeerConfig(3, 9, 2)
    assert cache_from_text("first-block", ["threshold=2e-1"]) == FirstBlockConfig(0.2)
    assert cache_from_text("none", []) == NoCacheConfig()


@pytest.mark.parametrize(
    ("name", "option", "message"),
    [
        ("taylorseer", "cache_interval=2.5", "must be a whole number, got '2.5'"),
        ("taylorseer", "cache_interval=0", "cache_interval must be at least 1, got 0"),
        ("first-block", "threshold=low", "threshold must be a number, got 'low'"),
        (
            "first-block",
            "threshold=nan",
            "threshold must be a number of 0 or more, got nan",
        ),
        ("taylorseer", "x", "expected key=value, got 'x'"),
        ("taylorseer", "x=1", "it has compute_steps, compute_last, cache_interval"),
        ("none", "x=1", "none has no option 'x'; it has none"),
        ("tea", "x=1", f"expected {', '.join(CACHES)}, got 'tea'"),
    ],
)
def test_bad_cache_options_are_named(name: str, option: str, message: str) -> None:
    with pytest.raises(RequestError, match=re.escape(message)):
        cache_from_text(name, [option])


def test_a_cache_option_given_twice_is_an_error() -> None:
    with pytest.raises(RequestError, match="max_order is given twice"):
        cache_from_text("taylorseer", ["max_order=1", "max_order=2"])


@pytest.mark.parametrize("name", CACHES)
def test_every_field_of_every_cache_can_be_given(name: str) -> None:
    hints = get_type_hints(CACHES[name])
    assert {hints[item.name] for item in fields(CACHES[name])} <= set(CONVERTERS)


def test_a_timeline_may_not_replace_the_picture(tmp_path: Path) -> None:
    output = str(tmp_path / "x.png")
    with pytest.raises(RequestError, match="is a picture's name already"):
        parse("a", "--output", output, "--timeline", output)


@pytest.mark.parametrize(
    "words", [("--version",), ("--help",), ("generate", "a", "--steps", "x")]
)
def test_python_m_is_the_same_command(words: tuple[str, ...]) -> None:
    installed = processes.run(COMMAND[0], *words)
    module = processes.run(sys.executable, "-m", "max_diffusion", *words)
    assert module.returncode == installed.returncode == (2 if words[1:] else 0)
    assert (module.stdout, module.stderr) == (installed.stdout, installed.stderr)
    assert module.stdout or module.stderr


def test_help_lists_every_cache_and_its_options() -> None:
    done = run("--help")
    assert done.returncode == 0
    for name, kind in CACHES.items():
        assert name in done.stdout
        assert all(f"{item.name}=" in done.stdout for item in fields(kind))


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["a", "--steps", "0"], 2, "num_inference_steps must be at least 1"),
        (["a", "--steps", "x"], 2, "--num-inference-steps: invalid int value: 'x'"),
        (["a", "--num-images", "0"], 2, "num_images_per_prompt must be at least 1"),
        (["a", "--seed", "1,x"], 2, "--seed: expected a whole number, or one of each"),
        (["a", "--seed", "1,2"], 2, "2 seeds for pictures: 1; give one for each"),
        (["a", "--max-sequence-length", "0"], 2, "must be at least 1, got 0"),
        (["a", "b", "--prompt-2", "c", *["--prompt-2", "d"] * 2], 2, "2; got 3"),
        (["a", "--guidance", "nan"], 2, "guidance_scale must be a number"),
        (["a", "--output", "/no/such/x.png"], 2, "/no/such does not exist"),
        (["a", "--output", "x.bmp"], 2, "or .mp4, the formats written, got .bmp"),
        (["a", "--output", "x.mp4"], 2, "x.mp4: mp4 cannot hold an image; write .png,"),
        (["a", "--output", "x.webp", "--width", "16384"], 2, "at most 16383 pixels"),
        (["a", "--timeline", "/"], 2, "--timeline: / is a folder"),
        (["a", "--output", "", "--num-images", "2"], 2, "--output: . is a folder"),
        (["a", "--output", ".", "--num-images", "2"], 2, "--output: . is a folder"),
        (["a", "--output", ".png", "--num-images", "2"], 2, "--output: .png must end"),
        (["a", "--num-shots", "3"], 2, "--plugin for other models' options"),
        (["a", "--steps", "1", "b"], 2, "unrecognized arguments: b; give all prompts"),
        (["a", "--cache", "tea"], 2, "fastercache, got 'tea'"),
        (["a", "--cache-option", "x=1"], 2, "none has no option 'x'; it has none"),
        (["a", "--model", ""], 2, "--model: expected a name or a folder, got nothing"),
        (["a", "--device", "tpu"], 2, "expected auto, cpu, gpu or gpu:INDEX"),
        (["a", "--device", "cpu:7"], 2, "expected auto, cpu, gpu or gpu:INDEX"),
        (["a", "--device", "gpu:77"], 5, "GPUs here"),
        (["a", "--model", "no-such-model"], 3, "no folder here and no hub repository"),
        (["a", "--step", "5"], 2, "unrecognized arguments: --step"),
        ([os.fsdecode(b"\xff")], 2, "expected UTF-8 text"),
        ([], 2, "required: PROMPT"),
    ],
)
def test_bad_arguments_are_one_line_and_a_code(
    tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    done = run(*arguments, cwd=tmp_path)
    assert message in done.stderr
    assert (done.returncode, len(done.stderr.splitlines())) == (code, 1)
    assert done.stderr.startswith("error: ")
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_where_an_error_came_from(tmp_path: Path) -> None:
    done = run("a", "--steps", "0", "--debug", cwd=tmp_path)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "RequestError: request: num_inference_steps" in done.stderr


# Ctrl-C, while the main thread is in foreign code that does not return.

_BUSY = """
import hashlib
from max_diffusion.cli.main import Interruption
with Interruption() as interruption:
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # minutes
    print("back", flush=True)
"""


@pytest.fixture
def busy() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", _BUSY],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=dict(os.environ),
    )
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.communicate()


def test_second_ctrl_c_ends_at_once_even_within_foreign_code(
    busy: subprocess.Popen[str],
) -> None:
    busy.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        busy.wait(1)
    busy.send_signal(signal.SIGINT)
    output, errors = busy.communicate(timeout=30)
    assert (busy.returncode, output, errors) == (130, "", "")


def test_closed_stderr_keeps_errors_out_of_standard_output() -> None:
    done = processes.run("sh", "-c", f"{' '.join(COMMAND)} a --steps 0 2>&-")
    assert (done.returncode, done.stdout) == (2, "")


def test_first_ctrl_c_is_told_at_the_next_check() -> None:
    code = """
import os, signal, time
from max_diffusion.cli.main import Interruption
from max_diffusion.errors import RequestCancelled
with Interruption() as interruption:
    interruption.check()
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(1000):
        time.sleep(0.01)
        try:
            interruption.check()
        except RequestCancelled as err:
            print(err.exit_code)
            break
print(signal.getsignal(signal.SIGINT) is signal.SIG_IGN)  # on the way out
"""
    done = processes.run_python(code)
    assert (done.stdout, done.stderr) == ("130\nTrue\n", "")


# Whole runs of the demo model. The fixture has compiled it, so these find it compiled.


def test_a_picture_with_report_and_timeline(
    demo: TextToImagePipeline, tmp_path: Path
) -> None:
    done = run(
        "two green stars",
        *("--steps", 12, "--seed", 4, "--dtype", "float32", "--json"),
        *("--output", tmp_path / "x.png", "--timeline", tmp_path / "t.png"),
        *("--cache", "taylorseer", "--cache-option", "cache_interval=3"),
    )
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert report["files"] == [str(tmp_path / "x.png")]
    assert (report["full_passes"], report["total_passes"]) == (10, 12)
    assert report["cache"]["cache_interval"] == 3
    assert [record["step"] for record in report["steps"]] == list(range(12))
    wanted = demo.generate(
        "two green stars",
        seed=4,
        num_inference_steps=12,
        cache=TaylorSeerConfig(cache_interval=3),
    ).images[0]
    with open_png(tmp_path / "x.png") as image:
        assert np.array_equal(np.asarray(image), wanted)
        assert image.text["parameters"].startswith("two green stars\nSteps: 12, ")
        assert json.loads(image.text["max_diffusion"])["seed"] == 4
    with Image.open(tmp_path / "t.png") as image:
        assert image.width >= 640


def test_several_pictures_and_one_line_each(
    demo: TextToImagePipeline, tmp_path: Path
) -> None:
    done = run(
        *("a", "", "--steps", 1, "--num-images", 2),
        *("--output", tmp_path / "x.png"),
    )
    assert done.returncode == 0
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["x-1.png", "x-2.png", "x-3.png", "x-4.png"]
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == [str(tmp_path / n) for n in names]
    seed = re.search(r"seed (\d+)", lines[0])
    prompts = []
    for name in names:
        with open_png(tmp_path / name) as image:
            settings = json.loads(image.text["max_diffusion"])
            prompts.append(image.text["parameters"].split("\n")[0])
            assert seed
            assert settings["seed"] == int(seed[1])
    assert prompts == ["a", "a", "", ""]


def test_each_picture_tells_its_own_seed(
    demo: TextToImagePipeline, tmp_path: Path
) -> None:
    done = run(
        *("a", "--steps", 2, "--num-images", 2, "--seed", f"8,{2**40}", "--json"),
        *("--max-sequence-length", 20, "--output", tmp_path / "x.png"),
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["seeds"] == [8, 2**40]
    assert json.loads(done.stdout)["max_sequence_length"] == 20
    seeds = []
    for name in ("x-1.png", "x-2.png"):
        with open_png(tmp_path / name) as image:
            seed = re.search(r"Seed: (\d+)", image.text["parameters"])
            assert seed
            seeds.append(seed[1])
            last = np.asarray(image)
    assert seeds == ["8", str(2**40)]
    alone = demo.generate(
        "a", seed=2**40, num_inference_steps=2, max_sequence_length=20
    )
    assert psnr(last, alone.images[0]) >= 50


def test_a_full_disk_behind_standard_output_is_one_line(
    demo: TextToImagePipeline, tmp_path: Path
) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*COMMAND, "a", "--steps", "1"],
            stdout=full,
            stderr=subprocess.PIPE,
            env=dict(os.environ),  # see processes.run
            cwd=tmp_path,
            text=True,
            check=False,
        )
    message = "error: standard output: No space left on device; free some\n"
    assert (done.returncode, done.stderr) == (2, message)


def test_a_size_the_model_cannot_draw_is_told_before_compiling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("MODULAR_CACHE_DIR", str(cache))
    done = run("a", "--width", 1000, cwd=tmp_path)
    assert not cache.exists()
    assert done.returncode == 2
    assert "width must be a multiple of 16 pixels, got 1000" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.parametrize("signals", [1, 2])
def test_ctrl_c_while_denoising_ends_cleanly(
    demo: TextToImagePipeline, tmp_path: Path, signals: int
) -> None:
    terminal, side = os.openpty()
    process = subprocess.Popen(
        [
            *COMMAND,
            *("a", "--steps", "10000"),
            *("--output", str(tmp_path / "x.png")),
        ],
        stdout=subprocess.PIPE,
        stderr=side,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "100"},
    )
    os.close(side)
    shown = b""
    # The bar is there on a terminal, and says when the loop is running.
    while b"denoising" not in shown and (part := read(terminal)):
        shown += part
    assert b"denoising" in shown
    for _ in range(signals):
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)
    while part := read(terminal):
        shown += part
    output, _ = process.communicate(timeout=60)
    os.close(terminal)
    assert (process.returncode, output) == (130, b"")
    assert b"Traceback" not in shown
    assert (b"cancelled: stopped by Ctrl-C" in shown) or signals == 2
    assert shown.rfind(b"\x1b[?25h") > shown.rfind(b"\x1b[?25l")  # cursor is back
    assert list(tmp_path.iterdir()) == []


def read(terminal: int) -> bytes:
    """What a terminal shows next; nothing when the other side has closed it."""
    try:
        return os.read(terminal, 4096)
    except OSError:  # Linux's way to say end of file here
        return b""


def test_the_readme_command_draws_a_picture(
    demo: TextToImagePipeline, tmp_path: Path
) -> None:
    done = run("a red circle above a blue square", "--steps", 4, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("out.png: seed ")
    assert "4 of 4 full passes" in done.stdout
    with open_png(tmp_path / "out.png") as image:
        assert image.size == (128, 128)
        prompt = image.text["parameters"].split("\n")[0]
        assert prompt == "a red circle above a blue square"
        assert len(np.unique(np.asarray(image))) > 50


def test_compiled_graphs_that_can_only_be_read_are_used_and_not_compiled_again(
    toy_folder: Path, tmp_path: Path
) -> None:
    """Where MAX keeps them the disk is full, for all that the command can tell."""
    (tmp_path / "sitecustomize.py").write_text(
        "import shutil\n"
        "usage = shutil.disk_usage\n"
        "def full(path):\n"
        "    is_own = 'max_diffusion-' in str(path)\n"
        "    return usage(path)._replace(free=2**40 if is_own else 0)\n"
        "shutil.disk_usage = full\n"
    )
    variables = {"PYTHONPATH": str(tmp_path), "TMPDIR": str(tmp_path)}
    plugin = ("--model", toy_folder, "--plugin", new_model.__file__)
    words = ("gray 1", *plugin, "--steps", 1, "--json", "--output", tmp_path / "x.png")
    assert run(*words).returncode == 0  # compiles them, if no other test has
    done = run(*words, env=dict(os.environ) | variables)
    own = tmp_path / f"max_diffusion-{os.geteuid()}"
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("compile cache: the disk of ")
    assert done.stderr.endswith(
        f" is full; compiled graphs are kept in {own} (MODULAR_CACHE_DIR chooses "
        "another folder)\n"
    )
    assert done.stderr.count("\n") == 1
    graphs = [path for path in own.rglob("*") if path.is_file()]
    assert graphs
    assert all(path.is_symlink() for path in graphs)  # nothing new


# Output that is not UTF-8.


@pytest.mark.parametrize(
    "variables",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "latin-1"},
        {"LC_ALL": "C"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
)
def test_what_the_output_cannot_write_is_escaped(
    demo: TextToImagePipeline, tmp_path: Path, variables: dict[str, str]
) -> None:
    words = "\U0001f600 " + "w\xf3rd " * 90  # more than CLIP reads: a warning quotes it
    done = subprocess.run(
        [*COMMAND, words, "--steps", "1", "--output", "\U0001f600.png"],
        env=dict(os.environ) | variables,
        cwd=tmp_path,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr
    assert b"warning: prompt 1 is longer than" in done.stderr
    assert b".png: seed " in done.stdout
    with open_png(tmp_path / "\U0001f600.png") as image:
        assert json.loads(image.text["max_diffusion"])["prompts"] == [words]


def test_a_file_name_that_is_no_utf_8_is_written_and_said(
    demo: TextToImagePipeline, tmp_path: Path
) -> None:
    name = os.fsdecode(b"x\xff.png")
    done = run("a", "--steps", 1, "--output", name, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("x\\udcff.png: seed ")
    assert os.listdir(os.fsencode(tmp_path)) == [b"x\xff.png"]


# What others bring.


@pytest.mark.parametrize("command", ["generate", "serve", "inspect", "compare", "tune"])
def test_a_plugin_that_is_not_there_is_one_line(command: str) -> None:
    done = processes.run(COMMAND[0], command, "--plugin", "nowhere.py")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: --plugin: nowhere.py cannot be loaded")
    assert done.stderr.count("\n") == 1


def test_a_cache_that_a_plugin_registered_draws(tmp_path: Path) -> None:
    path = tmp_path / "out.png"
    words = ["a heart", "--output", path, "--steps", "10", "--json"]
    words += ["--cache", "widening"]
    refused = run(*words)
    assert refused.returncode == 2
    assert "got 'widening'" in refused.stderr
    done = run(*words, "--plugin", ROOT / "examples/new_cache.py")
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert 0 < report["full_passes"] < report["total_passes"] == 10
    with Image.open(path) as picture:
        assert "widening" in str(picture.info)


def test_a_family_that_a_plugin_registered_draws(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "toy")
    words = ["gray 120", "--model", folder, "--output", tmp_path / "a.png"]
    refused = run(*words)
    assert refused.returncode == 3
    assert "ToyPipeline" in refused.stderr
    done = run(*words, "--plugin", ROOT / "examples/new_model.py")
    assert (done.returncode, done.stderr) == (0, "")
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (6, 4)
        assert picture.getextrema() == ((120, 120),) * 3
