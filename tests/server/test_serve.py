"""``max-diffusion serve`` as a process: how it starts, and how it ends."""

from __future__ import annotations

import re
import shutil
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from processes import run
from serving import COMMAND, free_port, started, wait_until

from max_diffusion import (
    CACHES,
    NoCacheConfig,
    RequestError,
    StepMaskConfig,
    TaylorSeerConfig,
    demo_model_path,
)
from max_diffusion.cli.main import main
from max_diffusion.serving.http.run import listen, shown_address
from max_diffusion.serving.http.settings import ServerSettings, read_api_keys

BODY = {"prompt": "a red circle", "steps": 4, "seed": 1}


def is_up(url: str, path: str = "/health") -> bool:
    try:
        return httpx.get(url + path, timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def serve(*options: str) -> Any:
    return run(*COMMAND, *options, timeout=120)


def test_sigterm_finishes_what_was_asked_and_exits_0() -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    # Time for its steps where others keep the machine busy.
    options = ("--port", str(port), "--max-steps", "9999", "--drain-timeout", "300")
    with started(*options) as process:
        # It answers at once, and says that it loads.
        wait_until(lambda: is_up(url, "/health/live"))
        wait_until(lambda: is_up(url))
        answers: list[httpx.Response] = []
        body = BODY | {"steps": 900}
        thread = threading.Thread(
            target=lambda: answers.append(
                httpx.post(f"{url}/v1/images/generations", json=body, timeout=300)
            )
        )
        thread.start()
        wait_until(lambda: httpx.get(f"{url}/health").json()["running"] == 1)
        process.send_signal(signal.SIGTERM)
        # Those who ask whether it lives or draws are told, until it ends.
        wait_until(lambda: httpx.get(f"{url}/health").status_code == 503)
        assert is_up(url, "/health/live")
        refused = httpx.post(f"{url}/v1/images/generations", json=BODY, timeout=60)
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "draining"
        assert not answers
        thread.join(300)
        assert process.wait(60) == 0
        assert answers[0].status_code == 200
        assert answers[0].json()["max_diffusion"]["total_passes"] == 900
        text = process.stderr.read()
        assert "finishing what was asked" in text
        assert text.rstrip().endswith("stopped")
        assert not is_up(url, "/health/live")


def test_a_video_that_is_finished_after_a_signal_can_be_fetched() -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    options = ("--model", "demo-video", "--port", str(port), "--drain-timeout", "300")
    with started(*options) as process:
        wait_until(lambda: is_up(url))
        body = BODY | {"steps": 100}
        job = (
            f"{url}/v1/videos/{httpx.post(f'{url}/v1/videos', json=body).json()['id']}"
        )
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: not is_up(url))
        wait_until(lambda: httpx.get(job).json()["status"] == "completed")
        assert httpx.get(f"{job}/content?variant=thumbnail").status_code == 200
        time.sleep(1)
        assert httpx.get(f"{job}/content").status_code == 200
        assert process.wait(60) == 0


def test_a_video_that_nobody_fetches_keeps_no_server() -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    options = ("--model", "demo-video", "--port", str(port), "--drain-timeout", "300")
    with started(*options) as process:
        wait_until(lambda: is_up(url))
        body = BODY | {"steps": 1}
        job = (
            f"{url}/v1/videos/{httpx.post(f'{url}/v1/videos', json=body).json()['id']}"
        )
        wait_until(lambda: httpx.get(job).json()["status"] == "completed")
        process.send_signal(signal.SIGTERM)  # after its end
        assert process.wait(60) == 0


def test_who_does_not_finish_in_time_is_told() -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    options = ("--port", str(port), "--max-steps", "9999", "--drain-timeout", "0.1")
    with started(*options) as process:
        wait_until(lambda: is_up(url))
        answers: list[httpx.Response] = []
        threads = [
            threading.Thread(
                target=lambda extra=extra: answers.append(
                    httpx.post(
                        f"{url}/v1/images/generations",
                        json=BODY | {"steps": 9999} | extra,
                        timeout=60,
                    )
                )
            )
            for extra in ({}, {"stream": True})
        ]
        for thread in threads:
            thread.start()
        wait_until(lambda: httpx.get(f"{url}/health").json()["running"] == 2)
        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(60)
        assert process.wait(60) == 0
        plain, stream = sorted(answers, key=lambda answer: -answer.status_code)
        assert plain.status_code == 503
        assert plain.json()["error"]["code"] == "shutting_down"
        assert stream.text.startswith("event: error\n")
        assert "Traceback" not in process.stderr.read()


def test_a_second_signal_ends_at_once() -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with started("--port", str(port), "--max-steps", "9999") as process:
        wait_until(lambda: is_up(url))
        body = BODY | {"steps": 9999, "stream": True, "progress": True}
        address = f"{url}/v1/images/generations"
        with httpx.stream("POST", address, json=body, timeout=60) as stream:
            lines = stream.iter_lines()
            next(lines)
            process.send_signal(signal.SIGINT)
            wait_until(lambda: not is_up(url))
            assert is_up(url, "/health/live")
            process.send_signal(signal.SIGINT)
            assert process.wait(30) in (0, 130)


