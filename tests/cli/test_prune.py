"""``farms-fast prune``: what it writes and prints, and that a failed run writes nothing."""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import SafetensorError

from farms_fast.adapters.pruning.evaluation import perplexity
from farms_fast.adapters.pruning.tokens import text_tokens
from farms_fast.spectra.windows import FixedAspectSampling, FullMatrix
from tests.support.language_models import bert_config, small_model, small_tokenizer, write_words
from tests.support.pruning_commands import CALIBRATION, WINDOWS, run, save_checkpoint, settings_of


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_words(tmp_path_factory.mktemp("texts") / "text.txt", 400)


@pytest.mark.parametrize("allocation", ["farms", "alpha", "owl", "uniform"])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_prunes_a_checkpoint(
    model: Path, text: Path, tmp_path: Path, method: str, allocation: str
) -> None:
    out = tmp_path / "out"
    own = {"farms": WINDOWS, "owl": ("--owl-m", "2")}.get(allocation, ())
    reads = method != "magnitude" or allocation == "owl"
    sampled = ("--calibration", text, *CALIBRATION) if reads else ("--seqlen", "16")
    result = run(
        *(model, "--sparsity", "0.6", "--method", method, "--allocation", allocation),
        *(*sampled, *own, "--out", out, "--evaluate", text),
    )
    assert result.exit_code == 0, result.output
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

    document = settings_of(out)
    pruned = transformers.AutoModelForCausalLM.from_pretrained(out)
    for layer in document["layers"]:
        weight = pruned.get_parameter(f"{layer['name']}.weight")
        assert int((weight == 0).sum()) == layer["zeros"] == round(layer["ratio"] * weight.numel())
    assert len(document["layers"]) == 21
    assert document["sparsity"] == pytest.approx(0.6, abs=1e-3)
    assert document["method"] == method
    assert document["settings"]["options"]["calibration"] == (str(text) if reads else None)
    assert document["settings"]["allocation"]["settings"]["allocation"] == allocation
    ratios = {layer["block"]: layer["ratio"] for layer in document["layers"]}
    assert len(set(ratios.values())) == (1 if allocation == "uniform" else 3)
    recipe = (out / "recipe.yaml").read_text()
    for layer in document["layers"]:
        assert f'"{layer["name"]}"' in recipe

    lines = result.stdout.splitlines()
    value = "outliers" if allocation == "owl" else "alpha"
    assert lines[0].split()[:3] == ["block", "weights", value]
    for line, (block, ratio) in zip(lines[1:4], ratios.items(), strict=True):
        found = line.split()
        assert found[0] == block
        assert found[3] == f"{ratio:.4f}"
        assert float(found[4]) == pytest.approx(ratio, abs=1e-3)
        assert (found[2] == "-") == (allocation == "uniform")
    before, after = (float(x) for x in re.findall(r"perplexity \w+ ([\d.]+)", result.stdout))
    tokens = text_tokens(small_tokenizer(), text)
    assert before == pytest.approx(perplexity(small_model(), tokens, seqlen=16), rel=1e-4)
    assert after == pytest.approx(perplexity(pruned, tokens, seqlen=16), rel=1e-4)
    part = {"farms": "alphas", "alpha": "alphas"}.get(allocation, allocation)
    times = rf"loading [\d.]+ s, evaluation [\d.]+ s, {part} [\d.]+ s, pruning [\d.]+ s, saving"
    assert re.search(times, lines[-1])


def test_patterns_by_block(model: Path, text: Path, tmp_path: Path) -> None:
    options = (model, "--n-m", "4:8", "--method", "wanda", "--allocation", "farms")
    out = tmp_path / "out"
    more = ("--epsilon", "0.5", *WINDOWS, "--calibration", text, *CALIBRATION)
    result = run(*options, *more, "--out", out)
    assert result.exit_code == 0, result.output
    document = settings_of(out)
    assert document["sparsity"] == pytest.approx(0.5, abs=1 / 16)
    kept = {layer["block"]: layer["n_m"] for layer in document["layers"]}
    assert len({n for n, _ in kept.values()}) > 1
    pruned = transformers.AutoModelForCausalLM.from_pretrained(out)
    for layer in document["layers"]:
        weight = pruned.get_parameter(f"{layer['name']}.weight")
        nonzero = (weight != 0).reshape(weight.shape[0], -1, 8).sum(-1)
        assert bool((nonzero == kept[layer["block"]][0]).all())


