"""What to measure on a real language model, in which order, and how a cell's ratios are made.

A cell is one pruned model. For every method and sparsity, all arms are measured at one epsilon on
every calibration seed first; then the other candidates on the first seed; then, on the other seeds,
the candidate that the validation text prefers. Uniform ratios are every arm's candidate 0.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from farms_fast.adapters.pruning.allocation import (
    allocate_sparsity,
    group_by_block,
    uniform_sparsity,
)
from farms_fast.adapters.pruning.owl import owl_sparsity

UNIFORM, OWL, FARMS = "uniform", "OWL", "FARMS median"
SHUFFLES = tuple(f"shuffled {number}" for number in range(1, 6))
#: The arms that are ranked; the shuffled ones count as one.
ARMS = (UNIFORM, FARMS, "FARMS peak", "whole matrices", OWL, "reversed", *SHUFFLES)
#: Variants of FARMS's median rule: where in a block alpha is taken, how large the windows are, and
#: a ratio for every layer instead of every block.
VARIANTS = ("default windows", "attention only", "MLP only", "per layer")
#: Arms by the analysis whose alphas they take; all others take those of `FARMS`.
ANALYSIS = {arm: arm for arm in ("FARMS peak", "whole matrices", "default windows")}
PARTS = ("all", "attention", "MLP")
_ATTENTION = "self_attn"


@dataclass(frozen=True)
class Cell:
    """One pruned model.

    An arm "alone B P" prunes part P of block B to the sparsity and nothing else.
    """

    method: str
    sparsity: float
    arm: str
    epsilon: float = 0.0
    seed: int = 0

    @property
    def key(self) -> str:
        return "|".join(str(value) for value in asdict(self).values())


@dataclass(frozen=True)
class Plan:
    """What to measure: groups of a method and a sparsity, the first of them first."""

    groups: tuple[tuple[str, float], ...]
    seeds: tuple[int, ...]
    epsilons: tuple[float, ...]
    first_epsilon: float
    arms: tuple[str, ...] = ARMS
    variants: tuple[str, ...] = ()
    alone: float | None = None
    blocks: int = 0

    def cells(self, done: Mapping[str, Mapping[str, Any]]) -> Iterator[Cell]:
        """Cells that are not done and depend on none that is not, the most telling first."""
        for cell in self._all(done):
            if cell.key not in done:
                yield cell

    def _all(self, done: Mapping[str, Mapping[str, Any]]) -> Iterator[Cell]:
        for number, (method, sparsity) in enumerate(self.groups):
            yield from self._group(method, sparsity, self.arms, done)
            if number == 0:
                yield from self._alone()
        for method, sparsity in self.groups:
            if method != "magnitude":
                yield from self._group(method, sparsity, self.variants, done)

    def _alone(self) -> Iterator[Cell]:
        if self.alone is not None:
            for part in PARTS:
                for block in range(self.blocks):
                    yield Cell("wanda", self.alone, f"alone {block} {part}", 0.0, self.seeds[0])

    def _group(
        self, method: str, sparsity: float, arms: Sequence[str], done: Mapping[str, Any]
    ) -> Iterator[Cell]:
        for seed in self.seeds:
            for arm in arms:
                if seed in self.seeds_of(method, arm):
                    epsilon = 0.0 if arm == UNIFORM else self.first_epsilon
                    yield Cell(method, sparsity, arm, epsilon, seed)
        for epsilon in self.epsilons:
            for arm in arms:
                if arm != UNIFORM:
                    yield Cell(method, sparsity, arm, epsilon, self.seeds[0])
        for arm in arms:
            best = self.chosen(method, sparsity, arm, done)
            for seed in self.seeds_of(method, arm):
                if best:
                    yield Cell(method, sparsity, arm, best, seed)

    def seeds_of(self, method: str, arm: str) -> tuple[int, ...]:
        """Magnitude needs no calibration: the seed changes OWL's scores alone."""
        return self.seeds if method != "magnitude" or arm == OWL else self.seeds[:1]

    def chosen(
        self, method: str, sparsity: float, arm: str, done: Mapping[str, Any]
    ) -> float | None:
        """The candidate that is best on the validation text of the first seed; 0 is uniform.

        None before all candidates are done.
        """
        values = {}
        for epsilon in (0.0, *sorted({*self.epsilons, self.first_epsilon})):
            one = UNIFORM if epsilon == 0 else arm
            found = done.get(Cell(method, sparsity, one, epsilon, self.seeds[0]).key)
            if found is None:
                return None
            values[epsilon] = found["validation"]
            if arm == UNIFORM:
                break
        return min(values, key=lambda epsilon: values[epsilon])


def ratios_of(cell: Cell, facts: Mapping[str, Any]) -> dict[str, float]:
    """Ratio by module.

    Args:
        cell: what to prune.
        facts: `modules`, number of weights by module; `alphas`, alpha by module by analysis;
            `outliers`, OWL's by block by seed, as text.
    """
    modules: dict[str, int] = facts["modules"]
    blocks = group_by_block(modules)
    if cell.arm.startswith("alone "):
        _, number, part = cell.arm.split()
        inside = set(blocks[list(blocks)[int(number)]])
        chosen = inside & {name for name in modules if in_part(name, part)}
        return {name: cell.sparsity if name in chosen else 0.0 for name in modules}
    if cell.arm == UNIFORM:
        return uniform_sparsity(modules, cell.sparsity).ratios
    if cell.arm == OWL:
        layers = {block: {name: modules[name] for name in blocks[block]} for block in blocks}
        # As wide as the range of the other arms: from S (1 - epsilon) to S (1 + epsilon).
        width = cell.epsilon * cell.sparsity
        outliers = facts["outliers"][str(cell.seed)]
        return owl_sparsity(outliers, cell.sparsity, width, layers=layers).ratios
    alphas: dict[str, float] = facts["alphas"][ANALYSIS.get(cell.arm, FARMS)]
    if cell.arm == "per layer":
        return allocate_sparsity(
            alphas, cell.sparsity, cell.epsilon, level="layer", params=modules
        ).ratios
    part = {"attention only": "attention", "MLP only": "MLP"}.get(cell.arm, "all")
    means = block_means(alphas, part)
    order = list(means.values())
    if cell.arm in SHUFFLES:
        random.Random(cell.arm).shuffle(order)
    elif cell.arm == "reversed":
        order = [min(order) + max(order) - alpha for alpha in order]
    by_block = dict(zip(means, order, strict=True))
    given = {name: by_block[block] for block, names in blocks.items() for name in names}
    return allocate_sparsity(given, cell.sparsity, cell.epsilon, params=modules).ratios


def block_means(alphas: Mapping[str, float], part: str = "all") -> dict[str, float]:
    """Mean alpha by block, of the modules in a part, without fits that failed."""
    means = {}
    for block, names in group_by_block(alphas).items():
        values = [alphas[name] for name in names if in_part(name, part)]
        fitted = [value for value in values if not math.isnan(value)]
        means[block] = math.fsum(fitted) / len(fitted)
    return means


def in_part(name: str, part: str) -> bool:
    """Whether a module is in the attention or in the MLP of its block, or anywhere ("all")."""
    return part == "all" or (_ATTENTION in name.split(".")) == (part == "attention")


def digest_of(settings: Mapping[str, Any]) -> str:
    """Tells whether two runs have the same settings."""
    text = repr(sorted(settings.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:12]
