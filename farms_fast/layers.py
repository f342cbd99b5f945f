"""From the tensors of a model to layers, each a stack of equal matrices.

`layers_from_headers` knows names, shapes and dtypes only; `layers_from_module` also knows what
kind of module owns a tensor. Neither reads a weight. Every tensor ends either in a layer or in the
list of skipped ones, with its reason.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn
from torch.nn.utils import parametrize

from .layer_rules import (
    HeaderIndex,
    LayerSpec,
    Part,
    Skipped,
    TensorHeader,
    convolution_part,
    embedding_part,
    linear_parts,
    parts_by_name,
    stacked_part,
    unusable,
)

__all__ = [
    "LayerSpec",
    "Skipped",
    "TensorHeader",
    "layers_from_headers",
    "layers_from_module",
    "module_tensor",
    "sparse_layout",
    "tensor_identity",
]

Patterns = str | Sequence[str] | None

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED_CONVOLUTIONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# RMSNorm came to torch later than the rest; LayerNorm alone can have a weight of several dims.
_NORMALISATIONS = tuple(getattr(nn, n) for n in ("LayerNorm", "RMSNorm") if hasattr(nn, n))
# What weight_norm, spectral_norm and pruning put in the place of a parameter, as forward hooks.
_HOOKED = re.compile(r"(.+)_(?:orig|g|v)")


@dataclass(frozen=True)
class _Owned:
    """A header and the module that owns the tensor."""

    header: TensorHeader
    owner: nn.Module
    leaf: str


def layers_from_headers(
    headers: Sequence[TensorHeader], include: Patterns = None, exclude: Patterns = None
) -> tuple[list[LayerSpec], list[Skipped]]:
    """Layers of a checkpoint, from the names, shapes and dtypes of its tensors.

    A grouped convolution cannot be told from an ungrouped one by its header, nor a transposed one
    without a bias: both are read as ``(out, in, *kernel)``. Their modules tell more.

    Args:
        headers: One for each tensor; the layers come in this order.
        include: None, a glob or several, matched with case against layer names. A layer that it
            matches is analysed even when it is left out by default, as embeddings are.
        exclude: As ``include``; it has the last word.

    Returns:
        The layers to analyse and the tensors that are not analysed, both in order.

    Raises:
        ValueError: Two headers have one name, ``include`` is empty, or a pattern matches no name.
        TypeError: A pattern is not a string.

    Example:
        >>> import torch
        >>> headers = [
        ...     TensorHeader("conv.weight", (8, 4, 3, 3), torch.float32),
        ...     TensorHeader("conv.bias", (8,), torch.float32),
        ... ]
        >>> layers, skipped = layers_from_headers(headers)
        >>> layers[0].name, layers[0].kind, layers[0].shape
        ('conv', 'conv2d', (9, 8, 4))
        >>> skipped[0].name, skipped[0].reason
        ('conv.bias', 'vector, not a matrix')
    """
    index = HeaderIndex(headers)
    if len(index.by_name) != len(headers):
        names = [header.name for header in headers]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"headers: expected each name once, got {twice!r} more than once")
    proposals = [
        (header, _checked(header, unusable(header) or parts_by_name(header, index)))
        for header in headers
    ]
    return _select(proposals, index, include, exclude)


def layers_from_module(
    module: nn.Module, include: Patterns = None, exclude: Patterns = None
) -> tuple[list[LayerSpec], list[Skipped]]:
    """Layers of a module, from the types of its submodules and the shapes of their parameters.

    Buffers are not analysed. A parametrised, pruned or normalised weight is taken as the module
    uses it. Of tied weights the first that is analysed counts, the others are skipped.

    Args:
        module: Any module; it is neither run nor changed.
        include: As in `layers_from_headers`.
        exclude: As in `layers_from_headers`.

    Returns:
        The layers to analyse and the tensors that are not analysed, both in module order.

    Raises:
        ValueError: ``include`` is empty, or a pattern matches no name.
        TypeError: ``module`` is not a module, or a pattern is not a string.

    Example:
        >>> from torch import nn
        >>> layers, skipped = layers_from_module(nn.Sequential(nn.Linear(8, 4), nn.ReLU()))
        >>> [(layer.name, layer.tensors, layer.shape) for layer in layers]
        [('0', ('0.weight',), (1, 4, 8))]
        >>> skipped
        [Skipped(name='0.bias', shape=(4,), reason='vector, not a matrix')]
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected a torch.nn.Module, got {type(module).__name__}")
    owned: list[_Owned] = []
    early: dict[str, str] = {}
    for prefix, owner in module.named_modules(remove_duplicate=False):
        for leaf, tensor, reason in _own_tensors(owner, prefix):
            name = f"{prefix}.{leaf}" if prefix else leaf
            header = _header(name, tensor)
            if reason or sparse_layout(tensor):
                early[name] = reason or sparse_layout(tensor)
            owned.append(_Owned(header, owner, leaf))
    index = HeaderIndex(item.header for item in owned if item.header.name not in early)
    proposals = []
    for item in owned:
        header = item.header
        found = early.get(header.name) or unusable(header) or _parts_by_module(item, index)
        proposals.append((header, _checked(header, found)))
    return _select(proposals, index, include, exclude)