def test_patterns_by_magnitude_have_no_recipe(model: Path, tmp_path: Path) -> None:
    options = ("--method", "magnitude", "--allocation", "uniform", "--n-m", "2:4")
    result = run(model, *options, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "no recipe.yaml" in result.stdout
    assert not (tmp_path / "out" / "recipe.yaml").exists()
    assert settings_of(tmp_path / "out")["sparsity"] == 0.5


@pytest.fixture
def analysed(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Keeps the arguments of the analysis."""
    import farms_fast.run_analysis

    seen: dict[str, Any] = {}
    analyze = farms_fast.run_analysis.analyze

    def keep(model: Any, sampling: Any, xmin: str, **options: Any) -> Any:
        seen.update(options, sampling=sampling, xmin=xmin)
        return analyze(model, sampling, xmin, **options)

    monkeypatch.setattr(farms_fast.run_analysis, "analyze", keep)
    return seen


def test_options_reach_the_analysis(model: Path, tmp_path: Path, analysed: dict[str, Any]) -> None:
    options = ("--rows", "12", "--q", "1.5", "--per-dim", "2", "--xmin", "ks", "--level", "layer")
    more = ("--dtype", "float32", "--memory", "1GB", "--device", "cpu", "--epsilon", "0.1")
    out = tmp_path / "out"
    magnitude = ("--sparsity", "0.7", "--method", "magnitude", "--out", out)
    assert run(model, *magnitude, *options, *more).exit_code == 0
    assert analysed["sampling"] == FixedAspectSampling(rows=12, q=1.5, per_dim=2)
    assert (analysed["xmin"], analysed["dtype"]) == ("ks", torch.float32)
    assert (analysed["memory"], str(analysed["device"])) == (10**9, "cpu")
    document = settings_of(out)
    assert document["settings"]["allocation"]["settings"]["epsilon"] == 0.1
    assert len({layer["ratio"] for layer in document["layers"]}) > 3


@pytest.mark.parametrize(
    ("options", "sampling", "xmin"),
    [
        ((), FixedAspectSampling(), "peak"),
        (("--xmin", "median"), FixedAspectSampling(), "median"),
        (("--allocation", "alpha"), FullMatrix(), "peak"),
        (("--compat", "farms"), FixedAspectSampling(compat="farms"), "peak"),
        (("--compat", "farms", "--xmin", "median"), FixedAspectSampling(compat="farms"), "median"),
    ],
)
def test_defaults(
    model: Path,
    tmp_path: Path,
    analysed: dict[str, Any],
    options: tuple[str, ...],
    sampling: object,
    xmin: str,
) -> None:
    out = tmp_path / "out"
    common = ("--sparsity", "0.8", "--method", "magnitude", "--epsilon", "llama-7b", "--out", out)
    assert run(model, *common, *options).exit_code == 0
    assert (analysed["sampling"], analysed["xmin"]) == (sampling, xmin)
    found = settings_of(out)["settings"]
    assert found["allocation"]["settings"]["epsilon"] == 0.3
    assert found["allocation"]["settings"]["compat"] == ("farms" if "--compat" in options else None)
    assert found["seqlen"] == 64


def test_the_seed_and_the_dtype_of_the_weights(model: Path, text: Path, tmp_path: Path) -> None:
    masks = []
    for number, seed in enumerate((1, 1, 2)):
        out = tmp_path / str(number)
        options = ("--sparsity", "0.5", "--method", "wanda", "--allocation", "uniform", "--quiet")
        more = ("--seed", seed, "--model-dtype", "bfloat16", "--calibration", text)
        result = run(model, *options, *map(str, more), *CALIBRATION, "--out", out)
        assert (result.exit_code, result.stdout) == (0, "")
        pruned = transformers.AutoModelForCausalLM.from_pretrained(out)
        assert pruned.dtype == torch.bfloat16
        masks.append(torch.cat([(p == 0).flatten() for p in pruned.parameters()]))
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


# ------------------------------------------------------------------------------------- bad input


READ = ("--calibration", __file__)
OUTLYING = ("--owl-lambda", "0.9", "--owl-m", "1.5")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--sparsity", "1.2"), "sparsity: expected a number between 0 and 1, got 1.2"),
        (("--sparsity", "0"), "sparsity: expected a number between 0 and 1, got 0"),
        ((), "sparsity: expected --sparsity, or --n-m"),
        (("--n-m", "2:4", "--sparsity", "0.7"), "2:4 makes it 0.5, got 0.7"),
        (("--n-m", "4:2"), "n-m: expected N:M with 0 < N < M, such as 2:4, got '4:2'"),
        (("--sparsity", ".5", "--method", "random"), "method: expected one of magnitude, wanda"),
        (("--sparsity", ".5", "--allocation", "best"), "allocation: expected one of farms, alpha"),
        (("--sparsity", ".5", "--epsilon", "1.5"), "epsilon: expected a number from 0 to 1"),
        (("--sparsity", ".5", "--epsilon", "-1"), "epsilon: expected a number from 0 to 1"),
        (("--sparsity", ".5", "--epsilon", "x"), "a number or one of llama-7b, llama-13b, got 'x'"),
        (("--sparsity", ".6", "--epsilon", "llama-7b"), "sparsity: expected one of 0.7, 0.75"),
        (("--sparsity", ".5", "--level", "model"), "level: expected 'block' or 'layer'"),
        (("--sparsity", ".5", "--xmin", "best"), "xmin: "),
        (("--sparsity", ".5", "--compat", "owl"), "compat: expected 'farms', got 'owl'"),
        (("--sparsity", ".5", "--dtype", "float16"), "dtype: expected one of float64, float32"),
        (("--sparsity", ".5", "--model-dtype", "int8"), "model-dtype: expected auto, float32"),
        (("--sparsity", ".5", "--memory", "much"), "memory: expected a size"),
        (("--sparsity", ".5", "--device", "tpu"), "device: expected cpu, cuda"),
        (("--sparsity", ".5", "--method", "wanda"), "calibration: --method wanda with --alloc"),
        (("--sparsity", ".5", "--allocation", "owl"), "calibration: --method magnitude with"),
        (("--sparsity", ".5", "--allocation", "alpha", "--rows", "9"), "cannot go with --rows"),
        (("--sparsity", ".5", "--evaluate", "no.txt"), "evaluate: expected 'wikitext2', 'c4' or"),
        (
            ("--sparsity", ".5", "--calibration", "no.txt", "--method", "wanda"),
            "calibration: expected 'wikitext2', 'c4' or the path of a text file, got 'no.txt'",
        ),
        (("--sparsity", ".5", "--samples", "0"), "samples: expected an integer of at least 1"),
        (("--sparsity", ".5", "--seqlen", "0"), "seqlen: expected an integer of at least 2"),
        (("--sparsity", ".5", "--stride", "0"), "stride: expected an integer of at least 1"),
        (("--sparsity", ".5", "--batch-size", "0"), "batch-size: expected an integer of at"),
        (("--sparsity", ".5", "--seed", "-1"), "seed: expected an integer of at least 0, got -1"),
        (
            ("--sparsity", ".5", "--allocation", "uniform", "--epsilon", "0.2"),
            "epsilon: only --allocation farms or alpha uses it, got --allocation uniform",
        ),
        (("--sparsity", ".5", "--allocation", "alpha", "--owl-m", "5"), "owl-m: only --alloc"),
        (("--sparsity", ".5", "--stride", "8"), "stride: only --evaluate uses it, got none"),
        (
            ("--sparsity", ".5", "--allocation", "uniform", "--dtype", "float64"),
            "dtype: only --allocation farms or alpha uses it, got --allocation uniform",
        ),
        (("--sparsity", ".5", "--samples", "9"), "samples: only --calibration uses it, got none"),
        (("--sparsity", ".5", "--seed", "1"), "seed: only --calibration uses it, got none"),
        (("--sparsity", ".5", "--seqlen", "9"), "seqlen: only --calibration or --evaluate uses"),
        (("--sparsity", ".5", "--batch-size", "9"), "batch-size: only --calibration or --eval"),
        (
            ("--sparsity", ".5", "--calibration", __file__),
            "calibration: --method magnitude with --allocation farms reads no text, got '",
        ),
        (
            ("--sparsity", ".5", "--calibration", "no.txt"),
            "calibration: --method magnitude with --allocation farms reads no text, got 'no.txt'",
        ),
        (
            ("--sparsity", ".5", "--allocation", "owl", "--owl-lambda", "-1", *READ),
            "owl-lambda: expected a number of at least 0, got -1",
        ),
        (
            ("--sparsity", ".5", "--allocation", "owl", "--owl-m", "0", *READ),
            "owl-m: expected a number above 0, got 0",
        ),
        (
            ("--sparsity", ".01", "--allocation", "owl", *OUTLYING, *READ, *CALIBRATION),
            "owl-lambda: 0.9 makes the sparsity of block ",
        ),
        (("--n-m", "2:4", "--epsilon", "0.2"), "epsilon: only --allocation farms or alpha uses"),
        (("--n-m", "2:5"), "n-m: groups of 5 do not divide the 32 inputs of layer 'model.layers"),
    ],
)
def test_bad_usage_is_one_line(
    model: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    if "--method" not in options:
        options = (*options, "--method", "magnitude")
    result = run(model, *options, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
    assert message in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_text_that_is_too_short_has_counts(model: Path, tmp_path: Path) -> None:
    for words in (0, 20):
        short = write_words(tmp_path / "short.txt", words)
        options = ("--sparsity", "0.5", "--calibration", short, *CALIBRATION)
        result = run(model, *options, "--out", tmp_path / "out")
        assert result.exit_code == 2
        assert f"at least 23 tokens for 8 different samples of 16, got {words}" in result.stderr
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("where", ["model.layers.1.mlp.up_proj", "model.layers.1.input_layernorm"])
def test_a_failed_run_leaves_no_folder(text: Path, tmp_path: Path, where: str) -> None:
    broken: Any = small_model()
    broken.get_parameter(f"{where}.weight").data.flatten()[0] = math.nan
    broken.save_pretrained(tmp_path / "broken")
    small_tokenizer().save_pretrained(tmp_path / "broken")
    options = ("--sparsity", "0.5", "--calibration", text, *CALIBRATION, *WINDOWS)
    result = run(tmp_path / "broken", *options, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "model.layers.1." in result.stderr
    assert "NaN" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_never_writes_over_something(model: Path, tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    for out, message in ((tmp_path, "new or empty folder"), (tmp_path / "a", "expected a folder")):
        options = ("--sparsity", "0.5", "--method", "magnitude")
        result = run(model, *options, "--out", out)
        assert result.exit_code == 2
        assert message in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_what_cannot_be_written_is_found_before_the_model_is_read(tmp_path: Path) -> None:
    options = ("--sparsity", "0.5", "--method", "magnitude", "--allocation", "uniform")
    result = run(tmp_path / "no", *options, "--out", "/proc/out")
    assert (result.exit_code, result.stdout) == (2, "")
    assert re.fullmatch(
        r"error: \[Errno \d+\] out: cannot be written \(.+\): '/proc/out'\n", result.stderr
    )


def test_a_full_disk_is_one_line(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Known before the work, and found while the model is saved."""
    options = ("--sparsity", "0.5", "--method", "magnitude", "--allocation", "uniform", "--quiet")
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        patched.setattr("farms_fast.adapters.pruning.sequential.prune_model", None)
        result = run(model, *options, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert re.search(
        r"out: the model's weights take [\d,]+ bytes, and 1,000 are free", result.stderr
    )

    def fail(saved: object, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half of it")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", fail)
    result = run(model, *options, "--out", tmp_path / "out")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.endswith(
        "could not be written: I/O error: No space left on device (os error 28)\n"
    )
    assert len(result.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    options = ("--sparsity", "0.5", "--method", "magnitude", "--out", tmp_path / "out")
    result = run(tmp_path / "no", *options)
    assert result.exit_code == 2
    assert "model: expected a folder" in result.stderr


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    transformers.BertModel(bert_config()).save_pretrained(tmp_path / "encoder")
    small_tokenizer().save_pretrained(tmp_path / "encoder")
    options = ("--sparsity", "0.5", "--method", "magnitude", "--out", tmp_path / "out")
    result = run(tmp_path / "encoder", *options)
    assert result.exit_code == 2
    assert "error: model: expected all weights of a causal language model, got" in result.stderr
    assert "of BertLMHeadModel (6 missing)" in result.stderr
    assert not (tmp_path / "out").exists()


def test_what_is_no_model_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("")
    monkeypatch.chdir(tmp_path)
    cases = {
        "file.txt": "error: model: expected a folder, got 'file.txt', which is none",
        "empty": "error: model: 'empty' could not be loaded: ",
    }
    for name, message in cases.items():
        result = run(name, "--sparsity", "0.5", "--method", "magnitude", "--out", "out")
        assert result.exit_code == 2
        assert result.stderr.startswith(message)
        assert len(result.stderr.splitlines()) == 1
