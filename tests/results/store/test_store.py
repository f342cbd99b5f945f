"""The results store: what it keeps, what it continues, and what it refuses."""

from __future__ import annotations

import math
import os
import pickle
import sqlite3
import tempfile
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farms_fast.results.analysis import Analysis
from farms_fast.results.record import CSV_COLUMNS, LayerRecord
from farms_fast.results.settings import OtherSampling
from farms_fast.results.store import ResultsStore, merge, results_store
from farms_fast.results.store.file import FORMAT_VERSION
from farms_fast.results.store.rows import decode, encode
from farms_fast.weights.stacks import Skipped
from tests.support.records import SETTINGS, any_array, any_record, assert_same, made_up, stored

SKIPPED = [
    Skipped(name="fc.bias", shape=(6,), reason="a vector"),
    Skipped(name="a\ud800", shape=(), reason="a scalar"),
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.sqlite"


def names(analysis: Analysis) -> list[str]:
    return [layer.name for layer in analysis]


def rows_of(path: Path, query: str) -> list[tuple]:
    connection = sqlite3.connect(path)
    try:
        return connection.execute(query).fetchall()
    finally:
        connection.close()


def change(path: Path, *statements: str) -> None:
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        for statement in statements:
            connection.execute(statement)
    finally:
        connection.close()


def write_run(path: Path, records: list[LayerRecord], first: int = 0, **options) -> None:
    with ResultsStore(path) as store:
        run = store.run(SETTINGS, **options)
        for index, record in enumerate(records, start=first):
            run.put(index, record, f"digest {record.name}")


# -------------------------------------------------------------------------------------------- codec


class TestCodec:
    @given(any_array(1) | any_array(2))
    def test_same_bits_back(self, values: np.ndarray) -> None:
        found = decode(encode(values))
        assert found.dtype == np.float64
        assert found.tobytes() == values.tobytes()

    def test_the_bytes_of_a_file(self) -> None:
        assert encode(np.array([1.0, -0.0])) == bytes.fromhex(
            "ef4bc7e0 000000000000f03f 0000000000000080"
        )

    @settings(max_examples=300)
    @given(st.data())
    def test_damage_is_found(self, data: st.DataObject) -> None:
        values = made_up(0, windows=2, k=300).window_evals
        packed = bytearray(encode(values))
        at = data.draw(st.integers(0, len(packed) - 1))
        packed[at] ^= 1 << data.draw(st.integers(0, 7))
        with pytest.raises(ValueError, match="checksum"):
            decode(bytes(packed))

    @given(st.integers(0, 2000))
    def test_what_is_cut_off_is_missed(self, size: int) -> None:
        packed = encode(made_up(0, windows=2, k=300).window_evals)
        with pytest.raises(ValueError, match=r"."):
            decode(packed[:size])


# ------------------------------------------------------------------------------------------ records


@settings(max_examples=30)
@given(st.lists(any_record(), max_size=3, unique_by=lambda record: record.name))
def test_any_record_comes_back(records: list[LayerRecord]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.sqlite"
        with ResultsStore(path) as store:
            run = store.run(SETTINGS)
            run.put_many([(i, record, "digest") for i, record in enumerate(records)])
            run.put_skipped(SKIPPED)
            run.complete([record.name for record in records])
            kept = [run.finished(record.name, "digest") for record in records]
            loaded = stored(store)
        for record, one, other in zip(records, kept, loaded, strict=True):
            assert_same(other, record)
            if record.status != "error":
                assert one is not None
                assert_same(one, record)
        assert loaded.skipped == SKIPPED
        assert loaded.settings == SETTINGS


def test_minus_zero_keeps_its_sign(path: Path) -> None:
    record = made_up(0)
    record.entropy = -0.0
    write_run(path, [record])
    assert math.copysign(1, Analysis.from_store(path)["layer.0"].entropy) == -1


def test_spectrum_in_several_parts(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farms_fast.results.store.rows._PART_BYTES", 8 * 64 * 4)
    record = made_up(0, windows=10)
    write_run(path, [record])
    assert rows_of(path, "SELECT windows, k FROM spectra") == [(4, 64), (4, 64), (2, 64)]
    assert_same(Analysis.from_store(path)["layer.0"], record)


def test_table_of_layers_has_a_column_for_every_scalar(path: Path) -> None:
    failed = LayerRecord("broken", "conv2d", (9, 4, 2), "nonfinite", "2 NaN")
    write_run(path, [made_up(0), failed])
    query = "SELECT name, alpha, alpha IS NULL, stack, rows, cols, status FROM layers"
    alpha = made_up(0).alpha
    assert rows_of(path, query) == [
        ("layer.0", alpha, 0, 1, 64, 64, "ok"),
        ("broken", None, 1, 9, 4, 2, "nonfinite"),
    ]
    columns = [row[1] for row in rows_of(path, "PRAGMA table_info(layers)")]
    # A store of an earlier release lacks a column that is added here: raise FORMAT_VERSION then.
    assert FORMAT_VERSION == 3
    assert columns == ["id", "run", "position", "digest", *CSV_COLUMNS, "window_alphas"]
    assert len(CSV_COLUMNS) == 39


def test_spectra_are_read_when_asked_for(path: Path) -> None:
    write_run(path, [made_up(0), made_up(1)])
    analysis = Analysis.from_store(path)
    assert all("window_evals" not in vars(record) for record in analysis)
    copy = pickle.loads(pickle.dumps(analysis["layer.1"]))
    os.unlink(path)
    assert_same(copy, made_up(1))
    with pytest.raises(FileNotFoundError, match=r"run\.sqlite"):
        _ = analysis["layer.0"].window_evals


def test_relative_path_is_kept_whole(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(path, [made_up(0)])
    monkeypatch.chdir(path.parent)
    analysis = Analysis.from_store(path.name)
    monkeypatch.chdir("/")
    assert_same(analysis["layer.0"], made_up(0))


@pytest.mark.parametrize("name", ["a b", "a?mode=ro", "a%20b", "a#b", "größe", "a\udcffb"])
def test_any_file_name(tmp_path: Path, name: str) -> None:
    write_run(tmp_path / name, [made_up(0)])
    assert os.listdir(tmp_path) == [name]
    assert_same(Analysis.from_store(tmp_path / name)["layer.0"], made_up(0))


# --------------------------------------------------------------------------------------------- runs


def test_a_run_goes_on_where_it_was(path: Path) -> None:
    write_run(path, [made_up(0), made_up(1)], total=3)
    with ResultsStore(path) as store:
        run = store.run(SETTINGS)
        assert run.id == 1
        found = run.finished("layer.1", "digest layer.1")
        assert found is not None
        assert_same(found, made_up(1))
        assert run.finished("layer.1", "other weights") is None
        assert run.finished("layer.2", "digest layer.2") is None
        assert store.runs()[0].finished is None
        assert (store.runs()[0].layers, store.runs()[0].total) == (2, 3)
        run.put(2, made_up(2), "digest layer.2")
        run.complete(["layer.0", "layer.1", "layer.2"])
        assert store.runs()[0].finished is not None


def test_runs_are_known_by_their_key(path: Path) -> None:
    with ResultsStore(path) as store:
        first = store.run(SETTINGS)
        assert store.run(replace(SETTINGS, device="cuda:1", torch="9.0")).id == first.id
        assert store.run(replace(SETTINGS, bins=50)).id != first.id
        assert store.run(replace(SETTINGS, source="elsewhere")).id not in (1, 2)
        assert [info.settings.bins for info in store.runs()] == [100, 50, 100]
        assert store.runs()[0].settings == SETTINGS
        with pytest.raises(ValueError, match=r"^sampling: .* expects .* an `identity`"):
            store.run(replace(SETTINGS, sampling=OtherSampling("")))


def test_runs_in_one_file_are_kept_apart(path: Path) -> None:
    with ResultsStore(path) as store:
        median, peak = store.run(SETTINGS), store.run(replace(SETTINGS, xmin="peak"))
        for index in range(3):
            median.put(index, made_up(index), "d")
            peak.put(index, made_up(index, weights=1), "d")
        peak.put_skipped(SKIPPED)
        median.complete(["layer.0", "layer.1", "layer.2"])
        assert [info.finished is not None for info in store.runs()] == [True, False]
        assert stored(store, median.id).skipped == []
    for number, weights in ((1, 0), (2, 1)):
        for index, record in enumerate(Analysis.from_store(path, number)):
            assert_same(record, made_up(index, weights))
    assert Analysis.from_store(path).settings.xmin == "peak"


def test_force_starts_again_and_destroys_nothing(path: Path) -> None:
    write_run(path, [made_up(0)])
    with ResultsStore(path) as store:
        again = store.run(SETTINGS, force=True)
        assert again.finished("layer.0", "digest layer.0") is None
        again.put(0, made_up(0, weights=1), "digest layer.0")
        assert store.run(SETTINGS).id == again.id == 2
        assert_same(stored(store, 1)["layer.0"], made_up(0))
        assert_same(stored(store)["layer.0"], made_up(0, weights=1))


def test_changed_weights_take_the_place_of_the_old(path: Path) -> None:
    write_run(path, [made_up(0), made_up(1)])
    with ResultsStore(path) as store:
        run = store.run(SETTINGS)
        run.complete(["layer.0", "layer.1"])
        old = stored(store)["layer.0"]
        run.put(0, made_up(0, weights=1), "other weights")
        assert store.runs()[0].finished is None
        assert_same(stored(store)["layer.0"], made_up(0, weights=1))
        assert rows_of(path, "SELECT count(*) FROM spectra") == [(2,)]
        with pytest.raises(ValueError, match=r"no longer .*'layer\.0'"):
            _ = old.window_evals


def test_put_again_changes_nothing(path: Path) -> None:
    write_run(path, [made_up(0)])
    with ResultsStore(path) as store:
        run = store.run(SETTINGS)
        run.complete(["layer.0"])
        kept = stored(store)["layer.0"]
        run.put(0, made_up(0, weights=1), "digest layer.0")
        assert store.runs()[0].finished is not None
        assert_same(kept, made_up(0))


def test_layers_in_error_are_tried_again(path: Path) -> None:
    failed = LayerRecord("layer.0", "linear", (1, 4, 4), "error", "no memory")
    write_run(path, [failed])
    with ResultsStore(path) as store:
        run = store.run(SETTINGS)
        assert run.finished("layer.0", "digest layer.0") is None
        assert names(stored(store)) == ["layer.0"]
        run.put(0, made_up(0), "digest layer.0")
        run.put(0, failed, "digest layer.0")
        assert_same(stored(store)["layer.0"], made_up(0))


def test_complete_sets_the_order_and_leaves_out_what_is_gone(path: Path) -> None:
    write_run(path, [made_up(0), made_up(1), made_up(2)])
    with ResultsStore(path) as store:
        run = store.run(SETTINGS)
        run.complete(["layer.2", "layer.0"])
        assert names(stored(store)) == ["layer.2", "layer.0"]
        assert (store.runs()[0].layers, store.runs()[0].total) == (2, 2)
        # The model has it again.
        assert run.finished("layer.1", "digest layer.1") is not None
        run.complete(["layer.0", "layer.1", "layer.2"])
        assert names(stored(store)) == ["layer.0", "layer.1", "layer.2"]


def test_complete_needs_every_layer_once(path: Path) -> None:
    write_run(path, [made_up(0), made_up(1)])
    with ResultsStore(path) as store:
        run = store.run(SETTINGS)
        with pytest.raises(ValueError, match=r"'layer\.2' is not stored"):
            run.complete(["layer.1", "layer.2"])
        with pytest.raises(ValueError, match=r"each layer once, got 'layer\.1'"):
            run.complete(["layer.1", "layer.1"])
        assert store.runs()[0].finished is None
        assert names(stored(store)) == ["layer.0", "layer.1"]


def test_skipped_tensors_replace_those_before(path: Path) -> None:
    with ResultsStore(path) as store:
        run = store.run(SETTINGS)
        run.put_skipped(SKIPPED)
        run.put_skipped(SKIPPED[1:])
        assert stored(store).skipped == SKIPPED[1:]


def test_layers_put_together_are_all_there_or_none(path: Path) -> None:
    with ResultsStore(path) as store:
        run = store.run(SETTINGS)
        broken = made_up(1)
        broken.M = 2**70
        with pytest.raises(OverflowError):
            run.put_many([(0, made_up(0), "d"), (1, broken, "d")])
        assert len(stored(store)) == 0


def test_versions_are_recorded(path: Path) -> None:
    write_run(path, [])
    with ResultsStore(path) as store:
        versions = store.runs()[0].versions
    assert versions["numpy"] == np.__version__
    assert set(versions) == {"farms_fast", "python", "numpy", "torch", "sqlite"}


def test_what_chose_the_solvers_of_a_gpu_is_recorded(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results_store, "decided_by", lambda device: f"measured for {device}")
    with ResultsStore(path) as store:
        store.run(replace(SETTINGS, device="cuda:1"))
        assert store.runs()[0].versions["solvers"] == "measured for cuda:1"


def test_threads_share_a_store(path: Path) -> None:
    errors: list[BaseException] = []
    with ResultsStore(path) as store:
        run = store.run(SETTINGS)

        def write(first: int) -> None:
            try:
                for index in range(first, 40, 4):
                    run.put(index, made_up(index), "d")
                    assert run.finished(f"layer.{index}", "d") is not None
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=write, args=(first,)) for first in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        assert names(stored(store)) == [f"layer.{index}" for index in range(40)]


# ------------------------------------------------------------------------------------ other files


def test_only_writing_makes_a_file(path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"run\.sqlite"):
        ResultsStore(path, create=False)
    with pytest.raises(FileNotFoundError, match="none"):
        ResultsStore(path.parent / "none" / "run.sqlite")
    with pytest.raises(IsADirectoryError):
        ResultsStore(path.parent)
    assert not path.exists()


@pytest.mark.parametrize("create", [True, False])
def test_other_files_are_refused_and_left_alone(path: Path, create: bool) -> None:
    for content in (b"x", b"a few", b"not a database at all, but a text" * 100):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"run\.sqlite' is not a results store"):
            ResultsStore(path, create=create)
        assert path.read_bytes() == content
    path.unlink()
    change(path, "CREATE TABLE layers (name, alpha)")
    content = path.read_bytes()
    with pytest.raises(ValueError, match="database of another program"):
        ResultsStore(path, create=create)
    assert path.read_bytes() == content


def test_empty_file_is_a_new_store_or_none(path: Path) -> None:
    path.touch()
    with pytest.raises(ValueError, match="is empty"):
        ResultsStore(path, create=False)
    write_run(path, [made_up(0)])
    assert len(Analysis.from_store(path)) == 1


def test_other_format_version(path: Path) -> None:
    write_run(path, [made_up(0)])
    change(path, "PRAGMA user_version = 1")
    content = path.read_bytes()
    for create in (True, False):
        with pytest.raises(ValueError, match=r"format version 1, .* version 3: .*new file"):
            ResultsStore(path, create=create)
    with pytest.raises(ValueError, match="has format version 1"):
        merge(path.parent / "target.sqlite", [path])
    assert path.read_bytes() == content


def test_unknown_run(path: Path) -> None:
    with ResultsStore(path) as store:
        with pytest.raises(ValueError, match="holds no run"):
            stored(store)
        store.run(SETTINGS)
        store.run(SETTINGS, force=True)
        with pytest.raises(ValueError, match="run: expected one of 1, 2, got 7"):
            stored(store, 7)


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("UPDATE spectra SET evals = zeroblob(length(evals))", "damaged spectrum of layer 'layer"),
        ("UPDATE spectra SET k = 63", "damaged spectrum of layer 'layer"),
        ("UPDATE spectra SET evals = 'text'", "damaged spectrum of layer 'layer"),
        ("UPDATE layers SET window_alphas = x'00'", "damaged record of layer 'layer"),
        ("UPDATE layers SET alpha = 'text'", "damaged record of layer 'layer"),
        ("UPDATE layers SET windows = 'text'", "damaged record of layer 'layer"),
        ("UPDATE runs SET settings = '{'", "is damaged"),
        ("UPDATE runs SET settings = '{}'", "is damaged .*no field 'source'"),
        ("UPDATE spectra SET windows = -1", "damaged spectrum of layer 'layer"),
        ("UPDATE layers SET windows = 9e999", "windows: expected an integer of 0 to .*, got inf"),
        ("UPDATE layers SET status = x'ff'", "damaged record of layer 'layer"),
        ("UPDATE layers SET stack = -1", "shape: expected an integer of 0 to .*, got -1"),
        ("UPDATE runs SET settings = '5'", "settings: expected an object, got 5"),
        (f"UPDATE runs SET settings = '{'[' * 100_000}'", "is damaged .*nested too deeply"),
        ("UPDATE runs SET skipped = '[1]'", "is damaged"),
        ('UPDATE runs SET skipped = \'[["a", [1e999], "b"]]\'', "skipped shape: expected an int"),
        ("DROP TABLE spectra", "is damaged"),
        ("ALTER TABLE layers ADD COLUMN more", "expected the table 'layers' as format version 3"),
    ],
)
def test_damaged_values_are_named(path: Path, statement: str, message: str) -> None:
    write_run(path, [made_up(0)])
    change(path, statement)
    with pytest.raises(ValueError, match=message) as caught:
        _ = Analysis.from_store(path)["layer.0"].window_evals
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("UPDATE runs SET started = x'00'", "started: expected text, got b'.x00'"),
        ("UPDATE runs SET finished = x'00'", "finished: expected text, got b'.x00'"),
        ("UPDATE runs SET total = 'all of them'", "total: expected an integer of 0 to .*'all of"),
        ("UPDATE runs SET versions = '[]'", "versions: expected an object, got list"),
        ("UPDATE runs SET versions = '{\"numpy\": 2}'", "versions: numpy: expected text, got 2"),
        ("UPDATE runs SET settings = 'null'", "settings: expected an object, got None"),
    ],
)
def test_damaged_runs_are_named(path: Path, statement: str, message: str) -> None:
    write_run(path, [made_up(0)])
    change(path, statement)
    with ResultsStore(path) as store, pytest.raises(ValueError, match=message) as caught:
        store.runs()
    assert f"store: {str(path)!r} is damaged" in str(caught.value)


