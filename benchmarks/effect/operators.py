"""Neural operators in plain torch, with the weights that published ones have, at any size.

`FourierOperator` has the shape of a Fourier neural operator (Li et al., ICLR 2021),
`DenoisingOperator` that of DPOT (Hao et al., ICML 2024): patches, an aggregation over time, AFNO
blocks with channel MLPs of 1 x 1 convolutions, and a head of transposed convolutions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import gelu


class SpectralConvolution(nn.Module):
    """One complex (in, out) matrix for each of the lowest modes.

    Args:
        channels: in and out.
        modes: kept along x, of both signs, and along y, of which a real field has one sign only.
    """

    def __init__(self, channels: int, modes: tuple[int, int]) -> None:
        super().__init__()
        shape = (channels, channels, *modes)
        self.weight = nn.Parameter(torch.randn(shape, dtype=torch.complex64) / channels**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = x.shape[-2:]
        rows, columns = self.weight.shape[2:]
        low, high = (rows + 1) // 2, rows // 2
        waves = torch.fft.rfft2(x, norm="forward")
        if rows > n[0] or columns > waves.shape[-1]:
            raise ValueError(f"x: expected a grid of {rows} x {columns} modes, got {tuple(n)}")
        kept = torch.cat((waves[:, :, :low, :columns], waves[:, :, n[0] - high :, :columns]), dim=2)
        # As one product of matrices for each mode: batch x in times in x out.
        product = kept.permute(2, 3, 0, 1) @ self.weight.permute(2, 3, 0, 1)
        product = product.permute(2, 3, 0, 1)
        out = torch.zeros_like(waves)
        out[:, :, :low, :columns] = product[:, :, :low]
        out[:, :, n[0] - high :, :columns] = product[:, :, low:]
        return torch.fft.irfft2(out, s=n, norm="forward")


class FourierOperator(nn.Module):
    """From some frames of a flow to the next one.

    Args:
        channels: quantities of a frame.
        history: frames that go in, (batch, history, channels, x, y).
        width: channels within.
        modes: of the spectral convolutions, along x and y.
        layers: of them.
    """

    def __init__(
        self, channels: int, history: int, width: int, modes: tuple[int, int], layers: int = 4
    ) -> None:
        super().__init__()
        self.lifting = nn.Conv2d(channels * history + 2, width, 1)
        self.spectral = nn.ModuleList(SpectralConvolution(width, modes) for _ in range(layers))
        self.pointwise = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(layers))
        self.projection = nn.Sequential(
            nn.Conv2d(width, 2 * width, 1), nn.GELU(), nn.Conv2d(2 * width, channels, 1)
        )

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        x = frames.flatten(1, 2)
        x = self.lifting(torch.cat((x, _positions(x)), dim=1))
        for number, (spectral, pointwise) in enumerate(
            zip(self.spectral, self.pointwise, strict=True)
        ):
            x = spectral(x) + pointwise(x)
            x = x if number == len(self.spectral) - 1 else gelu(x)
        return frames[:, -1] + self.projection(x)


@dataclass(frozen=True)
class DenoisingSize:
    """Of a DPOT-shaped model: `TINY` is that of the published DPOT-Tiny, `TOY` for tests."""

    grid: int
    patch: int
    width: int
    blocks: int
    depth: int
    modes: int
    head: int
    mlp_ratio: float = 1.0


TOY = DenoisingSize(grid=16, patch=4, width=16, blocks=2, depth=2, modes=4, head=8)
TINY = DenoisingSize(grid=128, patch=8, width=512, blocks=4, depth=4, modes=32, head=32)


class TimeAggregation(nn.Module):
    """A matrix for each frame, applied to its channels times a cosine of its time, and summed."""

    def __init__(self, frames: int, width: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(frames, width, width) / (frames * width**0.5))
        self.gamma = nn.Parameter(2 ** torch.linspace(-10, 10, width)[None])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        times = torch.linspace(0, 1, x.shape[1], device=x.device)[:, None]
        waves = torch.cos(times @ self.gamma)
        return torch.einsum("btixy,ti,tij->bjxy", x, waves, self.w)


class FourierMixer(nn.Module):
    """AFNO (Guibas et al., ICLR 2022): a two-layer MLP on the modes, in blocks of channels.

    ``w1`` and ``w2`` are (2, blocks, in, out), real parts first.
    """

    def __init__(self, width: int, blocks: int, modes: int) -> None:
        super().__init__()
        size = width // blocks
        self.modes = modes
        self.w1 = nn.Parameter(torch.randn(2, blocks, size, size) / size)
        self.b1 = nn.Parameter(torch.zeros(2, blocks, size))
        self.w2 = nn.Parameter(torch.randn(2, blocks, size, size) / size)
        self.b2 = nn.Parameter(torch.zeros(2, blocks, size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, width, *n = x.shape
        blocks = self.w1.shape[1]
        waves = torch.fft.rfft2(x, norm="ortho")
        kept = waves[..., : self.modes, : self.modes]
        y = kept.reshape(batch, blocks, width // blocks, -1).transpose(2, 3)
        y = y @ torch.complex(*self.w1) + torch.complex(*self.b1)[:, None]
        y = torch.complex(gelu(y.real), gelu(y.imag))
        y = y @ torch.complex(*self.w2) + torch.complex(*self.b2)[:, None]
        out = torch.zeros_like(waves)
        out[..., : self.modes, : self.modes] = y.transpose(2, 3).reshape(kept.shape)
        return x + torch.fft.irfft2(out, s=n, norm="ortho")


class MixerBlock(nn.Module):
    """Mixing over space, then a channel MLP of 1 x 1 convolutions."""

    def __init__(self, size: DenoisingSize) -> None:
        super().__init__()
        hidden = int(size.width * size.mlp_ratio)
        self.norm1 = nn.GroupNorm(8, size.width)
        self.filter = FourierMixer(size.width, size.blocks, size.modes)
        self.norm2 = nn.GroupNorm(8, size.width)
        self.mlp = nn.Sequential(
            nn.Conv2d(size.width, hidden, 1), nn.GELU(), nn.Conv2d(hidden, size.width, 1)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.filter(self.norm1(x)) + x
        return self.mlp(self.norm2(x)) + x


class DenoisingOperator(nn.Module):
    """From some frames of a flow to the next one, over patches.

    Args:
        channels: quantities of a frame.
        history: frames that go in, (batch, history, channels, x, y).
        size: of the model.
    """

    def __init__(self, channels: int, history: int, size: DenoisingSize) -> None:
        super().__init__()
        self.patch_embed = nn.Sequential(
            nn.Conv2d(channels + 2, size.head, size.patch, size.patch),
            nn.GELU(),
            nn.Conv2d(size.head, size.width, 1),
        )
        side = size.grid // size.patch
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, size.width, side, side))
        self.time_agg = TimeAggregation(history, size.width)
        self.blocks = nn.ModuleList(MixerBlock(size) for _ in range(size.depth))
        self.out = nn.Sequential(
            nn.ConvTranspose2d(size.width, size.head, size.patch, size.patch),
            nn.GELU(),
            nn.Conv2d(size.head, size.head, 1),
            nn.GELU(),
            nn.Conv2d(size.head, channels, 1),
        )

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        batch, history = frames.shape[:2]
        x = frames.flatten(0, 1)
        x = self.patch_embed(torch.cat((x, _positions(x)), dim=1)) + self.pos_embed
        x = self.time_agg(x.unflatten(0, (batch, history)))
        for block in self.blocks:
            x = block(x)
        return frames[:, -1] + self.out(x)


def _positions(x: torch.Tensor) -> torch.Tensor:
    """Coordinates of the grid as two channels."""
    axes = [torch.linspace(0, 1, n, device=x.device, dtype=x.dtype) for n in x.shape[-2:]]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    return grid.expand(x.shape[0], *grid.shape)


def parameter_count(model: nn.Module) -> int:
    """Real numbers in a model's parameters: two for a complex one."""
    return sum(math.prod(p.shape) * (2 if p.is_complex() else 1) for p in model.parameters())
