"""Which compiled graphs a machine may run: two sources must agree."""

from __future__ import annotations

import ctypes
import platform
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from max.driver import CPU
from max.dtype import DType

from max_diffusion import RequestError
from max_diffusion.execution import matrix_unit, processor_flags, targets
from max_diffusion.execution.targets import (
    HOSTS,
    host_targets,
    parse_target,
    product_dtype,
)

V3 = "fpu sse4_2 avx avx2 bmi1 bmi2 f16c fma abm movbe xsave"
V4 = f"{V3} avx512f avx512bw avx512cd avx512dq avx512vl"
NUMPY_V3 = {"SSE42", "AVX2", "F16C", "FMA3"}
NUMPY_V4 = NUMPY_V3 | {"AVX512F", "AVX512CD", "AVX512_SKX"}
ARM = "fp asimd evtstrm aes atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"
BF16 = "+avx512f,+avx512bf16"
NUMPY_ARM = {"NEON", "ASIMD", "ASIMDHP", "ASIMDDP"}


def machine(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    system: str,
    architecture: str,
    flags: list[str],
    features: set[str],
) -> list[str]:
    """The targets of a machine that says this of itself."""
    word = "Features" if architecture == "aarch64" else "flags"
    info = folder / "cpuinfo"
    each = [f"processor\t: {i}\n{word}\t\t: {item}\n" for i, item in enumerate(flags)]
    info.write_text("\n".join(each))
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "machine", lambda: architecture)
    monkeypatch.setattr(processor_flags, "_CPUINFO", info)
    monkeypatch.setattr(targets, "_numpy_features", lambda: features)
    return [host.name for host in host_targets()]


@pytest.mark.parametrize(
    ("architecture", "flags", "features", "expected"),
    [
        ("x86_64", [V4, V4], NUMPY_V4, ["linux-x86-64-v4", "linux-x86-64-v3"]),
        ("x86_64", [V3], NUMPY_V3, ["linux-x86-64-v3"]),
        ("x86_64", [V4], NUMPY_V3, ["linux-x86-64-v3"]),
        ("x86_64", [V3], NUMPY_V4, ["linux-x86-64-v3"]),
        ("x86_64", [V4, V3], NUMPY_V4, ["linux-x86-64-v3"]),
        ("x86_64", [V3.replace(" fma ", " ")], NUMPY_V4, []),
        ("x86_64", [V4], NUMPY_V4 - {"FMA3"}, []),
        ("x86_64", [V4], set(), []),
        ("x86_64", [], NUMPY_V4, []),
        ("i686", [V4], NUMPY_V4, []),
        ("aarch64", [ARM], NUMPY_ARM, ["linux-aarch64"]),
        ("aarch64", [ARM.replace(" lrcpc", "")], NUMPY_ARM, []),
        ("aarch64", [ARM], NUMPY_ARM - {"ASIMDDP"}, []),
        ("riscv64", [ARM], NUMPY_ARM, []),
    ],
)
def test_what_both_sources_say_counts(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    architecture: str,
    flags: list[str],
    features: set[str],
    expected: list[str],
) -> None:
    found = machine(monkeypatch, tmp_path, "Linux", architecture, flags, features)
    assert found == expected


def test_other_systems(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mac = machine(monkeypatch, tmp_path, "Darwin", "arm64", [], NUMPY_ARM)
    assert mac == ["macos-arm64"]
    assert machine(monkeypatch, tmp_path, "Windows", "AMD64", [V4], NUMPY_V4) == []
    assert machine(monkeypatch, tmp_path, "Darwin", "x86_64", [V4], NUMPY_V4) == []


def test_this_machine_is_one_of_them() -> None:
    found = targets.targets_of(CPU())
    assert found, "tests run on x86-64-v3 or better, or on arm64"
    assert {each.name for each in found} <= HOSTS.keys()


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("linux-x86-64-v3", "linux-x86-64-v3"),
        ("x86-64-v4", "linux-x86-64-v4"),
        ("aarch64", "linux-aarch64"),
        ("macos-arm64", "macos-arm64"),
        ("cuda:sm_90", "cuda-sm_90-linux-x86-64-v3"),
        ("cuda:sm_90+linux-aarch64", "cuda-sm_90-linux-aarch64"),
        ("hip:gfx942+x86-64-v4", "hip-gfx942-linux-x86-64-v4"),
    ],
)
def test_names_of_targets(text: str, name: str) -> None:
    assert parse_target(text).name == name


