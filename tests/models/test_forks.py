"""A fork of a process with a loaded model: an error at once, where MAX would hang."""

from __future__ import annotations

import sys

import pytest
from processes import run_python

from max_diffusion import TextToImagePipeline

_FORK = """
import os, select, sys, threading, warnings
warnings.simplefilter("ignore")  # newer Pythons warn of it themselves
from max_diffusion import MaxDiffusionError, load_pipeline
from max_diffusion.engine import Engine
from max_diffusion import GenerationRequest
load = lambda: load_pipeline("demo", device="cpu", caches=("none", "taylorseer"))
pipeline = load()
engine = Engine(pipeline)
request = GenerationRequest(prompts=("a",), num_inference_steps=1)
tries = [
    lambda: pipeline.generate("a", num_inference_steps=1),
    load,
    lambda: engine.submit(request),
    engine.close,  # as at exit: at once, whoever held its lock
]
is_held, is_enough = threading.Event(), threading.Event()
def hold():  # as the engine's thread may at any time
    with engine._admission.lock:
        is_held.set()
        is_enough.wait()
holder = threading.Thread(target=hold)
holder.start()
assert is_held.wait(30)
for attempt in tries:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            attempt()
            text = "no error"
        except MaxDiffusionError as err:
            text = f"{type(err).__name__}: {err}"
        os.write(writer, text.encode())
        os._exit(0)
    if not select.select([reader], [], [], 30)[0]:
        os.kill(child, 9)
        print("hangs")
    else:
        print(os.read(reader, 10_000).decode())
    os.waitpid(child, 0)
is_enough.set()
holder.join()
print(pipeline.generate("a", num_inference_steps=1).images.shape)
engine.close()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="forks are Linux's habit")
def test_a_fork_of_a_loaded_model_is_an_error(demo: TextToImagePipeline) -> None:
    done = run_python(_FORK)
    *answers, shape = done.stdout.splitlines()
    message = "DeviceError: device: this process is a fork of one in which MAX has run"
    assert len(answers) == 4
    assert [answer.startswith(message) for answer in answers[:3]] == [True] * 3
    assert answers[3] == "no error"
    assert shape == "(1, 128, 128, 3)"
    assert (done.returncode, done.stderr) == (0, "")
