"""Damage to files: of any bytes, and of what JSON, zip archives, safetensors and SQLite hold.

A mutation changes a file in place, by a generator of random numbers alone.
"""

from __future__ import annotations

import json
import re
import sqlite3
import struct
import warnings
import zipfile
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from random import Random
from typing import Any

Mutation = Callable[[Random, Path], None]

# As JSON writes them, and as it would if it could.
VALUES = (
    *("null", "true", "0", "-1", "1.5", "1e400", "-1e400", "NaN", "Infinity", "-Infinity"),
    *(str(2**31), str(2**32 + 1), str(2**63 - 1), str(2**63), str(2**64), "1" + "0" * 400),
    *("9" * 5000, '""', '"text"', '"\\u001b]0;title\\u0007"', '"../../up"', '"/etc/passwd"'),
    *('"\\ud800"', '"model.safetensors"', '"=1+1"', '"' + "a" * 10**5 + '"'),
    *("[]", "{}", "[[[]]]", '["a", "a"]', '{"a": 1, "a": 2}', "[1e400]"),
    "[" * 10**5 + "]" * 10**5,
)
NUMBERS = (
    0,
    1,
    2,
    127,
    255,
    2**15,
    2**16 - 1,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**40,
    2**62,
    2**63 - 1,
)
NUMBERS += (2**63, 2**64 - 1)
# How many changes of a kind: one alone gets furthest.
_TIMES = (1, 1, 1, 2, 4)


# ------------------------------------------------------------------------------------------- bytes


def any_bytes(rng: Random, path: Path) -> None:
    """A few changes of bytes, most of the time one."""
    path.write_bytes(changed(rng, path.read_bytes()))


def beginning(rng: Random, path: Path) -> None:
    """Changes of bytes among the first 256, where formats keep their lengths and counts."""
    content = path.read_bytes()
    path.write_bytes(changed(rng, content[:256]) + content[256:])


def changed(rng: Random, content: bytes) -> bytes:
    for _ in range(rng.choice(_TIMES)):
        content = rng.choice(_CHANGES)(rng, content)
    return content


def _flip(rng: Random, content: bytes) -> bytes:
    at, size = _slice(rng, content, 8)
    return content[:at] + rng.randbytes(size) + content[at + size :]


def _cut(rng: Random, content: bytes) -> bytes:
    return content[: rng.randrange(len(content) + 1)]


def _without(rng: Random, content: bytes) -> bytes:
    at, size = _slice(rng, content, 64)
    return content[:at] + content[at + size :]


def _longer(rng: Random, content: bytes) -> bytes:
    at, size = _slice(rng, content, 64)
    return content[:at] + rng.choice([bytes(size), rng.randbytes(size)]) + content[at:]


def _copied(rng: Random, content: bytes) -> bytes:
    (at, size), to = _slice(rng, content, 200), rng.randrange(len(content) + 1)
    return content[:to] + content[at : at + size] + content[to + size * rng.randint(0, 1) :]