@pytest.mark.parametrize("text", ["", "native", "x86-64-v9", "cuda", "cuda:sm_90+z"])
def test_other_names_are_refused(text: str) -> None:
    with pytest.raises(
        RequestError, match=r"target: expected linux-x86-64-v4-bf16, .*got"
    ):
        parse_target(text)


@pytest.mark.parametrize("text", ["cuda:", "vulkan:1", ":", "cuda:../../x"])
def test_other_gpus_are_refused(text: str) -> None:
    with pytest.raises(RequestError, match=r"target: expected a GPU such as"):
        parse_target(text)


@pytest.mark.parametrize(
    ("has_unit", "architecture", "flags", "features", "compiler", "expected"),
    [
        (True, "x86_64", f"{V4} avx512_bf16", NUMPY_V4, "", "linux-x86-64-v4-bf16"),
        (False, "x86_64", f"{V4} avx512_bf16", NUMPY_V4, BF16, "linux-x86-64-v4-bf16"),
        (False, "aarch64", f"{ARM} bf16", NUMPY_ARM, "+bf16", "linux-aarch64-bf16"),
        # A virtual machine that claims an older processor: MAX compiles for that.
        (False, "x86_64", f"{V4} avx512_bf16", NUMPY_V4, "+avx512f", None),
        # An emulated one, which shows the real one's flags.
        (False, "x86_64", f"{V4} avx512_bf16", NUMPY_V3, BF16, None),
        (False, "x86_64", V4, NUMPY_V4, BF16, None),
        (False, "aarch64", ARM, NUMPY_ARM, "+bf16", None),
        (False, "x86_64", "", NUMPY_V4, BF16, None),
    ],
)
def test_what_multiplies_bfloat16(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    has_unit: bool,
    architecture: str,
    flags: str,
    features: set[str],
    compiler: str,
    expected: str | None,
) -> None:
    compiled = frozenset(compiler.split(","))
    monkeypatch.setattr(targets, "permitted_matrix_unit", lambda: has_unit)
    monkeypatch.setattr(targets, "compiler_features", lambda: compiled)
    names = machine(monkeypatch, tmp_path, "Linux", architecture, [flags], features)
    best = [name for name in names if HOSTS[name].multiplies_bfloat16]
    assert best == ([] if expected is None else [expected])
    assert names[: len(best)] == best
    is_able = expected is not None
    wanted = DType.bfloat16 if is_able else DType.float32
    assert product_dtype(DType.bfloat16) == wanted
    assert product_dtype(DType.float32) == DType.float32


@pytest.mark.parametrize("name", HOSTS)
def test_a_target_says_whether_it_multiplies_bfloat16(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(targets, "permitted_matrix_unit", lambda: True)
    descriptor = HOSTS[name].descriptor
    monkeypatch.setattr(targets, "get_virtual_cpu_target", lambda: descriptor)
    wanted = DType.bfloat16 if name.endswith("-bf16") else DType.float32
    assert product_dtype(DType.bfloat16) == wanted
    assert product_dtype(DType.float32) == DType.float32


@pytest.mark.parametrize(
    ("system", "machine_name", "flags"),
    [
        ("darwin", "x86_64", "amx_tile amx_bf16"),
        ("linux", "aarch64", "amx_tile amx_bf16"),
        ("linux", "x86_64", "amx_tile amx_int8"),
        ("linux", "x86_64", ""),
    ],
)
def test_a_unit_that_does_not_multiply_bfloat16_is_not_asked_for(
    monkeypatch: pytest.MonkeyPatch, system: str, machine_name: str, flags: str
) -> None:
    def refuse(*names: object) -> None:
        raise AssertionError("the operating system was asked")

    said = frozenset(flags.split())
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "machine", lambda: machine_name)
    monkeypatch.setattr(matrix_unit, "system_flags", lambda: said)
    monkeypatch.setattr(ctypes, "CDLL", refuse)
    assert not matrix_unit.permitted_matrix_unit()


@pytest.mark.parametrize(("answer", "expected"), [(0, True), (-1, False)])
def test_the_operating_system_decides_on_the_unit(
    monkeypatch: pytest.MonkeyPatch, answer: int, expected: bool
) -> None:
    asked = []

    def syscall(*numbers: int) -> int:
        asked.append(numbers)
        return answer

    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    flags = frozenset(["amx_tile", "amx_bf16"])
    monkeypatch.setattr(matrix_unit, "system_flags", lambda: flags)
    libc = SimpleNamespace(syscall=syscall)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: libc)
    assert matrix_unit.permitted_matrix_unit() == expected
    assert asked == [(158, 0x1023, 18)]
