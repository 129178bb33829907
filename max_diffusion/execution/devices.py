"""Devices and dtypes by their names, and MAX's threads."""

from __future__ import annotations

import sys
from typing import Final

from max.driver import CPU, Accelerator, Device, accelerator_count
from max.dtype import DType

from ..core.host_threads import as_on_cpus, running_workers, usable_cpus
from ..core.validation import whole
from ..errors import DeviceError, RequestError

_DTYPES: Final = {"float32": DType.float32, "bfloat16": DType.bfloat16}


def resolve_device(name: str, threads: int | None = None) -> Device:
    """``auto``, ``cpu``, ``gpu`` or ``gpu:i`` to a device; ``auto`` prefers a GPU.

    Args:
        name: Of the device.
        threads: That compute on the CPU; by default one for each CPU that the process
            may use, of which a container's limit may be fewer than the machine has. MAX
            starts them with the first device of a process, and keeps them.

    Raises:
        RequestError: Another word, more threads than CPUs, or another number of them
            than run in this process already.
        DeviceError: That GPU is not there.
    """
    kind, _, index = name.partition(":") if isinstance(name, str) else ("", "", "")
    is_known = kind in ("auto", "cpu", "gpu") and (not index or kind == "gpu")
    if not is_known or (index and not index.isdigit()):
        raise RequestError(
            f"device: expected auto, cpu, gpu or gpu:INDEX, got {name!r}"
        )
    host = _host(threads)
    if kind == "cpu" or (kind == "auto" and accelerator_count() == 0):
        return host
    wanted, found = int(index or 0), accelerator_count()
    if wanted >= found:
        raise DeviceError(
            f"device: {name} asked for, but MAX sees {found} GPUs here; use "
            + (f"gpu:0 to gpu:{found - 1} or cpu" if found else "cpu")
        )
    return Accelerator(wanted)


def resolve_dtype(name: str | None, device: Device) -> DType:
    """``float32`` or ``bfloat16``; by default the former on CPU, the latter on GPU."""
    if name is None:
        return DType.float32 if device.is_host else DType.bfloat16
    if name not in _DTYPES:
        raise RequestError(f"dtype: expected {' or '.join(_DTYPES)}, got {name!r}")
    return _DTYPES[name]


def _host(threads: int | None) -> CPU:
    """The CPU, with as many threads if it has none yet."""
    if threads is not None:
        whole("threads", threads, minimum=1)
        if sys.platform != "linux":
            raise RequestError(
                "threads: MAX takes one a CPU; only on Linux it can be told otherwise"
            )
    running = running_workers()
    if running:
        if threads not in (None, running):
            raise RequestError(
                f"threads: got {threads}, but {running} run in this process already, "
                "since its first model; say it there"
            )
        return CPU()
    if sys.platform != "linux":
        return CPU()
    cpus = usable_cpus()
    if threads is not None and threads > cpus:
        raise RequestError(
            f"threads: expected 1 to {cpus}, the CPUs this process may use, got "
            f"{threads}"
        )
    with as_on_cpus(threads or cpus):
        return CPU()
