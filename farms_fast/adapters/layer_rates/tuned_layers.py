"""The layers of a model with the parameters that have one learning rate."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from farms_fast.weights.stacks import LayerSpec, Skipped

Named = dict[str, nn.Parameter]
# "layer", "block", or a function from a layer's name to its block's.
Blocks = str | Callable[[str], str]

# weight_norm, spectral_norm and pruning, as forward hooks, replace a parameter by one named so.
_HOOKED = ("orig", "g", "v")
_FACTOR = re.compile(r"w(\d*)")


@dataclass(eq=False)
class TunedLayer:
    """Parameters that have one learning rate, by name: of a layer, or of several that share one.

    Several layers are made of one parameter where it is q, k and v, or the gates of a cell; then
    the name is what theirs begin with. The `owners` are the modules that the weights belong to.
    A quantised weight has no `weights`; the `others` are biases and the like. The `edge` says why
    the first or the last layer is left alone.
    """

    name: str
    specs: tuple[LayerSpec, ...]
    owners: tuple[str, ...]
    weights: Named
    others: Named
    edge: str = ""

    @property
    def frozen(self) -> bool:
        """Whether no weight is trained."""
        return not any(weight.requires_grad for weight in self.weights.values())

    @property
    def left_alone(self) -> tuple[str, str] | None:
        """Status and message of a layer that is not tuned."""
        if self.frozen:
            return "frozen", "its weights are not trained"
        return ("skipped", self.edge) if self.edge else None

    @property
    def parameters(self) -> Named:
        """The weights and the others."""
        return {**self.weights, **self.others}


def plain_model(model: nn.Module) -> nn.Module:
    """Returns the module inside `torch.compile`, DataParallel and DistributedDataParallel.

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
    """The layers of a model with the parameters they are made of, in the order of the specs."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    clusters = _sharing_parameters(model, specs, names)
    claimed = {name for _, weights in clusters for name in weights}
    taken: set[str] = set()
    layers = []
    for members, weights in clusters:
        name = _common_name([spec.name for spec in members], taken)
        taken.add(name)
        tensors = dict.fromkeys(tensor for spec in members for tensor in spec.tensors)
        owners = tuple(dict.fromkeys(tensor.rpartition(".")[0] for tensor in tensors))
        others: Named = {}
        for other in (other for tensor in tensors for other in _companions(model, tensor)):
            if id(other) in names and names[id(other)] not in claimed:
                claimed.add(names[id(other)])
                others[names[id(other)]] = other
        layers.append(TunedLayer(name, tuple(members), owners, weights, others))
    return layers


def _sharing_parameters(
    model: nn.Module, specs: Sequence[LayerSpec], names: Mapping[int, str]
) -> list[tuple[list[LayerSpec], Named]]:
    """The specs in clusters that share no parameter, with their parameters."""
    clusters: list[tuple[list[LayerSpec], Named]] = []
    for spec in specs:
        weights = {names[id(p)]: p for tensor in spec.tensors for p in _sources(model, tensor)}
        sharing = [cluster for cluster in clusters if cluster[1].keys() & weights.keys()]
        if not sharing:
            clusters.append(([spec], weights))
            continue
        first, *rest = sharing
        for cluster in rest:  # a layer of several tensors can join clusters
            first[0].extend(cluster[0])
            first[1].update(cluster[1])
            clusters.remove(cluster)
        first[0].append(spec)
        first[1].update(weights)
    return clusters


def _sources(model: nn.Module, tensor: str) -> list[nn.Parameter]:
    """The parameters that a tensor is, or is computed from."""
    prefix, _, leaf = tensor.rpartition(".")
    owner = model.get_submodule(prefix)
    if parametrize.is_parametrized(owner, leaf):
        return list(owner.parametrizations[leaf].parameters())  # type: ignore[index, union-attr]
    candidates = [leaf] + [f"{leaf}_{hook}" for hook in _HOOKED]
    own = (owner._parameters.get(name) for name in candidates)
    return [parameter for parameter in own if parameter is not None]


def _companions(model: nn.Module, tensor: str) -> Iterator[nn.Parameter]:
    """The bias of a weight, and all other parameters of a module that is only this layer."""
    prefix, _, leaf = tensor.rpartition(".")
    owner = model.get_submodule(prefix)
    factor = _FACTOR.fullmatch(leaf)
    bias = f"b{factor[1]}" if factor else leaf.replace("weight", "bias")
    named = owner._parameters.get(bias) if bias != leaf else None
    if named is not None:
        yield named
    only_this = next(owner.children(), None) is None or parametrize.is_parametrized(owner)
    if leaf == "weight" and only_this:
        yield from owner.parameters(recurse=False)


def _common_name(names: Sequence[str], taken: set[str]) -> str:
    """What the names have in common at their beginning; the first name if that is in use."""
    pieces = zip(*(name.split(".") for name in names), strict=False)
    name = ".".join(same[0] for same in takewhile(lambda same: len(set(same)) == 1, pieces))
    return name if name and name not in taken else names[0]


def require_layers(layers: Sequence[TunedLayer], skipped: Sequence[Skipped]) -> None:
    """Raises ValueError, with the reasons, if no layer is left to tune."""
    if any(layer.left_alone is None for layer in layers):
        return
    if not layers:
        why = f"none that can be analysed ({len(skipped)} tensors are no layers"
        why += f", {skipped[0].name}: {skipped[0].reason})" if skipped else ")"
    else:
        frozen = sum(layer.frozen for layer in layers)
        edges = "".join(f", {layer.name}: {layer.edge}" for layer in reversed(layers) if layer.edge)
        why = f"{len(layers)} layers, {frozen} of them frozen{edges}"
    raise ValueError(f"model: expected at least one layer to tune, got {why}")


def block_names(model: nn.Module, layers: Sequence[TunedLayer], per: Blocks) -> list[str]:
    """The block of each layer; the layers of one block have one score.

    "layer" makes each layer its own block. "block" takes the innermost numbered module with at
    least two layers in it (a transformer's block, a residual block), experts apart; a layer outside
    of them is its own block. A function takes a layer's name and returns its block's.
    """
    if callable(per):
        blocks = [per(layer.name) for layer in layers]
        for block in blocks:
            if not isinstance(block, str):
                raise TypeError(f"per: expected a function that returns a string, got {block!r}")
        return blocks
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
    parent = ""
    for piece in path.split("."):
        if "expert" in piece.lower():
            return
        in_list = isinstance(model.get_submodule(parent), (nn.ModuleList, nn.Sequential))
        parent = f"{parent}.{piece}" if parent else piece
        if in_list and piece:
            yield parent


class ParameterCheck:
    """Compares the parameters of a plain model with those that it had at the start.

    ValueError at the start for lazy parameters, and for those that are spread over processes.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._parameters = self._now()
        for name, parameter in self._parameters.items():
            if is_lazy(parameter):
                raise ValueError(f"model: {name!r} is not initialised: run the model once first")
            if hasattr(parameter, "placements"):
                raise ValueError(f"model: expected whole parameters, got a sharded one, {name!r}")
        self._shapes = {name: tuple(p.shape) for name, p in self._parameters.items()}
        self._kinds = self._kinds_now()

    def _now(self) -> dict[str, nn.Parameter]:
        return dict(self._model.named_parameters(remove_duplicate=False))

    def _kinds_now(self) -> list[tuple[str, str]]:
        return [(str(p.device), str(p.dtype)) for p in self._parameters.values()]

    def check_unchanged(self) -> None:
        """Raises ValueError if a parameter was added, removed, replaced or reshaped."""
        now, advice = self._now(), "make the rates and the optimizer anew"
        gone = [name for name in self._parameters if name not in now]
        come = [name for name in now if name not in self._parameters]
        if gone or come:
            sides = ((gone, "gone"), (come, "come"))
            changes = [f"{names[0]!r} has {what}" for names, what in sides if names]
            raise ValueError(
                "model: expected the parameters that it had when its layers were found, but "
                f"{' and '.join(changes)} ({len(gone)} gone, {len(come)} new in all): {advice}"
            )
        for name, parameter in now.items():
            before, shape = self._shapes[name], tuple(parameter.shape)
            if parameter is not self._parameters[name]:
                what = "is another parameter now, which the optimizer does not train"
            elif shape != before:
                what = f"had the shape {before} when its layers were found, now {shape}"
            else:
                continue
            raise ValueError(f"model: {name!r} {what}: {advice}")

    def check_trained(self, optimized: set[int]) -> None:
        """Raises ValueError if a trainable parameter has none of the optimizer's `id`s."""
        for name, parameter in self._parameters.items():
            if parameter.requires_grad and id(parameter) not in optimized:
                raise ValueError(
                    f"model: {name!r} is trained now, but was frozen when the groups were made "
                    "and is in none of the optimizer's: make the rates and the optimizer anew, or "
                    "add it with add_param_group()"
                )

    def moved(self) -> bool:
        """Whether a device or a dtype has changed since the last call."""
        before, self._kinds = self._kinds, self._kinds_now()
        return before != self._kinds