@pytest.mark.parametrize(
    ("statements", "message"),
    [
        (
            ("ALTER TABLE layers RENAME TO mine", "CREATE VIEW layers AS SELECT * FROM mine"),
            "expected the table 'layers'",
        ),
        (
            ("CREATE TRIGGER t AFTER INSERT ON layers BEGIN DELETE FROM runs; END",),
            "expected no trigger, got 't'",
        ),
    ],
)
def test_a_store_holds_nothing_that_acts(
    path: Path, statements: tuple[str, ...], message: str
) -> None:
    write_run(path, [made_up(0)])
    for statement in statements:
        change(path, statement)
    for create in (False, True):
        with pytest.raises(ValueError, match=message):
            ResultsStore(path, create=create)


def test_what_the_owner_adds_to_a_store_stays(path: Path) -> None:
    write_run(path, [made_up(0)])
    change(path, "CREATE VIEW best AS SELECT name FROM layers WHERE alpha < 4")
    change(path, "CREATE INDEX by_alpha ON layers (alpha)")
    assert Analysis.from_store(path)["layer.0"].alpha == made_up(0).alpha


def test_a_store_is_a_regular_file(path: Path) -> None:
    os.mkfifo(path)
    with pytest.raises(ValueError, match=r"store: expected a regular file, got '.*run\.sqlite'"):
        ResultsStore(path)


