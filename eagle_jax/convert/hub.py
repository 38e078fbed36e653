"""Finds folders by name: a local one, or a repository of the Hugging Face hub, downloaded into the hub's cache."""

from __future__ import annotations

import dataclasses
import difflib
import re
from pathlib import Path

from eagle_jax.convert.error import CheckpointError
from eagle_jax.convert.small_files import SMALL_FILES

MEDUSA_FILE = "medusa_lm_head.pt"  # the only .pt file that is read: others are optimizer states or pickled modules

FOLDERS = tuple(pattern for pattern in SMALL_FILES if "/" in pattern)  # the only files fetched from subfolders
LOG_IN = "log in (`hf auth login`, or set HF_TOKEN)"


@dataclasses.dataclass(frozen=True)
class Hub:
    """Holds arguments of `huggingface_hub.snapshot_download`, which also reads its environment variables.

    revision: a branch, tag or commit. token: None means that of `hf auth login` or HF_TOKEN. local_files_only: use the
    cache and no network.
    """

    revision: str | None = None
    token: str | bool | None = None
    local_files_only: bool = False


def resolve(source: str | Path, hub: Hub | None = None, weights: bool = True) -> Path:
    """Returns the local folder of `source`: itself, or the snapshot of a Hugging Face repository id.

    Args:
      weights: download weights too: safetensors, or the other formats where there are none. False: small files only.
    Raises:
      CheckpointError: if there is no such folder or repository, or the download fails; the message says why.
    """
    hub, folder = hub or Hub(), Path(source)
    if folder.is_dir():
        if hub.revision is not None:
            raise CheckpointError(
                f"{source}: is a folder, and a revision ({hub.revision!r}) is one of a hub repository"
            )
        return folder
    if folder.is_file():
        raise CheckpointError(f"{source}: is a file; name the folder that holds it")
    if isinstance(source, Path) or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source):
        hint = "; a hub id is OWNER/NAME" if isinstance(source, str) and re.fullmatch(r"[\w.-]+", source) else ""
        raise CheckpointError(no_such_folder(source) + hint)
    found = _download(source, hub, *(["*.safetensors"] if weights else []))
    if weights and not any(found.glob("*.safetensors")):
        found = _download(source, hub, "*.bin", MEDUSA_FILE)
    return found


def named_revision(source: str) -> tuple[str, str | None]:
    """Splits "OWNER/NAME@REVISION" into the id and its revision; None without one, and for a path that exists."""
    path, _, revision = (source, "", "") if Path(source).exists() else source.partition("@")
    return path, revision or None


def no_such_folder(source: str | Path) -> str:
    """Returns the message that there is no such folder, with folders of similar names."""
    expanded = Path(source).expanduser()
    near = [expanded] if expanded.is_dir() else _near(expanded)
    return f"{source}: no such folder" + (f" (did you mean {' or '.join(map(str, near))}?)" if near else "")


def _near(path: Path) -> list[Path]:
    """Returns folders whose names resemble the first missing part of a path."""
    missing = next((part for part in reversed([path, *path.parents]) if not part.exists()), None)
    if missing is None or not missing.parent.is_dir():
        return []
    try:
        names = [entry.name for entry in missing.parent.iterdir() if entry.is_dir()]
    except OSError:
        return []
    rest = path.relative_to(missing)
    close = [missing.with_name(name) for name in difflib.get_close_matches(missing.name, names)]
    return [other / rest if (other / rest).is_dir() else other for other in close]


def _download(source: str, hub: Hub, *weights: str) -> Path:
    """Downloads the small files of a repository and weights of these patterns; of subfolders only FOLDERS."""
    import huggingface_hub
    from huggingface_hub import errors

    def fetch(allow: list[str], ignore: list[str] | None) -> Path:
        options = dataclasses.asdict(hub)
        return Path(huggingface_hub.snapshot_download(source, allow_patterns=allow, ignore_patterns=ignore, **options))

    try:
        folder = fetch(["*.json", *SMALL_FILES, *weights], ["*/*"])
        fetch(list(FOLDERS), None)
        return folder
    except (errors.HfHubHTTPError, OSError, ValueError) as error:
        raise CheckpointError(f"{no_such_folder(source)}, and {_why(source, hub, error)}") from error


def _why(source: str, hub: Hub, error: Exception) -> str:
    """Returns why a download failed, and what helps."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        return f"the hub's repository is gated: ask for access on https://huggingface.co/{source}, and {LOG_IN}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"the Hugging Face hub has no such repository, or a private one: check the name, or {LOG_IN}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"the hub's repository has no revision {hub.revision!r}: name a branch, tag or commit of it"
    if isinstance(error, errors.LocalEntryNotFoundError):
        wanted = "it" if hub.revision is None else f"its revision {hub.revision!r}"
        if hub.local_files_only or constants.HF_HUB_OFFLINE:
            setting = "local_files_only" if hub.local_files_only else "HF_HUB_OFFLINE"
            return f"the cache of the Hugging Face hub does not hold {wanted}: download it once without {setting}"
        return f"the Hugging Face hub cannot be reached ({first_line(error)}): check the network, or name a folder"
    return f"downloading it from the Hugging Face hub failed: {first_line(error)}"


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
