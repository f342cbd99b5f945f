"""Images and labels on a device, and batches of them made there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from farms_fast.adapters.training.cifar100 import load_cifar100

SIDE = 32
PADDING = 4


@dataclass(frozen=True)
class Images:
    """A data set for classification, normalised by its training images' mean and deviation.

    Attributes:
        train: float32 (N, 3, 32, 32), and so is `test`.
        train_labels: int64 (N,), and so are `test_labels`.
        classes: how many there are.
        flips: whether a mirrored image has the same label.
        description: what it is, for titles.
    """

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    classes: int
    flips: bool
    description: str

    def to(self, device: torch.device) -> Images:
        """The same on a device."""
        tensors = (self.train, self.train_labels, self.test, self.test_labels)
        moved = [tensor.to(device) for tensor in tensors]
        return Images(*moved, self.classes, self.flips, self.description)

    def batches(self, size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch in random order, cropped and mirrored at random; a last part is left out."""
        device, count = self.train.device, len(self.train)
        order = torch.randperm(count, generator=generator, device=device)
        padded = torch.nn.functional.pad(self.train, (PADDING,) * 4)
        extent = torch.arange(SIDE, device=device)
        for start in range(0, max(count - size, 0) + 1, size):
            chosen = order[start : start + size]
            shape = (2, len(chosen), 1)
            offsets = torch.randint(0, 2 * PADDING + 1, shape, generator=generator, device=device)
            rows, columns = offsets[0] + extent, extent.expand(len(chosen), -1)
            if self.flips:
                mirrored = torch.rand((len(chosen), 1), generator=generator, device=device) < 0.5
                columns = torch.where(mirrored, SIDE - 1 - columns, columns)
            columns = columns + offsets[1]
            # (batch, row, column, channel) in memory: what channels-last convolutions want.
            cropped = padded[chosen[:, None, None], :, rows[:, :, None], columns[:, None, :]]
            yield cropped.permute(0, 3, 1, 2), self.train_labels[chosen]


def _normalised(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, *rest: object
) -> Images:
    mean = train.mean(dim=(0, 2, 3), keepdim=True)
    deviation = train.std(dim=(0, 2, 3), keepdim=True)
    parts = [(part - mean) / deviation for part in (train, test)]
    return Images(parts[0], train_labels, parts[1], test_labels, *rest)  # type: ignore[arg-type]


def digits(count: int) -> Images:
    """scikit-learn's 1,797 handwritten digits of 8 x 8, upscaled to 32 x 32.

    Args:
        count: so many of them to train with, the others to test with; always the same ones.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "--data digits needs scikit-learn: pip install 'farms-fast[bench]'"
        ) from error
    found = load_digits()
    images = torch.from_numpy(found.images).float().unsqueeze(1) / 16
    images = torch.nn.functional.interpolate(images, size=SIDE, mode="bilinear")
    images, labels = images.repeat(1, 3, 1, 1), torch.from_numpy(found.target).long()
    if not 0 < count < len(images):
        raise ValueError(f"--train: expected fewer than {len(images)} images, got {count}")
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(images)))
    train, test = order[:count], order[count:]
    what = f"digits ({count} to train, {len(test)} to test)"
    return _normalised(images[train], labels[train], images[test], labels[test], 10, False, what)


def cifar100(path: str, count: int | None) -> Images:
    """CIFAR-100 from its published archive; `count` of the training images, or all."""
    found = load_cifar100(path)
    train, labels = found.train_images[:count].float() / 255, found.train_labels[:count]
    test = found.test_images.float() / 255
    what = f"CIFAR-100 ({len(train)} to train, {len(test)} to test)"
    return _normalised(train, labels, test, found.test_labels, len(found.classes), True, what)
