"""The way FARMS was published (arXiv 2506.06280), in our own words, to be measured against.

One float32 `svdvals` call a window in a Python loop; then one step of a Python loop a candidate for
xmin, each over its whole tail. It runs where the weight lives.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def window_eigenvalues(windows: Iterable[Tensor]) -> list[Tensor]:
    return [torch.linalg.svdvals(window.float()).square() for window in windows]


def pool(spectra: list[Tensor]) -> Tensor:
    return torch.cat(spectra).sort().values


def fit(evals: Tensor, candidates: Iterable[int]) -> tuple[float, float, float]:
    """Alpha, D and xmin of the candidate with the least D."""
    evals = evals.float()
    logs = evals.log()
    size = evals.numel()
    xmins: list[Tensor] = []
    alphas: list[Tensor] = []
    distances: list[Tensor] = []
    for start in candidates:
        n = size - start
        tail, xmin = evals[start:], evals[start]
        alpha = 1 + n / (logs[start:].sum() - n * logs[start])
        steps = torch.arange(n, device=evals.device) / n
        distances.append((1 - (tail / xmin) ** (1 - alpha) - steps).abs().max())
        alphas.append(alpha)
        xmins.append(xmin)
    best = int(torch.stack(distances).argmin())
    return float(alphas[best]), float(distances[best]), float(xmins[best])
