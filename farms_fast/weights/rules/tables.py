"""Names of tensors that are no weights of a layer: biases, scales, masks, constants, tables."""

from __future__ import annotations

import re
from functools import lru_cache

_NOT_WEIGHTS = (
    (re.compile(r"(^|_)bias(_|$)"), "a bias"),
    (re.compile(r"(^|_)mask$|^(causal_)?(tril|triu)$"), "a mask"),
    (
        re.compile(
            r"^(cos|sin|cos_sin)(_sin)?_cached?$|^inv_freq$"
            r"|^freqs(_cis|_cos|_sin)?$|^(rope|rotary|freqs?)_(emb_)?(cos|sin|cis|freqs)$"
        ),
        "a table of rotary positions",
    ),
    (re.compile(r"^(input|output|k|v)_scale$"), "a scale of activations"),
    (
        re.compile(r"(^|weight_|proj_)scales?(_inv|_2)?$|^q?zeros$|^weight_zero_point$|^SCB$"),
        "the scale of a quantised weight",
    ),
    (
        # e3nn (NequIP, MACE, SevenNet), the contractions of MACE, and the tables of eSCN.
        re.compile(
            r"^_?(w3j|wigner|clebsch)([_\d]|$)|^_?cg(_?\d+)+$|^(cg|clebsch_gordan)_\w*(coeff|table)"
            r"|^U_matrix(_|$)|^(to|from)_grid_mat$|^Jd(_\d+)?$",
            re.IGNORECASE,
        ),
        "a constant of rotations (Wigner 3j, Clebsch-Gordan)",
    ),
    (
        re.compile(
            r"^mel_?(basis|fb|filters?|w)$|^(filter_?bank|fbank|fb)$|^dct_mat(rix)?$"
            r"|^(forward|inverse)_basis$|^(wsin|wcos)$",
            re.IGNORECASE,
        ),
        "a fixed basis of a signal transform",
    ),
    (re.compile(r"^(resample_filter|filt|blur_kernel)$"), "a fixed resampling filter"),
    (
        re.compile(r"^(anchors?|anchor_(grid|points)|relative_coords_table)$"),
        "a table of coordinates",
    ),
    (re.compile(r"^pct$"), "a table of Legendre polynomials"),
)
# Tables of positions, fixed or trained: they are looked up by row, as embeddings are.
_POSITIONS = re.compile(
    r"^(pe|pos|penc|wpe)$|^(abs|rel|sinusoid\w*)_pos(_[hwxy]|_table)?$"
    r"|^(pos|position|positional|positions)_?(enc|encod\w*|table|emb\w*)$"
)
_EMBEDDINGS = ("wte", "wpe", "relative_attention_bias", "token_types")
# A map from or to embeddings, or of patches, is a layer though its name speaks of them.
_MAPS = re.compile(r"embed_out|patch|proj|mapping|mlp")


# A large model repeats few names many times.
@lru_cache(maxsize=4096)
def not_a_weight(leaf: str) -> str:
    """Why a tensor of this name is no weight; empty where the name does not say so."""
    what = next((what for pattern, what in _NOT_WEIGHTS if pattern.search(leaf)), "")
    return what and f"{what}, not a weight"


def names_positions(leaf: str) -> bool:
    """Whether a tensor of this name holds a row for each position."""
    return _POSITIONS.search(leaf.lower()) is not None


@lru_cache(maxsize=4096)
def names_embedding(leaf: str) -> bool:
    """Whether a tensor or module of this name holds a row for each token, position or type.

    Example:
        >>> [names_embedding(name) for name in ("token_embd", "wte", "patch_embed", "embed_out")]
        [True, True, False, False]
    """
    leaf = leaf.lower()
    if _MAPS.search(leaf):
        return False
    words = leaf.split("_")
    known = leaf in _EMBEDDINGS or names_positions(leaf)
    return known or "embed" in leaf or any(word in ("emb", "embd", "embs") for word in words)
