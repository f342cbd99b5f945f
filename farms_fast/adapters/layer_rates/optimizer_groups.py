"""Parameter groups: made for an optimizer, and found again in it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from farms_fast.adapters.layer_rates.assignment import Assignment

__all__ = ["FoundGroups", "base_rate", "check_rate", "make_groups", "set_rate"]

Group = dict[str, Any]
# What `make_groups` itself says of a group.
_OWN = ("params", "name", "layer")


def make_groups(
    assignment: Assignment,
    lr: float | torch.Tensor,
    factors: Mapping[str, float],
    undecayed: Collection[str],
    options: Mapping[str, Any],
) -> list[Group]:
    """The groups for an optimizer: the rest first, even where it has no parameter.

    Args:
        assignment: which parameter belongs where.
        lr: the base rate.
        factors: rate over base rate, by layer.
        undecayed: names of the parameters without weight decay.
        options: further entries of every group.

    Raises:
        ValueError: an option is an entry that this makes.
    """
    for name in _OWN:
        if name in options:
            raise ValueError(f"{name}: expected other entries of a group, this one is made here")
    groups = []
    for layer, parameters in assignment.sets():
        factor = factors.get(layer, 1.0)
        rate = lr * factor if layer in assignment.layers else lr
        parts: list[tuple[str, list[nn.Parameter], Group]] = [
            (layer, [p for name, p in parameters.items() if name not in undecayed], {})
        ]
        exempt = [p for name, p in parameters.items() if name in undecayed]
        if exempt:
            parts.append((f"{layer} (no decay)", exempt, {"weight_decay": 0.0}))
        for name, members, changed in parts:
            if members or name == assignment.rest_name:
                own = rate.clone() if isinstance(rate, torch.Tensor) else rate
                groups.append(
                    {"params": members, "name": name, "layer": layer, **options, **changed}
                )
                groups[-1]["lr"] = own
    return groups


@dataclass(frozen=True, eq=False)
class FoundGroups:
    """The groups of an assignment in an optimizer.

    Attributes:
        layers: (layer, group) pairs.
        rest: the groups of what is not tuned; the first has the base rate.
        groups: all groups of the optimizer.
    """

    layers: list[tuple[str, Group]]
    rest: list[Group]
    groups: list[Group]

    @staticmethod
    def of(optimizer: Optimizer, assignment: Assignment) -> FoundGroups:
        """Finds the groups by their parameters; groups of other parameters are left alone.

        Raises:
            TypeError: `optimizer` has no groups.
            ValueError: its groups are not those that `param_groups` gave.
        """
        groups = getattr(optimizer, "param_groups", None)
        if not isinstance(groups, list):
            raise TypeError(
                f"optimizer: expected a torch optimizer, got {type(optimizer).__name__}"
            )
        owner = {id(p): layer for layer, named in assignment.sets() for p in named.values()}
        missing = {id(p): n for _, named in assignment.sets() for n, p in named.items()}
        found = FoundGroups([], [], list(groups))
        for group in groups:
            owners = {owner[id(p)] for p in group["params"] if id(p) in owner}
            for parameter in group["params"]:
                missing.pop(id(parameter), None)
            if len(owners) > 1:
                some = ", ".join(sorted(owners)[:3])
                raise ValueError(
                    "optimizer: expected the groups that param_groups() gave, one a layer; got "
                    f"one with the parameters of {len(owners)} of them ({some})"
                )
            if owners == {assignment.rest_name}:
                found.rest.append(group)
            elif owners:
                found.layers.append((owners.pop(), group))
            elif not group["params"] and group.get("name") == assignment.rest_name:
                found.rest.append(group)
        if missing:
            raise ValueError(
                "optimizer: expected the groups that param_groups() gave, got none with "
                f"{len(missing)} of their parameters (the first is {next(iter(missing.values()))})"
            )
        return found

    def still_of(self, optimizer: Optimizer) -> bool:
        """Whether the optimizer has the same groups, none replaced, added or taken away."""
        now = getattr(optimizer, "param_groups", ())
        return len(now) == len(self.groups) and all(
            group is known for group, known in zip(now, self.groups, strict=True)
        )


def check_rate(lr: float | torch.Tensor) -> float:
    """A base rate as a number.

    Raises:
        TypeError: it is no number.
        ValueError: it is negative or not finite.
    """
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


def base_rate(found: FoundGroups, lr: float | None, rest_name: str) -> float:
    """The rate of what is not tuned: that of its group, or the one given, which it then gets.

    Raises:
        ValueError: there is no such group, and none is given; or the one given is negative.
    """
    if lr is not None:
        rate = check_rate(lr)
        for group in found.rest:
            set_rate(group, rate)
        return rate
    if not found.rest:
        raise ValueError(
            f"optimizer: expected the group {rest_name!r} of param_groups(), whose rate is the "
            "base rate; without it give the base rate as lr="
        )
    return float(found.rest[0]["lr"])


def set_rate(group: Group, rate: float) -> None:
    """Sets a group's rate; one that is a tensor is written in place, as compiled steps need it."""
    if isinstance(group["lr"], torch.Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate
