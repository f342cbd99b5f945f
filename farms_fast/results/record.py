"""The record of one layer: its spectrum, its fit, its metrics and how far to trust them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from farms_fast.core.json_files import count_value, float_value, shape_value, text_value
from farms_fast.engine.stages import LayerState
from farms_fast.spectra.metrics import spectrum_metrics
from farms_fast.spectra.power_law import PowerLawFit, fit_message
from farms_fast.views.notebook import record_html
from farms_fast.views.plots import plot_esd
from farms_fast.weights.stacks import Skipped

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array = npt.NDArray[np.float64]

_NAN = math.nan


@dataclass(frozen=True, eq=False)
class Uncertainty:
    """How far a layer's alpha depends on which windows were taken: fields as of `LayerRecord`."""

    window_alphas: Array = field(default_factory=lambda: np.empty(0))
    alpha_se: float = _NAN
    alpha_low: float = _NAN
    alpha_high: float = _NAN
    alpha_even: float = _NAN
    alpha_odd: float = _NAN


@dataclass(eq=False)
class LayerRecord:
    """Everything that is known about one layer.

    The metrics are those of `spectrum_metrics`, NaN where they do not exist; `alpha` is NaN unless
    `status` is "ok". What windows differ by is NaN when there is one.

    Attributes:
        name: the layer's name.
        kind: what it is: "linear", "conv2d", ...
        shape: (S, R, C), a stack of S matrices of R x C.
        status: "ok", the status of a fit that failed ("too_few", "degenerate_tail",
            "no_candidate"), "nonfinite" (NaN or infinity in the weights), or "error" (see message).
        message: what went wrong, empty when nothing did.
        windows: number of windows over the whole stack.
        window_rows: rows of one window.
        window_cols: columns of one window.
        dropped: eigenvalues that the fit left out because they were zero, zero but for rounding
            (at or below 8·k·ε of the largest of their window; they are 0 in `window_evals`) or not
            finite.
        window_alpha_mean: mean of the finite `window_alphas`.
        window_alpha_std: their sample standard deviation (n - 1).
        alpha_se: bootstrap standard error of alpha over the windows.
        alpha_low: lower end of its 95 % bootstrap interval.
        alpha_high: upper end of that interval.
        alpha_even: alpha of the even-numbered windows pooled.
        alpha_odd: alpha of the odd-numbered windows pooled.
        split_half: |alpha_even - alpha_odd|.
        window_alphas: float64 (windows,), the alpha of each window alone; NaN where it has none.
        window_evals: float64 (windows, k), ascending, the eigenvalues of each window. Those of a
            record from a results store are read when first asked for, and kept from then on.

    Example:
        >>> import numpy as np
        >>> from farms_fast.spectra.power_law import PowerLawFit
        >>> fit = PowerLawFit(alpha=2.5, D=0.1, xmin=1.0, n_tail=3, n=4, dropped=0,
        ...                   status="ok", xmin_rule="median")
        >>> record = LayerRecord.from_spectra(
        ...     "fc", "linear", (1, 4, 4), np.array([[0.5, 1.0], [2.0, 4.0]]), fit, 2, 2)
        >>> record.windows, record.spectral_norm, record.evals.tolist()
        (2, 4.0, [0.5, 1.0, 2.0, 4.0])
    """

    name: str
    kind: str
    shape: tuple[int, int, int]
    status: str
    message: str = ""
    windows: int = 0
    window_rows: int = 0
    window_cols: int = 0
    alpha: float = _NAN
    D: float = _NAN
    sigma: float = _NAN
    xmin: float = _NAN
    xmax: float = _NAN
    num_pl_spikes: int = 0
    norm: float = _NAN
    log_norm: float = _NAN
    spectral_norm: float = _NAN
    log_spectral_norm: float = _NAN
    alpha_weighted: float = _NAN
    log_alpha_norm: float = _NAN
    stable_rank: float = _NAN
    matrix_rank: int | float = _NAN
    entropy: float = _NAN
    mp_softrank: float = _NAN
    Q: float = _NAN
    M: int = 0
    N: int = 0
    num_evals: int = 0
    dropped: int = 0
    window_alpha_mean: float = _NAN
    window_alpha_std: float = _NAN
    alpha_se: float = _NAN
    alpha_low: float = _NAN
    alpha_high: float = _NAN
    alpha_even: float = _NAN
    alpha_odd: float = _NAN
    split_half: float = _NAN
    window_alphas: Array = field(default_factory=lambda: np.empty(0), repr=False)
    window_evals: Array = field(default_factory=lambda: np.empty((0, 0)), repr=False)

    @classmethod
    def from_spectra(
        cls,
        name: str,
        kind: str,
        shape: tuple[int, int, int],
        window_evals: Array,
        fit: PowerLawFit,
        window_rows: int,
        window_cols: int,
        uncertainty: Uncertainty | None = None,
        *,
        eps: float = float(np.finfo(np.float64).eps),
        message: str = "",
    ) -> LayerRecord:
        """Builds the record of a layer whose eigenvalues are known.

        Args:
            name: the layer's name.
            kind: the layer's kind.
            shape: the stack's shape (S, R, C).
            window_evals: float64 (windows, k), the eigenvalues of each window, each row ascending.
            fit: the power-law fit of all of them pooled; its status becomes the record's.
            window_rows: rows of one window.
            window_cols: columns of one window.
            uncertainty: the spread over the windows; None where it was not asked for. Ignored when
                there is one window, which has no spread.
            eps: unit roundoff of the arithmetic that gave the eigenvalues.
            message: what went wrong; by default the fit's status in words.

        Raises:
            ValueError: if window_evals is not two-dimensional.
        """
        per_window = np.asarray(window_evals, dtype=np.float64)
        if per_window.ndim != 2:
            raise ValueError(f"window_evals: expected shape (windows, k), got {per_window.shape}")
        metrics: dict[str, Any] = dict(
            spectrum_metrics(per_window, fit, window_rows, window_cols, eps=eps)
        )
        spread = uncertainty if uncertainty and len(per_window) > 1 else Uncertainty()
        alphas = np.asarray(spread.window_alphas, dtype=np.float64)
        finite = alphas[np.isfinite(alphas)]
        return cls(
            name=name,
            kind=kind,
            shape=shape,
            status=fit.status,
            message=message or fit_message(fit),
            windows=len(per_window),
            window_rows=window_rows,
            window_cols=window_cols,
            dropped=fit.dropped,
            window_alpha_mean=float(finite.mean()) if finite.size else _NAN,
            window_alpha_std=float(finite.std(ddof=1)) if finite.size > 1 else _NAN,
            split_half=abs(spread.alpha_even - spread.alpha_odd),
            window_evals=per_window,
            **{**vars(spread), "window_alphas": alphas},
            **metrics,
        )

    @classmethod
    def of(cls, state: LayerState, eps: float) -> LayerRecord:
        """The record of a layer that a run has finished, with eps as of `from_spectra`."""
        spec, grid, fits = state.layer.spec, state.layer.grid, state.fits
        layer = spec.name, spec.kind, spec.shape
        if state.failure is not None:
            return cls(*layer, *state.failure)
        assert fits is not None
        assert state.window_evals is not None
        spread = Uncertainty(
            fits.window_alphas, fits.standard_error, *fits.interval(), *fits.halves
        )
        windows = grid.rows, grid.columns, spread
        return cls.from_spectra(*layer, state.window_evals, fits.pooled, *windows, eps=eps)

    @property
    def evals(self) -> Array:
        """The eigenvalues of all windows pooled, float64 (num_evals,), ascending.

        Sorted anew each time, for holding them would double what a record takes.
        """
        return np.sort(self.read_window_evals(), axis=None)

    def defer_window_evals(self, load: Callable[[], Array]) -> None:
        """Drops `window_evals` and has them loaded when they are next asked for.

        A copy or a pickle of the record has the values themselves.

        Args:
            load: returns float64 (windows, k).

        Example:
            >>> record = LayerRecord("fc", "linear", (1, 2, 2), "ok")
            >>> record.defer_window_evals(lambda: np.array([[2.0, 3.0], [1.0, 4.0]]))
            >>> record.evals.tolist()
            [1.0, 2.0, 3.0, 4.0]
        """
        self.__dict__.pop("window_evals", None)
        self.__dict__["_load_window_evals"] = load

    def read_window_evals(self) -> Array:
        """`window_evals`, not kept in the record where they have to be loaded."""
        if "window_evals" in self.__dict__:
            return self.window_evals
        load: Callable[[], Array] = self.__dict__["_load_window_evals"]
        return load()

    @property
    def has_spectrum(self) -> bool:
        """Whether there are eigenvalues, known without loading those that have to be loaded."""
        return "window_evals" not in self.__dict__ or self.window_evals.size > 0

    if not TYPE_CHECKING:  # a type checker would take it for any attribute's

        def __getattr__(self, name: str) -> Any:
            # Python asks here for what the instance does not have.
            if name == "window_evals" and "_load_window_evals" in self.__dict__:
                self.window_evals = self.read_window_evals()
                return self.window_evals
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle takes: values instead of a way to load them."""
        state = {**self.__dict__, "window_evals": self.read_window_evals()}
        state.pop("_load_window_evals", None)
        return state

    def _repr_html_(self) -> str:
        return record_html(self)

    def plot_esd(self, ax: Axes | None = None) -> Axes:
        """Draws the spectrum's density with the fitted tail; see `farms_fast.views.plots`.

        Args:
            ax: where to draw; None is a figure of its own.

        Raises:
            ImportError: if matplotlib is not installed.
            ValueError: if the record has no spectrum.
        """
        return plot_esd(self, ax)

    def scalars(self) -> dict[str, str | int | float]:
        """The record without its arrays; the shape as `stack`, `rows` and `cols`."""
        row: dict[str, str | int | float] = {}
        for name in SCALAR_FIELDS:
            if name == "shape":
                row |= zip(("stack", "rows", "cols"), self.shape, strict=True)
            else:
                row[name] = getattr(self, name)
        return row


# What the files of an analysis are made of, in the order of the fields.
ARRAY_FIELDS = ("window_alphas", "window_evals")
TEXT_FIELDS = frozenset(("name", "kind", "status", "message"))
SCALAR_FIELDS = tuple(f.name for f in dataclasses.fields(LayerRecord) if f.name not in ARRAY_FIELDS)
INT_FIELDS = frozenset(
    ("windows", "window_rows", "window_cols", "num_pl_spikes", "M", "N", "num_evals", "dropped")
)
CSV_COLUMNS = tuple(LayerRecord("", "", (0, 0, 0), "", "").scalars())
INT_COLUMNS = INT_FIELDS | {"stack", "rows", "cols"}


def field_value(name: str, value: object) -> Any:
    """What a field holds, from a file's value for it; ValueError for one that it cannot have."""
    if name == "shape":
        stack, rows, cols = shape_value(name, value)
        return stack, rows, cols
    if name in TEXT_FIELDS:
        return text_value(name, value)
    # The rank is an integer wherever it is known.
    if name in INT_FIELDS or (name == "matrix_rank" and isinstance(value, int)):
        return count_value(name, value)
    return float_value(name, value)


def skipped_from(name: object, shape: object, reason: object) -> Skipped:
    """A tensor that is no layer, from a file's values; ValueError for one that it cannot have."""
    return Skipped(
        text_value("skipped name", name),
        shape_value("skipped shape", shape),
        text_value("skipped reason", reason),
    )
