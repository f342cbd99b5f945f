"""The options of WeightWatcher's `analyze`: their defaults, their ranges, and those not there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from farms_fast.compat.arguments import choice, finite
from farms_fast.core.arguments import check_flag, check_int

LAYER_TYPES = ("conv2d", "conv1d", "dense", "embedding", "norm")

_TRUNCATED = ("TPL", "truncated_power_law", "E_TPL")
_FITS = ("PL", "power_law", *_TRUNCATED)
_FLAGS = ("pool", "conv2d_norm", "randomize", "mp_fit", "detX", "ERG", "ww2x", "glorot_fix")
_DEFAULT_TOLERANCE = 1e-6

_NO_PLOTS = "nothing is drawn; farms_fast.analyze(...)[name].plot_esd() draws"
# Every option of analyze() that is not taken here, with the values that ask for nothing, and why.
_UNSUPPORTED: dict[str, tuple[tuple[object, ...], str]] = {
    "plot": ((False,), _NO_PLOTS),
    "savefig": (("ww-img", False, None), _NO_PLOTS),
    "deltas": ((False,), "it only draws the level spacings"),
    "vectors": ((False,), "eigenvectors are not computed"),
    "fft": ((False,), "only the weights themselves are analysed"),
    "conv2d_fft": ((False,), "only the weights themselves are analysed"),
    "intra": ((False,), "products of neighbouring layers are not analysed"),
    "sparsify": ((True, False), "it belongs to intra"),
    "stacked": ((False,), "layers are analysed one by one"),
    "channels": ((None,), "WeightWatcher 0.7.7 fails on every value but None"),
    "inverse": ((False,), "inverse spectra are not analysed"),
    "min_size": ((None,), "WeightWatcher ignores it: use min_evals"),
    "max_size": ((None,), "WeightWatcher ignores it: use max_evals"),
}


@dataclass(frozen=True)
class Options:
    """Options of `weightwatcher`, checked and brought to one form; see there for most of them.

    `fix_fingers` is "", "xmin_peak" or "clip_xmax", `peft` "", "only" (the adapters) or
    "with_base". `xmax` becomes `clip`, how many of the largest eigenvalues the fit leaves out, and
    `force_xmax`, whether the fitted law ends at the largest.
    """

    layers: tuple[int | str, ...]
    min_evals: int
    max_evals: int
    max_N: int
    start_ids: int
    pool: bool
    conv2d_norm: bool
    randomize: bool
    mp_fit: bool
    detX: bool
    truncated: bool
    pl_package: str
    fix_fingers: str
    xmin_max: float | None
    max_fingers: int | None
    finger_thresh: float
    clip: int
    force_xmax: bool
    tolerance: float
    peft: str
    seed: int


def refuse_unsupported(given: Mapping[str, object], supported: Sequence[str]) -> None:
    """Accepts values that ask for nothing and refuses the others by name."""
    for name, value in given.items():
        if name not in _UNSUPPORTED:
            raise TypeError(f"{name}: no such option; expected one of {', '.join(supported)}")
        harmless, reason = _UNSUPPORTED[name]
        if value not in harmless:
            raise ValueError(
                f"{name}: WeightWatcher's option {name}={value!r} is not supported: {reason}"
            )


def checked_options(given: Mapping[str, Any]) -> Options:
    """The options of `weightwatcher` by their names, each checked."""
    for name in _FLAGS:
        check_flag(name, given[name])
    min_evals, max_evals = (
        check_int(name, 0 if given[name] is None else given[name])
        for name in ("min_evals", "max_evals")
    )
    max_N = check_int("max_N", given["max_N"], least=1)
    if min_evals and max_evals and min_evals >= max_evals:
        raise ValueError(f"min_evals: expected less than max_evals={max_evals}, got {min_evals}")
    if max_N < max(min_evals, max_evals):
        raise ValueError(
            f"max_N: expected at least min_evals={min_evals} and max_evals={max_evals}, got {max_N}"
        )
    choice("svd_method", given["svd_method"], ("fast", "accurate"))
    package = choice("pl_package", given["pl_package"], ("ww", "powerlaw"))
    fit = choice("fit", given["fit"], _FITS)
    fingers = given["fix_fingers"]
    if fingers is None or fingers is False:
        fingers = ""
    else:
        choice("fix_fingers", fingers, (False, "xmin_peak", "clip_xmax"))
    clip, force = _xmax(given["xmax"])
    _check_consistent(fit, package, fingers, clip, force)
    xmin_max, max_fingers = given["xmin_max"], given["max_fingers"]
    return Options(
        layers=_layers(given["layers"]),
        min_evals=min_evals,
        max_evals=max_evals,
        max_N=max_N,
        start_ids=check_int("start_ids", given["start_ids"]),
        pool=given["pool"] and not given["ww2x"],
        conv2d_norm=given["conv2d_norm"],
        randomize=given["randomize"],
        mp_fit=given["mp_fit"],
        detX=given["detX"] or given["ERG"],
        truncated=fit in _TRUNCATED,
        pl_package=package,
        fix_fingers="xmin_peak" if fit == "E_TPL" else fingers,
        xmin_max=None if xmin_max is None else finite("xmin_max", xmin_max),
        max_fingers=None if max_fingers is None else check_int("max_fingers", max_fingers, least=1),
        finger_thresh=finite("finger_thresh", given["finger_thresh"]),
        clip=clip,
        force_xmax=force,
        tolerance=finite("tolerance", given["tolerance"] or _DEFAULT_TOLERANCE),
        peft=_peft(given["peft"]),
        seed=check_int("seed", given["seed"]),
    )


def _xmax(value: object) -> tuple[int, bool]:
    """How many of the largest eigenvalues to clip, and whether the law ends at the largest."""
    if value is None:
        return 0, False
    if value == "force":
        return 0, True
    if isinstance(value, Integral) and not isinstance(value, bool) and value != 0:
        return abs(int(value)), False
    raise ValueError(f"xmax: expected None, 'force' or an integer other than 0, got {value!r}")


def _check_consistent(fit: str, package: str, fingers: str, clip: int, force: bool) -> None:
    truncated, peak = fit in _TRUNCATED, fingers == "xmin_peak"
    asked = (("fit", fit, truncated), ("xmax", "force", force), ("fix_fingers", fingers, peak))
    for name, value, needs_powerlaw in asked:
        if needs_powerlaw and package == "ww":
            raise ValueError(
                f"{name}: {value!r} needs pl_package='powerlaw', as in WeightWatcher; "
                "got pl_package='ww'"
            )
    if fingers and clip:
        raise ValueError(f"xmax: expected None with fix_fingers={fingers!r}, got {clip}")
    if fingers == "clip_xmax" and truncated:
        raise ValueError(f"fix_fingers: 'clip_xmax' fits power laws only, got fit={fit!r}")
    if force and (fingers or truncated):
        raise ValueError("xmax: 'force' is supported with fit='PL' and without fix_fingers only")


def _layers(value: object) -> tuple[int | str, ...]:
    entries = [value] if isinstance(value, (str, Integral)) else () if value is None else value
    try:
        listed = list(entries)  # type: ignore[call-overload]
    except TypeError:
        raise TypeError(
            f"layers: expected a list of ids, names or types, got {type(value).__name__}"
        ) from None
    chosen: list[int | str] = []
    for entry in listed:
        if not isinstance(entry, (str, Integral)) or isinstance(entry, bool):
            raise TypeError(f"layers: expected ids, names or types, got {entry!r}")
        chosen.append(entry if isinstance(entry, str) else int(entry))
    ids = [entry for entry in chosen if isinstance(entry, int)]
    if ids and min(ids) < 0 < max(ids):
        raise ValueError(f"layers: expected ids to keep or negative ids to drop, got both: {ids}")
    return tuple(chosen)


def _peft(value: object) -> str:
    if value is None or isinstance(value, bool):
        return "only" if value else ""
    if value != "with_base":
        raise ValueError(f"peft: expected False, True or 'with_base', got {value!r}")
    return "with_base"
