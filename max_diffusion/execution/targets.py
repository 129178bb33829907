"""Processors that graphs are compiled for, and which of them this machine has.

A compiled graph is machine code, and MAX 26.7 checks nothing of that: on a processor
that lacks an instruction it dies of SIGILL, on another architecture of SIGSEGV. So two
sources must agree on what a processor has before a graph is loaded.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping, Set
from dataclasses import dataclass
from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, final

from max.driver import get_virtual_cpu_target
from max.dtype import DType

from ..errors import RequestError
from .kernels import compiler_features
from .matrix_unit import permitted_matrix_unit
from .processor_flags import system_flags

if TYPE_CHECKING:
    from max.driver import Device

_X86_V3: Final = frozenset(
    ["avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"]
)
_X86_V4: Final = _X86_V3 | frozenset(
    ["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"]
)
_NEOVERSE_N1: Final = frozenset(["asimd", "atomics", "asimddp", "asimdhp", "lrcpc"])
# The same, as numpy has them.
_NUMPY_V3: Final = frozenset(["AVX2", "F16C", "FMA3"])
_NUMPY_V4: Final = _NUMPY_V3 | frozenset(["AVX512F", "AVX512CD", "AVX512_SKX"])
_NUMPY_ARM: Final = frozenset(["ASIMD", "ASIMDHP", "ASIMDDP"])


@final
@dataclass(frozen=True)
class HostTarget:
    """A kind of processor."""

    name: str
    """As options and folders name it."""
    descriptor: str
    """As MAX's compiler names it."""
    system: str
    """Operating system, as ``platform.system()`` says it."""
    machine: str
    """Architecture, as ``platform.machine()`` says it."""
    flags: frozenset[str]
    """What the operating system must say that the processor has; empty where the
    architecture says it all."""
    numpy_features: frozenset[str]
    """What numpy must find that it has, by asking the processor itself."""
    multiplies_bfloat16: bool = False
    """Whether it has instructions for that. Not of what numpy is asked: there, the
    compiler or the operating system is the second source."""


HOSTS: Final[Mapping[str, HostTarget]] = MappingProxyType(
    {
        host.name: host
        for host in (
            HostTarget(
                "linux-x86-64-v4-bf16",
                "cpu=x86-64-v4;features=+avx512bf16",
                "Linux",
                "x86_64",
                _X86_V4 | {"avx512_bf16"},
                _NUMPY_V4,
                multiplies_bfloat16=True,
            ),
            HostTarget(
                "linux-x86-64-v4", "x86-64-v4", "Linux", "x86_64", _X86_V4, _NUMPY_V4
            ),
            HostTarget(
                "linux-x86-64-v3", "x86-64-v3", "Linux", "x86_64", _X86_V3, _NUMPY_V3
            ),
            HostTarget(
                "linux-aarch64-bf16",
                "cpu=neoverse-n1;features=+bf16;triple=aarch64-unknown-linux-gnu",
                "Linux",
                "aarch64",
                _NEOVERSE_N1 | {"bf16"},
                _NUMPY_ARM,
                multiplies_bfloat16=True,
            ),
            HostTarget(
                "linux-aarch64",
                "cpu=neoverse-n1;triple=aarch64-unknown-linux-gnu",
                "Linux",
                "aarch64",
                _NEOVERSE_N1,
                _NUMPY_ARM,
            ),
            HostTarget(
                "macos-arm64",
                "cpu=apple-m1;triple=arm64-apple-macosx14.0",
                "Darwin",
                "arm64",
                frozenset(),
                _NUMPY_ARM,
            ),
        )
    }
)
"""Processors that graphs can be compiled for, the better of two first."""


@final
@dataclass(frozen=True)
class Target:
    """What a graph runs on: a processor, and a GPU if it is for one."""

    host: HostTarget
    gpu: str | None = None
    """API and architecture of the GPU, such as ``cuda:sm_90``."""

    @property
    def name(self) -> str:
        """As folders name it: the host's, after the GPU's if there is one."""
        gpu = "" if self.gpu is None else self.gpu.replace(":", "-") + "-"
        return gpu + self.host.name


def parse_target(text: str) -> Target:
    """Returns the target that a text such as ``linux-x86-64-v3`` names.

    A GPU is ``API:ARCHITECTURE``, with the processor beside it after a plus sign where
    that is another than linux-x86-64-v3: ``cuda:sm_90+linux-aarch64``. ``linux-`` may
    be left out.

    Raises:
        RequestError: There is no such processor, or the GPU is malformed.
    """
    first, plus, second = text.partition("+")
    gpu, host = None, text
    if ":" in first:
        gpu, host = first, second if plus else "linux-x86-64-v3"
    if gpu is not None and not re.fullmatch(r"(cuda|hip|metal):\w+", gpu):
        raise RequestError(f"target: expected a GPU such as cuda:sm_90, got {gpu!r}")
    found = HOSTS.get(host) or HOSTS.get(f"linux-{host}")
    if found is None:
        raise RequestError(
            f"target: expected {', '.join(HOSTS)} or a GPU such as cuda:sm_90, got "
            f"{text!r}"
        )
    return Target(found, gpu)


def targets_of(device: Device) -> tuple[Target, ...]:
    """Returns the targets whose graphs run on a device of this machine, best first.

    None where anything about the processor is in doubt.
    """
    gpu = None
    if not device.is_host:
        gpu = f"{device.api}:{device.architecture_name}"
    return tuple(Target(host, gpu) for host in host_targets())


def host_targets() -> tuple[HostTarget, ...]:
    """Returns the targets whose code this machine's processor runs, best first."""
    return tuple(
        host
        for host in _hosts_here()
        if not host.multiplies_bfloat16 or _multiplies_bfloat16()
    )


def product_dtype(dtype: DType) -> DType:
    """Returns the dtype of matrices for products on a CPU.

    Args:
        dtype: Of hidden states.

    Returns:
        bfloat16 where the processor that graphs are built for multiplies it: the one
        that MAX was told of, or this machine's.
    """
    is_able = dtype == DType.bfloat16 and _multiplies_bfloat16()
    return DType.bfloat16 if is_able else DType.float32


def _multiplies_bfloat16() -> bool:
    """Whether the processor that graphs are built for does."""
    if descriptor := get_virtual_cpu_target():
        return any(
            host.descriptor == descriptor and host.multiplies_bfloat16
            for host in HOSTS.values()
        )
    if permitted_matrix_unit():
        return True
    is_here = any(host.multiplies_bfloat16 for host in _hosts_here())
    return is_here and bool({"+avx512bf16", "+bf16"} & compiler_features())


def _hosts_here() -> list[HostTarget]:
    """The targets that this machine's processor is one of, by what is said of it."""
    system, machine = platform.system(), platform.machine()
    flags, features = system_flags(), _numpy_features()
    return [
        host
        for host in HOSTS.values()
        if (host.system, host.machine) == (system, machine)
        and host.flags <= flags
        and host.numpy_features <= features
    ]


def _numpy_features() -> Set[str]:
    """What numpy finds by asking the processor; its name for that is private."""
    try:
        numpy_core = import_module("numpy._core._multiarray_umath")
        features = numpy_core.__cpu_features__
    except (ImportError, AttributeError):
        return frozenset()
    return frozenset(name for name, is_there in features.items() if is_there)
