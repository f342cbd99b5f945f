"""Pickles that anyone may have written: none of their code runs, and reading them is bounded."""

from __future__ import annotations

import io
import os
import pickle
import random
import resource
import struct
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from farms_fast.weights.sources import open_source
from farms_fast.weights.sources.torch_files import reader, stream
from farms_fast.weights.sources.torch_files.machine import Global, StandIn, read_pickle
from farms_fast.weights.sources.torch_files.stream import PickleStream
from farms_fast.weights.sources.torch_files.tensors import FUNCTIONS
from tests.support.checkpoints import WEIGHTS, loaded

MIB = 2**20
MANY = 2 * 10**5


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


# What makes a folder if it is run, as opcodes; TRACE stands for the folder's path.
TRACE = b"@trace@"
PAYLOADS = {
    "reduce": b"cos\nmkdir\n(" + TRACE + b"tR",
    "stack_global": text("os") + text("mkdir") + b"\x93(" + TRACE + b"tR",
    "inst": b"(" + TRACE + b"ios\nmkdir\n",
    "obj": b"(cos\nmkdir\n" + TRACE + b"o",
    "newobj": b"cos\nmkdir\n(" + TRACE + b"t\x81",
    "newobj_ex": b"cos\nmkdir\n(" + TRACE + b"t}\x92",
    "eval": b"c__builtin__\neval\n(" + text("__import__('os').mkdir(") + b"tR",
    "exec": b"cbuiltins\nexec\n(" + text("import os; os.mkdir('x')") + b"tR",
    "getattr": b"cbuiltins\ngetattr\n(cos\nsystem\n" + text("__call__") + b"tR(" + TRACE + b"tR",
    "dotted": text("os") + text("path.os.mkdir") + b"\x93(" + TRACE + b"tR",
    "partial": b"cfunctools\npartial\n(cos\nmkdir\n" + TRACE + b"tR)R",
    "reconstructor": b"ccopy_reg\n_reconstructor\n(cos\nmkdir\n" + TRACE + b"NtR",
    "newobj_function": b"ccopyreg\n__newobj__\n(cos\nmkdir\n" + TRACE + b"tR",
    "setstate": b"c__main__\nX\n)\x81}(" + text("__setstate__") + b"cos\nmkdir\nub" + TRACE + b"b",
    "load_from_bytes": b"ctorch.storage\n_load_from_bytes\n(B\x40\0\0\0"
    + b"cos\nmkdir\n" * 7
    + b"tR",
    "torch_jit": b"ctorch.jit\nload\n(" + TRACE + b"tR",
    "torch_load": b"ctorch\nload\n(" + TRACE + b"tR",
    "by_type": b"ctorch._tensor\n_rebuild_from_type_v2\n(cos\nmkdir\nNX\1\0\0\0t"
    + TRACE
    + b"tN\x87R",
    "extension": b"\x82\1(" + TRACE + b"tR",
    "persistent": b"Pos.mkdir\n",
    "persistent_tuple": b"(" + text("storage") + b"cos\nmkdir\n" + TRACE + b"NI3\ntQ",
    "numpy": b"cnumpy.core.multiarray\nscalar\n(cos\nmkdir\n" + TRACE + b"tR",
    "numpy_load": b"cnumpy\nload\n(" + TRACE + b"\x88tR",
    "run": b"cnumpy.testing._private.utils\nrunstring\n(" + TRACE + b"}tR",
    "import": b"cantigravity\nfly_from_uranus\n.",
}


@pytest.mark.parametrize("name", list(PAYLOADS))
@pytest.mark.parametrize("kind", ["plain", "zipped", "legacy"])
def test_no_code_of_a_pickle_runs(tmp_path: Path, name: str, kind: str) -> None:
    trace = tmp_path / "trace"
    payload = PAYLOADS[name].replace(TRACE, text(str(trace)))
    content = b"\x80\2}(" + text("a.weight") + payload + text("b.weight") + b"Nu."
    path = tmp_path / "m.pt"
    if kind == "plain":
        path.write_bytes(content)
    elif kind == "zipped":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("m/data.pkl", content)
    else:
        magic = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)
        path.write_bytes(magic + pickle.dumps(1001) + pickle.dumps({}) + content + b"].")
    modules = set(sys.modules)
    with pytest.raises((ValueError, TypeError), match=r"m\.pt: expected "):
        open_source(path)
    assert not trace.exists()
    assert all(name.startswith("encodings.") for name in set(sys.modules) - modules)


