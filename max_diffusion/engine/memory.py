"""The memory plan: what a request will hold on the device, told before it is let in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from max.driver import Device

from ..core.host_memory import free_memory
from ..core.loras import Loras
from ..core.request import GenerationContext, GivenPictures
from ..denoising.loop import are_faster_as_one
from ..errors import RequestError
from ..pipelines.decoding import LATENT_BUFFERS
from ..pipelines.room import advice, in_words
from ..pipelines.text_to_image import TextToImagePipeline

# A pass at its peak, in hidden states of all tokens: a block's inputs, its outputs and
# what lies between. On a CPU 15 to 16 with the demo model, 20 with first-block caches,
# of small pictures up to 22, and 13 with a small CogVideoX.
_STREAM_BUFFERS = 22


def default_memory_limit(device: Device) -> int:
    """Half of the device's memory that is free now, in bytes."""
    return free_memory(device) // 2


@dataclass(frozen=True)
class Needed:
    """Bytes that a request takes of the device's memory."""

    held: int
    """Bytes it takes from its admission to its end: latents, text, tables of positions,
    cache state, its share of a pass, and its pictures."""
    decode: int
    """Bytes it takes besides while one of its pictures is decoded, or the one that it
    starts from encoded."""
    loras: Loras = ()
    """The choice of LoRAs whose matrices it shares with others of the same."""
    lora_bytes: int = 0
    """Bytes of these, of which there is a limit of its own."""

    @property
    def total(self) -> int:
        """Bytes it takes at most, if its pictures are decoded one by one."""
        return self.held + self.decode


