"""`farms-fast prune`: a checkpoint in, the same with layer-wise sparsity out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from farms_fast.cli.console import EXIT_LAYERS_FAILED, echo, one_line_errors
from farms_fast.cli.options import (
    AspectRatio,
    Device,
    Dtype,
    PerDim,
    Quiet,
    Rows,
)
from farms_fast.cli.pruning_run import LONGEST, PruningRun, parse_pattern, sampling_for
from farms_fast.core.arguments import parse_memory
from farms_fast.core.text import printable

__all__ = ["prune"]


def prune(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            help="A causal language model of transformers: its folder, or its name on the hub.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="The folder to write, new or empty.", show_default=False),
    ],
    sparsity: Annotated[
        float | None,
        typer.Option(
            help="Share of the blocks' weights to set to zero.",
            show_default="1 - N/M with --n-m",
        ),
    ] = None,
    method: Annotated[
        str, typer.Option(help="Pruner: magnitude, wanda or sparsegpt.")
    ] = "sparsegpt",
    allocation: Annotated[
        str | None,
        typer.Option(
            help="How the sparsity is shared out: farms (alphas of windows), alpha (alphas of "
            "whole matrices), owl (outliers) or uniform.",
            show_default="farms; uniform with --n-m",
        ),
    ] = None,
    epsilon: Annotated[
        str,
        typer.Option(
            help="farms, alpha: how far ratios lie apart, 0 to 1; or llama-7b or llama-13b for "
            "the paper's value for that model, the method and the sparsity, which is for farms "
            "with windows of 2000 and --xmin peak."
        ),
    ] = "0.2",
    level: Annotated[
        str, typer.Option(help="farms, alpha: a ratio for each block or each layer.")
    ] = "block",
    n_m: Annotated[
        str | None,
        typer.Option(
            help="Keep N of every M consecutive inputs, such as 2:4; with an --allocation other "
            "than uniform, N of each block comes from its ratio.",
            show_default="unstructured",
        ),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="wikitext2, c4, or a text file; wanda, sparsegpt and owl need it.",
            show_default=False,
        ),
    ] = None,
    samples: Annotated[int, typer.Option(help="Samples of the calibration text.")] = 128,
    seqlen: Annotated[
        int | None,
        typer.Option(
            help="Tokens of a sample, and of a window of --evaluate.",
            show_default=f"{LONGEST}, or all that the model takes",
        ),
    ] = None,
    evaluate: Annotated[
        str | None,
        typer.Option(
            help="Print the perplexity on this text (wikitext2, c4 or a file) before and after.",
            show_default=False,
        ),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            help="--evaluate: tokens from one window to the next.", show_default="as --seqlen"
        ),
    ] = None,
    rows: Rows = None,
    q: AspectRatio = None,
    per_dim: PerDim = None,
    xmin: Annotated[
        str | None,
        typer.Option(
            help="farms, alpha: rule for the start of the tail: median, ks or peak.",
            show_default="median; peak with --compat farms or an --epsilon of the paper",
        ),
    ] = None,
    compat: Annotated[
        str | None,
        typer.Option(
            help="farms: do as the published code does, with its windows, its rule for the tail, "
            "and ratios that are clipped, so that the sparsity can be missed.",
            show_default=False,
        ),
    ] = None,
    owl_lambda: Annotated[float, typer.Option(help="owl: half the width of densities.")] = 0.08,
    owl_m: Annotated[float, typer.Option(help="owl: outliers are above M times the mean.")] = 5.0,
    device: Device = None,
    dtype: Dtype = "float64",
    model_dtype: Annotated[
        str, typer.Option(help="Weights: auto (as stored), float32, float16 or bfloat16.")
    ] = "auto",
    memory: Annotated[
        str | None,
        typer.Option(
            help="Most device memory to use, such as 40GiB or 500MB: a model on a GPU counts, on "
            "the CPU not; --evaluate of a model that is on the GPU takes what --batch-size makes "
            "it take.",
            show_default="half of the device's",
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            help="Samples at a time, of --calibration and --evaluate; half as many where memory "
            "ends.",
            show_default="about 4096 tokens",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the choice of samples.")] = 0,
    quiet: Quiet = False,
) -> None:
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
    with one_line_errors():
        from farms_fast.adapters.pruning.saving import check_output

        check_output(out)
        if allocation is None:
            allocation = "farms" if n_m is None else "uniform"
        run = PruningRun(
            model=model,
            out=out,
            method=method,
            allocation=allocation,
            epsilon=epsilon,
            level=level,
            pattern=None if n_m is None else parse_pattern(n_m),
            sparsity=sparsity,
            calibration=calibration,
            samples=samples,
            seqlen=seqlen,
            evaluate=evaluate,
            stride=stride,
            sampling=sampling_for(allocation, rows, q, per_dim, compat),
            xmin=xmin,
            compat=compat,
            owl_lambda=owl_lambda,
            owl_m=owl_m,
            device=device,
            dtype=dtype,
            model_dtype=model_dtype,
            memory=None if memory is None else parse_memory(memory),
            batch_size=batch_size,
            seed=seed,
            progress=not quiet,
        )
        _refuse_unused(context, run)
        lines = run.run()
        if not quiet:
            for line in lines:
                echo(line)
        if run.failure is not None:
            typer.echo(f"error: {printable(' '.join(run.failure.split()))}", err=True)
            raise typer.Exit(EXIT_LAYERS_FAILED)


def _refuse_unused(context: typer.Context, run: PruningRun) -> None:
    """Nothing that was asked for is left out in silence."""
    alphas = (run.allocation in ("farms", "alpha"), "--allocation farms or alpha uses")
    outliers = (run.allocation == "owl", "--allocation owl uses")
    calibrated = (run.calibration is not None, "--calibration uses")
    texts = (calibrated[0] or run.evaluate is not None, "--calibration or --evaluate uses")
    uses = {
        "epsilon": alphas,
        "level": alphas,
        "xmin": alphas,
        "dtype": alphas,
        "owl_lambda": outliers,
        "owl_m": outliers,
        "samples": calibrated,
        "seed": calibrated,
        "seqlen": texts,
        "batch_size": texts,
        "stride": (run.evaluate is not None, "--evaluate uses"),
    }
    for name, (used, who) in uses.items():
        given = context.get_parameter_source(name)
        if not used and given is not None and given.name == "COMMANDLINE":
            got = f"--allocation {run.allocation}" if who.startswith("--alloc") else "none"
            raise ValueError(f"{name.replace('_', '-')}: only {who} it, got {got}")
