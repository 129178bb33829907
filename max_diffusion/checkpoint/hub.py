"""Where a model comes from: a folder, or a repository on the hub."""

from __future__ import annotations

import glob
import json
import logging
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from ..errors import ModelLoadError
from .folder import INDEX_NAME, ModelFolder
from .hub_errors import reason_of
from .weight_sets import chosen_set, is_index, shard_names

logger = logging.getLogger(__name__)

Needs = Callable[[ModelFolder], Mapping[str, bool]]
"""The roles of a model that are used, and whether each has weights."""

# No path starts so, unless it is one here: "./x", "../x", "/x", "~/x".
_REPO_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
# Of components without weights: schedulers and tokenizers.
_SETTINGS = (".json", ".txt", ".model")


def find_model(
    path_or_repo_id: str | os.PathLike[str],
    *,
    variant: str | None = None,
    revision: str | None = None,
    show_progress: bool = False,
    needs: Needs | None = None,
    extras: tuple[str, ...] = (),
) -> ModelFolder:
    """Opens a folder, or fetches what a repository's model needs and opens that.

    Without the hub (offline, or no permission any more), what its cache holds is
    enough if it is complete, whoever has put it there.

    Args:
        path_or_repo_id: An existing folder, or ``owner/name``.
        variant: Weight files to take, for example ``fp16``.
        revision: Branch, tag or commit on the hub.
        show_progress: Show download progress.
        needs: Told once ``model_index.json`` is there, before the rest is fetched; may
            refuse the model. Default: all roles, with weights but for schedulers and
            tokenizers.
        extras: Other files of the repository to fetch if it has them.

    Raises:
        ModelLoadError: Neither a folder nor a repository that can be had.
    """
    if not isinstance(path_or_repo_id, str | os.PathLike):
        raise ModelLoadError(
            "model: expected a name, a folder or a repository of the hub, got "
            f"{path_or_repo_id!r:.80}"
        )
    name = os.fspath(path_or_repo_id)
    if _is_folder(name):
        if revision is not None:
            raise ModelLoadError(
                f"model: {name} is a folder here, and revision {revision!r} is for "
                "models of the hub; leave it out"
            )
        return ModelFolder.open(Path(name), variant)
    from huggingface_hub.utils.tqdm import disable_progress_bars, enable_progress_bars

    (enable_progress_bars if show_progress else disable_progress_bars)()
    return _Repository(name, variant, revision, needs or _all_roles, extras).open()


def _is_folder(name: str) -> bool:
    """Whether a model is a folder here; if not, it is named as one of the hub.

    Raises:
        ModelLoadError: It can be neither.
    """
    path = Path(name)
    try:
        if name and path.is_dir():
            return True
        is_there = bool(name) and os.path.lexists(path)
    except (OSError, ValueError):  # a name too long, a null byte
        is_there = False
    if is_there:
        what = "a file" if path.exists() else "a link to nothing"
        raise ModelLoadError(
            f"model: {name} is {what}; expected a folder in the diffusers layout, with "
            f"a {INDEX_NAME}; a file of weights is given as the transformer (in Python "
            "transformer=, --transformer) beside a folder, which has the tokenizers"
        )
    if not _REPO_ID.fullmatch(name):
        raise ModelLoadError(
            f"model: {name!r} is no folder here and no hub repository (owner/name); "
            "check the path"
        )
    return False


def _all_roles(folder: ModelFolder) -> dict[str, bool]:
    settings = ("Scheduler", "Tokenizer", "Extractor", "Processor")
    return {
        role: not any(word in class_name for word in settings)
        for role, (_, class_name) in folder.roles.items()
    }


