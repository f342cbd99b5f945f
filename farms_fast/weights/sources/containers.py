"""Which of the mappings in a checkpoint holds the weights, and the names of its tensors.

Training scripts wrap a state dict in mappings beside an optimiser's state, losses and settings;
Flax and others nest mappings module by module. Both are mappings of mappings: what tells a wrapper
is a known name, or a state dict's dotted names inside.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from farms_fast.weights.stacks import Skipped

# Names under which training scripts put the weights. No module is called by the first ones.
_SURE_WRAPPERS = ("state_dict", "model_state_dict", "model_state", "params")
_WRAPPERS = (*_SURE_WRAPPERS, "model", "module", "net", "network", "weights")
_OPTIMIZER = re.compile(r".*optim.*|opt(_state.*)?")
_DEEPEST = 64
_MOST_ENTRIES = 5_000_000
_LONGEST_PREFIX = 4096
# Entries beside the weights that are listed one by one.
_LISTED = 20


@dataclass(frozen=True)
class TreeView:
    """How to look at the values of a checkpoint.

    Attributes:
        children: the entries of a value that holds others, None for any other.
        shape: of a tensor or array, None for what is neither.
        type_name: what a value is called in messages.
        is_module: whether a value is a model or a part of one, whose entries are all its own.
    """

    children: Callable[[Any], Mapping[Any, Any] | None]
    shape: Callable[[Any], tuple[int, ...] | None]
    type_name: Callable[[Any], str] = lambda value: type(value).__name__
    is_module: Callable[[Any], bool] = lambda value: False


@dataclass
class Weights:
    """The tensors of a checkpoint by their names, and what is left out beside them."""

    tensors: dict[str, Any] = field(default_factory=dict)
    skipped: list[Skipped] = field(default_factory=list)


def find_weights(tree: Any, view: TreeView, description: str, key: str | None = None) -> Weights:
    """The tensors of the mapping that holds a checkpoint's weights, those of inner ones included.

    Args:
        tree: what the checkpoint holds.
        view: how to look at it.
        description: the checkpoint, for messages.
        key: dotted path of the mapping to take; None looks for it.

    Raises:
        ValueError: there are several candidates or no tensors, `key` leads to none, or mappings are
            nested too deeply.
        TypeError: a tensor's name is no text.
    """
    if key is not None and not isinstance(key, str):
        raise TypeError(f"key: expected None or a dotted path, got {key!r}")
    root = _Tree(view, description).node_of(tree)
    if root.entries is None:
        raise ValueError(
            f"{description}: expected a mapping of names to tensors, got {root.type_name}"
        )
    start = root if key is None else _at(root, key)
    if start is None or (key is not None and not start.tensors):
        raise ValueError(
            f"key: expected the path of a mapping with tensors in {description}"
            f" ({_first_keys(root.entries)}), got {key!r}"
        )
    search = _Search(description, matrices=start.matrices > 0)
    search.flatten(search.unwrapped(start, f"{key}." if key else ""), "")
    if not search.weights.tensors:
        raise ValueError(
            f"{description}: expected tensors by name, got a mapping without any tensor"
            f" (keys: {_first_keys(root.entries)})"
        )
    return search.weights


@dataclass(eq=False, slots=True)
class _Node:
    """A value, the nodes of what it holds, and how many matrices and tensors there are."""

    value: Any
    type_name: str
    is_module: bool = False
    shape: tuple[int, ...] | None = None
    entries: dict[Any, _Node] | None = None
    matrices: int = 0
    tensors: int = 0

    def has_own(self, dimensions: int) -> bool:
        """Whether it holds a tensor of that many dimensions itself."""
        return any(
            node.shape is not None and len(node.shape) >= dimensions
            for node in (self.entries or {}).values()
        )

    def is_state_dict(self) -> bool:
        """Whether it has dotted names of tensors; the mappings of a nested tree have none."""
        return any(
            isinstance(name, str) and "." in name and node.shape is not None
            for name, node in (self.entries or {}).items()
        )

    def is_wrapper(self) -> bool:
        """Whether it is a model, a state dict, or what wraps one, and no part of a nested tree."""
        sure = [node for name, node in (self.entries or {}).items() if name in _SURE_WRAPPERS]
        return self.is_module or self.is_state_dict() or any(node.tensors for node in sure)

    def is_optimizer(self, name: str) -> bool:
        """Whether it is an optimiser's state, by its name or by what it holds."""
        named = _OPTIMIZER.fullmatch(name.lower()) is not None
        return named or {"param_groups", "state"} <= set(self.entries or {})


class _Tree:
    """Makes the nodes of a checkpoint's values, each value's once."""

    def __init__(self, view: TreeView, description: str) -> None:
        self._view = view
        self._description = description
        # A mapping that several hold is one node, and keeps its value: an address may come again.
        self._known: dict[int, _Node] = {}
        # Of values that are no tensors and hold nothing, one of each type will do.
        self._others: dict[str, _Node] = {}
        self._left = _MOST_ENTRIES

    def node_of(self, value: Any, depth: int = 0) -> _Node:
        """The node of a value, with those of what it holds."""
        if id(value) in self._known:
            return self._known[id(value)]
        view = self._view
        shape, type_name = view.shape(value), view.type_name(value)
        if shape is not None:
            return _Node(value, type_name, shape=shape, matrices=int(len(shape) > 1), tensors=1)
        children = view.children(value)
        if children is None:
            return self._others.setdefault(type_name, _Node(None, type_name))
        self._left -= len(children)
        if self._left < 0:
            raise ValueError(f"{self._description}: expected at most {_MOST_ENTRIES:,} entries")
        if depth > _DEEPEST:
            raise ValueError(
                f"{self._description}: expected mappings nested at most {_DEEPEST} deep, got"
                " deeper ones"
            )
        node = self._known[id(value)] = _Node(value, type_name, view.is_module(value))
        node.entries = {}
        for name, inner in children.items():
            node.entries[name] = child = self.node_of(inner, depth + 1)
            node.matrices += child.matrices
            node.tensors += child.tensors
        return node


