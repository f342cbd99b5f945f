"""The ops as ops: schemas, fake kernels, compilation, checks, streams, and the Gram op's values."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from farms_fast.core import ops
from farms_fast.spectra.windows import FixedAspectSampling, window_table
from farms_fast.testing import reference

DTYPES = [
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
]


def sample(device: torch.device, dtype: torch.dtype = torch.float32) -> tuple:
    """Two weights, their windows, and the windows' order."""
    torch.manual_seed(0)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    weights = [torch.randn(s, dtype=wide).to(dtype) for s in ((2, 30, 44), (1, 60, 30))]
    sampling = FixedAspectSampling(rows=20, q=1.5, per_dim=2)
    table = torch.cat(
        [window_table(sampling.grid(*w.shape[1:]), w.shape[0], i) for i, w in enumerate(weights)]
    )
    return [w.to(device) for w in weights], table, 20


def op_calls(device: torch.device) -> dict[str, tuple]:
    weights, table, order = sample(device)
    gram = ops.window_gram(weights, table, order)
    evals = torch.rand(50, dtype=torch.float64, device=device).sort().values + 0.1
    offsets = torch.tensor([0, 20, 50], device=device)
    return {
        "window_gram": (weights, table, order, torch.float64),
        "eigvalsh": (gram, "auto", 0),
        "window_eigvalsh": (weights, table, order, torch.float32, "auto", 0),
        "fit_power_law": (evals[:20].repeat(2), offsets[:2] * 2, "ks", 2.0, 100, False),
    }


@pytest.mark.parametrize("name", ["window_gram", "eigvalsh", "window_eigvalsh", "fit_power_law"])
def test_opcheck(device: torch.device, name: str) -> None:
    torch.library.opcheck(getattr(torch.ops.farms_fast, name).default, op_calls(device)[name])


@pytest.mark.parametrize("name", ["window_gram", "eigvalsh", "window_eigvalsh", "fit_power_law"])
def test_compiles_without_graph_breaks(device: torch.device, name: str) -> None:
    call, arguments = getattr(torch.ops.farms_fast, name), op_calls(device)[name]
    # "aot_eager" traces forward and fake kernels without needing a compiler at run time.
    compiled = torch.compile(lambda *a: call(*a), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), call(*arguments), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("precision", [torch.float32, torch.float64], ids=str)
def test_gram_against_numpy(
    device: torch.device, dtype: torch.dtype, precision: torch.dtype
) -> None:
    weights, table, order = sample(torch.device("cpu"), dtype)
    found = ops.window_gram([w.to(device) for w in weights], table, order, precision).cpu().numpy()
    assert found.shape == (len(table), order, order)
    for gram, (weight, entry, row, column, rows, columns) in zip(
        found, table.tolist(), strict=True
    ):
        window = weights[weight][entry, row : row + rows, column : column + columns]
        wide = torch.complex128 if dtype.is_complex else torch.float64
        expected = reference.gram(window.to(wide).numpy())
        eps = float(torch.finfo(precision).eps)
        scale = float(np.abs(np.diag(expected)).max())
        assert np.abs(gram - expected).max() <= 4 * max(rows, columns) * eps * scale
        assert np.array_equal(gram, gram.conj().T)


@pytest.mark.parametrize("order", [1, 15, 16, 17, 63, 64, 65, 127, 130, 200])
@pytest.mark.parametrize("inner", [1, 7, 16, 33, 250])
def test_gram_of_every_tile_remainder(device: torch.device, order: int, inner: int) -> None:
    inner += order  # a square window's transpose would have other vectors
    weight = torch.randn(2, order, inner, dtype=torch.float64)
    for stack in (weight, weight.mT):
        table = torch.tensor([[0, s, 0, 0, *stack.shape[1:]] for s in (1, 0)])
        found = ops.window_gram([stack.to(device)], table, order).cpu()
        expected = (weight @ weight.mT).flip(0)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-15 * 8 * inner * 10)


def test_no_windows_give_empty_results(device: torch.device) -> None:
    weights, table, order = sample(device)
    assert ops.window_gram(weights, table[:0], order).shape == (0, order, order)
    assert ops.window_eigvalsh(weights, table[:0], order).shape == (0, order)
    empty = torch.empty(0, dtype=torch.float64, device=device)
    offsets = torch.zeros(1, dtype=torch.int64, device=device)
    assert all(len(part) == 0 for part in ops.fit_power_law(empty, offsets))


