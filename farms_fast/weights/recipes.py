"""Recipes: how loaded tensors become a weight, and a weight its stack of matrices.

A recipe is a frozen dataclass: a plan can be sent to another process, and a store can tell whether
a layer is still made in the same way. Its identity is a declared name and its fields, never the
name of a class. The number in the name rises when a recipe gives other values than before.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, is_dataclass
from types import FunctionType
from typing import Any, ClassVar

from torch import Tensor


class Recipe(ABC):
    """Base of all recipes; a subclass declares its name: `class Rows(Recipe, name="rows/1")`."""

    recipe_name: ClassVar[str]

    def __init_subclass__(cls, *, name: str) -> None:
        cls.recipe_name = name

    @abstractmethod
    def __call__(self, *tensors: Any, **options: Any) -> Tensor:
        """The weight or the `(S, R, C)` stack, a view where strides allow one."""

    def region(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Views of what the recipe reads of its tensors."""
        return tensors


def recipe_id(recipe: object) -> str:
    """The identity as canonical JSON; TypeError for what is no recipe and no plain function."""
    return json.dumps(recipe, default=_declared, sort_keys=True, separators=(",", ":"))


def _declared(value: object) -> dict[str, object]:
    if isinstance(value, FunctionType):
        return {"function": f"{value.__module__}.{value.__qualname__}"}
    named = {"recipe": value.recipe_name} if isinstance(value, Recipe) else {}
    if not is_dataclass(value) or (callable(value) and not named):
        raise TypeError(
            "to_stack: expected a Recipe or a plain function, which a store can tell from others, "
            f"got {type(value).__name__}"
        )
    return {**named, **{field.name: getattr(value, field.name) for field in fields(value)}}


@dataclass(frozen=True)
class Rows(Recipe, name="rows/1"):
    """`count` rows from `start`, each `step` apart, of each (transposed) matrix."""

    start: int
    count: int
    step: int = 1
    transposed: bool = False

    def region(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The rows, of as many dimensions as the weight has."""
        matrix = tensors[0].mT if self.transposed else tensors[0]
        return (matrix[..., self.start : self.start + self.count * self.step : self.step, :],)

    def __call__(self, weight: Tensor) -> Tensor:
        """`(S, count, C)`."""
        (rows,) = self.region(weight)
        return rows if rows.dim() == 3 else rows.unsqueeze(0)


@dataclass(frozen=True)
class HeadRows(Recipe, name="head-rows/1"):
    """Rows of q, k or v where a group's query heads, its key head and its value head adjoin.

    The weight is `(groups * (queries + 2) * head_dim, C)`. One group gives a view.
    """

    role: str
    groups: int
    queries: int

    def region(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The role's heads, `(groups, heads, head_dim, C)`."""
        heads = tensors[0].reshape(self.groups, self.queries + 2, -1, tensors[0].shape[-1])
        first = {"q": 0, "k": self.queries, "v": self.queries + 1}[self.role]
        return (heads.narrow(1, first, self.queries if self.role == "q" else 1),)

    def __call__(self, weight: Tensor) -> Tensor:
        """`(1, rows of the role, C)`."""
        return self.region(weight)[0].flatten(0, 2).unsqueeze(0)


@dataclass(frozen=True)
class TrailingPositions(Recipe, name="trailing-positions/1"):
    """`(a, b, *positions)` to one (a/groups) x b matrix for each group and then each position.

    When `transposed`, matrices are b x (a/groups).
    """

    groups: int = 1
    transposed: bool = False

    def __call__(self, weight: Tensor) -> Tensor:
        """`(groups * positions, R, C)`."""
        kernels = weight.flatten(2)
        grouped = kernels.reshape(self.groups, -1, *kernels.shape[1:])  # (g, a/g, b, positions)
        order = (0, 3, 2, 1) if self.transposed else (0, 3, 1, 2)
        # With several groups and several positions the two have no common stride: that case copies.
        return grouped.permute(order).flatten(0, 1)


@dataclass(frozen=True)
class LeadingPositions(Recipe, name="leading-positions/1"):
    """`(*positions, a, b)` to one a x b matrix for each position."""

    def __call__(self, weight: Tensor) -> Tensor:
        """`(positions, a, b)`, a view of contiguous weights."""
        return weight.flatten(0, -3)


@dataclass(frozen=True)
class MergedDims(Recipe, name="merged-dims/1"):
    """One matrix: the first `rows` dimensions together are its rows, the others its columns."""

    rows: int

    def __call__(self, weight: Tensor) -> Tensor:
        """`(1, R, C)`, a view of contiguous weights."""
        return weight.flatten(self.rows).flatten(0, self.rows - 1).unsqueeze(0)


@dataclass(frozen=True)
class AsStored(Recipe, name="as-stored/1"):
    """`(S, R, C)` as it is, `(R, C)` as a stack of one."""

    def __call__(self, weight: Tensor) -> Tensor:
        """`(S, R, C)`."""
        return weight if weight.dim() == 3 else weight.unsqueeze(0)


@dataclass(frozen=True)
class Computed(Recipe, name="computed/1"):
    """The stack of a weight that is computed first: `stack(weight(*tensors))`."""

    weight: Any
    stack: Any

    def __call__(self, *tensors: Tensor) -> Tensor:
        """`(S, R, C)`."""
        stack: Tensor = self.stack(self.weight(*tensors))
        return stack