class Runs:
    """Makes a folder when a careless reader unpickles it."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("zipped", [True, False])
def test_weights_beside_hostile_objects_are_read_without_running_them(
    tmp_path: Path, zipped: bool
) -> None:
    path, trace = tmp_path / "m.pt", tmp_path / "trace"
    checkpoint = {**WEIGHTS, "hook": Runs(trace)}
    torch.save(checkpoint, path, _use_new_zipfile_serialization=zipped)
    source = open_source(path)
    assert set(loaded(source)) == {"a", "b"}
    assert ("hook", "not a tensor: mkdir") in [(s.name, s.reason) for s in source.skipped]
    assert not trace.exists()


def test_functions_that_are_called_are_those_of_this_package() -> None:
    homes = {function.__module__ for function in FUNCTIONS.values()}
    assert homes == {"farms_fast.weights.sources.torch_files.tensors"}


def read(content: bytes) -> Any:
    return read_pickle(PickleStream(content, 0, len(content)), FUNCTIONS, lambda key: key)


@pytest.mark.parametrize("protocol", range(6))
def test_values_are_those_of_pickle(protocol: int) -> None:
    shared = [1, 2]
    value = {
        "numbers": [0, -1, 255, 65535, 2**31, -(2**70), 1.5, float("inf"), True, False, None],
        "text": ["", "ü€😀", "x" * 3000, "line\nline"],
        "bytes": [b"", b"\x00\xff", b"y" * 3000],
        "tuples": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)],
        "shared": [shared, shared],
        (3): {4.5: [], None: {}},
    }
    again = read(pickle.dumps(value, protocol=protocol))
    assert again == value
    assert again["shared"][0] is again["shared"][1]


def test_foreign_objects_keep_what_they_were_made_of() -> None:
    made = read(pickle.dumps({"c": complex(1, 2), "f": os.path.join, "s": frozenset({1})}))
    assert (made["c"].name, made["c"].args) == ("builtins.complex", (1.0, 2.0))
    assert isinstance(made["f"], Global)
    assert made["f"].name.endswith("path.join")
    assert isinstance(made["s"], StandIn)
    assert made["s"].elements == [1]


# --- bounds ---


@pytest.fixture
def within_bounds() -> Iterator[None]:
    """What is read costs neither much time nor much memory."""
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert time.process_time() - start < 8
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 700 * MIB


def nested_tuples() -> bytes:
    """A key whose hash takes 2^60 steps."""
    return b"}(" + b")" + b"2\x86" * 60 + b"Nu."


BOMBS: dict[str, Callable[[], bytes]] = {
    "memo": lambda: b"Nr\xff\xff\xff\xff.",
    "length": lambda: b"\x8e" + (2**40).to_bytes(8, "little") + b"x.",
    "text_length": lambda: b"\x8d" + (2**63 - 1).to_bytes(8, "little") + b"x.",
    "frame": lambda: b"\x80\4\x95" + (2**62).to_bytes(8, "little") + b"}.",
    "long": lambda: b"\x8b\xff\xff\xff\x7f1.",
    "digits": lambda: b"I" + b"9" * 10**6 + b"\n.",
    "deep_list": lambda: b"]" * 100_000 + b"a" * 99_999 + b".",
    "deep_tuple": lambda: b")" + b"\x85" * 100_000 + b".",
    "marks": lambda: b"(" * 100_000 + b"t" * 100_000 + b".",
    "hash": nested_tuples,
    "shared_lists": lambda: (
        b"](" + b"N" * 10**5 + b"eq\0" + b"cbuiltins\nlist\nq\1" + b"h\1h\0\x85R" * 3 * 10**4 + b"."
    ),
    "shared_pairs": lambda: (
        b"]("
        + (text("k") + b"N\x86") * 10**4
        + b"eq\0ccollections\nOrderedDict\nq\1"
        + b"h\1h\0\x85R" * 10**5
        + b"."
    ),
    "shared_arguments": lambda: (
        b"(" + b"N" * 10**5 + b"tq\0" + b"ctorch\nSize\nh\0R" * 10**4 + b"."
    ),
    "bytes": lambda: (
        b"]" + text("x" * 1000) + b"q\0c_codecs\nencode\nq\1" + b"h\1h\0\x85R" * MANY + b"."
    ),
    "names": lambda: text("x" * 900) + b"q\0" + b"h\0h\0\x93" * MANY + b".",
}


@pytest.mark.slow
@pytest.mark.usefixtures("within_bounds")
@pytest.mark.parametrize("name", list(BOMBS))
def test_bombs_take_neither_time_nor_memory(tmp_path: Path, name: str) -> None:
    path = tmp_path / "m.pt"
    path.write_bytes(BOMBS[name]())
    with pytest.raises((ValueError, TypeError), match=r"m\.pt: expected "):
        open_source(path)


def test_operations_and_bytes_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "MOST_OPERATIONS", 100)
    with pytest.raises(ValueError, match="more than 100 operations"):
        read(b"N" * 101 + b".")
    monkeypatch.setattr(stream, "MOST_BYTES", 50)
    with pytest.raises(ValueError, match="more than 50 bytes beside its arrays"):
        read(text("x" * 60) + b".")


@pytest.mark.parametrize("member", ["m/data.pkl", "m/byteorder"])
def test_compressed_member_that_is_too_large_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, member: str
) -> None:
    monkeypatch.setattr(reader, "MOST_BYTES", MIB)
    path = tmp_path / "m.pt"
    contents = {"m/data.pkl": pickle.dumps({"a": 1}), "m/byteorder": b"little"}
    contents[member] = bytes(16 * MIB)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    assert path.stat().st_size < MIB
    with pytest.raises(ValueError, match=rf"{member} has 16,777,216 bytes, more than "):
        open_source(path)


def test_directory_of_an_archive_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.pt"
    torch.save({f"w{i}": torch.ones(2, 2) for i in range(50)}, path)
    monkeypatch.setattr("farms_fast.weights.sources.zip_archives._DIRECTORY_BYTES", 1000)
    with pytest.raises(ValueError, match="its directory is too long"):
        open_source(path)


def test_members_that_are_there_twice_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", pickle.dumps({"a": 1}))
        archive.writestr("m/data.pk2", pickle.dumps({"a": 1}))
    path.write_bytes(path.read_bytes().replace(b"data.pk2", b"data.pkl"))
    with pytest.raises(ValueError, match=r"zip archive has 'm/data\.pkl' twice"):
        open_source(path)


def mutated(content: bytes, chance: random.Random) -> bytes:
    """Some bytes changed, left out, doubled or cut off."""
    changed = bytearray(content)
    for _ in range(chance.choice([1, 1, 2, 5])):
        position = chance.randrange(len(changed))
        kind = chance.randrange(4)
        if kind == 0:
            changed[position] = chance.randrange(256)
        elif kind == 1:
            changed[position] ^= 1 << chance.randrange(8)
        elif kind == 2:
            del changed[position : position + chance.randrange(1, 9)]
        else:
            changed[position:position] = changed[position : position + chance.randrange(1, 9)]
        if not changed:
            break
    return bytes(changed)


def sound_files() -> dict[str, bytes]:
    checkpoint = {"state_dict": WEIGHTS, "args": Path("x"), "best": np.float64(3)}
    files = {}
    for kind in (True, False):
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer, _use_new_zipfile_serialization=kind)
        files[f"torch_{kind}"] = buffer.getvalue()
    arrays = {name: tensor.numpy() for name, tensor in WEIGHTS.items()}
    files["arrays"] = pickle.dumps(arrays)
    files["tensors"] = pickle.dumps(WEIGHTS, protocol=2)
    return files


@pytest.mark.usefixtures("within_bounds")
@pytest.mark.parametrize("name", list(sound_files()))
def test_mutated_files_end_in_tensors_or_one_error(tmp_path: Path, name: str) -> None:
    content, chance, path = sound_files()[name], random.Random(0), tmp_path / "m.pt"
    outcomes = set()
    for _ in range(150):
        path.write_bytes(mutated(content, chance))
        outcomes.add(outcome(path))
    assert outcomes == {"read", "refused"}


def outcome(path: Path) -> str:
    """What becomes of a file: anything but tensors or one line about it is its message."""
    try:
        source = open_source(path)
        tensors = {header.name: source.load(header.name) for header in source.headers}
    except (ValueError, TypeError) as error:
        said = str(error)
        return "refused" if f"{path}: expected " in said and "\n" not in said else said
    shapes = {header.name: header.shape for header in source.headers}
    read = shapes == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return "read" if read else f"{shapes}"
