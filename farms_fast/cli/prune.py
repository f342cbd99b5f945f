"""`farms-fast prune`: a checkpoint in, the same with layer-wise sparsity out."""

from __future__ import annotations

import math
import re
import sys
import time
from typing import TYPE_CHECKING, Any

import torch
import typer
from torch import nn

from farms_fast import run_analysis
from farms_fast.cli.console import EXIT_LAYERS_FAILED, cli_errors, echo
from farms_fast.cli.options import parse_dtype, takes_options
from farms_fast.cli.prune_options import LONGEST, PruningOptions
from farms_fast.cli.prune_report import report_lines
from farms_fast.core.arguments import default_device, resolve_device
from farms_fast.core.optional import optional_import
from farms_fast.core.progress import is_terminal
from farms_fast.core.regular_files import expand_user
from farms_fast.core.text import printable

if TYPE_CHECKING:
    from farms_fast.adapters.pruning.blocks import Blocks
    from farms_fast.adapters.pruning.sparsities import Allocation


@takes_options(PruningOptions)
def prune(context: typer.Context, **given: Any) -> None:
    """Prune the linear layers of a language model, with a ratio for every block or layer.

    Ratios come from the layers' alphas, and layers with a large alpha lose more. The folder that is
    written loads with from_pretrained; farms_fast_pruning.json in it has ratios and settings, and
    recipe.yaml the ratios for llm-compressor. It appears whole or not at all.

    The table has for each block: the alpha (or OWL's percentage of outliers) that its ratio comes
    from, the ratio that was asked for, and the sparsity that was reached. Where the model does not
    fit on the device, its blocks go there one at a time.

    Exit codes: 0 written, 1 written but the perplexity afterwards could not be measured, 2 bad
    usage or bad input, 130 interrupted.
    """
    with cli_errors(lam="owl-lambda", threshold="owl-m", text="evaluate"):
        from farms_fast.adapters.pruning.saving import check_output

        options = PruningOptions(**given)
        check_output(options.out)
        options.check()
        options.refuse_unused(context)
        lines, failure = _run(options)
        if not options.quiet:
            for line in lines:
                echo(line)
        if failure is not None:
            typer.echo(f"error: {printable(' '.join(failure.split()))}", err=True)
            raise typer.Exit(EXIT_LAYERS_FAILED)


def _run(options: PruningOptions) -> tuple[list[str], str | None]:
    """Prunes and saves; the lines to print, and why the last evaluation failed, if it did."""
    from farms_fast.adapters.pruning.blocks import find_blocks
    from farms_fast.adapters.pruning.evaluation import check_causal, perplexity
    from farms_fast.adapters.pruning.modules import place_model
    from farms_fast.adapters.pruning.recipe import to_recipe
    from farms_fast.adapters.pruning.saving import check_space, save_pruned
    from farms_fast.adapters.pruning.sequential import prune_model
    from farms_fast.adapters.pruning.tokens import calibration_tokens, longest_sequence, text_tokens

    times = _StageTimes()
    device = resolve_device(options.device, default_device())
    model, tokenizer, unknown = _load(options.model, options.model_dtype, not options.quiet)
    check_space(options.out, model)
    blocks = find_blocks(model)
    _check_layers(blocks, options.pattern)
    seqlen = options.seqlen or min(LONGEST, longest_sequence(model) or LONGEST)
    tokens = text = None
    if options.calibration is not None:
        tokens = calibration_tokens(
            tokenizer,
            options.calibration,
            samples=options.samples,
            seqlen=seqlen,
            seed=options.seed,
        )
    if options.evaluate is not None:
        text = text_tokens(tokenizer, options.evaluate)
    memory = place_model(model, device, options.memory_bytes)
    times.end_stage("loading")

    perplexities: dict[str, float] = {}

    def measure(when: str) -> None:
        if text is not None:
            perplexities[when] = perplexity(
                model,
                text,
                seqlen=seqlen,
                stride=options.stride,
                batch_size=options.batch_size,
                device=device,
                memory=memory,
            )
            times.end_stage("evaluation")

    # The saved model is a causal one, even if the checkpoint was not.
    if text is None:
        check_causal(model, device=device, memory=memory)
    measure("before")
    allocated = _allocate(options, model, blocks, tokens, device, memory)
    times.end_stage("alphas" if options.uses_alphas else options.allocation_kind)
    patterns = None if options.pattern is None else allocated.n_m(options.pattern[1])
    recipe = None
    if patterns is None or options.method != "magnitude":
        recipe = to_recipe(options.method, allocated, n_m=patterns)
    report = prune_model(
        model,
        options.method,
        allocated.ratios,
        tokens,
        n_m=patterns,
        device=device,
        memory=memory,
        batch_size=options.batch_size,
        progress=not options.quiet,
    )
    times.end_stage("pruning")
    failure = None
    try:
        measure("after")
    except Exception as error:  # of any type: the pruned model must not be lost
        failure = f"evaluate: after pruning, {error}"
    model.to("cpu")
    settings = {
        "model": options.model,
        "sparsity": options.total,
        "seqlen": seqlen,
        "torch": str(torch.__version__),
        "options": options.to_dict(),
        "allocation": allocated.to_dict(),
        "perplexity": perplexities,
        "failure": failure,
        "tensors_without_place": unknown,
    }
    save_pruned(model, options.out, report, tokenizer=tokenizer, settings=settings, recipe=recipe)
    times.end_stage("saving")
    lines = [*report_lines(report, allocated, perplexities, unknown), str(times)]
    if note := options.note():
        lines.insert(0, note)
    if recipe is None:
        lines.append("no recipe.yaml: llm-compressor has no N:M by magnitude")
    return lines, failure


