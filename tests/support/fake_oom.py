"""Places where memory ends, and how alike two models are."""

from __future__ import annotations

import torch
from torch import Tensor, nn

MOST = 2


class Full:
    """A place with no room for more than some samples, from some call with more of them on.

    Attributes:
        sizes: Samples of every call that there was room for.
        too_large: Calls with too many.
    """

    def __init__(self, place: nn.Module, since: int = 1, most: int = MOST) -> None:
        self.sizes: list[int] = []
        self.too_large = 0
        self.since, self.most = since, most
        place.register_forward_pre_hook(self._check)

    def _check(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        size = len(args[0])
        if size > self.most:
            self.too_large += 1
            if self.too_large >= self.since:
                raise torch.OutOfMemoryError(f"no room for {size}\nand more about it")
        self.sizes.append(size)


def weights(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(map(torch.equal, first, second))


def alike(first: nn.Module, second: nn.Module) -> bool:
    """Pruned at the same places, and alike but for the rounding of float32 statistics."""
    pairs = list(zip(weights(first), weights(second), strict=True))
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    return all(torch.equal(one == 0, other == 0) for one, other in pairs)
