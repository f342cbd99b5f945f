"""Reads pickles without running anything that they name.

A pickle is a program for a stack machine: it names functions and calls them. This machine imports
no name. A class or function becomes a `Global`, and what it would have made a `StandIn` that keeps
the arguments. Only the few functions that a caller gives for names are called, and those are its
own. Byte strings are left in the file, so that arrays cost nothing until they are loaded.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from farms_fast.weights.sources.stored_tensors import BrokenContent, FileBytes
from farms_fast.weights.sources.torch_files.stream import LONGEST_NAME, PickleStream

# Shorter byte strings are read: they are text, or arrays of a few numbers.
_LEFT_IN_FILE = 1024
_LONGEST_LINE = 2**24
# A memoised tuple may be used again and again: what copies it must be short.
_MOST_ARGUMENTS = 64
# Below this, the hash of an integer is the integer: no pickle can make them all collide.
_KEY_BITS = 60


@dataclass(frozen=True, eq=False)
class Global:
    """A class or function by name."""

    name: str


@dataclass(eq=False, slots=True)
class StandIn:
    """An object of a class that is not imported: what it was made of.

    Attributes:
        name: of its class, or of the function that would have made it.
        args: that it would have been made with.
        state: that would have been set.
        entries: that were set as items.
        elements: that were appended.
    """

    name: str
    args: tuple[Any, ...] = ()
    state: Any = None
    entries: dict[Any, Any] | None = None
    elements: list[Any] | None = None


def read_pickle(
    stream: PickleStream,
    functions: Mapping[str, Callable[..., Any]],
    persistent: Callable[[Any], Any],
) -> Any:
    """What a pickle holds, of `dict`, `list`, `tuple`, text, numbers, `Global` and `StandIn`.

    Args:
        stream: at the pickle's first byte; afterwards behind its last.
        functions: what to call for names of functions and classes. They are called with arguments
            that anyone may have written.
        persistent: makes an object of a persistent id.

    Raises:
        BrokenContent: it is damaged or too large.
    """
    return _Machine(stream, functions, persistent).run()


class Buildable:
    """A value of a caller's functions that a pickle gives a state afterwards."""

    def build(self, state: Any) -> int:
        """Takes the state, and tells how many bytes were made of it."""
        raise NotImplementedError


# What protocols below 2 call to make an object, and its names in Python 2.
_NEW_OBJECT = ("copyreg._reconstructor", "copyreg.__newobj__", "copyreg.__newobj_ex__")
_MODULES = {"copy_reg": "copyreg", "__builtin__": "builtins"}
# A length of so many bytes before the content.
_LENGTHS = {"BINBYTES": 4, "BINBYTES8": 8, "BYTEARRAY8": 8, "BINUNICODE": 4, "BINUNICODE8": 8}
_LENGTHS |= {"BINSTRING": 4}
_LONG_LINES = {"STRING", "UNICODE"}


