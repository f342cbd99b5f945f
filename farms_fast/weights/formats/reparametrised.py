"""Weights that a checkpoint stores as what they are computed from: which tensors belong together.

Weight normalisation stores lengths g and directions v (arXiv 1602.07868), spectral normalisation a
matrix and its first singular vectors (arXiv 1802.05957), pruning a matrix and its mask. torch names
them as hooks did, `weight_g` and `weight_v`, or as parametrisations do,
`parametrizations.weight.original0` and `original1`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from farms_fast.core.arrays import COMPLEX, FLOATING
from farms_fast.weights.recipes import Recipe
from farms_fast.weights.stacks import TensorHeader, WeightCandidate, leaf_name

_PARAMETRISED = re.compile(
    r"(?P<module>|.+?[./])parametrizations\.(?P<leaf>[^.]+)\.(?P<part>.+)", re.DOTALL
)
# The roles of the tensors that make a weight: with lengths, with singular vectors, with a mask.
_WITH_LENGTHS = (("v", "g"), ("original1", "original0"))
_WITH_VECTORS = (("orig", "u", "v"), ("bar", "u", "v"), ("original", "0._u", "0._v"))
_WITH_MASK = (("orig", "mask"), ("stored", "mask"))
_KNOWN = [set(roles) for roles in (*_WITH_LENGTHS, *_WITH_VECTORS, *_WITH_MASK)]
_HOOKED = frozenset({"g", "v", "u", "orig", "bar", "mask"})
_NEVER_ALONE = frozenset({"g", "v", "orig", "bar"})
_ROWS = 512  # that are in float64 at once


@dataclass(frozen=True)
class WeightNorm(Recipe, name="weight-norm/1"):
    """`g * v / |v|`, each entry along `dim` with its own length, or one length where it is None."""

    dim: int | None

    def __call__(self, v: Tensor, g: Tensor) -> Tensor:
        """A new tensor of v's shape, in float32 at least; lengths are computed in float64."""
        shape = [size if dim == self.dim else 1 for dim, size in enumerate(v.shape)]
        squares = torch.zeros(shape, dtype=torch.float64, device=v.device)
        others = [dim for dim in range(v.dim()) if dim != self.dim]
        for start in range(0, len(v), _ROWS):
            rows = slice(start, start + _ROWS)
            part = v[rows].to(torch.float64).square_().sum(others, keepdim=True)
            if self.dim == 0:
                squares[rows] = part
            else:
                squares += part
        factors = g.to(v.device, torch.float64).reshape(shape) / squares.sqrt_()
        weight = v.to(_computed_dtype(v.dtype), copy=True)
        return weight.mul_(factors.to(weight.dtype))


