"""esd: kinds of arrays in and out, known spectra, precision, and every bad argument."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch

import farms_fast
from farms_fast import FixedAspectSampling, FullMatrix, esd
from farms_fast.testing import reference
from tests.support.bounds import error_bound
from tests.support.matrix_zoo import ZOO
from tests.support.purity import left_as_it_was

SAMPLING = FixedAspectSampling(rows=6, q=1.5, per_dim=3)


def gaussian(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def complex_gaussian(*shape: int) -> np.ndarray:
    return gaussian(*shape) + 1j * gaussian(*shape, seed=1)


def pooled(matrix: np.ndarray, sampling: FixedAspectSampling | None) -> np.ndarray:
    """The slow way: window by window, from the reference alone."""
    R, C = matrix.shape
    windows = (
        [(0, 0, R, C)]
        if sampling is None
        else reference.fixed_aspect_windows(R, C, sampling.rows, sampling.q, sampling.per_dim)
    )
    return np.sort(
        np.concatenate(
            [reference.eigenvalues(matrix[r : r + m, c : c + n]) for r, c, m, n in windows]
        )
    )


def assert_spectrum(found: np.ndarray, matrix: np.ndarray, sampling: Any = None) -> None:
    expected = pooled(matrix, sampling)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=error_bound(expected))
    assert (np.diff(found) >= 0).all()


# -------------------------------------------------------------------------------- kinds of arrays


def read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


def field_of_records(array: np.ndarray) -> np.ndarray:
    records = np.zeros(array.shape, dtype=[("weight", "f8"), ("value", array.dtype)])
    records["value"] = array
    return records["value"]


NUMPY_ARRAYS = {
    "float64": gaussian(9, 14),
    "float32": gaussian(9, 14).astype(np.float32),
    "float16": gaussian(9, 14).astype(np.float16),
    "complex64": complex_gaussian(9, 14).astype(np.complex64),
    "complex128": complex_gaussian(9, 14),
    "tall": gaussian(14, 9),
    "read-only": read_only(gaussian(9, 14)),
    "Fortran order": np.asfortranarray(gaussian(9, 14)),
    "transposed": gaussian(14, 9).T,
    "every other": gaussian(18, 28)[::2, 1::2],
    "negative strides": gaussian(9, 14)[::-1, ::-1],
    "broadcast": np.broadcast_to(gaussian(14), (9, 14)),
    "big-endian": gaussian(9, 14).astype(">f4"),
    "big-endian complex": complex_gaussian(9, 14).astype(">c16"),
    "big-endian, read-only, reversed": read_only(gaussian(9, 14).astype(">f8"))[::-1],
    "field of records": field_of_records(gaussian(9, 14)),
    "complex field of records": field_of_records(complex_gaussian(9, 14)),
    "unaligned": np.frombuffer(b"\0" + gaussian(9, 14).tobytes(), offset=1).reshape(9, 14),
    "memory order of another axis": np.moveaxis(gaussian(14, 2, 9), 0, -1)[1],
}


@pytest.mark.parametrize("sampling", [None, SAMPLING], ids=["full", "windows"])
@pytest.mark.parametrize("kind", NUMPY_ARRAYS)
def test_numpy_in_numpy_out(kind: str, sampling: FixedAspectSampling | None) -> None:
    array = NUMPY_ARRAYS[kind]
    with left_as_it_was(array):
        found = esd(array, sampling)
    assert type(found) is np.ndarray
    assert found.dtype == np.float64
    wide = np.complex128 if array.dtype.kind == "c" else np.float64
    assert_spectrum(found, array.astype(wide), sampling)


def torch_tensors() -> dict[str, torch.Tensor]:
    real, imaginary = torch.from_numpy(gaussian(9, 14)), torch.from_numpy(complex_gaussian(9, 14))
    return {
        "float64": real,
        "float32": real.float(),
        "float16": real.half(),
        "bfloat16": real.bfloat16(),
        "complex64": imaginary.to(torch.complex64),
        "conjugate view": imaginary.conj(),
        "adjoint view": imaginary.mH,
        "negative view": imaginary.conj().imag,
        "real part": imaginary.real,
        "transposed": real.mT,
        "every other": real[::2, 1::3],
        "expanded": real[:1].expand(9, 14),
        "offset": real[2:, 3:],
    }


@pytest.mark.parametrize("sampling", [None, SAMPLING], ids=["full", "windows"])
@pytest.mark.parametrize("kind", torch_tensors())
def test_torch_in_torch_out(
    device: torch.device, kind: str, sampling: FixedAspectSampling | None
) -> None:
    tensor = torch_tensors()[kind].to(device)
    with left_as_it_was(tensor):
        found = esd(tensor, sampling)
    assert type(found) is torch.Tensor
    assert (found.dtype, found.device.type) == (torch.float64, device.type)
    wide = torch.complex128 if tensor.is_complex() else torch.float64
    assert_spectrum(
        found.cpu().numpy(), tensor.cpu().to(wide).resolve_conj().resolve_neg().numpy(), sampling
    )


def test_views_are_views() -> None:
    tensors = torch_tensors()
    assert tensors["conjugate view"].is_conj()
    assert tensors["negative view"].is_neg()


def test_no_gradient_flows(device: torch.device) -> None:
    weight = torch.nn.Parameter(torch.from_numpy(gaussian(5, 7)).to(device))
    (weight * 2).sum().backward()
    assert weight.grad is not None
    with left_as_it_was(weight, weight.grad):
        found = esd(weight)
    assert not found.requires_grad
    assert type(found) is torch.Tensor


class OtherArray:
    """An array of a library that this one has never heard of."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def __dlpack__(self, **options: Any) -> Any:
        return self._tensor.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self._tensor.__dlpack_device__()

    def __array_namespace__(self) -> Any:
        return OtherLibrary


