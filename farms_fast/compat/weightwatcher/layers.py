"""Which weights WeightWatcher analyses, under which id and name, and as which matrices.

The rules are WeightWatcher 0.7.7's for PyTorch: a module counts by the words in its class, a tensor
of a state dict by its number of dimensions. They differ from those of `farms_fast.analyze` on
purpose.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from farms_fast.compat.weightwatcher.options import LAYER_TYPES, Options
from farms_fast.core.arguments import check_module, check_type
from farms_fast.weights.module_tensors import NOT_INITIALISED, ON_META
from farms_fast.weights.sources import MappingSource, PickleSource, SafetensorsSource, open_source

# A class counts by the first of these words in its name, the name of its module included, or by
# the first of these classes that it is derived from.
_KINDS = {"linear": nn.Linear, "conv1d": nn.Conv1d, "conv2d": nn.Conv2d, "embedding": nn.Embedding}


@dataclass(frozen=True)
class WeightLayer:
    """A row of the table to come: matrices of equal shape and what WeightWatcher says of them.

    `load` gives the weights in the `shape` (P, B, R, C), not to be written, float32 (float64 of
    float64 NumPy arrays): P matrices, each a batch of B (1 unless the weight has 3 dimensions), of
    which the `components` largest singular values count. Eigenvalues are multiplied by `scale`.
    N and M are the longer and the shorter side, not always of an even number `rf` of kernel
    positions. `extra` are further columns.
    """

    layer_id: int
    name: str
    longname: str
    layer_type: str
    N: int
    M: int
    rf: int
    shape: tuple[int, int, int, int]
    load: Callable[[], Tensor]
    components: int
    scale: float = 1.0
    extra: Mapping[str, object] = field(default_factory=dict)

    @property
    def order(self) -> int:
        """Eigenvalues of one matrix."""
        return min(self.shape[2:])


# Long names, each with its layer or with the reason why there is none.
_Weights = Iterator[tuple[str, WeightLayer | str]]
_Source = MappingSource | SafetensorsSource | PickleSource
# Layers, and by their long names the reasons why other weights are none.
LayersAndSkipped = tuple[list[WeightLayer], dict[str, str]]


def layers_of(model: object, options: Options, argument: str = "model") -> LayersAndSkipped:
    """The layers that the options ask for; messages call the model by the `argument`."""
    every: list[WeightLayer] = []
    skipped: dict[str, str] = {}
    for longname, layer in _weights(model, options, argument):
        if isinstance(layer, WeightLayer):
            every.append(layer)
        else:
            skipped[longname] = layer
    if without_data := [name for name, reason in skipped.items() if reason == ON_META]:
        told = f"{argument}: the weight of {', '.join(map(repr, without_data[:3]))}"
        told += f" and of {len(without_data) - 3} more" if len(without_data) > 3 else ""
        if not every:
            raise ValueError(f"{told} {ON_META}")
        warnings.warn(f"{told} {ON_META}", stacklevel=4)
    chosen = _filtered(every, options.layers)
    layers: list[WeightLayer] = []
    for layer in every:
        if layer.layer_id not in chosen:
            skipped[layer.longname] = "left out by layers"
        elif reason := _out_of_range(layer, options):
            skipped[layer.longname] = reason
        else:
            layers.append(layer)
    return layers, skipped


def _weights(model: object, options: Options, argument: str) -> _Weights:
    if isinstance(model, nn.Module):
        check_module(argument, model)
        return _module_weights(model, options)
    if isinstance(model, Mapping):
        inner = model.get("state_dict", model)
        tensors = inner if isinstance(inner, Mapping) else model
        arrays = {name for name, value in tensors.items() if isinstance(value, np.ndarray)}
        return _named_weights(MappingSource(tensors), options, options.start_ids or 1, arrays)
    expected = "a torch.nn.Module, a mapping of names to tensors, or a path"
    check_type(argument, model, (str, os.PathLike), expected)
    source = open_source(cast(str, model))
    if not isinstance(source, (SafetensorsSource, PickleSource)):
        raise ValueError(
            f"{argument}: expected a checkpoint of whole weights, got the adapter {str(model)!r}: "
            "give the module with the adapter in it, and peft=True"
        )
    return _named_weights(source, options, options.start_ids)


def _module_weights(model: nn.Module, options: Options) -> _Weights:
    for layer_id, (longname, module) in enumerate(model.named_modules(), options.start_ids):
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor):
            continue
        layer_type = _module_type(module)
        # The root has no name of its own.
        longname = longname or type(module).__name__
        if reason := _unusable(layer_type, weight):
            yield longname, reason
            continue
        told = layer_id, longname.rpartition(".")[2], longname, layer_type
        yield longname, _layer(told, weight.shape, partial(_module_weight, module), options)


def _named_weights(
    source: _Source, options: Options, start_id: int, arrays: Collection[str] = ()
) -> _Weights:
    headers = source.headers
    if isinstance(source, SafetensorsSource):
        # Such files list their tensors by name, and so do their indexes.
        headers = sorted(headers, key=lambda header: header.name)
    layer_ids = count(start_id)
    for header in headers:
        name, shape = header.name.removesuffix(".weight"), header.shape
        if name == header.name:
            yield name, "its name does not end in .weight"
            continue
        layer_id = next(layer_ids)
        layer_type = {2: "dense", 4: "conv2d"}.get(len(shape), "")
        if not header.dtype.is_floating_point:
            yield name, f"dtype {header.dtype} is not of real numbers"
        elif not layer_type or shape[0] < 2:
            yield name, f"no matrix: shape {tuple(shape)}"
        else:
            load = partial(_stored_weight, source, header.name, header.name in arrays)
            yield name, _layer((layer_id, name, name, layer_type), shape, load, options)


def _module_type(module: nn.Module) -> str:
    described = str(type(module)).lower()
    for word, kind in _KINDS.items():
        if word in described or isinstance(module, kind):
            return "dense" if word == "linear" else word
    return ""


def _unusable(layer_type: str, weight: Tensor) -> str:
    if not layer_type:
        return "not a linear, convolution or embedding class"
    if nn.parameter.is_lazy(weight):
        return NOT_INITIALISED
    if weight.is_meta:
        return ON_META
    if weight.layout != torch.strided:
        return "not a dense tensor"
    if not weight.dtype.is_floating_point:
        return f"dtype {weight.dtype} is not of real numbers"
    if weight.ndim < 2 or (layer_type == "conv2d" and weight.ndim != 4) or weight.numel() == 0:
        return f"no matrix: shape {tuple(weight.shape)}"
    return ""


def _module_weight(module: nn.Module) -> Tensor:
    # WeightWatcher computes in float64 on weights that have been float32.
    return cast(Tensor, module.weight).detach().float()


def _stored_weight(source: _Source, name: str, is_array: bool) -> Tensor:
    weight = source.load(name)
    # WeightWatcher leaves NumPy arrays as they are.
    return weight if is_array and weight.dtype == torch.float64 else weight.detach().float()


def _filtered(weights: Sequence[WeightLayer], chosen: Iterable[int | str]) -> set[int]:
    """Ids of the weights that the filters leave; of names, ids and types the first kind decides."""
    every = {weight.layer_id for weight in weights}
    ids = [entry for entry in chosen if isinstance(entry, int)]
    types = [entry for entry in chosen if entry in LAYER_TYPES]
    names = [entry for entry in chosen if isinstance(entry, str) and entry not in LAYER_TYPES]
    if names:
        dropped = [name.removeprefix("-") for name in names if name.startswith("-")]
        if dropped and len(dropped) != len(names):
            raise ValueError(
                f"layers: expected names to keep or names to drop (-name), got both: {names}"
            )
        wanted = dropped or names
        known = list(dict.fromkeys(weight.name for weight in weights))
        if unknown := [name for name in wanted if name not in known]:
            some = ", ".join(map(repr, known[:20])) + (", ..." if len(known) > 20 else "")
            raise ValueError(f"layers: expected some of {some}; got {unknown[0]!r}")
        matched = {weight.layer_id for weight in weights if weight.name in wanted}
        return every - matched if dropped else matched
    if ids:
        if unknown_ids := [entry for entry in ids if abs(entry) not in every]:
            raise ValueError(
                f"layers: expected ids of layers with weights, some of {sorted(every)}; "
                f"got {unknown_ids[0]}"
            )
        return every - {-entry for entry in ids} if min(ids) < 0 else set(ids)
    return {weight.layer_id for weight in weights if not types or weight.layer_type in types}


def _layer(
    told: tuple[int, str, str, str],
    weight_shape: Sequence[int],
    load_weight: Callable[[], Tensor],
    options: Options,
) -> WeightLayer:
    """The layer of a weight, of which id, name, long name and type are told."""
    rf, scale, order = 1, 1.0, tuple(range(len(weight_shape)))
    if told[-1] == "conv2d":
        out, inner, *kernel = weight_shape
        rf = math.prod(kernel)
        N, M = out, inner
        # Its sides change places once at every kernel position where there are fewer rows.
        if out < inner and rf % 2 == 1 and out + inner >= sum(kernel):
            N, M = inner, out
        # Matrices with more columns than rows are turned, which a shuffle's order depends on.
        shape = (rf, 1, max(out, inner), min(out, inner))
        scale = 0.5 if options.conv2d_norm else 1.0
        order = (2, 3, 1, 0) if out < inner else (2, 3, 0, 1)
    else:
        N, M = max(weight_shape), min(weight_shape)
        rows, columns = weight_shape[-2:]
        shape = (1, math.prod(weight_shape[:-2]), rows, columns)

    def load() -> Tensor:
        return load_weight().permute(order).reshape(shape)

    return WeightLayer(*told, N, M, rf, shape, load, components=M * rf, scale=scale)


def _out_of_range(layer: WeightLayer, options: Options) -> str:
    evals = layer.M * layer.rf if options.pool else layer.M
    if options.min_evals and evals < options.min_evals:
        return f"{evals} eigenvalues, fewer than min_evals={options.min_evals}"
    if options.max_evals and evals > options.max_evals:
        return f"{evals} eigenvalues, more than max_evals={options.max_evals}"
    if options.max_N < layer.N:
        return f"N={layer.N}, more than max_N={options.max_N}"
    return ""
