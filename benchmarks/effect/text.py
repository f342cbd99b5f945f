"""Real text that every machine with this package has, and tokens of it.

Python's own sources and documentation (the standard library, its pydoc topics), the sources of
numpy and torch, and licences. Which of it a machine has depends on its versions, so a result comes
with the digest of what was read.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

SPLITS = ("train", "validation", "test")
END = "<|end|>"
# A few generated tables would otherwise be most of a small text.
_LARGEST_FILE = 200_000
_SOURCES = (".py", ".txt", ".rst", ".md")


@dataclass(frozen=True)
class Text:
    """Documents by split, each a part of whole files."""

    documents: dict[str, list[str]]
    digest: str

    @property
    def bytes(self) -> dict[str, int]:
        return {
            split: sum(len(document.encode()) for document in documents)
            for split, documents in self.documents.items()
        }


def read_text(limit: int) -> Text:
    """At most so many bytes of files in an order that is the same everywhere.

    Two of every twenty files are for validation and test, so that no file is in two splits; a file
    that is the same as one before is left out.
    """
    named = sorted(
        (hashlib.sha256(name.encode()).digest(), path) for name, path in _files().items()
    )
    documents: dict[str, list[str]] = {split: [] for split in SPLITS}
    seen: set[bytes] = set()
    whole = hashlib.sha256()
    left = limit
    for _, path in named:
        try:
            data = path.read_bytes()[:_LARGEST_FILE]
            document = data.decode(
                "utf-8", errors="strict" if len(data) < _LARGEST_FILE else "ignore"
            )
        except (OSError, UnicodeDecodeError):
            continue
        digest = hashlib.sha256(data).digest()
        if digest in seen or not document.strip():
            continue
        seen.add(digest)
        whole.update(digest)
        documents[{3: "validation", 6: "test"}.get((len(seen) - 1) % 20, "train")].append(document)
        left -= len(data)
        if left <= 0:
            break
    for split, found in documents.items():
        if not found:
            raise ValueError(f"text: no {split} documents in {limit} bytes of text")
    return Text(documents, whole.hexdigest()[:16])


@functools.cache
def _files() -> dict[str, Path]:
    """Every file of text by a name that does not depend on where it is installed."""
    return dict(_named_files())


def _named_files() -> Iterator[tuple[str, Path]]:
    library = Path(sysconfig.get_path("stdlib"))
    installed = ("site-packages", "dist-packages")
    for path in library.rglob("*"):
        inner = path.relative_to(library)
        if path.suffix in _SOURCES and path.is_file() and inner.parts[0] not in installed:
            yield f"stdlib/{inner.as_posix()}", path
    for package in ("numpy", "torch"):
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            continue
        folder = Path(spec.origin).parent
        for path in folder.rglob("*.py"):
            yield f"{package}/{path.relative_to(folder).as_posix()}", path
    for folder, pattern in (
        (Path(sysconfig.get_path("purelib")), "*.dist-info/**/*[Ll][Ii][Cc][Ee][Nn]*"),
        (Path("/usr/share/common-licenses"), "*"),
    ):
        for path in folder.glob(pattern):
            if path.is_file():
                yield f"licences/{path.relative_to(folder).as_posix()}", path


def tokens_of(text: Text, vocabulary: int, sample: int = 8_000_000) -> dict[str, torch.Tensor]:
    """Trains a byte-level BPE on the training documents and encodes every split.

    Args:
        text: the documents.
        vocabulary: size of the vocabulary.
        sample: bytes to train the BPE on.

    Returns:
        int64 (n,) by split, documents divided by a token of their own, the vocabulary's first.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    chosen, size = [], 0
    for document in text.documents["train"]:
        chosen.append(document)
        size += len(document)
        if size > sample:
            break
    tokenizer.train_from_iterator(chosen, trainer)
    end = tokenizer.token_to_id(END)
    found = {}
    for split, documents in text.documents.items():
        ids: list[int] = []
        for encoding in tokenizer.encode_batch(documents):
            ids += encoding.ids
            ids.append(end)
        found[split] = torch.tensor(ids, dtype=torch.int64)
    return found