class OtherLibrary:
    @staticmethod
    def from_dlpack(array: Any) -> OtherArray:
        return OtherArray(torch.from_dlpack(array))


class ArrayWithoutNamespace:
    def __init__(self, tensor: torch.Tensor) -> None:
        self.__dlpack__ = tensor.__dlpack__
        self.__dlpack_device__ = tensor.__dlpack_device__


def test_dlpack_in_dlpack_out(device: torch.device) -> None:
    tensor = torch.from_numpy(gaussian(9, 14)).to(device)
    with left_as_it_was(tensor):
        found = esd(OtherArray(tensor), SAMPLING)
    assert type(found) is OtherArray
    assert found._tensor.device.type == device.type
    assert_spectrum(found._tensor.cpu().numpy(), gaussian(9, 14), SAMPLING)


def test_dlpack_that_cannot_be_given_back() -> None:
    with pytest.raises(
        TypeError, match=r"^W: expected an array whose library has from_dlpack, got "
    ):
        esd(ArrayWithoutNamespace(torch.ones(2, 2)))
    with pytest.raises(TypeError, match=r"^W: expected .*dtype, got int64$"):
        esd(OtherArray(torch.ones(2, 2, dtype=torch.int64)))


def test_result_is_independent_of_the_argument() -> None:
    array = np.array([[2.0]])
    found = esd(array)
    found[:] = 7
    assert array[0, 0] == 2


# ----------------------------------------------------------------------------- batches and windows


@pytest.mark.parametrize("sampling", [None, SAMPLING], ids=["full", "windows"])
@pytest.mark.parametrize("leading", [(1,), (4,), (2, 3), (2, 1, 2)])
def test_leading_dimensions_are_a_batch(
    leading: tuple[int, ...], sampling: FixedAspectSampling | None
) -> None:
    stack = np.moveaxis(gaussian(9, *leading, 14), 0, -2)
    found = esd(stack, sampling)
    assert found.shape[:-1] == leading
    for index in np.ndindex(*leading):
        assert_spectrum(found[index], stack[index], sampling)


@pytest.mark.parametrize(
    "sampling",
    [
        FixedAspectSampling(rows=8, per_dim=4),
        FixedAspectSampling(rows=5, q=2.0, per_dim=1),
        FixedAspectSampling(rows=9, q=0.4, per_dim=2),
        FixedAspectSampling(),
    ],
    ids=str,
)
def test_windows_are_pooled(sampling: FixedAspectSampling) -> None:
    matrix = gaussian(23, 31)
    assert_spectrum(esd(matrix, sampling), matrix, sampling)


def test_published_windows() -> None:
    matrix = gaussian(23, 31)
    windows = reference.published_windows(23, 31, 7, 1.5, 4)
    expected = [reference.eigenvalues(matrix[r : r + m, c : c + n]) for r, c, m, n in windows]
    found = esd(matrix, FixedAspectSampling(7, 1.5, 4, compat="farms"))
    np.testing.assert_allclose(found, np.sort(np.concatenate(expected)), rtol=1e-10)


