"""cuSOLVER's XsyevBatched with nothing around it, the yardstick of every CUDA solver here."""

from __future__ import annotations

import ctypes
from ctypes import byref, c_int, c_int64, c_size_t, c_void_p

import torch

# Values of the enumerations in cusolverDn.h, cublas_v2.h and library_types.h.
_NOVECTOR, _LOWER = 0, 0
_TYPES = {torch.float32: 0, torch.float64: 1}


class BareXsyevBatched:
    """Handle, parameters and workspace made once; `__call__` is the library's call alone.

    Args:
        batch: matrices a call.
        order: k.
        dtype: float32 or float64.
    """

    def __init__(self, batch: int, order: int, dtype: torch.dtype = torch.float64) -> None:
        torch.linalg.eigvalsh(torch.eye(2, device="cuda"))  # torch loads the library
        self._lib = ctypes.CDLL("libcusolver.so.12")
        self._handle, self._params = c_void_p(), c_void_p()
        self._check(self._lib.cusolverDnCreate(byref(self._handle)))
        self._check(self._lib.cusolverDnCreateParams(byref(self._params)))
        self._batch, self._order, self._type = c_int64(batch), c_int64(order), _TYPES[dtype]
        self.evals = torch.empty(batch, order, dtype=dtype, device="cuda")
        self._info = torch.empty(batch, dtype=torch.int32, device="cuda")
        device_bytes, host_bytes = c_size_t(), c_size_t()
        self._check(
            self._lib.cusolverDnXsyevBatched_bufferSize(
                *self._arguments(c_void_p()), byref(device_bytes), byref(host_bytes), self._batch
            )
        )
        self.workspace = torch.empty(device_bytes.value, dtype=torch.uint8, device="cuda")
        self._host = ctypes.create_string_buffer(max(1, host_bytes.value))
        self._host_bytes = host_bytes.value

    def _arguments(self, matrices: c_void_p) -> tuple[object, ...]:
        return (
            self._handle,
            self._params,
            c_int(_NOVECTOR),
            c_int(_LOWER),
            self._order,
            c_int(self._type),
            matrices,
            self._order,
            c_int(self._type),
            c_void_p(self.evals.data_ptr()),
            c_int(self._type),
        )

    def __call__(self, gram: torch.Tensor) -> torch.Tensor:
        """Eigenvalues of (batch, k, k), which are destroyed."""
        stream = torch.cuda.current_stream().cuda_stream
        self._check(self._lib.cusolverDnSetStream(self._handle, c_void_p(stream)))
        self._check(
            self._lib.cusolverDnXsyevBatched(
                *self._arguments(c_void_p(gram.data_ptr())),
                c_void_p(self.workspace.data_ptr()),
                c_size_t(self.workspace.numel()),
                self._host,
                c_size_t(self._host_bytes),
                c_void_p(self._info.data_ptr()),
                self._batch,
            )
        )
        return self.evals

    @staticmethod
    def _check(status: int) -> None:
        if status != 0:
            raise RuntimeError(f"cuSOLVER returned status {status}")
