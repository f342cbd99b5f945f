"""A GPU that runs out of memory, and machines with several."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from farms_fast import Analysis, FixedAspectSampling, analyze

pytestmark = pytest.mark.gpu

SAMPLING = FixedAspectSampling(rows=512, per_dim=4)
LAYERS = 12


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {f"layer{i}.weight": torch.randn(1024, 1024, generator=generator) for i in range(LAYERS)}


@pytest.fixture
def several() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")


@contextmanager
def only_so_much(bytes_left: int) -> Iterator[None]:
    """torch's allocator refuses more than so many bytes beyond what is taken already."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(
        (torch.cuda.memory_reserved(0) + bytes_left) / total, 0
    )
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, 0)


def refusals() -> int:
    return int(torch.cuda.memory_stats(0)["num_ooms"])


def same(one: Analysis, other: Analysis) -> None:
    """Equal within the solvers' bound, whatever the batches were."""
    assert [layer.name for layer in one] == [layer.name for layer in other]
    for mine, its in zip(one, other, strict=True):
        assert (mine.status, mine.num_pl_spikes) == (its.status, its.num_pl_spikes)
        np.testing.assert_allclose(mine.alpha, its.alpha, rtol=1e-9)
        bound = 8 * 512 * np.finfo(np.float64).eps * mine.spectral_norm
        assert np.abs(mine.evals - its.evals).max() <= bound


def test_a_device_that_runs_out_of_memory_goes_on_with_less(
    weights: dict[str, torch.Tensor],
) -> None:
    whole = analyze(weights, SAMPLING, device="cuda", bootstrap=0, progress=False)
    before = refusals()
    # All windows' Gram matrices alone are 400 MB; a window's is 2.
    with only_so_much(120 * 2**20):
        short = analyze(weights, SAMPLING, device="cuda", bootstrap=0, progress=False)
    assert refusals() > before
    assert not short.failed
    same(short, whole)


def test_a_layer_that_never_fits_is_told_and_the_others_are_done(
    weights: dict[str, torch.Tensor],
) -> None:
    weights["huge.weight"] = torch.randn(9000, 9000)
    with only_so_much(200 * 2**20):
        found = analyze(weights, SAMPLING, device="cuda", bootstrap=0, progress=False)
    failed = {layer.name: layer for layer in found.failed}
    assert list(failed) == ["huge"]
    assert failed["huge"].status == "error"
    assert "out of memory" in failed["huge"].message
    assert len(found) == LAYERS + 1


@pytest.mark.usefixtures("several")
def test_another_device_than_the_current_one(weights: dict[str, torch.Tensor]) -> None:
    first = analyze(weights, SAMPLING, device="cuda:0", bootstrap=0, progress=False)
    second = analyze(weights, SAMPLING, device="cuda:1", bootstrap=0, progress=False)
    assert torch.cuda.current_device() == 0
    for mine, its in zip(first, second, strict=True):
        assert mine.alpha == its.alpha
        assert np.array_equal(mine.evals, its.evals)


@pytest.mark.usefixtures("several")
def test_torchrun_gives_what_one_device_gives(
    weights: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    file, store = tmp_path / "model.safetensors", tmp_path / "run.sqlite"
    save_file(weights, file)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", "-m", "farms_fast", "analyze", str(file)]
    command += ["--rows", "512", "--per-dim", "4", "--bootstrap", "0", "--store", str(store)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    alone = analyze(file, SAMPLING, device="cuda:0", bootstrap=0, progress=False)
    same(Analysis.from_store(store), alone)
