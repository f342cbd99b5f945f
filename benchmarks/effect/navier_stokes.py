"""Two-dimensional compressible Navier–Stokes flow in a periodic unit square, pseudo-spectrally.

The equations are PDEBench's (Takamoto et al., NeurIPS 2022): mass, momentum and energy of an ideal
gas with adiabatic index 5/3, shear viscosity eta and bulk viscosity zeta, without heat conduction.
They are advanced in conservative form, with derivatives in Fourier space, fluxes cut off above two
thirds of the wavenumbers, and classical fourth-order Runge–Kutta steps. So mass, momentum and
energy are kept to rounding. There is no shock capturing: the flow has to be smooth at the grid's
resolution, which at Mach numbers well below 1 the viscosity sees to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from farms_fast.adapters.sciml import CompressibleFlow

ADIABATIC_INDEX = 5 / 3


@dataclass(frozen=True)
class _Grid:
    """Wavenumbers of an n x n grid, and which of them are kept."""

    kx: torch.Tensor
    ky: torch.Tensor
    kept: torch.Tensor
    largest: float

    @classmethod
    def of(cls, fields: torch.Tensor) -> _Grid:
        n = fields.shape[-1]
        real = {"dtype": fields.dtype, "device": fields.device}
        kx = 2 * math.pi * torch.fft.fftfreq(n, 1 / n, **real)[:, None]
        ky = 2 * math.pi * torch.fft.rfftfreq(n, 1 / n, **real)[None, :]
        cut = 2 * math.pi * (n // 3)
        kept = ((kx.abs() <= cut) & (ky <= cut)).to(fields.dtype)
        return cls(kx, ky, kept, math.sqrt(2) * cut)


def random_flow(
    samples: int,
    n: int,
    mach: float,
    *,
    seed: int = 0,
    largest_mode: int = 4,
    device: str | torch.device = "cpu",
) -> torch.Tensor:
    """Solenoidal random velocities of speed 1 (root mean square), with the pressure they need.

    Args:
        samples: how many.
        n: points in each dimension.
        mach: speed over the speed of sound.
        seed: of the random numbers, which are drawn on the CPU: the same on every device.
        largest_mode: of the velocity.
        device: of the result.

    Returns:
        Density, pressure and the two velocities, float64, (samples, 4, n, n).
    """
    draw = torch.Generator().manual_seed(seed)
    shape = (samples, n, n // 2 + 1)
    noise = torch.randn(shape, dtype=torch.complex128, generator=draw).to(device)
    grid = _Grid.of(torch.empty(n, n, dtype=torch.float64, device=device))
    square = grid.kx**2 + grid.ky**2
    large = (square > 0) & (square <= (2 * math.pi * largest_mode) ** 2)
    # Only the real part of a wave along x counts, so a round trip makes the numbers consistent.
    stream = torch.fft.rfft2(torch.fft.irfft2(noise * large, s=(n, n)))
    u = torch.fft.irfft2(1j * grid.ky * stream, s=(n, n))
    v = torch.fft.irfft2(-1j * grid.kx * stream, s=(n, n))
    speed = (u**2 + v**2).mean((-2, -1), keepdim=True).sqrt()
    return with_pressure(u / speed, v / speed, mach)


def with_pressure(u: torch.Tensor, v: torch.Tensor, mach: float) -> torch.Tensor:
    """The state whose pressure balances an incompressible velocity, so that it makes little sound.

    Args:
        u: velocity along x, (..., n, n).
        v: along y.
        mach: a speed of 1 over the speed of sound, at density 1.

    Returns:
        (..., 4, n, n): density, pressure, u, v.
    """
    n, grid = u.shape[-1], _Grid.of(u)
    square = grid.kx**2 + grid.ky**2
    square[0, 0] = 1.0
    stresses = torch.fft.rfft2(torch.stack((u * u, 2 * u * v, v * v)))
    xx, xy, yy = stresses.unbind(0)
    balance = -(grid.kx**2 * xx + grid.kx * grid.ky * xy + grid.ky**2 * yy) / square
    balance[..., 0, 0] = 0
    rest = 1 / (ADIABATIC_INDEX * mach**2)
    pressure = rest + torch.fft.irfft2(balance, s=(n, n))
    density = (pressure / rest) ** (1 / ADIABATIC_INDEX)
    return torch.stack((density, pressure, u, v), dim=-3)


def solve(
    start: torch.Tensor,
    times: Sequence[float],
    eta: float,
    zeta: float,
    *,
    steps: int | None = None,
) -> torch.Tensor:
    """Advances flows in time.

    Args:
        start: density, pressure, velocity along x and along y, (samples, 4, n, n), at ``times[0]``.
        times: when the flow is wanted, ascending and evenly spaced.
        eta: shear viscosity.
        zeta: bulk viscosity.
        steps: between two times; None takes what the stability of the scheme asks for at the start,
            with a margin.

    Returns:
        (samples, times, 4, n, n), of the dtype of ``start``.

    Raises:
        FloatingPointError: the flow is not resolved, so that a value is no longer finite.
    """
    grid = _Grid.of(start)
    span = (times[-1] - times[0]) / max(1, len(times) - 1)
    steps = _stable_steps(start, span, eta, zeta, grid) if steps is None else steps
    state = torch.fft.rfft2(_conserved(start)) * grid.kept
    frames = [start]
    for _ in times[1:]:
        for _ in range(steps):
            state = _step(state, span / steps, eta, zeta, grid, start.shape[-1])
        frames.append(_primitive(torch.fft.irfft2(state, s=start.shape[-2:])))
    flow = torch.stack(frames, dim=1)
    if not bool(flow.isfinite().all()):
        raise FloatingPointError(
            f"eta: the flow is not resolved by {start.shape[-1]} points at eta={eta}, zeta={zeta}"
        )
    return flow


def simulate(
    samples: int,
    n: int,
    *,
    eta: float,
    zeta: float,
    mach: float,
    frames: int = 21,
    duration: float = 1.0,
    seed: int = 0,
    device: str | torch.device = "cpu",
    batch: int = 512,
) -> CompressibleFlow:
    """Flows from random starts, in the form in which PDEBench's files are read."""
    times = torch.linspace(0, duration, frames, dtype=torch.float64)
    parts = []
    for first in range(0, samples, batch):
        count = min(batch, samples - first)
        start = random_flow(count, n, mach, seed=seed + first, device=device)
        parts.append(solve(start, times.tolist(), eta, zeta).float())
    centres = (torch.arange(n) + 0.5) / n
    return CompressibleFlow(torch.cat(parts), times.float(), centres, centres, eta, zeta, mach)


