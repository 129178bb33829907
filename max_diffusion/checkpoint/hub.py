"""Where a model comes from: a folder, or a repository on the hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..errors import ModelLoadError
from .folder import ModelFolder

_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")
# Configurations, tokenizers and safetensors in component folders. Never pickles, and
# never the single-file checkpoint beside them.
_NEEDED = ("*.json", "*/*.json", "*/*.txt", "*/*.model")


def find_model(
    path_or_repo_id: str | os.PathLike[str],
    *,
    variant: str | None = None,
    revision: str | None = None,
    show_progress: bool = False,
) -> ModelFolder:
    """Opens a folder, or downloads a repository's needed files and opens those.

    Args:
        path_or_repo_id: An existing folder, or ``owner/name``.
        variant: Weight files to take, for example ``fp16``.
        revision: Branch, tag or commit on the hub.
        show_progress: Show download progress.

    Raises:
        ModelLoadError: Neither a folder nor a repository that can be had.
    """
    name = os.fspath(path_or_repo_id)
    path = Path(name)
    if path.is_dir():
        return ModelFolder.open(path, variant)
    if not _REPO_ID.fullmatch(name):
        raise ModelLoadError(
            f"model: {name!r} is no folder here and no hub repository (owner/name); "
            "check the path"
        )
    return ModelFolder.open(_download(name, variant, revision, show_progress), variant)


def _download(
    repo_id: str, variant: str | None, revision: str | None, show_progress: bool
) -> Path:
    # Imported here: 0.2 s that a local folder does not need.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils.tqdm import disable_progress_bars, enable_progress_bars

    weights = f"*/*{variant}*.safetensors" if variant else "*/*.safetensors"
    (enable_progress_bars if show_progress else disable_progress_bars)()
    try:
        return Path(
            snapshot_download(
                repo_id, revision=revision, allow_patterns=[*_NEEDED, weights]
            )
        )
    except GatedRepoError as err:
        hint = "accept its licence on the hub and log in with `hf auth login`"
        raise ModelLoadError(f"model: {repo_id} is gated; {hint}") from err
    except RevisionNotFoundError as err:
        raise ModelLoadError(f"model: {repo_id} has no revision {revision!r}") from err
    except RepositoryNotFoundError as err:
        raise ModelLoadError(
            f"model: {repo_id} is neither a folder here nor a repository on the hub; "
            "check the spelling, or log in if it is private"
        ) from err
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as err:
        raise ModelLoadError(
            f"model: {repo_id} is no folder here, and the hub could not be reached; "
            "check the network, or give a local folder"
        ) from err
