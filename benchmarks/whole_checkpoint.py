"""Times a checkpoint of LLaMA's shapes from disk to table, and the parts of that time.

    python -m benchmarks.whole_checkpoint make FOLDER [--blocks 32] [--spectra random|power-law]
    python -m benchmarks.whole_checkpoint run FOLDER [--memory 40GiB] [--store RUN.sqlite]

`run` analyses it with 15 x 15 windows of 2000 and the peak rule, twice: the second time under
torch's profiler, which says what the device did. The first time is the one that is told. Started by
`torchrun --nproc-per-node N -m benchmarks.whole_checkpoint run ...` it shares the layers out over N
devices, without the second time, and tells what the whole took.
"""

from __future__ import annotations

import json
import re
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import save_file

from farms_fast import FixedAspectSampling, analyze
from farms_fast.core.arguments import parse_memory
from farms_fast.engine.distributed import Ranks, local_device, torchrun_group

app = typer.Typer(add_completion=False)

# What a kernel's name says about the stage that it belongs to; the first match counts.
_STAGES = (
    ("Gram", r"gram_kernel|store_views"),
    ("fit", r"(ascending|excess|finish|logs|median|prepare|search|select)_kernel"),
    ("eigenvalues", r"farms_fast::"),
    ("reading to the device", r"Memcpy HtoD"),
    ("results from the device", r"Memcpy DtoH"),
    ("sorting and resampling", r"sort|repeat_interleave|compute_cuda_kernel|index|scan|gather"),
)


def _weights(
    blocks: int, hidden: int, inner: int, spectra: str, device: torch.device
) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
    generator = torch.Generator(device).manual_seed(0)
    shapes = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
    shapes |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden)}
    shapes |= {"mlp.down_proj": (hidden, inner)}
    for block in range(blocks):
        tensors = {}
        for name, (rows, columns) in shapes.items():
            weight = torch.randn(rows, columns, device=device, generator=generator)
            if spectra == "power-law":
                # Columns of Pareto-distributed size give the Gram matrix a tail of that exponent.
                uniform = torch.rand(columns, device=device, generator=generator)
                weight *= uniform.clamp_min(1e-6) ** (-1 / 4)
            weight *= columns**-0.5
            tensors[f"model.layers.{block}.{name}.weight"] = weight.half().cpu()
        yield block, tensors


@app.command()
def make(
    folder: Path,
    blocks: int = 32,
    hidden: int = 4096,
    inner: int = 11_008,
    spectra: Annotated[str, typer.Option(help="random or power-law")] = "random",
) -> None:
    """Writes the checkpoint, a shard a block, with its index."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    for block, tensors in _weights(blocks, hidden, inner, spectra, device):
        shard = f"model-{block + 1:05}-of-{blocks:05}.safetensors"
        save_file(tensors, folder / shard)
        weight_map |= dict.fromkeys(tensors, shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _busy(intervals: list[tuple[float, float]]) -> float:
    """Length of the union."""
    total, end = 0.0, float("-inf")
    for begin, until in sorted(intervals):
        total += max(0.0, until - max(begin, end))
        end = max(end, until)
    return total


def _stages(profile: Any) -> dict[str, float]:
    """Seconds of the device by stage, overlaps counted in each, and how long it was busy."""
    found: dict[str, float] = {}
    intervals: list[tuple[float, float]] = []
    for event in profile.events():
        if event.device_type != torch.autograd.DeviceType.CUDA or event.is_user_annotation:
            continue
        begin, end = event.time_range.start / 1e6, event.time_range.end / 1e6
        intervals.append((begin, end))
        stage = next((name for name, kernels in _STAGES if re.search(kernels, event.name)), "other")
        found[stage] = found.get(stage, 0.0) + end - begin
    first, last = min(b for b, _ in intervals), max(e for _, e in intervals)
    return found | {"busy": _busy(intervals), "from first to last": last - first}


@app.command()
def run(
    folder: Path,
    memory: str | None = None,
    store: Path | None = None,
    rows: int = 2000,
    per_dim: int = 15,
    xmin: str = "peak",
    bootstrap: int = 100,
    profile_only: Annotated[
        str | None, typer.Option(help="A glob: the profiled run takes only layers of that name.")
    ] = None,
    profiled: bool = True,
    json_path: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Analyses it and tells where the time went."""
    if torch.cuda.is_available():
        # The device's context is there before the clock starts.
        torch.zeros(1, device=local_device() or "cuda")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    options: dict[str, Any] = {
        "memory": None if memory is None else parse_memory(memory),
        "bootstrap": bootstrap,
    }
    finished: list[float] = []
    sampling = FixedAspectSampling(rows=rows, per_dim=per_dim)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with torchrun_group() as group:
        ranks = Ranks.of(group)
        ranks.wait()
        start = time.perf_counter()
        device = local_device()
        analysis = analyze(
            folder,
            sampling,
            xmin,
            store=store,
            process_group=group,
            device=device,
            progress=lambda *done: finished.append(time.perf_counter() - start),
            **options,
        )
        seconds = time.perf_counter() - start
        by_process = ranks.gather((len(finished), min(finished), max(finished)))
    if not ranks.is_main:
        return
    told: dict[str, Any] = {
        "processes": ranks.size,
        "layers": len(analysis),
        "failed": len(analysis.failed),
        "windows": sum(layer.windows for layer in analysis),
        "seconds": seconds,
        "layers of each process, seconds to its first and to its last": by_process,
        "host MiB above the start": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        / 1024,
    }
    if torch.cuda.is_available():
        told["device GiB, allocated"] = torch.cuda.max_memory_allocated() / 2**30
        told["device GiB, reserved"] = torch.cuda.max_memory_reserved() / 2**30
    if profiled and ranks.size == 1 and torch.cuda.is_available():
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as recorded:
            analyze(folder, sampling, xmin, include=profile_only, progress=False, **options)
        told["device seconds, profiled"] = _stages(recorded)
    for key, value in told.items():
        typer.echo(f"{key}: {value}")
    if json_path is not None:
        json_path.write_text(json.dumps(told, indent=1))


if __name__ == "__main__":
    app()
