"""Fetching named files of a repository on the Hugging Face hub into its cache."""

import re
from collections.abc import Sequence
from pathlib import Path

_REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")


def fetch(repository: str, patterns: Sequence[str]) -> Path:
    """The local folder holding the repository's files that match `patterns`, all of one commit.

    `HF_ENDPOINT`, `HF_HOME`, `HF_TOKEN` and `HF_HUB_OFFLINE` work as everywhere. Blocks; call it in a worker thread.
    Raises `FileNotFoundError` where there is no such repository or it cannot be reached.
    """
    if not _REPOSITORY.fullmatch(repository) or ".." in repository:
        raise FileNotFoundError(f"{repository!r} is neither a folder here nor the name of a hub repository")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, allow_patterns=list(patterns)))
    except Exception as error:  # the client lets errors of several HTTP libraries through
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FileNotFoundError(f"{repository!r} is not a folder here and the hub did not give it: {reason}") from error
