"""What ``farms-fast prune`` tells: damaged checkpoints, what it leaves out, and what is unusual."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from farms_fast.adapters.pruning.allocation import allocate_sparsity
from tests.support.language_models import small_model, write_words
from tests.support.pruning_commands import CALIBRATION, WINDOWS, run, save_checkpoint, settings_of

UNIFORM = ("--sparsity", "0.5", "--method", "magnitude", "--allocation", "uniform")
FARMS = ("--method", "magnitude", "--allocation", "farms", *WINDOWS)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("models") / "gpt2", small_model("gpt2"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_words(tmp_path_factory.mktemp("texts") / "text.txt", 400)


# ---------------------------------------------------------------------------------- what is read


def _garbage(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"xxxx")


def _half(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def _pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"garbage")


def _another_size(folder: Path) -> None:
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(
        config.replace('"intermediate_size": 48', '"intermediate_size": 40')
    )


def _no_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


@pytest.mark.parametrize("damage", [_garbage, _half, _pickle, _another_size, _no_json])
def test_a_damaged_checkpoint_is_one_line(
    model: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(model, folder)
    damage(folder)
    result = run(folder, *UNIFORM, "--out", tmp_path / "out")
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stderr.startswith(f"error: model: '{folder}' could not be loaded: ")
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


class _Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("taken",)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({}, "its pickle holds posix.mkdir, and what is no plain tensor is not loaded"),
        (
            {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}},
            "it needs code that comes with it, and none of that is run",
        ),
    ],
)  # fmt: skip
def test_no_code_is_run_and_none_advised(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    config: dict[str, Any],
    reason: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model, "hostile")
    Path("hostile/model.safetensors").unlink()
    torch.save({"x": _Code()}, "hostile/pytorch_model.bin")
    values = json.loads(Path("hostile/config.json").read_text())
    Path("hostile/config.json").write_text(json.dumps(values | config))
    Path("hostile/own.py").write_text("import os; os.mkdir('taken')")
    result = run("./hostile", *UNIFORM, "--out", "out")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"error: model: 'hostile' could not be loaded: {reason}\n"
    assert not Path("taken").exists()


def test_names_of_tensors_do_not_reach_the_terminal_as_they_are(
    model: Path, tmp_path: Path
) -> None:
    """In a process of its own: what transformers logs goes to that one's stderr."""
    shutil.copytree(model, tmp_path / "more")
    tensors = load_file(tmp_path / "more" / "model.safetensors")
    hostile = "x\x1b]0;taken\x07\nerror: no such error"
    save_file(
        tensors | {hostile: torch.ones(3)},
        tmp_path / "more" / "model.safetensors",
        metadata={"format": "pt"},
    )
    for quiet in ((), ("--quiet",)):
        out = str(tmp_path / f"out{len(quiet)}")
        command = (sys.executable, "-m", "farms_fast", "prune", str(tmp_path / "more"))
        done = subprocess.run(
            [*command, *UNIFORM, "--out", out, *quiet],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert "\x1b" not in done.stdout + done.stderr
        assert "\nerror" not in done.stdout + done.stderr
        assert ("x\\x1b]0;taken\\x07\\nerror: no such error the first" in done.stdout) != bool(
            quiet
        )


def test_tensors_without_a_place_are_told(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "more"
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    more = {"model.layers.3.mlp.up_proj.weight": torch.ones(48, 32), "value_head": torch.ones(3)}
    save_file(tensors | more, folder / "model.safetensors", metadata={"format": "pt"})
    result = run(folder, *UNIFORM, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "note: 2 of the checkpoint's tensors that the model has no place for" in result.stdout
    assert "model.layers.3.mlp.up_proj.weight the first" in result.stdout
    assert settings_of(tmp_path / "out")["settings"]["tensors_without_place"] == sorted(more)


@pytest.mark.parametrize("option", ["calibration", "evaluate"])
def test_a_text_of_another_encoding_is_named_by_its_option(
    model: Path, tmp_path: Path, option: str
) -> None:
    (tmp_path / "text.txt").write_bytes(b"\xff\xfe w1")
    method = "wanda" if option == "calibration" else "magnitude"
    options = ("--sparsity", "0.5", "--method", method, "--allocation", "uniform")
    result = run(model, *options, f"--{option}", tmp_path / "text.txt", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {option}: expected a text file in UTF-8, got")


def _unread(*arguments: object, **options: object) -> None:
    raise AssertionError("nothing is to be computed")


def test_weights_and_patterns_are_looked_at_first(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, name in (
        ("run_analysis", "analyze"),
        ("adapters.pruning.evaluation", "perplexity"),
    ):
        monkeypatch.setattr(f"farms_fast.{module}.{name}", _unread)
    result = run(model, *FARMS, "--n-m", "2:5", "--evaluate", text, "--out", tmp_path / "out")
    assert "n-m: groups of 5 do not divide the 32 inputs of layer 'model.layers.0" in result.stderr
    broken = small_model()
    broken.model.layers[1].mlp.up_proj.weight.data[0, 0] = math.nan
    save_checkpoint(tmp_path / "broken", broken)
    arguments = ("--sparsity", "0.5", "--evaluate", text, "--out", tmp_path / "out")
    result = run(tmp_path / "broken", *FARMS, *arguments)
    assert "weight of layer 'model.layers.1.mlp.up_proj': expected finite" in result.stderr


# --------------------------------------------------------------------------------- what is printed


def test_alphas_are_those_of_the_ratios(gpt2: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--sparsity", "0.6", "--epsilon", "0.3", *FARMS)
    result = run(gpt2, *options, "--out", out)
    assert result.exit_code == 0, result.output
    allocation = settings_of(out)["settings"]["allocation"]
    alphas = allocation["block_alphas"]
    again = allocate_sparsity(
        list(alphas.values()), 0.6, 0.3, params=1, block_size=1, level="block"
    )
    found = list(again.ratios.values())
    assert list(allocation["blocks"].values()) == pytest.approx(found, rel=1e-12)
    for line, (block, alpha) in zip(result.stdout.splitlines()[1:4], alphas.items(), strict=True):
        assert (line.split()[0], line.split()[2]) == (block, f"{alpha:.3f}")


def test_blocks_that_lose_everything_are_named(model: Path, tmp_path: Path) -> None:
    options = ("--sparsity", "0.8", "--epsilon", "0.9", *FARMS)
    result = run(model, *options, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    ratios = {x["block"]: x["ratio"] for x in settings_of(tmp_path / "out")["layers"]}
    lost = [block for block, ratio in ratios.items() if ratio == 1]
    assert lost
    assert (
        f"warning: all weights are lost of {', '.join(lost)}: take a smaller --epsilon, or "
        "--compat farms, which clips at 0.998\n"
    ) in result.stdout
    clipped = run(model, *options, "--compat", "farms", "--out", tmp_path / "clipped")
    assert clipped.exit_code == 0, clipped.output
    assert "warning" not in clipped.stdout


def test_patterns_are_alike_unless_an_allocation_is_asked_for(model: Path, tmp_path: Path) -> None:
    result = run(model, "--n-m", "2:4", "--method", "magnitude", "--out", tmp_path / "alike")
    assert result.exit_code == 0, result.output
    document = settings_of(tmp_path / "alike")
    assert {tuple(layer["n_m"]) for layer in document["layers"]} == {(2, 4)}
    assert document["settings"]["options"]["allocation"] == "uniform"
    assert "note: patterns differ" not in result.stdout

    options = ("--n-m", "2:4", "--epsilon", "0.6", *FARMS)
    result = run(model, *options, "--out", tmp_path / "mixed")
    assert result.exit_code == 0, result.output
    layers = settings_of(tmp_path / "mixed")["layers"]
    by_block = {layer["block"]: layer["n_m"][0] for layer in layers}
    for kept in set(by_block.values()):
        count = list(by_block.values()).count(kept)
        assert f"{kept}:4 in {count} block{'s' if count > 1 else ''}" in result.stdout
    assert len(set(by_block.values())) > 1
    assert "; --allocation uniform makes them alike\n" in result.stdout


@pytest.mark.parametrize(
    ("options", "noted"),
    [
        ((), False),
        (("--compat", "farms"), False),
        (("--xmin", "xmin_peak"), False),
        (("--xmin", "median"), True),
        (("--rows", "16"), True),
        (("--allocation", "alpha"), True),
    ],
)
def test_presets_are_for_what_they_were_made_for(
    model: Path, tmp_path: Path, options: tuple[str, ...], noted: bool
) -> None:
    common = ("--sparsity", "0.8", "--method", "magnitude", "--epsilon", "llama-7b")
    result = run(model, *common, *options, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    note = "note: --epsilon llama-7b is for --allocation farms with windows of 2000 and --xmin peak"
    assert (note in result.stdout) == noted


def test_zeros_that_were_there_are_told(model: Path, tmp_path: Path) -> None:
    first = run(model, *UNIFORM, "--out", tmp_path / "first")
    assert "before" not in first.stdout
    less = ("--sparsity", "0.3", *UNIFORM[2:], "--out", tmp_path / "second")
    second = run(tmp_path / "first", *less)
    assert "sparsity 0.500000 (0.500000 before), " in second.stdout


# ------------------------------------------------------------------------------------- what remains


def test_a_failed_evaluation_does_not_lose_the_model(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import farms_fast.adapters.pruning.evaluation as evaluation

    measure, calls = evaluation.perplexity, []

    def fails_later(*arguments: Any, **options: Any) -> float:
        calls.append(options)
        if len(calls) > 1:
            raise RuntimeError("the device\nwent away")
        return measure(*arguments, **options)

    monkeypatch.setattr(evaluation, "perplexity", fails_later)
    out = tmp_path / "out"
    result = run(model, *UNIFORM, "--evaluate", text, "--seqlen", "16", "--out", out)
    assert result.exit_code == 1
    assert result.stderr == "error: evaluate: after pruning, the device went away\n"
    assert re.search(r"^perplexity before [\d.]+$", result.stdout, re.MULTILINE)
    document = settings_of(out)
    assert list(document["settings"]["perplexity"]) == ["before"]
    assert "the device" in document["settings"]["failure"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "recipe.yaml").exists()
    pruned = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert float((pruned.model.layers[0].mlp.up_proj.weight == 0).float().mean()) == 0.5


def test_every_stage_gets_the_memory_that_the_model_leaves(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import farms_fast.adapters.pruning.evaluation as evaluation
    import farms_fast.adapters.pruning.modules as modules
    import farms_fast.adapters.pruning.sequential as sequential
    import farms_fast.run_analysis as analysis

    seen: dict[str, int] = {}

    def spy(module: Any, name: str) -> None:
        original = getattr(module, name)

        def call(*arguments: Any, **options: Any) -> Any:
            seen[name] = options["memory"]
            return original(*arguments, **options)

        monkeypatch.setattr(module, name, call)

    given: list[int | None] = []

    def place(model: object, device: object, memory: int | None) -> int:
        given.append(memory)
        return 5 * 10**8

    monkeypatch.setattr(modules, "place_model", place)
    for module, name in ((analysis, "analyze"), (evaluation, "perplexity")):
        spy(module, name)
    for name in ("prune_model", "owl_statistics"):
        spy(sequential, name)
    common = ("--sparsity", "0.5", "--method", "wanda", "--calibration", text, *CALIBRATION)
    more = ("--memory", "1GB", "--evaluate", text)
    for allocation, own in (("farms", WINDOWS), ("owl", ("--owl-m", "2"))):
        out = tmp_path / allocation
        result = run(model, *common, *more, "--allocation", allocation, *own, "--out", out)
        assert result.exit_code == 0, result.output
    assert given == [10**9] * 2
    names = {"analyze", "perplexity", "prune_model", "owl_statistics"}
    assert seen == dict.fromkeys(names, 5 * 10**8)
