"""Which parameters are trained at which layer's rate, and which at the base rate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from farms_fast.adapters.layer_rates.tuned_layers import TunedLayer
from farms_fast.weights.stacks import Skipped

__all__ = ["Assignment", "assign", "edge_layers", "require_layers"]


@dataclass(frozen=True, eq=False)
class Assignment:
    """Every trainable parameter of a model with the layer at whose rate it is trained.

    Attributes:
        layers: parameters by name, by the name of the layer.
        rest: the parameters that are trained at the base rate.
    """

    layers: Mapping[str, Mapping[str, nn.Parameter]]
    rest: Mapping[str, nn.Parameter]

    @property
    def rest_name(self) -> str:
        """The name of the group of what is not tuned, which no layer has."""
        name = "rest"
        while name in self.layers:
            name += "_"
        return name

    def sets(self) -> Iterator[tuple[str, Mapping[str, nn.Parameter]]]:
        """The rest and then each layer, by name."""
        yield self.rest_name, self.rest
        yield from self.layers.items()


def assign(
    model: nn.Module,
    layers: Sequence[TunedLayer],
    left_alone: Mapping[str, tuple[str, str]],
    partners: Mapping[str, str],
) -> Assignment:
    """The assignment of the parameters that are trained now.

    Args:
        model: the layers' module.
        layers: its layers.
        left_alone: those that are not tuned, by name.
        partners: layer names by the names of the normalisations that go with them.
    """
    tuned = {
        layer.name: {name: p for name, p in layer.parameters.items() if p.requires_grad}
        for layer in layers
        if layer.name not in left_alone and not layer.frozen
    }
    names = {id(p): name for name, p in model.named_parameters()}
    taken = {name for parameters in tuned.values() for name in parameters}
    for path, layer_name in partners.items():
        if layer_name not in tuned:
            continue
        for parameter in model.get_submodule(path).parameters():
            name = names[id(parameter)]
            if parameter.requires_grad and name not in taken:
                taken.add(name)
                tuned[layer_name][name] = parameter
    rest = {
        name: p for name, p in model.named_parameters() if p.requires_grad and name not in taken
    }
    return Assignment(tuned, rest)


def edge_layers(
    layers: Sequence[TunedLayer], *, skip_first: bool, skip_last: bool
) -> dict[str, tuple[str, str]]:
    """The first and the last layer, if they are to be left alone, with status and message."""
    edges = {}
    if skip_last and layers:
        edges[layers[-1].name] = ("skipped", "the last layer (skip_last)")
    if skip_first and layers:
        edges[layers[0].name] = ("skipped", "the first layer (skip_first)")
    return edges


def require_layers(
    layers: Sequence[TunedLayer],
    left_alone: dict[str, tuple[str, str]],
    skipped: Sequence[Skipped],
) -> None:
    """Raises ValueError, saying why, if no layer is left to tune."""
    if any(layer.name not in left_alone and not layer.frozen for layer in layers):
        return
    if not layers:
        why = f"none that can be analysed ({len(skipped)} tensors are no layers"
        why += f", {skipped[0].name}: {skipped[0].reason})" if skipped else ")"
    else:
        frozen = sum(layer.frozen for layer in layers)
        edges = ", ".join(f"{name}: {why}" for name, (_, why) in left_alone.items())
        why = f"{len(layers)} layers, {frozen} of them frozen" + (f", {edges}" if edges else "")
    raise ValueError(f"model: expected at least one layer to tune, got {why}")
