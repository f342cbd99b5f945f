"""What files of `torch.save`, of TorchScript and of `pickle` hold, without running any of it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from farms_fast.core.regular_files import open_regular
from farms_fast.weights.sources.stored_tensors import (
    BrokenContent,
    FileBytes,
    Read,
    ZipMember,
    bytes_of,
)
from farms_fast.weights.sources.torch_files.checkpoint import CONSTANTS, Checkpoint, is_scripted
from farms_fast.weights.sources.torch_files.machine import StandIn, read_pickle
from farms_fast.weights.sources.torch_files.stream import MOST_BYTES, PickleStream
from farms_fast.weights.sources.torch_files.tensors import (
    FUNCTIONS,
    Storage,
    TorchTensor,
    storage_of,
)
from farms_fast.weights.sources.zip_archives import zip_members

_MAGIC = 0x1950A86A20F9469CFC6C
_ZIP = b"PK\x03\x04"
# Members of the archives of torch before 0.1.10, which are tar files.
OLD_ARCHIVE_MEMBERS = (b"sys_info\0", b"pickle\0", b"tensors\0", b"storages\0")
# Of the code of a TorchScript archive: it names the buffers.
_CODE_BYTES = 2**22
_BUFFERS = re.compile(
    r"^class (\w+)\(Module\):\n(?:  __\w+__ = .*\n)*?  __buffers__ = \[(.*)\]$", re.M
)


def read_checkpoint(path: Path, read: Read) -> Checkpoint:
    """What a file holds; `read` reads bytes of it.

    Raises:
        ValueError: the file is damaged or of another format.
    """
    with open_regular(path) as file:
        start = file.read(512)
        try:
            if start.startswith(_ZIP):
                return _read_zip(path, file, read)
            if start.startswith(OLD_ARCHIVE_MEMBERS):
                raise BrokenContent("it is a tar file, which torch wrote before version 0.1.10")
            size = os.fstat(file.fileno()).st_size
            return Checkpoint(_read_pickles(PickleStream(file, 0, size), nested=True))
        except BrokenContent as error:
            raise ValueError(
                f"{path}: expected a pickled checkpoint, got one that is damaged or of another"
                f" kind: {error}"
            ) from None


# --- files that are no zip archives ---


def _read_pickles(stream: PickleStream, nested: bool) -> Any:
    """A pickle, or those of torch before 1.6 with the storages behind them."""
    storages: dict[Any, Storage] = {}
    functions = _functions(stream) if nested else FUNCTIONS

    def next_pickle() -> Any:
        return read_pickle(stream, functions, lambda key: storage_of(key, storages, _later))

    tree = next_pickle()
    if tree != _MAGIC:
        return tree
    next_pickle()  # the version of the format
    next_pickle()  # sizes of C's types: storages are little-endian on any machine
    tree = next_pickle()
    keys = next_pickle()
    if not isinstance(keys, list):
        raise BrokenContent("it does not list its storages")
    for key in keys:
        storage = storages.get(key) if isinstance(key, (str, int)) else None
        count = stream.read(8)
        if storage is None or storage.location is not None or len(count) < 8:
            raise BrokenContent("its storages are not those of its tensors")
        size = int.from_bytes(count, "little") * storage.dtype.itemsize
        if size < storage.size:
            raise BrokenContent("its storages have other sizes than its tensors")
        storage.location = stream.take(size)
    return tree


def _later(key: Any) -> None:
    """Where a storage is, is told behind the pickle."""


def _functions(stream: PickleStream) -> dict[str, Callable[..., Any]]:
    """With the one for a pickled tensor's storage: a file of torch in a byte string."""

    def load(content: Any) -> Storage:
        if not isinstance(content, (bytes, FileBytes)):
            raise BrokenContent("it has a storage without bytes")
        storage = _read_pickles(stream.inner(content), nested=False)
        if not isinstance(storage, Storage):
            raise BrokenContent("it has a storage that is none")
        stream.resume()
        return storage

    return {**FUNCTIONS, "torch.storage._load_from_bytes": load}


# --- zip archives ---


def _read_zip(path: Path, file: BinaryIO, read: Read) -> Checkpoint:
    members = zip_members(path)
    root = next((name for name in members if re.fullmatch(r"(?:[^/]+/)?data\.pkl", name)), None)
    if root is None:
        some = ", ".join(repr(name[:80]) for name in list(members)[:5]) or "nothing"
        raise BrokenContent(f"a zip archive without data.pkl (it holds {some})")
    folder = root.removesuffix("data.pkl")
    swapped = _swapped(members.get(f"{folder}byteorder"), read)
    tree = _member_pickle(members[root], f"{folder}data/", members, file, read)
    constants = members.get(f"{folder}constants.pkl")
    if constants is None:
        return Checkpoint(tree, swapped)
    # TorchScript: a frozen model has its weights among the constants of its code.
    values = _member_pickle(constants, f"{folder}constants/", members, file, read)
    if isinstance(values, tuple) and isinstance(tree, StandIn) and is_scripted(tree):
        named = {f"c{n}": value for n, value in enumerate(values) if isinstance(value, TorchTensor)}
        tree.state = {**tree.state, **({CONSTANTS: named} if named else {})}
    return Checkpoint(tree, swapped, _buffers(members, f"{folder}code/", read))


def _swapped(member: ZipMember | None, read: Read) -> bool:
    if member is None:
        return False
    order = _content(member, read, 16)
    if order not in (b"little", b"big"):
        raise BrokenContent("its byteorder is neither little nor big")
    return order == b"big"


def _content(member: ZipMember, read: Read, most: int) -> bytes:
    if member.size > most:
        raise BrokenContent(f"{member.name[:80]} has {member.size:,} bytes, more than {most:,}")
    return bytes_of(member, 0, member.size, read).numpy().tobytes()


def _member_pickle(
    member: ZipMember, folder: str, members: Mapping[str, ZipMember], file: BinaryIO, read: Read
) -> Any:
    storages: dict[Any, Storage] = {}

    def location(key: Any) -> ZipMember | None:
        return members.get(f"{folder}{key}")

    if member.defect:
        raise BrokenContent(member.defect)
    if member.method == 0 and member.start is not None:
        stream = PickleStream(file, member.start, member.start + member.size)
    else:
        content = _content(member, read, MOST_BYTES)
        stream = PickleStream(content, 0, len(content))
    return read_pickle(stream, _functions(stream), lambda key: storage_of(key, storages, location))


def _buffers(
    members: Mapping[str, ZipMember], folder: str, read: Read
) -> dict[str, frozenset[str]]:
    """Names of the buffers of TorchScript's classes, from their source, which is only searched."""
    buffers: dict[str, frozenset[str]] = {}
    left = MOST_BYTES
    for name, member in members.items():
        if not name.startswith(folder) or not name.endswith(".py") or member.size > _CODE_BYTES:
            continue
        left -= member.size
        if left < 0:
            break
        module = name.removeprefix(folder).removesuffix(".py").replace("/", ".")
        text = _content(member, read, _CODE_BYTES).decode("utf-8", "replace")
        for found in _BUFFERS.finditer(text):
            buffers[f"{module}.{found[1]}"] = frozenset(re.findall(r'"([^"]*)"', found[2]))
    return buffers
