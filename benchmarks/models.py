"""Networks by their shapes alone: the convolutions and linear layers of well-known models.

Nothing here is ever run forward, so order, pooling, normalisation and activations are left out.
"""

from __future__ import annotations

import torch
from torch import nn


def _conv(inputs: int, outputs: int, kernel: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, bias=False)


def _resnet(blocks: tuple[int, ...], classes: int) -> nn.Module:
    layers: dict[str, nn.Module] = {"conv1": _conv(3, 64, 3)}
    inputs = 64
    for stage, outputs in enumerate((64, 128, 256, 512), start=1):
        for block in range(blocks[stage - 1]):
            name = f"layer{stage}_{block}"
            layers[f"{name}_conv1"] = _conv(inputs, outputs, 3)
            layers[f"{name}_conv2"] = _conv(outputs, outputs, 3)
            if inputs != outputs:
                layers[f"{name}_downsample"] = _conv(inputs, outputs, 1)
            inputs = outputs
    layers["fc"] = nn.Linear(512, classes)
    return nn.ModuleDict(layers)


def resnet18(classes: int = 100) -> nn.Module:
    """ResNet-18 as it is trained on CIFAR: a 3x3 stem (He et al., arXiv 1512.03385)."""
    return _resnet((2, 2, 2, 2), classes)


def resnet34(classes: int = 100) -> nn.Module:
    """ResNet-34, likewise."""
    return _resnet((3, 4, 6, 3), classes)


def _vgg(convolutions: tuple[int, ...], classes: int) -> nn.Module:
    layers: dict[str, nn.Module] = {}
    inputs = 3
    widths = (64, 128, 256, 512, 512)
    outputs_of = [w for w, count in zip(widths, convolutions, strict=True) for _ in range(count)]
    for index, outputs in enumerate(outputs_of):
        layers[f"conv{index}"] = _conv(inputs, outputs, 3)
        inputs = outputs
    layers["fc"] = nn.Linear(512, classes)
    return nn.ModuleDict(layers)


def vgg16(classes: int = 100) -> nn.Module:
    """VGG-16 as it is trained on CIFAR: one linear layer (Simonyan and Zisserman, 1409.1556)."""
    return _vgg((2, 2, 3, 3, 3), classes)


def vgg19(classes: int = 100) -> nn.Module:
    """VGG-19, likewise."""
    return _vgg((2, 2, 4, 4, 4), classes)


def initialised(model: nn.Module, seed: int, device: torch.device) -> nn.Module:
    """The model with weights drawn anew from Student's t with 4 degrees of freedom."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            normal = torch.randn(weight.shape, generator=generator)
            chi = torch.randn((4, *weight.shape), generator=generator).square().mean(dim=0).sqrt()
            fan_in = weight[0].numel() if weight.ndim > 1 else 1
            weight.copy_(normal / chi / fan_in**0.5)
    return model.to(device)


def llama_layer(
    rows: int, columns: int, seed: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """One float16 projection, drawn from Student's t with 4 degrees of freedom, as a state dict."""
    generator = torch.Generator(device).manual_seed(seed)
    shape = (rows, columns)

    def normal() -> torch.Tensor:
        return torch.randn(shape, device=device, generator=generator)

    chi = torch.stack([normal() for _ in range(4)]).square().mean(dim=0).sqrt()
    return {"weight": (normal() / chi / columns**0.5).half()}
