"""What a pickle is read from: a part of a file, within bounds that every checkpoint keeps."""

from __future__ import annotations

import io
from typing import BinaryIO

from farms_fast.weights.sources.stored_tensors import BrokenContent, FileBytes

# An object of each kind takes at most 230 bytes, so these bound the memory to 1 GiB.
MOST_OPERATIONS = 3_000_000
MOST_BYTES = 2**28
LONGEST_NAME = 2**12


class _Budget:
    """What may still be read of a file's pickles."""

    def __init__(self) -> None:
        self.operations = MOST_OPERATIONS
        self.bytes = MOST_BYTES

    def take_bytes(self, count: int) -> None:
        """Notes bytes that are held; BrokenContent where there are too many."""
        self.bytes -= count
        if self.bytes < 0:
            raise BrokenContent(f"it has more than {MOST_BYTES:,} bytes beside its arrays")


class PickleStream:
    """A part of a file that pickles are read from.

    Long byte strings are left in the file, but not in content that is in memory.
    """

    def __init__(self, source: BinaryIO | bytes, start: int, end: int) -> None:
        self.leaves_bytes = not isinstance(source, bytes)
        self.budget = _Budget()
        self.longest_line = LONGEST_NAME
        self._file = io.BytesIO(source) if isinstance(source, bytes) else source
        self._position, self._end = start, end
        self._file.seek(start)

    def operation(self) -> bytes:
        """The byte of the next operation; `BrokenContent` where there are too many."""
        self.budget.operations -= 1
        if self.budget.operations < 0:
            raise BrokenContent(f"it has more than {MOST_OPERATIONS:,} operations")
        if self._position >= self._end:
            return b""
        self._position += 1
        return self._file.read(1)

    def read(self, count: int) -> bytes:
        """As a file's; shorter at the end."""
        count = min(count, self._end - self._position)
        self.budget.take_bytes(count)
        content = self._file.read(count)
        self._position += len(content)
        return content

    def readline(self) -> bytes:
        """As a file's; a line that is too long has no end."""
        line = self._file.readline(min(self.longest_line, self._end - self._position))
        self.budget.take_bytes(len(line))
        self._position += len(line)
        return line

    def skip(self, count: int) -> int:
        """Leaves out bytes, and tells where they begin."""
        start = self._position
        if count > self._end - start:
            raise BrokenContent("it ends in a byte string")
        self._position += count
        self._file.seek(self._position)
        return start

    def take(self, count: int) -> FileBytes | bytes:
        """Bytes that may be long: where they are in the file, or themselves from memory."""
        if self.leaves_bytes:
            return FileBytes(self.skip(count), count)
        content = self.read(count)
        if len(content) < count:
            raise BrokenContent("it ends in a byte string")
        return content

    def inner(self, content: FileBytes | bytes) -> PickleStream:
        """A stream of pickles in a byte string of this one; `resume` goes on with this one."""
        if isinstance(content, FileBytes) and content.is_text:
            self.budget.take_bytes(content.size)
            self._file.seek(content.offset)
            content = self._file.read(content.size).decode().encode("latin-1")
        if isinstance(content, bytes):
            inner = PickleStream(content, 0, len(content))
        else:
            inner = PickleStream(self._file, content.offset, content.offset + content.size)
        inner.budget = self.budget
        return inner

    def resume(self) -> None:
        """Goes on after an inner stream."""
        self._file.seek(self._position)
