"""From the tensors of a model to layers, each a stack of equal matrices.

`layers_from_headers` knows names, shapes and dtypes only; `layers_from_module` also knows what
kind of module owns a tensor. Neither reads a weight. Every tensor ends either in a layer or in the
list of skipped ones, with its reason.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import torch
from torch import nn
from torch.nn.utils import parametrize

from farms_fast.core.arguments import check_module, unmatched_pattern
from farms_fast.weights.formats.lora_modules import Wrapper, module_wrappers, visible_name
from farms_fast.weights.formats.quantised import restore
from farms_fast.weights.model_config import ModelConfig
from farms_fast.weights.module_tensors import (
    module_tensor,
    own_tensors,
    sparse_layout,
    tensor_identity,
)
from farms_fast.weights.rules.header_index import HeaderIndex
from farms_fast.weights.rules.layer_rules import (
    convolution_part,
    embedding_part,
    expert_parts,
    is_stack,
    linear_parts,
    parts_by_name,
    stacked_part,
    unusable,
)
from farms_fast.weights.rules.operator_layers import assembled, module_notes
from farms_fast.weights.stacks import Combined, Found, LayerSpec, Part, Skipped, TensorHeader

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
# What an adapter makes of the weights of its base.
Change = Callable[[Sequence[Found]], list[Found]]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED_CONVOLUTIONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# RMSNorm came to torch later than the rest; LayerNorm alone can have a weight of several dims.
_NORMALISATIONS = tuple(getattr(nn, n) for n in ("LayerNorm", "RMSNorm") if hasattr(nn, n))


@dataclass(frozen=True)
class _Owned:
    """A tensor of a module, under the name that it has when nothing is wrapped.

    `reason` says why it is no weight of its own, and is empty when it may be one.
    """

    header: TensorHeader
    owner: nn.Module
    reason: str


def layers_from_headers(
    headers: Sequence[TensorHeader],
    include: Patterns = None,
    exclude: Patterns = None,
    *,
    config: ModelConfig | None = None,
    change: Change | None = None,
) -> tuple[list[LayerSpec], list[Skipped]]:
    """Layers of a checkpoint, from the names, shapes and dtypes of its tensors.

    A grouped convolution cannot be told from an ungrouped one by its header, nor a transposed one
    without a bias: both are read as `(out, in, *kernel)`. Their modules tell more.

    Args:
        headers: one for each tensor; the layers come in this order.
        include: None, a glob or several, matched with case against layer names. A layer that it
            matches is analysed even when it is left out by default, as embeddings are.
        exclude: as `include`; it has the last word.
        config: the model's, for what headers do not tell: how many key heads a fused projection
            has, how a weight is quantised.
        change: what an adapter makes of the weights, after quantised ones have been restored.

    Returns:
        The layers to analyse and the tensors that are not analysed, both in order.

    Raises:
        ValueError: two headers have one name, `include` is empty, or a pattern matches no name.
        TypeError: a pattern is not a string, or `change` no function.

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
    names = [header.name for header in headers]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"headers: expected each name once, got {twice!r} more than once")
    found = _changed(assembled(restore(headers, config)), change)
    index = HeaderIndex((header for header, _ in found), config)
    proposals = [
        (header, _checked(reason or unusable(header) or parts_by_name(header, index)))
        for header, reason in found
    ]
    return _select(proposals, index, include, exclude)


def layers_from_module(
    module: nn.Module,
    include: Patterns = None,
    exclude: Patterns = None,
    *,
    change: Change | None = None,
) -> tuple[list[LayerSpec], list[Skipped]]:
    """Layers of a module, from the types of its submodules and the shapes of their parameters.

    Buffers are not analysed, but for those that hold a quantised weight. A parametrised, pruned or
    normalised weight, and one in a LoRA layer as PEFT makes it, is taken as the module uses it. A
    `config` attribute as Hugging Face's models have it is read. Of tied weights the first that is
    analysed counts, the others are skipped.

    Args:
        module: any module; it is neither run nor changed.
        include: as in `layers_from_headers`.
        exclude: as in `layers_from_headers`.
        change: as in `layers_from_headers`.

    Returns:
        The layers to analyse and the tensors that are not analysed, both in module order.

    Raises:
        ValueError: `include` is empty, or a pattern matches no name.
        TypeError: `module` is not a module, a pattern is not a string, or `change` no function.

    Example:
        >>> from torch import nn
        >>> layers, skipped = layers_from_module(nn.Sequential(nn.Linear(8, 4), nn.ReLU()))
        >>> [(layer.name, layer.tensors, layer.shape) for layer in layers]
        [('0', ('0.weight',), (1, 4, 8))]
        >>> skipped
        [Skipped(name='0.bias', shape=(4,), reason='vector, not a matrix')]
    """
    check_module("module", module)
    wrappers = module_wrappers(module)
    owned: list[_Owned] = []
    for prefix, owner in module.named_modules(remove_duplicate=False):
        for leaf, tensor, reason in own_tensors(owner, prefix):
            name = f"{prefix}.{leaf}" if prefix else leaf
            visible, elsewhere = visible_name(name, wrappers)
            header = _header(visible, name, tensor)
            if parametrize.is_parametrized(owner, leaf):
                # Computed just now and gone in a moment: the next one may lie in the same place.
                header = replace(header, identity=(id(owner), leaf))
            owned.append(_Owned(header, owner, reason or sparse_layout(tensor) or elsewhere))
    config = _config_of(module)
    # Which stored tensor is where: what is made of several takes the place of the first.
    places = {name: n for n, item in enumerate(owned) for name in item.header.stored}
    found = [
        item if item.reason else _as_wrapped(item.header, wrappers)
        for item in restore([item.header for item in owned if not item.reason], config)
    ]
    notes = module_notes(module)
    found = _changed(assembled(found, notes), change)
    index = HeaderIndex((header for header, _ in found), config, notes)
    proposals: list[tuple[int, TensorHeader, list[Part] | str]] = [
        (number, item.header, item.reason) for number, item in enumerate(owned) if item.reason
    ]
    for header, reason in found:
        number = min((places[n] for n in header.stored if n in places), default=len(owned))
        parts: list[Part] | str = reason or unusable(header)
        if not parts and number < len(owned):
            parts = _parts_by_module(header, owned[number].owner, index)
        proposals.append((number, header, _checked(parts or parts_by_name(header, index))))
    proposals.sort(key=lambda proposal: proposal[0])
    return _select([(header, parts) for _, header, parts in proposals], index, include, exclude)


