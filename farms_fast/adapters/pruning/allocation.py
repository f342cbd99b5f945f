"""Distributes a model's sparsity over its layers, by their alphas or uniformly.

A layer (or block) with a large alpha is less well trained and loses more:

`r = (alpha - alpha_min) / (alpha_max - alpha_min) * 2 epsilon + 1 - epsilon`,
`sparsity = r * eta` with `eta = S * sum(d) / sum(d * r)`

over the layers' numbers of parameters d (AlphaPruning, arXiv 2410.10912; FARMS, arXiv 2506.06280).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from farms_fast.adapters.pruning.sparsities import (
    Allocation,
    as_number,
    check_sparsity,
    mean_of_fitted,
    scale_to_total,
    weight_counts,
)
from farms_fast.core.arguments import check_int, is_real
from farms_fast.results.analysis import Analysis
from farms_fast.spectra.windows import FixedAspectSampling

Array = npt.NDArray[np.float64]
Counts = int | Sequence[int] | Mapping[str, int]

#: Epsilon of FARMS by model, method and sparsity, for alphas of 2000 x 2000 windows (Q = 1) under
#: the peak rule, from the tables of arXiv 2506.06280.
EPSILON_PRESETS: dict[str, dict[str, dict[float, float]]] = {
    "llama-7b": {
        "magnitude": {0.7: 0.6, 0.75: 0.4, 0.8: 0.3, 0.85: 0.2},
        "wanda": {0.7: 0.3, 0.75: 0.3, 0.8: 0.3, 0.85: 0.15},
        "sparsegpt": {0.7: 0.2, 0.75: 0.2, 0.8: 0.2, 0.85: 0.2},
    },
    "llama-13b": {
        "magnitude": {0.7: 0.6, 0.75: 0.5, 0.8: 0.4, 0.85: 0.1},
        "wanda": {0.7: 0.3, 0.75: 0.3, 0.8: 0.3, 0.85: 0.25},
        "sparsegpt": {0.7: 0.3, 0.75: 0.3, 0.8: 0.3, 0.85: 0.25},
    },
}


def allocate_sparsity(
    analysis_or_alphas: Analysis | Sequence[float] | Mapping[str, float],
    sparsity: float,
    epsilon: float,
    level: Literal["block", "layer"] = "block",
    params: Counts | None = None,
    block_size: int | None = None,
    compat: str | None = None,
) -> Allocation:
    """Distributes a model's sparsity over its layers by their alphas.

    A layer with r·eta above 1 gets 1, and the excess goes to the others in proportion to their r,
    so that the total is exact. Equal alphas (or epsilon 0) give every layer the same ratio.

    A layer without alpha (NaN, a failed fit) does not count in its block's mean. A block without
    any alpha, or such a layer at level "layer", gets r = 1, the middle of the range; the result
    lists these layers in `unfitted`.

    Args:
        analysis_or_alphas: an Analysis, or alphas in the model's order or by layer name. Of an
            Analysis, and of names at level "block" without a `block_size`, the layers in repeated
            blocks (`group_by_block`) take part, and `left_out` lists the others.
        sparsity: share of the weights to prune in total, within (0, 1).
        epsilon: half the width of the range of r, 0 to 1: r goes from 1 - epsilon to 1 + epsilon.
        level: "block" gives all layers of a block one ratio, by the mean of their alphas; "layer"
            gives every layer its own.
        params: with bare alphas, the number of weights of each layer, or one number for all.
        block_size: with bare alphas at level "block", how many consecutive ones form a block.
        compat: "farms" does what the published code does: layers above 1 get 0.998, or 0.99999 when
            the sparsity is 0.7, and nothing is redistributed, so that the total is too low.

    Returns:
        The ratios by layer. `settings["allocation"]` is "farms" for an Analysis of windows of one
        aspect ratio, else "alpha". Bare alphas in a sequence have the names "0", "1", ..., or
        "0.0", "0.1", ... (block, layer in the block) at level "block".

    Raises:
        TypeError: an argument of another type.
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
    if not is_real(epsilon) or not 0 <= epsilon <= 1:
        raise ValueError(
            "epsilon: expected a number from 0 to 1 (above 1 a layer's ratio is negative), "
            f"got {epsilon!r}"
        )
    if level not in ("block", "layer"):
        raise ValueError(f"level: expected 'block' or 'layer', got {level!r}")
    if compat not in (None, "farms"):
        raise ValueError(f"compat: expected None or 'farms', got {compat!r}")

    alphas, counts, groups = _layers(analysis_or_alphas, level, params, block_size)
    members = {name: alphas[name] for group in groups.values() for name in group}
    unfitted = tuple(name for name, alpha in members.items() if math.isnan(alpha))
    if len(unfitted) == len(members):
        raise ValueError(f"alphas: expected some, got none: all {len(members)} fits failed")
    units = list(groups.values()) if level == "block" else [[name] for name in members]
    means = np.array([mean_of_fitted(members[name] for name in unit) for unit in units])
    relative = _relative(means, float(epsilon))
    weights = np.array([sum(counts[name] for name in unit) for unit in units], np.float64)
    scale, ratios = scale_to_total(relative, weights, float(sparsity), clip=compat == "farms")
    given = analysis_or_alphas
    settings = given.settings if isinstance(given, Analysis) else None
    is_farms = settings is not None and isinstance(settings.sampling, FixedAspectSampling)
    return Allocation(
        ratios=_spread(units, ratios),
        params={name: counts[name] for name in members},
        relative=_spread(units, relative),
        alphas=members,
        block_alphas=dict(zip(groups, means.tolist(), strict=True)) if level == "block" else {},
        blocks={block: tuple(group) for block, group in groups.items()},
        scale=scale,
        unfitted=unfitted,
        left_out=tuple(name for name in alphas if name not in members),
        settings={
            "allocation": "farms" if is_farms else "alpha",
            "sparsity": float(sparsity),
            "epsilon": float(epsilon),
            "level": level,
            "compat": compat,
        },
    )


