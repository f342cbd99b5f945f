"""What a batch takes of its device's memory, and how a budget is shared out.

A batch has two phases. While it is solved the device holds the weights, the solver's Gram matrices
and workspace, and the eigenvalues that come out; the weights are gone when its spectra are fitted,
and the device holds the eigenvalues with their sorted copies, and what one call of the fit works
on. Each phase by itself stays within the budget. Bytes are those that tensors take; what torch's
allocator keeps in reserve, the CUDA context and libraries' own memory come on top, and so does the
host's memory that results take.
"""

from __future__ import annotations

from dataclasses import dataclass

# Beyond these a larger batch, or a larger call of the fit, gains nothing: a layer of 225 windows of
# 2000 fills a device, the device idles while the first batch is read and the last one fitted, and
# what is under way when a run is killed is lost.
MAX_EIGENVALUES = 2**19
MAX_FIT_VALUES = 2**24
MAX_WORKSPACE = 2**35

# An eigenvalue between solver and record: itself in the batch's precision and in float64 (4 + 8, or
# 8), sorted with its index (16), sorted in one of the halves (8), checked for NaN (1).
_SPECTRUM_BYTES = 40
# A window as a spectrum of its own: the fit's state (64), results, offset and spread (8 x 8),
# rounded up.
_FIT_STATE_BYTES = 256
# A value that one call of the fit works on: packed (8) beside the op's workspace (28); before that,
# for a resample, its window's number, how often it is drawn, what that adds up to, and its index,
# of which not all are there at a time. A sort's buffers are less.
FIT_VALUE_BYTES = 48
# A window in the solver's table (32), and a matrix's largest element, exponent and flag (16).
_TABLE_BYTES = 48


@dataclass(frozen=True)
class MemoryBudget:
    """Bytes of a device, and what each use may take of them.

    Attributes:
        total: what a run may take.
        weights: a batch's weights, a quarter of it.
        workspace: Gram matrices under way and the solver's workspace, half of it and at most 32
            GiB; less where a layer larger than its shares leaves less.
        spectra: a batch's eigenvalues until they are records, an eighth of it.
        fits: what one call of the fit works on, an eighth of it.
    """

    total: int
    weights: int
    workspace: int
    spectra: int
    fits: int

    @classmethod
    def of(cls, total: int) -> MemoryBudget:
        """Shares out a number of bytes.

        Example:
            >>> MemoryBudget.of(2**30).weights == 2**28
            True
        """
        workspace = min(total // 2, MAX_WORKSPACE)
        return cls(total, total // 4, workspace, total // 8, total // 8)


@dataclass(frozen=True)
class MemoryRequirement:
    """What layers take that are solved in one call.

    Attributes:
        weights: bytes of their weights on the device.
        windows: of all layers.
        order: of every window.
        longest: eigenvalues of the largest layer.
        matrix: bytes of one Gram matrix and its share of workspace.
        item: bytes of an eigenvalue in the batch's precision.
    """

    weights: int
    windows: int
    order: int
    longest: int
    matrix: int
    item: int

    @property
    def eigenvalues(self) -> int:
        """Of all windows."""
        return self.windows * self.order

    @property
    def spectra(self) -> int:
        """Bytes of the eigenvalues, from the solver to the records."""
        return self.eigenvalues * _SPECTRUM_BYTES + self.windows * _FIT_STATE_BYTES

    @property
    def beside_solver(self) -> int:
        """Bytes on the device while the solver works, without its own."""
        return self.weights + self.eigenvalues * self.item + self.windows * _TABLE_BYTES

    @property
    def min_bytes(self) -> int:
        """The smallest budget: one matrix at a time, and one resample."""
        # The ops take a budget of no bytes for the default.
        solving = self.beside_solver + max(self.matrix, 1)
        return max(solving, self.spectra + self.longest * FIT_VALUE_BYTES)


@dataclass(frozen=True)
class Limits:
    """What a batch's calls are bounded by.

    Attributes:
        workspace: bytes for Gram matrices and the solver's workspace.
        fit_values: values that one call of the fit takes at most, never less than a layer has.
        chunk: matrices that the solver has under way, as far as known.
        peak: predicted bytes, at most the budget.
    """

    workspace: int
    fit_values: int
    chunk: int
    peak: int


def limits(
    need: MemoryRequirement, budget: MemoryBudget, resamples: int = 0, parallel: int | None = None
) -> Limits:
    """Bounds of a batch's calls.

    Args:
        need: what its layers take; `need.min_bytes` is at most the budget.
        budget: of the run.
        resamples: of the bootstrap.
        parallel: matrices that a solver takes at a time; None for as many as the memory holds.

    Example:
        >>> need = MemoryRequirement(
        ...     weights=400, windows=9, order=10, longest=90, matrix=800, item=8)
        >>> found = limits(need, MemoryBudget.of(20_000), resamples=100)
        >>> found.chunk, found.fit_values, found.peak <= 20_000
        (9, 90, True)
    """
    left = budget.total - need.beside_solver
    workspace = min(left, max(budget.workspace, need.matrix, 1))
    chunk = min(need.windows, parallel or need.windows)
    if need.matrix:
        chunk = min(chunk, workspace // need.matrix)
    left = max(budget.total - need.spectra, 0) // FIT_VALUE_BYTES
    fit_values = min(left, budget.fits // FIT_VALUE_BYTES, MAX_FIT_VALUES)
    fit_values = max(need.longest, fit_values)
    solving = need.beside_solver + chunk * need.matrix
    # Pooled, by halves and by windows; then resamples, of layers that are sampled alike together.
    at_once = min(fit_values, max(3, resamples) * need.eigenvalues)
    fitting = need.spectra + at_once * FIT_VALUE_BYTES
    return Limits(workspace, fit_values, chunk, max(solving, fitting))
