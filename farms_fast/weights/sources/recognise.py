"""What a file is, by its first bytes; by its name only where they do not tell."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

from farms_fast.core.regular_files import open_regular
from farms_fast.weights.sources.safetensors import HEADER_BYTES
from farms_fast.weights.sources.stored_tensors import BrokenContent
from farms_fast.weights.sources.torch_files.reader import OLD_ARCHIVE_MEMBERS
from farms_fast.weights.sources.zip_archives import zip_names


@dataclass(frozen=True)
class FileKind:
    """A kind of file as messages call it, and the way out where it is not read."""

    name: str
    way_out: str = ""


SAFETENSORS = FileKind("safetensors")
PICKLE = FileKind("a pickle of torch")
GGUF = FileKind("GGUF")
HDF5 = FileKind("HDF5")
KERAS = FileKind("a Keras archive")
ONNX = FileKind("ONNX")
MSGPACK = FileKind("msgpack of Flax")
NPZ = FileKind("NumPy .npz")
NPY = FileKind("NumPy .npy")
INDEX = FileKind("an index of shards")

_UNPACK = "unpack it and give the path of what is in it"
_EXPORT = "export the model's weights as safetensors or ONNX"
_GRAPH = "load the model in TensorFlow and save its weights as .weights.h5"
_ZIP = FileKind("a zip archive without weights that are read", _UNPACK)
_JSON = FileKind("JSON", "give the path of the weights, or of the folder")
_EMPTY = FileKind("an empty file")
_UNKNOWN = FileKind("a file of no format that is known")

_BEGINNINGS = (
    (b"GGUF", GGUF),
    (b"\x93NUMPY", NPY),
    *((bytes((0x80, protocol)), PICKLE) for protocol in range(2, 6)),
    *((name, PICKLE) for name in OLD_ARCHIVE_MEMBERS),
    (
        b"version https://git-lfs.github.com/spec/",
        FileKind("a Git LFS pointer", "fetch the file itself with `git lfs pull`"),
    ),
    *(
        (magic, FileKind("GGML of before GGUF", "convert it to GGUF with llama.cpp"))
        for magic in (b"lmgg", b"fmgg", b"tjgg", b"algg")
    ),
    *(
        (magic, FileKind(f"a file packed by {packer}", f"unpack it with {packer} first"))
        for magic, packer in (
            (b"\x1f\x8b", "gzip"),
            (b"\x28\xb5\x2f\xfd", "zstd"),
            (b"\xfd7zXZ\0", "xz"),
            (b"BZh", "bzip2"),
            (b"7z\xbc\xaf\x27\x1c", "7z"),
        )
    ),
    *(
        (begin, FileKind("a web page", "the download was not of the file itself"))
        for begin in (b"<!DOCTYPE html", b"<!doctype html", b"<html")
    ),
    (
        b"<?xml",
        FileKind("XML, as OpenVINO's models have", "give the model that it was converted from"),
    ),
    (
        b"SQLite format 3\0",
        FileKind("an SQLite file", "`farms-fast export` reads stores of analyses"),
    ),
    (b"PAR1", FileKind("Parquet")),
    (b"%PDF", FileKind("PDF")),
)
# At byte 4, behind the offset of FlatBuffers' root.
_FLATBUFFERS = {
    b"TFL3": FileKind("TensorFlow Lite", "give the model that it was converted from"),
    b"ET12": FileKind("ExecuTorch", "give the state dict of the module that it was exported from"),
}
_SUFFIXES = {
    ".safetensors": SAFETENSORS,
    **dict.fromkeys((".pt", ".pth", ".bin", ".ckpt", ".ptl", ".pkl", ".pickle"), PICKLE),
    ".gguf": GGUF,
    **dict.fromkeys((".h5", ".hdf5", ".keras"), HDF5),
    ".onnx": ONNX,
    ".msgpack": MSGPACK,
    ".npz": NPZ,
    ".npy": NPY,
    ".tar": PICKLE,  # model.pth.tar is what many training scripts save; an archive has a magic
    ".mlmodel": FileKind("Core ML", "give the model that it was converted from"),
    **dict.fromkeys(
        (".pb", ".index", ".data-00000-of-00001"), FileKind("a file of TensorFlow", _GRAPH)
    ),
    ".engine": FileKind("a TensorRT engine", "give the model that it was built from"),
    ".distcp": FileKind("a part of a torch.distributed.checkpoint", "give the path of its folder"),
}
# Files that hold weights when their names end so.
WEIGHT_SUFFIXES = tuple(
    suffix
    for suffix, kind in _SUFFIXES.items()
    if kind in (SAFETENSORS, PICKLE, GGUF, HDF5, ONNX, MSGPACK, NPZ, NPY)
)


def recognise(path: Path) -> FileKind:
    """The kind of a regular file; OSError or ValueError for what cannot be read."""
    with open_regular(path) as file:
        head = file.read(4096)
        if head.startswith(b"PK\x03\x04"):
            return _zip_kind(path)
    if not head:
        return _EMPTY
    for begin, kind in _BEGINNINGS:
        if head.startswith(begin):
            return kind
    if kind_at_4 := _FLATBUFFERS.get(head[4:8]):
        return kind_at_4
    # A block of the user's may come before what HDF5 writes.
    if any(head[start : start + 8] == b"\x89HDF\r\n\x1a\n" for start in (0, 512, 1024, 2048)):
        return HDF5
    if head[257:262] == b"ustar":
        return FileKind("a tar archive", _UNPACK)
    if len(head) > 8 and head[8:9] == b"{":
        (header,) = struct.unpack("<Q", head[:8])
        if header <= HEADER_BYTES:
            return SAFETENSORS
    named = _SUFFIXES.get(path.suffix.lower())
    if path.name.endswith(".index.json"):
        return INDEX
    if head.lstrip()[:1] in (b"{", b"[") and named is None:
        return _JSON
    return named or _kind_of_message(head) or _UNKNOWN


def _zip_kind(path: Path) -> FileKind:
    try:
        names = zip_names(path)
    except BrokenContent:
        return _SUFFIXES.get(path.suffix.lower(), PICKLE)  # its reader says what is wrong
    if "model.weights.h5" in names:
        return KERAS
    if any(name.endswith("data.pkl") for name in names):
        return PICKLE
    if any(name.endswith(".npy") for name in names):
        return NPZ
    return _ZIP


def _kind_of_message(head: bytes) -> FileKind | None:
    """ONNX and Flax by the first fields of what they write, which has no magic."""
    # ir_version, a small number, and then one of the other fields of a model.
    if head[:1] == b"\x08" and 0 < head[1] < 64 and head[2:3] in (b"\x12", b"\x1a", b"\x3a", b"B"):
        return ONNX
    # A map whose first key is a text.
    first_key = {0xDE: 3, 0xDF: 5}.get(head[0], 1 if 0x81 <= head[0] <= 0x8F else 0)
    if first_key and len(head) > first_key:
        key = head[first_key]
        if 0xA1 <= key <= 0xBF or key in (0xD9, 0xDA):
            return MSGPACK
    return None
