"""A sparsity for each layer: the `Allocation`, its exact total, and its rounding to N:M."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from farms_fast.core.arguments import check_int, is_real
from farms_fast.core.jsonable import plain
from farms_fast.core.text import printable

Array = npt.NDArray[np.float64]

# The published code replaces a ratio above 1 by these: at S = 0.7, and otherwise.
_CLIP_AT_70, _CLIP = 0.99999, 0.998


@dataclass(frozen=True)
class Allocation:
    """The share of each layer's weights that pruning sets to zero.

    Attributes:
        ratios: the share by layer name, in order, each within [0, 1].
        params: number of weights by layer name.
        relative: the weighting r by layer name, to which the ratios are proportional before any
            limit: that of `allocate_sparsity`, the ratio itself for OWL, 1 when uniform.
        blocks: names of the layers by block; a layer outside of blocks is its own block.
        scale: eta, the ratio at r = 1 before the excess over 1 is redistributed.
        settings: how the allocation was made; `settings["sparsity"]` is the requested total.
        alphas: alpha by layer name, NaN where a fit failed; empty without alphas. A module that was
            analysed in parts has the mean of its parts, weighted by their parameters.
        block_alphas: the alpha behind each block's r, NaN where no fit succeeded; empty where every
            layer has its own ratio, or without alphas.
        outliers: OWL's percentage by block; empty otherwise.
        unfitted: layers without an alpha.
        left_out: layers that lie in no repeated block and so have no ratio.

    Example:
        >>> allocation = Allocation({"fc": 0.5}, {"fc": 8}, {"fc": 1.0}, {"fc": ("fc",)}, 0.5,
        ...                         {"sparsity": 0.5})
        >>> allocation.total
        0.5
    """

    ratios: dict[str, float]
    params: dict[str, int]
    relative: dict[str, float]
    blocks: dict[str, tuple[str, ...]]
    scale: float
    settings: dict[str, object]
    alphas: dict[str, float] = field(default_factory=dict)
    outliers: dict[str, float] = field(default_factory=dict)
    block_alphas: dict[str, float] = field(default_factory=dict)
    unfitted: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    @property
    def total(self) -> float:
        """Sparsity of all layers together."""
        zeros = math.fsum(self.ratios[name] * count for name, count in self.params.items())
        return zeros / sum(self.params.values())

    @property
    def block_ratios(self) -> dict[str, float]:
        """Sparsity by block."""
        return {
            block: math.fsum(self.ratios[name] * self.params[name] for name in names)
            / sum(self.params[name] for name in names)
            for block, names in self.blocks.items()
        }

    def shown_alpha(self, block: str) -> float:
        """The alpha behind a block's ratio, NaN where there is none.

        At level "layer" it is the mean over the block's layers.
        """
        if block in self.block_alphas:
            return self.block_alphas[block]
        names = self.blocks.get(block, ())
        return mean_of_fitted(self.alphas.get(name, math.nan) for name in names)

    @property
    def limited(self) -> tuple[str, ...]:
        """Layers that reached a ratio of 1, at once or with a part of the others' excess."""
        relative, ratios = self.relative.items(), self.ratios
        return tuple(name for name, r in relative if r * self.scale > 1 or ratios[name] == 1)

    def for_modules(self, modules: Mapping[str, int]) -> Allocation:
        """Transfers the allocation to the modules that a pruner works on.

        An analysis may split a fused weight into parts (`attn.c_attn.q`), skip a layer that is too
        small, or include layers that nobody prunes. A module gets the r of the layer of its name,
        else the mean r of its parts weighted by parameters, else that of its block. The ratios are
        then scaled to the total over these modules. If the modules are the allocation's own layers,
        the ratios do not change.

        Args:
            modules: number of weights by module name.

        Raises:
            TypeError: modules are no mapping, or a number of weights is no integer.
            ValueError: there are no modules, or one has no r and lies in no block.

        Example:
            >>> from farms_fast.adapters.pruning.allocation import allocate_sparsity
            >>> alphas = {"h.0.qkv.q": 2.0, "h.0.qkv.k": 2.0, "h.1.qkv.q": 3.0, "h.1.qkv.k": 3.0}
            >>> allocation = allocate_sparsity(alphas, 0.5, 0.2, params=8)
            >>> fused = allocation.for_modules({"h.0.qkv": 16, "h.1.qkv": 16})
            >>> {name: round(ratio, 3) for name, ratio in fused.ratios.items()}
            {'h.0.qkv': 0.4, 'h.1.qkv': 0.6}
        """
        counts = weight_counts("modules", modules)
        relative: dict[str, float] = {}
        alphas: dict[str, float] = {}
        blocks: dict[str, list[str]] = {}
        for module in counts:
            parts = [name for name in self.relative if name.startswith(f"{module}.")]
            parts = [module] if module in self.relative else parts
            block = self._block_of(module, parts)
            if not (names := parts or self.blocks.get(block, ())):
                raise ValueError(
                    f"modules: {module!r} is neither a layer of the allocation nor in one of its "
                    "blocks"
                )
            relative[module] = self._mean(self.relative, names)
            fitted = [name for name in parts if not math.isnan(self.alphas.get(name, math.nan))]
            if self.alphas:
                alphas[module] = self._mean(self.alphas, fitted)
            blocks.setdefault(block or module, []).append(module)
        scale, ratios = self.scale, {name: self.ratios.get(name, math.nan) for name in counts}
        if relative != self.relative or counts != self.params:
            scale, scaled = scale_to_total(
                np.array(list(relative.values())),
                np.array(list(counts.values()), np.float64),
                float(str(self.settings["sparsity"])),
                clip=self.settings.get("compat") == "farms",
            )
            ratios = dict(zip(counts, scaled.tolist(), strict=True))
        return replace(
            self,
            ratios=ratios,
            params=counts,
            relative=relative,
            blocks={block: tuple(names) for block, names in blocks.items()},
            scale=scale,
            alphas=alphas,
            unfitted=tuple(name for name, alpha in alphas.items() if math.isnan(alpha)),
            left_out=(),
        )

    def n_m(self, m: int) -> dict[str, tuple[int, int]]:
        """Rounds the ratios to N:M: how many of every m weights each block keeps.

        All layers of a block get the same N; at level "layer" every layer has its own. N is rounded
        down, then those with the largest remainders get one more until the total is nearest to the
        requested one. Only a ratio of 1 gives N = 0: elsewhere N is at least 1, and the excess is
        taken from those with the smallest remainders.

        Args:
            m: weights of a group, 4 or 8 for example.

        Returns:
            (n, m) by layer name, n kept of every m.

        Raises:
            TypeError: m is no integer.
            ValueError: m is less than 1, or too small for so high a sparsity with 1 of m kept.

        Example:
            >>> from farms_fast.adapters.pruning.allocation import allocate_sparsity
            >>> allocation = allocate_sparsity([2.0, 3.0, 4.0], 0.5, 0.25, params=8, block_size=1)
            >>> allocation.n_m(8)
            {'0.0': (5, 8), '1.0': (4, 8), '2.0': (3, 8)}
        """
        size = check_int("m", m, least=1)
        # Layers of one ratio: a whole block where its layers are alike.
        units: list[tuple[str, ...]] = []
        for names in self.blocks.values():
            alike = len({self.relative[name] for name in names}) == 1
            units += [names] if alike else [(name,) for name in names]
        counts = [sum(self.params[name] for name in unit) for unit in units]
        kept = kept_of_groups([self.ratios[unit[0]] for unit in units], counts, size)
        return {name: (n, size) for unit, n in zip(units, kept, strict=True) for name in unit}

    def to_dict(self) -> dict[str, object]:
        """The allocation in values that JSON can hold, with None for NaN."""
        document = {
            "settings": self.settings,
            "total": self.total,
            "scale": self.scale,
            "layers": [
                {
                    "name": name,
                    "block": block,
                    "params": self.params[name],
                    "ratio": self.ratios[name],
                    "relative": self.relative[name],
                    "alpha": self.alphas.get(name),
                }
                for block, names in self.blocks.items()
                for name in names
            ],
            "blocks": self.block_ratios,
            "block_alphas": self.block_alphas,
            "outliers": self.outliers,
            "unfitted": self.unfitted,
            "limited": self.limited,
            "left_out": self.left_out,
        }
        values: dict[str, object] = plain(document)
        return values

    def __str__(self) -> str:
        """One line with the settings and the total, then one line per block."""
        settings = ", ".join(f"{k} {v}" for k, v in self.settings.items() if v is not None)
        lines = [f"Allocation({settings}; {len(self.ratios)} layers, total {self.total:.6f})"]
        for block, ratio in self.block_ratios.items():
            names = self.blocks[block]
            line = f"  {printable(block)}  {sum(self.params[n] for n in names)} weights"
            if not math.isnan(alpha := self.shown_alpha(block)):
                line += f", alpha {alpha:.3f}"
            if block in self.outliers:
                line += f", outliers {self.outliers[block]:.3f} %"
            lines.append(f"{line}, sparsity {ratio:.4f}")
        return "\n".join(lines)

    def _block_of(self, module: str, parts: Sequence[str]) -> str:
        """The block of a module or of its parts; "" outside of blocks."""
        for block, names in self.blocks.items():
            if set(parts) & set(names) or module.startswith(f"{block}."):
                return block
        return ""

    def _mean(self, values: Mapping[str, float], names: Sequence[str]) -> float:
        """The mean weighted by parameters, NaN of none."""
        distinct = {values[name] for name in names}
        if len(distinct) == 1:  # rounding may move a weighted mean of equal numbers
            return distinct.pop()
        weight = sum(self.params[name] for name in names)
        return math.fsum(values[name] * self.params[name] for name in names) / (weight or math.nan)