class _Machine:
    def __init__(
        self,
        stream: PickleStream,
        functions: Mapping[str, Callable[..., Any]],
        persistent: Callable[[Any], Any],
    ) -> None:
        self._stream = stream
        self._functions = functions
        self._persistent = persistent
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []  # the stacks under each mark
        self._memo: dict[int, Any] = {}
        self._globals: dict[tuple[str, str], Global] = {}

    def run(self) -> Any:
        stream = self._stream
        try:
            while True:
                code = stream.operation()
                if code == b".":
                    return self._stack.pop()
                operation = _OPERATIONS.get(code)
                if operation is None:
                    what = "it is damaged, or no pickle" if code else "it has no end"
                    raise BrokenContent(what)
                name, argument_of, step = operation
                if argument_of is None:
                    step(self, None)
                elif stream.leaves_bytes and name in _LENGTHS:
                    step(self, self._bytes(name))
                else:
                    stream.longest_line = _LONGEST_LINE if name in _LONG_LINES else LONGEST_NAME
                    step(self, argument_of(stream))
        except BrokenContent:
            raise
        except (LookupError, ValueError, TypeError, AttributeError, OverflowError) as error:
            raise BrokenContent("it is damaged") from error

    def _bytes(self, name: str) -> Any:
        """A byte string or text, in the file where it is long."""
        length = self._stream.read(_LENGTHS[name])
        size = int.from_bytes(length, "little")
        if size > _LEFT_IN_FILE:
            return FileBytes(self._stream.skip(size), size, "UNICODE" in name)
        content = self._stream.read(size)
        if len(length) < _LENGTHS[name] or len(content) < size:
            raise BrokenContent("it ends in a byte string")
        if "BYTE" in name:
            return content
        return content.decode(*("utf-8", "surrogatepass") if "UNICODE" in name else ("latin-1",))

    def _marked(self) -> list[Any]:
        """What was pushed since the last mark, which is gone."""
        marked, self._stack = self._stack, self._below.pop()
        return marked

    def _call(self, function: object, arguments: object) -> Any:
        if not isinstance(arguments, tuple) or len(arguments) > _MOST_ARGUMENTS:
            raise BrokenContent("it is damaged")
        if isinstance(function, Global) and function.name in _NEW_OBJECT:
            function, arguments = arguments[0], arguments[1:]
        if not isinstance(function, Global):
            return StandIn(
                function.name if isinstance(function, StandIn) else "an object", arguments
            )
        known = self._functions.get(function.name)
        value = known(*arguments) if known is not None else StandIn(function.name, arguments)
        if isinstance(value, bytes):
            self._stream.budget.take_bytes(len(value))
        return value

    def _named(self, module: object, name: object) -> Global:
        if not isinstance(name, str) or not isinstance(module, str):
            raise BrokenContent("it is damaged")
        if (module, name) not in self._globals:
            known = _MODULES.get(module, module)
            self._globals[module, name] = Global(f"{known}.{name}"[:LONGEST_NAME])
        return self._globals[module, name]

    # --- operations, each with its argument ---

    def _ignore(self, _: object) -> None:
        pass

    def _push(self, value: Any) -> None:
        self._stack.append(bytes(value) if isinstance(value, bytearray) else value)

    def _put(self, position: int) -> None:
        self._memo[position] = self._stack[-1]

    def _get(self, position: int) -> None:
        self._stack.append(self._memo[position])

    def _memoize(self, _: object) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def _mark(self, _: object) -> None:
        self._below.append(self._stack)
        self._stack = []

    def _tuple_of_last(self, count: int) -> None:
        values = tuple(self._stack[-count:])
        if len(values) < count:
            raise BrokenContent("it is damaged")
        self._stack[-count:] = [values]

    def _pop(self, _: object) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self._marked()

    def _pop_mark(self, _: object) -> None:
        self._marked()

    def _dup(self, _: object) -> None:
        self._stack.append(self._stack[-1])

    def _tuple(self, _: object) -> None:
        values = tuple(self._marked())
        self._stack.append(values)

    def _list(self, _: object) -> None:
        values = self._marked()
        self._stack.append(values)

    def _dict(self, _: object) -> None:
        values = self._marked()
        entries: dict[Any, Any] = {}
        _set_items(entries, values)
        self._stack.append(entries)

    def _frozenset(self, _: object) -> None:
        values = self._marked()
        self._stack.append(StandIn("builtins.frozenset", elements=values))

    def _append(self, _: object) -> None:
        value = self._stack.pop()
        _extend(self._stack[-1], [value])

    def _appends(self, _: object) -> None:
        values = self._marked()
        _extend(self._stack[-1], values)

    def _setitem(self, _: object) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        _set_items(self._stack[-1], [key, value])

    def _setitems(self, _: object) -> None:
        values = self._marked()
        _set_items(self._stack[-1], values)

    def _global(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self._stack.append(self._named(module, name))

    def _stack_global(self, _: object) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self._stack.append(self._named(module, name))

    def _extension(self, argument: int) -> None:
        self._stack.append(Global(f"extension {argument}"))

    def _reduce(self, _: object) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        self._stack.append(self._call(function, arguments))

    def _newobj_ex(self, _: object) -> None:
        self._stack.pop()
        self._reduce(None)

    def _obj(self, _: object) -> None:
        made, *arguments = self._marked()
        self._stack.append(self._call(made, tuple(arguments)))

    def _inst(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        arguments = tuple(self._marked())
        self._stack.append(self._call(self._named(module, name), arguments))

    def _build(self, _: object) -> None:
        state, target = self._stack.pop(), self._stack[-1]
        if isinstance(target, StandIn):
            target.state = state
        elif isinstance(target, Buildable):
            self._stream.budget.take_bytes(target.build(state))

    def _persid(self, argument: str) -> None:
        self._stack.append(self._persistent(argument))

    def _binpersid(self, _: object) -> None:
        self._stack.append(self._persistent(self._stack.pop()))


_Step = Callable[[_Machine, Any], None]


def _made(make: Callable[[], Any]) -> _Step:
    return lambda machine, _: machine._stack.append(make())


def _tuple_of(count: int) -> _Step:
    return lambda machine, _: machine._tuple_of_last(count)


_STEPS: dict[str, _Step] = {
    **dict.fromkeys(("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1"), _Machine._push),
    **dict.fromkeys(("LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING"), _Machine._push),
    **dict.fromkeys(("SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE"), _Machine._push),
    **dict.fromkeys(("BINUNICODE", "BINUNICODE8", "BINBYTES", "BINBYTES8"), _Machine._push),
    **dict.fromkeys(("SHORT_BINBYTES", "BYTEARRAY8"), _Machine._push),
    "NONE": _made(lambda: None),
    "NEWTRUE": _made(lambda: True),
    "NEWFALSE": _made(lambda: False),
    "EMPTY_LIST": _made(list),
    "EMPTY_DICT": _made(dict),
    "EMPTY_TUPLE": _made(tuple),
    "EMPTY_SET": _made(lambda: StandIn("builtins.set")),
    **dict.fromkeys(("PROTO", "FRAME"), _Machine._ignore),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _Machine._put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine._get),
    "MEMOIZE": _Machine._memoize,
    "MARK": _Machine._mark,
    "POP": _Machine._pop,
    "POP_MARK": _Machine._pop_mark,
    "DUP": _Machine._dup,
    "TUPLE": _Machine._tuple,
    "TUPLE1": _tuple_of(1),
    "TUPLE2": _tuple_of(2),
    "TUPLE3": _tuple_of(3),
    "LIST": _Machine._list,
    "DICT": _Machine._dict,
    "FROZENSET": _Machine._frozenset,
    "APPEND": _Machine._append,
    **dict.fromkeys(("APPENDS", "ADDITEMS"), _Machine._appends),
    "SETITEM": _Machine._setitem,
    "SETITEMS": _Machine._setitems,
    "GLOBAL": _Machine._global,
    "STACK_GLOBAL": _Machine._stack_global,
    **dict.fromkeys(("EXT1", "EXT2", "EXT4"), _Machine._extension),
    **dict.fromkeys(("REDUCE", "NEWOBJ"), _Machine._reduce),
    "NEWOBJ_EX": _Machine._newobj_ex,
    "OBJ": _Machine._obj,
    "INST": _Machine._inst,
    "BUILD": _Machine._build,
    "PERSID": _Machine._persid,
    "BINPERSID": _Machine._binpersid,
}
# By the byte of each: its name, the reader of its argument, and what it does. Buffers that are
# not in the pickle have none.
_OPERATIONS: dict[bytes, tuple[str, Callable[[Any], Any] | None, _Step]] = {
    opcode.code.encode("latin-1"): (
        opcode.name,
        None if opcode.arg is None else opcode.arg.reader,
        _STEPS[opcode.name],
    )
    for opcode in pickletools.opcodes
    if opcode.name in _STEPS
}


def _extend(target: object, values: list[Any]) -> None:
    if isinstance(target, StandIn):
        if target.elements is None:
            target.elements = []
        target = target.elements
    if not isinstance(target, list):
        raise BrokenContent("it is damaged")
    target.extend(values)


def _set_items(target: object, values: list[Any]) -> None:
    if isinstance(target, StandIn):
        if target.entries is None:
            target.entries = {}
        target = target.entries
    if not isinstance(target, dict) or len(values) % 2:
        raise BrokenContent("it is damaged")
    for key, value in zip(values[::2], values[1::2], strict=True):
        target[_key(key)] = value


def _key(key: Any) -> Any:
    """A key that is hashed at once, whoever wrote it: hashing nested tuples may never end."""
    if key is None or type(key) in (str, bytes, bool, float):
        return key
    if type(key) is int and key.bit_length() <= _KEY_BITS:
        return key
    return key if isinstance(key, (Global, StandIn)) else StandIn(f"a key of {type(key).__name__}")
