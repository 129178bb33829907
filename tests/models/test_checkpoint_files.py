"""A folder whose transformer, or more, is in a checkpoint file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import pytest
from folders import TEST_GRAPHS, copy_folder
from max.driver import Buffer
from max.dtype import DType
from safetensors.torch import save_file
from single_files import (
    NET,
    WEIGHTS,
    Tensors,
    all_in_one,
    as_bfl,
    from_bfl,
    in_float8,
    prefixed,
    saved,
    saved_gguf,
    tensors_of,
)

from max_diffusion import (
    DeviceError,
    TextToImagePipeline,
    load_pipeline,
    open_model,
)
from max_diffusion.core.buffers import to_numpy
from max_diffusion.pipelines import inspection, weight_memory
from max_diffusion.pipelines.inspection import inspect

KINDS = gguf.GGMLQuantizationType
LEVELS = 2


@pytest.fixture(scope="module")
def bfl(flux_folder: Path) -> Tensors:
    """The folder's transformer by Black Forest Labs' names."""
    return as_bfl(tensors_of(flux_folder, "transformer"))


@pytest.fixture(scope="module")
def lean_folder(flux_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder without its transformer's weights."""
    folder = copy_folder(flux_folder, tmp_path_factory.mktemp("lean") / "model")
    (folder / "transformer" / WEIGHTS).unlink()
    return folder


def loaded(pipeline: TextToImagePipeline) -> dict[str, np.ndarray]:
    """What fills the graphs' weights."""
    arrays = pipeline.graphs.opened.load()
    return {
        name: to_numpy(array) if isinstance(array, Buffer) else array
        for name, array in arrays.items()
    }


def assert_equal(
    ours: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray]
) -> None:
    assert ours.keys() == wanted.keys()
    for name, array in wanted.items():
        assert ours[name].dtype == array.dtype, name
        assert np.array_equal(ours[name], array), name


def drawn(folder: Path, file: Path | None = None) -> np.ndarray:
    pipeline = load_pipeline(
        folder,
        *("cpu", "float32"),
        transformer=file,
        precompiled=[TEST_GRAPHS / "float32"],
    )
    result = pipeline.generate(
        "two green stars", height=24, width=32, seed=7, num_inference_steps=3
    )
    assert result.report.transformer == (None if file is None else str(file))
    return result.images


def test_the_picture_is_the_folder_s(
    flux_folder: Path, lean_folder: Path, bfl: Tensors, tmp_path: Path
) -> None:
    wanted = drawn(flux_folder)
    assert wanted.std() > 1
    file = saved(tmp_path / "flux.safetensors", bfl)
    assert np.array_equal(drawn(lean_folder, file), wanted)


def test_a_gguf_s_picture_is_that_of_the_numbers_it_stands_for(
    flux_folder: Path, lean_folder: Path, bfl: Tensors, tmp_path: Path
) -> None:
    file, meant = saved_gguf(tmp_path / "flux.gguf", bfl, KINDS.Q8_0)
    folder = copy_folder(flux_folder, tmp_path / "model")
    numbers = from_bfl(meant, tensors_of(flux_folder, "transformer"))
    save_file(numbers, folder / "transformer" / WEIGHTS)
    wanted = drawn(folder)
    assert np.array_equal(drawn(lean_folder, file), wanted)
    assert not np.array_equal(wanted, drawn(flux_folder))


@pytest.mark.parametrize("encoding", ["float32", "bfloat16"])
def test_a_file_with_everything_fills_every_component(
    flux_folder: Path, tmp_path: Path, encoding: str
) -> None:
    folder = copy_folder(flux_folder, tmp_path / "model")
    file = saved(tmp_path / "all.safetensors", all_in_one(folder, LEVELS))
    for path in folder.rglob("*.safetensors"):
        path.unlink()
    whole, ours = (
        open_model(path, device="cpu", dtype=encoding, transformer=given)
        for path, given in ((flux_folder, None), (folder, file))
    )
    assert_equal(loaded(ours), loaded(whole))


@pytest.mark.parametrize("scale_name", ["", "scale_weight", "weight_scale"])
def test_float8_loads_as_its_numbers_in_a_folder(
    flux_folder: Path, lean_folder: Path, bfl: Tensors, tmp_path: Path, scale_name: str
) -> None:
    small = in_float8(bfl, scale_name)
    numbers = {
        name: tensor.float()
        * (small[name.removesuffix("weight") + scale_name] if is_scaled else 1)
        for name, tensor in small.items()
        if name in bfl
        for is_scaled in [bool(scale_name) and bfl[name].ndim == 2]
    }
    folder = copy_folder(flux_folder, tmp_path / "model")
    like = tensors_of(flux_folder, "transformer")
    save_file(from_bfl(numbers, like), folder / "transformer" / WEIGHTS)
    file = saved(tmp_path / "flux", prefixed(NET, small))
    wanted = loaded(open_model(folder, "cpu", "float32"))
    ours = open_model(lean_folder, "cpu", "float32", transformer=file)
    assert_equal(loaded(ours), wanted)