def module_tensor(module: nn.Module, name: str) -> torch.Tensor:
    """The tensor behind one of a layer's ``tensors`` names, detached and not copied.

    Args:
        module: The module that the layers were made from.
        name: As in `LayerSpec.tensors`.

    Raises:
        ValueError: The module has no such tensor, or the tensor has no data.

    Example:
        >>> from torch import nn
        >>> module_tensor(nn.Sequential(nn.Linear(8, 4)), "0.weight").shape
        torch.Size([4, 8])
    """
    prefix, _, leaf = name.rpartition(".")
    try:
        tensor = _effective(module.get_submodule(prefix), leaf)
    except AttributeError:
        tensor = None
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"name: expected a tensor of {type(module).__name__}, got {name!r}")
    if tensor.is_meta:
        raise ValueError(f"{name}: expected a tensor with data, got one on the meta device")
    return tensor.detach()


def tensor_identity(tensor: torch.Tensor) -> Hashable | None:
    """A key that is equal for two tensors of the same memory, shape, strides and dtype."""
    if tensor.layout is not torch.strided or tensor.numel() == 0:
        return None
    storage = tensor.untyped_storage()
    try:
        # All meta tensors have address 0, so there the storage object itself has to tell.
        where = storage._cdata if tensor.is_meta else storage.data_ptr()
    except RuntimeError:  # subclasses that wrap other tensors have no address of their own
        return None
    return (
        str(tensor.device),
        where,
        tensor.storage_offset(),
        tuple(tensor.shape),
        tensor.stride(),
        tensor.dtype,
    )


def sparse_layout(tensor: torch.Tensor) -> str:
    """Why a tensor that is not dense cannot be analysed; empty for a dense one."""
    if tensor.layout is torch.strided:
        return ""
    return f"layout {str(tensor.layout).removeprefix('torch.')}: make it dense first"


def _effective(owner: nn.Module, leaf: str) -> torch.Tensor:
    """A module's tensor as its forward pass uses it, without changing the module."""
    if parametrize.is_parametrized(owner, leaf):
        # Spectral norm in training mode writes its buffers at each evaluation: take a copy's.
        with torch.no_grad():
            found = copy.deepcopy(owner.parametrizations[leaf]).eval()()  # type: ignore[index, union-attr]
    else:
        found = getattr(owner, leaf)
    return found  # type: ignore[no-any-return]


def _own_tensors(owner: nn.Module, prefix: str) -> list[tuple[str, torch.Tensor, str]]:
    """A module's own parameters: leaf name, tensor, and why it is not analysed (or nothing)."""
    rows: list[tuple[str, torch.Tensor, str]] = []
    if "parametrizations" in prefix.split("."):
        reason = "original of a parametrised weight, which is analysed as the module uses it"
        return [(leaf, p, reason) for leaf, p in owner.named_parameters(recurse=False)]
    seen: set[str] = set()
    for leaf, parameter in owner.named_parameters(recurse=False, remove_duplicate=False):
        match = _HOOKED.fullmatch(leaf)
        used = owner.__dict__.get(match[1]) if match else None
        if match is None or not isinstance(used, torch.Tensor):
            lazy = isinstance(parameter, nn.parameter.UninitializedParameter)
            rows.append((leaf, parameter, "not initialised: run the module once" if lazy else ""))
            continue
        if match[1] not in seen:
            seen.add(match[1])
            rows.append((match[1], used, ""))
        rows.append((leaf, parameter, f"part of {match[1]}, analysed as the module uses it"))
    if parametrize.is_parametrized(owner):
        names = owner.parametrizations.keys()  # type: ignore[operator, union-attr]
        rows.extend((leaf, _effective(owner, leaf), "") for leaf in names)
    return rows


