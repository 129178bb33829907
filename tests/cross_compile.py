"""Compiles a part of a model for an H100, without one: ``cross_compile.py DIR PART``.

A script, because virtual devices must be set before MAX makes any device. Parts:
``build`` (every graph, built and checked but not compiled), ``step`` (sampler and
TaylorSeer), ``layers`` (one of each kind of layer), or a component's name, for the
transformer with its group of graphs (``transformer:full``, ``transformer:blocks`` ...).
"""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import get_args

from max.driver import (
    Accelerator,
    set_virtual_device_api,
    set_virtual_device_count,
    set_virtual_device_target_arch,
)
from max.dtype import DType
from max.engine import InferenceSession
from max.graph import DeviceRef, Graph, Module, TensorType

from graphs import layers
from graphs.sampler import add_euler_step, add_guidance
from graphs.weights import WeightScope
from max_diffusion.caches import GraphGroup, add_series_graphs
from max_diffusion.checkpoint import ComponentWeights
from max_diffusion.denoising import DenoiserComponent
from max_diffusion.execution.graph_module import GraphModule
from max_diffusion.pipelines.families import pipeline_class

HALF, WIDTH, HEADS, HEAD_DIM = DType.bfloat16, 128, 2, 128


def main() -> None:
    """Prints the names of the graphs."""
    folder, part = Path(sys.argv[1]), sys.argv[2]
    set_virtual_device_api("cuda")
    set_virtual_device_target_arch("sm_90")
    set_virtual_device_count(1)
    device = Accelerator()
    ref = DeviceRef.from_device(device)
    modules = []
    if part in ("build", "step"):
        modules.append(GraphModule("step", partial(add_steps, ref)))
    if part == "layers":
        modules.append(GraphModule("layers", partial(add_layers, ref)))
    index = json.loads((folder / "model_index.json").read_text())
    for name, kind in (pipeline_class(index["_class_name"]).components or {}).items():
        wanted, _, group = part.partition(":")
        if wanted not in ("build", name):
            continue
        config = json.loads((folder / name / "config.json").read_text())
        files = sorted((folder / name).glob("*.safetensors"))
        weights = ComponentWeights.from_files(name, files)
        component = kind(config, "bfloat16", [device], weights)
        if isinstance(component, DenoiserComponent):
            groups = [group] if group else get_args(GraphGroup)
            component.graph_groups = frozenset(groups)  # type: ignore[arg-type]
        component.name = name
        built = component.graph_modules().items()
        modules += [GraphModule(each, build) for each, build in built]
    session = None if part == "build" else InferenceSession(devices=[device])
    for module in modules:
        assert module.graph_names
        if session is not None:
            session.compile(module.module)
    print("done", flush=True)
    os._exit(0)  # MAX 26.7 aborts in the teardown of a session that ran nothing


def add_steps(device: DeviceRef, module: Module) -> None:
    """The graphs beside the transformer's."""
    add_euler_step(module, "euler_step", HALF, device)
    add_guidance(module, "guidance", HALF, device)
    add_series_graphs(module, HALF, device)


def add_layers(device: DeviceRef, module: Module) -> None:
    """One graph with one of each kind of layer that FLUX.1 is made of."""
    heads = TensorType(HALF, ("batch", "seq_len", HEADS, HEAD_DIM), device)
    image = TensorType(HALF, ("batch", "height", "width", 64), device)
    time = TensorType(DType.float32, ("batch",), device)
    w = WeightScope("layers", HALF, device)
    with Graph("layers", input_types=[heads, image, time], module=module) as graph:
        query, picture, timestep = (value.tensor for value in graph.inputs)
        query = layers.rms_norm(w / "rms", query, HEAD_DIM)
        mixed = layers.attention(query, query, query, scale=HEAD_DIM**-0.5)
        tokens = layers.layer_norm(layers.merge_heads(mixed), HEADS * HEAD_DIM)
        tokens = layers.linear(w / "linear", tokens, HEADS * HEAD_DIM, WIDTH)
        picture = layers.group_norm(w / "group", picture, 4)
        picture = layers.conv2d(w / "conv", picture, 64, 64)
        graph.output(tokens, picture, layers.timestep_embedding(timestep, 256))


if __name__ == "__main__":
    main()
