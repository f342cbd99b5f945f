"""Finds the repeated blocks of a model by its structure, and the linear layers in them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import nn

from farms_fast.core.arguments import check_module
from farms_fast.weights.formats.quantised import QUANTISED_BUFFERS
from farms_fast.weights.module_tensors import tensor_identity
from farms_fast.weights.stacks import Skipped

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class PrunableLayer:
    """A linear layer of a block: an `nn.Linear`, or a Conv1D with its weight stored (in, out)."""

    name: str
    module: nn.Module
    transposed: bool

    @property
    def matrix(self) -> torch.Tensor:
        """The weight as an (out, in) view, detached."""
        weight = self.module.weight
        assert isinstance(weight, torch.Tensor)  # find_blocks has seen it
        return weight.detach().mT if self.transposed else weight.detach()

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        rows, cols = self.matrix.shape
        return rows, cols


@dataclass(frozen=True)
class Block:
    """One of the repeated blocks, with its layers in the module's order."""

    name: str
    module: nn.Module
    layers: tuple[PrunableLayer, ...]


@dataclass(frozen=True)
class Blocks:
    """The blocks of a model, and what is not pruned.

    Attributes:
        container: name of the module that holds the blocks.
        blocks: the blocks in the model's order.
        skipped: every matrix of the model that is not pruned, with the reason.

    Example:
        >>> from torch import nn
        >>> body = nn.ModuleList(nn.TransformerEncoderLayer(8, 2) for _ in range(3))
        >>> [block.name for block in find_blocks(nn.ModuleDict({"body": body})).blocks]
        ['body.0', 'body.1', 'body.2']
    """

    container: str
    blocks: tuple[Block, ...]
    skipped: tuple[Skipped, ...]

    @property
    def layers(self) -> tuple[PrunableLayer, ...]:
        """The layers of all blocks."""
        return tuple(layer for block in self.blocks for layer in block.layers)


@dataclass(frozen=True)
class _Candidate:
    """Neighbouring children of one class in a list of modules."""

    container: str
    children: tuple[tuple[str, nn.Module], ...]
    weights: int


def find_blocks(model: nn.Module) -> Blocks:
    """Finds the repeated blocks of a model and the linear layers in them.

    Blocks are two or more neighbouring modules of one class in an `nn.ModuleList` or
    `nn.Sequential` that hold more than half of the weights of linear layers inside such lists. If
    several lists do, the longest counts, and the outermost of equally long ones. Names play no
    part.

    Linear layers are `nn.Linear` and Hugging Face's Conv1D. Everything else of two or more
    dimensions (embeddings, the output layer, convolutions, experts in one tensor) is listed in
    `skipped`.

    Args:
        model: any module; it is neither run nor changed.

    Raises:
        TypeError: `model` is not a module.
        ValueError: it has no repeated blocks, it is an encoder with a decoder, or a layer of a
            block is quantised, has no data, is computed from other tensors (a parametrisation, an
            adapter), or shares its weight with another layer.
    """
    check_module("model", model)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"model: expected one stack of blocks, got {type(model).__name__}, an encoder with a "
            "decoder"
        )
    for name, module in model.named_modules():
        problem = ""
        if (what := _quantised(module)) is not None:
            problem = f"is quantised ({what}): pruning needs floating-point weights"
        elif hasattr(module, "lora_A"):
            problem = "has an adapter: merge it into the base before pruning"
        if problem:
            raise ValueError(f"model: layer {name!r} {problem}")
    chosen = _choose(model)
    blocks = []
    for name, module in chosen.children:
        layers = tuple(
            PrunableLayer(f"{name}.{inner}", layer, not isinstance(layer, nn.Linear))
            for inner, layer in module.named_modules()
            if _is_linear(layer) and not _never_called(module, inner)
        )
        blocks.append(Block(name, module, layers))
    found = Blocks(chosen.container, tuple(blocks), tuple(_skipped(model, chosen, blocks)))
    _check_weights(model, found.layers)
    return found


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or (
        type(module).__name__ == "Conv1D" and hasattr(module, "nf")
    )


def _never_called(block: nn.Module, name: str) -> bool:
    """Whether it is the output layer of torch's attention, which reads the weight directly."""
    parent, _, leaf = name.rpartition(".")
    return leaf == "out_proj" and isinstance(block.get_submodule(parent), nn.MultiheadAttention)


def _linear_weights(modules: Iterable[nn.Module]) -> int:
    layers = {layer for module in modules for layer in module.modules() if _is_linear(layer)}
    parameters = (parameter for layer in layers for parameter in layer.parameters(recurse=False))
    return sum(parameter.numel() for parameter in parameters if parameter.dim() == 2)


