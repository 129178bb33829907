"""LoRA files on FLUX.1 against diffusers and peft, matrices and pictures."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lora_files
import numpy as np
import pytest
import torch
from folders import TEST_GRAPHS
from pictures import psnr
from safetensors.torch import load_file

from max_diffusion import (
    DeviceError,
    GenerationRequest,
    ModelLoadError,
    RequestError,
    TextToImagePipeline,
    load_pipeline,
    open_model,
)
from max_diffusion.core.host_memory import host_memory
from max_diffusion.core.loras import GivenLoras
from max_diffusion.pipelines import adapters, weight_memory
from max_diffusion.pipelines.adapters import adapted
from max_diffusion.pipelines.weight_memory import memory_beside_weights

if TYPE_CHECKING:
    from diffusers import FluxPipeline

Matrices = dict[str, torch.Tensor]
ADAPTED = ("transformer", "text_encoder")
LINEAR1 = re.compile(r"(.*single_blocks[._](\d+)[._]linear1)\.lora_(down|A)\.weight")
SINGLE = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")


def theirs_of(tensors: lora_files.Tensors) -> tuple[lora_files.Tensors, ...]:
    """The same, as diffusers can load it at this size, and what it cannot, by PEFT's.

    It splits Kohya's ``linear1`` at FLUX.1's own width, takes ComfyUI's names with
    ``lora_down`` only, and PEFT's without ``base_model.model`` only.
    """
    known: lora_files.Tensors = {}
    rest: lora_files.Tensors = {}
    for name, tensor in tensors.items():
        if "linear1." not in name:
            name = name.replace("base_model.model.", "transformer.")
            if name.startswith(("diffusion_model.", "text_encoders.")):
                name = name.replace("lora_A", "lora_down").replace("lora_B", "lora_up")
            known[name] = tensor
        if match := LINEAR1.fullmatch(name):
            whole, index, half = match.groups()
            up = tensors[f"{whole}.lora_{'up' if half == 'down' else 'B'}.weight"]
            down = tensor * (tensors[f"{whole}.alpha"] / len(tensor))
            width = len(up) // 7
            for place, module in enumerate(SINGLE):
                root = f"transformer.single_transformer_blocks.{index}.{module}"
                stop = 7 if place == 3 else place + 1
                rest[f"{root}.lora_A.weight"] = down
                rest[f"{root}.lora_B.weight"] = up[place * width : stop * width]
    return (known, rest) if rest else (known,)


@contextmanager
def loaded(
    reference: FluxPipeline,
    files: Mapping[str, tuple[lora_files.Tensors, float]],
) -> Iterator[FluxPipeline]:
    """diffusers' pipeline with LoRAs, each with its weight."""
    names: list[str] = []
    weights: list[float] = []
    for name, (tensors, weight) in files.items():
        for part, found in enumerate(theirs_of(tensors)):
            adapter = f"{name}-{part}".replace(".", "-")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the oracle's own
                reference.load_lora_weights(dict(found), adapter_name=adapter)
            names.append(adapter)
            weights.append(weight)
    try:
        reference.set_adapters(names, weights)
        yield reference
    finally:
        reference.unload_lora_weights()


def their_matrices(reference: FluxPipeline) -> dict[str, Matrices]:
    """Every weight with the LoRAs merged, float32."""
    from peft.tuners.lora import LoraLayer

    found: dict[str, Matrices] = {}
    for component in ADAPTED:
        model = getattr(reference, component)
        values = {
            name.replace(".base_layer", ""): tensor.detach().float().clone()
            for name, tensor in model.state_dict().items()
            if "lora_" not in name
        }
        for name, layer in model.named_modules():
            if isinstance(layer, LoraLayer):
                for adapter in layer.active_adapters:
                    if adapter in layer.lora_A:
                        values[f"{name}.weight"] += layer.get_delta_weight(
                            adapter
                        ).detach()
        found[component] = values
    return found


def our_matrices(folder: Path, loras: GivenLoras) -> dict[str, Matrices]:
    opened = open_model(folder, "cpu", loras=loras, caches=("none",)).graphs.opened
    return {
        component: {
            name: torch.from_numpy(np.array(opened.sources[component][1][name].read()))
            for name in opened.sources[component][0].specs
        }
        for component in ADAPTED
    }


