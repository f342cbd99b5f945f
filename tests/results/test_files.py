"""Files of an analysis besides CSV and JSON: Parquet, and spectra for NumPy and safetensors."""

from __future__ import annotations

import math
import os
import stat
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from farms_fast.results.analysis import Analysis
from farms_fast.results.files import array_name
from farms_fast.results.record import INT_FIELDS, TEXT_FIELDS, LayerRecord
from farms_fast.results.settings import AnalysisSettings
from farms_fast.results.store import ResultsStore
from tests.support.records import SETTINGS, any_array, made_up

FAILED = LayerRecord("broken", "conv2d", (9, 4, 4), "nonfinite", "2 NaN")
AWKWARD = [
    "a/b",
    "../../etc/passwd",
    "/abs",
    "a\\b",
    "a%2Fb",
    "%",
    "__metadata__",
    "%5F_metadata__",
    "a.npy",
    "a",
    "a%2Enpy",
    "größe 層",
    "\x1b[31m\n\0\u202e",
    "a\ud800",
    "",
    " ",
    '"quoted"',
]


def an_analysis() -> Analysis:
    return Analysis([made_up(0), made_up(1, windows=3, k=5), FAILED], (), SETTINGS)


def read_npz(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as spectra:
        return {unquote(name, errors="surrogatepass"): spectra[name] for name in spectra.files}


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    with safe_open(path, framework="numpy") as file:
        names = list(file.keys())
        return {unquote(name, errors="surrogatepass"): file.get_tensor(name) for name in names}


READERS = {
    Analysis.spectra_to_npz: read_npz,
    Analysis.spectra_to_safetensors: read_safetensors,
}


# ------------------------------------------------------------------------------------------ spectra


@pytest.mark.parametrize("write", READERS)
class TestSpectra:
    def test_every_layer_comes_back(self, write, tmp_path: Path) -> None:
        analysis = an_analysis()
        write(analysis, tmp_path / "a")
        found = READERS[write](tmp_path / "a")
        assert sorted(found) == ["broken", "layer.0", "layer.1"]
        for layer in analysis:
            array = found[layer.name]
            assert (array.dtype, array.shape) == (np.float64, layer.window_evals.shape)
            assert array.tobytes() == layer.window_evals.tobytes()

    def test_any_name(self, write, tmp_path: Path) -> None:
        layers = []
        for index, name in enumerate(AWKWARD):
            layers.append(made_up(index, windows=1, k=2))
            layers[-1].name = name
        write(Analysis(layers), tmp_path / "a")
        found = READERS[write](tmp_path / "a")
        assert sorted(found) == sorted(AWKWARD)
        for layer in layers:
            np.testing.assert_array_equal(found[layer.name], layer.window_evals)

    @settings(max_examples=30)
    @given(data=st.data())
    def test_any_bits(self, write, data: st.DataObject) -> None:
        record = LayerRecord("a", "linear", (1, 2, 2), "ok", window_evals=data.draw(any_array(2)))
        with tempfile.TemporaryDirectory() as folder:
            write(Analysis([record]), Path(folder) / "a")
            found = READERS[write](Path(folder) / "a")["a"]
        assert found.shape == record.window_evals.shape
        assert found.tobytes() == record.window_evals.tobytes()

    def test_from_a_store_one_layer_at_a_time(self, write, tmp_path: Path) -> None:
        with ResultsStore(tmp_path / "run.sqlite") as store:
            store.run(SETTINGS).put_many((i, made_up(i), "d") for i in range(3))
        analysis = Analysis.from_store(tmp_path / "run.sqlite")
        write(analysis, tmp_path / "a")
        assert all("window_evals" not in vars(layer) for layer in analysis)
        found = READERS[write](tmp_path / "a")
        for index in range(3):
            np.testing.assert_array_equal(found[f"layer.{index}"], made_up(index).window_evals)

    def test_same_analysis_same_file(self, write, tmp_path: Path) -> None:
        write(an_analysis(), tmp_path / "a")
        write(an_analysis(), tmp_path / "b")
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()

    def test_no_spectra_to_write(self, write, tmp_path: Path) -> None:
        an_analysis().to_json(tmp_path / "a.json")
        analysis = Analysis.from_json(tmp_path / "a.json")
        with pytest.raises(ValueError, match=r"'layer\.0' has no spectrum"):
            write(analysis, tmp_path / "a")
        assert os.listdir(tmp_path) == ["a.json"]

    def test_empty_analysis(self, write, tmp_path: Path) -> None:
        write(Analysis([]), tmp_path / "a")
        assert READERS[write](tmp_path / "a") == {}


def test_npz_has_no_paths_in_it(tmp_path: Path) -> None:
    layers = [LayerRecord(name, "linear", (1, 2, 2), "ok") for name in AWKWARD]
    Analysis(layers).spectra_to_npz(tmp_path / "a")
    with zipfile.ZipFile(tmp_path / "a") as archive:
        assert all("/" not in name and "\\" not in name for name in archive.namelist())
        assert archive.testzip() is None


def test_npz_takes_the_path_as_it_is(tmp_path: Path) -> None:
    an_analysis().spectra_to_npz(tmp_path / "spectra")
    assert os.listdir(tmp_path) == ["spectra"]


def test_safetensors_says_how_it_was_made(tmp_path: Path) -> None:
    an_analysis().spectra_to_safetensors(tmp_path / "a")
    with safe_open(tmp_path / "a", framework="numpy") as file:
        metadata = file.metadata()
    assert AnalysisSettings.from_json(metadata["settings"]) == SETTINGS
    # The numbers begin at a multiple of eight bytes.
    assert int.from_bytes((tmp_path / "a").read_bytes()[:8], "little") % 8 == 0


@given(st.lists(st.text(st.characters()) | st.sampled_from(AWKWARD), unique=True))
def test_array_names_stay_apart(names: list[str]) -> None:
    escaped = [array_name(name) for name in names]
    assert len(set(escaped)) == len(names)
    assert [unquote(name, errors="surrogatepass") for name in escaped] == names


def test_usual_names_stay() -> None:
    for name in ("model.layers.0.mlp.down_proj", "h.0.attn:q", "größe 層", "a b~c"):
        assert array_name(name) == name


# ------------------------------------------------------------------------------------------ Parquet


class TestParquet:
    def test_round_trip(self, tmp_path: Path) -> None:
        import pyarrow.parquet

        analysis = an_analysis()
        analysis.layers[0].norm = math.inf
        analysis.layers[0].name = "a\ud800"
        analysis.to_parquet(tmp_path / "a")
        table = pyarrow.parquet.read_table(tmp_path / "a")
        settings = table.schema.metadata[b"farms_fast.settings"]
        assert AnalysisSettings.from_json(settings) == SETTINGS
        rows = table.to_pylist()
        assert [row["name"] for row in rows] == ["a\\ud800", "layer.1", "broken"]
        for row, layer in zip(rows, analysis, strict=True):
            assert list(row) == list(layer.scalars())
            for name, value in layer.scalars().items():
                if name == "name":
                    continue
                if name in TEXT_FIELDS or name in INT_FIELDS:
                    assert row[name] == value
                    assert type(row[name]) is type(value)
                else:
                    np.testing.assert_array_equal(row[name], value, err_msg=name)
        # NaN is a number here, not a missing one.
        assert table.column("alpha").null_count == 0

    def test_types_do_not_depend_on_the_values(self, tmp_path: Path) -> None:
        import pyarrow.parquet

        Analysis([]).to_parquet(tmp_path / "a")
        an_analysis().to_parquet(tmp_path / "b")
        schemas = [pyarrow.parquet.read_schema(tmp_path / name) for name in "ab"]
        assert schemas[0].equals(schemas[1])

    def test_pandas_reads_it(self, tmp_path: Path) -> None:
        import pandas as pd

        analysis = an_analysis()
        analysis.to_parquet(tmp_path / "a")
        frame = pd.read_parquet(tmp_path / "a")
        pd.testing.assert_frame_equal(
            frame, analysis.to_pandas(), check_dtype=False, check_exact=True
        )

    @pytest.mark.slow
    def test_without_pyarrow(self, tmp_path: Path) -> None:
        # None in sys.modules makes the import fail as if the package were not there.
        script = (
            "import sys; sys.modules['pyarrow'] = None\n"
            "from farms_fast.results.analysis import Analysis\n"
            "try: Analysis([]).to_parquet(sys.argv[1])\n"
            "except ImportError as e: print(e)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", script, tmp_path / "a"],
            capture_output=True,
            text=True,
            check=True,
        )
        assert "pip install 'farms-fast[parquet]', or use to_csv" in done.stdout
        assert os.listdir(tmp_path) == []

    @pytest.mark.slow
    def test_pyarrow_is_not_imported_unasked(self) -> None:
        script = "import sys, farms_fast.cli.main; print('pyarrow' in sys.modules)"
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == "False"