def test_full_matrix_is_the_default() -> None:
    np.testing.assert_array_equal(esd(gaussian(4, 6)), esd(gaussian(4, 6), FullMatrix()))


def test_any_grid_will_do() -> None:
    class TopLeft:
        def grid(self, rows: int, columns: int) -> object:
            return FixedAspectSampling(rows=3, per_dim=1).grid(3, 3)

    assert_spectrum(esd(gaussian(5, 7), TopLeft()), gaussian(5, 7)[:3, :3])


# -------------------------------------------------------------------------------- known spectra


def test_diagonal() -> None:
    np.testing.assert_array_equal(esd(np.diag([1.0, -3.0, 2.0])), [1, 4, 9])
    np.testing.assert_array_equal(esd(np.diag([1j, 3.0, -2j])), [1, 4, 9])
    wide = np.zeros((3, 50))
    wide[[0, 1, 2], [7, 40, 3]] = [0.5, 4.0, 1.0]
    np.testing.assert_array_equal(esd(wide), [0.25, 1, 16])
    np.testing.assert_array_equal(esd(wide.T), [0.25, 1, 16])


def test_zero_identity_and_one_element() -> None:
    np.testing.assert_array_equal(esd(np.zeros((4, 9))), np.zeros(4))
    np.testing.assert_array_equal(esd(np.eye(7)), np.ones(7))
    np.testing.assert_array_equal(esd(np.array([[-3.0]])), [9])
    np.testing.assert_allclose(esd(np.array([[3 + 4j]])), [25])


def test_rank_one_and_orthogonal() -> None:
    u, v = gaussian(20), gaussian(30, seed=1)
    found = esd(np.outer(u, v))
    np.testing.assert_allclose(found[-1], u @ u * (v @ v), rtol=1e-13)
    assert (found[:-1] <= error_bound(found)).all()
    orthogonal = np.linalg.qr(gaussian(40, 40))[0]
    np.testing.assert_allclose(esd(3 * orthogonal), np.full(40, 9.0), rtol=1e-13)


def test_transposing_and_scaling() -> None:
    matrix = gaussian(20, 33)
    spectrum = esd(matrix)
    np.testing.assert_allclose(esd(matrix.T), spectrum, rtol=0, atol=error_bound(spectrum))
    for exponent in (-150, -30, 30, 150):
        scaled = esd(matrix * 10.0**exponent)
        np.testing.assert_allclose(scaled / 10.0 ** (2 * exponent), spectrum, rtol=1e-9)


def test_tiny_values_vanish_without_noise() -> None:
    np.testing.assert_array_equal(esd(np.diag([1e-170, 1.0])), [0, 1])


@pytest.mark.parametrize("dtype", ["f2", "f4"])
@pytest.mark.parametrize(
    "shape", [(1, 1023), (1, 4096), (1, 300_000), (2, 1500), (2, 300_000), (8, 60_000), (20, 9_000)]
)
def test_long_windows_keep_the_bound(
    device: torch.device, shape: tuple[int, int], dtype: str
) -> None:
    W = gaussian(*shape).astype(dtype)
    exact = W.astype("f8")
    k = shape[0]
    # Products of such numbers are exact in float64, and so are sums by fsum.
    gram = np.array([[math.fsum(exact[i] * exact[j]) for j in range(k)] for i in range(k)])
    expected = np.linalg.eigvalsh(gram)
    for stack in (torch.from_numpy(W), torch.from_numpy(W.T.copy())):
        found = esd(stack.to(device)).cpu().numpy()
        # On the CPU half of the bound: the sums leave room for what the solver adds. On CUDA the
        # solver's part alone is up to half of it for order 1.
        bound = error_bound(expected) / (2 if device.type == "cpu" else 1)
        np.testing.assert_allclose(found, expected, rtol=0, atol=bound)


@pytest.mark.parametrize(("rows", "columns"), [(300, 1200), (900, 300), (500, 500)])
def test_marchenko_pastur(device: torch.device, rows: int, columns: int) -> None:
    variance = 0.09
    weight = torch.from_numpy(gaussian(rows, columns) * variance**0.5).to(device)
    found = esd(weight).cpu().numpy()
    low, high = reference.marchenko_pastur_edges(rows, columns, variance)
    assert found[-1] == pytest.approx(high, rel=0.03)
    assert found[0] == pytest.approx(low, rel=0.1, abs=1e-4 * high)
    assert found.mean() == pytest.approx(variance * max(rows, columns), rel=0.02)