def _conserved(primitive: torch.Tensor) -> torch.Tensor:
    density, pressure, u, v = primitive.unbind(-3)
    energy = pressure / (ADIABATIC_INDEX - 1) + 0.5 * density * (u * u + v * v)
    return torch.stack((density, density * u, density * v, energy), dim=-3)


def _primitive(conserved: torch.Tensor) -> torch.Tensor:
    density, x_momentum, y_momentum, energy = conserved.unbind(-3)
    u, v = x_momentum / density, y_momentum / density
    pressure = (ADIABATIC_INDEX - 1) * (energy - 0.5 * (x_momentum * u + y_momentum * v))
    return torch.stack((density, pressure, u, v), dim=-3)


def _stable_steps(start: torch.Tensor, span: float, eta: float, zeta: float, grid: _Grid) -> int:
    """Steps that keep sound and viscous decay of the largest wavenumber within RK4's region."""
    density, pressure, u, v = start.unbind(-3)
    sound = (ADIABATIC_INDEX * pressure / density).sqrt()
    fastest = float((sound + (u * u + v * v).sqrt()).max())
    viscous = (zeta + 4 / 3 * eta) / float(density.min()) * grid.largest**2
    # RK4 is stable up to 2.78 on the real axis and 2.83 on the imaginary one.
    return max(1, math.ceil(span * max(viscous / 2.2, 1.1 * fastest * grid.largest / 2.2)))


def _step(
    state: torch.Tensor, dt: float, eta: float, zeta: float, grid: _Grid, n: int
) -> torch.Tensor:
    first = _change(state, eta, zeta, grid, n)
    second = _change(state + 0.5 * dt * first, eta, zeta, grid, n)
    third = _change(state + 0.5 * dt * second, eta, zeta, grid, n)
    fourth = _change(state + dt * third, eta, zeta, grid, n)
    return state + dt / 6 * (first + 2 * (second + third) + fourth)


def _change(state: torch.Tensor, eta: float, zeta: float, grid: _Grid, n: int) -> torch.Tensor:
    """Time derivative of the conserved quantities' Fourier coefficients."""
    x, y = 1j * grid.kx, 1j * grid.ky
    fields = torch.fft.irfft2(state, s=(n, n))
    _, x_momentum, y_momentum, energy = fields.unbind(-3)
    pressure, u, v = _primitive(fields).unbind(-3)[1:]
    waves = torch.fft.rfft2(torch.stack((u, v), dim=-3)) * grid.kept
    slopes = torch.fft.irfft2(torch.cat((x * waves, y * waves), dim=-3), s=(n, n))
    u_x, v_x, u_y, v_y = slopes.unbind(-3)
    # Viscous stress: eta (∂_i v_j + ∂_j v_i − ⅔ δ_ij div) + zeta δ_ij div.
    bulk = (zeta - 2 / 3 * eta) * (u_x + v_y)
    s_xx, s_yy, s_xy = 2 * eta * u_x + bulk, 2 * eta * v_y + bulk, eta * (u_y + v_x)
    whole = energy + pressure
    fluxes = torch.stack(
        (
            x_momentum * u + pressure - s_xx,
            x_momentum * v - s_xy,
            y_momentum * v + pressure - s_yy,
            whole * u - u * s_xx - v * s_xy,
            whole * v - u * s_xy - v * s_yy,
        ),
        dim=-3,
    )
    f_xx, f_xy, f_yy, e_x, e_y = torch.fft.rfft2(fluxes).unbind(-3)
    outflow = torch.stack(
        (
            x * state[..., 1, :, :] + y * state[..., 2, :, :],
            x * f_xx + y * f_xy,
            x * f_xy + y * f_yy,
            x * e_x + y * e_y,
        ),
        dim=-3,
    )
    return -outflow * grid.kept