def test_closed_store_says_so(path: Path) -> None:
    store = ResultsStore(path)
    store.close()
    store.close()
    with pytest.raises(ValueError, match="has been closed"):
        store.runs()


# ------------------------------------------------------------------------------------------ merging


class TestMerge:
    def parts(self, folder: Path) -> list[Path]:
        paths = [folder / f"rank{rank}.sqlite" for rank in range(3)]
        for rank, path in enumerate(paths):
            with ResultsStore(path) as store:
                run = store.run(replace(SETTINGS, device=f"cuda:{rank}"))
                for index in range(rank, 8, 3):
                    run.put(index, made_up(index), f"digest {index}")
                run.put_skipped(SKIPPED[: rank + 1])
        return paths

    def test_parts_become_one_run(self, path: Path) -> None:
        parts = self.parts(path.parent)
        merge(path, parts)
        with ResultsStore(path) as store:
            run = store.run(SETTINGS)
            assert (run.id, len(store.runs())) == (1, 1)
            run.complete([f"layer.{index}" for index in range(8)])
            analysis = stored(store)
        assert analysis.skipped == SKIPPED
        for index, record in enumerate(analysis):
            assert_same(record, made_up(index))

    def test_again_writes_no_layer_again(self, path: Path) -> None:
        parts = self.parts(path.parent)
        query = "SELECT id, run, position, name FROM layers ORDER BY id"
        merge(path, parts)
        before = rows_of(path, query)
        merge(path, [*parts[::-1], *parts])
        assert rows_of(path, query) == before
        assert rows_of(path, "SELECT count(*) FROM spectra") == [(8,)]
        assert Analysis.from_store(path).skipped == SKIPPED

    def test_what_a_killed_rank_left(self, path: Path) -> None:
        parts = self.parts(path.parent)
        parts[1].write_bytes(b"")
        merge(path, parts)
        expected = [f"layer.{index}" for index in (0, 2, 3, 5, 6)]
        assert names(Analysis.from_store(path)) == expected

    def test_goes_on_in_the_newest_run(self, path: Path) -> None:
        with ResultsStore(path) as store:
            old = store.run(SETTINGS)
            old.put(0, made_up(0, weights=1), "digest 0")
            old.complete(["layer.0"])
            store.run(SETTINGS, force=True)
        merge(path, self.parts(path.parent))
        with ResultsStore(path) as store:
            assert [info.layers for info in store.runs()] == [1, 8]
            assert_same(stored(store, 1)["layer.0"], made_up(0, weights=1))

    def test_newest_of_equal_runs_in_a_part_counts(self, path: Path) -> None:
        part = path.parent / "part.sqlite"
        write_run(part, [made_up(0, weights=1), made_up(1, weights=1)])
        write_run(part, [made_up(0)], force=True)
        merge(path, [part])
        analysis = Analysis.from_store(path)
        assert names(analysis) == ["layer.0"]
        assert_same(analysis["layer.0"], made_up(0))

    def test_whole_runs_stay_finished(self, path: Path) -> None:
        part = path.parent / "part.sqlite"
        write_run(part, [made_up(0), made_up(1)])
        with ResultsStore(part) as store:
            store.run(SETTINGS).complete(["layer.1"])
            expected = store.runs()
        merge(path, [part])
        with ResultsStore(path) as store:
            assert store.runs() == expected
            assert names(stored(store)) == ["layer.1"]

    def test_a_part_is_merged_whole_or_not_at_all(self, path: Path) -> None:
        parts = self.parts(path.parent)
        change(parts[1], "UPDATE layers SET run = 1, window_alphas = 5 WHERE position = 7")
        change(parts[1], "ALTER TABLE runs DROP COLUMN skipped")
        with pytest.raises(ValueError, match="damaged"):
            merge(path, parts)
        expected = [f"layer.{index}" for index in range(0, 8, 3)]
        assert names(Analysis.from_store(path)) == expected

    def test_bad_parts(self, path: Path) -> None:
        parts = self.parts(path.parent)
        with pytest.raises(FileNotFoundError, match=r"parts: .*none\.sqlite' does not exist"):
            merge(path, [*parts, path.parent / "none.sqlite"])
        assert not path.exists()
        with pytest.raises(ValueError, match="is the target itself"):
            merge(parts[0], parts)


def test_settings_are_canonical_json(path: Path) -> None:
    write_run(path, [])
    assert rows_of(path, "SELECT key, settings FROM runs") == [
        (SETTINGS.run_key, SETTINGS.to_json())
    ]