def _header(name: str, tensor: torch.Tensor) -> TensorHeader:
    if isinstance(tensor, nn.parameter.UninitializedParameter):
        return TensorHeader(name, (), tensor.dtype)
    return TensorHeader(name, tuple(tensor.shape), tensor.dtype, tensor_identity(tensor))


def _parts_by_module(item: _Owned, index: HeaderIndex) -> list[Part] | str:
    """Parts by the type of the owner, or by name where its type says nothing."""
    owner, header = item.owner, item.header
    name, shape = index.layer_name(header.name), header.shape
    if isinstance(owner, _NORMALISATIONS):
        return "elementwise scale of a normalisation, not a matrix"
    if item.leaf == "weight":
        if isinstance(owner, nn.Linear):
            return linear_parts(name, shape)
        # Hugging Face's Conv1D is a linear layer that stores its weight (in, out).
        if type(owner).__name__ == "Conv1D" and hasattr(owner, "nf") and len(shape) == 2:
            return linear_parts(name, shape, transposed=True)
        if isinstance(owner, _CONVOLUTIONS):
            return [convolution_part(name, shape, groups=owner.groups)]
        if isinstance(owner, _TRANSPOSED_CONVOLUTIONS):
            return [convolution_part(name, shape, groups=owner.groups, transposed=True)]
        if isinstance(owner, (nn.Embedding, nn.EmbeddingBag)):
            return [embedding_part(name, shape)]
        if isinstance(owner, nn.Bilinear):
            return [stacked_part(name, shape, kind="bilinear")]
    if len(shape) == 3 and "expert" in type(owner).__name__.lower() and "bias" not in item.leaf:
        return [stacked_part(name, shape, kind="experts")]
    return parts_by_name(header, index)


def _checked(header: TensorHeader, found: list[Part] | str) -> list[Part] | str:
    """The parts, unless their matrices are vectors: one singular value is no spectrum."""
    if isinstance(found, str):
        return found
    count, rows, cols = found[0].shape
    if min(rows, cols) > 1:
        return found
    what = "depthwise or single-channel: " if count > 1 else ""
    return f"{what}a {rows} x {cols} matrix has one singular value, no spectrum"


def _select(
    proposals: Sequence[tuple[TensorHeader, list[Part] | str]],
    index: HeaderIndex,
    include: Patterns,
    exclude: Patterns,
) -> tuple[list[LayerSpec], list[Skipped]]:
    """Apply the patterns, and take tied weights once."""
    included, excluded = _patterns("include", include), _patterns("exclude", exclude)
    layers: list[LayerSpec] = []
    skipped: list[Skipped] = []
    names: list[str] = []
    first_use: dict[Hashable, str] = {}
    for header, found in proposals:
        if isinstance(found, str):
            name = index.layer_name(header.name)
            names.append(name)
            skipped.append(Skipped(name, header.shape, found))
            continue
        for number, part in enumerate(found):
            names.append(part.name)
            key = None if header.identity is None else (header.identity, len(found), number)
            reason = _left_out(part, included, excluded)
            if not reason and key in first_use:
                reason = f"tied to {first_use[key]}"
            if reason:
                shape = part.shape if len(found) > 1 else header.shape
                skipped.append(Skipped(part.name, shape, reason))
                continue
            if key is not None:
                first_use[key] = part.name
            layers.append(
                LayerSpec(
                    part.name, part.kind, (header.name,), part.shape, header.dtype, part.to_stack
                )
            )
    for argument, patterns in (("include", included), ("exclude", excluded)):
        for pattern in patterns or ():
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(
                    f"{argument}: expected patterns that match a layer name, got {pattern!r}, "
                    f"which matches none of {len(names)}"
                    + (f" (the first is {names[0]!r})" if names else "")
                )
    return layers, skipped


def _left_out(part: Part, included: list[str] | None, excluded: list[str] | None) -> str:
    for pattern in excluded or ():
        if fnmatchcase(part.name, pattern):
            return f"excluded by {pattern!r}"
    if included is None:
        return part.left_out
    if any(fnmatchcase(part.name, pattern) for pattern in included):
        return ""
    return "not matched by include"


def _patterns(argument: str, value: Patterns) -> list[str] | None:
    if value is None:
        return None
    patterns = [value] if isinstance(value, str) else value
    if not isinstance(patterns, Sequence) or not all(isinstance(p, str) for p in patterns):
        raise TypeError(f"{argument}: expected None, a glob or a sequence of globs, got {value!r}")
    if argument == "include" and not patterns:
        raise ValueError("include: expected None or at least one glob, got an empty sequence")
    return list(patterns)
