"""The Marchenko-Pastur law: the spectrum that a matrix of independent entries would have.

For a window of M x N independent entries of one variance, M <= N and `Q = N / M`, the eigenvalues
of the M x M Gram matrix have the mean `m = variance N` and, as M and N grow, the density

`f(x) = Q sqrt((x_plus - x) (x - x_minus)) / (2 pi m x)`, `x_plus_minus = m (1 +- Q^(-1/2))^2`

(Marchenko and Pastur, 1967). What a spectrum has beyond `x_plus` has been learnt. In the functions
below, `mean` is m, above 0, and `aspect` is Q.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

_QUADRATURE = 2048


def marchenko_pastur_support(mean: float, aspect: float) -> tuple[float, float]:
    """Ends of the law's support.

    Example:
        >>> marchenko_pastur_support(1.0, 4.0)
        (0.25, 2.25)
    """
    root = math.sqrt(1 / aspect)
    return mean * (1 - root) ** 2, mean * (1 + root) ** 2


def marchenko_pastur_density(at: FloatArray, mean: FloatArray, aspect: float) -> FloatArray:
    """Density of the law, 0 outside of its support, where `at` and `mean` are broadcast together.

    Example:
        >>> marchenko_pastur_density(np.array([0.2, 1.0, 2.3]), np.array(1.0), 4.0).round(4)
        array([0.    , 0.6164, 0.    ])
    """
    root = math.sqrt(1 / aspect)
    upper, lower = mean * (1 + root) ** 2, mean * (1 - root) ** 2
    inner = np.sqrt(np.maximum((upper - at) * (at - lower), 0.0))
    law = np.divide(inner * aspect, 2 * np.pi * mean * at, where=inner > 0, out=inner * 0)
    return np.asarray(law, dtype=np.float64)


def marchenko_pastur_survival(at: FloatArray, mean: float, aspect: float) -> FloatArray:
    """Share of the law that lies above each value: 1 minus its cumulative distribution.

    With `x = x_minus + (x_plus - x_minus) sin(t / 2)^2` the integrand over t has no singularity,
    at the edges neither, and the midpoint rule converges fast.

    Example:
        >>> marchenko_pastur_survival(np.array([0.1, 0.25, 1.0, 2.25]), 1.0, 4.0).round(4)
        array([1.    , 1.    , 0.4466, 0.    ])
    """
    lower, upper = marchenko_pastur_support(mean, aspect)
    width = upper - lower
    angles = (np.arange(_QUADRATURE) + 0.5) * (math.pi / _QUADRATURE)
    sine2 = np.sin(angles / 2) ** 2
    share = sine2 * (1 - sine2) / (lower + width * sine2)
    cumulative = np.concatenate([[0.0], np.cumsum(share)])
    edges = np.arange(_QUADRATURE + 1) * (math.pi / _QUADRATURE)
    where = 2 * np.arcsin(np.sqrt(np.clip((at - lower) / width, 0.0, 1.0)))
    below = np.interp(where, edges, cumulative / cumulative[-1])
    return np.asarray(1 - below, dtype=np.float64)
