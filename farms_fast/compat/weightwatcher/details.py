"""WeightWatcher's table of details, in WeightWatcher's own numbers, by the solvers of this package.

Every formula and every rule is that of WeightWatcher 0.7.7 on the CPU, quirks included; what
`farms_fast.analyze` does otherwise on purpose is told in `farms_fast.spectra.metrics`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from farms_fast.compat.weightwatcher.columns import columns_of
from farms_fast.compat.weightwatcher.derived import find_layers
from farms_fast.compat.weightwatcher.fits import fit_tails
from farms_fast.compat.weightwatcher.options import checked_options, refuse_unsupported
from farms_fast.compat.weightwatcher.spectra import layer_spectra
from farms_fast.core.arguments import default_device, resolve_device
from farms_fast.core.optional import optional_import

if TYPE_CHECKING:
    import pandas as pd

Model = nn.Module | Mapping[str, Any] | str | os.PathLike[str]


def weightwatcher(
    model: Model,
    layers: int | str | Sequence[int | str] = (),
    min_evals: int | None = 8,
    max_evals: int | None = 15000,
    max_N: int = 50000,
    *,
    glorot_fix: bool = False,
    randomize: bool = False,
    mp_fit: bool = False,
    conv2d_norm: bool = True,
    ww2x: bool = False,
    pool: bool = True,
    fix_fingers: str | bool | None = False,
    xmin_max: float | None = None,
    max_fingers: int | None = 10,
    finger_thresh: float = 1.0,
    fit: str = "PL",
    detX: bool = False,
    ERG: bool = False,
    svd_method: str = "fast",
    tolerance: float = 1e-6,
    start_ids: int = 0,
    pl_package: str = "ww",
    xmax: int | str | None = None,
    base_model: Model | None = None,
    peft: bool | str = False,
    seed: int = 0,
    device: str | torch.device | None = None,
    **unsupported: object,
) -> pd.DataFrame:
    """`WeightWatcher(model).analyze(...)`: the same options, the same table, faster.

    Args:
        model: a module; a mapping of names to tensors; or the path of a checkpoint (see
            `open_source`). Weights are taken as float32, as WeightWatcher takes
            them on the CPU, and everything is computed in float64.
        layers: ids, names or types ("dense", "conv2d", "conv1d", "embedding") of the layers to
            analyse; negative ids, or names after a minus, of those to leave out; empty for all.
        min_evals: fewest eigenvalues of a layer, 0 for any.
        max_evals: most eigenvalues of a layer, 0 for any.
        max_N: longest side of a matrix.
        glorot_fix: has no effect, as in WeightWatcher 0.7.7.
        randomize: shuffle the elements of every matrix and solve it again: columns rand_...,
            num_traps, ww_softrank, ww_maxdist.
        mp_fit: fit the Marchenko-Pastur law: columns sigma_mp, bulk_max, num_spikes and so on.
        conv2d_norm: scale convolutions by the root of half their matrices, of which there is one
            where they are pooled.
        ww2x: pool=False by its old name.
        pool: one spectrum for all kernel positions of a convolution, or a row for each (slice_id).
        fix_fingers: False, "clip_xmax", or "xmin_peak" (with pl_package="powerlaw").
        xmin_max: upper end of xmin under "xmin_peak"; None is 1.5 times the peak.
        max_fingers: eigenvalues to clip at most under "clip_xmax"; below half of the eigenvalues
            it is 10, as in WeightWatcher.
        finger_thresh: how much alpha has to drop under "clip_xmax".
        fit: "PL"; "TPL" or "E_TPL" for a truncated power law (with pl_package="powerlaw").
        detX: where the product of the eigenvalues becomes 1: columns detX_..., num_ERG_spikes,
            ERG_gap.
        ERG: detX by its other name.
        svd_method: "fast" or "accurate", which are one here.
        tolerance: eigenvalues below it are counted as weak_rank_loss.
        start_ids: id of the first module; a mapping begins at 1.
        pl_package: "ww" or "powerlaw", whose rules the fit follows (powerlaw need not be there).
        xmax: None; an integer, of whose size the largest eigenvalues are left out of the fit; or
            "force" (with pl_package="powerlaw"), for a law that ends at the largest.
        base_model: what is subtracted from the model's weights first.
        peft: True for the products of LoRA adapters alone, "with_base" for all.
        seed: of the shuffles. WeightWatcher draws them from NumPy's global generator.
        device: where to compute, "cpu", "cuda" or "cuda:N"; None is CUDA where there is a device
            and this build has the CUDA ops.
        unsupported: WeightWatcher's other options, accepted while they ask for nothing: plot,
            savefig, deltas, vectors, fft, conv2d_fft, intra, sparsify, stacked, channels, inverse,
            min_size, max_size.

    Returns:
        One row a layer: layer_id, name, then the other columns by their names. A fit that fails has
        the status "failed" and -1; so has a layer with weights that are not finite, whose other
        columns are NaN. `.attrs["skipped"]` tells of every other weight why it is not there.

    Raises:
        ImportError: pandas is not installed.
        FileNotFoundError: a path does not exist.
        TypeError: an argument of another kind, or an option that WeightWatcher does not have.
        ValueError: an unknown value, a filter that matches nothing, options that contradict each
            other, an option that is not supported, or no weights to read.

    Example:
        >>> import torch
        >>> from farms_fast.compat import weightwatcher
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.Linear(64, 40))
        >>> details = weightwatcher(model)
        >>> details[["layer_id", "name", "layer_type", "N", "M", "num_evals"]]
           layer_id name layer_type   N   M  num_evals
        0         1    0     conv2d  16   3         27
        1         2    1      dense  64  40         40
        >>> weightwatcher(model, vectors=True)
        Traceback (most recent call last):
            ...
        ValueError: vectors: WeightWatcher's option vectors=True is not supported: eigenvectors \
are not computed
    """
    # Every option of the signature, by its name.
    given = {**locals()}
    given.pop("unsupported")
    refuse_unsupported(unsupported, [name for name in given if name != "model"])
    with optional_import("pandas", extra="pandas", needed_for="weightwatcher"):
        import pandas as pd
    options = checked_options(given)
    if options.peft and base_model is not None:
        raise ValueError(
            "peft: expected False with a base_model, which WeightWatcher ignores it for"
        )
    where = resolve_device(device, default_device())
    weights, skipped = find_layers(model, base_model, options)
    spectra = layer_spectra(weights, where, shuffle=options.randomize, seed=options.seed)
    by_layer = zip(weights, spectra, fit_tails(spectra, options), strict=True)
    rows = [columns_of(layer, spectrum, fit, options) for layer, spectrum, fit in by_layer]
    first = ["layer_id", "name"]
    rest = sorted(set(rows[0]) - set(first)) if rows else []
    details = pd.DataFrame(rows, columns=[*first, *rest])
    details.attrs["skipped"] = skipped
    return details