def mean_of_fitted(alphas: Iterable[float]) -> float:
    """The mean of the alphas that are not NaN; NaN of none."""
    fitted = [alpha for alpha in alphas if not math.isnan(alpha)]
    return math.fsum(fitted) / len(fitted) if fitted else math.nan


def as_number(argument: str, value: Any, of: str) -> float:
    """One of several numbers as a float; TypeError for anything else, text with digits included."""
    try:
        if not isinstance(value, (str, bytes)):
            return float(value)
    except (TypeError, ValueError, RuntimeError):
        pass
    raise TypeError(f"{argument}: expected numbers, got {value!r} for {of!r}")


def weight_counts(argument: str, given: object) -> dict[str, int]:
    """Checks that there are positive numbers of weights by name, and returns them."""
    if not isinstance(given, Mapping):
        raise TypeError(
            f"{argument}: expected numbers of weights by name, got {type(given).__name__}"
        )
    if not given:
        raise ValueError(f"{argument}: expected at least one, got none")
    wrong = [name for name in given if not isinstance(name, str)]
    if wrong:
        raise TypeError(f"{argument}: expected names, got {wrong[0]!r} for one")
    return {name: check_int(f"{argument}[{name!r}]", n, least=1) for name, n in given.items()}


def check_sparsity(sparsity: object) -> None:
    """Raises ValueError unless it is a number within (0, 1)."""
    if not is_real(sparsity) or not 0 < sparsity < 1:
        raise ValueError(f"sparsity: expected a number between 0 and 1, got {sparsity!r}")


