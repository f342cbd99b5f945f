"""The tensors of a module, each as the module uses it."""

from __future__ import annotations

import copy
import re
from collections.abc import Hashable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from farms_fast.weights.formats.quantised import QUANTISED_BUFFERS

ON_META = (
    "is on the meta device: load the weights first (model.load_state_dict(state_dict, "
    "assign=True), or from_pretrained without offloading)"
)
NOT_INITIALISED = "not initialised: run the module once"
_PACKED = (
    "packed for the kernels of torch.ao's quantised modules, which is not read: analyse the model "
    "as it was before"
)
_SCRIPTED = "in a ScriptModule, whose parts have lost their types: give the module it was made of"
# What weight_norm, spectral_norm and pruning put in the place of a parameter, as forward hooks.
_HOOKED = re.compile(r"(.+)_(?:orig|g|v)")


def module_tensor(module: nn.Module, name: str) -> Tensor:
    """The tensor behind a name of `LayerSpec.tensors`, detached and not copied."""
    prefix, _, leaf = name.rpartition(".")
    try:
        tensor = _effective(module.get_submodule(prefix), leaf)
    except AttributeError:
        tensor = None
    if not isinstance(tensor, Tensor):
        raise ValueError(f"name: expected a tensor of {type(module).__name__}, got {name!r}")
    return data_of(name, tensor)


def data_of(name: str, tensor: Tensor) -> Tensor:
    """The values of a tensor, detached; ValueError where it has none."""
    if tensor.is_meta:
        raise ValueError(f"{name}: {ON_META}")
    values = _dequantised(tensor.detach())
    # Of a distributed or a fake tensor, no kernel finds the numbers.
    if not _is_plain(values):
        kind = type(values).__name__
        raise ValueError(f"{name}: expected a plain tensor or one that dequantises, got {kind}")
    return values


def _is_plain(tensor: Tensor) -> bool:
    """Whether its class leaves it to torch what is done with it."""
    return type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__


def _dequantised(tensor: Tensor) -> Tensor:
    """The values of a tensor, also of a class that holds a quantised weight, as torchao's do."""
    if type(tensor).dequantize is Tensor.dequantize:
        return tensor
    values: Tensor = tensor.dequantize()
    return values


def tensor_identity(tensor: Tensor) -> Hashable | None:
    """A key that is equal for two tensors of the same memory, shape, strides and dtype.

    None where there is no memory to compare: classes that wrap other tensors have no address.
    """
    if sparse_layout(tensor) or tensor.numel() == 0 or not _is_plain(tensor):
        return None
    storage = tensor.untyped_storage()
    # All meta tensors have address 0, so there the storage object itself has to tell.
    address = storage._cdata if tensor.is_meta else storage.data_ptr()
    offset, shape, strides = tensor.storage_offset(), tuple(tensor.shape), tensor.stride()
    return str(tensor.device), address, offset, shape, strides, tensor.dtype


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    """Its shape; empty where it has none: not initialised, or nested."""
    if is_lazy(tensor) or tensor.is_nested:
        return ()
    return tuple(tensor.shape)


def sparse_layout(tensor: Tensor) -> str:
    """Why a tensor cannot be analysed that is not dense."""
    if tensor.is_nested:
        return "nested tensor: give its parts by name"
    if tensor.layout is torch.strided:
        return ""
    return f"layout {str(tensor.layout).removeprefix('torch.')}: make it dense first"


def _effective(owner: nn.Module, leaf: str) -> Tensor:
    """A module's tensor as its forward pass uses it, without changing the module."""
    if parametrize.is_parametrized(owner, leaf):
        # Spectral norm in training mode writes its buffers at each evaluation: take a copy's.
        with torch.no_grad():
            tensor = copy.deepcopy(owner.parametrizations[leaf]).eval()()  # type: ignore[index, union-attr]
    elif leaf in owner._parameters:
        # As it is stored: tensorly-torch's complex factors answer by attribute as another tensor.
        tensor = owner._parameters[leaf]
    else:
        tensor = getattr(owner, leaf)
    return _dequantised(tensor) if isinstance(tensor, Tensor) else tensor  # type: ignore[no-any-return]


def _packed(owner: nn.Module) -> Iterator[tuple[str, Tensor, str]]:
    """Weights that torch.ao's quantised modules hold as objects, not as tensors."""
    for leaf, value in vars(owner).items():
        if isinstance(value, torch.ScriptObject):
            yield leaf, _nothing(), _PACKED


def _nothing() -> Tensor:
    """What stands for a weight that is no tensor."""
    return torch.empty((), dtype=torch.int8, device="meta")


def own_tensors(owner: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor, str]]:
    """A module's own tensors: leaf name, tensor, and why it is not analysed."""
    parameters = owner.named_parameters(recurse=False, remove_duplicate=False)
    if "parametrizations" in prefix.split("."):
        reason = "original of a parametrised weight, which is analysed as the module uses it"
        yield from ((leaf, parameter, reason) for leaf, parameter in parameters)
        return
    if isinstance(owner, torch.jit.ScriptModule):
        yield from ((leaf, parameter, _SCRIPTED) for leaf, parameter in parameters)
        return
    yield from _packed(owner)
    seen: set[str] = set()
    for leaf, parameter in parameters:
        match = _HOOKED.fullmatch(leaf)
        used = owner.__dict__.get(match[1]) if match else None
        if match is None or not isinstance(used, Tensor):
            lazy = is_lazy(parameter)
            yield leaf, parameter, NOT_INITIALISED if lazy else ""
            continue
        if match[1] not in seen:
            seen.add(match[1])
            yield match[1], used, ""
        yield leaf, parameter, f"part of {match[1]}, analysed as the module uses it"
    for leaf, buffer in owner.named_buffers(recurse=False):
        masked = "weight" if leaf == "mask" else leaf.removesuffix("_mask")
        of = owner._parameters.get(masked) if masked != leaf else None
        if of is not None and shape_of(of) == shape_of(buffer):
            yield leaf, buffer, ""
        # Of any dtype but one byte wide, a buffer of this name is no weight.
        if leaf in QUANTISED_BUFFERS and (leaf != "weight" or buffer.element_size() == 1):
            yield leaf, buffer, ""
    if parametrize.is_parametrized(owner):
        for leaf in owner.parametrizations:  # type: ignore[union-attr]
            try:
                yield leaf, _effective(owner, leaf), ""
            # A parametrisation is the caller's code: whatever it raises is that weight's reason.
            except Exception as error:
                reason = f"its parametrisation failed: {type(error).__name__}: {error}"
                yield leaf, _nothing(), reason
