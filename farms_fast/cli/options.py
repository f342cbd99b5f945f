"""Options that several commands take, and the parsing of their texts."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import torch
import typer

from farms_fast.spectra.windows import FixedAspectSampling, FullMatrix

Command = TypeVar("Command", bound=Callable[..., None])

CheckpointPath = Annotated[
    Path,
    typer.Argument(
        help="A checkpoint: a folder, a file of weights, or a name on the Hub such as org/model."
    ),
]
Base = Annotated[
    Path | None,
    typer.Option(
        help="The model that a LoRA adapter changes, where PATH is the adapter's folder.",
        show_default="what its config names",
    ),
]
Download = Annotated[
    bool,
    typer.Option("--download", help="Fetch a model by its name on the Hub into the local cache."),
]
Key = Annotated[
    str | None,
    typer.Option(
        help="Dotted path of the mapping that holds the weights, where a checkpoint has several.",
        show_default="the only one",
    ),
]
Rows = Annotated[int | None, typer.Option(help="Rows of a window.", show_default="2000")]
AspectRatio = Annotated[
    float | None, typer.Option(help="Aspect ratio of a window, columns / rows.", show_default="1")
]
PerDim = Annotated[
    int | None, typer.Option(help="Windows along each dimension, at least.", show_default="15")
]
Full = Annotated[
    bool, typer.Option("--full", help="Take whole matrices instead of windows (biased by shape).")
]
Xmin = Annotated[str, typer.Option(help="Rule for the start of the tail: median, ks or peak.")]
Bootstrap = Annotated[
    int,
    typer.Option(help="Resamplings for the standard error of alpha, at most 100,000; 0 for none."),
]
Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda or cuda:N.", show_default="cuda if there is one, else cpu"),
]
Dtype = Annotated[str, typer.Option(help="Arithmetic: float64, or float32 (less accurate).")]
Solver = Annotated[
    str | None, typer.Option(help="Eigensolver by name.", show_default="by window size")
]
Memory = Annotated[
    str | None,
    typer.Option(
        help="Most device memory to use, such as 40GiB or 500MB; without a unit, bytes.",
        show_default="half of the device's",
    ),
]
MetricsCsv = Annotated[
    Path | None, typer.Option(help="Write the metrics of every layer to this CSV file.")
]
AnalysisJson = Annotated[
    Path | None, typer.Option(help="Write layers, settings and skipped tensors to this JSON file.")
]
Include = Annotated[
    list[str] | None,
    typer.Option(
        help="Only layers whose whole name matches this glob, such as '*mlp*'; may be repeated."
    ),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(help="Not the layers whose whole name matches this glob; may be repeated."),
]
Layout = Annotated[
    str,
    typer.Option(
        help="How kernels of convolutions are stored: torch (out, in, ...), channels_last (..., "
        "in, out) as in Keras and Flax, or auto: as name and shape tell, else skipped."
    ),
]
ShowSkipped = Annotated[
    bool, typer.Option("--show-skipped", help="List the skipped tensors by name.")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bar and no table, only errors.")]


def takes_options(declared: type) -> Callable[[Command], Command]:
    """Gives a command the fields of a dataclass as its parameters, after the `context`.

    A field `name: Annotated[type, typer.Option(...)] = default` becomes that option.
    """
    hints = get_type_hints(declared, include_extras=True)
    kind = inspect.Parameter.KEYWORD_ONLY
    parameters = [inspect.Parameter("context", kind, annotation=typer.Context)]
    for field in dataclasses.fields(declared):
        required = field.default is dataclasses.MISSING
        default = inspect.Parameter.empty if required else field.default
        parameters.append(
            inspect.Parameter(field.name, kind, default=default, annotation=hints[field.name])
        )

    def decorate(command: Command) -> Command:
        vars(command)["__signature__"] = inspect.Signature(parameters)
        return command

    return decorate


def sampling_of(
    rows: int | None, q: float | None, per_dim: int | None, full: bool
) -> FixedAspectSampling | FullMatrix:
    """The sampling of these options; None is a default, and `full` excludes the others."""
    if full:
        if clashing := window_options(rows, q, per_dim):
            raise ValueError(f"full: takes whole matrices, so it cannot go with {clashing}")
        return FullMatrix()
    given: dict[str, Any] = {"rows": rows, "q": q, "per_dim": per_dim}
    return FixedAspectSampling(**{name: x for name, x in given.items() if x is not None})


def window_options(rows: int | None, q: float | None, per_dim: int | None) -> str:
    """The window options that were given, as text; empty for none."""
    given = {"--rows": rows, "--q": q, "--per-dim": per_dim}
    return ", ".join(option for option, value in given.items() if value is not None)


def parse_dtype(text: str) -> torch.dtype:
    """The precision of that name."""
    known = {"float64": torch.float64, "float32": torch.float32}
    if text not in known:
        raise ValueError(f"dtype: expected one of {', '.join(known)}, got {text!r}")
    return known[text]
