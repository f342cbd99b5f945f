"""Models by name, from a cache as huggingface_hub lays it out; nothing is fetched here."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import farms_fast
from farms_fast.cli.main import app
from farms_fast.weights.sources import checkpoint_holds, checkpoints_of, open_source
from farms_fast.weights.sources.hub import HubName, hub_name
from tests.support.checkpoints import WEIGHTS, assert_holds_weights


def _cache_model(folder: Path, commits: Sequence[str] = ("abc1",), main: str = "abc1") -> Path:
    for commit in commits:
        (folder / "snapshots" / commit).mkdir(parents=True)
        (folder / "blobs").mkdir(exist_ok=True)
        save_file(
            WEIGHTS if commit == "abc1" else {"c": torch.ones(3, 3)}, folder / "blobs" / commit
        )
        link = folder / "snapshots" / commit / "model.safetensors"
        link.symlink_to(folder / "blobs" / commit)
    if main:
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(main)
    return folder / "snapshots" / "abc1"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hub").mkdir()
    return tmp_path / "hub"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("org/model", HubName("org/model")),
        ("gpt2", HubName("gpt2")),
        ("org/model-1.5_b@refs1", HubName("org/model-1.5_b", "refs1")),
        ("hf://org/model", HubName("org/model")),
        ("hf:/org/model@main", HubName("org/model", "main")),
        ("hf://org/model@v1/a/b.gguf", HubName("org/model", "v1", "a/b.gguf")),
        ("hf://org/model/../../x", None),
        ("hf://org/..", None),
        ("a/b/c", None),
        ("../model", None),
        ("./model", None),
        ("/org/model", None),
        ("~/model", None),
        ("org/mo del", None),
        ("org//model", None),
    ],
)
def test_names(text: str, name: HubName | None) -> None:
    assert hub_name(text) == name


@pytest.mark.parametrize("model", ["me/tiny", "hf://me/tiny", "hf://me/tiny@abc1", "me/tiny@main"])
def test_model_in_the_cache_is_read_by_its_name(cache: Path, model: str) -> None:
    _cache_model(cache / "models--me--tiny", ("abc1", "def2"))
    assert_holds_weights(open_source(model))
    assert_holds_weights(open_source(Path(model)))
    with pytest.raises(FileNotFoundError, match=r"which does not exist, nor .*--download"):
        open_source("me/tiny@other")


def test_file_of_a_model_in_the_cache(cache: Path) -> None:
    _cache_model(cache / "models--me--tiny")
    assert_holds_weights(open_source("hf://me/tiny/model.safetensors"))
    with pytest.raises(FileNotFoundError, match="--download"):
        open_source("hf://me/tiny/other.safetensors")


def test_folder_of_the_cache_is_read(cache: Path) -> None:
    _cache_model(cache / "models--me--tiny", ("abc1", "def2"))
    assert_holds_weights(open_source(cache / "models--me--tiny"))
    _cache_model(cache / "models--me--one", main="")
    assert_holds_weights(open_source(cache / "models--me--one"))
    _cache_model(cache / "models--me--two", ("abc1", "def2"), main="")
    with pytest.raises(FileNotFoundError, match=r"expected a snapshot of .*'main', got abc1, def2"):
        open_source(cache / "models--me--two")


def test_path_goes_before_a_name(cache: Path) -> None:
    _cache_model(cache / "models--me--tiny", ("abc1", "def2"), "def2")
    Path("me").mkdir()
    torch.save(WEIGHTS, "me/tiny")
    assert_holds_weights(open_source("me/tiny"))
    assert [layer.name for layer in open_source("hf://me/tiny").layers()[0]] == ["c"]


def test_reference_cannot_lead_elsewhere(cache: Path, tmp_path: Path) -> None:
    folder = cache / "models--me--tiny"
    _cache_model(folder, ("def2", "abc1"), "../..")
    with pytest.raises(FileNotFoundError, match="expected a snapshot"):
        open_source(folder)
    (folder / "refs" / "main").unlink()
    os.mkfifo(folder / "refs" / "main")
    with pytest.raises(FileNotFoundError, match="expected a snapshot"):
        open_source(folder)


@pytest.mark.parametrize("variables", [{"HF_HOME": "home"}, {"XDG_CACHE_HOME": "."}])
def test_cache_is_where_the_hub_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, str(tmp_path / value))
    home = tmp_path / ("home" if "HF_HOME" in variables else "huggingface")
    _cache_model(home / "hub" / "models--me--tiny")
    assert_holds_weights(open_source("me/tiny"))


def test_name_is_not_fetched_unless_asked_for(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")
    calls: list[tuple[str, str | None, list[str]]] = []

    def fetch(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        calls.append((name, revision, allow_patterns))
        folder = tmp_path / "fetched"
        folder.mkdir(exist_ok=True)
        if "*.bin" in allow_patterns:
            torch.save(WEIGHTS, folder / "pytorch_model.bin")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    with pytest.raises(FileNotFoundError, match=r"'me/tiny', which does not exist, nor .*Hub"):
        open_source("me/tiny")
    assert calls == []
    assert_holds_weights(open_source("me/tiny@v1", download=True))
    assert [call[:2] for call in calls] == [("me/tiny", "v1")] * 2
    assert calls[0][2] == ["*.json", "*.safetensors"]


def test_failed_download_is_one_error(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")

    def fail(*_: object, **__: object) -> str:
        raise RuntimeError("no\nnetwork")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(OSError, match="me/tiny: could not be downloaded: no network"):
        open_source("me/tiny", download=True)


def test_snapshot_is_not_written_to(cache: Path) -> None:
    snapshot = _cache_model(cache / "models--me--tiny")
    assert checkpoints_of("me/tiny") == [snapshot]
    assert checkpoint_holds(snapshot, cache / "models--me--tiny" / "blobs" / "abc1")


def test_run_is_of_the_snapshot_wherever_it_was_started(cache: Path) -> None:
    snapshot = _cache_model(cache / "models--me--tiny")
    windows = farms_fast.FixedAspectSampling(rows=3, per_dim=1)
    analysis = farms_fast.analyze("me/tiny", windows, bootstrap=0, progress=False)
    assert analysis.settings.source == str(snapshot)


def test_commands_take_names(cache: Path) -> None:
    _cache_model(cache / "models--me--tiny")
    result = CliRunner().invoke(app, ["plan", "hf://me/tiny"])
    assert result.exit_code == 0, result.output
    result = CliRunner().invoke(app, ["plan", "me/gone"])
    assert result.exit_code == 2
    assert "--download" in result.stderr
