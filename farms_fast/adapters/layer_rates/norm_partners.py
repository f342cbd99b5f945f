"""Which normalisation follows which layer, so that both are trained at one rate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)
_WORDS = ("batch_norm", "batchnorm", "layer_norm", "layernorm", "norm", "bn", "gn", "ln")
_LAYER_WORDS = ("conv", "fc", "linear", "lin", "dense", "proj")


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation: one of torch's, or one by its class name."""
    if isinstance(module, _NORMS):
        return True
    own = list(module.parameters())
    return "Norm" in type(module).__name__ and bool(own) and all(p.dim() <= 1 for p in own)


def norm_partners(model: nn.Module, rule: str | None, owners: Mapping[str, str]) -> dict[str, str]:
    """Names of layers by the normalisations that are trained at their rates.

    The rule is what `LayerRates` calls `norm`; ValueError for an unknown one. `owners` has the
    layers' names by those of the modules that have their weights.
    """
    if rule not in ("name", "order", None):
        raise ValueError(f"norm: expected 'name', 'order' or None, got {rule!r}")
    if rule is None:
        return {}
    return _by_name(model, owners) if rule == "name" else _by_order(model, owners)


def _by_name(model: nn.Module, owners: Mapping[str, str]) -> dict[str, str]:
    partners = {}
    for path, module in model.named_modules():
        if is_norm(module):
            partner = next((name for name in _named_like(path) if name in owners), None)
            if partner is not None:
                partners[path] = owners[partner]
    return partners


def _named_like(path: str) -> Iterator[str]:
    """Names that the layer before a normalisation may have, the likeliest first."""
    parent, dot, leaf = path.rpartition(".")
    above, point, name = parent.rpartition(".")
    if leaf.isdigit():
        yield f"{parent}{dot}{int(leaf) - 1}"
    word = next((word for word in _WORDS if word in leaf), None)
    if word is not None:
        for other in _LAYER_WORDS:
            yield f"{parent}{dot}{leaf.replace(word, other)}"
        for removed in (f"_{word}", f"{word}_"):
            if removed in leaf:
                yield f"{parent}{dot}{leaf.replace(removed, '')}"
    word = next((word for word in _WORDS if word in name), None)
    if word is not None:  # lists of them: `norms.0` and `convs.0`
        for other in _LAYER_WORDS:
            yield f"{above}{point}{name.replace(word, other)}.{leaf}"


def _by_order(model: nn.Module, owners: Mapping[str, str]) -> dict[str, str]:
    partners = {}
    before: tuple[str, int | None] | None = None
    for path, module in model.named_modules():
        if path in owners:
            before = owners[path], _integer(module, "out_channels", "out_features", "nf")
        elif is_norm(module):
            if before is not None and before[1] is not None and before[1] == _features(module):
                partners[path] = before[0]
            before = None
    return partners


def _features(norm: nn.Module) -> int | None:
    """How many features a normalisation has, None if it has more than one dimension of them."""
    shape = getattr(norm, "normalized_shape", None)
    if isinstance(shape, tuple):
        return shape[0] if len(shape) == 1 else None
    features = _integer(norm, "num_features", "num_channels")
    if features is None:
        features = max((p.numel() for p in norm.parameters()), default=None)
    return features


def _integer(module: nn.Module, *names: str) -> int | None:
    """The first of these attributes that is an integer."""
    values = (getattr(module, name, None) for name in names)
    return next((value for value in values if isinstance(value, int)), None)