def _changed(found: list[Found], change: Change | None) -> list[Found]:
    if change is None:
        return found
    if not callable(change):
        raise TypeError(f"change: expected None or a function, got {type(change).__name__}")
    return change(found)


def _header(visible: str, name: str, tensor: torch.Tensor) -> TensorHeader:
    tensors = () if visible == name else (name,)
    if isinstance(tensor, nn.parameter.UninitializedParameter):
        return TensorHeader(visible, (), tensor.dtype, None, tensors)
    identity = tensor_identity(tensor)
    return TensorHeader(visible, tuple(tensor.shape), tensor.dtype, identity, tensors)


def _as_wrapped(header: TensorHeader, wrappers: Mapping[str, Wrapper]) -> Found:
    """A weight with the updates of all LoRA layers around the module that has it."""
    found = Found(header)
    path = header.stored[0].rpartition(".")[0]
    while not found.reason and path.rpartition(".")[2] == "base_layer":
        path = path.rpartition(".")[0]
        if path not in wrappers:
            break
        found = wrappers[path].updated(found.header)
    return found


def _config_of(module: nn.Module) -> ModelConfig | None:
    """What a Hugging Face model knows of itself."""
    to_dict = getattr(getattr(module, "config", None), "to_dict", None)
    entries = to_dict() if callable(to_dict) else None
    return ModelConfig.of(entries) if isinstance(entries, Mapping) else None


def _parts_by_module(
    header: TensorHeader, owner: nn.Module, index: HeaderIndex
) -> list[Part] | str:
    """Parts by the type of the owner, or by name where its type says nothing."""
    name, shape, leaf = index.layer_name(header.name), header.shape, header.name.rpartition(".")[2]
    if isinstance(owner, _NORMALISATIONS):
        return "elementwise scale of a normalisation, not a matrix"
    if leaf == "weight":
        if isinstance(owner, nn.Linear):
            return linear_parts(name, shape, index)
        # Hugging Face's Conv1D is a linear layer that stores its weight (in, out).
        if type(owner).__name__ == "Conv1D" and hasattr(owner, "nf") and len(shape) == 2:
            return linear_parts(name, shape, index, transposed=True)
        if isinstance(owner, _CONVOLUTIONS):
            return [convolution_part(name, shape, groups=owner.groups)]
        if isinstance(owner, _TRANSPOSED_CONVOLUTIONS):
            return [convolution_part(name, shape, groups=owner.groups, transposed=True)]
        if isinstance(owner, (nn.Embedding, nn.EmbeddingBag)):
            return [embedding_part(name, shape)]
        if isinstance(owner, nn.Bilinear):
            return [stacked_part(name, shape, kind="bilinear")]
    kind = type(owner).__name__.lower()
    if len(shape) == 3 and "expert" in kind and "bias" not in leaf:
        return expert_parts(header, index)
    if leaf.startswith("weight") and is_stack(header) and "conv" not in kind:
        return [stacked_part(name, shape, kind="stacked")]
    return parts_by_name(header, index)


def _checked(found: list[Part] | str) -> list[Part] | str:
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
                    part.name,
                    part.kind,
                    header.stored,
                    part.shape,
                    header.dtype,
                    part.to_stack
                    if header.combine is None
                    else Combined(header.combine, part.to_stack),
                )
            )
    for argument, patterns in (("include", included), ("exclude", excluded)):
        for pattern in patterns or ():
            if not any(fnmatchcase(name, pattern) for name in names):
                raise unmatched_pattern(argument, pattern, names)
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
