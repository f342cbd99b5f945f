"""The options of WeightWatcher's `analyze`: their defaults, their ranges, and those not there."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral

from farms_fast.core.arguments import check_int, is_real

__all__ = ["LAYER_TYPES", "Options", "checked_options", "refuse_unsupported"]

LAYER_TYPES = ("conv2d", "conv1d", "dense", "embedding", "norm")

_FITS = {
    "PL": "power_law",
    "power_law": "power_law",
    "TPL": "truncated_power_law",
    "truncated_power_law": "truncated_power_law",
    "E_TPL": "truncated_power_law",
}
_PACKAGES = ("ww", "powerlaw")
_FIX_FINGERS = ("xmin_peak", "clip_xmax")
_SVD_METHODS = ("fast", "accurate")
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
    """Options that have been checked and brought to one form.

    Attributes:
        layers: layer ids, names and types to keep, or to drop where they begin with a minus.
        min_evals: fewest eigenvalues of a layer, 0 for any.
        max_evals: most eigenvalues, 0 for any.
        max_N: longest side of a matrix.
        start_ids: id of the first layer.
        pool: the matrices of a convolution give one spectrum.
        conv2d_norm: convolutions are scaled.
        randomize: spectra of shuffled weights too.
        mp_fit: fit the Marchenko-Pastur law.
        detX: where the product of the eigenvalues becomes 1.
        fit: "power_law" or "truncated_power_law".
        pl_package: "ww" or "powerlaw", whose rules the fit follows.
        fix_fingers: "", "xmin_peak" or "clip_xmax".
        xmin_max: upper end of the range of xmin under "xmin_peak".
        max_fingers: eigenvalues to clip at most under "clip_xmax".
        finger_thresh: how much alpha has to drop under "clip_xmax".
        clip: how many of the largest eigenvalues the fit leaves out.
        force_xmax: the fitted law ends at the largest eigenvalue.
        tolerance: eigenvalues below it count as weak rank loss.
        peft: "", "only" (the adapters) or "with_base".
        seed: of the shuffles.
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
    fit: str
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
    """Passes over options that ask for nothing and refuses the others by name.

    Raises:
        ValueError: an option of WeightWatcher that is not taken here.
        TypeError: an option that WeightWatcher does not have.
    """
    for name, value in given.items():
        if name not in _UNSUPPORTED:
            raise TypeError(f"{name}: no such option; expected one of {', '.join(supported)}")
        harmless, reason = _UNSUPPORTED[name]
        if not any(value is choice or value == choice for choice in harmless):
            raise ValueError(
                f"{name}: WeightWatcher's option {name}={value!r} is not supported: {reason}"
            )


def checked_options(**given: object) -> Options:
    """The options, each checked.

    Raises:
        TypeError: an option of another kind.
        ValueError: a value out of range, unknown, or at odds with another.
    """
    values = dict(given)
    flags = ("pool", "conv2d_norm", "randomize", "mp_fit", "detX", "ERG", "ww2x", "glorot_fix")
    flag = {name: _flag(name, values[name]) for name in flags}
    min_evals = check_int("min_evals", 0 if values["min_evals"] is None else values["min_evals"])
    max_evals = check_int("max_evals", 0 if values["max_evals"] is None else values["max_evals"])
    longest = check_int("max_N", values["max_N"], least=1)
    if min_evals and max_evals and min_evals >= max_evals:
        raise ValueError(f"min_evals: expected less than max_evals={max_evals}, got {min_evals}")
    if longest < max(min_evals, max_evals):
        raise ValueError(
            f"max_N: expected at least min_evals={min_evals} and max_evals={max_evals}, "
            f"got {longest}"
        )
    _choice("svd_method", values["svd_method"], _SVD_METHODS)
    package = _choice("pl_package", values["pl_package"], _PACKAGES)
    fit = _choice("fit", values["fit"], tuple(_FITS))
    fingers = values["fix_fingers"]
    if fingers is None or fingers is False:
        fingers = ""
    else:
        fingers = _choice("fix_fingers", fingers, (False, *_FIX_FINGERS))
    clip, force = _xmax(values["xmax"])
    _consistent(fit, package, fingers, clip, force)
    if fit == "E_TPL":
        fingers = "xmin_peak"
    fingers_most = values["max_fingers"]
    tolerance = _real("tolerance", values["tolerance"] or _DEFAULT_TOLERANCE)
    xmin_max = values["xmin_max"]
    return Options(
        layers=_layers(values["layers"]),
        min_evals=min_evals,
        max_evals=max_evals,
        max_N=longest,
        start_ids=check_int("start_ids", values["start_ids"]),
        pool=flag["pool"] and not flag["ww2x"],
        conv2d_norm=flag["conv2d_norm"],
        randomize=flag["randomize"],
        mp_fit=flag["mp_fit"],
        detX=flag["detX"] or flag["ERG"],
        fit=_FITS[fit],
        pl_package=package,
        fix_fingers=fingers,
        xmin_max=None if xmin_max is None else _real("xmin_max", xmin_max),
        max_fingers=(
            None if fingers_most is None else check_int("max_fingers", fingers_most, least=1)
        ),
        finger_thresh=_real("finger_thresh", values["finger_thresh"]),
        clip=clip,
        force_xmax=force,
        tolerance=tolerance,
        peft=_peft(values["peft"]),
        seed=check_int("seed", values["seed"]),
    )


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {value!r}")
    return value


def _choice(name: str, value: object, choices: tuple[object, ...]) -> str:
    if not isinstance(value, str) or value not in choices:
        known = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name}: expected one of {known}; got {value!r}")
    return value


def _real(name: str, value: object) -> float:
    if not is_real(value):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value!r}")
    return float(value)


def _xmax(value: object) -> tuple[int, bool]:
    """How many of the largest eigenvalues to clip, and whether the law ends at the largest."""
    if value is None:
        return 0, False
    if value == "force":
        return 0, True
    if isinstance(value, Integral) and not isinstance(value, bool) and value != 0:
        return abs(int(value)), False
    raise ValueError(f"xmax: expected None, 'force' or an integer other than 0, got {value!r}")


def _consistent(fit: str, package: str, fingers: str, clip: int, force: bool) -> None:
    if package == "ww":
        for name, value, wrong in (
            ("fit", fit, _FITS[fit] != "power_law"),
            ("xmax", "force", force),
            ("fix_fingers", fingers, fingers == "xmin_peak"),
        ):
            if wrong:
                raise ValueError(
                    f"{name}: {value!r} needs pl_package='powerlaw', as in WeightWatcher; "
                    "got pl_package='ww'"
                )
    if fingers and clip:
        raise ValueError(f"xmax: expected None with fix_fingers={fingers!r}, got {clip}")
    if fingers == "clip_xmax" and _FITS[fit] != "power_law":
        raise ValueError(f"fix_fingers: 'clip_xmax' fits power laws only, got fit={fit!r}")
    if force and (fingers or _FITS[fit] != "power_law"):
        raise ValueError("xmax: 'force' is supported with fit='PL' and without fix_fingers only")


def _layers(value: object) -> tuple[int | str, ...]:
    entries = [value] if isinstance(value, (str, Integral)) else value
    if entries is None:
        entries = []
    try:
        listed = list(entries)  # type: ignore[call-overload]
    except TypeError:
        raise TypeError(
            f"layers: expected a list of ids, names or types, got {type(value).__name__}"
        ) from None
    chosen: list[int | str] = []
    for entry in listed:
        if isinstance(entry, str):
            chosen.append(entry)
        elif isinstance(entry, Integral) and not isinstance(entry, bool):
            chosen.append(int(entry))
        else:
            raise TypeError(f"layers: expected ids, names or types, got {entry!r}")
    ids = [entry for entry in chosen if isinstance(entry, int)]
    if ids and min(ids) < 0 < max(ids):
        raise ValueError(f"layers: expected ids to keep or negative ids to drop, got both: {ids}")
    return tuple(chosen)


def _peft(value: object) -> str:
    if value is False or value is None:
        return ""
    if value is True:
        return "only"
    if value == "with_base":
        return "with_base"
    raise ValueError(f"peft: expected False, True or 'with_base', got {value!r}")