def test_a_signal_while_loading_ends_it() -> None:
    port = free_port()
    with started("--port", str(port)) as process:
        wait_until(lambda: is_up(f"http://127.0.0.1:{port}", "/health/live"))
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def test_a_taken_port_is_said() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = serve("--port", str(port))
    assert done.returncode == 2
    assert re.search(
        rf"error: serve: cannot listen on 127\.0\.0\.1 port {port} \(.*in use\); "
        "choose another --port or --host",
        done.stderr,
    )
    assert "Traceback" not in done.stderr


def test_a_model_that_is_not_whole_is_said(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(demo_model_path(), folder)
    next(folder.glob("transformer/*.safetensors")).unlink()
    done = serve("--port", "0", "--model", str(folder))
    assert done.returncode == 3
    assert "transformer" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--model", "/nowhere"], 3, "/nowhere"),
        (["--cache", "foo"], 2, "--cache: expected none, taylorseer"),
        (["--lora-memory", "1GiB"], 2, "--lora-memory: has no effect without --lora"),
        (["--lora", "a=x.safetensors"], 3, "error: x.safetensors: cannot be read"),
        (["--caches", "none,foo"], 2, "--caches: expected all, or none, taylorseer"),
        (["--caches", "auto:x=1"], 2, "--caches: auto has no option 'x'; it has"),
        (["--port", "70000"], 2, "--port: expected 0 to 65535, got 70000"),
        (["--port", "x"], 2, "invalid int value"),
        (["--host", "no.such.host.invalid"], 2, "cannot listen on no.such.host"),
        (["--host", "a..b"], 2, "cannot listen on a..b"),
        (["--max-body", "0B"], 2, "max_body_bytes must be at least 1"),
        (["--max-n", "0"], 2, "max_n must be at least 1, got 0"),
        (["--max-running", "0"], 2, "max_running must be at least 1"),
        (["--timeout", "nan"], 2, "timeout must be a number of seconds above 0"),
        (["--drain-timeout", "-1"], 2, "--drain-timeout: expected seconds"),
        (["--memory-limit", "many"], 2, "--memory-limit: expected a size"),
        (["--api-key", "two words"], 2, "printable ASCII without spaces"),
        (["--cors-origin", "example.org"], 2, "SCHEME://HOST"),
        (["--api-key-file", "/nowhere"], 2, "--api-key-file: /nowhere cannot be read"),
        (["--device", "gpu:99"], 5, "gpu:99"),
    ],
)
def test_a_bad_option_is_named(options: list[str], code: int, message: str) -> None:
    done = serve("--port", "0", *options)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "content",
    [
        b"# ours\nsk-1\n\n sk-2 \n",
        b"sk-1\r\nsk-2\r\n",
        b"\xef\xbb\xbfsk-1\r\n\r\n\t\r\nsk-2",
        b"\xef\xbb\xbf# ours\nsk-1\nsk-2",
    ],
    ids=["plain", "crlf", "bom", "bom-comment"],
)
def test_keys_of_a_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "keys"
    path.write_bytes(content)
    assert read_api_keys(path) == ("sk-1", "sk-2")
    assert ServerSettings(api_keys=read_api_keys(path)).api_keys == ("sk-1", "sk-2")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no key"),
        (b"\xef\xbb\xbf\r\n# none\r\n", "holds no key"),
        ("sk-1".encode("utf-16"), "is no UTF-8 text; save it as UTF-8, a key a line"),
    ],
)
def test_a_file_without_keys_is_named(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "keys"
    path.write_bytes(content)
    with pytest.raises(RequestError, match=message) as error:
        read_api_keys(path)
    assert str(error.value).startswith(f"--api-key-file: {path}")


@pytest.mark.parametrize(
    ("host", "shown"),
    [
        ("127.0.0.1", r"http://127\.0\.0\.1:\d+"),
        ("localhost", r"http://(127\.0\.0\.1|\[::1\]):\d+"),
        ("::1", r"http://\[::1\]:\d+"),
        ("0.0.0.0", r"http://127\.0\.0\.1:\d+ and all other addresses"),
        ("::", r"http://\[::1\]:\d+ and all other addresses"),
        ("0", r"http://127\.0\.0\.1:\d+ and all other addresses"),
    ],
)
def test_the_address_shown_is_one_to_open(host: str, shown: str) -> None:
    if ":" in host and not socket.has_ipv6:
        pytest.skip("needs IPv6")
    with listen(host, 0) as listener:
        listener.listen()
        text = shown_address(listener)
        assert re.fullmatch(shown, text)
        url = httpx.URL(text.split(" ")[0])
        with socket.create_connection((url.host, url.port or 0), timeout=5):
            pass


def test_caches_take_options_and_defaults_are_set_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found: dict[str, Any] = {}

    def note(model: Any, settings: Any, engine: Any, **options: Any) -> None:
        found.update(vars(model), **options)

    monkeypatch.setattr("max_diffusion.serving.http.run.serve", note)
    options = "none,taylorseer:target=modules:max_order=2,step-mask:compute_steps=0,5"
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--caches", options, "--cache", "taylorseer", "--host", "::1"])
    assert ended.value.code == 0
    assert found["caches"] == (
        NoCacheConfig(),
        TaylorSeerConfig(target="modules", max_order=2),
        StepMaskConfig(compute_steps=(0, 5)),
    )
    assert found["cache"] == TaylorSeerConfig()
    assert found["host"] == "::1"
    with pytest.raises(SystemExit):
        main(["serve", "--caches", "all"])
    assert found["caches"] == tuple(kind() for kind in CACHES.values())
