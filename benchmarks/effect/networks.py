"""ResNets and VGGs for images of 32 x 32, as they are trained on CIFAR."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

_RESNETS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3)}
_VGGS = {"vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4)}


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(inner)) + self.downsample(x))


class ResNet(nn.Module):
    """With a 3x3 stem and no pooling before the end (He et al., arXiv 1512.03385, section 4.2)."""

    def __init__(self, blocks: tuple[int, ...], width: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        inputs = width
        for stage, count in enumerate(blocks):
            outputs = width * 2**stage
            members = []
            for block in range(count):
                stride = 2 if stage > 0 and block == 0 else 1
                members.append(BasicBlock(inputs, outputs, stride))
                inputs = outputs
            self.add_module(f"layer{stage + 1}", nn.Sequential(*members))
        self.stages = len(blocks)
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        for stage in range(self.stages):
            x = self.get_submodule(f"layer{stage + 1}")(x)
        logits: torch.Tensor = self.fc(x.mean(dim=(2, 3)))
        return logits


class Vgg(nn.Module):
    """Stages of 3x3 convolutions and a pooling each, one linear layer (arXiv 1409.1556)."""

    def __init__(self, convolutions: tuple[int, ...], width: int, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for stage, count in enumerate(convolutions):
            outputs = width * min(2**stage, 8)
            for _ in range(count):
                layers += [
                    nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
                    nn.BatchNorm2d(outputs),
                    nn.ReLU(inplace=True),
                ]
                inputs = outputs
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.fc(self.features(x).mean(dim=(2, 3)))
        return logits


NETWORKS: dict[str, Callable[[int, int], nn.Module]] = {
    **{
        name: lambda width, classes, blocks=blocks: ResNet(blocks, width, classes)
        for name, blocks in _RESNETS.items()
    },
    **{
        name: lambda width, classes, counts=counts: Vgg(counts, width, classes)
        for name, counts in _VGGS.items()
    },
}


def network(name: str, width: int, classes: int) -> nn.Module:
    """A freshly initialised network; `width` is the channels of its first stage."""
    model = NETWORKS[name](width, classes)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model