def bad_calls(device: torch.device) -> dict[str, tuple]:
    weights, table, order = sample(device)
    gram = torch.eye(4, device=device).expand(2, 4, 4).contiguous()
    outside = table.clone()
    outside[0, 2] = 11
    evals = torch.ones(4, dtype=torch.float64, device=device)
    offsets = torch.tensor([0, 4], device=device)
    call = torch.ops.farms_fast
    f64 = torch.float64
    return {
        r"'weights': expected at least one": (call.window_gram, [], table, order, f64),
        r"'weights': expected stacks of 3": (call.window_gram, [weights[0][0]], table, order, f64),
        r"'weights': expected one dtype": (
            call.window_gram,
            [weights[0], weights[1].double()],
            table,
            order,
            f64,
        ),
        r"'weights': expected float16, .* got Int": (
            call.window_gram,
            [w.int() for w in weights],
            table,
            order,
            f64,
        ),
        r"'windows': expected a contiguous int64": (
            call.window_gram,
            weights,
            table[:, :5],
            order,
            f64,
        ),
        r"'windows': expected a window inside a stack of shape \(2, 30, 44\).*row 11": (
            call.window_gram,
            weights,
            outside,
            order,
            f64,
        ),
        r"'windows': expected windows of order 19, got one of size 20 x 30": (
            call.window_eigvalsh,
            weights,
            table,
            19,
            f64,
            "auto",
            0,
        ),
        r"'order': expected a positive order, got 0": (call.window_gram, weights, table, 0, f64),
        r"'dtype': expected float64 or float32, got Half": (
            call.window_gram,
            weights,
            table,
            order,
            torch.float16,
        ),
        r"'solver': expected one of auto, .*, got qr": (call.eigvalsh, gram, "qr", 0),
        r"'gram': expected a batch of square": (call.eigvalsh, gram[0], "auto", 0),
        r"'gram': expected a contiguous": (call.eigvalsh, gram.mT[:, 1:, 1:], "auto", 0),
        r"'gram': expected float32, .* got Half": (call.eigvalsh, gram.half(), "auto", 0),
        r"'memory_budget': expected bytes.* got -1": (call.eigvalsh, gram, "auto", -1),
        r"'rule': expected one of median, ks, peak, got best": (
            call.fit_power_law,
            evals,
            offsets,
            "best",
            2.0,
            100,
            False,
        ),
        r"'evals': expected a contiguous float64": (
            call.fit_power_law,
            evals.float(),
            offsets,
            "ks",
            2.0,
            100,
            False,
        ),
        r"'xmin_pos': expected a finite number above 1, got 1": (
            call.fit_power_law,
            evals,
            offsets,
            "ks",
            1.0,
            100,
            False,
        ),
        r"'bins': expected at least 1, got 0": (
            call.fit_power_law,
            evals,
            offsets,
            "peak",
            2.0,
            0,
            False,
        ),
    }


@pytest.mark.parametrize("message", bad_calls(torch.device("cpu")))
def test_bad_arguments_are_named(device: torch.device, message: str) -> None:
    call, *arguments = bad_calls(device)[message]
    with pytest.raises(RuntimeError, match=r"farms_fast\.\w+: argument " + message):
        call(*arguments)


@pytest.mark.gpu
def test_runs_on_the_current_stream_of_the_weights_device() -> None:
    weights, table, order = sample(torch.device("cuda"))
    expected = ops.window_eigvalsh(weights, table, order)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        # Without stream order the op would read what the long fill has not yet overwritten.
        late = [torch.full_like(w, float("nan")) for w in weights]
        torch.cuda._sleep(50_000_000)
        for target, weight in zip(late, weights, strict=True):
            target.copy_(weight)
        found = ops.window_eigvalsh(late, table, order)
    side.synchronize()
    assert torch.equal(found, expected)


@pytest.mark.gpu
def test_gram_and_fit_can_be_captured_in_a_graph() -> None:
    weights, table, order = sample(torch.device("cuda"))
    evals = torch.rand(500, dtype=torch.float64, device="cuda").sort().values + 0.5
    offsets = torch.tensor([0, 200, 500], device="cuda")

    def work() -> tuple[torch.Tensor, ...]:
        return ops.window_gram(weights, table, order), *ops.fit_power_law(evals, offsets, "ks")

    expected = [part.clone() for part in work()]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = work()
    for part in captured:
        part.zero_()
    graph.replay()
    torch.cuda.synchronize()
    for found, wanted in zip(captured, expected, strict=True):
        assert torch.equal(found, wanted)


def test_no_memory_for_a_result_is_torchs_own_error(device: torch.device) -> None:
    weight = torch.ones(1, 2000, 2000, device=device)
    # 25 PB, which no allocator has.
    table = torch.tensor([[0, 0, 0, 0, 2000, 2000]]).expand(800_000, -1).contiguous()
    with pytest.raises(torch.OutOfMemoryError, match=r"of shape \(800000, 2000, 2000\)"):
        ops.window_gram([weight], table, 2000)
    # Nothing is wrong afterwards.
    assert ops.window_gram([weight], table[:1], 2000)[0, 0, 0] == 2000
