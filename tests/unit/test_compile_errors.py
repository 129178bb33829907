"""What is said where MAX refuses graphs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from max.driver import CPU

from max_diffusion import CompileError
from max_diffusion.execution.compiler import CompiledGraphs
from max_diffusion.execution.graph_module import GraphModule


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "Graph compilation failed:\nerror: cannot write to file to filesystem "
            "cache since available space(65536) is not enough to write 3397539 bytes\n",
            "Graph compilation failed: error: cannot write to file to filesystem cache "
            "since available space(65536) is not enough to write 3397539 bytes",
        ),
        ("one line\nand more of it", "one line"),
        ("failed:", "failed:"),
        ("", ""),
    ],
)
def test_the_reason_is_on_the_one_line(text: str, reason: str) -> None:
    def compile_(module: Any, custom_extensions: list[Any]) -> None:
        raise RuntimeError("Failed to compile the model.") from RuntimeError(text)

    session: Any = SimpleNamespace(compile=compile_)
    with pytest.raises(CompileError) as caught:
        CompiledGraphs(session, CPU()).add(
            [GraphModule("it", lambda module: None)], dict
        )
    assert str(caught.value) == f"compile: MAX refused it: {reason}"
