"""A zoo of random layers, each by `farms_fast.compat` and by the published way.

    python -m tests.support.parity

prints the table of `docs/migrating/farms.md`.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from farms_fast.compat import net_esd_estimator_farms
from tests.support import published_farms as published

RULES = ("xmin_mid", "xmin_peak", None)
_LINEAR = ((96, 96), (160, 64), (64, 160), (200, 30), (30, 200), (10, 120), (150, 40))
_CONVOLUTIONS = ((24, 24, 3, 3), (40, 16, 3, 3), (16, 50, 1, 1), (12, 3, 5, 5), (20, 1, 3, 3))
_SETTINGS: tuple[dict[str, Any], ...] = (
    {"num_row_samples": 32, "Q_ratio": 2.0, "sampling_ops_per_dim": 4},
    {"num_row_samples": 32, "Q_ratio": 1.0, "sampling_ops_per_dim": 5},
    # Windows longer than the matrix, in columns and (for "cv") in rows.
    {"num_row_samples": 100, "Q_ratio": 1.5, "sampling_ops_per_dim": 3},
    {"num_row_samples": 100, "Q_ratio": 1.3, "sampling_ops_per_dim": 3, "variant": "cv"},
    {"num_row_samples": 48, "Q_ratio": 0.5, "sampling_ops_per_dim": 4, "xmin_pos": 3},
    {"num_row_samples": 40, "Q_ratio": 0.75, "sampling_ops_per_dim": None, "step_size": 24},
    {"use_sliding_window": False, "filter_zeros": True, "EVALS_THRESH": 1e-2},
)


@dataclass(frozen=True)
class Group:
    """Layers that are analysed in one call.

    Attributes:
        net: a module of them.
        settings: the keyword arguments.
    """

    net: nn.Module
    settings: dict[str, Any]


@dataclass
class Parity:
    """How one layer compares.

    Attributes:
        name: of the layer.
        rule: `fix_fingers`.
        kind: "linear" or "conv2d".
        evals: worst |λ − λ_published| over 1e-5 λ_max + 1e-3 λ_published.
        alpha: |alpha − published|.
        D: |D − published|.
        stable: whether the published alpha stays within 1e-3 when the published singular values
            move by their own rounding.
        others: worst relative difference of the remaining columns.
    """

    name: str
    rule: str | None
    kind: str
    evals: float
    alpha: float
    D: float
    stable: bool
    others: dict[str, float] = field(default_factory=dict)


def zoo() -> list[Group]:
    """Every setting under every rule, each over layers of its own."""
    generator = torch.Generator().manual_seed(7)
    groups = []
    for number, (settings, rule) in enumerate(itertools.product(_SETTINGS, RULES)):
        layers: dict[str, nn.Module] = {}
        for shape in (*_LINEAR, *_CONVOLUTIONS):
            if len(shape) == 2:
                layer: nn.Module = nn.Linear(shape[1], shape[0], bias=False)
            else:
                layer = nn.Conv2d(shape[1], shape[0], shape[2:], bias=False)
            layers["x".join(map(str, shape))] = layer
        net = nn.ModuleDict(layers)
        with torch.no_grad():
            for weight in net.parameters():
                normal = torch.randn(weight.shape, generator=generator)
                heavy = torch.randn((4, *weight.shape), generator=generator).square().mean(0).sqrt()
                spread = heavy if number % 2 else 1.0
                weight.copy_(normal / spread / math.sqrt(weight[0].numel()))
        if number % 3 == 0:
            net = net.half()
        groups.append(Group(net, {**settings, "fix_fingers": rule}))
    return groups


def spectra_of(weight: Tensor, settings: dict[str, Any]) -> list[list[Tensor]]:
    """The matrices of each of a layer's spectra, the published way."""
    weight = weight.detach().float()
    q = settings.get("Q_ratio", 2.0)
    if not settings.get("use_sliding_window", True):
        if weight.ndim == 2:
            return [[weight]]
        high, wide = weight.shape[2:]
        root = math.sqrt(0.5)
        return [[weight[:, :, i, j] * root for i in range(high) for j in range(wide)]]
    if weight.ndim == 4:
        root = math.sqrt(0.5)
        return [[part * root for part in block] for block in published.conv_blocks(weight, q)]
    windows = published.linear_windows(
        weight,
        settings["num_row_samples"],
        q,
        settings["sampling_ops_per_dim"],
        settings.get("step_size", 10),
        settings.get("variant", "llm") == "llm",
    )
    return [list(windows)]


