"""PDEBench's layout, and the solver that makes files of it: against exact solutions."""

from __future__ import annotations

import builtins
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from benchmarks.effect.navier_stokes import (
    ADIABATIC_INDEX,
    random_flow,
    simulate,
    solve,
    with_pressure,
)
from farms_fast.adapters.sciml import FIELDS, CompressibleFlow, read_pdebench, write_pdebench


@pytest.fixture(scope="module")
def flow() -> CompressibleFlow:
    return simulate(3, 16, eta=0.02, zeta=0.01, mach=0.3, frames=5, duration=0.2, seed=1)


@pytest.fixture
def path(flow: CompressibleFlow, tmp_path: Path) -> Path:
    write_pdebench(tmp_path / "2D_CFD.hdf5", flow)
    return tmp_path / "2D_CFD.hdf5"


# ---------------------------------------------------------------------------- the layout


def test_the_file_has_the_published_layout(path: Path, flow: CompressibleFlow) -> None:
    with h5py.File(path) as file:
        names = {*FIELDS, "t-coordinate", "x-coordinate", "y-coordinate"}
        assert set(file) == names
        assert {file[name].shape for name in FIELDS} == {(3, 5, 16, 16)}
        # The published times end one later than the data.
        assert file["t-coordinate"].shape == (6,)
        np.testing.assert_allclose(np.diff(file["t-coordinate"]), 0.05, rtol=1e-5)
        assert dict(file.attrs) == {"eta": 0.02, "zeta": 0.01, "M": 0.3}
        assert file["Vy"][1, 2, 3, 4] == flow.fields[1, 2, 3, 3, 4].item()


def test_a_file_reads_as_it_was_written(path: Path, flow: CompressibleFlow) -> None:
    again = read_pdebench(path)
    assert again.fields.dtype == torch.float32
    assert torch.equal(again.fields, flow.fields)
    assert len(again) == 3
    for axis in ("t", "x", "y"):
        assert torch.equal(getattr(again, axis), getattr(flow, axis))
    assert (again.eta, again.zeta, again.mach) == (0.02, 0.01, 0.3)


def test_parts_of_a_file(path: Path, flow: CompressibleFlow) -> None:
    part = read_pdebench(path, first=1, samples=2, space_step=4, time_step=2)
    assert torch.equal(part.fields, flow.fields[1:, ::2, :, ::4, ::4])
    assert torch.equal(part.t, flow.t[::2])
    assert torch.equal(part.x, flow.x[::4])
    assert torch.equal(part.y, flow.y[::4])


def test_a_file_whose_times_are_as_many_as_the_data(path: Path, flow: CompressibleFlow) -> None:
    with h5py.File(path, "r+") as file:
        times = file["t-coordinate"][:-1]
        del file["t-coordinate"]
        file["t-coordinate"] = times
    assert torch.equal(read_pdebench(path).t, flow.t)


def _delete(name: str) -> Callable[[h5py.File], None]:
    return lambda file: file.__delitem__(name)


def _replace(name: str, value: object) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        del file[name]
        file[name] = value

    return change


def _attribute(value: object) -> Callable[[h5py.File], None]:
    return lambda file: file.attrs.__setitem__("eta", value)


def _as_group(file: h5py.File) -> None:
    del file["density"]
    file.create_group("density")


def _spoil(file: h5py.File) -> None:
    file["Vx"][0, 0, 0, 0] = np.nan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_delete("Vy"), r"without Vy \(it has: Vx, density"),
        (_delete("t-coordinate"), "without t-coordinate"),
        (lambda file: file.attrs.__delitem__("M"), "without attribute M"),
        (_replace("Vx", np.zeros((3, 5, 16, 8))), r"expected one shape .* got .*\(3, 5, 16, 8\)"),
        (
            _replace("x-coordinate", np.zeros(17)),
            r"expected 16 values of 'x-coordinate', got shape",
        ),
        (_replace("t-coordinate", np.zeros(7)), "expected 5 values of 't-coordinate'"),
        (_as_group, r"expected a dataset 'density', got a Group"),
        (_replace("y-coordinate", h5py.Empty("f4")), "expected 16 values of 'y-coord.*None"),
        (_replace("Vx", np.array([[b"a"] * 3])), r"expected numbers in 'Vx', got dtype \|S1"),
        (_attribute("abc"), "expected a number as attribute 'eta', got 'abc'"),
        (_attribute(np.ones(2)), r"expected a number as attribute 'eta', got \[1\.0, 1\.0\]"),
        (_attribute(math.nan), "expected a number as attribute 'eta', got nan"),
        (_spoil, "expected finite values, 'Vx' has others"),
    ],
    ids=[
        "field",
        "axis",
        "attribute",
        "shapes",
        "grid",
        "times",
        "group",
        "empty",
        "text",
        "viscosity in words",
        "two viscosities",
        "viscosity of nan",
        "nan",
    ],
)
def test_other_layouts_are_refused(
    path: Path, change: Callable[[h5py.File], None], message: str
) -> None:
    with h5py.File(path, "r+") as file:
        change(file)
    with pytest.raises(ValueError, match=message):
        read_pdebench(path)


