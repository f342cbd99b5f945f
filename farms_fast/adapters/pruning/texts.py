"""Token ids to calibrate and to evaluate with, from data sets of a hub or from any text file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from farms_fast.core.arguments import check_int
from farms_fast.core.optional import optional_import

__all__ = ["TEXTS", "calibration_tokens", "check_source", "text_tokens"]

#: Data sets by name: path and configuration on the hub, and the files that are read of a split.
#: Of C4 that is one of 1024 files to calibrate, and one of 8 to evaluate, as in the literature.
TEXTS: dict[str, tuple[str, dict[str, Any]]] = {
    "wikitext2": ("Salesforce/wikitext", {"name": "wikitext-2-raw-v1"}),
    "c4": (
        "allenai/c4",
        {
            "data_files": {
                "train": "en/c4-train.00000-of-01024.json.gz",
                "test": "en/c4-validation.00000-of-00008.json.gz",
            }
        },
    ),
}
# Documents of C4 that are read to evaluate: the first ones of the file, as in the literature.
_C4_DOCUMENTS = 1100


def calibration_tokens(
    tokenizer: Any,
    source: str | os.PathLike[str],
    *,
    samples: int = 128,
    seqlen: int = 2048,
    seed: int = 0,
) -> Tensor:
    """Samples of consecutive tokens from random places of a text.

    A text file and WikiText-2 (its training split, paragraphs joined by blank lines) are one text;
    the samples start at different tokens of it and may overlap. A sample of C4 comes from a
    document of its own, drawn at random among those with more than `seqlen` tokens.

    Args:
        tokenizer: called with a text, gives `input_ids`, as tokenizers of transformers do.
        source: "wikitext2", "c4" (both through `datasets`), or the path of a UTF-8 text file.
        samples: how many.
        seqlen: tokens of each.
        seed: of the random places. The caller's random state is neither used nor changed.

    Returns:
        int64 (samples, seqlen).

    Raises:
        TypeError: an argument of another kind.
        FileNotFoundError: the file does not exist.
        ImportError: `datasets` is needed and not installed.
        OSError: the data set or the file cannot be read.
        ValueError: the text is empty or too short for as many samples (the message has both
            counts), or is not UTF-8.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> letters = lambda text, **options: {"input_ids": [ord(c) for c in text]}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "text.txt")
        ...     _ = path.write_text("abcdefgh")
        ...     calibration_tokens(letters, path, samples=2, seqlen=7).tolist()
        [[97, 98, 99, 100, 101, 102, 103], [98, 99, 100, 101, 102, 103, 104]]
    """
    _check_tokenizer(tokenizer)
    count = check_int("samples", samples, least=1)
    length = check_int("seqlen", seqlen, least=2)
    generator = torch.Generator().manual_seed(check_int("seed", seed))
    if source == "c4":
        return _from_documents(tokenizer, count, length, generator)
    text = _ids(tokenizer, "\n\n".join(_texts(source, "train", "calibration")))
    starts = len(text) - length + 1
    if starts < count:
        raise ValueError(
            f"calibration: expected at least {length + count - 1} tokens for {count} different "
            f"samples of {length}, got {len(text)} from {str(source)!r}"
        )
    # Drawn without repetition: a sample that comes twice tells nothing new.
    chosen = torch.randperm(starts, generator=generator)[:count].tolist()
    return torch.stack([text[start : start + length] for start in chosen])


def text_tokens(tokenizer: Any, source: str | os.PathLike[str]) -> Tensor:
    """All tokens of a text, for `perplexity`.

    Args:
        tokenizer: as in `calibration_tokens`.
        source: "wikitext2" (its test split), "c4" (the first 1100 documents of its validation
            split), or the path of a UTF-8 text file.

    Returns:
        int64 (tokens,).

    Raises:
        TypeError: an argument of another kind.
        FileNotFoundError: the file does not exist.
        ImportError: `datasets` is needed and not installed.
        OSError: the data set or the file cannot be read.
        ValueError: the text has fewer than two tokens, or is not UTF-8.
    """
    _check_tokenizer(tokenizer)
    texts = _texts(source, "test", "text")
    if source == "c4":
        joined = " ".join(text for text, _ in zip(texts, range(_C4_DOCUMENTS), strict=False))
    else:
        joined = "\n\n".join(texts)
    text = _ids(tokenizer, joined)
    if len(text) < 2:
        raise ValueError(
            f"text: expected one of at least two tokens, got {len(text)} from {str(source)!r}"
        )
    return text


def check_source(source: str | os.PathLike[str], argument: str = "source") -> Path:
    """The path of a text file; for a data set's name nothing is looked at.

    Args:
        source: as in `calibration_tokens`.
        argument: what gave it, for the message.

    Raises:
        TypeError: it is no name and no path.
        FileNotFoundError: it is neither the name of a data set nor the path of a file.
    """
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(
            f"{argument}: expected {', '.join(map(repr, TEXTS))} or the path of a text file, got "
            f"{type(source).__name__}"
        )
    path = Path(source).expanduser()
    if not (path.is_file() or source in TEXTS):
        raise FileNotFoundError(
            f"{argument}: expected {', '.join(map(repr, TEXTS))} or the path of a text file, got "
            f"{str(path)!r}, which is no file"
        )
    return path


def _check_tokenizer(tokenizer: object) -> None:
    if not callable(tokenizer):
        raise TypeError(
            "tokenizer: expected one that is called with a text, as those of transformers are, "
            f"got {type(tokenizer).__name__}"
        )


def _from_documents(tokenizer: Any, count: int, length: int, generator: torch.Generator) -> Tensor:
    documents = list(_texts("c4", "train", "calibration"))
    found: list[Tensor] = []
    for number in torch.randperm(len(documents), generator=generator).tolist():
        text = _ids(tokenizer, documents[number])
        if len(text) > length:
            start = int(torch.randint(len(text) - length, (), generator=generator))
            found.append(text[start : start + length])
            if len(found) == count:
                return torch.stack(found)
    raise ValueError(
        f"calibration: expected {count} documents of more than {length} tokens, got {len(found)} "
        f"among the {len(documents)} documents of 'c4'"
    )


def _ids(tokenizer: Any, text: str) -> Tensor:
    # The length of a whole text exceeds what the model takes at once, which is no mistake here.
    found = tokenizer(text, verbose=False)["input_ids"] if text else []
    return torch.tensor(found, dtype=torch.int64)


def _texts(source: str | os.PathLike[str], split: str, argument: str) -> Iterator[str]:
    if isinstance(source, str) and source in TEXTS:
        yield from _from_hub(source, split, argument)
        return
    path = check_source(source)
    try:
        yield path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{argument}: expected a text file in UTF-8, got {str(path)!r}: {error}"
        ) from error


def _from_hub(name: str, split: str, argument: str) -> Iterator[str]:
    what = f"text {name!r}"
    with optional_import("datasets", extra="pruning", needed_for=what, instead="give a text file"):
        import datasets
    path, options = TEXTS[name]
    if "data_files" in options:
        # The hub's own counts are those of all files.
        options = {
            "data_files": {split: options["data_files"][split]},
            "verification_mode": "no_checks",
        }
    try:
        rows = datasets.load_dataset(path, split=split, **options)
    except Exception as error:  # of many kinds, by what is missing: network, cache, files
        raise OSError(
            f"{argument}: {name!r} could not be loaded ({type(error).__name__}: {error}): fetch "
            "it once on a machine with access to the hub, or give a text file"
        ) from error
    for row in rows:
        yield row["text"]
