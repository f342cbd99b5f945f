"""Statistics of a layer's inputs for a pruner: mean squares, or all second moments."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from farms_fast.core.arguments import check_dtype, check_int, check_type, resolve_device


class InputStatistics:
    """Running means over the input tokens of a layer.

    With tokens x_t, t = 1..T, the mean squares are Σ x_t² / T per column, and the Hessian is
    Σ x_t x_tᵀ / T: that of ½‖(W − Ŵ)X‖²/T, SparseGPT's loss, in a row of Ŵ. Published code divides
    by sequences instead of tokens and may have a factor 2; neither masks nor pruned weights depend
    on the Hessian's scale.

    The sums are float32 at full precision (`full_float32`) for any activations. They take
    4·columns bytes, with the Hessian 4·columns² bytes.

    Args:
        columns: number of inputs of the layer.
        hessian: whether to keep the second moments of all pairs of columns.
        device: device of the sums; None is that of the first activations.
        dtype: of the sums, torch.float32 or torch.float64.
        layer: the layer's name for messages.

    Attributes:
        tokens: number of tokens so far.

    Raises:
        TypeError: columns is no integer.
        ValueError: less than one column, another dtype, or an unknown device.

    Example:
        >>> statistics = InputStatistics(2, hessian=True)
        >>> statistics.add(torch.tensor([[1.0, 0.0], [1.0, 2.0]]))
        >>> statistics.tokens, statistics.mean_squares.tolist()
        (2, [1.0, 2.0])
        >>> statistics.hessian.tolist()
        [[1.0, 1.0], [1.0, 2.0]]
    """

    def __init__(
        self,
        columns: int,
        *,
        hessian: bool = False,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        layer: str = "",
    ) -> None:
        check_dtype(dtype)
        self.columns = check_int("columns", columns, least=1)
        self.has_hessian = hessian
        self.device = None if device is None else resolve_device(device, torch.device("cpu"))
        self.dtype = dtype
        self.layer = layer
        self.tokens = 0
        self._moments: Tensor | None = None

    @torch.no_grad()
    def add(self, activations: Tensor) -> None:
        """Adds the inputs of one call of the layer, without waiting for the device.

        Args:
            activations: floating (..., columns), a token at each leading index.

        Raises:
            TypeError: activations are no tensor.
            ValueError: the last dimension is not the layer's number of inputs.
        """
        argument = f"activations of layer {self.layer!r}"
        check_type(argument, activations, Tensor, "a torch.Tensor")
        if activations.ndim < 1 or activations.shape[-1] != self.columns:
            raise ValueError(
                f"{argument}: expected shape (..., {self.columns}), got {tuple(activations.shape)}"
            )
        if self.device is None:
            self.device = activations.device
        rows = activations.reshape(-1, self.columns).to(self.device, self.dtype)
        if not len(rows):
            return
        tokens = self.tokens + len(rows)
        kept = self.tokens / tokens
        if self._moments is None:
            shape = (self.columns, self.columns) if self.has_hessian else (self.columns,)
            self._moments = torch.zeros(shape, dtype=self.dtype, device=self.device)
        if self.has_hessian:
            with full_float32():
                self._moments.addmm_(rows.T, rows, beta=kept, alpha=1 / tokens)
        else:
            sums = torch.linalg.vector_norm(rows, dim=0).square_()
            self._moments.mul_(kept).add_(sums, alpha=1 / tokens)
        # Last: if the lines above run out of memory, the tokens do not count.
        self.tokens = tokens

    @property
    def mean_squares(self) -> Tensor:
        """Mean of x² over the tokens, (columns,).

        Raises:
            ValueError: there were no tokens, or some were not finite (NaN, infinity, or squares
                beyond the range of the sums).
        """
        moments = self._checked()
        return moments.diagonal() if self.has_hessian else moments

    @property
    def norms(self) -> Tensor:
        """Root of the mean squares, (columns,).

        Raises:
            ValueError: as `mean_squares`.
        """
        return self.mean_squares.sqrt()

    @property
    def hessian(self) -> Tensor:
        """Mean of x xᵀ over the tokens, (columns, columns), not a copy.

        Raises:
            ValueError: as `mean_squares`, or the statistics were made without `hessian=True`.
        """
        if not self.has_hessian:
            raise ValueError(
                f"statistics of layer {self.layer!r}: expected those made with hessian=True"
            )
        return self._checked()

    def _checked(self) -> Tensor:
        if self._moments is None:
            raise ValueError(
                f"statistics of layer {self.layer!r}: no calibration activations reached it"
            )
        # A NaN, an infinity or an overflow in any token persists in its column's mean.
        squares = self._moments.diagonal() if self.has_hessian else self._moments
        wrong = int(torch.isfinite(squares).logical_not().sum())
        if wrong:
            raise ValueError(
                f"activations of layer {self.layer!r}: expected finite values, got NaN, infinity "
                f"or overflow in {wrong} of {self.columns} columns"
            )
        return self._moments


def check_statistics(statistics: object, weight: Tensor, layer: str = "") -> InputStatistics:
    """Raises unless the statistics fit a weight (out, in); returns them."""
    if not isinstance(statistics, InputStatistics):
        got = None if statistics is None else type(statistics).__name__
        raise TypeError(
            f"statistics of layer {layer!r}: expected InputStatistics of its inputs, got {got}"
        )
    if weight.shape[1] != statistics.columns:
        raise ValueError(
            f"statistics of layer {layer or statistics.layer!r}: expected those of "
            f"{weight.shape[1]} inputs as the weight's columns, got {statistics.columns}"
        )
    return statistics


@contextmanager
def full_float32() -> Iterator[None]:
    """Computes float32 products at full precision inside, regardless of the caller's setting.

    TF32 and bfloat16 products have errors of 1e-3, as large as a Hessian's small eigenvalues after
    a damping of 0.01.
    """
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
