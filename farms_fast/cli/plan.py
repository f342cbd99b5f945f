"""`farms-fast plan`: what an analysis would take, from the headers of a checkpoint."""

from __future__ import annotations

import json as json_format
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from farms_fast.cli import options
from farms_fast.cli.console import check_outputs, cli_errors, echo
from farms_fast.cli.tables import all_skipped, counted, skipped_lines, text_table
from farms_fast.core.arguments import (
    MOST_RESAMPLES,
    check_int,
    check_solver,
    default_device,
    parse_memory,
)
from farms_fast.core.files import write_text
from farms_fast.engine.cost import Cost, measured_on, total
from farms_fast.engine.machine import Machine, machine_of
from farms_fast.engine.plan import Batch, Plan
from farms_fast.engine.plan import plan as plan_layers
from farms_fast.weights.sources import open_source
from farms_fast.weights.stacks import Skipped


def plan(
    path: options.CheckpointPath,
    rows: options.Rows = None,
    q: options.AspectRatio = None,
    per_dim: options.PerDim = None,
    full: options.Full = False,
    xmin: options.Xmin = "median",
    bootstrap: options.Bootstrap = 100,
    device: Annotated[
        str | None,
        typer.Option(
            help="cpu, cuda or cuda:N; without such a GPU, cuda stands for an H200.",
            show_default="cuda if there is one, else cpu",
        ),
    ] = None,
    dtype: options.Dtype = "float64",
    solver: options.Solver = None,
    memory: options.Memory = None,
    base: options.Base = None,
    download: options.Download = False,
    key: options.Key = None,
    include: options.Include = None,
    exclude: options.Exclude = None,
    layout: options.Layout = "auto",
    json: Annotated[
        Path | None, typer.Option(help="Write batches and layers with their costs to this file.")
    ] = None,
    show_skipped: options.ShowSkipped = False,
) -> None:
    """Print what an analysis would take, without reading the weights.

    Windows of one order are solved together, whatever layers they come from; the table has a line
    for each order and dtype: layers, batches that the memory makes of them, windows, gigabytes
    (10^9 bytes) of weights, operations, predicted time, and the most device memory at any time.
    Times are predicted from measurements of an NVIDIA H200 or of an AMD EPYC's cores, fits and
    copies included, reading from disk not; they are those of the solvers that are chosen by window
    size, also where --solver names another.

    Exit codes: 0 the plan is there, 2 bad usage or bad input.
    """
    with cli_errors(model="path"):
        sampling = options.sampling_of(rows, q, per_dim, full)
        check_outputs(path, base, json=json)
        machine = _machine(device)
        _check_solver(solver, machine)
        source = open_source(path, base=base, key=key, download=download)
        layers, skipped = source.layers(include or None, exclude or None, layout=layout)
        planned = plan_layers(
            layers,
            sampling,
            None if memory is None else parse_memory(memory),
            xmin=xmin,
            bootstrap=check_int("bootstrap", bootstrap, most=MOST_RESAMPLES),
            dtype=options.parse_dtype(dtype),
            machine=machine,
        )
        skipped = [*skipped, *planned.skipped]
        if not planned.batches:
            raise ValueError(
                f"path: {str(path)!r} has no layer to analyse, {all_skipped(len(skipped))}"
            )
        if json is not None:
            settings = {
                "source": str(path),
                "key": key,
                "layout": layout,
                "sampling": str(sampling),
                "xmin": xmin,
                "bootstrap": bootstrap,
                "dtype": dtype,
                "machine": vars(machine),
            }
            text = json_format.dumps(_as_json(planned, skipped, settings), indent=1)
            write_text(json, text + "\n")
        for line in _lines(planned, machine):
            echo(line)
        for line in skipped_lines(skipped, show_skipped):
            echo(line)