def test_compiled_graphs_are_found_as_a_folder_s(
    flux_folder: Path, lean_folder: Path, bfl: Tensors, tmp_path: Path
) -> None:
    small = in_float8(bfl, "scale_weight")
    files = [
        saved(tmp_path / "flux", bfl),
        saved(tmp_path / "small", prefixed(NET, small)),
        saved_gguf(tmp_path / "flux.gguf", bfl, KINDS.Q4_0)[0],
    ]
    pipelines = [
        open_model(path, "cpu", "float32", transformer=file)
        for path, file in [
            (flux_folder, None),
            *((lean_folder, file) for file in files),
        ]
    ]
    recipes = [
        {name: module.recipe for name, module in p.graphs.opened.modules.items()}
        for p in pipelines
    ]
    assert all(each == recipes[0] for each in recipes)


def test_what_a_file_takes_is_told(
    flux_folder: Path, lean_folder: Path, bfl: Tensors, tmp_path: Path
) -> None:
    plain = inspect(flux_folder, device="cpu", dtype="float32").components
    file, _ = saved_gguf(tmp_path / "flux.gguf", bfl, KINDS.Q8_0)
    found = inspect(lean_folder, device="cpu", dtype="float32", transformer=file)
    told = dict(found.components)
    own, whole = told.pop("transformer"), dict(plain).pop("transformer")
    # Of what is quantised, 34 bytes for 32 numbers in place of 128.
    matrices = sum(t.numel() for t in bfl.values() if t.ndim > 1 and not t.numel() % 32)
    assert own.parameters == whole.parameters
    assert own.stored_bytes == whole.stored_bytes - matrices * 4 + matrices * 34 // 32
    assert own.used_bytes == whole.used_bytes
    assert told == {role: plain[role] for role in told}


def test_what_does_not_fit_is_refused_before_anything_compiles(
    lean_folder: Path, bfl: Tensors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, _ = saved_gguf(tmp_path / "flux.gguf", bfl, KINDS.Q4_0)
    pipeline = open_model(lean_folder, "cpu", "float32", transformer=file)
    told = inspect(
        lean_folder, device="cpu", dtype="float32", transformer=file
    ).components
    used = sum(part.used_bytes for part in told.values())
    # More than the files take, and less than the weights do.
    said = r"weights: .* GiB expected to fit as float32, .* but this machine has"
    smaller = "take a smaller model or another device"

    def is_refused(rest: str, there: int, free: int, halves: DType) -> None:
        monkeypatch.setattr(weight_memory, "host_memory", lambda: there)
        monkeypatch.setattr(weight_memory, "free_memory", lambda _: free)
        monkeypatch.setattr(weight_memory, "product_dtype", lambda _: halves)
        with pytest.raises(DeviceError, match=said + rest):
            pipeline.compile()
        assert pipeline.compile_count == 0

    part = used * 3 // 5
    is_refused(r" \S+ GiB; take dtype bfloat16", part, part, DType.bfloat16)
    # A processor that multiplies in float32 keeps the matrices so.
    is_refused(rf" \S+ GiB; {smaller}", part, part, DType.float32)
    is_refused(rf" \S+ GiB; {smaller}", used // 5, used // 5, DType.bfloat16)
    ends = "end what else takes memory, or"
    is_refused(rf" free .*; {ends} take dtype", 2 * used, part, DType.bfloat16)
    is_refused(rf" free .*; {ends} {smaller}", 2 * used, used // 5, DType.bfloat16)


@pytest.mark.parametrize(
    ("dtype", "free", "fits"),
    [
        ("float32", 4.0, ("float32", "bfloat16")),
        ("float32", 0.7, ("bfloat16",)),
        ("float32", 0.1, ()),
        ("bfloat16", 4.0, ("float32", "bfloat16")),
        ("bfloat16", 0.7, ("bfloat16",)),
        ("bfloat16", 0.1, ()),
    ],
)
def test_inspect_tells_in_which_dtypes_a_model_fits(
    flux_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
    free: float,
    fits: tuple[str, ...],
) -> None:
    # As on a processor that multiplies both.
    for place in ("execution.component", "pipelines.loading"):
        monkeypatch.setattr(f"max_diffusion.{place}.product_dtype", lambda dtype: dtype)
    whole = inspect(flux_folder, device="cpu", dtype="float32").memory
    half = inspect(flux_folder, device="cpu", dtype="bfloat16").memory
    assert whole.weight_bytes * 0.5 <= half.weight_bytes < whole.weight_bytes * 0.65
    there = int(free * whole.weight_bytes)
    monkeypatch.setattr(inspection, "free_memory", lambda _: there)
    told = inspect(flux_folder, device="cpu", dtype=dtype).memory
    own = whole if dtype == "float32" else half
    assert told.weight_bytes == own.weight_bytes
    assert (told.free_bytes, told.fits) == (there, fits)