def _choose(model: nn.Module) -> _Candidate:
    candidates = list(_candidates(model))
    # A layer in nested lists counts once.
    total = _linear_weights(child for candidate in candidates for _, child in candidate.children)
    large = [candidate for candidate in candidates if 2 * candidate.weights > total]
    if large:
        return max(large, key=lambda candidate: len(candidate.children))
    if candidates:
        lists = ", ".join(f"{c.container or 'the model'} ({c.weights} weights)" for c in candidates)
        raise ValueError(
            "model: expected one list of blocks with most of the linear layers, "
            f"got several with less than half each: {lists}"
        )
    raise ValueError(
        "model: expected repeated blocks (two or more neighbouring modules of one class with "
        f"linear layers in an nn.ModuleList or nn.Sequential), found none in {type(model).__name__}"
    )


def _candidates(model: nn.Module) -> Iterator[_Candidate]:
    for name, container in model.named_modules():
        if not isinstance(container, (nn.ModuleList, nn.Sequential)):
            continue
        prefix = f"{name}." if name else ""
        # Not `named_children`, which leaves out the second appearance of a module.
        for _, run in groupby(container._modules.items(), key=lambda item: type(item[1])):
            children = tuple((prefix + leaf, child) for leaf, child in run if child is not None)
            weights = sum(_linear_weights([child]) for _, child in children)
            if len(children) > 1 and weights and not _is_linear(children[0][1]):
                yield _Candidate(name, children, weights)


def _quantised(module: nn.Module) -> str | None:
    """The quantised form of a module's weight; None if it is a plain floating-point tensor."""
    weight = getattr(module, "weight", None) if _is_linear(module) else None
    if isinstance(weight, torch.Tensor):
        if weight.dtype not in _FLOATS:
            return f"dtype {str(weight.dtype).removeprefix('torch.')}"
        # Libraries' quantised tensors are subclasses that report a floating-point dtype.
        if type(weight.data) not in (torch.Tensor, nn.Parameter):
            return f"a {type(weight.data).__name__}"
    elif weight is not None:
        return f"a {type(module).__name__}"
    # Layers of torch.ao are no nn.Linear, and their `weight` is a method.
    if hasattr(module, "_packed_params"):
        return f"a {type(module).__name__} of {type(module).__module__}"
    own = {*module._parameters, *module._buffers} & (QUANTISED_BUFFERS - {"weight"})
    return f"it has {sorted(own)[0]!r}" if own else None


def _check_weights(model: nn.Module, layers: Iterable[PrunableLayer]) -> None:
    names: dict[object, list[str]] = {}
    for owner_name, owner in model.named_modules(remove_duplicate=False):
        for leaf, parameter in owner._parameters.items():
            if parameter is not None and parameter.dim() > 1:
                key = tensor_identity(parameter)
                names.setdefault(key, []).append(f"{owner_name}.{leaf}")
    for layer in layers:
        weight = layer.module._parameters.get("weight")
        what = f"model: the weight of layer {layer.name!r}"
        if weight is None:
            raise ValueError(
                f"{what} is computed from other tensors: make it a plain parameter first "
                "(remove_parametrizations, or merge the adapter)"
            )
        if weight.is_meta:
            raise ValueError(
                f"{what} is on the meta device: load the model into memory without offloading"
            )
        if weight.layout is not torch.strided:
            layout = str(weight.layout).removeprefix("torch.")
            raise ValueError(f"{what} has the layout {layout}: make it dense first")
        sharing = [n for n in names[tensor_identity(weight)] if n != f"{layer.name}.weight"]
        if sharing and tensor_identity(weight) is not None:
            raise ValueError(
                f"model: layer {layer.name!r} shares its weight with {sharing[0]!r}: pruning one "
                "would prune both, so give each a copy of its own first"
            )


def _skipped(model: nn.Module, chosen: _Candidate, blocks: list[Block]) -> Iterator[Skipped]:
    pruned = {f"{layer.name}.weight" for block in blocks for layer in block.layers}
    prefixes = tuple(f"{name}." for name, _ in chosen.children)
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or name in pruned:
            continue
        if not name.startswith(prefixes):
            reason = "outside of the repeated blocks"
        elif parameter.dim() > 2:
            reason = f"{parameter.dim()}-D tensor, not the weight of a linear layer"
        else:
            reason = "not the weight of a linear layer that the block calls"
        yield Skipped(name.removesuffix(".weight"), tuple(parameter.shape), reason)
