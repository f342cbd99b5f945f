"""English prose for a trained language model: encyclopaedia articles and news reports.

gensim's wheel ships both for its own tests: a part of a Wikipedia dump and the Lee corpus of news.
Paragraphs of prose are kept; headings, lists, tables, references and markup are left out. No
article is in two splits, and the news are for evaluation alone.
"""

from __future__ import annotations

import bz2
import hashlib
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

SPLITS = ("calibration", "validation", "test", "news")
_WIKIPEDIA = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
_NEWS = "lee_background.cor"
# A shorter paragraph is a caption or a line of a list more often than not.
_SHORTEST = 200


@dataclass(frozen=True)
class Tokens:
    """Token ids by split, int64 (n,), and how many documents each comes from."""

    ids: dict[str, torch.Tensor]
    documents: dict[str, int]

    @property
    def digest(self) -> str:
        """Tells whether two runs read the same tokens."""
        whole = hashlib.sha256()
        for split in sorted(self.ids):
            whole.update(split.encode() + self.ids[split].numpy().astype("<i4").tobytes())
        return whole.hexdigest()[:12]

    def describe(self) -> str:
        """Split, tokens and documents, in one line."""
        return ", ".join(
            f"{split} {len(ids)} tokens of {self.documents[split]} documents"
            for split, ids in self.ids.items()
        )

    def save(self, path: Path) -> None:
        """Writes a compressed file for `load`."""
        arrays: dict[str, Any] = {
            split: ids.numpy().astype(np.int32) for split, ids in self.ids.items()
        }
        counts = np.array([self.documents[split] for split in self.ids])
        np.savez_compressed(path, documents=counts, **arrays)

    @classmethod
    def load(cls, path: Path) -> Tokens:
        with np.load(path) as saved:
            splits = [split for split in SPLITS if split in saved]
            ids = {split: torch.from_numpy(saved[split].astype(np.int64)) for split in splits}
            counts = saved["documents"].tolist()
        return cls(ids, dict(zip(splits, counts, strict=True)))


def read_tokens(tokenizer: Any, test: int, validation: int) -> Tokens:
    """Splits gensim's texts by documents and encodes them.

    Articles go to the test split until it has so many tokens, then to the validation split, and
    the rest to the calibration split, in an order that has nothing to do with their titles'.
    """
    folder = _gensim_texts()
    encoded = {
        title: _encode(tokenizer, text) for title, text in wikipedia(folder / _WIKIPEDIA).items()
    }
    order = sorted(encoded, key=lambda title: hashlib.sha256(title.encode()).digest())
    parts: dict[str, list[torch.Tensor]] = {split: [] for split in SPLITS}
    for title in order:
        for split, wanted in (("test", test), ("validation", validation)):
            if sum(map(len, parts[split])) < wanted:
                parts[split].append(encoded[title])
                break
        else:
            parts["calibration"].append(encoded[title])
    news = (folder / _NEWS).read_text(encoding="utf-8").splitlines()
    parts["news"] = [_encode(tokenizer, text.strip()) for text in news if text.strip()]
    for split, documents in parts.items():
        if not documents:
            raise ValueError(f"text: no document is left for the {split} split")
    return Tokens(
        {split: torch.cat(documents) for split, documents in parts.items()},
        {split: len(documents) for split, documents in parts.items()},
    )


def wikipedia(path: Path) -> dict[str, str]:
    """Prose of every article of a dump by title, without redirects and very short articles."""
    from gensim.corpora.wikicorpus import extract_pages, filter_wiki

    articles = {}
    with bz2.open(path) as dump:
        for title, markup, _ in extract_pages(dump, filter_namespaces=("0",)):
            if markup.lstrip().lower().startswith("#redirect"):
                continue
            lines = (_clean(line) for line in filter_wiki(markup).splitlines())
            paragraphs = [line for line in lines if _is_prose(line)]
            if len(paragraphs) >= 3:
                articles[title] = "\n\n".join(paragraphs)
    return articles


def calibration_set(ids: torch.Tensor, samples: int, seqlen: int, seed: int) -> torch.Tensor:
    """Samples of consecutive tokens that do not overlap, int64 (samples, seqlen)."""
    starts = len(ids) // seqlen
    if starts < samples:
        raise ValueError(
            f"calibration: expected {samples} samples of {seqlen} tokens, got {len(ids)} tokens"
        )
    generator = torch.Generator().manual_seed(seed)
    # The seed moves the windows, too: few texts have many more windows than samples.
    offset = int(torch.randint(len(ids) - starts * seqlen + 1, (), generator=generator))
    chosen = torch.randperm(starts, generator=generator)[:samples]
    return torch.stack([ids[offset + i * seqlen : offset + (i + 1) * seqlen] for i in chosen])


def _gensim_texts() -> Path:
    spec = importlib.util.find_spec("gensim")
    if spec is None or spec.origin is None:
        raise ImportError(
            "gensim: expected to be installed, for its wheel has the text (pip install gensim); "
            "or give a file of tokens with --tokens"
        )
    return Path(spec.origin).parent / "test" / "test_data"


def _clean(line: str) -> str:
    line = re.sub(r"'{2,}", "", line).replace("\xa0", " ")
    line = re.sub(r"\(\s*[;,]?\s*\)", "", line)
    return re.sub(r"\s+", " ", re.sub(r"\s+([,.;:])", r"\1", line)).strip()


def _is_prose(line: str) -> bool:
    if len(line) < _SHORTEST or not (line[0].isupper() or line[0] in "\"'("):
        return False
    return line.endswith((".", '."', ".)", "?", "!")) and not re.search(r"[|{}=<>]|\[\[|\]\]", line)


def _encode(tokenizer: Any, text: str) -> torch.Tensor:
    # Not verbose: the tokenizer warns of a text that is longer than the model's sequences.
    ids = tokenizer(text + "\n\n", verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)