# ---------------------------------------------------------------------------------------- all files


@pytest.mark.parametrize("write", [*READERS, Analysis.to_parquet])
class TestWriting:
    def test_replaces_and_leaves_nothing_behind(self, write, tmp_path: Path) -> None:
        (tmp_path / "a").write_bytes(b"old" * 100_000)
        write(an_analysis(), tmp_path / "a")
        assert b"oldold" not in (tmp_path / "a").read_bytes()
        assert os.listdir(tmp_path) == ["a"]

    def test_failure_keeps_the_old_file(self, write, tmp_path: Path, monkeypatch) -> None:
        (tmp_path / "a").write_text("old")

        def fail(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="No space left"):
            write(an_analysis(), tmp_path / "a")
        assert (tmp_path / "a").read_text() == "old"
        assert os.listdir(tmp_path) == ["a"]

    def test_error_names_the_path_that_was_asked_for(self, write, tmp_path: Path) -> None:
        for path in ("/dev/full", "/proc/x"):
            with pytest.raises(OSError) as caught:  # noqa: PT011
                write(an_analysis(), path)
            assert (caught.value.filename, caught.value.errno is None) == (path, False)

    def test_pipe_is_written_to_not_replaced(self, write, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        # Open for reading first, or the writer would wait for a reader.
        reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
        try:
            write(Analysis([made_up(0, k=8)]), tmp_path / "pipe")
            (tmp_path / "copy").write_bytes(os.read(reader, 1 << 16))
        finally:
            os.close(reader)
        assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
        if write in READERS:
            found = READERS[write](tmp_path / "copy")["layer.0"]
            np.testing.assert_array_equal(found, made_up(0, k=8).window_evals)


@pytest.mark.parametrize("write", READERS)
def test_spectrum_that_cannot_be_read_keeps_the_old_file(write, tmp_path: Path) -> None:
    analysis = an_analysis()
    reads: list[int] = []

    def gone() -> np.ndarray:
        reads.append(1)
        # The second time round for a file whose header needs every shape first.
        if len(reads) > (write is Analysis.spectra_to_safetensors):
            raise FileNotFoundError("the store is gone")
        return np.ones((3, 5))

    analysis.layers[1].defer_window_evals(gone)
    (tmp_path / "a").write_text("old")
    with pytest.raises(FileNotFoundError, match="the store is gone"):
        write(analysis, tmp_path / "a")
    assert (tmp_path / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]
