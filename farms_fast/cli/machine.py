"""`farms-fast info` and `farms-fast tune`: this installation, and the GPUs of this machine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import torch
import typer

from farms_fast.cli.console import cli_errors, echo
from farms_fast.cli.tables import counted
from farms_fast.core import solver_choice
from farms_fast.core.arguments import default_device, resolve_device
from farms_fast.core.extension import build_info, has_cuda
from farms_fast.core.text import printable
from farms_fast.engine import tune as engine_tune


def info() -> None:
    """Print how this installation was built, what it can use, and how it chooses solvers."""
    with cli_errors():
        for key, value in build_info().items():
            echo(f"{key}: {value}")
        for index in range(torch.cuda.device_count() if has_cuda() else 0):
            for line in _gpu_lines(index):
                echo(printable(line))


def tune(
    quick: Annotated[
        bool, typer.Option("--quick", help="Measure fewer sizes: a quarter of a minute.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="cuda or cuda:N.", show_default="cuda")] = None,
) -> None:
    """Measure the eigensolvers on this machine's GPU, about a minute, and keep which is fastest.

    The table is written to the user's cache folder, or to FARMS_FAST_CACHE_DIR, and chooses the
    solvers on GPUs of this model from then on, until the driver, cuSOLVER or farms_fast changes.
    Two solvers may differ in the last bits of an eigenvalue, so a new table may as well. farms-fast
    info says which table is in use.

    Exit codes: 0 the table is written, 2 there is no GPU, or bad usage.
    """
    with cli_errors():
        where = resolve_device(device, default_device())
        if where.type != "cuda":
            raise ValueError("expected a CUDA device and a build with CUDA (see farms-fast info)")
        index = torch.cuda.current_device() if where.index is None else where.index
        table = engine_tune.tune(index, quick, echo)
        path = table.write()
        name = printable(table.gpu.name)
        echo(f"{counted(len(table.rows), 'row')} for {name} in {path}, used from now on")


def _gpu_lines(index: int) -> Iterator[str]:
    solver_choice.settle_on(index)
    decision = solver_choice.decision_on(index)
    gpu = decision.gpu
    facts = ", ".join(f"{name} {value}" for name, value in list(vars(gpu).items())[1:-1])
    yield f"gpu {index}: {gpu.name}, {facts}"
    yield f"gpu {index} solver choice: {decision.text}"
    yield f"gpu {index} self-test: {solver_choice.self_test_text(decision)}"
