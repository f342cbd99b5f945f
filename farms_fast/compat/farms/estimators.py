"""`net_esd_estimator` of AlphaPruning and FARMS, and `net_esd_estimator_farms` of FARMS.

What they do was read from the published repositories: FARMS (arXiv 2506.06280), its language-model
part for both functions and its image part for `variant="cv"`; AlphaPruning (arXiv 2410.10912).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Collection, Sequence
from functools import partial
from statistics import fmean
from typing import Any

import numpy as np
from torch import Tensor, nn

from farms_fast.compat.arguments import positive
from farms_fast.compat.farms.published_windows import (
    PublishedWindows,
    block_windows,
    sampled_windows,
    stepped_windows,
)
from farms_fast.compat.farms.spectra import (
    FittedSpectrum,
    TailRule,
    WindowedLayer,
    fitted_spectra,
    kernel_positions,
    warn_of_missing_fit,
    weights_of,
)
from farms_fast.core.arguments import check_int, check_module

Results = dict[str, list[Any]]

# The columns that every function has, in front of its own.
COLUMNS = ("alpha", "spectral_norm", "D", "longname", "eigs", "norm")


def net_esd_estimator(
    net: nn.Module,
    EVALS_THRESH: float = 0.00001,
    bins: int = 100,
    fix_fingers: str | None = None,
    xmin_pos: float = 2,
    conv_norm: float = 0.5,
    filter_zeros: bool = False,
    *,
    memory: int | None = None,
) -> Results:
    """Alpha of every Linear and Conv2d of a model from its whole matrices, as AlphaPruning has it.

    The published arguments in the published order, computed in float64 for all layers together, on
    the device where each weight lives. Nothing is printed, and `net` is not changed.

    Args:
        net: a module; subclasses of Linear and Conv2d count, a shared module counts once, and
            everything else is passed over.
        EVALS_THRESH: with `filter_zeros`, only eigenvalues above it enter the fit.
        bins: of the histogram of log10 λ, for the peak rule.
        fix_fingers: "xmin_mid" (or "median"): the tail starts at index int(N / xmin_pos).
            "xmin_peak" (or "peak", "fix-finger"): where D is least among
            log10(0.95 · x₂) ≤ λ ≤ 1.5 · x₂, x₂ being the left edge of the fullest bin; the
            logarithm is the published code's. None (or "ks", "goodness-of-fit"): where D is least.
        xmin_pos: for the median rule, above 1.
        conv_norm: factor of a convolution's eigenvalues, which are pooled over kernel positions.
        filter_zeros: see `EVALS_THRESH`. A layer without an eigenvalue above it is not filtered.
        memory: bytes of workspace at most, as for `esd`.

    Returns:
        A dict of lists with one entry a layer, in the order of `net.named_modules()`: `alpha`;
        `spectral_norm`, the largest eigenvalue; `D`; `longname`, the module's name; `eigs`, all
        eigenvalues, float32 NumPy arrays, ascending; `norm`, their sum; and
        `alphahat` = alpha · log10(spectral_norm). Numbers are Python floats. FARMS' copy adds
        `esd_time_cost`, seconds, which is left out.

        Where the published code fails or gives NaN:

        - a weight with a NaN or an infinity, a zero matrix, one eigenvalue only, or a tail of equal
          ones: NaN for alpha, D and alphahat, and a `FitWarning`;
        - no eigenvalue near the peak: alpha 0 and D 1 as published, and a `FitWarning`;
        - zeros at and above the median: the median of the positive eigenvalues;
        - zeros under the peak rule: they do not enter;
        - no Linear or Conv2d: empty lists.

    Raises:
        TypeError: `net` is not a module, a weight is not dense and real floating, or an argument
            is of another kind.
        ValueError: an unknown rule (the published code takes any other name for None) or a number
            out of range.

    Example:
        >>> import torch
        >>> from farms_fast.compat import net_esd_estimator
        >>> _ = torch.manual_seed(0)
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(8, 16, 3), torch.nn.Linear(64, 32))
        >>> metrics = net_esd_estimator(net, fix_fingers="xmin_mid")
        >>> metrics["longname"], [len(eigs) for eigs in metrics["eigs"]]
        (['0', '1'], [72, 32])
        >>> [round(alpha, 2) for alpha in metrics["alpha"]]
        [2.82, 2.9]
    """
    rule = TailRule.published(fix_fingers, xmin_pos, bins, EVALS_THRESH, filter_zeros)

    def row(spectra: Sequence[FittedSpectrum]) -> dict[str, Any]:
        (whole,) = spectra
        return {"eigs": whole.evals.astype(np.float32), "alphahat": whole.columns["alpha_hat"]}

    return results_of(whole_layers(net, conv_norm), rule, memory, (*COLUMNS, "alphahat"), row)


def net_esd_estimator_farms(
    net: nn.Module,
    EVALS_THRESH: float = 0.00001,
    bins: int = 100,
    fix_fingers: str | None = "xmin_mid",
    xmin_pos: float = 2,
    conv_norm: float = 0.5,
    eigs_num_thresh: int = 5,
    filter_zeros: bool = False,
    use_sliding_window: bool = True,
    num_row_samples: int = 100,
    Q_ratio: float = 2.0,
    step_size: int = 10,
    sampling_ops_per_dim: int | None = 10,
    waived_layers: Collection[str] = (),
    *,
    variant: str = "llm",
    memory: int | None = None,
) -> Results:
    """Alpha of every Linear and Conv2d of a model from windows of one aspect ratio, as published.

    The published arguments in the published order, with the published windows; computed and
    returned as in `net_esd_estimator`. `analyze` has windows without the oddities listed here.

    With `use_sliding_window`, a linear layer's windows have num_row_samples rows and
    int(num_row_samples · Q_ratio) columns, and their eigenvalues are pooled. A convolution's do not
    go by num_row_samples: the slice of each kernel position is transposed to be tall and cut into
    blocks (see `block_windows`). Block b of all positions, times conv_norm, is one spectrum with a
    fit of its own, and what the layer gets is the mean over the blocks. A kernel larger than its
    channels (out + in < height + width) is taken for the matrix, and the channels for the
    positions. Without `use_sliding_window` both are whole matrices.

    Args:
        net: see `net_esd_estimator`.
        EVALS_THRESH: see there.
        bins: see there.
        fix_fingers: see there.
        xmin_pos: see there.
        conv_norm: see there.
        eigs_num_thresh: layers with fewer eigenvalues have no entry; convolutions cut into blocks
            always have one.
        filter_zeros: see there.
        use_sliding_window: windows instead of whole matrices.
        num_row_samples: rows of a window; with `sampling_ops_per_dim`, no more than the matrix's
            shorter side.
        Q_ratio: columns over rows. A window with more columns than the matrix has, cols, becomes
            the last int(rows · Q_ratio) − cols columns, or all where that is more.
        step_size: between windows where `sampling_ops_per_dim` is None. Windows that are too long
            are cut at the edge.
        sampling_ops_per_dim: windows in each dimension at most, at multiples of
            max(1, (extent − window)//(sampling_ops_per_dim − 1)).
        waived_layers: names of modules that are left out.
        variant: "cv" for the code of the image experiments (`Tempbalance_FARMS`): there
            num_row_samples is not cut to the matrix, but the window is, as its columns are; and the
            result has `eigs_num` too.
        memory: as in `net_esd_estimator`.

    Returns:
        As `net_esd_estimator`, with the columns `alpha`; `spectral_norm`; `D`; `longname`; `eigs`,
        those that entered the fit (ascending within a block where there are several); `norm`, the
        sum of all; `alpha_hat` = alpha · log10(spectral_norm); `stable_rank` = norm/spectral_norm;
        `norm_stable_rank`, the mean eigenvalue; and, with `variant="cv"`, after `eigs`, `eigs_num`.

        Where the published code fails or gives NaN, what `net_esd_estimator` lists, and:

        - a convolution under `variant="llm"`: the result of "cv";
        - a block without a fit: the mean over the others, and a `FitWarning`;
        - a kernel taken for the matrix that is not square: transposed to be tall;
        - `sampling_ops_per_dim=1`: the window at row 0 and column 0;
        - int(num_row_samples · Q_ratio) = 0 with eigs_num_thresh=0: NaN and a `FitWarning`.

    Raises:
        TypeError: as for `net_esd_estimator`.
        ValueError: likewise, or a name in `waived_layers` that no module has.

    Example:
        >>> import torch
        >>> from farms_fast.compat import net_esd_estimator_farms
        >>> _ = torch.manual_seed(0)
        >>> net = torch.nn.Sequential(torch.nn.Linear(256, 128), torch.nn.Linear(128, 10))
        >>> metrics = net_esd_estimator_farms(net, num_row_samples=64, sampling_ops_per_dim=4)
        >>> metrics["longname"], [len(eigs) for eigs in metrics["eigs"]]
        (['0', '1'], [1024, 40])
        >>> [round(alpha, 2) for alpha in metrics["alpha"]]
        [2.75, 2.83]
    """
    rule = TailRule.published(fix_fingers, xmin_pos, bins, EVALS_THRESH, filter_zeros)
    min_evals = check_int("eigs_num_thresh", eigs_num_thresh)
    if variant not in ("llm", "cv"):
        raise ValueError(f"variant: expected 'llm' or 'cv', got {variant!r}")
    rows, q = check_int("num_row_samples", num_row_samples, least=1), positive("Q_ratio", Q_ratio)
    if sampling_ops_per_dim is None:
        step = check_int("step_size", step_size, least=1)
        windows = partial(stepped_windows, window_rows=rows, q=q, step=step)
    else:
        per_dim = check_int("sampling_ops_per_dim", sampling_ops_per_dim, least=1)
        clamped = variant == "llm"
        windows = partial(sampled_windows, window_rows=rows, q=q, per_dim=per_dim, clamped=clamped)
    scale = positive("conv_norm", conv_norm)
    waived = _waived(net, waived_layers)
    layers = []
    for name, weight in weights_of(net):
        if name in waived:
            continue
        if not use_sliding_window:
            layer = _whole_layer(name, weight, scale)
        elif weight.ndim == 2:
            layer = WindowedLayer(name, weight.unsqueeze(0), windows(*weight.shape))
        else:
            layer = _layer_of_blocks(name, weight, q, scale)
        if layer.windows.by_row or layer.count >= min_evals:
            layers.append(layer)

    def row(spectra: Sequence[FittedSpectrum]) -> dict[str, Any]:
        eigs = np.concatenate([one.entered for one in spectra]).astype(np.float32)
        return {"eigs": eigs, "eigs_num": len(eigs)}

    columns = [*COLUMNS, "alpha_hat", "stable_rank", "norm_stable_rank"]
    if variant == "cv":
        columns.insert(5, "eigs_num")
    return results_of(layers, rule, memory, columns, row)


def results_of(
    layers: Sequence[WindowedLayer],
    rule: TailRule,
    memory: int | None,
    columns: Sequence[str],
    row: Callable[[Sequence[FittedSpectrum]], dict[str, Any]],
) -> Results:
    """Solves and fits all layers, and lists the columns, one entry a layer.

    `row` gives the columns that one function has alone. The others are means over a layer's
    spectra, those of alpha and D over the spectra that have a fit.
    """
    budget = 0 if memory is None else check_int("memory", memory, least=1)
    results: Results = {column: [] for column in columns}
    for layer, spectra in zip(layers, fitted_spectra(layers, rule, budget), strict=True):
        # The line that called the published function.
        warn_of_missing_fit(layer.name, spectra, stacklevel=3)
        values = {"longname": layer.name, **row(spectra)}
        for column, entries in results.items():
            entries.append(values[column] if column in values else _mean(column, spectra))
    return results


def _mean(column: str, spectra: Sequence[FittedSpectrum]) -> float:
    values = [one.columns[column] for one in spectra]
    if column in ("alpha", "D", "alpha_hat"):
        values = [value for value in values if not math.isnan(value)] or [math.nan]
    return fmean(values)


def whole_layers(net: nn.Module, conv_norm: float) -> list[WindowedLayer]:
    """Every Linear and Conv2d as its whole matrices."""
    scale = positive("conv_norm", conv_norm)
    return [_whole_layer(name, weight, scale) for name, weight in weights_of(net)]


def _whole_layer(name: str, weight: Tensor, conv_norm: float) -> WindowedLayer:
    stack = kernel_positions(weight)
    scale = conv_norm if weight.ndim == 4 else 1.0
    return WindowedLayer(name, stack, PublishedWindows(*stack.shape[1:]), scale)


def _layer_of_blocks(name: str, weight: Tensor, q: float, conv_norm: float) -> WindowedLayer:
    outputs, inputs, height, width = weight.shape
    # So published: whichever two dimensions are larger are taken for the channels.
    kernel_is_matrix = outputs + inputs < height + width
    stack = weight.flatten(0, 1) if kernel_is_matrix else kernel_positions(weight)
    tall = stack.mT if stack.shape[1] < stack.shape[2] else stack
    _, rows, columns = tall.shape
    return WindowedLayer(name, tall, block_windows(rows, columns, q), conv_norm)


def _waived(net: nn.Module, names: Collection[str]) -> set[str]:
    if isinstance(names, str) or not isinstance(names, Collection):
        raise TypeError(f"waived_layers: expected a list of module names, got {names!r}")
    if not names:
        return set()
    check_module("net", net)
    known = [name for name, _ in net.named_modules()]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=5) or known[1:6]
            choices = ", ".join(repr(choice) for choice in near)
            raise ValueError(
                f"waived_layers: expected names of modules, such as {choices}; got {name!r}"
            )
    return set(names)
