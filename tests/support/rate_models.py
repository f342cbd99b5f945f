"""Small models for the tests of learning rates per layer."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from farms_fast.adapters.training import TempBalance
from farms_fast.spectra.windows import FixedAspectSampling, FullMatrix


class Block(nn.Module):
    """A residual block, with the names that torchvision's have."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = nn.Sequential()
        if inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(inner + self.downsample(x))


class TinyResNet(nn.Module):
    """Seven layers, for images of 8 x 8."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator_state = torch.get_rng_state()
        torch.manual_seed(seed)
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.layer1 = nn.Sequential(Block(8, 8), Block(8, 16))
        self.fc = nn.Linear(16, 10)
        torch.set_rng_state(generator_state)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer1(torch.relu(self.bn1(self.conv1(x))))
        logits: torch.Tensor = self.fc(x.mean(dim=(2, 3)))
        return logits


def linears(count: int = 5, size: int = 16, seed: int = 0) -> nn.Sequential:
    """Layers named 0, 1, 2, ... of different spectra."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(*(nn.Linear(size, size) for _ in range(count)))
    with torch.no_grad():
        for number, layer in enumerate(model):
            weight = torch.randn((size, size), generator=generator)
            # A graded diagonal, steeper in each layer, gives each a tail of its own.
            layer.weight.copy_(weight * torch.linspace(1, 0.2, size) ** (number / 2) / size**0.5)
    return model


def batches(epoch: int, count: int = 2) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The same images and labels for the same epoch, whoever asks."""
    generator = torch.Generator().manual_seed(1000 + epoch)
    return [
        (
            torch.randn((8, 3, 8, 8), generator=generator),
            torch.randint(0, 10, (8,), generator=generator),
        )
        for _ in range(count)
    ]


def small(model: nn.Module, **options: object) -> TempBalance:
    """TempBalance with small windows."""
    options.setdefault("sampling", FixedAspectSampling(rows=8, per_dim=3))
    return TempBalance(model, **options)  # type: ignore[arg-type]


def whole(model: nn.Module, **options: object) -> TempBalance:
    """TempBalance of whole matrices."""
    return small(model, sampling=FullMatrix(), **options)


def median_alpha(weight: torch.Tensor) -> float:
    """Alpha of a whole weight under the median rule, in NumPy."""
    matrices = weight.detach().double().numpy()
    if matrices.ndim > 2:
        matrices = np.moveaxis(matrices.reshape(*matrices.shape[:2], -1), -1, 0)
    evals = np.sort(np.linalg.svd(matrices, compute_uv=False).ravel() ** 2)
    tail = evals[len(evals) // 2 :]
    return float(1 + len(tail) / np.log(tail / tail[0]).sum())