def worst(ours: dict[str, Matrices], theirs: dict[str, Matrices]) -> float:
    """The largest error of a matrix, relative to its norm."""
    return max(
        float((tensor.double() - theirs[component][name]).norm())
        / float(theirs[component][name].double().norm())
        for component, own in ours.items()
        for name, tensor in own.items()
    )


@pytest.fixture(scope="module")
def shapes(flux_folder: Path) -> tuple[lora_files.Shapes, lora_files.Shapes]:
    """Matrices of the random folder's transformer and of its CLIP."""
    transformer, clip = (lora_files.matrices(flux_folder, name) for name in ADAPTED)
    return transformer, clip


@pytest.fixture(scope="module")
def every(
    shapes: tuple[lora_files.Shapes, lora_files.Shapes], tmp_path_factory: Any
) -> dict[str, Path]:
    """A file of each naming, with a text encoder's part where there is one."""
    transformer, clip = shapes
    folder = tmp_path_factory.mktemp("loras")
    return {
        naming: lora_files.write(
            folder / f"{naming}.safetensors",
            lora_files.lora(
                naming,
                transformer,
                None if naming in ("xlabs", "base-model") else clip,
                seed=index,
                strength=1.0,
            ),
        )
        for index, naming in enumerate(lora_files.NAMINGS)
    }


@pytest.mark.parametrize("naming", lora_files.NAMINGS)
def test_merged_matrices_are_those_of_peft(
    naming: str, every: dict[str, Path], flux_folder: Path, reference: FluxPipeline
) -> None:
    plain = their_matrices(reference)
    tensors = lora_files.load(every[naming])
    with loaded(reference, {"x": (tensors, 0.7)}) as theirs:
        wanted = their_matrices(theirs)
    ours = our_matrices(flux_folder, {str(every[naming]): 0.7})
    assert worst(ours, wanted) < 1e-6
    changed = {
        name
        for component, own in wanted.items()
        for name, tensor in own.items()
        if not torch.equal(tensor, plain[component][name])
    }
    assert len(changed) > 20
    assert worst(ours, plain) > 0.01


def test_several_add_up_each_with_its_weight(
    every: dict[str, Path], flux_folder: Path, reference: FluxPipeline
) -> None:
    chosen = {"kohya": 0.5, "peft": -1.25, "xlabs": 1.0}
    files = {name: (lora_files.load(every[name]), w) for name, w in chosen.items()}
    with loaded(reference, files) as theirs:
        wanted = their_matrices(theirs)
    ours = our_matrices(flux_folder, {str(every[n]): w for n, w in chosen.items()})
    assert worst(ours, wanted) < 1e-6


PROMPT = "a red circle above a blue square"
DRAW: dict[str, Any] = {"num_inference_steps": 4, "height": 32, "width": 40}
NAMED = dict(zip(lora_files.NAMINGS, "abcdef", strict=True))


@pytest.fixture(scope="module")
def chooser(flux_folder: Path, every: dict[str, Path]) -> TextToImagePipeline:
    """The random folder with LoRAs of all namings for requests to choose."""
    return load_pipeline(
        flux_folder,
        device="cpu",
        caches=("none", "taylorseer", "first-block"),
        precompiled=[TEST_GRAPHS / "float32"],
        adapters={NAMED[naming]: path for naming, path in every.items()},
    )


@pytest.fixture(scope="module")
def merged(flux_folder: Path, every: dict[str, Path]) -> TextToImagePipeline:
    """The same with two of them merged."""
    return load_pipeline(
        flux_folder,
        device="cpu",
        caches=("none",),
        precompiled=[TEST_GRAPHS / "float32"],
        loras={str(every["kohya"]): 0.5, str(every["xlabs"]): 1.25},
    )


def drawn(pipeline: TextToImagePipeline, **changes: Any) -> np.ndarray:
    settings = {"seed": 5, **DRAW, **changes}
    return pipeline.generate(PROMPT, **settings).images