def uniform_sparsity(params: Mapping[str, int], sparsity: float) -> Allocation:
    """Gives every layer the same ratio.

    Args:
        params: number of weights by layer name; a layer outside of repeated blocks is its own
            block.
        sparsity: the ratio, within (0, 1).

    Raises:
        TypeError: params are no mapping, or a number of weights is no integer.
        ValueError: the sparsity is out of range, or there are no layers.

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


def epsilon_preset(model: str, method: str, sparsity: float) -> float:
    """The paper's epsilon for a model, a pruner and a sparsity.

    The paper chose it by the perplexity of these models; another model may need another one.

    Args:
        model: "llama-7b" or "llama-13b", in any case.
        method: "magnitude", "wanda" or "sparsegpt".
        sparsity: 0.7, 0.75, 0.8 or 0.85.

    Raises:
        ValueError: the paper has none for these; the message lists what it has.

    Example:
        >>> epsilon_preset("LLaMA-7B", "sparsegpt", 0.8)
        0.2
    """
    methods = EPSILON_PRESETS.get(str(model).lower())
    if methods is None:
        raise ValueError(f"model: expected one of {', '.join(EPSILON_PRESETS)}, got {model!r}")
    if not isinstance(method, str) or method not in methods:
        raise ValueError(f"method: expected one of {', '.join(methods)}, got {method!r}")
    for known, epsilon in methods[method].items():
        if is_real(sparsity) and abs(known - sparsity) < 1e-9:
            return epsilon
    known_ones = ", ".join(f"{known:g}" for known in methods[method])
    raise ValueError(f"sparsity: expected one of {known_ones}, got {sparsity!r}")


def group_by_block(names: Iterable[str]) -> dict[str, list[str]]:
    """Groups layers by the repeated blocks in which their names place them.

    A number in a name marks a block: `model.layers.3` in `model.layers.3.mlp.up_proj`. The numbers
    of a list are repeated blocks if at least two of them hold a layer of the same name
    (`mlp.up_proj`). Of nested lists the outermost counts, so that experts belong to their block.
    Order is kept, and layers outside of blocks are left out.
    """
    if isinstance(names, (str, bytes)) or not isinstance(names, Iterable):
        raise TypeError(f"names: expected names of layers, got {type(names).__name__}")
    every = list(names)
    for name in every:
        if not isinstance(name, str):
            raise TypeError(f"names: expected names of layers, got {name!r} for one")
    # By list and by name inside of a block: the numbers of the blocks that have this name.
    numbers: dict[tuple[str, str], set[str]] = {}
    for name in every:
        for parent, number, inner in _numbered(name):
            numbers.setdefault((parent, inner), set()).add(number)
    repeated = {parent for (parent, _), having in numbers.items() if len(having) > 1}
    blocks: dict[str, list[str]] = {}
    for name in every:
        for parent, number, _ in _numbered(name):
            if parent in repeated:
                blocks.setdefault(f"{parent}.{number}" if parent else number, []).append(name)
                break
    if not blocks:
        shown = ", ".join(map(repr, every[:3])) + (", ..." if len(every) > 3 else "")
        raise ValueError(
            "layers: expected repeated blocks (names such as 'layers.0.q' and 'layers.1.q'), found "
            f"none in {len(every)} names ({shown or 'no layers'})"
        )
    return blocks


def _numbered(name: str) -> Iterator[tuple[str, str, str]]:
    """List, number and rest of the name, for every number that is followed by a rest."""
    parts = name.split(".")
    for index, part in enumerate(parts[:-1]):
        if part.isdecimal():
            yield ".".join(parts[:index]), part, ".".join(parts[index + 1 :])


def _layers(
    given: Analysis | Sequence[float] | Mapping[str, float],
    level: str,
    params: Counts | None,
    block_size: int | None,
) -> tuple[dict[str, float], dict[str, int], dict[str, list[str]]]:
    """Alpha and number of weights by layer, and by block the layers that take part."""
    if isinstance(given, Analysis):
        for argument, value in (("params", params), ("block_size", block_size)):
            if value is not None:
                raise ValueError(f"{argument}: an Analysis knows its own, expected None")
        alphas = {layer.name: layer.alpha if layer.status == "ok" else math.nan for layer in given}
        counts = {layer.name: math.prod(layer.shape) for layer in given}
        return _checked(alphas), counts, group_by_block(alphas)
    if isinstance(given, (str, bytes)) or not hasattr(given, "__iter__"):
        raise TypeError(
            "analysis_or_alphas: expected an Analysis, or alphas in a sequence or by name, "
            f"got {type(given).__name__}"
        )
    if params is None:
        raise ValueError("params: bare alphas need the number of weights of each layer, got None")
    size = None if block_size is None else check_int("block_size", block_size, least=1)
    if size is not None and level == "layer":
        raise ValueError(f"block_size: level 'layer' has no blocks, expected None, got {size}")
    if isinstance(given, Mapping):
        alphas = {str(name): value for name, value in given.items()}
    else:
        at = range(len(values := list(given)))
        names = [str(i) if size is None else f"{i // size}.{i % size}" for i in at]
        alphas = dict(zip(names, values, strict=True))
    checked = _checked(alphas)
    counts = _counts(list(checked), params)
    if level == "layer":
        return checked, counts, {name: [name] for name in checked}
    if size is None and not isinstance(given, Mapping):
        raise ValueError(
            "block_size: level 'block' needs the number of layers of a block, got None"
        )
    if size is None:
        return checked, counts, group_by_block(checked)
    names = list(checked)
    if len(names) % size:
        raise ValueError(f"block_size: {size} layers a block do not divide {len(names)} alphas")
    blocks = {str(at // size): names[at : at + size] for at in range(0, len(names), size)}
    return checked, counts, blocks


def _checked(alphas: Mapping[str, float]) -> dict[str, float]:
    if not alphas:
        raise ValueError("alphas: expected at least one, got none")
    values = {name: as_number("alphas", alpha, name) for name, alpha in alphas.items()}
    for name, value in values.items():
        if math.isinf(value) or value <= 0:
            raise ValueError(
                f"alphas: expected positive finite numbers, or NaN where a fit failed, got {value} "
                f"for {name!r}"
            )
    return values


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


def _relative(alphas: Array, epsilon: float) -> Array:
    """The r of every alpha; 1 for NaN, and where all alphas are equal."""
    lowest, highest = np.nanmin(alphas), np.nanmax(alphas)
    if highest == lowest:
        return np.ones_like(alphas)
    relative = (alphas - lowest) / (highest - lowest) * (2 * epsilon) + (1 - epsilon)
    return np.where(np.isnan(alphas), 1.0, relative)


def _spread(units: list[list[str]], values: Array) -> dict[str, float]:
    return {name: float(value) for unit, value in zip(units, values, strict=True) for name in unit}
