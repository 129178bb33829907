"""An image's own settings as a request: ``generate --like``."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RequestError
from ..media.metadata import read_settings

# What needs MAX is imported where it is used, so that most mistakes are answered at
# once.
if TYPE_CHECKING:
    from ..caches import AbstractCacheConfig
    from ..core.loras import Loras
    from ..core.pictures import PictureInputs
    from ..core.report import RunReport

_TEXTS = (("prompts", "prompt_2"), ("negative_prompt", "negative_prompt_2"))
_WARNED_OF = ("model", "transformer", "device", "dtype")


@dataclass(frozen=True)
class Likeness:
    """How an image was drawn, read from its file."""

    file: Path
    settings: Mapping[str, Any]
    """The settings as the file has them."""
    asked: Mapping[str, Any]
    """Values of a ``GenerationRequest`` by the names of its fields."""
    image: int
    """0-based index of the image among those of its request."""

    @classmethod
    def of(cls, file: Path) -> Likeness:
        """Reads the settings of an image.

        Raises:
            RequestError: The file cannot be read, has no settings, or ones that make no
                request.
        """
        from ..core.loras import as_loras
        from ..core.report import RunReport
        from ..core.request import GenerationRequest

        settings = read_settings(file)
        prompts, count = settings.get("prompts"), settings.get("num_images")
        image = settings.get("picture")
        if not (
            isinstance(prompts, list)
            and prompts
            and type(count) is int
            and type(settings.get("seed")) is int
            and type(image) is int
            and 0 <= image < count
            and count % len(prompts) == 0
            and isinstance(settings.get("cache"), dict)
        ):
            raise RequestError(
                f"{file}: its settings are not whole: prompts, num_images, picture, "
                "seed or cache; give another picture"
            )
        known = [item.name for item in fields(GenerationRequest)]
        asked = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in settings.items()
            if name in known and value not in (None, [])
        }
        # What is no field of every report is an option of the model's own.
        said = {*(item.name for item in fields(RunReport)), "picture"}
        asked["options"] = {
            name: value for name, value in settings.items() if name not in said
        }
        asked["num_images_per_prompt"] = count // len(prompts)
        asked["cache"] = _cache(file, settings["cache"])
        if "loras" in asked:
            asked["loras"] = as_loras(f"{file}: its loras", asked["loras"])
        if "sigmas" in asked:
            asked.pop("num_inference_steps", None)  # they say it
        return cls(file, settings, asked, image)

    def inputs(self, given: PictureInputs | None) -> PictureInputs | None:
        """Returns the pictures to start from, with the image's strength if none is.

        Args:
            given: Beside the image, whose file does not hold what it started from.

        Raises:
            RequestError: It started from a picture, and none is given.
        """
        if not self.settings.get("images"):
            return given
        if given is None:
            raise RequestError(
                f"{self.file}: it was drawn from another picture, which it does not "
                "hold; give that by --image"
            )
        if given.strength is None:
            return replace(given, strength=self.settings.get("strength"))
        return given

    def cache(self, options: Sequence[str]) -> AbstractCacheConfig:
        """Returns the image's cache, with some options changed.

        Args:
            options: Options to change, ``key=value`` each.
        """
        from ..caches import cache_from_text

        known: AbstractCacheConfig = self.asked["cache"]
        changed = cache_from_text(str(self.settings["cache"]["name"]), options)
        names = [option.partition("=")[0] for option in options]
        return replace(known, **{name: vars(changed)[name] for name in names})

    def lora_files(self) -> Loras:
        """Returns the image's LoRAs as files, each with its weight.

        Raises:
            RequestError: One is no file here, such as a server's own name of it.
        """
        loras: Loras = self.asked.get("loras", ())
        for name, weight in loras:
            if not os.path.exists(name):
                raise RequestError(
                    f"{self.file}: drawn with the LoRA {name!r:.200}, which is no file "
                    f"here; give it by --lora FILE:{weight:g}"
                )
        return loras

    def text(self, name: str) -> str | None:
        """Returns a setting that is text, such as the model; ``None`` if missing."""
        value = self.settings.get(name)
        if value is not None and not isinstance(value, str):
            raise RequestError(f"{self.file}: its {name} must be text, got {value!r}")
        return value

    def differences(self, report: RunReport, unread_options: Set[str]) -> list[str]:
        """Returns warnings of what differs now and may have changed the image.

        Args:
            report: Of what was drawn now.
            unread_options: Names of the image's options that this model does not have.
        """
        now, before = report.to_dict(), self.settings
        pairs = [(name, before.get(name), now[name]) for name in _WARNED_OF]
        if before.get("images"):
            names = ("images", "mask", "strength")
            pairs += [(name, before.get(name), now[name]) for name in names]
        versions = before.get("versions")
        versions = versions if isinstance(versions, dict) else {}
        for name, version in now["versions"].items():
            pairs.append((f"version of {name}", versions.get(name), version))
        left_out = [
            f"{self.file}: drawn with {name} {value}, which this model does not have"
            for name, value in self.asked["options"].items()
            if name in unread_options
        ]
        left_out += [
            f"{self.file}: drawn with {second} {self.asked[second]!r:.80}, which this "
            "model does not read"
            for first, second in _TEXTS
            if second in self.asked and now[first] is not None and now[second] is None
        ]
        return left_out + [
            f"{self.file}: drawn with {name} {old}, now with {new}; the picture may "
            "be another"
            for name, old, new in pairs
            if old != new
        ]


def _cache(file: Path, settings: Mapping[str, Any]) -> Any:
    from ..caches import cache_from_options

    name = settings.get("name")
    options = {key: value for key, value in settings.items() if key != "name"}
    try:
        return cache_from_options(str(name), options)
    except RequestError as err:
        raise RequestError(f"{file}: {err}; name another by --cache") from err
    except TypeError as err:
        raise RequestError(
            f"{file}: its cache's settings are not those of {name}; name another by "
            "--cache"
        ) from err