def _machine(device: str | None) -> Machine:
    """The machine to predict for."""
    try:
        asked = default_device() if device is None else torch.device(device)
    except RuntimeError:
        asked = torch.device("meta")
    if asked.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected cpu, cuda or cuda:N, got {device!r}")
    if asked.type == "cuda" and (asked.index or 0) >= torch.cuda.device_count():
        return Machine("cuda")
    return machine_of(asked)


def _check_solver(solver: str | None, machine: Machine) -> None:
    """Raises ValueError for a solver that an analysis on such a machine does not have."""
    kind = torch.device(machine.kind)
    # A build without CUDA does not know the names of its solvers.
    if torch.ops.farms_fast.solver_names(kind.type):
        check_solver(solver, kind)


def _lines(planned: Plan, machine: Machine) -> Iterator[str]:
    """The table and its totals."""
    buckets: dict[tuple[int, str], list[Batch]] = {}
    for batch in planned.batches:
        dtype = str(batch.layers[0].spec.dtype).removeprefix("torch.")
        buckets.setdefault((batch.order, dtype), []).append(batch)
    headings = (
        *("order", "dtype", "layers", "batches", "windows"),
        *("weights GB", "TFLOP", "time", "mem. GB"),
    )
    rows = []
    for (order, dtype), batches in sorted(buckets.items()):
        cost = total([batch.cost for batch in batches])
        rows.append(
            (
                str(order),
                dtype,
                str(sum(len(batch.layers) for batch in batches)),
                str(len(batches)),
                str(sum(batch.windows for batch in batches)),
                _number(sum(batch.weight_bytes for batch in batches) / 1e9),
                _number(cost.flops / 1e12),
                _time(cost.seconds),
                _number(cost.memory / 1e9),
            )
        )
    yield from text_table(headings, rows)
    yield ""
    cost, layers = planned.cost, len(planned.layers)
    weights = sum(batch.weight_bytes for batch in planned.batches)
    memory, allowed = _number(cost.memory / 1e9), _number(planned.memory / 1e9)
    where = f"one {measured_on('cuda')}"
    if machine.kind == "cpu":
        where = f"{counted(machine.cores, 'core')} like those of an {measured_on('cpu')}"
    yield (
        f"{counted(layers, 'layer')} in {counted(len(planned.batches), 'batch', 'es')}, "
        f"{counted(sum(batch.windows for batch in planned.batches), 'window')}, "
        f"{_number(weights / 1e9)} GB of weights, {_number(cost.flops / 1e12)} TFLOP"
    )
    yield f"about {_time(cost.seconds)} on {where}, {memory} GB of the {allowed} GB allowed"


def _number(value: float) -> str:
    """Three digits, and all of those before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _time(seconds: float) -> str:
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{_number(seconds / size)} {unit}"
    return f"{_number(seconds)} s" if seconds >= 1 else f"{_number(seconds * 1e3)} ms"


def _as_json(planned: Plan, skipped: Sequence[Skipped], settings: dict[str, Any]) -> dict[str, Any]:
    batches = [
        {
            "order": batch.order,
            "windows": batch.windows,
            "workspace": batch.workspace,
            "fit_values": batch.fit_values,
            "cost": _cost(batch.cost),
            "layers": [
                {
                    "name": layer.spec.name,
                    "kind": layer.spec.kind,
                    "shape": layer.spec.shape,
                    "dtype": str(layer.spec.dtype).removeprefix("torch."),
                    "windows": layer.windows,
                    "window_rows": layer.grid.rows,
                    "window_cols": layer.grid.columns,
                    "cost": _cost(cost),
                }
                for layer, cost in zip(batch.layers, batch.costs, strict=True)
            ],
        }
        for batch in planned.batches
    ]
    return {
        "settings": {**settings, "memory": planned.memory},
        "cost": _cost(planned.cost),
        "batches": batches,
        "skipped": [vars(tensor) for tensor in skipped],
    }


def _cost(cost: Cost) -> dict[str, float]:
    return dict(vars(cost))