def check_positive(argument: str, value: object) -> None:
    """Raises ValueError unless it is a number above 0."""
    if not is_real(value) or not value > 0:
        raise ValueError(f"{argument}: expected a number above 0, got {value!r}")


def scale_to_total(
    relative: Array, weights: Array, sparsity: float, *, clip: bool = False
) -> tuple[float, Array]:
    """Ratios in proportion to `relative` that prune a share of all weights, none above 1.

    The excess over 1 goes to the others; `clip` replaces a ratio above 1 by 0.998 (0.99999 for a
    share of 0.7) instead, as the published code does. The first factor of `relative` is returned
    with them.
    """
    wanted = sparsity * weights.sum()
    if weights[relative > 0].sum() < wanted:
        raise ValueError(
            f"epsilon: {sparsity:g} of all weights cannot be pruned where ratios are 0 for layers "
            f"with {weights[relative == 0].sum() / weights.sum():.3f} of them"
        )
    scale = float(wanted / (weights * relative).sum())
    ratios = relative * scale
    if clip:
        ratios[ratios > 1] = _CLIP_AT_70 if math.isclose(sparsity, 0.7) else _CLIP
        return scale, ratios
    full = ratios > 1
    while (ratios > 1).any():
        full |= ratios > 1
        rest = (weights * relative)[~full].sum()
        share = (wanted - weights[full].sum()) / rest if rest else 0.0
        ratios = np.where(full, 1.0, relative * share)
    return scale, ratios


def kept_of_groups(ratios: Sequence[float], counts: Sequence[int], size: int) -> list[int]:
    """How many of `size` weights each layer (or block) keeps, by the rule of `Allocation.n_m`."""
    wanted = [(1 - ratio) * size for ratio in ratios]
    minimum = [0 if ratio == 1 else 1 for ratio in ratios]
    # A ratio such as 0.7 is inexact: 2.9999999999999996 means 3.
    down = [math.floor(value + 1e-9) for value in wanted]
    kept = [max(pair) for pair in zip(down, minimum, strict=True)]

    def missing() -> float:
        units = zip(wanted, kept, counts, strict=True)
        return math.fsum((value - n) * count for value, n, count in units)

    lacking = missing()
    while lacking < 0:
        reducible = [u for u, n in enumerate(kept) if n > minimum[u] and -2 * lacking > counts[u]]
        if not reducible:
            break
        kept[min(reducible, key=lambda unit: (wanted[unit] - kept[unit], unit))] -= 1
        lacking = missing()
    for unit in sorted(range(len(kept)), key=lambda unit: (down[unit] - wanted[unit], unit)):
        growable = down[unit] >= minimum[unit] > 0 and kept[unit] < size
        if growable and lacking * 2 >= counts[unit]:
            kept[unit] += 1
            lacking -= counts[unit]
    steps = [count for count, few in zip(counts, minimum, strict=True) if few]
    if kept == minimum and steps and -2 * lacking > min(steps) * (1 + 1e-9):
        reached = 1 - sum(n * c for n, c in zip(kept, counts, strict=True)) / size / sum(counts)
        total = math.fsum(r * c for r, c in zip(ratios, counts, strict=True)) / sum(counts)
        raise ValueError(
            f"m: with 1 of {size} kept at least, no more than {reached:.4f} of the weights can go, "
            f"and the ratios make it {total:.4f}: expected a larger m"
        )
    return kept
