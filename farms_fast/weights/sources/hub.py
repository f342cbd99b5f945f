"""Models by their names on the Hugging Face Hub: from the local cache, or downloaded if asked."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from farms_fast.core.optional import optional_import
from farms_fast.core.regular_files import expand_user, read_limited

CACHE_PREFIX = "models--"
_SCHEME = "hf:/"
_PART = r"[A-Za-z0-9][\w.\-]*"
# `//` becomes `/` where a path was made of the text.
_WITH_SCHEME = re.compile(
    rf"hf:/{{1,2}}(?P<model>{_PART}(?:/{_PART})?)(?:@(?P<revision>[\w.\-]+))?(?:/(?P<file>.+))?"
)
_PLAIN = re.compile(rf"(?P<model>{_PART}(?:/{_PART})?)(?:@(?P<revision>[\w.\-]+))?(?P<file>)")
_CONFIGS = ("*.json",)
# Asked for one after the other, until there are weights: many models have all of these.
_WEIGHTS = (("*.safetensors",), ("*.bin", "*.pt", "*.pth"), ("*.h5",), ("*.msgpack",))


@dataclass(frozen=True)
class HubName:
    """`org/model`, or with more `hf://org/model@revision/file`."""

    model: str
    revision: str = ""
    file: str = ""

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.model}{revision}" + (f"/{self.file}" if self.file else "")


def hub_name(text: str) -> HubName | None:
    """The name that a text is; None for one that can only be a path."""
    match = _WITH_SCHEME.fullmatch(text) or _PLAIN.fullmatch(text)
    if match is None or ".." in (match["file"] or "").split("/"):
        return None
    return HubName(match["model"], match["revision"] or "", match["file"] or "")


def local_path(model: str | os.PathLike[str]) -> Path:
    """The path that a model's path or name stands for; the path itself where the cache lacks it."""
    text = os.fspath(model)
    path = expand_user(text)
    if not text.startswith(_SCHEME) and os.path.lexists(path):
        return path
    name = hub_name(text)
    return (cached(name) if name else None) or path


def cached(name: HubName) -> Path | None:
    """The model's folder, or its file, in the local cache; None where it is not there."""
    folder = _cache() / (CACHE_PREFIX + name.model.replace("/", "--"))
    if not (folder / "snapshots").is_dir():
        return None
    try:
        snapshot = snapshot_of(folder, name.revision)
    except FileNotFoundError:
        return None
    path = snapshot / name.file
    return path if path.exists() else None


def snapshot_of(folder: Path, revision: str = "") -> Path:
    """The snapshot of a revision in a model's folder of the cache.

    Without a revision that is what `main` stands for, or the only one.

    Raises:
        FileNotFoundError: there is no such snapshot; the message names those that are there.
    """
    snapshots = sorted(path for path in (folder / "snapshots").iterdir() if path.is_dir())
    reference = folder / "refs" / (revision or "main")
    commit = revision
    if reference.is_file():
        commit = read_limited(reference, 200).decode("ascii", "replace").strip()
    for snapshot in snapshots:
        if snapshot.name == commit:
            return snapshot
    if len(snapshots) == 1 and not revision:
        return snapshots[0]
    names = ", ".join(path.name for path in snapshots[:5]) or "none"
    wanted = f"revision {revision!r}" if revision else "the revision 'main'"
    raise FileNotFoundError(f"{folder}: expected a snapshot of {wanted}, got {names}")


def download(name: HubName) -> Path:
    """Fetches weights and configs of a model into the local cache.

    Raises:
        ImportError: huggingface_hub is not installed.
        OSError: it cannot be fetched.
        ValueError: it has no weights of a format that is taken without the name of a file.
    """
    with optional_import("huggingface_hub", extra="hub", needed_for=f"downloading {name}"):
        import huggingface_hub
    for weights in ((name.file,),) if name.file else _WEIGHTS:
        try:
            folder = huggingface_hub.snapshot_download(
                name.model,
                revision=name.revision or None,
                allow_patterns=[*_CONFIGS, *weights],
            )
        except Exception as error:  # of many types: its own, requests', the file system's
            reason = " ".join(str(error).split()) or type(error).__name__
            raise OSError(f"{name}: could not be downloaded: {reason}") from error
        path = Path(folder) / name.file
        if name.file and path.exists():
            return path
        if any(next(path.rglob(pattern), None) for pattern in weights):
            return path
    raise ValueError(
        f"{name}: expected weights as safetensors, pickles of torch, .h5 or .msgpack, got none:"
        " name a file of it as hf://org/model/FILE"
    )


def _cache() -> Path:
    """Where huggingface_hub keeps models, by its own variables."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if path := os.environ.get(variable):
            return expand_user(path)
    general = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return expand_user(os.environ.get("HF_HOME") or f"{general}/huggingface") / "hub"