@dataclass(frozen=True)
class SpectralNorm(Recipe, name="spectral-norm/1"):
    """`W / sigma` with `sigma = uᵀ W v`, W unfolded along the dimension of u.

    Where W has several dimensions of u's length, it is the one of which u and v are the singular
    vectors, so that sigma is largest.
    """

    dims: tuple[int, ...]

    def __call__(self, weight: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """A new tensor of the weight's shape, in float32 at least; sigma is computed in float64."""
        left, right = (x.to(weight.device, torch.float64) for x in (u, v))
        sigmas = [self._sigma(weight.movedim(dim, 0).flatten(1), left, right) for dim in self.dims]
        sigma = max(sigmas, key=lambda x: float(x.abs()))
        result = weight.to(_computed_dtype(weight.dtype), copy=True)
        return result.div_(sigma.to(result.dtype))

    @staticmethod
    def _sigma(matrix: Tensor, left: Tensor, right: Tensor) -> Tensor:
        sigma = torch.zeros((), dtype=torch.float64, device=matrix.device)
        for start in range(0, len(matrix), _ROWS):
            rows = slice(start, start + _ROWS)
            sigma += left[rows] @ (matrix[rows].to(torch.float64) @ right)
        return sigma


@dataclass(frozen=True)
class Masked(Recipe, name="masked/1"):
    """`weight * mask`."""

    def __call__(self, weight: Tensor, mask: Tensor) -> Tensor:
        """A new tensor of the weight's shape and dtype; ValueError but for zeros and ones."""
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError("mask: expected zeros and ones, got other numbers")
        return weight * mask.to(weight.device, weight.dtype)


def _computed_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def reparametrised_headers(weights: Sequence[WeightCandidate]) -> list[WeightCandidate]:
    """Puts the header of each weight in the place of the first tensor that it is computed from.

    Tensors that are one part of a weight whose other parts are missing, do not fit or make it in a
    way that names and shapes do not tell, get a reason: none of them is a weight by itself.
    """
    by_name = {weight.header.name: weight for weight in weights}
    # Of each tensor that is a part of a weight, the candidates in the place of all of its parts.
    instead: dict[str, list[WeightCandidate]] = {}
    for name, roles in _groups(by_name).items():
        parts = {role: by_name[part] for role, part in roles.items()}
        found = _combined(name, parts)
        if found is not None:
            instead.update(dict.fromkeys((part.header.name for part in parts.values()), found))
    results: list[WeightCandidate] = []
    told: set[int] = set()
    for weight in weights:
        candidates = instead.get(weight.header.name)
        if candidates is None:
            results.append(weight)
        elif id(candidates) not in told:
            told.add(id(candidates))
            results += candidates
    return results


def _groups(by_name: Mapping[str, WeightCandidate]) -> dict[str, dict[str, str]]:
    """By the names of weights: the tensors that may be their parts, by role."""
    groups: dict[str, dict[str, str]] = {}
    for name, weight in by_name.items():
        stem, _, role = name.rpartition("_")
        if "parametrizations." in name and (match := _PARAMETRISED.fullmatch(name)):
            groups.setdefault(match["module"] + match["leaf"], {})[match["part"]] = name
        elif role in _HOOKED and leaf_name(stem):
            groups.setdefault(stem, {})[role] = name
        elif name.endswith("mask") and weight.header.leaf == "mask":
            groups.setdefault(weight.header.neighbour("weight"), {})["mask"] = name
    for name, roles in groups.items():
        if name in by_name:
            roles["stored"] = name
    return groups


def _combined(name: str, parts: Mapping[str, WeightCandidate]) -> list[WeightCandidate] | None:
    """What stands for the parts of a weight; None where they may be weights by themselves."""
    headers = {role: part.header for role, part in parts.items()}
    as_stored = all(not part.reason and part.header.combine is None for part in parts.values())
    says_weight = "weight" in leaf_name(name) or "kernel" in leaf_name(name)
    made = _recipe(headers, says_weight)
    if made is not None and as_stored:
        recipe, used = made
        dtype = used[0].dtype if isinstance(recipe, Masked) else _computed_dtype(used[0].dtype)
        return [WeightCandidate.computed(name, used[0].shape, dtype, used, recipe)]
    parametrised = any("parametrizations." in header.name for header in headers.values())
    if not parametrised and not (says_weight and _NEVER_ALONE & set(headers)):
        return None
    reason = _problem(name, headers, as_stored, parametrised)
    # A weight that is stored as it is used needs no parts, unless it may be one of directions.
    kept = {role for role, part in parts.items() if part.reason}
    if set(headers) != {"stored", "g"}:
        kept.add("stored")
    return [
        part if role in kept else WeightCandidate(part.header, reason)
        for role, part in parts.items()
    ]


def _recipe(
    parts: Mapping[str, TensorHeader], says_weight: bool
) -> tuple[Recipe, list[TensorHeader]] | None:
    """What makes a weight of parts in these roles, and its arguments; None if they do not fit."""
    known = (*_WITH_LENGTHS, *_WITH_VECTORS, *_WITH_MASK)
    roles = next((roles for roles in known if set(roles) == set(parts)), None)
    if roles is None:
        return None
    used = [parts[role] for role in roles]
    dtypes = [part.dtype for part in used]
    shape, other = used[0].shape, used[1].shape
    recipe: Recipe | None = None
    if roles in _WITH_MASK:
        fits = dtypes[0] in FLOATING + COMPLEX and not dtypes[1].is_complex and shape == other
        recipe = Masked() if fits and (says_weight or "orig" in roles) else None
    elif not all(dtype in FLOATING for dtype in dtypes) or not shape:
        return None
    elif roles in _WITH_VECTORS:
        size, vectors = math.prod(shape), (other, used[2].shape)
        dims = [dim for dim, n in enumerate(shape) if n and vectors == ((n,), (size // n,))]
        recipe = SpectralNorm(tuple(dims)) if dims and len(shape) > 1 else None
    else:
        own = [dim for dim, size in enumerate(other) if size != 1]
        if not own and says_weight and len(other) in (0, len(shape)):
            recipe = WeightNorm(None)
        elif len(own) == 1 and len(other) == len(shape) and other[own[0]] == shape[own[0]]:
            recipe = WeightNorm(own[0])
    return None if recipe is None else (recipe, used)


def _problem(
    name: str, parts: Mapping[str, TensorHeader], as_stored: bool, parametrised: bool
) -> str:
    """Why no weight is made of parts."""
    part_of = f"part of {name}, which"
    if not as_stored:
        return f"{part_of} is quantised as well and is not read"
    if "stored" in parts and set(parts) != {"stored", "g"}:
        return f"{part_of} is stored as well"
    if set(parts) in _KNOWN:
        shapes = ", ".join(f"{role} {part.shape}" for role, part in parts.items())
        return f"part of {name}, whose parts do not fit together: {shapes}"
    if not parametrised and any(set(parts) < roles for roles in _KNOWN):
        return f"part of {name}, whose other parts are missing"
    return f"{part_of} is computed in a way that names do not tell: give the module itself"