@final
class MemoryPlan:
    """A slot for each request, and room for decoding, which one does at a time.

    What the text encoders take while they run comes on top.

    Only who has the engine's lock uses it, but for :meth:`needed_by`.

    Args:
        pipeline: Whose requests are planned.
        limit: Bytes that all slots and decoding together may take.
    """

    def __init__(self, pipeline: TextToImagePipeline, limit: int) -> None:
        self._pipeline = pipeline
        if pipeline.denoiser is not None:
            # Finds the shapes out, from graphs that are built once: not by a request.
            pipeline.denoiser.sizes.of((1, 1, 1), 1, pipeline.graph_groups)
        self.limit = limit
        """Bytes that all slots and decoding together may take."""
        self._slots: list[Needed] = []

    @property
    def reserved(self) -> int:
        """Bytes of all slots, and of decoding the largest picture."""
        decode = max((slot.decode for slot in self._slots), default=0)
        return sum(slot.held for slot in self._slots) + decode

    @property
    def loaded_lora_bytes(self) -> int:
        """Bytes of the matrices that LoRAs change, in memory now, used or not."""
        return self._pipeline.adapters.held_bytes

    @property
    def lora_bytes(self) -> int:
        """Bytes of the matrices that LoRAs of all slots change, each choice once."""
        return sum({slot.loras: slot.lora_bytes for slot in self._slots}.values())

    @property
    def room_to_decode(self) -> int:
        """Bytes that no slot holds."""
        return self.limit - sum(slot.held for slot in self._slots)

    @property
    def smallest(self) -> int:
        """Bytes that a request takes at least: one of a token, a word and no cache."""
        pipeline, side = self._pipeline, self._pipeline.cell
        held = LATENT_BUFFERS * 4 * pipeline.token_channels + 2 * 3 * side * side
        if pipeline.denoiser is not None:
            shape = (1, 1, 1)
            sizes = pipeline.denoiser.sizes.of(shape, 1, pipeline.graph_groups)
            held += _STREAM_BUFFERS * (sizes.image + sizes.text)
            held += pipeline.denoiser.sizes.of_inputs(shape)
        return int(held + pipeline.decode_bytes(side, side, 1))

    def check_limit(self) -> None:
        """Refuses a limit that not even the smallest request could keep.

        Raises:
            RequestError: It is such a one.
        """
        if self.smallest > self.limit:
            raise RequestError(
                f"engine: even the smallest request of this model takes "
                f"{self.smallest} bytes, more than the limit of {self.limit} for "
                "requests, by default half of what is free; raise it (memory_limit, "
                "--memory-limit)"
            )

    def needed_by(self, context: GenerationContext) -> Needed:
        """The bytes that a request takes.

        Args:
            context: The request as its pipeline draws it.

        Raises:
            RequestError: The request alone takes more than all together may.
        """
        latents = context.latents
        pipeline = self._pipeline
        held = LATENT_BUFFERS * latents.nbytes
        state = 0
        # Its pictures, and a preview of each.
        samples = latents.shape[0] * context.num_frames
        held += 2 * 3 * samples * context.height * context.width
        if context.given is not None:
            held += _picture_bytes(context, context.given)
        if pipeline.denoiser is not None:
            branches = 1 if context.negative_tokens is None else 2
            shape = (*latents.shape[:2], context.text_tokens)
            cache = context.cache.config
            sizes = pipeline.denoiser.sizes.of(
                shape, branches, cache.graph_groups, context.reference_tokens
            )
            state = cache.state_bytes(sizes)
            held += state
            tokens = shape[0] * (shape[1] + context.reference_tokens)
            # In turn, the pass of one branch is over when the other's begins.
            is_one = are_faster_as_one(branches, tokens, pipeline.device)
            at_once = 2 if is_one else 1
            held += at_once * _STREAM_BUFFERS * (sizes.image + sizes.text)
            held += pipeline.denoiser.sizes.of_inputs(
                shape, branches, context.reference_tokens
            )
        decode = pipeline.decode_bytes(
            context.height, context.width, context.num_frames
        )
        for picture in () if context.given is None else context.given.to_encode:
            assert pipeline.pictures is not None
            encode = pipeline.pictures.encode_bytes(*picture.pixels.shape[1:3])
            decode = max(decode, encode)
        loras = context.loras
        lora_bytes = pipeline.adapters.num_bytes(loras)
        needed = Needed(int(held), decode, loras, lora_bytes)
        if needed.total > self.limit:
            raise self._too_much(context, needed, state)
        return needed

    def _too_much(
        self, context: GenerationContext, needed: Needed, state: int
    ) -> RequestError:
        """The error of a request that never fits, with what would."""
        batch, image_tokens, _ = context.latents.shape
        frames, cache = context.num_frames, context.cache.config
        fitting: list[str] = []
        if state:
            fitting = self._pipeline.caches.fitting(
                self.limit - needed.total + state,
                (batch, image_tokens, context.text_tokens),
                1 if context.negative_tokens is None else 2,
                context.reference_tokens,
                self._pipeline.graph_groups,
            )
        drawn = in_words(batch, frames, context.height, context.width)
        kind = "picture" if frames == 1 else "video"
        of_state = f" and {state} for the state of {cache.name}" if state else ""
        return RequestError(
            f"engine: this request of {drawn} needs {needed.total} bytes, "
            f"{needed.decode} of them to decode a {kind}{of_state}, more than the "
            f"limit of {self.limit}; {advice(frames, fitting)}"
        )

    def reserve(self, needed: Needed) -> bool:
        """Takes a slot, and says whether there was room for it."""
        self._slots.append(needed)
        is_room = self.lora_bytes <= self._pipeline.adapters.limit
        if self.reserved <= self.limit and is_room:
            return True
        self._slots.pop()
        return False

    def free(self, needed: Needed) -> None:
        """Gives a slot back."""
        self._slots.remove(needed)

    def clear(self) -> None:
        """Gives all slots back."""
        self._slots.clear()


def _picture_bytes(context: GenerationContext, given: GivenPictures) -> int:
    """Bytes that a request holds of its pictures, beside its latents."""
    latents = context.latents
    held = sum(picture.pixels.nbytes for picture in given.to_encode) + latents.nbytes
    if given.kept_mask is not None:
        # The picture, its noise and the mask stay until the end.
        held += 3 * latents.nbytes
    if given.known is not None:
        held += latents.nbytes + len(latents) * given.known.mask.nbytes
    # Its tokens, and those of a step's inputs and prediction with the others.
    per_token = latents.nbytes // latents.shape[1]
    both = latents.shape[1] + context.reference_tokens
    if given.references:
        held += per_token * (context.reference_tokens + 2 * both)
    return int(held)
