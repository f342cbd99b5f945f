"""The ops as ops: schemas, fake kernels, compilation, checks, streams, and the Gram op's values."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch

from farms_fast.core import extension, ops
from farms_fast.spectra.windows import FixedAspectSampling, FullMatrix, window_table
from farms_fast.testing import reference

DTYPES = [
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
]


OPS = ["window_gram", "eigvalsh", "window_eigvalsh", "fit_power_law", "drop_rounding"]


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
        "drop_rounding": (evals.view(5, 10),),
    }


@pytest.mark.parametrize("name", OPS)
def test_opcheck(device: torch.device, name: str) -> None:
    torch.library.opcheck(getattr(torch.ops.farms_fast, name).default, op_calls(device)[name])


@pytest.mark.parametrize("name", OPS)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_what_is_zero_but_for_rounding(device: torch.device, dtype: torch.dtype) -> None:
    order = 50
    share = 8 * order * torch.finfo(dtype).eps
    rows = torch.zeros(6, order, dtype=torch.float64)
    for row, largest in enumerate((1.0, 3.0, 1e-30, 1e30)):
        values = torch.tensor([0.0, 0.5, 0.99, 1.01, 2.0]) * share * largest
        rows[row, -6:-1], rows[row, -1] = values, largest
    # A window of zeros, and one that is not finite.
    rows[5] = torch.linspace(0, 1, order)
    rows[5, -1] = torch.inf
    evals = rows.to(device, dtype)
    found = ops.drop_rounding(evals)
    assert (found.dtype, found.device) == (dtype, evals.device)
    expected = evals.clone()
    expected[:4, :-3] = 0
    assert torch.equal(found, expected)
    slow = reference.drop_rounding(evals.cpu().numpy(), torch.finfo(dtype).eps)
    np.testing.assert_array_equal(found.cpu().numpy(), slow)
    nothing = torch.full((2, order), torch.nan, dtype=dtype, device=device)
    assert ops.drop_rounding(nothing).isnan().all()
    assert ops.drop_rounding(evals[:0]).shape == (0, order)


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
        r"'least_spread': expected a contiguous float64 tensor of shape \(1,\), got Double of 2": (
            call.fit_power_law,
            evals,
            offsets,
            "ks",
            2.0,
            100,
            False,
            evals[:2],
        ),
        r"'evals': expected a contiguous float32 or float64 .*, got Double of 1": (
            call.drop_rounding,
            evals,
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


H200 = {"device": "cuda", "compute_capability": 90}
GRAM_DTYPES = [torch.float64, torch.float32, torch.complex128, torch.complex64]
SIZES = [(1, 1), (100, 150), (161, 161), (255, 300), (256, 256), (512, 600), (3500, 3600)]


def two_stage_bytes_on_a_cpu(order: int, inner: int, item: int) -> int:
    """A thread's: the window, its Gram matrix, panels or band, and the tridiagonal matrix."""
    panels = 4 * order * 32 + 7 * 32**2
    band = (order + 32) * 64 + order + 3 * 32
    return (order * (order + inner) + max(panels, band)) * item + 2 * 8 * order


