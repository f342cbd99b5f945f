"""Which parameters weight decay leaves alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from farms_fast.adapters.layer_rates.norm_partners import is_norm
from farms_fast.adapters.layer_rates.tuned_layers import TunedLayer

__all__ = ["NoDecay", "undecayed"]

# None, "vectors" or globs of parameter names.
NoDecay = str | Sequence[str] | None

_MATRIX_OWNERS = (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd)
_BIAS = re.compile(r"(^|_)bias(_|\d|$)")


def undecayed(
    model: nn.Module,
    layers: Sequence[TunedLayer],
    trained: Mapping[str, nn.Parameter],
    no_decay: NoDecay,
) -> set[str]:
    """Names of the parameters that are not decayed.

    Args:
        model: the layers' module.
        layers: its layers.
        trained: the parameters of all groups, by name.
        no_decay: as in `LayerRates.param_groups`.

    Raises:
        TypeError: `no_decay` is something else.
        ValueError: a glob matches no parameter.
    """
    if no_decay is None:
        return set()
    if no_decay == "vectors":
        beside = {name for layer in layers for name in layer.others}
        norms = {
            id(parameter)
            for module in model.modules()
            if is_norm(module)
            for parameter in module.parameters(recurse=False)
        }
        # A linear layer with a single output has one row: that decays as other weights do.
        matrices = {id(m.weight) for m in model.modules() if isinstance(m, _MATRIX_OWNERS)}
        return {
            name
            for name, parameter in trained.items()
            if name in beside
            or id(parameter) in norms
            or (id(parameter) not in matrices and _is_vector(name, parameter))
        }
    globs = [no_decay] if isinstance(no_decay, str) else no_decay
    if not isinstance(globs, Sequence) or not all(isinstance(glob, str) for glob in globs):
        raise TypeError(f"no_decay: expected None, 'vectors' or globs, got {no_decay!r}")
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in trained):
            raise ValueError(
                f"no_decay: expected globs that match a trainable parameter, got {glob!r}, "
                f"which matches none of {len(trained)}"
            )
    return {name for name in trained if any(fnmatchcase(name, glob) for glob in globs)}


def _is_vector(name: str, parameter: nn.Parameter) -> bool:
    """Whether it has one dimension besides those of 1, or is called a bias."""
    leaf = name.rpartition(".")[2]
    if parameter.dim() <= 1 or _BIAS.search(leaf):
        return True
    return parameter.numel() == max(parameter.shape)
