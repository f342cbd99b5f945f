"""An allocation of sparsity: a ratio for each layer, and what it was made of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt

from farms_fast.adapters.pruning.patterns import kept_of_groups
from farms_fast.core.arguments import check_int
from farms_fast.core.text import printable

__all__ = [
    "Allocation",
    "as_number",
    "check_sparsity",
    "is_number",
    "shared_to_total",
    "weight_counts",
]

Array = npt.NDArray[np.float64]

#: What the published code puts in the place of a ratio above 1: for S = 0.7, and otherwise.
_CLIP_AT_70, _CLIP = 0.99999, 0.998


@dataclass(frozen=True)
class Allocation:
    """Ratios by layer, the share of each layer's weights that is to be zero.

    Attributes:
        ratios: by layer name, in order, each within [0, 1].
        params: number of weights by layer name.
        relative: what the ratios are in proportion to, before any limit: r of
            `allocate_sparsity`, the ratio itself for
            OWL, 1 when uniform.
        blocks: names of the layers by block; a layer by itself where there are no blocks.
        scale: eta, the ratio at r = 1 before what exceeds 1 is shared out.
        settings: how it was made; the wanted total is `settings["sparsity"]`.
        alphas: by layer name, NaN where a fit failed; empty where alphas were not looked at. Of
            a module that was analysed in parts, the mean of the parts weighted by their parameters.
        block_alphas: by block, the alpha that its r was made of, NaN where none was fitted; empty
            where every layer has its own ratio, or alphas were not looked at.
        outliers: OWL's percentage by block; empty otherwise.
        unfitted: layers without an alpha.
        left_out: layers that are in no repeated block and so have no ratio.

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
        """Sparsity of every block."""
        return {
            block: math.fsum(self.ratios[name] * self.params[name] for name in names)
            / sum(self.params[name] for name in names)
            for block, names in self.blocks.items()
        }

    def shown_alpha(self, block: str) -> float:
        """The alpha that a block's ratio was made of; the mean of its layers' at level "layer".

        NaN where there is none.
        """
        if block in self.block_alphas:
            return self.block_alphas[block]
        alphas = [self.alphas.get(name, math.nan) for name in self.blocks.get(block, ())]
        fitted = [alpha for alpha in alphas if not math.isnan(alpha)]
        return math.fsum(fitted) / len(fitted) if fitted else math.nan

    @property
    def limited(self) -> tuple[str, ...]:
        """Layers whose share was above 1, at once or when they took a part of others' excess."""
        return tuple(
            name
            for name, r in self.relative.items()
            if r * self.scale > 1 or self.ratios[name] == 1
        )

    def for_modules(self, modules: Mapping[str, int]) -> Allocation:
        """The same allocation over the modules that a pruner works on.

        An analysis may have a fused weight in parts (`attn.c_attn.q`), or lack a layer that was
        too small to analyse, or have layers that nobody prunes. A module gets the r of the layer of
        its name, or the mean of its parts' (weighted by parameters), or that of the block that it
        lies in; then the ratios are scaled anew to the total over these modules. The alphas of
        blocks stay those that the ratios were made of. With the layers of the allocation itself as
        modules the ratios stay as they are.

        Args:
            modules: number of weights by module name.

        Returns:
            An Allocation with these names.

        Raises:
            TypeError: no mapping, or a number of weights that is no integer.
            ValueError: no modules, or one that neither has an r nor lies in a block.

        Example:
            >>> from farms_fast.adapters.pruning.allocation import allocate_sparsity
            >>> alphas = {"h.0.qkv.q": 2.0, "h.0.qkv.k": 2.0, "h.1.qkv.q": 3.0, "h.1.qkv.k": 3.0}
            >>> allocation = allocate_sparsity(alphas, 0.5, 0.2, params=8)
            >>> fused = allocation.for_modules({"h.0.qkv": 16, "h.1.qkv": 16})
            >>> {name: round(ratio, 3) for name, ratio in fused.ratios.items()}
            {'h.0.qkv': 0.4, 'h.1.qkv': 0.6}
        """
        counts = weight_counts("modules", modules)
        found = {name: self._relative_of(name) for name in counts}
        blocks: dict[str, list[str]] = {}
        for name in counts:
            blocks.setdefault(self._block_of(name) or name, []).append(name)
        scale, ratios = self.scale, {name: self.ratios.get(name, math.nan) for name in counts}
        if found != self.relative or counts != self.params:
            scale, scaled = shared_to_total(
                np.array(list(found.values())),
                np.array(list(counts.values()), np.float64),
                float(str(self.settings["sparsity"])),
                clip=self.settings.get("compat") == "farms",
            )
            ratios = dict(zip(counts, scaled.tolist(), strict=True))
        return Allocation(
            ratios=ratios,
            params=counts,
            relative=found,
            blocks={block: tuple(names) for block, names in blocks.items()},
            scale=scale,
            settings=dict(self.settings),
            alphas={name: self._alpha_of(name) for name in counts} if self.alphas else {},
            outliers=dict(self.outliers),
            block_alphas=dict(self.block_alphas),
            unfitted=tuple(n for n in counts if self.alphas and math.isnan(self._alpha_of(n))),
        )

    def n_m(self, m: int) -> dict[str, tuple[int, int]]:
        """The ratios as N:M patterns: how many of every m weights each block keeps.

        All layers of a block get the same N (at level "layer" every layer its own). Every N is the
        wanted number rounded down, and those with the largest remainders get one more, as many as
        bring the total nearest to the wanted one. Only a ratio of 1 gives N = 0: where less than 1
        is wanted it is 1, and the excess is taken from those with the smallest remainders.

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
        units = self._units()
        counts = [sum(self.params[name] for name in unit) for unit in units]
        kept = kept_of_groups([self.ratios[unit[0]] for unit in units], counts, size)
        return {name: (n, size) for unit, n in zip(units, kept, strict=True) for name in unit}

    def to_dict(self) -> dict[str, object]:
        """Everything in values that JSON has a form for; NaN as None."""
        return {
            "settings": dict(self.settings),
            "total": self.total,
            "scale": self.scale,
            "layers": [
                {
                    "name": name,
                    "block": block,
                    "params": self.params[name],
                    "ratio": self.ratios[name],
                    "relative": self.relative[name],
                    "alpha": _or_none(self.alphas.get(name, math.nan)),
                }
                for block, names in self.blocks.items()
                for name in names
            ],
            "blocks": self.block_ratios,
            "block_alphas": {block: _or_none(x) for block, x in self.block_alphas.items()},
            "outliers": dict(self.outliers),
            "unfitted": list(self.unfitted),
            "limited": list(self.limited),
            "left_out": list(self.left_out),
        }

    def __str__(self) -> str:
        """A line with the settings and the total, then one line per block."""
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

    def _units(self) -> list[list[str]]:
        """Layers that have one ratio together: those of a block where they are all alike."""
        units: list[list[str]] = []
        for names in self.blocks.values():
            alike = len({self.relative[name] for name in names}) == 1
            units += [list(names)] if alike else [[name] for name in names]
        return units

    def _parts_of(self, module: str) -> list[str]:
        if module in self.relative:
            return [module]
        return [name for name in self.relative if name.startswith(f"{module}.")]

    def _block_of(self, module: str) -> str | None:
        parts = set(self._parts_of(module))
        for block, names in self.blocks.items():
            if parts & set(names) or module.startswith(f"{block}."):
                return block
        return None

    def _relative_of(self, module: str) -> float:
        block = self._block_of(module)
        names = self._parts_of(module) or list(self.blocks.get(block or "", ()))
        if not names:
            raise ValueError(
                f"modules: {module!r} is neither a layer of the allocation nor in one of its blocks"
            )
        return self._mean(self.relative, names)

    def _alpha_of(self, module: str) -> float:
        parts = [n for n in self._parts_of(module) if not math.isnan(self.alphas.get(n, math.nan))]
        return self._mean(self.alphas, parts) if parts else math.nan

    def _mean(self, values: Mapping[str, float], names: list[str]) -> float:
        """Weighted by parameters."""
        alike = {values[name] for name in names}
        if len(alike) == 1:  # for a weighted mean of equal numbers is not always that number
            return alike.pop()
        weight = sum(self.params[name] for name in names)
        return math.fsum(values[name] * self.params[name] for name in names) / weight


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a number of Python or a floating one of NumPy, and no bool."""
    return isinstance(value, (int, float, np.floating)) and not isinstance(value, bool)