def two_stage_bytes_on_cuda(count: int, order: int, dtype: torch.dtype) -> int:
    """The Gram matrices and the workspace of all of them."""
    n = 2 * order if dtype.is_complex else order
    padded, square = -(-n // 64) * 64, 32**2
    arrays = 5 * [padded * 32]  # V and W of two panels, A V
    arrays += [square, padded // 64 * 3 * square, 3 * square, 1]  # T, sums by tile, sums, done
    arrays += [(-(-n // 4) * 4 + 64) * 64]  # the band
    arrays += [(n + 8) * 8]  # the narrow band
    arrays += [32]  # flags of blocks that wait for each other
    arrays += [n, n]  # the tridiagonal matrix
    if dtype != torch.float64:
        arrays += [n * n]  # the matrix as a real one in float64
    workspace = sum(-(-count * doubles * 8 // 256) * 256 for doubles in arrays)
    return count * order**2 * dtype.itemsize + workspace


@pytest.mark.parametrize("dtype", GRAM_DTYPES, ids=str)
@pytest.mark.parametrize(("order", "inner"), SIZES)
def test_facts_of_a_cpu(order: int, inner: int, dtype: torch.dtype) -> None:
    one = ops.solver_facts(order, inner, dtype=dtype)
    two_stage = order >= 256 and not dtype.is_complex
    assert one.solver == ("two_stage" if two_stage else "lapack")
    assert one.matrix_bytes == order**2 * dtype.itemsize
    if two_stage:
        assert one.bytes == two_stage_bytes_on_a_cpu(order, inner, dtype.itemsize)
    else:
        assert one.bytes == order * (order + inner) * dtype.itemsize
    # One more thread for each.
    nine = ops.solver_facts(order, inner, dtype=dtype, count=9)
    assert (nine.solver, nine.max_batch, nine.bytes) == (one.solver, 9, 9 * one.bytes)


@pytest.mark.parametrize("dtype", GRAM_DTYPES, ids=str)
@pytest.mark.parametrize("order", [161, 257, 512, 1000, 2000, 2048, 2049, 5000, 8193, 16385])
def test_facts_of_many_windows_on_an_h200(order: int, dtype: torch.dtype) -> None:
    facts = ops.solver_facts(order, dtype=dtype, count=500, **H200)
    largest = 8192 if dtype.is_complex else 16384
    assert facts.solver == ("two_stage" if order <= largest else "cusolver")
    for count in (1, 2, 17):
        few = ops.solver_facts(order, dtype=dtype, count=count, **(H200 | {"solver": facts.solver}))
        assert few.max_batch == min(count, facts.max_batch)
        if facts.solver == "two_stage":
            assert few.bytes == two_stage_bytes_on_cuda(count, order, dtype)
        else:
            assert few.bytes == few.max_batch * (2 * order**2 * dtype.itemsize + 2**20)


@pytest.mark.parametrize("dtype", GRAM_DTYPES, ids=str)
def test_small_windows_take_nothing_on_an_h200(dtype: torch.dtype) -> None:
    for order in (1, 32, 80) if dtype.is_complex else (1, 100, 160):
        facts = ops.solver_facts(order, dtype=dtype, count=10_000, **H200)
        assert facts == ("one_stage", 10_000, 0, 0)
    # Few larger ones are read by clusters, and yet larger ones as Gram matrices in float64.
    scale = 2 if dtype.is_complex else 1
    assert ops.solver_facts(256 // scale, dtype=dtype, count=9, **H200) == ("one_stage", 9, 0, 0)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    found = ops.solver_facts(512 // scale, dtype=dtype, count=9, **H200)
    assert found == ("one_stage", 9, (512 // scale) ** 2 * wide.itemsize, 0)


@pytest.mark.parametrize(
    ("capability", "one_stage", "two_stage"),
    [
        (75, 104, 0),
        (80, 160, 16384),
        (86, 128, 16384),
        (89, 128, 16384),
        (90, 512, 16384),
        (100, 512, 16384),
        (120, 128, 16384),
    ],
)
def test_largest_orders_of_other_architectures(
    capability: int, one_stage: int, two_stage: int
) -> None:
    for solver, largest in (("one_stage", one_stage), ("two_stage", two_stage)):
        for dtype, order in ((torch.float64, largest), (torch.complex64, largest // 2)):
            settings = {"dtype": dtype, "device": "cuda", "compute_capability": capability}
            if order:
                assert ops.solver_facts(order, **settings, solver=solver).solver == solver
            with pytest.raises(RuntimeError, match=f"order {order + 1} .* takes up to {order}"):
                ops.solver_facts(order + 1, **settings, solver=solver)


@pytest.mark.parametrize("count", [3, 1000])
@pytest.mark.parametrize("capability", [80, 86, 89, 120])
def test_an_ampere_or_later_without_measurements_gets_the_packages_solvers(
    capability: int, count: int
) -> None:
    def solver(order: int, dtype: torch.dtype = torch.float64) -> str:
        told = {"dtype": dtype, "count": count, "compute_capability": capability}
        return ops.solver_facts(order, device="cuda", **told).solver

    in_a_block = 160 if capability == 80 else 128
    assert solver(in_a_block) == "one_stage"
    assert solver(in_a_block // 2, torch.complex128) == "one_stage"
    assert solver(in_a_block + 1) == "two_stage"
    assert solver(in_a_block // 2 + 1, torch.complex64) == "two_stage"
    assert solver(16384) == "two_stage"
    assert solver(16385) == "cusolver"


@pytest.mark.parametrize("capability", [80, 86, 89, 120])
def test_one_or_two_complex_matrices_get_cusolver(capability: int) -> None:
    told = {"device": "cuda", "compute_capability": capability}
    for count in (1, 2, 3):
        facts = ops.solver_facts(500, dtype=torch.complex128, count=count, **told)
        assert facts.solver == ("cusolver" if count < 3 else "two_stage")
        assert ops.solver_facts(1000, count=count, **told).solver == "two_stage"


@pytest.mark.parametrize("capability", [50, 61, 70, 75])
def test_an_architecture_before_ampere_gets_cusolver(capability: int) -> None:
    for order in (10, 100, 1000):
        facts = ops.solver_facts(order, device="cuda", compute_capability=capability, count=1000)
        assert facts.solver == "cusolver"
        assert facts.bytes > min(1000, facts.max_batch) * order**2 * 8


def test_data_centre_blackwell_chooses_as_hopper() -> None:
    for capability in (100, 103):
        for order in (100, 300, 2000, 16385):
            for count in (1, 20, 1000):
                told = {"device": "cuda", "count": count}
                there = ops.solver_facts(order, compute_capability=capability, **told)
                assert there == ops.solver_facts(order, compute_capability=90, **told)


def test_workspace_never_shrinks_with_the_batch() -> None:
    for solver in ("cusolver", "one_stage", "two_stage"):
        sizes = [
            ops.solver_facts(300, count=count, solver=solver, **H200).workspace_bytes
            for count in range(1, 70)
        ]
        assert sizes == sorted(sizes)


@pytest.mark.gpu
def test_facts_of_this_gpu() -> None:
    capability = ops.compute_capability()
    major, minor = torch.cuda.get_device_capability()
    assert 50 <= capability <= 10 * major + minor
    for order, count in ((100, 1000), (300, 9), (2000, 20)):
        here = ops.solver_facts(order, count=count, device="cuda")
        told = ops.solver_facts(order, count=count, device="cuda", compute_capability=capability)
        assert here[:3] == told[:3]
        assert here.solver == "cusolver" or here == told
        stack = torch.randn(count, order, order, dtype=torch.float64, device="cuda")
        table = window_table(FullMatrix().grid(order, order), count)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        ops.window_eigvalsh([stack], table, order)
        results = count * (8 * order + 48)
        taken = torch.cuda.max_memory_allocated() - before
        assert taken <= here.bytes + results + 2**20


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        (r"'device': expected cpu or cuda, got tpu", {"device": "tpu"}),
        (r"'count': expected a positive number of windows, got 0", {"count": 0}),
        (r"'order': expected a positive order, got 0", {"order": 0, "inner": 0}),
        (r"'inner': expected the longer side of windows of order 20, got 19", {"inner": 19}),
        (r"'dtype': expected float32, .* got Half", {"dtype": torch.float16}),
        (r"'compute_capability': expected 10 \* major \+ minor", H200 | {"compute_capability": 9}),
        (r"'solver': expected one of auto, lapack, two_stage on the CPU", {"solver": "cusolver"}),
        (r"'solver': expected one of auto, cusolver, .* on CUDA", H200 | {"solver": "lapack"}),
    ],
)
def test_bad_arguments_of_facts_are_named(message: str, arguments: dict) -> None:
    with pytest.raises(RuntimeError, match=r"farms_fast\.solver_facts: argument " + message):
        ops.solver_facts(**({"order": 20} | arguments))


def test_only_a_gpu_that_is_there_needs_no_compute_capability() -> None:
    message = "'compute_capability': expected that of a GPU, such as 90, in a build without CUDA"
    here = extension.has_cuda() and torch.cuda.is_available()
    with nullcontext() if here else pytest.raises(RuntimeError, match=message):
        assert ops.solver_facts(20, device="cuda").max_batch == 1
