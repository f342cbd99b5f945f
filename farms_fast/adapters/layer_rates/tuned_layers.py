"""Which parameters have one learning rate: those of a layer, with its bias."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.utils import parametrize

from farms_fast.weights.stacks import LayerSpec

__all__ = ["Blocks", "TunedLayer", "block_names", "plain_model", "tuned_layers"]

Named = dict[str, nn.Parameter]
# "layer", "block", or a function from a layer's name to its block's.
Blocks = str | Callable[[str], str]

# What weight_norm, spectral_norm and pruning put in the place of a parameter, as forward hooks.
_HOOKED = ("orig", "g", "v")
_FACTOR = re.compile(r"w(\d*)")


@dataclass(frozen=True, eq=False)
class TunedLayer:
    """Parameters that have one learning rate.

    Attributes:
        name: the layer's. Where several layers are made of one parameter (q, k and v of one
            projection, the gates of a cell) it is what their names begin with.
        specs: those layers.
        owners: names of the modules that the weights belong to.
        weights: the parameters that the layers are made of, by name; empty for a quantised weight.
        others: bias and the like, by name.
    """

    name: str
    specs: tuple[LayerSpec, ...]
    owners: tuple[str, ...]
    weights: Named
    others: Named

    @property
    def frozen(self) -> bool:
        """Whether no weight is trained."""
        return not any(weight.requires_grad for weight in self.weights.values())

    @property
    def parameters(self) -> Named:
        """Weights and the rest."""
        return {**self.weights, **self.others}


def plain_model(model: nn.Module) -> nn.Module:
    """The module inside `torch.compile`, DataParallel and DistributedDataParallel.

    Its names are the same with and without them, so that a run resumes either way.
    """
    while True:
        if isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        else:
            return model


def tuned_layers(model: nn.Module, specs: Sequence[LayerSpec]) -> list[TunedLayer]:
    """The layers with the parameters they are made of, in the order of the specs.

    Args:
        model: the module that the specs were made from.
        specs: its layers.

    Example:
        >>> from torch import nn
        >>> from farms_fast.weights.layers import layers_from_module
        >>> model = nn.Sequential(nn.Linear(8, 4), nn.MultiheadAttention(4, 2))
        >>> for layer in tuned_layers(model, layers_from_module(model)[0]):
        ...     print(layer.name, list(layer.parameters))
        0 ['0.weight', '0.bias']
        1.in_proj ['1.in_proj_weight', '1.in_proj_bias']
        1.out_proj ['1.out_proj.weight', '1.out_proj.bias']
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    together: list[tuple[list[LayerSpec], Named]] = []
    for spec in specs:
        weights = {names[id(p)]: p for tensor in spec.tensors for p in _behind(model, tensor)}
        sharing = [item for item in together if item[1].keys() & weights.keys()]
        if not sharing:
            together.append(([spec], weights))
            continue
        first, *rest = sharing
        for item in rest:  # a layer of several tensors can join layers that stood apart
            first[0].extend(item[0])
            first[1].update(item[1])
            together.remove(item)
        first[0].append(spec)
        first[1].update(weights)
    claimed = {name for _, weights in together for name in weights}
    taken: set[str] = set()
    layers = []
    for members, weights in together:
        name = _common_name([spec.name for spec in members], taken)
        taken.add(name)
        owners = tuple(dict.fromkeys(t.rpartition(".")[0] for s in members for t in s.tensors))
        others: Named = {}
        for tensor in dict.fromkeys(t for spec in members for t in spec.tensors):
            for other in _beside(model, tensor):
                if id(other) in names and names[id(other)] not in claimed:
                    claimed.add(names[id(other)])
                    others[names[id(other)]] = other
        layers.append(TunedLayer(name, tuple(members), owners, weights, others))
    return layers


def _behind(model: nn.Module, tensor: str) -> list[nn.Parameter]:
    """The parameters that a tensor is, or is computed from."""
    prefix, _, leaf = tensor.rpartition(".")
    owner = model.get_submodule(prefix)
    if parametrize.is_parametrized(owner, leaf):
        return list(owner.parametrizations[leaf].parameters())  # type: ignore[index, union-attr]
    candidates = [leaf] + [f"{leaf}_{hook}" for hook in _HOOKED]
    own = owner._parameters
    found = [own.get(name) for name in candidates]
    return [parameter for parameter in found if parameter is not None]


def _beside(model: nn.Module, tensor: str) -> Iterator[nn.Parameter]:
    """The bias of a weight, and what else a module has that is nothing but this layer."""
    prefix, _, leaf = tensor.rpartition(".")
    owner = model.get_submodule(prefix)
    factor = _FACTOR.fullmatch(leaf)
    bias = f"b{factor[1]}" if factor else leaf.replace("weight", "bias")
    named = owner._parameters.get(bias) if bias != leaf else None
    if named is not None:
        yield named
    whole = not any(True for _ in owner.children()) or parametrize.is_parametrized(owner)
    if leaf == "weight" and whole:
        yield from (p for p in owner.parameters(recurse=False))


def _common_name(names: Sequence[str], taken: set[str]) -> str:
    if len(names) == 1:
        return names[0]
    pieces = [name.split(".") for name in names]
    common = []
    for column in zip(*pieces, strict=False):
        if len(set(column)) > 1:
            break
        common.append(column[0])
    name = ".".join(common)
    return name if name and name not in taken else names[0]


def block_names(model: nn.Module, layers: Sequence[TunedLayer], per: Blocks) -> list[str]:
    """The block of each layer: the name that layers have in common whose scores are averaged.

    Args:
        model: the layers' module.
        layers: its tuned layers.
        per: "layer": each is its own block. "block": the innermost numbered module with at least
            two layers in it, experts apart: a transformer's block, a residual block; a layer
            outside of them is its own. Or a function from a layer's name to its block's.

    Raises:
        ValueError: `per` is another word.
        TypeError: `per` is neither, or the function returns no string.

    Example:
        >>> from torch import nn
        >>> from farms_fast.weights.layers import layers_from_module
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.TransformerEncoderLayer(8, 2, 16))
        >>> layers = tuned_layers(model, layers_from_module(model)[0])
        >>> block_names(model, layers, "block")
        ['0', '1', '1', '1', '1']
    """
    if callable(per):
        found = [per(layer.name) for layer in layers]
        wrong = next((name for name in found if not isinstance(name, str)), None)
        if wrong is not None:
            raise TypeError(f"per: expected a function that returns a string, got {wrong!r}")
        return found
    if per == "layer":
        return [layer.name for layer in layers]
    if per != "block":
        kind = ValueError if isinstance(per, str) else TypeError
        raise kind(f"per: expected 'layer', 'block' or a function, got {per!r}")
    numbered = [list(_numbered(model, layer.owners[0])) for layer in layers]
    counts = Counter(name for names in numbered for name in names)
    return [
        next((name for name in reversed(names) if counts[name] > 1), layer.name)
        for layer, names in zip(layers, numbered, strict=True)
    ]


def _numbered(model: nn.Module, path: str) -> Iterator[str]:
    """The modules on the way to a path that stand in a list, from the outside in."""
    pieces = path.split(".")
    for end, piece in enumerate(pieces, start=1):
        if "expert" in piece.lower():
            return
        listed = isinstance(
            model.get_submodule(".".join(pieces[: end - 1])), (nn.ModuleList, nn.Sequential)
        )
        if listed and piece:
            yield ".".join(pieces[:end])
