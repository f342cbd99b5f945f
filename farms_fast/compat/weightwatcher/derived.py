"""Layers made of other layers: slices, differences from a base model, products of adapters."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor

from farms_fast.compat.weightwatcher.layers import LayersAndSkipped, WeightLayer, layers_of
from farms_fast.compat.weightwatcher.options import Options


def find_layers(model: object, base_model: object, options: Options) -> LayersAndSkipped:
    """What `layers_of` gives, or what is made of its layers: differences, products, slices."""
    layers, skipped = layers_of(model, options)
    if base_model is not None:
        layers = _differences(layers, layers_of(base_model, options, "base_model")[0])
    elif options.peft:
        layers = _adapters(layers, options.peft == "with_base")
    elif not options.pool:
        layers = [part for layer in layers for part in _slices(layer, options)]
    return layers, skipped


def _slices(layer: WeightLayer, options: Options) -> list[WeightLayer]:
    """A convolution's kernel positions as layers of their own; any other layer as it is."""
    if layer.layer_type != "conv2d":
        return [replace(layer, extra={"slice_id": 0})]

    def load(position: int) -> Tensor:
        return layer.load()[position : position + 1]

    count = layer.shape[0]
    scale = count / 2 if options.conv2d_norm else 1.0
    part = replace(layer, shape=(1, *layer.shape[1:]), scale=scale)
    return [
        replace(part, load=partial(load, position), extra={"slice_id": position})
        for position in range(count)
    ]


def _differences(
    layers: Sequence[WeightLayer], base_layers: Sequence[WeightLayer]
) -> list[WeightLayer]:
    """Every layer less the base model's; the base's layers are met in order, by name."""
    made: list[WeightLayer] = []
    alone: list[str] = []
    waiting = list(base_layers)
    for layer in layers:
        if waiting and layer.name in waiting[0].name:
            made.append(_difference(layer, waiting.pop(0)))
        else:
            alone.append(layer.longname)
            made.append(layer)
    if alone:
        warnings.warn(
            "base_model: nothing to subtract from, so analysed as they are: " + ", ".join(alone),
            stacklevel=4,
        )
    return made


def _difference(layer: WeightLayer, base: WeightLayer) -> WeightLayer:
    transposed = (*base.shape[:2], base.shape[3], base.shape[2])
    if layer.shape not in (base.shape, transposed):
        raise ValueError(
            f"base_model: expected {layer.longname!r} of shape {layer.shape}, got {base.shape}"
        )

    def load() -> Tensor:
        subtrahend = base.load() if layer.shape == base.shape else base.load().mT
        weight = layer.load()
        return weight - subtrahend.to(weight.device)

    return replace(layer, load=load)


def _adapters(layers: Sequence[WeightLayer], with_base: bool) -> list[WeightLayer]:
    """The products B A of LoRA adapters; with the base, the layers and their sums with them too."""
    made: list[WeightLayer] = []
    base = first = None
    for layer in layers:
        if layer.layer_type != "dense" or "lora_" not in layer.longname:
            base = layer
            if with_base:
                made.append(replace(layer, extra={"peft": False}))
        elif "lora_A" in layer.longname:
            first = layer
        elif "lora_B" in layer.longname:
            if first is None:
                raise ValueError(f"peft: expected a lora_A before {layer.longname!r}, got none")
            product = _product(first, layer)
            if with_base and base is not None:
                made.append(_sum(layer, product, base, first.shape[2] > first.shape[3]))
            made.append(product)
            first = None
    return made


def _product(a: WeightLayer, b: WeightLayer) -> WeightLayer:
    turn_a = a.shape[2] > a.shape[3]
    inner, columns = sorted(a.shape[2:])
    turn_b = b.shape[3] != inner
    rows, width = (b.shape[3], b.shape[2]) if turn_b else b.shape[2:]
    if width != inner:
        raise ValueError(
            f"peft: expected {b.longname!r} to have a side of {inner}, as {a.longname!r}, "
            f"got {b.shape[2:]}"
        )

    def load() -> Tensor:
        left, right = b.load(), a.load()
        return (left.mT if turn_b else left) @ (right.mT if turn_a else right)

    return _made_of(a, ("lora_A", "lora_BA"), (rows, columns), load, inner)


def _sum(b: WeightLayer, product: WeightLayer, base: WeightLayer, turned: bool) -> WeightLayer:
    rows, columns = product.shape[2:]
    expected = (columns, rows) if turned else (rows, columns)
    if base.shape[2:] != expected:
        raise ValueError(
            f"peft: expected {base.longname!r} of shape {expected} for its adapter, "
            f"got {base.shape[2:]}"
        )

    def load() -> Tensor:
        change = product.load()
        return base.load()[:1] + (change.mT if turned else change)

    return _made_of(b, ("lora_B", "lora_W_plus_AB"), expected, load, product.components)


def _made_of(
    layer: WeightLayer,
    renamed: tuple[str, str],
    shape: tuple[int, int],
    load: Callable[[], Tensor],
    components: int,
) -> WeightLayer:
    """A layer of one matrix that an adapter's layer stands for."""
    name, longname = (text.replace(*renamed) for text in (layer.name, layer.longname))
    M, N = sorted(shape)
    made = replace(layer, name=name, longname=longname, N=N, M=M, shape=(1, 1, *shape), load=load)
    return replace(made, components=components, extra={"peft": True})