def _at(node: _Node, key: str) -> _Node | None:
    """The mapping at a path; names may have dots themselves."""
    entries = node.entries or {}
    if key in entries and entries[key].entries is not None:
        return entries[key]
    for dot in re.finditer(r"\.", key):
        inner = entries.get(key[: dot.start()])
        if inner is not None and (end := _at(inner, key[dot.end() :])) is not None:
            return end
    return None


class _Search:
    """Notes the weights, and what is skipped; where there are no matrices, vectors count."""

    def __init__(self, description: str, matrices: bool) -> None:
        self.weights = Weights()
        self._description = description
        self._matrices = matrices
        self._visited: dict[_Node, str] = {}

    def unwrapped(self, node: _Node, path: str) -> _Node:
        """The mapping that holds the weights."""
        for _ in range(_DEEPEST):
            name = self._wrapper(node, path)
            if name is None:
                break
            entries = node.entries or {}
            self._note_neighbours(entries, name, path)
            node, path = entries[name], f"{path}{name}."
        return node

    def _wrapper(self, node: _Node, path: str) -> str | None:
        """The name of the entry that holds the weights, None where they are in the node itself."""
        if node.is_module:
            return None
        inner = {
            name: entry
            for name, entry in (node.entries or {}).items()
            if isinstance(name, str)
            and entry.entries is not None
            and (entry.matrices if self._matrices else entry.tensors)
            and not entry.is_optimizer(name)
        }
        has_own = node.has_own(2 if self._matrices else 0)
        known = [name for name in _WRAPPERS if name in inner]
        wrappers = [name for name, entry in inner.items() if entry.is_wrapper()]
        certain = [name for name in known if name in _SURE_WRAPPERS or name in wrappers]
        if len(known) > 1 and certain:
            raise self._several(known, path)
        if certain or (known and len(inner) == 1 and not has_own):
            return known[0]
        if has_own or not wrappers:
            return None
        if len(inner) > 1:
            raise self._several(list(inner), path)
        return wrappers[0]

    def _several(self, names: list[str], path: str) -> ValueError:
        paths = [path + name for name in names]
        more = f" and {len(paths) - 10:,} more" if len(paths) > 10 else ""
        return ValueError(
            f"{self._description}: expected one mapping that holds the weights, got"
            f" {', '.join(map(repr, paths[:10]))}{more}: say which, as in key={paths[0]!r}"
            f" (--key {paths[0]})"
        )

    def _note_neighbours(self, entries: Mapping[Any, _Node], chosen: str, path: str) -> None:
        beside = f"beside {chosen!r}, which holds the weights"
        unlisted = 0
        for name, node in entries.items():
            if name == chosen:
                continue
            if not node.tensors and unlisted >= _LISTED:
                unlisted += 1
                continue
            unlisted += not node.tensors
            hint = ""
            if node.entries is not None and node.matrices:
                hint = f"; key={path + str(name)!r} takes it"
            self._skip(f"{path}{name}", node, beside + hint)
        if unlisted > _LISTED:
            reason = f"{unlisted - _LISTED:,} more entries {beside}"
            self.weights.skipped.append(Skipped(f"{path}...", (), reason))

    def _skip(self, name: str, node: _Node, reason: str) -> None:
        self.weights.skipped.append(Skipped(name, node.shape or (), reason))

    def flatten(self, node: _Node, prefix: str) -> None:
        """Takes the tensors of a mapping, and those of the mappings in it where it is a tree."""
        self._visited[node] = prefix.removesuffix(".")
        tensors, is_flat = self.weights.tensors, node.is_state_dict()
        for key, entry in (node.entries or {}).items():
            if entry.is_module and not entry.tensors:
                continue  # an activation
            if not isinstance(key, str):
                if entry.tensors:
                    raise TypeError(f"{self._description}: expected names as keys, got {key!r}")
                self._skip(f"{prefix}{_short(key)}", entry, "its key is no text")
                continue
            name = prefix + key
            if entry.shape is not None:
                if name in tensors:
                    raise ValueError(
                        f"{self._description}: expected each name once, got {_short(name)} twice"
                    )
                tensors[name] = entry.value
            elif reason := self._left_out(name, key, entry, is_flat):
                self._skip(name, entry, reason)
            else:
                self.flatten(entry, f"{name}.")

    def _left_out(self, name: str, key: str, entry: _Node, is_flat: bool) -> str:
        """Why the tensors in a value are not taken; empty where they are."""
        if entry in self._visited:
            return f"the same as {self._visited[entry] or 'what holds it'}"
        if not entry.tensors:
            return f"not a tensor: {entry.type_name}"
        if entry.is_optimizer(key):
            return "the state of an optimiser"
        if is_flat:
            return f"a mapping beside the tensors of a state dict; key={key!r} takes it"
        if len(name) > _LONGEST_PREFIX:
            return f"its name has more than {_LONGEST_PREFIX} characters"
        return ""


def _first_keys(keys: Iterable[Any]) -> str:
    shown = [_short(key) for key, _ in zip(keys, range(5), strict=False)]
    return ", ".join(shown) or "none"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