def _load(name: str, dtype: str, progress: bool) -> tuple[Any, Any, tuple[str, ...]]:
    """A model of transformers, on the CPU, its tokenizer, and the tensors it has no place for."""
    if dtype not in ("auto", "float32", "float16", "bfloat16"):
        raise ValueError(f"model-dtype: expected auto, float32, float16 or bfloat16, got {dtype!r}")
    with optional_import("transformers", extra="pruning", needed_for="prune"):
        import transformers
    logs = transformers.utils.logging
    if not progress or not is_terminal(sys.stderr):
        logs.disable_progress_bar()
    # transformers would take a missing path for a name on the hub.
    folder = expand_user(name)
    if name.startswith((".", "/", "~")) or folder.exists():
        if not folder.is_dir():
            raise FileNotFoundError(f"model: expected a folder, got {name!r}, which is none")
        name = str(folder)
    # What it logs has names of tensors in it, as they are; and it would ask whether to run code.
    verbosity = logs.get_verbosity()
    logs.set_verbosity(logs.CRITICAL)
    try:
        model, loaded = transformers.AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, output_loading_info=True, trust_remote_code=False
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # of many types: pickle's, safetensors', torch's
        raise ValueError(f"model: {name!r} could not be loaded: {_reason(error)}") from error
    finally:
        logs.set_verbosity(verbosity)
    missing = sorted(loaded["missing_keys"])
    if missing:  # transformers initialises them at random
        raise ValueError(
            f"model: expected all weights of a causal language model, got {name!r}, which has "
            f"nothing for {missing[0]!r} of {type(model).__name__} ({len(missing)} missing)"
        )
    return model, tokenizer, tuple(sorted(loaded["unexpected_keys"]))


def _reason(error: Exception) -> str:
    """Why a model could not be loaded, without the advice to let its code run."""
    text = str(error)
    if refused := re.search(r"GLOBAL ([\w.]+)", text):
        return f"its pickle holds {refused[1]}, and what is no plain tensor is not loaded"
    if "weights_only" in text:
        return "its pickle is damaged, or holds more than plain tensors"
    if "trust_remote_code" in text:
        return "it needs code that comes with it, and none of that is run"
    return text or type(error).__name__


def _check_layers(blocks: Blocks, pattern: tuple[int, int] | None) -> None:
    """Raises ValueError for NaN or infinity in a layer, or groups that do not divide its inputs."""
    from farms_fast.adapters.pruning.masks import check_weight

    for layer in blocks.layers:
        check_weight(layer.matrix, layer.name)
        if pattern is not None and layer.shape[1] % pattern[1]:
            raise ValueError(
                f"n-m: groups of {pattern[1]} do not divide the {layer.shape[1]} inputs of layer "
                f"{layer.name!r}"
            )


def _allocate(
    options: PruningOptions,
    model: nn.Module,
    blocks: Blocks,
    tokens: torch.Tensor | None,
    device: torch.device,
    memory: int,
) -> Allocation:
    """The ratio of every layer."""
    from farms_fast.adapters.pruning.allocation import uniform_sparsity
    from farms_fast.adapters.pruning.owl import owl_sparsity
    from farms_fast.adapters.pruning.sequential import owl_statistics

    by_block = {
        block.name: {layer.name: math.prod(layer.shape) for layer in block.layers}
        for block in blocks.blocks
    }
    weights = {name: count for counts in by_block.values() for name, count in counts.items()}
    if options.allocation_kind == "uniform":
        return uniform_sparsity(weights, options.total)
    if options.allocation_kind == "owl":
        assert tokens is not None
        outliers = owl_statistics(
            model,
            tokens,
            threshold=options.owl_m,
            device=device,
            memory=memory,
            batch_size=options.batch_size,
            progress=not options.quiet,
        )
        return owl_sparsity(outliers, options.total, options.owl_lambda, layers=by_block)
    analysis = run_analysis.analyze(
        model,
        options.sampling,
        options.xmin_rule,
        bootstrap=0,
        device=device,
        dtype=parse_dtype(options.dtype),
        memory=memory,
        include=[f"{block}.*" for block in by_block],
        progress=not options.quiet,
    )
    return options.allocate(analysis).for_modules(weights)


class _StageTimes:
    """Seconds by stage."""

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self._seconds: dict[str, float] = {}

    def end_stage(self, name: str) -> None:
        now = time.perf_counter()
        self._seconds[name] = self._seconds.get(name, 0.0) + now - self._last
        self._last = now

    def __str__(self) -> str:
        return ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self._seconds.items())