# ------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("order", [1, 3, 33, 200])
@pytest.mark.parametrize("name", ["gaussian", "student_t", "power_law", "rank_deficient", "zero"])
def test_float32_errs_as_documented(device: torch.device, name: str, order: int) -> None:
    matrix = ZOO[name](order, np.random.default_rng(order)).astype(np.float32)
    found = esd(torch.from_numpy(matrix).to(device), dtype=torch.float32).cpu()
    assert found.dtype == torch.float32
    exact = reference.eigenvalues(matrix)
    np.testing.assert_allclose(found.numpy(), exact, rtol=0, atol=order * 2.0**-23 * exact[-1])


def test_float32_of_other_kinds() -> None:
    assert esd(gaussian(4, 5), dtype=torch.float32).dtype == np.float32
    assert esd(complex_gaussian(4, 5), dtype=torch.float32).dtype == np.float32


def test_float64_is_better_than_float32() -> None:
    matrix = ZOO["power_law"](100, np.random.default_rng(0)).astype(np.float32)
    exact = reference.eigenvalues(matrix)
    errors = [np.abs(esd(matrix, dtype=d) - exact).max() for d in (torch.float32, torch.float64)]
    assert errors[1] < 1e-6 * errors[0]


# ------------------------------------------------------------------------------------- arguments


def test_device_solver_and_memory(device: torch.device) -> None:
    weight = torch.from_numpy(gaussian(3, 40, 60)).to(device)
    expected = esd(weight).cpu().numpy()
    names = farms_fast.build_info()["solvers"][device.type]
    calls = [dict(device=device), dict(device=str(device)), dict(solver="auto"), dict(memory=2**22)]
    calls += [dict(memory="4MiB"), dict(dtype="float64"), dict(dtype=np.float64)]
    for options in calls + [dict(solver=name) for name in names]:
        found = esd(weight, **options).cpu().numpy()
        np.testing.assert_allclose(found, expected, rtol=0, atol=error_bound(expected[0]) * 2)


@pytest.mark.gpu
def test_computing_elsewhere_comes_back() -> None:
    weight = torch.from_numpy(gaussian(9, 14))
    assert esd(weight, device="cuda").device.type == "cpu"
    assert type(esd(weight.numpy(), device="cuda")) is np.ndarray
    found = esd(weight.cuda(), device="cpu")
    assert found.device.type == "cuda"
    assert_spectrum(found.cpu().numpy(), weight.numpy())


@pytest.mark.parametrize(
    ("W", "got"),
    [
        (np.eye(3, dtype=np.int32), "int32"),
        (np.eye(3, dtype=bool), "bool"),
        (np.eye(3).astype(object), "object"),
        (np.eye(3).astype(np.longdouble), str(np.dtype(np.longdouble))),
        (np.eye(3).astype("S3"), r"\|S3"),
        (torch.eye(3, dtype=torch.int64), "int64"),
        (torch.eye(3, dtype=torch.bool), "bool"),
        (torch.eye(3).to(torch.float8_e4m3fn), "float8_e4m3fn"),
    ],
    ids=str,
)
def test_bad_dtype_of_the_array(W: Any, got: str) -> None:
    with pytest.raises(TypeError, match=rf"^W: expected .*dtype, got {got}$"):
        esd(W)


@pytest.mark.parametrize("W", [[[1.0, 2.0]], None, 3.0, "W", torch.nn.Linear(2, 2)], ids=str)
def test_not_an_array(W: Any) -> None:
    message = f"^W: expected .*NumPy array.*torch tensor.*__dlpack__.*, got {type(W).__name__}$"
    with pytest.raises(TypeError, match=message):
        esd(W)


def test_not_a_dense_array() -> None:
    with pytest.raises(TypeError, match=r"^W: expected .*dense.*, got .*sparse_coo$"):
        esd(torch.eye(3).to_sparse())
    with pytest.raises(TypeError, match=r"^W: expected .*mask.*, got .*Masked"):
        esd(np.ma.masked_array(np.eye(3), mask=np.eye(3) == 0))


