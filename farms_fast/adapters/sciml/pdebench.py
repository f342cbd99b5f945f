"""Two-dimensional compressible Navier–Stokes data in PDEBench's HDF5 layout.

PDEBench (Takamoto et al., NeurIPS 2022 Datasets and Benchmarks, arXiv 2210.07182) keeps each
quantity of a flow as one dataset `density`, `pressure`, `Vx`, `Vy` of shape
`(samples, times, x, y)`, the grid as `x-coordinate`, `y-coordinate` and `t-coordinate`, and
the parameters as attributes `eta` (shear viscosity), `zeta` (bulk viscosity) and `M` (Mach
number). The published `t-coordinate` has one entry more than there are times.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from farms_fast.core.arguments import check_int, check_type, is_real, path_of
from farms_fast.core.optional import optional_import

__all__ = ["FIELDS", "CompressibleFlow", "read_pdebench", "write_pdebench"]

#: The quantities of a flow, in the order of the channels.
FIELDS = ("density", "pressure", "Vx", "Vy")
_AXES = {"t": "t-coordinate", "x": "x-coordinate", "y": "y-coordinate"}
_PARAMETERS = {"eta": "eta", "zeta": "zeta", "mach": "M"}


@dataclass(frozen=True)
class CompressibleFlow:
    """Flows on one grid, at one viscosity.

    Attributes:
        fields: density, pressure, velocity along x and along y: float32, (N, T, 4, X, Y).
        t: the T times, float32.
        x: the X coordinates, float32.
        y: the Y coordinates, float32.
        eta: shear viscosity.
        zeta: bulk viscosity.
        mach: Mach number.
    """

    fields: torch.Tensor
    t: torch.Tensor
    x: torch.Tensor
    y: torch.Tensor
    eta: float
    zeta: float
    mach: float

    def __len__(self) -> int:
        return self.fields.shape[0]


def read_pdebench(
    path: str | os.PathLike[str],
    *,
    first: int = 0,
    samples: int | None = None,
    space_step: int = 1,
    time_step: int = 1,
) -> CompressibleFlow:
    """Reads flows of a PDEBench file, and only those that are asked for.

    Args:
        path: the HDF5 file, such as `2D_CFD_Rand_M0.1_Eta0.01_Zeta0.01_periodic_128_Train.hdf5`.
        first: index of the first flow.
        samples: how many flows to read, None for all from `first` on.
        space_step: take every so many points in both dimensions.
        time_step: take every so many times.

    Raises:
        ImportError: h5py is not installed.
        FileNotFoundError: there is no such file.
        ValueError: the file has another layout (the message names what is missing or does not
            fit), has fewer flows, or holds a value that is not finite.
        TypeError: a count is not an integer, or `path` is no path.

    Example:
        >>> import pathlib, tempfile, torch
        >>> flow = CompressibleFlow(torch.ones(3, 2, 4, 8, 8), torch.arange(2.0),
        ...                         torch.arange(8.0), torch.arange(8.0), 0.01, 0.01, 0.1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "flow.hdf5")
        ...     write_pdebench(path, flow)
        ...     again = read_pdebench(path, samples=2, space_step=4)
        >>> again.fields.shape, again.eta
        (torch.Size([2, 2, 4, 2, 2]), 0.01)
    """
    file_path, text = path_of("path", path), os.fspath(path)
    h5py = _h5py()
    start = check_int("first", first)
    count = None if samples is None else check_int("samples", samples, least=1)
    space, time = check_int("space_step", space_step, 1), check_int("time_step", time_step, 1)
    if not file_path.is_file():
        raise FileNotFoundError(f"path: expected an HDF5 file, got {text!r}")
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise ValueError(f"path: expected an HDF5 file, got {text!r} ({error})") from None
    with file:
        n, times, rows, columns = _layout(file, text, h5py.Dataset)
        parameters = [_parameter(file, name, text) for name in _PARAMETERS.values()]
        stop = n if count is None else start + count
        if start >= n or stop > n:
            raise ValueError(
                f"samples: expected at most the {n} flows of {text!r}, "
                f"got first={start}, samples={count}"
            )
        pick = (slice(start, stop), slice(None, None, time), *2 * (slice(None, None, space),))
        try:
            parts = [np.asarray(file[name][pick], dtype=np.float32) for name in FIELDS]
            t, x, y = (np.asarray(file[name], dtype=np.float32) for name in _AXES.values())
        except OSError as error:  # cut off, or damaged
            raise ValueError(f"{text}: cannot be read ({error})") from error
    for name, part in zip(FIELDS, parts, strict=True):
        if not np.isfinite(part).all():
            raise ValueError(f"{text}: expected finite values, {name!r} has others")
    fields = torch.from_numpy(np.stack(parts, axis=2))
    axes = (t[:times:time], x[:rows:space], y[:columns:space])
    t_axis, x_axis, y_axis = (torch.from_numpy(axis.copy()) for axis in axes)
    return CompressibleFlow(fields, t_axis, x_axis, y_axis, *parameters)


def write_pdebench(path: str | os.PathLike[str], flow: CompressibleFlow) -> None:
    """Writes flows in the same layout, with one more time in `t-coordinate`, as published.

    Args:
        path: the file; one that exists is replaced.
        flow: what to write.

    Raises:
        ImportError: h5py is not installed.
        TypeError: an argument or an entry of the flow is of another kind.
        ValueError: fields and coordinates do not fit together; no file is touched then.
        FileNotFoundError: the folder does not exist.
    """
    target = path_of("path", path)
    check_type("flow", flow, CompressibleFlow, "a CompressibleFlow")
    _check_flow(flow)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"path: expected a file in a folder, got {os.fspath(path)!r}")
    t = flow.t.double()
    spacing = t[-1] - t[-2] if t.numel() > 1 else torch.ones(())
    axes = (torch.cat((t, t[-1:] + spacing)), flow.x, flow.y)
    with _h5py().File(target, "w") as file:
        for channel, name in enumerate(FIELDS):
            file.create_dataset(name, data=flow.fields[:, :, channel].float().cpu().numpy())
        for name, axis in zip(_AXES.values(), axes, strict=True):
            file.create_dataset(name, data=axis.float().cpu().numpy())
        for entry, name in _PARAMETERS.items():
            file.attrs[name] = getattr(flow, entry)


def _check_flow(flow: CompressibleFlow) -> None:
    """Raises TypeError or ValueError for a flow that is not as `CompressibleFlow` says."""
    for name in ("fields", *_AXES):
        check_type(f"flow.{name}", getattr(flow, name), torch.Tensor, "a tensor")
    for name in _PARAMETERS:
        value = getattr(flow, name)
        if not is_real(value):
            raise TypeError(f"flow.{name}: expected a number, got {value!r}")
    shape = tuple(flow.fields.shape)
    if len(shape) != 5 or shape[2] != len(FIELDS) or 0 in shape:
        raise ValueError(
            f"flow.fields: expected the shape (samples, times, {len(FIELDS)}, x, y), got {shape}"
        )
    for name, size in zip(_AXES, (shape[1], *shape[3:]), strict=True):
        axis = tuple(getattr(flow, name).shape)
        if axis != (size,):
            raise ValueError(f"flow.{name}: expected {size} values, as fields has, got {axis}")


def _parameter(file: Any, name: str, path: str) -> float:
    """An attribute that is one finite number; ValueError for anything else."""
    value = np.asarray(file.attrs[name])
    if value.size != 1 or value.dtype.kind not in "iuf" or not np.isfinite(value).all():
        raise ValueError(f"{path}: expected a number as attribute {name!r}, got {value.tolist()!r}")
    return float(value.item())


def _layout(file: Any, path: str, dataset: Any) -> tuple[int, int, int, int]:
    """The shape that all quantities have; ValueError for any other layout."""
    datasets = (*FIELDS, *_AXES.values())
    missing = [name for name in datasets if name not in file]
    missing += [f"attribute {name}" for name in _PARAMETERS.values() if name not in file.attrs]
    if missing:
        raise ValueError(
            f"{path}: expected PDEBench's layout of 2D compressible flow, without"
            f" {', '.join(missing)} (it has: {', '.join(sorted(file)) or 'nothing'})"
        )
    for name in datasets:
        entry = file[name]
        if not isinstance(entry, dataset):
            raise ValueError(f"{path}: expected a dataset {name!r}, got a {type(entry).__name__}")
        if entry.dtype.kind not in "iuf":
            raise ValueError(f"{path}: expected numbers in {name!r}, got dtype {entry.dtype}")
    shapes = {name: tuple(file[name].shape or ()) for name in FIELDS}
    shape = shapes[FIELDS[0]]
    if len(shape) != 4 or 0 in shape or len(set(shapes.values())) > 1:
        raise ValueError(f"{path}: expected one shape (samples, times, x, y) for all, got {shapes}")
    for name, size in zip(_AXES.values(), shape[1:], strict=True):
        got = file[name].shape
        if got != (size,) and (name != "t-coordinate" or got != (size + 1,)):
            raise ValueError(f"{path}: expected {size} values of {name!r}, got shape {got}")
    return shape  # type: ignore[return-value]


def _h5py() -> Any:
    with optional_import("h5py", extra="sciml", needed_for="PDEBench's files"):
        import h5py
    return h5py
