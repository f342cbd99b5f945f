"""How much of each layer is pruned so that the whole model has a given sparsity.

A layer (or block) whose alpha is large is less well trained and loses more:

`r = (alpha - alpha_min) / (alpha_max - alpha_min) * 2 epsilon + 1 - epsilon`,
`sparsity = r * eta` with `eta = S * sum(d) / sum(d * r)`

over the layers' numbers of parameters d (AlphaPruning, arXiv 2410.10912; FARMS, arXiv 2506.06280).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from farms_fast.adapters.pruning.block_names import group_by_block
from farms_fast.adapters.pruning.sparsities import (
    Allocation,
    as_number,
    check_sparsity,
    is_number,
    shared_to_total,
    weight_counts,
)
from farms_fast.core.arguments import check_int
from farms_fast.results.analysis import Analysis
from farms_fast.spectra.windows import FixedAspectSampling

__all__ = ["allocate_sparsity", "uniform_sparsity"]

Array = npt.NDArray[np.float64]
Counts = int | Sequence[int] | Mapping[str, int]


def allocate_sparsity(
    analysis_or_alphas: Analysis | Sequence[float] | Mapping[str, float],
    sparsity: float,
    epsilon: float,
    level: Literal["block", "layer"] = "block",
    params: Counts | None = None,
    block_size: int | None = None,
    compat: str | None = None,
) -> Allocation:
    """Shares a model's sparsity out over its layers by their alphas.

    Where r·eta is above 1, the layer gets 1 and the excess is shared out over the others in
    proportion to their r, so that the total is the sparsity exactly. Equal alphas (or epsilon 0)
    give every layer the same.

    A layer without alpha (NaN, a fit that failed) does not count in its block's mean. A block
    without any alpha, or such a layer at level "layer", gets r = 1, the middle of the range; the
    result lists these layers in `unfitted`.

    Args:
        analysis_or_alphas: an Analysis: its layers in repeated blocks take part (those whose names
            say so, `group_by_block`), others are
            listed in `left_out`. Or bare alphas in the model's order, or by layer name; of
            names, those in repeated blocks take part in the same way at level "block" without a
            `block_size`, and all of them otherwise.
        sparsity: share of the weights to prune in total, within (0, 1).
        epsilon: half the width of the range of r, 0 to 1: r goes from 1 - epsilon to 1 + epsilon.
        level: "block" gives the layers of a block the ratio of the mean of their alphas, "layer"
            every layer its own.
        params: with bare alphas, the number of weights of each layer, or one number for all.
        block_size: with bare alphas at level "block", how many that follow each other are a block.
        compat: "farms" does what the published code does: layers above 1 get 0.998, or 0.99999 when
            the sparsity is 0.7, and nothing is shared out, so that the total is less than asked.

    Returns:
        The ratios by layer, with everything that they were made of; `settings["allocation"]` is
        "farms" for an Analysis of windows of one aspect ratio, else "alpha". Bare alphas in a
        sequence have the names "0", "1", ..., or "0.0", "0.1", ... of block and place in it at
        level "block".

    Raises:
        TypeError: arguments of another kind.
        ValueError: a sparsity or epsilon out of range, an unknown level or compat, no repeated
            blocks, alphas that are infinite or not positive, no alpha at all, counts that do not
            fit the alphas, a block_size at level "layer", or a total that cannot be reached because
            too many layers have r = 0.

    Example:
        >>> allocation = allocate_sparsity([2.0, 4.0, 3.0], 0.5, 0.2, level="layer", params=100)
        >>> {name: round(ratio, 3) for name, ratio in allocation.ratios.items()}
        {'0': 0.4, '1': 0.6, '2': 0.5}
        >>> round(allocation.total, 12), round(allocation.scale, 12)
        (0.5, 0.5)
    """
    check_sparsity(sparsity)
    if not is_number(epsilon) or not 0 <= epsilon <= 1:
        raise ValueError(
            "epsilon: expected a number from 0 to 1 (above 1 a layer's ratio is negative), "
            f"got {epsilon!r}"
        )
    if level not in ("block", "layer"):
        raise ValueError(f"level: expected 'block' or 'layer', got {level!r}")
    if compat not in (None, "farms"):
        raise ValueError(f"compat: expected None or 'farms', got {compat!r}")

    alphas, counts, groups = _layers(analysis_or_alphas, level, params, block_size)
    members = [name for group in groups.values() for name in group]
    inside = set(members)
    fitted = {name: alphas[name] for name in members if not math.isnan(alphas[name])}
    if not fitted:
        raise ValueError(f"alphas: expected some, got none: all {len(members)} fits failed")
    units = list(groups.values()) if level == "block" else [[name] for name in members]
    means = np.array([_mean([fitted[name] for name in unit if name in fitted]) for unit in units])
    relative = _relative(means, float(epsilon))
    weights = np.array([sum(counts[name] for name in unit) for unit in units], np.float64)
    scale, ratios = shared_to_total(relative, weights, float(sparsity), clip=compat == "farms")
    return Allocation(
        ratios=_spread(units, ratios),
        params={name: counts[name] for name in members},
        relative=_spread(units, relative),
        alphas={name: alphas[name] for name in members},
        block_alphas=dict(zip(groups, means.tolist(), strict=True)) if level == "block" else {},
        blocks={block: tuple(group) for block, group in groups.items()},
        scale=scale,
        unfitted=tuple(name for name in members if name not in fitted),
        left_out=tuple(name for name in alphas if name not in inside),
        settings={
            "allocation": _kind(analysis_or_alphas),
            "sparsity": float(sparsity),
            "epsilon": float(epsilon),
            "level": level,
            "compat": compat,
        },
    )


def uniform_sparsity(params: Mapping[str, int], sparsity: float) -> Allocation:
    """The same ratio for every layer.

    Args:
        params: number of weights by layer name; layers in no repeated block are blocks of their
            own.
        sparsity: within (0, 1).

    Raises:
        TypeError: no mapping, or a number of weights that is no integer.
        ValueError: a sparsity out of range, or no layers.

    Example:
        >>> uniform_sparsity({"layers.0.q": 10, "layers.1.q": 10}, 0.5).ratios
        {'layers.0.q': 0.5, 'layers.1.q': 0.5}
    """
    check_sparsity(sparsity)
    counts = weight_counts("params", params)
    try:
        groups = group_by_block(counts)
    except ValueError:
        groups = {}
    inside = {name for group in groups.values() for name in group}
    groups |= {name: [name] for name in counts if name not in inside}
    members = [name for group in groups.values() for name in group]
    return Allocation(
        ratios={name: float(sparsity) for name in members},
        params={name: counts[name] for name in members},
        relative=dict.fromkeys(members, 1.0),
        blocks={block: tuple(group) for block, group in groups.items()},
        scale=float(sparsity),
        settings={"allocation": "uniform", "sparsity": float(sparsity)},
    )


def _kind(given: object) -> str:
    """What alphas are made of."""
    settings = given.settings if isinstance(given, Analysis) else None
    is_farms = settings is not None and isinstance(settings.sampling, FixedAspectSampling)
    return "farms" if is_farms else "alpha"


def _layers(
    given: Analysis | Sequence[float] | Mapping[str, float],
    level: str,
    params: Counts | None,
    block_size: int | None,
) -> tuple[dict[str, float], dict[str, int], dict[str, list[str]]]:
    """Alpha and number of weights by layer, and the layers that take part by block."""
    if isinstance(given, Analysis):
        for argument, value in (("params", params), ("block_size", block_size)):
            if value is not None:
                raise ValueError(f"{argument}: an Analysis knows its own, expected None")
        alphas = {layer.name: layer.alpha if layer.status == "ok" else math.nan for layer in given}
        counts = {layer.name: math.prod(layer.shape) for layer in given}
        return _checked(alphas), counts, group_by_block(alphas)
    if not isinstance(given, Mapping):
        given = _as_list(given)
    if params is None:
        raise ValueError("params: bare alphas need the number of weights of each layer, got None")
    size = None if block_size is None else check_int("block_size", block_size, least=1)
    if size is not None and level == "layer":
        raise ValueError(f"block_size: level 'layer' has no blocks, expected None, got {size}")
    if isinstance(given, Mapping):
        alphas = {str(name): value for name, value in given.items()}
    else:
        alphas = dict(zip(_names(len(given), size), given, strict=True))
    checked = _checked(alphas)
    counts = _counts(list(checked), params)
    if level == "layer":
        return checked, counts, {name: [name] for name in checked}
    if size is None:
        if not isinstance(given, Mapping):
            raise ValueError(
                "block_size: level 'block' needs the number of layers of a block, got None"
            )
        return checked, counts, group_by_block(checked)
    names = list(checked)
    if len(names) % size:
        raise ValueError(f"block_size: {size} layers a block do not divide {len(names)} alphas")
    return (
        checked,
        counts,
        {str(at // size): names[at : at + size] for at in range(0, len(names), size)},
    )


def _names(number: int, size: int | None) -> list[str]:
    if size is None:
        return [str(place) for place in range(number)]
    return [f"{place // size}.{place % size}" for place in range(number)]


def _as_list(alphas: object) -> list[float]:
    if isinstance(alphas, (str, bytes)) or not hasattr(alphas, "__iter__"):
        raise TypeError(
            "analysis_or_alphas: expected an Analysis, or alphas in a sequence or by name, "
            f"got {type(alphas).__name__}"
        )
    return list(alphas)


def _checked(alphas: Mapping[str, float]) -> dict[str, float]:
    found = {}
    for name, alpha in alphas.items():
        value = as_number("alphas", alpha, name)
        if math.isinf(value) or value <= 0:
            raise ValueError(
                f"alphas: expected positive finite numbers, or NaN where a fit failed, got {value} "
                f"for {name!r}"
            )
        found[name] = value
    if not found:
        raise ValueError("alphas: expected at least one, got none")
    return found


def _counts(names: list[str], params: Counts) -> dict[str, int]:
    if isinstance(params, Mapping):
        missing = [name for name in names if name not in params]
        if missing:
            raise ValueError(f"params: expected the number of weights of {missing[0]!r} too")
        return {name: check_int(f"params[{name!r}]", params[name], least=1) for name in names}
    if not isinstance(params, int) and hasattr(params, "__len__"):
        if len(params) != len(names):
            raise ValueError(f"params: expected {len(names)}, as many as alphas, got {len(params)}")
        values = [check_int("params", value, least=1) for value in params]
        return dict(zip(names, values, strict=True))
    return dict.fromkeys(names, check_int("params", params, least=1))


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def _relative(alphas: Array, epsilon: float) -> Array:
    """The r of every alpha; 1 where there is none or where all are equal."""
    lowest, highest = np.nanmin(alphas), np.nanmax(alphas)
    if highest == lowest:
        return np.ones_like(alphas)
    relative = (alphas - lowest) / (highest - lowest) * (2 * epsilon) + (1 - epsilon)
    return np.where(np.isnan(alphas), 1.0, relative)


def _spread(units: list[list[str]], values: Array) -> dict[str, float]:
    return {name: float(value) for unit, value in zip(units, values, strict=True) for name in unit}