@pytest.mark.parametrize("shape", [(), (3,)])
def test_too_few_dimensions(shape: tuple[int, ...]) -> None:
    message = rf"^W: expected .*2 dimensions, got shape {re.escape(str(shape))}$"
    for W in (np.ones(shape), torch.ones(shape)):
        with pytest.raises(ValueError, match=message):
            esd(W)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 3, 3), (2, 0, 3)])
def test_empty(shape: tuple[int, ...]) -> None:
    message = rf"^W: expected .*elements, got shape {re.escape(str(shape))}$"
    with pytest.raises(ValueError, match=message):
        esd(np.ones(shape))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, np.complex64])
@pytest.mark.parametrize("place", [(0, 0), (3, 5), (5, 2)])
def test_values_that_are_not_finite(
    device: torch.device, value: float, dtype: type, place: tuple[int, int]
) -> None:
    matrix = gaussian(6, 8).astype(dtype)
    matrix[place] = value
    for W in (matrix, np.stack([np.ones_like(matrix), matrix])):
        tensor = torch.from_numpy(W).to(device)
        for sampling in (None, FixedAspectSampling(rows=3)):
            with pytest.raises(ValueError, match=r"^W: expected finite.*, got NaN"):
                esd(tensor, sampling)


def test_overflow_is_told_from_infinity(device: torch.device) -> None:
    weight = torch.from_numpy(gaussian(6, 8)).to(device)
    message = r"^W: expected .*range of {}, got .*overflow"
    with pytest.raises(ValueError, match=message.format("float64")):
        esd(weight * 1e200)
    with pytest.raises(ValueError, match=message.format("float32")):
        esd(weight * 1e30, dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.complex128, "float16", np.int64, None])
def test_bad_dtype(dtype: Any) -> None:
    message = rf"^dtype: expected torch.float64 or torch.float32, got {re.escape(repr(dtype))}$"
    with pytest.raises(ValueError, match=message):
        esd(np.eye(3), dtype=dtype)


@pytest.mark.parametrize("device", ["tpu", "meta", "", 3.5])
def test_bad_device(device: Any) -> None:
    with pytest.raises(
        ValueError, match=rf"^device: expected cpu, cuda or cuda:N, got {device!r}$"
    ):
        esd(np.eye(3), device=device)


def test_device_that_is_not_there() -> None:
    with pytest.raises(ValueError, match=r"^device: got 'cuda:99', but (this|torch sees)"):
        esd(np.eye(3), device="cuda:99")
    with pytest.raises(ValueError, match=r"^W: expected device cpu or cuda, got meta$"):
        esd(torch.empty(3, 3, device="meta"))


@pytest.mark.parametrize("solver", ["abacus", "LAPACK", "", 3])
def test_bad_solver(solver: Any) -> None:
    message = rf"^solver: expected one of auto, lapack, two_stage on cpu, got {solver!r}$"
    with pytest.raises(ValueError, match=message):
        esd(np.eye(3), solver=solver)


@pytest.mark.parametrize(
    ("memory", "error", "message"),
    [
        (0, ValueError, "an integer of at least 1, got 0"),
        (-5, ValueError, "an integer of at least 1, got -5"),
        (True, ValueError, "an integer of at least 1, got True"),
        (2.5, TypeError, "an integer, got float"),
        ("4 bags", ValueError, "a size such as 40GiB, 500MB or a number of bytes, got '4 bags'"),
    ],
)
def test_bad_memory(memory: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^memory: expected {message}$"):
        esd(np.eye(3), memory=memory)


def test_memory_that_holds_no_matrix() -> None:
    with pytest.raises(ValueError, match=r"^memory: expected at least the \d+ bytes"):
        esd(gaussian(30, 30), memory=1000)


@pytest.mark.parametrize("sampling", [5, "full", (2000, 1.0)])
def test_bad_sampling(sampling: Any) -> None:
    message = (
        r"^sampling: expected FixedAspectSampling.* or FullMatrix.*, "
        f"got {type(sampling).__name__}$"
    )
    with pytest.raises(TypeError, match=message):
        esd(np.eye(3), sampling)


def test_window_that_does_not_fit() -> None:
    message = r"^sampling: expected .*fits 6 x 8, .*FixedAspectSampling\(.*\)"
    with pytest.raises(ValueError, match=message):
        esd(gaussian(6, 8), FixedAspectSampling(q=9.0))
