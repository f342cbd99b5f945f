"""One run of `farms-fast prune`: from its options to a saved model and a table."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from farms_fast.cli.options import parse_dtype, sampling_of, window_options
from farms_fast.cli.prune_checkpoint import check_layers, load_checkpoint
from farms_fast.cli.prune_table import lines_of

if TYPE_CHECKING:
    import torch
    from torch import nn

    from farms_fast.adapters.pruning.blocks import Blocks
    from farms_fast.adapters.pruning.sparsities import Allocation
    from farms_fast.results.analysis import Analysis
    from farms_fast.spectra.windows import FixedAspectSampling, Sampling

__all__ = ["LONGEST", "PruningRun", "parse_pattern", "sampling_for"]

_ALLOCATIONS = ("farms", "alpha", "owl", "uniform")
#: Tokens of a sample, where the model takes as many.
LONGEST = 2048


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


def sampling_for(
    allocation: str, rows: int | None, q: float | None, per_dim: int | None, compat: str | None
) -> Sampling:
    """The windows that alphas are made of; settings of windows need an allocation that has some."""
    if allocation not in _ALLOCATIONS:
        raise ValueError(
            f"allocation: expected one of {', '.join(_ALLOCATIONS)}, got {allocation!r}"
        )
    if compat not in (None, "farms"):
        raise ValueError(f"compat: expected 'farms', got {compat!r}")
    clashing = window_options(rows, q, per_dim)
    if clashing and allocation != "farms":
        raise ValueError(
            f"allocation: {allocation} has no windows, so it cannot go with {clashing}"
        )
    if compat and allocation in ("owl", "uniform"):
        raise ValueError(f"allocation: {allocation} cannot go with --compat")
    if allocation != "farms":
        return sampling_of(None, None, None, True)
    windows = cast("FixedAspectSampling", sampling_of(rows, q, per_dim, False))
    return dataclasses.replace(windows, compat=compat)


@dataclasses.dataclass
class PruningRun:
    """The options of one run, checked as far as they can be without the model."""

    model: str
    out: Path
    method: str
    allocation: str
    epsilon: str
    level: str
    pattern: tuple[int, int] | None
    sparsity: float | None
    calibration: str | None
    samples: int
    seqlen: int | None
    evaluate: str | None
    stride: int | None
    sampling: Sampling
    xmin: str | None
    compat: str | None
    owl_lambda: float
    owl_m: float
    device: str | None
    dtype: str
    model_dtype: str
    memory: int | None
    batch_size: int | None
    seed: int
    progress: bool
    #: Why the perplexity after pruning could not be measured, if so.
    failure: str | None = dataclasses.field(default=None, init=False)

    def __post_init__(self) -> None:
        import torch

        from farms_fast.adapters.pruning.owl import outlier_ratio, owl_sparsity
        from farms_fast.adapters.pruning.pruners import pruner
        from farms_fast.adapters.pruning.sparsities import check_sparsity
        from farms_fast.adapters.pruning.tokens import check_source
        from farms_fast.core.arguments import check_int
        from farms_fast.spectra.power_law import xmin_rule

        if self.pattern is not None:
            total = 1 - self.pattern[0] / self.pattern[1]
            if self.sparsity is not None and not math.isclose(self.sparsity, total):
                raise ValueError(
                    f"sparsity: {self.pattern[0]}:{self.pattern[1]} makes it {total:g}, "
                    f"got {self.sparsity:g}"
                )
            self.sparsity = total
        if self.sparsity is None:
            raise ValueError("sparsity: expected --sparsity, or --n-m that makes it")
        check_sparsity(self.sparsity)
        needs_text = pruner(self.method).needs_inputs or self.allocation == "owl"
        if needs_text and self.calibration is None:
            raise ValueError(
                f"calibration: --method {self.method} with --allocation {self.allocation} needs "
                "--calibration wikitext2, c4 or a text file"
            )
        if not needs_text and self.calibration is not None:
            raise ValueError(
                f"calibration: --method {self.method} with --allocation {self.allocation} reads no "
                f"text, got {self.calibration!r}"
            )
        parse_dtype(self.dtype)
        for argument, source in (("calibration", self.calibration), ("evaluate", self.evaluate)):
            if source is not None:
                check_source(source, argument)
        check_int("samples", self.samples, least=1)
        check_int("seed", self.seed)
        counts = {"seqlen": (self.seqlen, 2), "stride": (self.stride, 1)}
        for argument, (value, least) in (counts | {"batch-size": (self.batch_size, 1)}).items():
            if value is not None:
                check_int(argument, value, least)
        if self.allocation == "owl":
            with _by_option():
                owl_sparsity([1.0], self.sparsity, self.owl_lambda)
                outlier_ratio([torch.ones(1)], self.owl_m)
        elif self.allocation != "uniform":
            if self.xmin is None:
                self.xmin = "peak" if self.compat or self._preset else "median"
            xmin_rule(self.xmin)
            self._shared_out({"0.0": 1.0, "1.0": 1.0}, params=1)

    def _shared_out(self, alphas: Analysis | dict[str, float], **counts: int) -> Allocation:
        from farms_fast.adapters.pruning.allocation import allocate_sparsity

        assert self.sparsity is not None
        level = cast(Literal["block", "layer"], self.level)
        return allocate_sparsity(
            alphas, self.sparsity, self._epsilon(), level, compat=self.compat, **counts
        )

    def _epsilon(self) -> float:
        from farms_fast.adapters.pruning.allocation import EPSILON_PRESETS, epsilon_preset

        assert self.sparsity is not None
        if self._preset:
            return epsilon_preset(self.epsilon, self.method, self.sparsity)
        try:
            return float(self.epsilon)
        except ValueError:
            raise ValueError(
                f"epsilon: expected a number or one of {', '.join(EPSILON_PRESETS)}, "
                f"got {self.epsilon!r}"
            ) from None

    @property
    def _preset(self) -> bool:
        """Whether epsilon is the paper's for some model."""
        from farms_fast.adapters.pruning.allocation import EPSILON_PRESETS

        return self.epsilon.lower() in EPSILON_PRESETS

    def _notes(self) -> Iterator[str]:
        """Where a preset is taken for what it was not made for."""
        from farms_fast.spectra.power_law import xmin_rule

        if self.xmin is None or not self._preset:
            return
        published = sampling_for("farms", None, None, None, self.compat)
        if self.sampling != published or xmin_rule(self.xmin) != xmin_rule("peak"):
            yield (
                f"note: --epsilon {self.epsilon} is for --allocation farms with windows of 2000 "
                "and --xmin peak"
            )

    def run(self) -> list[str]:
        """Does all of it, and gives the lines to print."""
        import torch

        from farms_fast.adapters.pruning.blocks import find_blocks
        from farms_fast.adapters.pruning.evaluation import check_causal, perplexity
        from farms_fast.adapters.pruning.modules import place_model
        from farms_fast.adapters.pruning.recipe import to_recipe
        from farms_fast.adapters.pruning.saving import save_pruned
        from farms_fast.adapters.pruning.sequential import prune_model
        from farms_fast.adapters.pruning.tokens import (
            calibration_tokens,
            longest_sequence,
            text_tokens,
        )
        from farms_fast.core.arguments import default_device, resolve_device

        clock = _Clock()
        where = resolve_device(self.device, default_device())
        checkpoint = load_checkpoint(self.model, self.model_dtype, self.progress)
        model, tokenizer = checkpoint.model, checkpoint.tokenizer
        blocks = find_blocks(model)
        check_layers(blocks, self.pattern)
        seqlen = self.seqlen or min(LONGEST, longest_sequence(model) or LONGEST)
        tokens = text = None
        if self.calibration is not None:
            tokens = calibration_tokens(
                tokenizer, self.calibration, samples=self.samples, seqlen=seqlen, seed=self.seed
            )
        if self.evaluate is not None:
            with _by_option():
                text = text_tokens(tokenizer, self.evaluate)
        room = place_model(model, where, self.memory)
        clock.lap("loading")

        perplexities: dict[str, float] = {}

        def measure(when: str) -> None:
            if text is not None:
                perplexities[when] = perplexity(
                    model,
                    text,
                    seqlen=seqlen,
                    stride=self.stride,
                    batch_size=self.batch_size,
                    device=where,
                    memory=room,
                )
                clock.lap("evaluation")

        # What is saved is a causal language model, whatever it was read from.
        if text is None:
            check_causal(model, device=where, memory=room)
        measure("before")
        allocated = self._allocate(model, blocks, tokens, where, room)
        clock.lap("alphas" if self.allocation in ("farms", "alpha") else self.allocation)
        patterns = None
        if self.pattern is not None:
            patterns = allocated.n_m(self.pattern[1])
        recipe = None
        # llm-compressor has no N:M by magnitude.
        if patterns is None or self.method != "magnitude":
            recipe = to_recipe(self.method, allocated, n_m=patterns)
        report = prune_model(
            model,
            self.method,
            allocated.ratios,
            tokens,
            n_m=patterns,
            device=where,
            memory=room,
            batch_size=self.batch_size,
            progress=self.progress,
        )
        clock.lap("pruning")
        try:
            measure("after")
        except Exception as error:  # whatever it is: what was pruned is worth more
            self.failure = f"evaluate: after pruning, {error}"
        model.to("cpu")
        settings = {
            "model": self.model,
            "sparsity": self.sparsity,
            "seqlen": seqlen,
            "torch": str(torch.__version__),
            "options": {
                option.name: getattr(self, option.name)
                for option in dataclasses.fields(self)
                if option.init
            },
            "allocation": allocated.to_dict(),
            "perplexity": perplexities,
            "failure": self.failure,
            "tensors_without_place": checkpoint.unknown,
        }
        save_pruned(model, self.out, report, tokenizer=tokenizer, settings=settings, recipe=recipe)
        clock.lap("saving")
        lines = [*self._notes(), *lines_of(report, allocated, perplexities, checkpoint.unknown)]
        lines.append(clock.line())
        if recipe is None:
            lines.append("no recipe.yaml: llm-compressor has no N:M by magnitude")
        return lines

    def _allocate(
        self,
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
        from farms_fast.run_analysis import analyze

        assert self.sparsity is not None
        inside = {
            block.name: {layer.name: math.prod(layer.shape) for layer in block.layers}
            for block in blocks.blocks
        }
        weights = {name: count for counts in inside.values() for name, count in counts.items()}
        if self.allocation == "uniform":
            return uniform_sparsity(weights, self.sparsity)
        if self.allocation == "owl":
            assert tokens is not None
            outliers = owl_statistics(
                model,
                tokens,
                threshold=self.owl_m,
                device=device,
                memory=memory,
                batch_size=self.batch_size,
                progress=self.progress,
            )
            with _by_option():
                return owl_sparsity(outliers, self.sparsity, self.owl_lambda, layers=inside)
        assert self.xmin is not None
        analysis = analyze(
            model,
            self.sampling,
            self.xmin,
            bootstrap=0,
            device=device,
            dtype=parse_dtype(self.dtype),
            memory=memory,
            include=[f"{block}.*" for block in inside],
            progress=self.progress,
        )
        return self._shared_out(analysis).for_modules(weights)


@contextlib.contextmanager
def _by_option() -> Iterator[None]:
    """Names in an error the option in the place of the library's argument."""
    options = {"lam": "owl-lambda", "threshold": "owl-m", "text": "evaluate"}
    try:
        yield
    except ValueError as error:
        argument, colon, rest = str(error).partition(":")
        raise ValueError(f"{options.get(argument, argument)}{colon}{rest}") from error


class _Clock:
    """Seconds by what they went into."""

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self._seconds: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """Counts the time since the last lap for this."""
        now = time.perf_counter()
        self._seconds[name] = self._seconds.get(name, 0.0) + now - self._last
        self._last = now

    def line(self) -> str:
        """All of them."""
        return ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self._seconds.items())