def test_a_parameter_may_be_an_array_of_one(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file.attrs["eta"] = np.array([0.25], dtype=np.float32)
    assert read_pdebench(path).eta == 0.25


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"fields": torch.ones(3, 5, 3, 16, 8)}, ValueError, r"flow\.fields: expected the shape"),
        ({"fields": torch.ones(3, 5, 4, 16)}, ValueError, r"flow\.fields: expected the shape"),
        ({"fields": np.ones((3, 5, 4, 16, 8))}, TypeError, r"flow\.fields: expected a tensor, got"),
        ({"x": torch.ones(9)}, ValueError, r"flow\.x: expected 16 values, as fields has, got \(9"),
        ({"t": torch.ones(())}, ValueError, r"flow\.t: expected 5 values"),
        ({"eta": "0.1"}, TypeError, r"flow\.eta: expected a number, got '0\.1'"),
    ],
)
def test_a_flow_that_cannot_be_written_leaves_the_file_as_it_was(
    path: Path,
    flow: CompressibleFlow,
    changes: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    before = path.read_bytes()
    with pytest.raises(error, match=message):
        write_pdebench(path, replace(flow, **changes))
    assert path.read_bytes() == before
    with pytest.raises(FileNotFoundError, match="path: expected a file in a folder, got"):
        write_pdebench(path.parent / "none" / "flow.hdf5", flow)


def test_flows_of_one_dimension_are_refused(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "1D.hdf5", "w") as file:
        for name in ("density", "pressure", "Vx"):
            file[name] = np.zeros((2, 3, 8))
        file["x-coordinate"], file["t-coordinate"] = np.zeros(8), np.zeros(4)
        file.attrs.update(eta=0.1, zeta=0.1)
    with pytest.raises(ValueError, match="2D compressible flow, without Vy, y-coordinate, att"):
        read_pdebench(tmp_path / "1D.hdf5")


def test_what_is_no_file_of_flows_is_refused(path: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"path: expected .* got '.*none\.hdf5'"):
        read_pdebench(tmp_path / "none.hdf5")
    (tmp_path / "text.hdf5").write_text("density")
    with pytest.raises(ValueError, match="path: expected an HDF5 file"):
        read_pdebench(tmp_path / "text.hdf5")
    with pytest.raises(ValueError, match=r"samples: expected at most the 3 .* first=2"):
        read_pdebench(path, first=2, samples=2)
    with pytest.raises(ValueError, match="samples: expected at most the 3 flows"):
        read_pdebench(path, first=3)
    with pytest.raises(ValueError, match="space_step: expected an integer of at least 1, got 0"):
        read_pdebench(path, space_step=0)
    with pytest.raises(TypeError, match="samples: expected an integer, got float"):
        read_pdebench(path, samples=1.5)  # type: ignore[arg-type]


def test_without_h5py_the_error_names_the_extra(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = builtins.__import__

    def without(name: str, *args: Any, **options: Any) -> Any:
        if name == "h5py":
            raise ImportError(name)
        return original(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'farms-fast\[sciml\]'"):
        read_pdebench(path)


# ---------------------------------------------------------------------------- the solver

N, K = 32, 2 * math.pi


def grid() -> tuple[torch.Tensor, torch.Tensor]:
    axis = torch.arange(N, dtype=torch.float64) / N
    x, y = torch.meshgrid(axis, axis, indexing="ij")
    return x, y


def vortices(mach: float) -> torch.Tensor:
    x, y = grid()
    return with_pressure(
        torch.sin(K * x) * torch.cos(K * y), -torch.cos(K * x) * torch.sin(K * y), mach
    )


def test_pressure_of_taylor_green_vortices_is_exact() -> None:
    x, y = grid()
    start = vortices(0.2)
    rest = 1 / (ADIABATIC_INDEX * 0.2**2)
    exact = rest + (torch.cos(2 * K * x) + torch.cos(2 * K * y)) / 4
    torch.testing.assert_close(start[1], exact, rtol=0, atol=1e-12)


def test_taylor_green_vortices_decay_as_they_should_up_to_the_mach_number_squared() -> None:
    # The exact incompressible solution: velocities decay as exp(−2νk²t).
    eta, t, errors = 0.02, 0.2, []
    for mach in (0.2, 0.1, 0.05):
        start = vortices(mach)
        end = solve(start[None], [0.0, t], eta, eta)[0, -1]
        exact = start[2:] * math.exp(-2 * eta * K**2 * t)
        errors.append(float((end[2:] - exact).abs().max()))
    assert errors[0] < 0.2**2 / 8
    assert 3 < errors[0] / errors[1] < 5
    assert 3 < errors[1] / errors[2] < 5


def test_a_sound_wave_travels_and_fades_as_linear_theory_says() -> None:
    # p'' + νk² p' + c²k² p = 0 with ν = zeta + 4/3 eta at density 1, up to the amplitude squared.
    mach, eta, zeta, amplitude, t = 0.3, 0.02, 0.01, 1e-6, 0.1
    rest = 1 / (ADIABATIC_INDEX * mach**2)
    x, _ = grid()
    pressure = rest * (1 + amplitude * torch.cos(K * x))
    density = (pressure / rest) ** (1 / ADIABATIC_INDEX)
    still = torch.zeros_like(x)
    start = torch.stack((density, pressure, still, still))[None]
    end = solve(start, [0.0, t], eta, zeta, steps=60)[0, -1]
    fading = (zeta + 4 / 3 * eta) * K**2 / 2
    turning = math.sqrt((K / mach) ** 2 - fading**2)
    exact = math.exp(-fading * t) * (
        math.cos(turning * t) + fading / turning * math.sin(turning * t)
    )
    measured = (end[1] - rest) / (rest * amplitude)
    assert measured[0, 0].item() == pytest.approx(exact, abs=3e-5)
    torch.testing.assert_close(measured, measured[0, 0] * torch.cos(K * x), rtol=0, atol=3e-5)


def test_mass_momentum_and_energy_are_kept_and_runge_kutta_is_of_fourth_order() -> None:
    start = random_flow(2, N, 0.3, seed=2)
    fine = solve(start, [0.0, 0.02], 0.02, 0.02, steps=64)

    def kept(flow: torch.Tensor) -> torch.Tensor:
        density, pressure, u, v = flow.unbind(-3)
        energy = pressure / (ADIABATIC_INDEX - 1) + density * (u * u + v * v) / 2
        return torch.stack((density, density * u, density * v, energy)).mean((-2, -1))

    torch.testing.assert_close(kept(fine[:, -1]), kept(start), rtol=0, atol=1e-13)
    errors = [
        float((solve(start, [0.0, 0.02], 0.02, 0.02, steps=n) - fine).abs().max()) for n in (8, 16)
    ]
    assert 12 < errors[0] / errors[1] < 20


def test_the_resolution_converges_faster_than_any_power() -> None:
    coarse, middle, fine = (solve(_smooth(n), [0.0, 0.1], 0.02, 0.02) for n in (12, 24, 48))
    first = float((coarse - fine[..., ::4, ::4]).abs().max())
    second = float((middle - fine[..., ::2, ::2]).abs().max())
    assert second < first / 50


def _smooth(n: int) -> torch.Tensor:
    axis = torch.arange(n, dtype=torch.float64) / n
    x, y = torch.meshgrid(axis, axis, indexing="ij")
    u = torch.sin(K * y) + 0.5 * torch.cos(2 * K * y)
    return with_pressure(u, torch.cos(K * x), 0.3)[None]


def test_random_flows_are_solenoidal_of_speed_one_and_drawn_by_their_seed() -> None:
    start = random_flow(3, N, 0.3, seed=4)
    u, v = torch.fft.rfft2(start[:, 2:]).unbind(1)
    kx = torch.fft.fftfreq(N, 1 / N, dtype=torch.float64)[:, None]
    ky = torch.fft.rfftfreq(N, 1 / N, dtype=torch.float64)[None]
    assert (kx * u + ky * v).abs().max() < 1e-9
    speeds = start[:, 2:].square().sum(1).mean((-2, -1)).sqrt()
    torch.testing.assert_close(speeds, torch.ones(3, dtype=torch.float64))
    assert torch.equal(random_flow(3, N, 0.3, seed=4), start)
    assert not torch.equal(random_flow(3, N, 0.3, seed=5), start)


def test_a_flow_that_is_not_resolved_is_an_error() -> None:
    start = random_flow(1, 16, 0.3, seed=6)
    start[:, 2:] *= 40
    with pytest.raises(FloatingPointError, match="eta: the flow is not resolved by 16 points"):
        solve(start, [0.0, 1.0], 1e-5, 1e-5, steps=200)
