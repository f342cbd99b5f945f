"""Calibration and evaluation texts: files, data sets of a hub, and what is too short."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from farms_fast.adapters.pruning.tokens import calibration_tokens, text_tokens


def letters(text: str, **options: object) -> dict[str, list[int]]:
    """A tokenizer with a token for each letter."""
    return {"input_ids": [ord(letter) for letter in text]}


def back(tokens: torch.Tensor) -> str:
    return "".join(map(chr, tokens.tolist()))


TEXT = "".join(chr(65 + number) for number in range(40))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path / "text.txt"


def test_samples_are_different_pieces_of_the_text(path: Path) -> None:
    random = torch.get_rng_state()
    tokens = calibration_tokens(letters, path, samples=31, seqlen=10)
    assert torch.equal(torch.get_rng_state(), random)
    assert tokens.dtype == torch.int64
    # All of the 31 places that there are, each once, in a random order.
    assert {back(row) for row in tokens} == {TEXT[n : n + 10] for n in range(31)}
    assert [back(row) for row in tokens] != sorted(back(row) for row in tokens)


def test_the_seed_chooses_the_samples(path: Path) -> None:
    first, again, other = (
        calibration_tokens(letters, str(path), samples=5, seqlen=4, seed=seed) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_all_tokens_of_a_text(path: Path) -> None:
    assert back(text_tokens(letters, path)) == TEXT


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "at least 19 tokens for 10 different samples of 10, got 0 from"),
        (TEXT[:18], "at least 19 tokens for 10 different samples of 10, got 18 from"),
    ],
)
def test_refuses_a_text_that_is_too_short(path: Path, text: str, message: str) -> None:
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        calibration_tokens(letters, path, samples=10, seqlen=10)
    path.write_text(TEXT[:19])
    assert calibration_tokens(letters, path, samples=10, seqlen=10).shape == (10, 10)


@pytest.mark.parametrize("text", ["", "A"])
def test_refuses_to_evaluate_on_nothing(path: Path, text: str) -> None:
    path.write_text(text)
    with pytest.raises(ValueError, match=f"at least two tokens, got {len(text)} from"):
        text_tokens(letters, path)


def test_refuses_what_is_no_text_file(path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"'wikitext2', 'c4' or the path of a text file"):
        text_tokens(letters, path.with_name("no.txt"))
    with pytest.raises(FileNotFoundError, match="which is no file"):
        calibration_tokens(letters, path.parent)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="expected a text file in UTF-8"):
        text_tokens(letters, path)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"samples": 0}, ValueError),
        ({"seqlen": 1}, ValueError),
        ({"samples": 2.0}, TypeError),
        ({"seed": -1}, ValueError),
    ],
)
def test_refuses_options(path: Path, options: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=re.escape(next(iter(options)))):
        calibration_tokens(letters, path, **options)


# ----------------------------------------------------------------------------- data sets of a hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A stand-in for ``datasets``: gives rows, and keeps how it was called."""
    calls: list[Any] = []

    def load_dataset(path: str, **options: Any) -> Any:
        calls.append((path, options))
        if path == "Salesforce/wikitext":
            return [{"text": "abc"}, {"text": ""}, {"text": "def"}]
        return [{"text": letter * (3 + number)} for number, letter in enumerate("abcdefgh")]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return calls


def test_wikitext_is_one_text(hub: list[Any]) -> None:
    whole = "abc\n\n\n\ndef"
    assert back(text_tokens(letters, "wikitext2")) == whole
    samples = calibration_tokens(letters, "wikitext2", samples=3, seqlen=8)
    assert {back(row) for row in samples} == {whole[n : n + 8] for n in range(3)}
    assert hub == [
        ("Salesforce/wikitext", {"name": "wikitext-2-raw-v1", "split": split})
        for split in ("test", "train")
    ]


def test_a_sample_of_c4_comes_from_one_document(hub: list[Any]) -> None:
    tokens = calibration_tokens(letters, "c4", samples=4, seqlen=6)
    # Documents of 3 to 10 letters; those with more than 6 are e, f, g, h.
    assert sorted(back(row) for row in tokens) == [letter * 6 for letter in "efgh"]
    assert [back(row) for row in tokens] != [letter * 6 for letter in "efgh"]
    text = back(text_tokens(letters, "c4"))
    assert text.startswith("aaa bbbb ccccc ")
    (path, options), (_, evaluation) = hub
    assert path == "allenai/c4"
    assert options["split"] == "train"
    assert options["data_files"] == {"train": "en/c4-train.00000-of-01024.json.gz"}
    assert evaluation["split"] == "test"
    assert evaluation["data_files"] == {"test": "en/c4-validation.00000-of-00008.json.gz"}


def test_refuses_documents_that_are_too_short(hub: list[Any]) -> None:
    message = "5 documents of more than 6 tokens, got 4 among the 8 documents of 'c4'"
    with pytest.raises(ValueError, match=message):
        calibration_tokens(letters, "c4", samples=5, seqlen=6)


def test_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'farms-fast\[pruning\]', or give a text"):
        calibration_tokens(letters, "wikitext2")


def test_says_that_the_hub_is_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(path: str, **options: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    message = "'c4' could not be loaded (ConnectionError: no route to host): fetch it once"
    with pytest.raises(OSError, match=re.escape(message)):
        text_tokens(letters, "c4")