def drawn_by_diffusers(reference: FluxPipeline) -> np.ndarray:
    pictures = reference(
        PROMPT,
        generator=torch.Generator("cpu").manual_seed(5),
        max_sequence_length=reference.tokenizer_2.model_max_length,
        output_type="np",
        **DRAW,
    ).images
    return np.asarray((pictures * 255).round().astype(np.uint8))


@pytest.mark.parametrize("naming", lora_files.NAMINGS)
def test_pictures_are_those_of_diffusers_with_peft(
    naming: str,
    every: dict[str, Path],
    chooser: TextToImagePipeline,
    reference: FluxPipeline,
) -> None:
    compiled = chooser.compile_count
    ours = drawn(chooser, loras={NAMED[naming]: 0.7})
    with loaded(reference, {"x": (lora_files.load(every[naming]), 0.7)}) as theirs:
        assert psnr(ours, drawn_by_diffusers(theirs)) >= 55
    assert psnr(ours, drawn(chooser)) < 40
    assert chooser.compile_count == compiled


def test_several_with_weights_are_those_of_diffusers_and_those_merged(
    every: dict[str, Path],
    chooser: TextToImagePipeline,
    merged: TextToImagePipeline,
    reference: FluxPipeline,
) -> None:
    chosen = {"kohya": 0.5, "xlabs": 1.25}
    ours = chooser.generate(
        PROMPT, seed=5, loras={NAMED[n]: w for n, w in chosen.items()}, **DRAW
    )
    assert ours.report.loras == {"c": 0.5, "f": 1.25}
    files = {name: (lora_files.load(every[name]), w) for name, w in chosen.items()}
    with loaded(reference, files) as theirs:
        assert psnr(ours.images, drawn_by_diffusers(theirs)) >= 55
    other = merged.generate(PROMPT, seed=5, **DRAW)
    assert psnr(ours.images, other.images) >= 60
    assert other.report.loras == {str(every[n]): w for n, w in chosen.items()}


@pytest.mark.parametrize(
    "changes",
    [
        {"cache": "taylorseer", "num_inference_steps": 12},
        {"cache": "first-block", "num_inference_steps": 6},
        {"negative_prompt": "a green heart", "true_cfg_scale": 3.0},
    ],
)
def test_caches_and_guidance_run_on_the_changed_matrices(
    changes: dict[str, Any], chooser: TextToImagePipeline
) -> None:
    plain = drawn(chooser, **changes)
    ours = drawn(chooser, loras={"a": 1.0}, **changes)
    assert psnr(ours, plain) < 40
    # Whoever runs them: the same graphs as a pipeline's own.
    whole = adapted(chooser, (("a", 1.0),))
    assert np.array_equal(ours, drawn(whole, **changes))
    assert np.array_equal(plain, drawn(chooser, **changes))


