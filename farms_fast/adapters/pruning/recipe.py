"""Writes ratios as a recipe for llm-compressor."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

from farms_fast.adapters.pruning.masks import NM, check_pattern
from farms_fast.adapters.pruning.pruners import pruner
from farms_fast.adapters.pruning.sparsities import Allocation, check_positive
from farms_fast.core.arguments import check_int, check_type, is_real

# llm-compressor takes the score at index int(number * sparsity), which is past the end at 1.
_LARGEST = 0.99999


def to_recipe(
    method: str,
    ratios: Allocation | Mapping[str, float],
    *,
    n_m: Mapping[str, tuple[int, int]] | None = None,
    block: int = 128,
    damping: float = 0.01,
) -> str:
    """The YAML text of a recipe for llm-compressor.

    Layers of one ratio share a modifier that lists their modules as targets. Run the recipe with
    `llmcompressor.oneshot(model=..., recipe="recipe.yaml", dataset=...)`; it was checked with 0.14
    (`python -m tests.support.recipe_in_llmcompressor`).

    Its counts differ from those of `prune_model`: its SparseGPT prunes one weight more in every
    block of columns, and all that tie with it; its Wanda rounds every row's number down. It does
    not know Hugging Face's Conv1D (GPT-2), and its magnitude modifier acts only in training.

    Args:
        method: "magnitude", "wanda" or "sparsegpt".
        ratios: an Allocation over modules (see `Allocation.for_modules`), or ratios by module name.
        n_m: (n, m), n kept of every m, by module name, instead of the ratios. The first number in
            a recipe counts the weights that go: (3, 8) becomes "5:8".
        block: columns that SparseGPT prunes together; with n_m rounded down to a multiple of m,
            but not to 0.
        damping: SparseGPT's damping.

    Returns:
        The text, without layers that do not change (a ratio of 0, or n = m). For SparseGPT a ratio
        of 1 is 0.99999, which prunes everything; llm-compressor fails at 1.

    Raises:
        TypeError: ratios or n_m are no mapping, or block is no integer.
        ValueError: an unknown method, no layers to prune, a ratio outside of [0, 1], layers of n_m
            that are not those of the ratios, or n_m with magnitude, which llm-compressor lacks.

    Example:
        >>> print(to_recipe("wanda", {"layers.0.q": 0.5, "layers.0.k": 0.5}))
        sparsity_stage:
          layers_0_q_modifiers:
            WandaPruningModifier:
              sparsity: 0.5
              mask_structure: "0:0"
              targets:
              - "layers.0.q"
              - "layers.0.k"
        <BLANKLINE>
    """
    pruner(method)
    check_int("block", block, least=1)
    check_positive("damping", damping)
    given = ratios.ratios if isinstance(ratios, Allocation) else ratios
    for argument, value in (("ratios", given), ("n_m", {} if n_m is None else n_m)):
        check_type(argument, value, Mapping, "a value for each layer by name")
    by_layer = dict(given)
    if not by_layer:
        raise ValueError("ratios: expected at least one layer, got none")
    for name, ratio in by_layer.items():
        if not is_real(ratio) or not 0 <= ratio <= 1:
            raise ValueError(f"ratios: expected numbers from 0 to 1, got {ratio!r} for {name!r}")
    if n_m is not None:
        if method == "magnitude":
            raise ValueError("n_m: llm-compressor has no N:M by magnitude, expected None")
        if set(n_m) != set(by_layer):
            raise ValueError(
                f"n_m: expected the {len(by_layer)} layers of the ratios, got {len(n_m)} others"
            )
        n_m = {name: check_pattern(pattern, name) for name, pattern in n_m.items()}

    groups: dict[tuple[float, NM | None], list[str]] = {}
    for name, ratio in by_layer.items():
        pattern = None if n_m is None else n_m[name]
        group = (ratio if pattern is None else 1 - pattern[0] / pattern[1], pattern)
        # llm-compressor takes "0:8" for no pattern, and a sparsity of 0 for one that is not given.
        if group[0] != 0:
            groups.setdefault(group, []).append(name)
    if not groups:
        raise ValueError(f"ratios: expected a layer to prune, got {len(by_layer)} that stay whole")
    lines = ["sparsity_stage:"]
    used: set[str] = set()
    for (ratio, pattern), names in groups.items():
        modifier, settings = _modifier(method, ratio, pattern, block, damping)
        lines += [f"  {_group_name(names, ratios, used)}_modifiers:", f"    {modifier}:"]
        lines += [f"      {key}: {value}" for key, value in settings.items()]
        lines += ["      targets:", *(f"      - {json.dumps(name)}" for name in names)]
    return "\n".join(lines) + "\n"


def _modifier(
    method: str, ratio: float, pattern: NM | None, block: int, damping: float
) -> tuple[str, dict[str, object]]:
    """A modifier's class and its settings but the targets."""
    sparsity = _decimal(min(ratio, _LARGEST) if method == "sparsegpt" else ratio)
    if method == "magnitude":
        ratios = {"init_sparsity": sparsity, "final_sparsity": sparsity}
        return "MagnitudePruningModifier", {"start": 0, "end": 1, **ratios}
    n, m = pattern or (0, 0)
    settings: dict[str, object] = {"sparsity": sparsity, "mask_structure": f'"{m - n}:{m}"'}
    if method == "wanda":
        return "WandaPruningModifier", settings
    if pattern is not None:
        block = max(m, block - block % m)
    settings |= {"block_size": block, "dampening_frac": _decimal(damping)}
    return "SparseGPTModifier", settings


def _group_name(
    names: Sequence[str], ratios: Allocation | Mapping[str, float], used: set[str]
) -> str:
    """A unique YAML key: the name of the block of these layers, else of the first layer."""
    blocks = ratios.blocks.items() if isinstance(ratios, Allocation) else ()
    label = next((block for block, members in blocks if set(members) == set(names)), names[0])
    word = re.sub(r"[^A-Za-z0-9]+", "_", label).strip("_") or "layers"
    if word[0].isdigit():
        word = f"layers_{word}"
    unique, number = word, 1
    while unique in used:
        number += 1
        unique = f"{word}_{number}"
    used.add(unique)
    return unique


def _decimal(value: float) -> str:
    """A number without an exponent, which some YAML parsers take for text."""
    text = repr(float(value))
    return text if "e" not in text else f"{value:.20f}"
