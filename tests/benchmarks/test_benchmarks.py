from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import inputs, report, roofline
from benchmarks.agreement import (
    EXACT_FIT,
    FLOAT64,
    candidates_of,
    check_eigenvalues,
    check_fit,
    check_gram,
    fit_truth,
)
from benchmarks.cases import EIGENVALUES, FIT, GRAM, RULES, GramCase, eigen_cases
from benchmarks.inputs import gaussian_windows, sets_past_cache, spectrum
from farms_fast import fit_power_law
from farms_fast.testing import reference

ROOT = Path(__file__).parents[2]


def quick_run(
    folder: Path, what: str, *arguments: str
) -> tuple[subprocess.CompletedProcess[str], Any]:
    saved = folder / "run.json"
    command = [sys.executable, "-m", "pytest", what, "--quick", "-p", "no:cacheprovider"]
    finished = subprocess.run(
        [*command, "-q", f"--benchmark-json={saved}", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return finished, json.loads(saved.read_text()) if saved.exists() else None


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One quick run of every case and every peer that is installed."""
    folder = tmp_path_factory.mktemp("quick")
    finished, run = quick_run(folder, "benchmarks")
    assert finished.returncode == 0, finished.stdout[-4000:]
    return run


def test_the_quick_set_measures_every_case_against_peers(quick: Any) -> None:
    groups: dict[str, set[str]] = {}
    for entry in quick["benchmarks"]:
        groups.setdefault(entry["extra_info"]["family"], set()).add(entry["extra_info"]["case"])
        # A fraction of the accepted error, and a time that was taken.
        assert entry["extra_info"]["error"] <= 1
        assert entry["stats"]["median"] > 0
    assert {family: len(cases) for family, cases in groups.items()} == {
        "eigenvalues": len(EIGENVALUES["quick"]),
        "gram": len(GRAM["quick"]),
        "fit": len(FIT["quick"]) * len(RULES),
        "jobs": 4,
        "faces": 2,
        "details": 2,
    }
    peers = {entry["extra_info"]["peer"] for entry in quick["benchmarks"]}
    assert {"farms_fast", "published FARMS", "numpy svd", "scipy svdvals"} <= peers
    assert all(entry["reason"] for entry in quick["run"]["skipped"])


WRONG = """
import farms_fast.core.ops as ops
right = ops.window_eigvalsh
def wrong(*args, **kwargs):
    evals = right(*args, **kwargs)
    evals[0, -1] *= 1 + 1e-9
    return evals
ops.window_eigvalsh = wrong
"""


def test_a_wrong_contender_fails_before_it_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One eigenvalue off by 1e-9 of itself, in one matrix of the batch."""
    (tmp_path / "wrong_contender.py").write_text(WRONG)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    arguments = ("-p", "wrong_contender", "-k", "farms_fast")
    finished, run = quick_run(tmp_path, "benchmarks/test_eigenvalues.py", *arguments)
    assert finished.returncode == 1
    assert "eigenvalues differ by" in finished.stdout
    assert run is None or run["benchmarks"] == []


def test_eigenvalues_must_agree_everywhere() -> None:
    window = np.random.default_rng(0).standard_normal((3, 40, 40))
    evals = np.stack([reference.eigenvalues(w) for w in window])
    norms = (window**2).sum(axis=(1, 2))
    truth = {0: evals[0]}
    # In any order of the eigenvalues.
    assert check_eigenvalues(evals[:, ::-1], (3, 40), truth, norms, FLOAT64) <= 1e-3
    for matrix, off in ((0, 1e-12), (2, 1e-9)):
        wrong = evals.copy()
        wrong[matrix, -1] *= 1 + off
        with pytest.raises(AssertionError, match=f"matrix {matrix}"):
            check_eigenvalues(wrong, (3, 40), truth, norms, FLOAT64)
    with pytest.raises(AssertionError, match="finite"):
        check_eigenvalues(np.full((3, 40), np.nan), (3, 40), truth, norms, FLOAT64)
    with pytest.raises(AssertionError, match=r"expected \(3, 40\)"):
        check_eigenvalues(evals[:2], (3, 40), truth, norms, FLOAT64)


def test_gram_matrices_must_agree() -> None:
    windows = np.random.default_rng(0).standard_normal((2, 6, 9))
    grams = np.stack([reference.gram(w) for w in windows])
    norms = (windows**2).sum(axis=(1, 2))
    check_gram(grams, {0: windows[0]}, norms)
    for index in ((0, 1, 2), (1, 3, 3)):
        wrong = grams.copy()
        wrong[index] += 1e-9
        with pytest.raises(AssertionError, match=f"window {index[0]}"):
            check_gram(wrong, {0: windows[0]}, norms)


@pytest.mark.parametrize("rule", RULES)
def test_a_fit_must_be_the_best_and_exact(rule: str) -> None:
    evals = spectrum(400, 1, torch.device("cpu"))
    truth = fit_truth(evals, rule)
    assert truth.scanned == truth.candidates == len(candidates_of(evals, rule))
    exact = reference.fit_power_law(evals.numpy(), rule)
    right = tuple(float(exact[name]) for name in ("alpha", "D", "xmin"))
    assert check_fit(*right, truth, EXACT_FIT) <= 1
    for place, name in enumerate(("alpha", "D")):
        wrong = list(right)
        wrong[place] *= 1 + 1e-6
        with pytest.raises(AssertionError, match=rf"^{name}"):
            check_fit(*wrong, truth, EXACT_FIT)
    # A right fit of another tail.
    other = fit_power_law(evals, "median", xmin_pos=1.3)
    with pytest.raises(AssertionError, match=r"^xmin"):
        check_fit(other.alpha, other.D, other.xmin, truth, EXACT_FIT)


def test_a_truth_that_scans_a_part_finds_the_best_near_the_pick() -> None:
    evals = spectrum(3000, 2, torch.device("cpu"))
    whole = fit_truth(evals, "ks")
    pick = fit_power_law(evals, "ks").xmin
    part = fit_truth(evals, "ks", near=pick, work=3e5)
    assert part.scanned < whole.scanned / 10
    assert part.least == whole.least


def test_inputs_are_never_zero_and_fill_more_than_the_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(inputs, "CPU_CACHE_BYTES", 2**16)
    cpu = torch.device("cpu")
    sets = gaussian_windows(4, 32, cpu)
    assert len(sets) >= 3
    assert sum(x.numel() * 8 for x in sets) > 2 * 2**16
    assert not torch.equal(sets[0], sets[1])
    assert all(bool((x != 0).all()) for x in sets)
    assert sets_past_cache(2**40, cpu) == 2


def test_shared_gram_work_is_counted_once() -> None:
    case = GramCase(40, 50, 12, 6)
    grid = case.sampling.grid(40, 50)
    together = np.zeros((40, 40), bool)
    for start in grid.row_starts:
        together[start : start + 12, start : start + 12] = True
    pairs = int(np.triu(together).sum())
    assert roofline.pairs_covered(grid.row_starts, 12) == pairs
    assert roofline.gram_stages(case)[0].flops == 2 * pairs * 50
    # 15 x 15 windows of 2000 over LLaMA's 4096 x 11008: more than tenfold.
    case = GramCase(4096, 11_008, 2000, 15)
    grid = case.sampling.grid(4096, 11_008)
    assert roofline.separate_gram_flops(grid) > 10 * roofline.gram_stages(case)[0].flops


def test_a_limit_takes_the_slower_of_work_and_bytes() -> None:
    ceilings = roofline.Ceilings(gemm_float64=10.0, gemm_float32=20.0, copy=2.0)
    stages = [roofline.Stage(flops=30.0, bytes=1.0), roofline.Stage(flops=1.0, bytes=8.0)]
    assert ceilings.limit(stages) == 3.0 + 4.0


def test_roofline_covers_every_eigenvalue_case(tmp_path: Path) -> None:
    roofline.main(["--device", "cpu", "--quick", "--json", str(tmp_path / "r.json")])
    saved = json.loads((tmp_path / "r.json").read_text())
    names = [case["case"] for case in saved["cases"] if case["family"] == "eigenvalues"]
    assert names == [case.id for case in eigen_cases("quick")]
    assert all(case["ratio"] > 0 for case in saved["cases"])


def test_a_saved_run_gives_the_report(quick: Any, tmp_path: Path) -> None:
    raw = tmp_path / "raw.json"
    raw.write_text(json.dumps(quick))
    path = report.save("here", [raw], tmp_path / "saved")
    assert "data" not in path.read_text()
    runs = report.load(tmp_path / "saved")
    text = report.results(runs)
    for entry in quick["benchmarks"]:
        assert entry["extra_info"]["case"] in text
    # No absolute times of a CPU.
    assert "µs" not in text
    assert " ms" not in text


def entry(peer: str, median: float, sample: str = "") -> dict[str, Any]:
    info = {"family": "eigenvalues", "case": "k=512 x 9", "peer": peer, "sample": sample}
    info |= {"error": 0.1, "accuracy": "a bound", "note": "a note", "units": 9, "peak_bytes": 10**9}
    return {"group": "g", "stats": {"median": median}, "extra_info": info}


def a_run(device: str) -> report.Run:
    machine = {"cpu": "a CPU", "cores": 2, "system": "Linux", "python": "3.12", "versions": {}}
    machine |= {"torch threads": 2, "farms_fast": {"version": "0.1.0", "compiler": "g++"}}
    if device == "cuda":
        gpu = {"name": "a GPU", "memory_bytes": 2**37, "l2_bytes": 6e7, "cuda": "13.0"}
        machine["gpu"] = gpu
    skipped = [{"family": "eigenvalues", "case": "k=9 x 9", "peer": "CuPy", "reason": "no cupy"}]
    return {
        "machine_info": machine,
        "datetime": "2026-01-02T03:04:05",
        "run": {"device": device, "profile": device, "skipped": skipped, "failed": []},
        "benchmarks": [entry("farms_fast", 9e-3), entry("numpy svd", 0.045, "1 of 9")],
    }


def test_ratios_are_times_over_the_contenders() -> None:
    cpu = report.results([(a_run("cpu"), None)])
    assert "| k=512 x 9 | ~5.00 |\n" in cpu
    assert "1 of 9 (k=512 x 9)" in cpu
    assert "CuPy, no cupy (k=9 x 9)" in cpu
    gpu = report.results([(a_run("cuda"), None)])
    # 9 ms for 9 windows.
    assert "| k=512 x 9 | ~5.00 | 1,000 | 1.00 GB |\n" in gpu


def raw_run(path: Path, family: str, median: float, day: str, cpu: str = "a CPU") -> Path:
    run = a_run("cpu") | {"datetime": day, "commit_info": {}}
    run["machine_info"]["cpu"] = cpu
    missing = {"family": family, "case": "k=512 x 9", "peer": "CuPy", "reason": day}
    run["run"] |= {"seconds": 1.0, "skipped": [missing]}
    run["benchmarks"] = [entry("farms_fast", median)]
    run["benchmarks"][0]["extra_info"]["family"] = family
    path.write_text(json.dumps(run))
    return path


def test_an_update_replaces_the_cases_that_it_has(tmp_path: Path) -> None:
    first = [
        raw_run(tmp_path / "a.json", "gram", 1.0, "2026-01-02"),
        raw_run(tmp_path / "b.json", "fit", 2.0, "2026-01-02"),
    ]
    report.save("here", first, tmp_path)
    again = raw_run(tmp_path / "c.json", "fit", 3.0, "2026-03-04")
    saved = json.loads(report.save("here", [again], tmp_path, update=True).read_text())
    medians = {e["extra_info"]["family"]: e["stats"]["median"] for e in saved["benchmarks"]}
    assert medians == {"gram": 1.0, "fit": 3.0}
    skipped = {e["family"]: e["reason"] for e in saved["run"]["skipped"]}
    assert skipped == {"gram": "2026-01-02", "fit": "2026-03-04"}
    text = report.results([(saved, None)])
    assert text.count("Measured on 2026-03-04: k=512 x 9.") == 1
    elsewhere = raw_run(tmp_path / "d.json", "fit", 1.0, "2026-03-04", "another CPU")
    with pytest.raises(ValueError, match=r"expected a run of CPU, 2 cores \(a CPU\)"):
        report.save("here", [elsewhere], tmp_path, update=True)


def test_only_the_marked_block_of_readme_is_rewritten(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    run = a_run("cpu")
    alone = entry("farms_fast", 1.0)
    alone["extra_info"]["case"] = "k=1000 x 9"
    run["benchmarks"].append(alone)
    block = report.readme_block([(run, None)])
    assert report.write_readme(block, readme)
    text = readme.read_text()
    assert text.startswith(f"before\n{report.BEGIN}\n")
    assert text.endswith(f"{report.END}\nafter\n")
    assert "| k=512 x 9 | ~5.00 |" in text
    assert "old" not in text
    # A case without any peer says nothing there.
    assert "k=1000 x 9" not in text
    readme.write_text("nothing marked\n")
    assert not report.write_readme(block, readme)


def test_solver_table_without_a_gpu_says_so_in_one_line() -> None:
    finished = subprocess.run(
        [sys.executable, "-m", "benchmarks.solver_table"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert finished.returncode == 1
    assert finished.stdout == ""
    assert finished.stderr == (
        "error: expected a CUDA device and a build with CUDA (see farms-fast info)\n"
    )
