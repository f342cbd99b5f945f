"""Prunes language models with layer-wise sparsities."""

from farms_fast.adapters.pruning.allocation import (
    EPSILON_PRESETS,
    allocate_sparsity,
    epsilon_preset,
    uniform_sparsity,
)
from farms_fast.adapters.pruning.blocks import find_blocks
from farms_fast.adapters.pruning.evaluation import SEVEN_TASKS, perplexity, zero_shot
from farms_fast.adapters.pruning.owl import outlier_ratio, owl_sparsity
from farms_fast.adapters.pruning.pruners import PRUNERS, pruner
from farms_fast.adapters.pruning.recipe import to_recipe
from farms_fast.adapters.pruning.saving import save_pruned
from farms_fast.adapters.pruning.sequential import (
    PrunedLayer,
    PruningReport,
    owl_statistics,
    prune_model,
)
from farms_fast.adapters.pruning.sparsities import Allocation
from farms_fast.adapters.pruning.statistics import InputStatistics
from farms_fast.adapters.pruning.tokens import calibration_tokens, text_tokens

__all__ = [
    "EPSILON_PRESETS",
    "PRUNERS",
    "SEVEN_TASKS",
    "Allocation",
    "InputStatistics",
    "PrunedLayer",
    "PruningReport",
    "allocate_sparsity",
    "calibration_tokens",
    "epsilon_preset",
    "find_blocks",
    "outlier_ratio",
    "owl_sparsity",
    "owl_statistics",
    "perplexity",
    "prune_model",
    "pruner",
    "save_pruned",
    "text_tokens",
    "to_recipe",
    "uniform_sparsity",
    "zero_shot",
]
