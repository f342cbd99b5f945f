"""esd and fit_power_law against SciPy and the powerlaw package, and CuPy's streams."""

from __future__ import annotations

import contextlib
import io
import sys
import types
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch

from farms_fast import esd, fit_power_law
from farms_fast.core.arrays import on_stream_of
from tests.support.matrix_zoo import ZOO, error_bound

# ------------------------------------------------------------------------------------------- SciPy


@pytest.mark.parametrize("driver", ["gesdd", "gesvd"])
@pytest.mark.parametrize("name", sorted(set(ZOO) - {"huge", "tiny"}))
def test_spectra_are_scipys(name: str, driver: str) -> None:
    matrix = ZOO[name](40, np.random.default_rng(3))[:, :30]
    singular = scipy.linalg.svd(matrix, compute_uv=False, lapack_driver=driver)
    expected = singular[::-1] ** 2
    assert np.abs(esd(matrix) - expected).max() <= 2 * error_bound(expected)


@pytest.mark.parametrize("driver", ["ev", "evd", "evr", "evx"])
def test_spectra_are_those_of_scipys_eigh(driver: str) -> None:
    matrix = np.random.default_rng(4).standard_t(3, (50, 80))
    expected = scipy.linalg.eigh(matrix @ matrix.T, eigvals_only=True, driver=driver)
    assert np.abs(esd(matrix) - expected).max() <= 4 * error_bound(expected)


# ---------------------------------------------------------------------------------------- powerlaw


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The package prints as it goes, and warns of divisions at the last values."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def spectra() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(5)
    square = generator.standard_normal((90, 90))
    heavy = generator.standard_t(2.5, (60, 200))
    return {
        "Pareto": np.sort(1 + generator.pareto(1.5, 300)),
        "lognormal": np.sort(generator.lognormal(0, 1.5, 250)),
        "square Gaussian": esd(square),
        "Student t": esd(heavy),
        "bulk and tail": np.sort(
            np.concatenate([generator.uniform(0.1, 1, 150), 1 + generator.pareto(2.0, 60)])
        ),
    }


@pytest.mark.parametrize("name", sorted(spectra()))
def test_the_ks_rule_is_that_of_powerlaw(name: str) -> None:
    with quiet():
        import powerlaw
    evals = spectra()[name]
    with quiet():
        expected = powerlaw.Fit(evals, verbose=False)
    found = fit_power_law(evals, "ks")
    assert found.status == "ok"
    assert found.xmin == pytest.approx(expected.xmin, rel=1e-12)
    assert found.alpha == pytest.approx(expected.alpha, rel=1e-9)
    assert pytest.approx(expected.D, rel=1e-9) == found.D
    assert found.sigma == pytest.approx(expected.sigma, rel=1e-9)


@pytest.mark.parametrize("name", sorted(spectra()))
def test_the_median_rules_tail_is_that_of_powerlaw(name: str) -> None:
    with quiet():
        import powerlaw
    evals = spectra()[name]
    found = fit_power_law(evals, "median")
    with quiet():
        expected = powerlaw.Fit(evals, xmin=evals[len(evals) // 2], verbose=False)
    assert found.alpha == pytest.approx(expected.alpha, rel=1e-9)
    assert pytest.approx(expected.D, rel=1e-9) == found.D
    assert found.n_tail == len(evals) - len(evals) // 2


# -------------------------------------------------------------------------------------------- CuPy


@pytest.mark.parametrize("pointer", [0, 1, 0x7F00])
def test_work_goes_to_cupys_current_stream(monkeypatch: pytest.MonkeyPatch, pointer: int) -> None:
    """With stand-ins for CuPy and for torch's streams, so that it runs without a GPU."""
    events: list[Any] = []

    @contextlib.contextmanager
    def entered(what: Any) -> Iterator[None]:
        events.append(("in", what))
        yield
        events.append(("out", what))

    fake = types.ModuleType("cupy")
    fake.cuda = types.SimpleNamespace(  # type: ignore[attr-defined]
        Device=lambda index: entered(f"device {index}"),
        get_current_stream=lambda: types.SimpleNamespace(ptr=pointer),
    )
    monkeypatch.setitem(sys.modules, "cupy", fake)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda index: f"default of {index}")
    monkeypatch.setattr(
        torch.cuda, "ExternalStream", lambda pointer, device: f"{pointer:#x} of {device}"
    )
    monkeypatch.setattr(torch.cuda, "stream", entered)
    ndarray = type("ndarray", (), {"__module__": "cupy._core.core"})
    array = ndarray()
    array.device = types.SimpleNamespace(id=3)
    with on_stream_of(array):
        events.append("work")
    stream = "default of 3" if pointer < 2 else "0x7f00 of 3"
    assert events == [
        ("in", "device 3"),
        ("out", "device 3"),
        ("in", stream),
        "work",
        ("out", stream),
    ]


@pytest.fixture
def cupy() -> Any:
    return pytest.importorskip("cupy", reason="CuPy is not installed (farms-fast[cupy])")


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(40, 60), (3, 200, 100)])
def test_cupy_in_cupy_out_on_a_stream_of_its_own(cupy: Any, shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(6).standard_normal(shape)
    expected = np.linalg.svd(values, compute_uv=False)[..., ::-1] ** 2
    before = torch.cuda.current_stream()
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        W = cupy.zeros(shape)
        busy = cupy.ones((4000, 4000))
        for _ in range(20):
            busy = busy @ busy / 4000
        # What is written late on this stream must be waited for, and what is written after the
        # call must not be seen.
        W += cupy.asarray(values) * busy[0, 0]
        evals = esd(W)
        W.fill(0)
        fit = fit_power_law(evals.ravel(), "median")
    assert isinstance(evals, cupy.ndarray)
    assert evals.device == W.device
    assert torch.cuda.current_stream() == before
    stream.synchronize()
    np.testing.assert_allclose(evals.get(), expected, rtol=0, atol=1e-11 * expected.max())
    assert fit.alpha == pytest.approx(fit_power_law(expected.ravel(), "median").alpha, rel=1e-9)


@pytest.mark.gpu
def test_cupys_memory_is_read_where_it_is(cupy: Any) -> None:
    from farms_fast.core.arrays import to_tensor

    W = cupy.arange(12.0).reshape(3, 4)
    with on_stream_of(W):
        tensor, restore = to_tensor("W", W)
        back = restore(tensor)
    assert tensor.data_ptr() == W.data.ptr == back.data.ptr
