"""Runs one job: ``python -m max_diffusion.exporting.worker``, the job on its input."""

from __future__ import annotations

import json
import os
import sys
import threading
import time

from ..errors import MaxDiffusionError
from ..plugins import load_plugins
from .job import Job, Model


def main() -> None:
    """Reads a job as JSON, and prints what came of it as JSON."""
    fields = json.loads(sys.stdin.read())
    threading.Thread(target=_watch, args=(os.getppid(),), daemon=True).start()
    core = fields.pop("core")
    if core is not None:
        # On several, MAX 26.7 divides a module among them: up to four times the file.
        os.sched_setaffinity(0, {core})
    model = fields.pop("model")
    model["plugins"] = tuple(model["plugins"])
    code = 0
    try:
        load_plugins(model["plugins"])
        artefact, seconds = Job(Model(**model), **fields).run()
        result = {"key": artefact.manifest.key, "seconds": seconds}
        print(json.dumps(result), flush=True)
    except MaxDiffusionError as err:
        print("error:", " ".join(str(err).splitlines()), file=sys.stderr, flush=True)
        code = err.exit_code
    # MAX 26.7 aborts when a session ends that compiled for another machine.
    os._exit(code)


def _watch(parent: int) -> None:
    """Ends with the process that asked: nobody waits for minutes of compiling then."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


if __name__ == "__main__":
    main()
