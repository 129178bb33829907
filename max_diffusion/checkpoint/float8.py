"""Linear layers in float8 with a scale, as ComfyUI and its tools write them.

The numbers of ``layer.weight`` are ``weight * scale`` in float32. The older kind marks
the whole file with a tensor ``scaled_fp8`` and calls a layer's scale ``scale_weight``;
the newer one marks each layer, with a tensor ``comfy_quant`` of JSON or in the file's
``_quantization_metadata``, and calls it ``weight_scale``. Either may bring the scale of
the layer's input, which is for products in float8 and not used here.

References:
    https://github.com/comfyanonymous/ComfyUI/blob/master/QUANTIZATION.md
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Final

from max.dtype import DType

from ..errors import ModelLoadError
from .computed import FLOAT8
from .reading import shown
from .single_file import CheckpointFile
from .weights import ComponentWeights

_MARK: Final = "scaled_fp8"
_LAYER_MARK: Final = ".comfy_quant"
_METADATA: Final = "_quantization_metadata"
_SCALES: Final = (".scale_weight", ".weight_scale")
_OF_INPUTS: Final = (".scale_input", ".input_scale")
_FORMATS: Final = {
    "float8_e4m3fn": DType.float8_e4m3fn,
    "float8_e5m2": DType.float8_e5m2,
}
_NUMBERS: Final = (DType.float64, DType.float32, DType.float16, DType.bfloat16)


def without_float8(
    weights: ComponentWeights, file: CheckpointFile, prefix: str
) -> ComponentWeights:
    """Tensors in float8 as the numbers they stand for, others as they are.

    Args:
        weights: Of a component, by names without the prefix.
        file: They are from.
        prefix: What their names in the file begin with.

    Returns:
        The weights, of which nothing is read yet but the marks.

    Raises:
        ModelLoadError: A layer is quantised otherwise, or lacks its scale.
    """
    tensors, where = weights.tensors, weights.name
    scales = {
        name.removesuffix(ending) + ".weight": name
        for name in tensors
        for ending in _SCALES
        if name.endswith(ending)
    }
    for layer, kind in _marked_layers(weights, file, prefix).items():
        name = f"{layer}.weight"
        tensor = tensors.get(name)
        if tensor is None:
            continue  # told as a weight that is missing
        # A file may say anything, such as a list, of which no dictionary can be asked.
        if tensor.dtype != _FORMATS.get(str(kind)):
            raise ModelLoadError(
                f"{where}: {shown(layer)} is quantised as {shown(str(kind))} in "
                f"{tensor.code}; {' and '.join(_FORMATS)} are supported: take another "
                "file of the model"
            )
        if name not in scales:
            raise _no_scale(where, "comfy_quant", [name])
    lacking = [
        name
        for name, tensor in tensors.items()
        if tensor.dtype in FLOAT8 and name not in scales and name != _MARK
    ]
    if lacking and _MARK in tensors:
        raise _no_scale(where, _MARK, lacking)
    for name, scale in scales.items():
        stored = tensors.get(name)
        if stored is None:
            continue  # told as a weight that is missing
        kinds = (stored.dtype, tensors[scale].dtype)
        if kinds[0] not in (*FLOAT8, *_NUMBERS) or kinds[1] not in _NUMBERS:
            raise ModelLoadError(
                f"{where}: {shown(name)} is stored as {stored.code} with a scale in "
                f"{tensors[scale].code}; expected float8 with a scale in float32; take "
                "another file of the model"
            )
    marks = (_MARK, *(f"*{ending}" for ending in (_LAYER_MARK, *_OF_INPUTS)))
    return weights.without(*marks).dequantised(lambda name: scales.get(name, name))


def _marked_layers(
    weights: ComponentWeights, file: CheckpointFile, prefix: str
) -> Mapping[str, object]:
    """The format of each layer that is marked, by its name."""
    found: dict[str, object] = {}
    told = file.told.get(_METADATA)
    if isinstance(told, str):
        layers = _object(weights.name, told).get("layers")
        for layer, entry in (layers if isinstance(layers, dict) else {}).items():
            if layer.startswith(prefix):
                kind = entry.get("format") if isinstance(entry, dict) else entry
                found[layer.removeprefix(prefix)] = kind
    for name, tensor in weights.tensors.items():
        if name.endswith(_LAYER_MARK):
            if tensor.dtype not in (DType.uint8, DType.int8):
                raise ModelLoadError(
                    f"{weights.name}: {shown(name)} should be text in uint8, got "
                    f"{tensor.code}; take another file of the model"
                )
            entry = _object(weights.name, tensor.read().tobytes())
            found[name.removesuffix(_LAYER_MARK)] = entry.get("format")
    return found


def _object(where: str, text: str | bytes) -> Mapping[str, object]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ModelLoadError(
            f"{where}: what it says of its quantisation is no JSON object; the file is "
            "damaged: download it again"
        )
    return found


def _no_scale(where: str, mark: str, names: list[str]) -> ModelLoadError:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return ModelLoadError(
        f"{where}: {shown(names[0])}{more} in float8 without a scale, though {mark} "
        "marks the file as scaled; it is incomplete: download it again"
    )