def compare(group: Group) -> list[Parity]:
    """Every layer of a group by both."""
    found = net_esd_estimator_farms(group.net, **group.settings)
    rule = group.settings["fix_fingers"]
    position = group.settings.get("xmin_pos", 2)
    threshold = group.settings["EVALS_THRESH"] if group.settings.get("filter_zeros") else None
    rows = []
    expected_names = []
    for name, layer in group.net.named_children():
        parts = spectra_of(layer.weight, group.settings)
        fits = [published.fitted(p, rule, position, threshold=threshold) for p in parts]
        if layer.weight.ndim == 2 and len(fits[0].evals) < 5:
            continue
        at = len(expected_names)
        expected_names.append(name)
        assert found["longname"][at] == name
        evals = np.concatenate([f.entered.double().numpy() for f in fits])
        mine = found["eigs"][at].astype(np.float64)
        assert mine.shape == evals.shape, f"{name}: {mine.shape} eigenvalues, not {evals.shape}"
        bound = 1e-5 * evals.max() + 1e-3 * evals
        alpha = float(np.mean([f.alpha for f in fits]))
        rows.append(
            Parity(
                name,
                rule,
                "linear" if layer.weight.ndim == 2 else "conv2d",
                float((np.abs(mine - evals) / bound).max()),
                abs(found["alpha"][at] - alpha),
                abs(found["D"][at] - float(np.mean([f.D for f in fits]))),
                all(is_stable(f, rule, position) for f in fits),
                others(found, at, fits),
            )
        )
    assert found["longname"] == expected_names
    return rows


def others(found: dict[str, list[Any]], at: int, fits: list[published.Fitted]) -> dict[str, float]:
    """Relative differences of what does not depend on the fit, and of alpha_hat from its parts."""
    sums = [float(f.evals.sum()) for f in fits]
    largest = [float(f.evals[-1]) for f in fits]
    expected = {
        "spectral_norm": np.mean(largest),
        "norm": np.mean(sums),
        "stable_rank": np.mean([s / top for s, top in zip(sums, largest, strict=True)]),
        "norm_stable_rank": np.mean([s / len(f.evals) for s, f in zip(sums, fits, strict=True)]),
    }
    if len(fits) == 1:
        expected["alpha_hat"] = found["alpha"][at] * math.log10(largest[0])
    return {
        key: abs(found[key][at] - value) / max(abs(value), 1e-3) for key, value in expected.items()
    }


def is_stable(one: published.Fitted, rule: str | None, position: float) -> bool:
    """Whether float32 rounding of the singular values leaves the published alpha where it is."""
    if rule == "xmin_mid":
        return True
    generator = torch.Generator().manual_seed(1)
    values = one.entered.sqrt()
    for _ in range(4):
        noise = 2 * torch.rand(values.shape, generator=generator) - 1
        moved = (values + 2**-22 * values[-1] * noise).square().sort().values
        if abs(published.fit(moved, rule, position, 100)[0] - one.alpha) > 1e-3:
            return False
    return True


def table(rows: list[Parity]) -> str:
    """The parity table, in Markdown."""
    lines = [
        "| layers | rule | number | worst eigenvalue, of the bound | published alpha stable | "
        "worst alpha, stable layers | worst D, stable layers | worst D, all layers |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for kind, rule in itertools.product(("linear", "conv2d"), RULES):
        chosen = [row for row in rows if (row.kind, row.rule) == (kind, rule)]
        stable = [row for row in chosen if row.stable]
        lines.append(
            f"| {kind} | `{rule}` | {len(chosen)} | {max(r.evals for r in chosen):.3f} | "
            f"{len(stable)} | {max(r.alpha for r in stable):.1e} | "
            f"{max(r.D for r in stable):.1e} | {max(r.D for r in chosen):.1e} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table([row for group in zoo() for row in compare(group)]))