class _Repository:
    """One revision of a repository, and what of it is wanted."""

    def __init__(
        self,
        repo_id: str,
        variant: str | None,
        revision: str | None,
        needs: Needs,
        extras: tuple[str, ...],
    ) -> None:
        self._repo_id = repo_id
        self._variant = variant
        self._revision = revision
        self._needs = needs
        self._extras = extras

    def open(self) -> ModelFolder:
        """From the hub, or from its cache where the hub cannot be had."""
        # Imported here: 0.2 s that a local folder does not need.
        import httpx
        from huggingface_hub.errors import HFValidationError

        try:
            return self._fetched()
        except HFValidationError as err:
            raise ModelLoadError(
                f"model: {self._repo_id!r} is no folder here, and no hub repository is "
                "named so; check the path"
            ) from err
        except (httpx.HTTPError, OSError, json.JSONDecodeError) as err:
            reason = reason_of(err, self._repo_id, self._revision)
            try:
                folder = self._cached()
            except ModelLoadError as lack:
                raise ModelLoadError(f"{reason}; in the cache: {lack}") from err
            if folder is None:
                raise ModelLoadError(reason) from err
            logger.info("%s; opened from the cache", reason)
            return folder

    def _fetched(self) -> ModelFolder:
        """Fetches what is needed and not in the cache."""
        from huggingface_hub import HfApi, snapshot_download
        from huggingface_hub.constants import HF_HUB_ETAG_TIMEOUT

        info = HfApi().model_info(
            self._repo_id, revision=self._revision, timeout=HF_HUB_ETAG_TIMEOUT
        )
        files = {item.rfilename for item in info.siblings or ()}
        if INDEX_NAME not in files:
            raise ModelLoadError(
                f"model: {self._repo_id} has no {INDEX_NAME}; expected a model in the "
                "diffusers layout"
            )
        folder = self._opened(self._download(INDEX_NAME).parent)
        wanted = [INDEX_NAME, *(name for name in self._extras if name in files)]
        names: dict[str, list[str]] = {}
        for role, name in (f.split("/") for f in files if f.count("/") == 1):
            names.setdefault(role, []).append(name)
        for role, has_weights in self._needs(folder).items():
            if role not in names:
                raise ModelLoadError(
                    f"model: {self._repo_id} has no folder {role}, though {INDEX_NAME} "
                    "lists it"
                )
            used = (
                self._weights(folder, role, names)
                if has_weights
                else [name for name in names[role] if name.endswith(_SETTINGS)]
            )
            wanted += (f"{role}/{name}" for name in used)
        path = snapshot_download(
            self._repo_id,
            revision=self._revision,
            allow_patterns=[glob.escape(name) for name in wanted],
        )
        return self._opened(Path(path))

    def _weights(
        self, folder: ModelFolder, role: str, names: Mapping[str, list[str]]
    ) -> list[str]:
        """Names of a component's configuration and of its one set of weights."""
        libraries = {name: pair[0] for name, pair in folder.roles.items()}
        listed = {name: names.get(name, []) for name in libraries}
        chosen = chosen_set(self._repo_id, role, libraries, listed, self._variant)
        shards = []
        if is_index(chosen):
            shards = shard_names(self._download(f"{role}/{chosen}"))
            missing = [name for name in shards if name not in names[role]]
            if missing:
                raise ModelLoadError(
                    f"{self._repo_id}/{role}/{chosen}: names {missing[0]}, which the "
                    "repository does not have"
                )
        return ["config.json", chosen, *shards]

    def _download(self, name: str) -> Path:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(self._repo_id, name, revision=self._revision))

    def _opened(self, path: Path) -> ModelFolder:
        return ModelFolder.open(path, self._variant, self._repo_id)

    def _cached(self) -> ModelFolder | None:
        """The model from the hub's cache; ``None`` if nothing of it is there.

        Raises:
            ModelLoadError: It is not complete there.
        """
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(
            self._repo_id, INDEX_NAME, revision=self._revision
        )
        if not isinstance(found, str):
            return None
        folder = self._opened(Path(found).parent)
        for role, has_weights in self._needs(folder).items():
            folder.require(role, (folder.roles[role][1],))
            if has_weights:
                folder.config(role)
                folder.weight_files(role)
        return folder
