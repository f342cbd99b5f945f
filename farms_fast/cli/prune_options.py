"""The options of `farms-fast prune`: each declared, explained and checked here alone."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import torch
import typer

from farms_fast.cli import options
from farms_fast.core.arguments import check_int, parse_memory
from farms_fast.results.analysis import Analysis
from farms_fast.spectra.power_law import xmin_rule
from farms_fast.spectra.windows import FixedAspectSampling, Sampling

if TYPE_CHECKING:
    from farms_fast.adapters.pruning.sparsities import Allocation

_ALLOCATIONS = ("farms", "alpha", "owl", "uniform")
#: The default tokens of a sample, if the model takes as many.
LONGEST = 2048


@dataclasses.dataclass(frozen=True)
class PruningOptions:
    """What the command was asked for; properties give the values that follow from it."""

    model: Annotated[
        str,
        typer.Argument(
            help="A causal language model of transformers: its folder, or its name on the hub."
        ),
    ]
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write, new or empty.")]
    sparsity: Annotated[
        float | None,
        typer.Option(
            help="Share of the blocks' weights to set to zero.", show_default="1 - N/M with --n-m"
        ),
    ] = None
    method: Annotated[str, typer.Option(help="Pruner: magnitude, wanda or sparsegpt.")] = (
        "sparsegpt"
    )
    allocation: Annotated[
        str | None,
        typer.Option(
            help="How the sparsity is shared out: farms (alphas of windows), alpha (alphas of "
            "whole matrices), owl (outliers) or uniform.",
            show_default="farms; uniform with --n-m",
        ),
    ] = None
    epsilon: Annotated[
        str,
        typer.Option(
            help="farms, alpha: how far ratios lie apart, 0 to 1; or llama-7b or llama-13b for "
            "the paper's value for that model, the method and the sparsity, which is for farms "
            "with windows of 2000 and --xmin peak."
        ),
    ] = "0.2"
    level: Annotated[
        str, typer.Option(help="farms, alpha: a ratio for each block or each layer.")
    ] = "block"
    n_m: Annotated[
        str | None,
        typer.Option(
            help="Keep N of every M consecutive inputs, such as 2:4; with an --allocation other "
            "than uniform, N of each block comes from its ratio.",
            show_default="unstructured",
        ),
    ] = None
    calibration: Annotated[
        str | None,
        typer.Option(help="wikitext2, c4, or a text file; wanda, sparsegpt and owl need it."),
    ] = None
    samples: Annotated[int, typer.Option(help="Samples of the calibration text.")] = 128
    seqlen: Annotated[
        int | None,
        typer.Option(
            help="Tokens of a sample, and of a window of --evaluate.",
            show_default=f"{LONGEST}, or all that the model takes",
        ),
    ] = None
    evaluate: Annotated[
        str | None,
        typer.Option(
            help="Print the perplexity on this text (wikitext2, c4 or a file) before and after."
        ),
    ] = None
    stride: Annotated[
        int | None,
        typer.Option(
            help="--evaluate: tokens from one window to the next.", show_default="as --seqlen"
        ),
    ] = None
    rows: options.Rows = None
    q: options.AspectRatio = None
    per_dim: options.PerDim = None
    xmin: Annotated[
        str | None,
        typer.Option(
            help="farms, alpha: rule for the start of the tail: median, ks or peak.",
            show_default="median; peak with --compat farms or an --epsilon of the paper",
        ),
    ] = None
    compat: Annotated[
        str | None,
        typer.Option(
            help="farms: do as the published code does, with its windows, its rule for the tail, "
            "and ratios that are clipped, so that the sparsity can be missed."
        ),
    ] = None
    owl_lambda: Annotated[float, typer.Option(help="owl: half the width of densities.")] = 0.08
    owl_m: Annotated[float, typer.Option(help="owl: outliers are above M times the mean.")] = 5.0
    device: options.Device = None
    dtype: options.Dtype = "float64"
    model_dtype: Annotated[
        str, typer.Option(help="Weights: auto (as stored), float32, float16 or bfloat16.")
    ] = "auto"
    memory: Annotated[
        str | None,
        typer.Option(
            help="Most device memory to use, such as 40GiB or 500MB: a model on a GPU counts, on "
            "the CPU not; --evaluate of a model that is on the GPU takes what --batch-size makes "
            "it take.",
            show_default="half of the device's",
        ),
    ] = None
    batch_size: Annotated[
        int | None,
        typer.Option(
            help="Samples at a time, of --calibration and --evaluate; half as many where memory "
            "ends.",
            show_default="about 4096 tokens",
        ),
    ] = None
    seed: Annotated[int, typer.Option(help="Of the choice of samples.")] = 0
    quiet: options.Quiet = False

    @property
    def pattern(self) -> tuple[int, int] | None:
        """N and M of --n-m."""
        return None if self.n_m is None else parse_pattern(self.n_m)

    @property
    def total(self) -> float:
        """The sparsity of all layers, given or made by N:M."""
        if self.pattern is None:
            if self.sparsity is None:
                raise ValueError("sparsity: expected --sparsity, or --n-m that makes it")
            return self.sparsity
        kept, group = self.pattern
        total = 1 - kept / group
        if self.sparsity is not None and not math.isclose(self.sparsity, total):
            raise ValueError(f"sparsity: {kept}:{group} makes it {total:g}, got {self.sparsity:g}")
        return total

    @property
    def allocation_kind(self) -> str:
        """The allocation, given or the default."""
        kind = self.allocation
        if kind is None:
            return "farms" if self.n_m is None else "uniform"
        if kind not in _ALLOCATIONS:
            raise ValueError(f"allocation: expected one of {', '.join(_ALLOCATIONS)}, got {kind!r}")
        return kind

    @property
    def uses_alphas(self) -> bool:
        """Whether the allocation goes by alphas."""
        return self.allocation_kind in ("farms", "alpha")

    @property
    def uses_preset(self) -> bool:
        """Whether epsilon is the paper's for some model."""
        from farms_fast.adapters.pruning.allocation import EPSILON_PRESETS

        return self.epsilon.lower() in EPSILON_PRESETS

    @property
    def xmin_rule(self) -> str:
        """The rule for the tail, given or the default."""
        if self.xmin is not None:
            return self.xmin
        return "peak" if self.compat or self.uses_preset else "median"

    @property
    def sampling(self) -> Sampling:
        """The windows of the alphas; whole matrices for an allocation without windows."""
        kind = self.allocation_kind
        if self.compat not in (None, "farms"):
            raise ValueError(f"compat: expected 'farms', got {self.compat!r}")
        given = options.window_options(self.rows, self.q, self.per_dim)
        if given and kind != "farms":
            raise ValueError(f"allocation: {kind} has no windows, so it cannot go with {given}")
        if self.compat and not self.uses_alphas:
            raise ValueError(f"allocation: {kind} cannot go with --compat")
        if kind != "farms":
            return options.sampling_of(None, None, None, True)
        windows = options.sampling_of(self.rows, self.q, self.per_dim, False)
        return dataclasses.replace(cast(FixedAspectSampling, windows), compat=self.compat)

    @property
    def memory_bytes(self) -> int | None:
        """The bytes of --memory."""
        return None if self.memory is None else parse_memory(self.memory)

    def check(self) -> None:
        """Raises ValueError for what is wrong without a look at the model."""
        from farms_fast.adapters.pruning.owl import outlier_ratio, owl_sparsity
        from farms_fast.adapters.pruning.pruners import pruner
        from farms_fast.adapters.pruning.sparsities import check_sparsity
        from farms_fast.adapters.pruning.tokens import check_source

        kind = self.allocation_kind
        _ = self.sampling, self.memory_bytes
        check_sparsity(self.total)
        needs_text = pruner(self.method).needs_inputs or kind == "owl"
        who = f"calibration: --method {self.method} with --allocation {kind}"
        if needs_text and self.calibration is None:
            raise ValueError(f"{who} needs --calibration wikitext2, c4 or a text file")
        if not needs_text and self.calibration is not None:
            raise ValueError(f"{who} reads no text, got {self.calibration!r}")
        options.parse_dtype(self.dtype)
        for argument, source in (("calibration", self.calibration), ("evaluate", self.evaluate)):
            if source is not None:
                check_source(source, argument)
        for argument, value, least in (
            ("samples", self.samples, 1),
            ("seed", self.seed, 0),
            ("seqlen", self.seqlen, 2),
            ("stride", self.stride, 1),
            ("batch-size", self.batch_size, 1),
        ):
            if value is not None:
                check_int(argument, value, least)
        if kind == "owl":
            owl_sparsity([1.0], self.total, self.owl_lambda)
            outlier_ratio([torch.ones(1)], self.owl_m)
        elif self.uses_alphas:
            xmin_rule(self.xmin_rule)
            self.allocate({"0.0": 1.0, "1.0": 1.0}, params=1)

    def refuse_unused(self, context: typer.Context) -> None:
        """Raises ValueError for an option that was given and that no part of the run reads."""
        kind = self.allocation_kind
        alphas = (self.uses_alphas, "--allocation farms or alpha uses")
        outliers = (kind == "owl", "--allocation owl uses")
        calibrated = (self.calibration is not None, "--calibration uses")
        evaluated = (self.evaluate is not None, "--evaluate uses")
        texts = (calibrated[0] or evaluated[0], "--calibration or --evaluate uses")
        users = {
            alphas: ("epsilon", "level", "xmin", "dtype"),
            outliers: ("owl_lambda", "owl_m"),
            calibrated: ("samples", "seed"),
            texts: ("seqlen", "batch_size"),
            evaluated: ("stride",),
        }
        for (used, who), names in users.items():
            for name in names:
                source = context.get_parameter_source(name)
                if not used and source is not None and source.name == "COMMANDLINE":
                    got = f"--allocation {kind}" if who.startswith("--alloc") else "none"
                    raise ValueError(f"{name.replace('_', '-')}: only {who} it, got {got}")

    def allocate(self, alphas: Analysis | dict[str, float], **counts: int) -> Allocation:
        """The allocation by alphas."""
        from farms_fast.adapters.pruning.allocation import (
            EPSILON_PRESETS,
            allocate_sparsity,
            epsilon_preset,
        )

        if self.uses_preset:
            epsilon = epsilon_preset(self.epsilon, self.method, self.total)
        else:
            try:
                epsilon = float(self.epsilon)
            except ValueError:
                raise ValueError(
                    f"epsilon: expected a number or one of {', '.join(EPSILON_PRESETS)}, "
                    f"got {self.epsilon!r}"
                ) from None
        level = cast(Literal["block", "layer"], self.level)
        return allocate_sparsity(alphas, self.total, epsilon, level, compat=self.compat, **counts)

    def note(self) -> str | None:
        """A note if a preset is taken for what it was not made for."""
        if not (self.uses_alphas and self.uses_preset):
            return None
        published = dataclasses.replace(
            self, allocation="farms", rows=None, q=None, per_dim=None
        ).sampling
        if self.sampling == published and xmin_rule(self.xmin_rule) == xmin_rule("peak"):
            return None
        return (
            f"note: --epsilon {self.epsilon} is for --allocation farms with windows of 2000 and "
            "--xmin peak"
        )

    def to_dict(self) -> dict[str, Any]:
        """The values that the run takes, for the folder that it writes."""
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name in ("n_m", "rows", "q", "per_dim", "quiet"):
            del given[name]
        return given | {
            "allocation": self.allocation_kind,
            "sparsity": self.total,
            "pattern": self.pattern,
            "sampling": self.sampling,
            "xmin": self.xmin_rule if self.uses_alphas else self.xmin,
            "memory": self.memory_bytes,
            "progress": not self.quiet,
        }


def parse_pattern(text: str) -> tuple[int, int]:
    """N and M of N:M.

    Example:
        >>> parse_pattern("2:4")
        (2, 4)
    """
    kept, _, group = text.partition(":")
    if not (kept.isdecimal() and group.isdecimal() and 0 < int(kept) < int(group)):
        raise ValueError(f"n-m: expected N:M with 0 < N < M, such as 2:4, got {text!r}")
    return int(kept), int(group)