def as_number(argument: str, value: Any, of: str) -> float:
    """One of several numbers as a float; TypeError for what is none, a text with digits too."""
    try:
        if not isinstance(value, (str, bytes)):
            return float(value)
    except (TypeError, ValueError, RuntimeError):
        pass
    raise TypeError(f"{argument}: expected numbers, got {value!r} for {of!r}")


def weight_counts(argument: str, given: object) -> dict[str, int]:
    """Numbers of weights by name.

    Raises:
        TypeError: they are no mapping from names to integers.
        ValueError: there are none, or one is less than 1.

    Example:
        >>> weight_counts("modules", {"up": 64})
        {'up': 64}
    """
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
    if not is_number(sparsity) or not 0 < sparsity < 1:
        raise ValueError(f"sparsity: expected a number between 0 and 1, got {sparsity!r}")


def shared_to_total(
    relative: Array, weights: Array, sparsity: float, *, clip: bool = False
) -> tuple[float, Array]:
    """Ratios in proportion to `relative`, none above 1, that prune a share of all weights.

    Args:
        relative: float64 (n,), at least 0.
        weights: float64 (n,), how much each counts.
        sparsity: the share, within (0, 1).
        clip: put 0.998 (0.99999 for a share of 0.7) in the place of ratios above 1 instead of
            sharing their excess out.

    Returns:
        The first factor of `relative`, and the ratios float64 (n,).

    Raises:
        ValueError: too many are zero for the others to make up the share.

    Example:
        >>> import numpy as np
        >>> scale, ratios = shared_to_total(np.array([1.0, 3.0]), np.ones(2), 0.75)
        >>> scale, ratios.tolist()
        (0.375, [0.5, 1.0])
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


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value