def _number(rng: Random, content: bytes) -> bytes:
    """A number of some width, where one may be, becomes one that is too large."""
    width = rng.choice([1, 2, 4, 8])
    at = rng.randrange(max(1, len(content) // width)) * width + rng.choice([0, 0, 0, 1])
    value = rng.choice(NUMBERS) % 2 ** (8 * width)
    order = rng.choice(["little", "little", "big"])
    return content[:at] + value.to_bytes(width, order) + content[at + width :]


def _digits(rng: Random, content: bytes) -> bytes:
    """A number in text becomes another one."""
    numbers = list(re.finditer(rb"\d+", content))
    if not numbers:
        return content
    chosen = rng.choice(numbers)
    text = rng.choice([str(rng.choice(NUMBERS)), "-1", "", "1e400", "9" * 400]).encode()
    return content[: chosen.start()] + text + content[chosen.end() :]


def _slice(rng: Random, content: bytes, most: int) -> tuple[int, int]:
    return rng.randrange(len(content) + 1), rng.randint(1, most)


_CHANGES: tuple[Callable[[Random, bytes], bytes], ...]
_CHANGES = (_flip, _flip, _number, _number, _number, _digits, _copied, _cut, _without, _longer)


# -------------------------------------------------------------------------------------------- JSON


def json_values(rng: Random, path: Path) -> None:
    """Values of a JSON file become others, go, or are there twice."""
    path.write_bytes(changed_json(rng, path.read_bytes()))


def changed_json(rng: Random, text: bytes) -> bytes:
    root: list[Any] = [json.loads(text)]
    raw: dict[str, str] = {}
    for _ in range(rng.choice(_TIMES)):
        places = list(_places(root))
        holder, key = rng.choice(places)
        how = rng.randrange(8)
        marker = f"raw {len(raw)}"
        if how < 2:
            other, at = rng.choice(places)
            holder[key] = json.loads(json.dumps(other[at]))
        elif how < 6:
            raw[marker] = rng.choice(VALUES)
            holder[key] = marker
        elif isinstance(holder, dict):
            value = holder.pop(key)
            if how == 7:
                raw[marker] = rng.choice(['""', '"\\u001b[2J"', f'"{"a" * 1000}"', '"a\\nb"'])
                holder[marker] = value
        elif holder is not root:
            holder.insert(key, holder[key])
    content = json.dumps(root[0])
    for marker, value in raw.items():
        content = content.replace(json.dumps(marker), value)
    if rng.randrange(8) == 0 and (member := re.search(r'"[^"]*": [^\[{,}\]]+', content)):
        content = content.replace(member[0], f"{member[0]}, {member[0]}", 1)
    return content.encode("utf-8", "surrogatepass")


def _places(holder: Any) -> Any:
    """Every value, by what holds it and its key there."""
    entries = holder.items() if isinstance(holder, dict) else enumerate(holder)
    for key, value in list(entries):
        yield holder, key
        if isinstance(value, (dict, list)):
            yield from _places(value)


def safetensors_header(rng: Random, path: Path) -> None:
    """The header says something else; its length is right most of the time."""
    content = path.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    header = changed_json(rng, content[8:begin])
    size = len(header) if rng.randrange(6) else rng.choice(NUMBERS)
    path.write_bytes(size.to_bytes(8, "little") + header + content[begin:])


# --------------------------------------------------------------------------------------------- zip


def zip_members(rng: Random, path: Path) -> None:
    """Members of an archive are changed, compressed, renamed, doubled, or go."""
    with zipfile.ZipFile(path) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    at = rng.randrange(len(members))
    name, content = members[at]
    how = rng.choice(["content", "content", "content", "compress", "name", "twice", "none", "more"])
    compression = zipfile.ZIP_STORED
    if how == "content":
        members[at] = name, changed(rng, content)
    elif how == "compress":
        compression = rng.choice([zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
    elif how == "name":
        members[at] = rng.choice(["../" + name, "/" + name, name + "\x1b[2J", "a", ""]), content
    elif how == "twice":
        members.append((name, changed(rng, content)))
    elif how == "none":
        del members[at]
    else:
        members.append((f"{name.partition('/')[0]}/more", bytes(rng.choice([0, 10, 10**6]))))
    target = BytesIO()
    with zipfile.ZipFile(target, "w", compression) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one is of names that are there twice
        for name, content in members:
            archive.writestr(zipfile.ZipInfo(name), content, compression)
    path.write_bytes(target.getvalue())


# ------------------------------------------------------------------------------------------ SQLite


def sqlite_values(rng: Random, path: Path) -> None:
    """Values of a database become others, or its tables other things."""
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        tables = ("runs", "layers", "spectra")
        columns = [
            (table, row[1])
            for table in tables
            for row in connection.execute(f"PRAGMA table_info({table})")
        ]
        for _ in range(rng.choice(_TIMES)):
            if rng.randrange(5) == 0:
                statement: tuple[str, Sequence[object]] = (rng.choice(_STATEMENTS), ())
            else:
                table, column = rng.choice(columns)
                statement = (f'UPDATE {table} SET "{column}" = ?', (_stored_value(rng),))
            try:
                connection.execute(*statement)
            except sqlite3.Error:
                continue  # what the tables forbid is no damage
    finally:
        connection.close()


def _stored_value(rng: Random) -> object:
    text = rng.choice(VALUES)
    as_bytes = struct.pack("<d", rng.choice([0.0, 1e300, float("inf")])) * rng.randint(0, 3)
    values = (text, json.dumps(text), as_bytes, b"\xff\xfe", None, "\x1b]0;title\x07", "x" * 10**5)
    numbers = (-1, 0, 1, 7, 2**63 - 1, -(2**63), 1e308, float("inf"), 0.5)
    return rng.choice(values + numbers)


_STATEMENTS = (
    "CREATE TRIGGER t AFTER INSERT ON layers BEGIN DELETE FROM runs; END",
    "CREATE VIEW v AS SELECT * FROM layers",
    "ALTER TABLE layers RENAME TO mine",
    "ALTER TABLE layers RENAME COLUMN alpha TO beta",
    "ALTER TABLE runs ADD COLUMN more",
    "DROP TABLE spectra",
    "DELETE FROM layers",
    "DELETE FROM runs",
    "DELETE FROM spectra",
    "INSERT INTO spectra SELECT layer, part + 1, windows, k, evals FROM spectra",
    "PRAGMA user_version = 9",
    "PRAGMA application_id = 1",
    "CREATE TABLE more AS SELECT randomblob(100000)",
)
