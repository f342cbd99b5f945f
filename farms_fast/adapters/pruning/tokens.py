"""Token ids for calibration and evaluation: read from texts, and checked against a model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from farms_fast.adapters.pruning.modules import input_embeddings
from farms_fast.core.arguments import check_int, check_type
from farms_fast.core.optional import optional_import
from farms_fast.core.regular_files import expand_user

# One file of 1024 is for calibration and one of 8 for evaluation, as in the literature.
_C4_FILES = {
    "train": "en/c4-train.00000-of-01024.json.gz",
    "test": "en/c4-validation.00000-of-00008.json.gz",
}
# Data sets by name: path on the hub and options.
_DATASETS: dict[str, tuple[str, dict[str, Any]]] = {
    "wikitext2": ("Salesforce/wikitext", {"name": "wikitext-2-raw-v1"}),
    "c4": ("allenai/c4", {"data_files": _C4_FILES}),
}
# The number of C4's first documents that evaluation reads, as in the literature.
_C4_DOCUMENTS = 1100


def calibration_tokens(
    tokenizer: Any,
    source: str | os.PathLike[str],
    *,
    samples: int = 128,
    seqlen: int = 2048,
    seed: int = 0,
) -> Tensor:
    """Draws samples of consecutive tokens at random from a text.

    A text file and WikiText-2 (its training split, paragraphs joined by blank lines) are one text;
    samples start at different tokens of it and may overlap. A sample of C4 comes from a document of
    its own, drawn among those with more than `seqlen` tokens.

    Args:
        tokenizer: called with a text, returns `input_ids`, as tokenizers of transformers do.
        source: "wikitext2", "c4" (both through `datasets`), or the path of a UTF-8 text file.
        samples: number of samples.
        seqlen: tokens of each sample.
        seed: seed of the draw. The caller's random state is neither used nor changed.

    Returns:
        int64 (samples, seqlen).

    Raises:
        TypeError: an argument of another type.
        FileNotFoundError: the file does not exist.
        ImportError: `datasets` is not installed.
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
    # Without repetition: a second copy of a sample adds nothing.
    chosen = torch.randperm(starts, generator=generator)[:count].tolist()
    return torch.stack([text[start : start + length] for start in chosen])


def text_tokens(tokenizer: Any, source: str | os.PathLike[str]) -> Tensor:
    """Reads all tokens of a text, for `perplexity`: int64 (tokens,).

    Args:
        tokenizer: as in `calibration_tokens`.
        source: "wikitext2" (its test split), "c4" (the first 1100 documents of its validation
            split), or the path of a UTF-8 text file.

    Raises:
        TypeError: an argument of another type.
        FileNotFoundError: the file does not exist.
        ImportError: `datasets` is not installed.
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
    """Raises unless a source names a data set or a file; returns it as a path."""
    expected = f"{', '.join(map(repr, _DATASETS))} or the path of a text file"
    check_type(argument, source, (str, os.PathLike), expected)
    path = expand_user(source)
    if not (path.is_file() or source in _DATASETS):
        raise FileNotFoundError(
            f"{argument}: expected {expected}, got {str(path)!r}, which is no file"
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
    drawn: list[Tensor] = []
    for number in torch.randperm(len(documents), generator=generator).tolist():
        text = _ids(tokenizer, documents[number])
        if len(text) > length:
            start = int(torch.randint(len(text) - length, (), generator=generator))
            drawn.append(text[start : start + length])
            if len(drawn) == count:
                return torch.stack(drawn)
    raise ValueError(
        f"calibration: expected {count} documents of more than {length} tokens, got {len(drawn)} "
        f"among the {len(documents)} documents of 'c4'"
    )


def _ids(tokenizer: Any, text: str) -> Tensor:
    # Not verbose: the tokenizer warns of a text that is longer than the model's sequences.
    ids = tokenizer(text, verbose=False)["input_ids"] if text else []
    return torch.tensor(ids, dtype=torch.int64)


def _texts(source: str | os.PathLike[str], split: str, argument: str) -> Iterator[str]:
    if isinstance(source, str) and source in _DATASETS:
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
    path, options = _DATASETS[name]
    if "data_files" in options:
        # The hub knows the sizes of all files together only.
        files = {split: options["data_files"][split]}
        options = {"data_files": files, "verification_mode": "no_checks"}
    try:
        rows = datasets.load_dataset(path, split=split, **options)
    except Exception as error:  # of many types: network, cache, files
        raise OSError(
            f"{argument}: {name!r} could not be loaded ({type(error).__name__}: {error}): fetch "
            "it once on a machine with access to the hub, or give a text file"
        ) from error
    for row in rows:
        yield row["text"]


def check_tokens(model: nn.Module, tokens: object) -> Tensor:
    """Checks calibration tokens against a model; returns int64 (samples, seqlen) on the CPU."""
    if isinstance(tokens, Tensor) and (tokens.dim() != 2 or len(tokens) < 1 or tokens.shape[1] < 2):
        raise ValueError(
            "calibration: expected a tensor (samples, seqlen) of at least one sample of two "
            f"tokens, got shape {tuple(tokens.shape)}"
        )
    ids = token_ids(model, tokens, "calibration")
    check_positions(model, ids.shape[1], "calibration")
    return ids


def token_ids(model: nn.Module, tokens: object, argument: str) -> Tensor:
    """Checks that token ids are in the model's vocabulary; returns them as int64 on the CPU."""
    if not isinstance(tokens, Tensor) or tokens.dtype not in (torch.int64, torch.int32):
        got = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
        raise TypeError(f"{argument}: expected token ids as an int64 tensor, got {got}")
    ids = tokens.detach().to("cpu", torch.int64)
    vocabulary = getattr(input_embeddings(model), "num_embeddings", None)
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or (isinstance(vocabulary, int) and high >= vocabulary):
        raise ValueError(
            f"{argument}: expected token ids from 0 to {(vocabulary or high + 1) - 1}, "
            f"got {low} to {high}"
        )
    return ids


def longest_sequence(model: nn.Module) -> int | None:
    """The number of positions of a model; None where its config has none."""
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None


def check_positions(model: nn.Module, seqlen: int, argument: str) -> None:
    """Raises ValueError if the model has fewer than `seqlen` positions."""
    positions = longest_sequence(model)
    if positions is not None and seqlen > positions:
        raise ValueError(
            f"{argument}: expected at most the {positions} positions of the model, "
            f"got a seqlen of {seqlen}"
        )
