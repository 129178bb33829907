"""FLUX.1's four components: weights, graphs, and how each is run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import numpy as np
from max.driver import Buffer
from max.dtype import DType
from max.graph import Graph, Module, TensorType

from graphs.autoencoder_kl import decode_packed, decoder_grids
from graphs.clip import clip_host_inputs, clip_text_encoder
from graphs.flux1 import Flux1Denoiser
from graphs.t5 import t5_encoder, t5_relative_buckets
from graphs.weights import WeightScope

from ...buffers import to_device
from ...component import ComponentModel
from ...denoising import DenoiserComponent
from .config import autoencoder_config, clip_config, flux1_config, t5_config


@final
class ClipTextEncoder(ComponentModel):
    """Prompt to one pooled vector."""

    def build_graphs(self, module: Module) -> WeightScope:
        """Adds ``text_encoder``: ids ``(B, S)`` to pooled ``(B, D)``."""
        self._sizes = clip_config(self.config)
        scope = WeightScope("text_encoder", self.dtype, self.device_ref)
        # Published checkpoints nest the weights, transformers 5 writes them flat.
        is_nested = any(name.startswith("text_model.") for name in self.weights.tensors)
        types = [
            TensorType(DType.int64, ("batch", "tokens"), self.device_ref),
            TensorType(DType.int64, ("tokens",), self.device_ref),
            TensorType(DType.float32, ("tokens", "tokens"), self.device_ref),
            TensorType(DType.float32, ("batch", "tokens"), self.device_ref),
        ]
        with Graph("text_encoder", input_types=types, module=module) as graph:
            inputs = [value.tensor for value in graph.inputs]
            w = scope / "text_model" if is_nested else scope
            graph.output(clip_text_encoder(self._sizes, w, *inputs))
        return scope

    def load_model(self) -> Callable[[np.ndarray], Buffer]:
        """Token ids int64 ``(B, S)`` to the pooled vector ``(B, D)``."""
        return self.encode

    def encode(self, ids: np.ndarray) -> Buffer:
        """Token ids int64 ``(B, S)`` to the pooled vector ``(B, D)``."""
        arrays = (ids, *clip_host_inputs(self._sizes, ids))
        inputs = (to_device(array, self.device) for array in arrays)
        return self.models["text_encoder"].execute(*inputs)[0]


@final
class T5TextEncoder(ComponentModel):
    """Prompt to one state a token."""

    def build_graphs(self, module: Module) -> WeightScope:
        """Adds ``text_encoder_2``: ids ``(B, S_txt)`` to ``(B, S_txt, D)``."""
        self._sizes = t5_config(self.config)
        scope = WeightScope("text_encoder_2", self.dtype, self.device_ref)
        # One table under two names; a file holds either.
        names = ("shared.weight", "encoder.embed_tokens.weight")
        embedding = next((n for n in names if n in self.weights.tensors), names[0])
        types = [
            TensorType(DType.int64, ("batch", "text_seq_len"), self.device_ref),
            TensorType(DType.int64, ("text_seq_len", "text_seq_len"), self.device_ref),
        ]
        with Graph("text_encoder_2", input_types=types, module=module) as graph:
            ids, buckets = (value.tensor for value in graph.inputs)
            graph.output(
                t5_encoder(self._sizes, scope, ids, buckets, embedding_name=embedding)
            )
        return scope

    def load_model(self) -> Callable[[np.ndarray], Buffer]:
        """Token ids int64 ``(B, S_txt)`` to states ``(B, S_txt, D)``."""
        return self.encode

    def encode(self, ids: np.ndarray) -> Buffer:
        """Token ids int64 ``(B, S_txt)`` to states ``(B, S_txt, D)``."""
        buckets = t5_relative_buckets(self._sizes, ids.shape[1])
        return self.models["text_encoder_2"].execute(
            to_device(ids, self.device), to_device(buckets, self.device)
        )[0]


@final
class Flux1Transformer(DenoiserComponent):
    """The denoiser; every step graph comes from the base class."""

    def denoiser(self) -> Flux1Denoiser:
        """The FLUX.1 pieces at this checkpoint's sizes."""
        return Flux1Denoiser(flux1_config(self.config), self.dtype, self.device_ref)


@final
class AutoencoderKLDecoder(ComponentModel):
    """Packed latents to pictures."""

    def build_graphs(self, module: Module) -> WeightScope:
        """Adds ``decode``: packed latents ``(B, S_img, C)`` to uint8 NHWC."""
        self._sizes = autoencoder_config(self.config)
        scope = WeightScope("vae", self.dtype, self.device_ref)
        latents = TensorType(
            DType.float32,
            ("batch", "image_seq_len", 4 * self._sizes.latent_channels),
            self.device_ref,
        )
        types = [latents, *decoder_grids(self._sizes, self.device_ref).values()]
        with Graph("decode", input_types=types, module=module) as graph:
            inputs = [value.tensor for value in graph.inputs]
            graph.output(decode_packed(self._sizes, scope, *inputs))
        return scope

    def load_model(self) -> Callable[..., Any]:
        """Packed latents and the grid to pictures."""
        return self.decode

    def decode(self, latents: Buffer, rows: int, columns: int) -> Buffer:
        """Latents float32 ``(B, rows * columns, C)`` to uint8 ``(B, H, W, 3)``."""
        levels = range(1, 1 + len(self._sizes.block_out_channels))
        shapes = [(rows * 2**level, columns * 2**level) for level in (0, *levels)]
        grids = [to_device(np.zeros(shape, np.int8), self.device) for shape in shapes]
        return self.models["decode"].execute(latents, *grids)[0]
