"""The weights of a model that changes: read anew each time, and what is made of them."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from farms_fast.weights.module_tensors import module_tensor, shape_of, tensor_identity
from farms_fast.weights.stacks import LayerSpec

# A tensor, or why it cannot be had.
LiveTensor = Tensor | Exception


class _ParameterHeader(NamedTuple):
    """A parameter as it was when it was looked at; its shape is None before it is initialised."""

    name: str
    shape: tuple[int, ...] | None
    dtype: torch.dtype
    device: torch.device


class LiveWeights:
    """The tensors that layers are made of, by their names in a model, which stays as it is."""

    def __init__(self, model: nn.Module, specs: Sequence[LayerSpec]) -> None:
        self._model = model
        self._names = list(dict.fromkeys(name for spec in specs for name in spec.tensors))
        self._seen = list(self._look())

    def check(self) -> None:
        """Raises ValueError where a parameter's name, shape, dtype or device has changed."""
        now = list(self._look())
        if now != self._seen:
            raise ValueError(
                "model: expected the parameters that it had when this LiveAnalysis was made, "
                f"got {_difference(self._seen, now)}; make a new LiveAnalysis"
            )

    def read(self) -> dict[str, LiveTensor]:
        """Every tensor as the model uses it now, detached, or why it cannot be had."""
        return {name: self._read(name) for name in self._names}

    def _read(self, name: str) -> LiveTensor:
        try:
            return module_tensor(self._model, name).resolve_conj().resolve_neg()
        except torch.OutOfMemoryError:
            raise
        # A parametrisation is the caller's code: whatever it raises is that layer's result.
        except Exception as error:
            return error

    def _look(self) -> Iterator[_ParameterHeader]:
        for name, parameter in self._model.named_parameters(remove_duplicate=False):
            shape = None if is_lazy(parameter) else shape_of(parameter)
            yield _ParameterHeader(name, shape, parameter.dtype, parameter.device)


def _difference(then: Iterable[_ParameterHeader], now: Iterable[_ParameterHeader]) -> str:
    """The first change, in words."""
    old, new = ({seen.name: seen for seen in side} for side in (then, now))
    for name, was in old.items():
        if name not in new:
            return f"none of the name {name!r}"
        for what in ("shape", "dtype", "device"):
            before, after = getattr(was, what), getattr(new[name], what)
            if before != after:
                if what == "shape":
                    before, after = (None if s is None else tuple(s) for s in (before, after))
                return f"{name!r} of {what} {after}, which was {before}"
    for name in new:
        if name not in old:
            return f"{name!r}, which it had not"
    return "them in another order"


class Stacks:
    """The stacks of layers; those that only view their tensor are kept while it stays in place."""

    def __init__(self) -> None:
        self._views: dict[int, tuple[Hashable, Tensor]] = {}

    def of(self, position: int, spec: LayerSpec, tensors: Sequence[Tensor]) -> Tensor:
        """The (S, R, C) stack of a layer, made as `spec` says; raises what that raises."""
        identity = tensor_identity(tensors[0]) if len(tensors) == 1 else None
        view = self._views.get(position)
        # The view holds on to its memory, so another tensor cannot come to lie there.
        if view is not None and view[0] == identity:
            return view[1]
        stack = spec.to_stack(*tensors).detach().resolve_conj().resolve_neg()
        if (
            identity is not None
            and stack.untyped_storage().data_ptr() == tensors[0].untyped_storage().data_ptr()
        ):
            self._views[position] = identity, stack
        else:
            self._views.pop(position, None)
        return stack


class Snapshot:
    """A copy of tensors, by name, in memory that is allocated once."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def allocate(self, wanted: Mapping[str, Tensor]) -> None:
        """Allocates memory on the current stream, where the copies will be used and freed."""
        old, self.tensors = self.tensors, {}
        for name, tensor in wanted.items():
            copy = old.get(name)
            if copy is None or (copy.shape, copy.dtype) != (tensor.shape, tensor.dtype):
                copy = torch.empty_like(tensor)
            self.tensors[name] = copy

    def take(self, read: Mapping[str, LiveTensor]) -> None:
        """Copies the tensors of `allocate`, on the current stream; one call a dtype."""
        by_dtype: dict[torch.dtype, list[tuple[Tensor, Tensor]]] = {}
        for name, copy in self.tensors.items():
            tensor = read[name]
            assert isinstance(tensor, Tensor)
            by_dtype.setdefault(copy.dtype, []).append((copy, tensor))
        for pairs in by_dtype.values():
            copies, tensors = zip(*pairs, strict=True)
            torch._foreach_copy_(copies, tensors)
