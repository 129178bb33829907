"""The FLUX.2-klein pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar, Final, final

from ...checkpoint.folder import INDEX_NAME
from ...checkpoint.reading import read_json
from ...components import AutoencoderKLDecoder
from ...errors import ModelLoadError
from .components import Flux2KleinTextEncoder, Flux2Transformer
from .config import text_weights, transformer_weights
from .pipeline import SHARED_CLASSES, AbstractFlux2Pipeline, PromptTemplate

# Steps and guidance of a distilled model, by its card, and of others by diffusers.
_DISTILLED: Final = 4, 1.0
_OTHERS: Final = 50, 4.0


@final
class Flux2KleinPipeline(AbstractFlux2Pipeline):
    """FLUX.2-klein, distilled or not: prompts by Qwen3, true guidance if any."""

    components = {  # noqa: RUF012  # the documented contract is a plain class attribute
        "text_encoder": Flux2KleinTextEncoder,
        "transformer": Flux2Transformer,
        "vae": AutoencoderKLDecoder,
    }
    class_names: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType(
        {
            **SHARED_CLASSES,
            "text_encoder": ("Qwen3ForCausalLM", "Qwen3Model"),
            "tokenizer": ("Qwen2Tokenizer", "Qwen2TokenizerFast"),
        }
    )
    weight_transforms = MappingProxyType(
        {
            "text_encoder": text_weights(max(Flux2KleinTextEncoder.output_layers)),
            "transformer": transformer_weights,
        }
    )
    # Qwen3's template of a chat, without thinking.
    template = PromptTemplate(
        before="<|im_start|>user\n",
        after="<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        tokens=("<|im_start|>", "<|im_end|>"),
        end="<|endoftext|>",
        padding="<|endoftext|>",
    )

    def init_remaining_components(self) -> None:
        """Loads what all FLUX.2 have, and reads whether it is distilled."""
        super().init_remaining_components()
        folder = self.pipeline_config.path
        assert folder is not None, "built by load_pipeline"
        told = read_json(folder / INDEX_NAME).get("is_distilled", False)
        if not isinstance(told, bool):
            raise ModelLoadError(
                f"flux2: {INDEX_NAME}: is_distilled must be true or false, got {told!r}"
            )
        self._is_distilled = told
        steps, scale = _DISTILLED if self._is_distilled else _OTHERS
        self.default_num_inference_steps, self.default_true_cfg_scale = steps, scale

    def default_sources(self) -> Mapping[str, str]:
        """Returns where the defaults come from, by the request's names."""
        kind = "distilled" if self._is_distilled else "not distilled"
        own = dict.fromkeys(
            ("num_inference_steps", "true_cfg_scale"), f"model_index.json: {kind}"
        )
        names = ("height", "width", "max_sequence_length", "negative_prompt")
        return {**dict.fromkeys(names, "diffusers"), **own}