def test_a_decoder_is_changed_for_a_request_as_when_it_is_loaded(
    flux_folder: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    weights = load_file(flux_folder / "vae/diffusion_pytorch_model.safetensors")
    features, *columns = weights["decoder.conv_in.weight"].shape
    tensors = {
        "vae.decoder.conv_in.lora_A.weight": torch.randn(2, *columns),
        "vae.decoder.conv_in.lora_B.weight": torch.randn(features, 2, 1, 1),
    }
    path = lora_files.write(tmp_path / "decoder.safetensors", tensors)
    chooser, merged = (
        load_pipeline(
            flux_folder,
            device="cpu",
            caches=("none",),
            precompiled=[TEST_GRAPHS / "float32"],
            **given,
        )
        for given in ({"adapters": {"decoder": path}}, {"loras": path})
    )
    ours = drawn(chooser, loras="decoder")
    assert np.array_equal(ours, drawn(merged))
    assert psnr(ours, drawn(chooser)) < 40


def test_only_what_changes_is_held_and_the_oldest_leaves(
    flux_folder: Path,
    every: dict[str, Path],
    shapes: tuple[lora_files.Shapes, lora_files.Shapes],
    tmp_path: Path,
) -> None:
    names = ("peft", "kohya", "xlabs")
    adapters = {name: every[name] for name in names}
    arguments: dict[str, Any] = {
        "device": "cpu",
        "caches": ("none",),
        "precompiled": [TEST_GRAPHS / "float32"],
        "adapters": adapters,
    }
    pipeline = load_pipeline(flux_folder, **arguments, adapter_memory_limit=2**30)
    sets = pipeline.adapters
    assert sets.names == names
    sizes = {name: sets.num_bytes(((name, 1.0),)) for name in names}
    assert 0 < sizes["xlabs"] < sizes["peft"]
    both = sets.num_bytes((("peft", 1.0), ("xlabs", 2.0)))
    assert sizes["peft"] <= both < sizes["peft"] + sizes["xlabs"]
    assert sets.held_bytes == 0
    first = sets.graphs_of((("xlabs", 1.0),))
    assert sets.held_bytes == sizes["xlabs"]
    assert first is sets.graphs_of((("xlabs", 1.0),))
    changed = {name for name in first if first[name] is not pipeline.models[name]}
    assert changed == {"transformer.full"}
    text = sets.graphs_of((("peft", 1.0),))
    changed = {name for name in text if text[name] is not pipeline.models[name]}
    assert changed == {"transformer.full", "text_encoder"}

    limit = max(sizes.values()) + sizes["xlabs"]
    small = load_pipeline(flux_folder, **arguments, adapter_memory_limit=limit)
    sets = small.adapters
    choices = {name: ((name, 1.0),) for name in names}
    sets.graphs_of(choices["peft"])
    sets.graphs_of(choices["xlabs"])
    kept = sets.graphs_of(choices["peft"])
    sets.graphs_of(choices["kohya"])  # for which the one used before the last leaves
    assert sets.held_bytes <= limit
    assert sets.graphs_of(choices["kohya"]) is sets.graphs_of(choices["kohya"])
    assert kept is not None
    for choice in (choices["peft"], choices["kohya"], choices["xlabs"]):
        sets.graphs_of(choice)
        assert sets.held_bytes <= limit

    path = tmp_path / "clip.safetensors"
    lora_files.write(path, lora_files.lora("peft", {}, shapes[1]))
    arguments["adapters"] = {"clip": path, "xlabs": every["xlabs"]}
    tiny = open_model(flux_folder, **arguments, adapter_memory_limit=sizes["xlabs"])
    both = tiny.adapters.num_bytes((("clip", 1.0), ("xlabs", 2.0)))
    with pytest.raises(
        RequestError,
        match=rf"clip:1, xlabs:2 changes matrices of {both} bytes, more than the limit",
    ):
        loras = (("clip", 1.0), ("xlabs", 2.0))
        tiny.create_context(GenerationRequest((PROMPT,), loras=loras))


def test_a_lora_that_never_fits_is_refused_at_load(
    flux_folder: Path, every: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {
        "device": "cpu",
        "caches": ("none",),
        "precompiled": [TEST_GRAPHS / "float32"],
        "adapters": {name: every[name] for name in ("xlabs", "peft")},
    }
    opened = open_model(flux_folder, **given)
    needed = opened.adapters.num_bytes((("peft", 1.0),))
    weights = host_memory() - memory_beside_weights(opened.graphs.opened, opened.device)
    said = f"adapters: the LoRA peft changes matrices of {needed} bytes, more than the "

    def is_refused(kind: type[Exception], rest: str, limit: int | None) -> None:
        with pytest.raises(kind, match=said + rest) as caught:
            load_pipeline(flux_folder, **given, adapter_memory_limit=limit)
        assert "\n" not in str(caught.value)

    def has(count: int) -> None:
        monkeypatch.setattr(weight_memory, "host_memory", lambda: count)

    with monkeypatch.context() as patch:
        # None of these compiles.
        patch.setattr("max_diffusion.execution.compiler.CompiledGraphs.add", None)
        is_refused(RequestError, f"limit of {needed - 1} for LoRAs", needed - 1)
        has(weights + needed - 1)
        is_refused(DeviceError, f"{needed - 1} that this machine has", needed)
        is_refused(DeviceError, f"{needed - 1} that this machine has", None)
        has(weights + 4 * needed - 1)
        is_refused(RequestError, f"limit of {needed - 1} for LoRAs", None)
    # What was free is told when all else is loaded.
    has(weights + 4 * needed)
    monkeypatch.setattr(adapters, "free_memory", lambda _: 4 * needed - 1)
    is_refused(RequestError, f"limit of {needed - 1} for LoRAs", None)
    monkeypatch.setattr(adapters, "free_memory", lambda _: 4 * needed)
    pipeline = load_pipeline(flux_folder, **given)
    assert pipeline.adapters.limit == needed
    assert np.array_equal(
        drawn(pipeline, loras=["peft"]),
        drawn(
            load_pipeline(flux_folder, **given, adapter_memory_limit=2**30),
            loras=["peft"],
        ),
    )


def test_products_that_are_not_finite_name_the_lora(
    flux_folder: Path, every: dict[str, Path], tmp_path: Path
) -> None:
    module, shape = next(iter(lora_files.matrices(flux_folder, "transformer").items()))
    tensors = {
        f"transformer.{module}.lora_A.weight": torch.full((2, shape[1]), 1e25),
        f"transformer.{module}.lora_B.weight": torch.full((shape[0], 2), 1e25),
    }
    path = lora_files.write(tmp_path / "my" / "huge.safetensors", tensors)
    files = {"good": every["peft"], "huge": path}
    opened = open_model(flux_folder, "cpu", adapters=files)
    merged = open_model(flux_folder, "cpu", loras=list(files.values()))
    said = r"transformer: 1 weights are beyond float32 with lora my/huge\.safetensors "
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RequestError, match=said) as caught:
            opened.adapters.graphs_of((("good", 1.0), ("huge", 0.5)))
        assert str(caught.value).startswith(
            "request: loras: huge:0.5 cannot be merged (transformer: "
        )
        with pytest.raises(ModelLoadError, match=said) as refused:
            merged.graphs.opened.load()
    assert "\n" not in str(caught.value) + str(refused.value)


def test_what_is_asked_wrongly_is_one_line_before_anything_runs(
    chooser: TextToImagePipeline, flux_folder: Path, every: dict[str, Path]
) -> None:
    for loras, message in (
        ({"z": 1.0}, "loras: 'z' is not known here, there are a, b, c, d, e, f"),
        (["a", "a"], "loras: 'a' is given twice"),
        ({"a": "0.5"}, "the weight of 'a' must be a finite number, got '0.5'"),
        ({"a": float("inf")}, "must be a finite number, got inf"),
    ):
        with pytest.raises(RequestError, match=message) as caught:
            drawn(chooser, loras=loras)
        assert "\n" not in str(caught.value)
    assert np.array_equal(drawn(chooser, loras={"a": 0}), drawn(chooser))
    with pytest.raises(RequestError, match="loras must be a tuple of names with"):
        GenerationRequest((PROMPT,), loras=["a"])  # type: ignore[arg-type]
    for arguments, kind, message in (
        ({"loras": [every["peft"], every["peft"]]}, RequestError, "is given twice"),
        ({"loras": {every["peft"]: "x"}}, RequestError, "must be a finite number"),
        ({"adapters": {"a b": every["peft"]}}, RequestError, "got 'a b'"),
        (
            {"loras": "x.safetensors", "adapters": {"x.safetensors": every["peft"]}},
            RequestError,
            r"adapters: x\.safetensors is a file of loras, too",
        ),
        ({"adapters": [every["peft"]]}, RequestError, "expected files by name"),
        ({"adapters": {"a": 3}}, RequestError, "a: expected a file, got 3"),
        ({"adapter_memory_limit": 0}, RequestError, "must be at least 1"),
        ({"loras": "no.safetensors"}, ModelLoadError, "no.safetensors: cannot be"),
        ({"adapters": {"a": "no.safetensors"}}, ModelLoadError, "cannot be read"),
    ):
        with pytest.raises(kind, match=message) as refused:
            open_model(flux_folder, "cpu", **arguments)
        assert "\n" not in str(refused.value)
