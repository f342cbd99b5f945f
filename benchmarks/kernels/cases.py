"""Small inputs that take every kernel of the library through each of its configs.

A case makes seeded inputs, calls one op, and returns what the op returned, so that the same list
serves a sanitizer and a comparison of two builds to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from farms_fast import build_info

# One order for each config of csrc/cuda/eigvalsh/one_stage.cu.
BLOCK_ORDERS = (11, 23, 41, 57, 73, 91, 121, 143)
# Order and matrices for each config of one_stage_cluster.cu: on 132 multiprocessors, clusters of
# eight take up to 15 matrices, of four up to 30, of two more.
CLUSTERS = {
    "256 in 8": (165, 2),
    "256 in 4": (165, 20),
    "192 in 2": (165, 40),
    "256 in 2": (200, 40),
    "384 in 8": (260, 2),
    "512 in 8": (390, 2),
}
# Even and odd orders, one panel and several, narrowing in one block and in a cluster.
TWO_STAGE_ORDERS = (96, 200, 201, 520)
# What else a long matrix takes: a taller panel, a denser band, a band in a ring, an endless panel.
LONG_ORDERS = (2900, 3600, 4200)
WEIGHT_DTYPES = (
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
)
RULES = ("median", "ks", "peak")
# A spectrum that one block scans, one that takes two chunks, and ones too short to fit.
SPECTRA = (100, 0, 1, 3000, 20_000, 2)


@dataclass(frozen=True)
class KernelCase:
    """One op on one seeded input.

    Args:
        name: what it covers; cases are chosen by parts of it.
        run: makes the input and calls the op.
        long: takes minutes under a sanitizer.
    """

    name: str
    run: Callable[[], list[Tensor]]
    long: bool = False


def use_ops() -> None:
    """Registers the ops, whatever the build."""
    build_info()


def normal(shape: tuple[int, ...], dtype: torch.dtype, seed: int, device: str = "cuda") -> Tensor:
    """Normal entries; complex and half types from wider ones, so that all builds draw the same."""
    generator = torch.Generator(device).manual_seed(seed)
    if dtype.is_complex:
        parts = torch.randn(*shape, 2, dtype=torch.float64, device=device, generator=generator)
        return torch.view_as_complex(parts).to(dtype)
    return torch.randn(shape, dtype=torch.float64, device=device, generator=generator).to(dtype)


def full_windows(count: int, rows: int, columns: int) -> Tensor:
    """The ops' window table of `count` whole matrices of one stack."""
    table = torch.zeros(count, 6, dtype=torch.int64)
    table[:, 1] = torch.arange(count)
    table[:, 4], table[:, 5] = rows, columns
    return table


def overlapping_windows(extent: int, window: int, per_dim: int) -> Tensor:
    """The window table of `per_dim` starts in each dimension of one square matrix."""
    starts = torch.linspace(0, extent - window, per_dim).round().long()
    grid = torch.cartesian_prod(starts, starts)
    table = torch.zeros(len(grid), 6, dtype=torch.int64)
    table[:, 2:4] = grid
    table[:, 4:] = window
    return table


def windows_case(
    name: str, solver: str, order: int, count: int, dtype: torch.dtype, long: bool = False
) -> KernelCase:
    def run() -> list[Tensor]:
        weight = normal((count, order, order + 3), dtype, seed=order)
        table = full_windows(count, order, order + 3)
        call = torch.ops.farms_fast.window_eigvalsh
        return [call([weight], table, order, torch.float64, solver, 0)]

    return KernelCase(f"{solver} windows {name}", run, long)


def gram_case(name: str, solver: str, order: int, count: int, dtype: torch.dtype) -> KernelCase:
    def run() -> list[Tensor]:
        weight = normal((count, order, order), dtype, seed=order)
        return [torch.ops.farms_fast.eigvalsh(weight @ weight.mH, solver, 0)]

    return KernelCase(f"{solver} matrices {name}", run)


def window_gram_case(name: str, weight: Callable[[], Tensor], table: Tensor) -> KernelCase:
    def run() -> list[Tensor]:
        order = int(table[0, 4:].min())
        return [torch.ops.farms_fast.window_gram([weight()], table, order, torch.float64)]

    return KernelCase(f"gram {name}", run)


def fit_case(rule: str) -> KernelCase:
    def run() -> list[Tensor]:
        drawn = [normal((n,), torch.float64, seed=n).abs() for n in SPECTRA]
        parts = [1 / values.sort(descending=True).values for values in drawn]
        sizes = torch.tensor([0, *SPECTRA], device=drawn[0].device)
        call = torch.ops.farms_fast.fit_power_law
        return list(call(torch.cat(parts), sizes.cumsum(0), rule, 2.0, 100, False))

    return KernelCase(f"fit {rule}", run)


def cases() -> list[KernelCase]:
    """All of them; making the list needs no GPU."""
    return list(_cases())


def _cases() -> Iterator[KernelCase]:
    for order in BLOCK_ORDERS:
        yield windows_case(f"{order} in a block", "one_stage", order, 3, torch.float64)
    for dtype in WEIGHT_DTYPES:
        yield windows_case(f"30 {_short(dtype)}", "one_stage", 30, 3, dtype)
    for name, (order, count) in CLUSTERS.items():
        yield windows_case(f"{order} as {name}", "one_stage", order, count, torch.float64)
    for dtype in (torch.float32, torch.complex128):
        yield gram_case(f"90 {_short(dtype)}", "one_stage", 90, 2, dtype)
    for order in TWO_STAGE_ORDERS:
        yield windows_case(f"{order}", "two_stage", order, 2, torch.float64)
    # More matrices than multiprocessors: four warps a matrix narrow the band.
    yield windows_case("96 of 140", "two_stage", 96, 140, torch.float64)
    for dtype in (torch.float32, torch.complex64, torch.complex128):
        yield gram_case(f"100 {_short(dtype)}", "two_stage", 100, 2, dtype)
    for order in LONG_ORDERS:
        yield windows_case(f"{order}", "two_stage", order, 1, torch.float64, long=True)
    yield gram_case("48 float64", "cusolver", 48, 2, torch.float64)
    for dtype in WEIGHT_DTYPES:
        yield window_gram_case(
            f"70 {_short(dtype)}",
            partial(normal, (3, 70, 90), dtype, seed=1),
            full_windows(3, 70, 90),
        )
    yield window_gram_case(
        "70 transposed",
        partial(normal, (3, 90, 70), torch.float32, seed=2),
        full_windows(3, 90, 70),
    )
    for dtype in (torch.float32, torch.complex64):
        yield window_gram_case(
            f"512 shared {_short(dtype)}",
            partial(normal, (1, 1024, 1024), dtype, seed=3),
            overlapping_windows(1024, 512, 8),
        )
    for rule in RULES:
        yield fit_case(rule)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
