"""The terminal: Ctrl-C and progress bars."""

from __future__ import annotations

import os
import signal
import sys
import threading
from contextlib import ExitStack
from types import FrameType, TracebackType
from typing import Any, Self

from ..errors import RequestCancelled


class Interruption:
    """Handles Ctrl-C: the first stops at the next step, the second at once.

    A thread hears of both, because a signal handler runs only when the main thread is
    back in Python, and MAX may compile for a minute.
    """

    def __init__(self) -> None:
        self._is_asked = threading.Event()

    def __enter__(self) -> Self:
        """Takes over SIGINT; must be called in the main thread."""
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._old_fd = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._old_handler = signal.signal(signal.SIGINT, _on_signal)
        threading.Thread(target=self._watch, args=(reader,), daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Gives SIGINT back, unless already stopping; the thread ends with its pipe."""
        # A second Ctrl-C on the way out must not turn exit code 130 into a kill.
        is_stopping = self._is_asked.is_set()
        signal.signal(
            signal.SIGINT, signal.SIG_IGN if is_stopping else self._old_handler
        )
        signal.set_wakeup_fd(self._old_fd)
        os.close(self._writer)

    def check(self) -> None:
        """Raises :class:`RequestCancelled` if the user asked to stop."""
        if self._is_asked.is_set():
            raise RequestCancelled("stopped by Ctrl-C, nothing was written")

    def _watch(self, reader: int) -> None:
        is_terminal = sys.stderr.isatty()
        while number := os.read(reader, 1):
            if number[0] != signal.SIGINT:
                continue
            if self._is_asked.is_set():
                if is_terminal:
                    os.write(2, b"\x1b[?25h\n")  # rich has hidden the cursor
                os._exit(RequestCancelled.exit_code)
            self._is_asked.set()
            if is_terminal:
                os.write(2, b"\nstopping at the next step; Ctrl-C again: at once\n")
        os.close(reader)


def _on_signal(number: int, frame: FrameType | None) -> None:
    """Stands in for Python's own handler, which would raise anywhere."""


class Progress:
    """Shows progress bars on a terminal, nothing elsewhere."""

    def __init__(
        self, stack: ExitStack, *, is_shown: bool, word: str = "denoising"
    ) -> None:
        self._word = word
        self._tasks: dict[str, Any] = {}
        self._bars: Any = None
        if is_shown:
            from rich import progress
            from rich.console import Console

            columns = (
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.TaskProgressColumn(),
                progress.TimeElapsedColumn(),
            )
            self._bars = stack.enter_context(
                progress.Progress(
                    *columns, console=Console(stderr=True), transient=True
                )
            )

    def on_event(self, stage: str, what: str) -> None:
        """Shows the ``start`` or ``end`` of a stage: ``load`` or ``compile``."""
        if self._bars is None:
            return
        if what == "start":
            words = {"load": "loading weights", "compile": "compiling, once a model"}
            self._tasks[stage] = self._bars.add_task(words[stage], total=None)
        else:
            self._bars.remove_task(self._tasks.pop(stage))

    def on_step(self, done: int, total: int) -> None:
        """Shows that ``done`` of ``total`` steps are done."""
        if self._bars is None:
            return
        if "step" not in self._tasks:
            self._tasks["step"] = self._bars.add_task(self._word, total=total)
        self._bars.update(self._tasks["step"], completed=done)

    def on_share(self, share: float, what: str) -> None:
        """Shows the share that is done, 0 to 1, and what is being done."""
        if self._bars is None:
            return
        if "share" not in self._tasks:
            self._tasks["share"] = self._bars.add_task(self._word, total=1.0)
        words = f"{self._word}: {what}"
        self._bars.update(self._tasks["share"], completed=share, description=words)
