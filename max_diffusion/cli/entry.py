"""The entry point: checks and sets what must hold before any import."""

from __future__ import annotations

import os
import signal
import sys

TYPE_CHECKING = False  # as in __init__.py
if TYPE_CHECKING:
    from typing import NoReturn


def main() -> NoReturn:
    """Runs ``max-diffusion`` and exits with the error's code."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # Until the command line has its own: no traceback from within an import.
        signal.signal(signal.SIGINT, _stop)
    own = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    _forget_working_directory(own)
    _check_graphs(os.path.join(own, "graphs"))
    from .main import main as run

    try:
        run()
    except SystemExit as end:
        _leave(end)
        raise


def _leave(end: SystemExit) -> None:
    """Ends the process as Python would, but without taking MAX down first.

    That takes 0.2 s, for memory that the system takes back anyway.
    """
    import atexit
    import threading

    others = set(threading.enumerate()) - {threading.current_thread()}
    if isinstance(end.code, int) and all(thread.daemon for thread in others):
        atexit._run_exitfuncs()
        try:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
        except OSError:
            return  # Python says what is wrong
        os._exit(end.code)


def _stop(number: int, frame: object) -> NoReturn:
    os._exit(130)  # as RequestCancelled, which may not be imported yet


def _forget_working_directory(own: str) -> None:
    """Undoes ``python -m``, which would import a user's ``graphs.py`` or ``max.py``."""
    try:
        here = os.getcwd()
    except OSError:  # deleted
        return
    if sys.path and not os.path.samefile(own, here) and sys.path[0] in ("", here):
        del sys.path[0]


def _check_graphs(own: str) -> None:
    """Ends if another ``graphs`` would be imported than this distribution's."""
    from importlib.util import find_spec

    spec = find_spec("graphs")
    found = os.path.dirname(spec.origin) if spec and spec.origin else "nothing"
    if not os.path.isdir(found) or not os.path.samefile(found, own):
        origin = spec.origin if spec else None
        print(
            f"error: graphs: expected {own}, got {origin or 'none'}; rename that one, "
            "or take its folder out of PYTHONPATH",
            file=sys.stderr or open(os.devnull, "w"),  # noqa: SIM115
        )
        sys.exit(2)
