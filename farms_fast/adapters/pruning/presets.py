"""The widths of the spread of sparsities that the paper took for its tables."""

from __future__ import annotations

from farms_fast.adapters.pruning.sparsities import is_number

__all__ = ["EPSILON_PRESETS", "epsilon_preset"]

_SPARSITIES = (0.7, 0.75, 0.8, 0.85)

#: Epsilon of FARMS by model, method and sparsity, for alphas of 2000 x 2000 windows (Q = 1) under
#: the peak rule, from the tables of arXiv 2506.06280.
EPSILON_PRESETS: dict[str, dict[str, dict[float, float]]] = {
    model: {
        method: dict(zip(_SPARSITIES, epsilons, strict=True))
        for method, epsilons in methods.items()
    }
    for model, methods in {
        "llama-7b": {
            "magnitude": (0.6, 0.4, 0.3, 0.2),
            "wanda": (0.3, 0.3, 0.3, 0.15),
            "sparsegpt": (0.2, 0.2, 0.2, 0.2),
        },
        "llama-13b": {
            "magnitude": (0.6, 0.5, 0.4, 0.1),
            "wanda": (0.3, 0.3, 0.3, 0.25),
            "sparsegpt": (0.3, 0.3, 0.3, 0.25),
        },
    }.items()
}


def epsilon_preset(model: str, method: str, sparsity: float) -> float:
    """The epsilon that the paper took for a model, a pruner and a sparsity.

    It was chosen on the models' own perplexity; another model may want another one.

    Args:
        model: "llama-7b" or "llama-13b", in any case.
        method: "magnitude", "wanda" or "sparsegpt".
        sparsity: 0.7, 0.75, 0.8 or 0.85.

    Raises:
        ValueError: there is none for these; the message names what there is.

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
        if is_number(sparsity) and abs(known - sparsity) < 1e-9:
            return epsilon
    known_ones = ", ".join(f"{known:g}" for known in methods[method])
    raise ValueError(f"sparsity: expected one of {known_ones}, got {sparsity!r}")
