"""Parameter groups: who is in which, how an optimizer gets them, and how they are found in it."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from farms_fast.adapters.layer_rates.norm_partners import is_norm
from farms_fast.adapters.layer_rates.tuned_layers import TunedLayer

Group = dict[str, Any]
# The entries of a group that are made here.
_OWN = ("params", "name", "layer")
# None, "vectors" or globs of parameter names.
NoDecay = str | Sequence[str] | None

_MATRIX_OWNERS = (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd)
_BIAS = re.compile(r"(^|_)bias(_|\d|$)")


@dataclass(frozen=True, eq=False)
class Assignment:
    """The layer at whose rate each trainable parameter is trained; the base rate for the rest."""

    layers: Mapping[str, Mapping[str, nn.Parameter]]
    rest: Mapping[str, nn.Parameter]

    @property
    def rest_name(self) -> str:
        """The name of the group of what is not tuned, which no layer has."""
        name = "rest"
        while name in self.layers:
            name += "_"
        return name

    @staticmethod
    def of(
        model: nn.Module, layers: Sequence[TunedLayer], partners: Mapping[str, str]
    ) -> Assignment:
        """Assigns what is trainable now; `partners` has the layer of a normalisation."""
        tuned = {
            layer.name: {name: p for name, p in layer.parameters.items() if p.requires_grad}
            for layer in layers
            if layer.left_alone is None
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
        rest = {n: p for n, p in model.named_parameters() if p.requires_grad and n not in taken}
        return Assignment(tuned, rest)

    def sets(self) -> Iterator[tuple[str, Mapping[str, nn.Parameter]]]:
        """The rest and then each layer, by name."""
        yield self.rest_name, self.rest
        yield from self.layers.items()

    def undecayed(
        self, model: nn.Module, layers: Sequence[TunedLayer], no_decay: NoDecay
    ) -> set[str]:
        """The names of the parameters without weight decay; errors as of `param_groups`."""
        if no_decay is None:
            return set()
        trained = {name: p for _, named in self.sets() for name, p in named.items()}
        if no_decay == "vectors":
            exempt = {name for layer in layers for name in layer.others}
            norm_modules = filter(is_norm, model.modules())
            norms = {id(p) for norm in norm_modules for p in norm.parameters(recurse=False)}
            # A linear layer with a single output has one row, but its weight is no vector.
            matrices = {id(m.weight) for m in model.modules() if isinstance(m, _MATRIX_OWNERS)}
            for name, p in trained.items():
                if id(p) in norms or (id(p) not in matrices and _is_vector(name, p)):
                    exempt.add(name)
            return exempt
        globs = [no_decay] if isinstance(no_decay, str) else no_decay
        if not isinstance(globs, Sequence) or not all(isinstance(glob, str) for glob in globs):
            raise TypeError(f"no_decay: expected None, 'vectors' or globs, got {no_decay!r}")
        matched: set[str] = set()
        for glob in globs:
            names = {name for name in trained if fnmatchcase(name, glob)}
            if not names:
                raise ValueError(
                    f"no_decay: expected globs that match a trainable parameter, got {glob!r}, "
                    f"which matches none of {len(trained)}"
                )
            matched |= names
        return matched

    def groups(
        self,
        lr: float | torch.Tensor,
        factors: Mapping[str, float],
        exempt: Collection[str],
        options: Mapping[str, Any],
    ) -> list[Group]:
        """Makes the groups for an optimizer: the rest first, even where it has no parameter.

        The parameters that are `exempt` from weight decay are in groups of their own. The options
        are further entries of every group; ValueError for one that this method sets.
        """
        for name in _OWN:
            if name in options:
                raise ValueError(
                    f"{name}: expected other entries of a group, this one is made here"
                )
        groups = []
        for layer, parameters in self.sets():
            rate = lr * factors.get(layer, 1.0) if layer in self.layers else lr
            decayed = [p for name, p in parameters.items() if name not in exempt]
            others = [p for name, p in parameters.items() if name in exempt]
            parts: list[tuple[str, list[nn.Parameter], Group]] = [
                (layer, decayed, {}),
                (f"{layer} (no decay)", others, {"weight_decay": 0.0}),
            ]
            for name, members, changed in parts:
                if members or name == self.rest_name:
                    group = {"params": members, "name": name, "layer": layer, **options, **changed}
                    group["lr"] = rate.clone() if isinstance(rate, torch.Tensor) else rate
                    groups.append(group)
        return groups


def _is_vector(name: str, parameter: nn.Parameter) -> bool:
    """Whether it has one dimension besides those of 1, or is called a bias."""
    named_bias = _BIAS.search(name.rpartition(".")[2]) is not None
    return named_bias or parameter.dim() <= 1 or parameter.numel() == max(parameter.shape)


@dataclass(frozen=True, eq=False)
class OptimizerGroups:
    """The groups of an assignment in an optimizer; the first one of the rest has the base rate."""

    rest_name: str
    layers: list[tuple[str, Group]]
    rest: list[Group]
    groups: list[Group]

    @staticmethod
    def of(optimizer: Optimizer, assignment: Assignment) -> OptimizerGroups:
        """Finds the groups by their parameters; errors as of `LayerRates.step`.

        Groups of other parameters are left alone.
        """
        groups = getattr(optimizer, "param_groups", None)
        if not isinstance(groups, list):
            raise TypeError(
                f"optimizer: expected a torch optimizer, got {type(optimizer).__name__}"
            )
        owner = {id(p): layer for layer, named in assignment.sets() for p in named.values()}
        own = OptimizerGroups(assignment.rest_name, [], [], list(groups))
        for group in groups:
            owners = {owner[id(p)] for p in group["params"] if id(p) in owner}
            if len(owners) > 1:
                some = ", ".join(sorted(owners)[:3])
                raise ValueError(
                    "optimizer: expected the groups that param_groups() gave, one a layer; got "
                    f"one with the parameters of {len(owners)} of them ({some})"
                )
            empty_rest = not group["params"] and group.get("name") == own.rest_name
            if empty_rest or owners == {own.rest_name}:
                own.rest.append(group)
            elif owners:
                own.layers.append((owners.pop(), group))
        given = {id(p) for group in groups for p in group["params"]}
        named = {n: p for _, named in assignment.sets() for n, p in named.items()}
        if missing := [name for name, p in named.items() if id(p) not in given]:
            raise ValueError(
                "optimizer: expected the groups that param_groups() gave, got none with "
                f"{len(missing)} of their parameters (the first is {missing[0]})"
            )
        return own

    def still_of(self, optimizer: Optimizer) -> bool:
        """Whether the optimizer has the same groups, none replaced, added or taken away."""
        now = getattr(optimizer, "param_groups", ())
        return [id(group) for group in now] == [id(group) for group in self.groups]

    def base_rate(self, lr: float | None) -> float:
        """The rate of the group `rest`, where a given one is set first; ValueError without both."""
        if lr is not None:
            rate = check_rate(lr)
            for group in self.rest:
                _set_rate(group, rate)
            return rate
        if not self.rest:
            raise ValueError(
                f"optimizer: expected the group {self.rest_name!r} of param_groups(), whose rate "
                "is the base rate; without it give the base rate as lr="
            )
        return float(self.rest[0]["lr"])

    def set_rates(self, base: float, factors: Mapping[str, float]) -> None:
        """Sets the rates of all layers: the base rate times the layer's factor."""
        for layer, group in self.layers:
            _set_rate(group, base * factors.get(layer, 1.0))


def check_rate(lr: float | torch.Tensor) -> float:
    """A base rate as a number; TypeError if it is none, ValueError if negative or not finite."""
    several = isinstance(lr, torch.Tensor) and lr.numel() != 1
    if isinstance(lr, (str, bool)) or not hasattr(lr, "__float__") or several:
        raise TypeError(f"lr: expected a number, got {lr!r}")
    try:
        rate = float(lr)
    except (TypeError, ValueError):
        raise TypeError(f"lr: expected a number, got {lr!r}") from None
    if not 0 <= rate < float("inf"):
        raise ValueError(f"lr: expected a rate that is not negative, got {lr!r}")
    return rate


def _set_rate(group: Group, rate: float) -> None:
    # A tensor is written in place, as compiled steps need it.
    if isinstance(group["lr"], torch.Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate
