"""Rules that need the module that owns a tensor; `layer_rules` has those that do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from farms_fast.weights.rules.header_index import Weight
from farms_fast.weights.rules.layer_rules import (
    Answer,
    convolution,
    embedding,
    expert_stack,
    is_stack,
    linear,
    stack,
)

# RMSNorm came to torch later than the rest; LayerNorm alone can have a weight of several dims.
_NORMALISATIONS = tuple(getattr(nn, n) for n in ("LayerNorm", "RMSNorm") if hasattr(nn, n))

# What is made of the tensor `weight` of modules of these types.
_BY_TYPE: tuple[tuple[tuple[type, ...], Callable[[Weight, Any], Answer]], ...] = (
    ((nn.Linear,), lambda weight, _: linear(weight)),
    ((_ConvNd,), lambda weight, owner: convolution(weight, owner.groups, owner.transposed)),
    ((nn.Embedding, nn.EmbeddingBag), lambda weight, _: embedding(weight)),
    ((nn.Bilinear,), lambda weight, _: stack(weight, kind="bilinear")),
)


def layers_by_owner(weight: Weight, owner: nn.Module) -> Answer:
    """Layers by the type of the module that owns the tensor, where the type says something."""
    if isinstance(owner, _NORMALISATIONS):
        return "elementwise scale of a normalisation, not a matrix"
    kind, leaf = type(owner).__name__.lower(), weight.leaf
    if leaf == "weight":
        for types, rule in _BY_TYPE:
            if isinstance(owner, types):
                return rule(weight, owner)
        # Hugging Face's Conv1D is a linear layer that stores its weight (in, out).
        if type(owner).__name__ == "Conv1D" and hasattr(owner, "nf") and weight.rank == 2:
            return linear(weight, transposed=True)
    if weight.rank == 3 and "expert" in kind and "bias" not in leaf:
        return expert_stack(weight)
    if leaf.startswith("weight") and is_stack(weight) and "conv" not in kind:
        return stack(weight, kind="stacked")
    return None
