"""What goes wrong between here and the hub, in words."""

from __future__ import annotations

import errno


def reason_of(err: BaseException, repo_id: str, revision: str | None) -> str:
    """Why a repository cannot be had, and what to do, in one line."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(err, LocalEntryNotFoundError) and err.__cause__:
        err = err.__cause__  # what it wraps
    start = f"model: {repo_id}"
    if isinstance(err, GatedRepoError):
        hint = "accept its licence on the hub and log in with `hf auth login`"
        return f"{start} is gated; {hint}"
    if isinstance(err, RevisionNotFoundError):
        return (
            f"{start} has no revision {revision!r}; give a branch, a tag or "
            "a commit that the hub lists"
        )
    if isinstance(err, RepositoryNotFoundError):
        return (
            f"{start} is neither a folder here nor a repository on the hub; check "
            "the spelling, or log in with `hf auth login` if it is private"
        )
    if isinstance(err, OfflineModeIsEnabled):
        return (
            f"{start} is no folder here, and the hub could not be reached "
            "(HF_HUB_OFFLINE is set); unset it, or give a local folder"
        )
    if isinstance(err, HfHubHTTPError):
        code = err.response.status_code
        hint = "log in again with `hf auth login`" if code == 401 else "try later"
        return f"{start} could not be fetched (the hub answered {code}); {hint}"
    stored = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM)
    if isinstance(err, OSError) and err.errno in stored:
        return (
            f"{start} could not be stored ({err.strerror}); make room, or set "
            "HF_HOME to another folder"
        )
    return (
        f"{start} is no folder here, and the hub could not be reached; check the "
        "network, or give a local folder"
    )
