"""From the tensors of a model to layers, each a stack of equal matrices.

Every tensor ends either in a layer or in the list of skipped ones, with its reason.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.utils import parametrize

from farms_fast.core.arguments import check_module, first_repeated, unmatched_pattern
from farms_fast.weights.formats.lora_modules import Wrapper, module_wrappers, visible_name
from farms_fast.weights.formats.quantised import dequantised_headers
from farms_fast.weights.formats.reparametrised import reparametrised_headers
from farms_fast.weights.model_config import ModelConfig
from farms_fast.weights.module_tensors import (
    own_tensors,
    shape_of,
    sparse_layout,
    tensor_identity,
)
from farms_fast.weights.recipes import Computed
from farms_fast.weights.rules.header_index import HeaderIndex, Weight
from farms_fast.weights.rules.layer_rules import layers_of, unusable
from farms_fast.weights.rules.operator_layers import merge_complex_parts, module_notes
from farms_fast.weights.stacks import (
    Globs,
    Layers,
    LayerSpec,
    Part,
    Skipped,
    TensorHeader,
    WeightCandidate,
    WeightTransform,
    check_layout,
)

_WILDCARD = re.compile(r"[*?[]")


def layers_from_headers(
    headers: Sequence[TensorHeader],
    include: Globs = None,
    exclude: Globs = None,
    *,
    config: ModelConfig | None = None,
    change: WeightTransform | None = None,
    layout: str = "auto",
) -> Layers:
    """Layers of a checkpoint and what is skipped, from names, shapes and dtypes; reads no weight.

    `include` and `exclude` are globs of layer names; `include` brings in what is left out by
    default, and `exclude` has the last word. `change` gets the weights once quantised ones have
    their headers. A header does not say whether a convolution is grouped or, without a bias,
    transposed: all are read as `(out, in, *kernel)`, or where their name and shape tell so, or
    `layout="channels_last"` does, as `(*kernel, in, out)`.
    """
    check_layout(layout)
    names = [header.name for header in headers]
    if len(set(names)) != len(names):
        twice = first_repeated(names)
        raise ValueError(f"headers: expected each name once, got {twice!r} more than once")
    weights = reparametrised_headers(dequantised_headers(headers, config))
    weights = _changed(merge_complex_parts(weights), change)
    index = HeaderIndex((header for header, _ in weights), config, {}, layout)
    answers = [
        (header, reason or unusable(header) or layers_of(Weight(header, index)))
        for header, reason in weights
    ]
    return _select(answers, index, include, exclude)


def layers_from_module(
    module: nn.Module,
    include: Globs = None,
    exclude: Globs = None,
    *,
    change: WeightTransform | None = None,
    layout: str = "auto",
) -> Layers:
    """As `layers_from_headers`, from the types of a module's submodules too; the module is not run.

    Buffers count only where they hold a quantised weight. A parametrised, pruned or normalised
    weight, and one in a LoRA layer of PEFT, is taken as the module uses it. The first of tied
    weights is analysed.
    """
    check_module("module", module)
    check_layout(layout)
    wrappers = module_wrappers(module)
    owners: list[nn.Module] = []
    # A weight that is made of several tensors takes the position of the first.
    positions: dict[str, int] = {}
    stored: list[TensorHeader] = []
    answers: list[tuple[int, TensorHeader, list[Part] | str]] = []
    for prefix, owner in module.named_modules(remove_duplicate=False):
        for leaf, tensor, reason in own_tensors(owner, prefix):
            name = f"{prefix}.{leaf}" if prefix else leaf
            visible, elsewhere = visible_name(name, wrappers)
            lazy = isinstance(tensor, nn.parameter.UninitializedParameter)
            header = TensorHeader(
                visible,
                shape_of(tensor),
                tensor.dtype,
                None if lazy else tensor_identity(tensor),
                () if visible == name else (name,),
            )
            if parametrize.is_parametrized(owner, leaf):
                # It was computed just now and is freed: the next one may get the same address.
                header = replace(header, identity=(id(owner), leaf))
            if reason := reason or sparse_layout(tensor) or elsewhere:
                answers.append((len(owners), header, reason))
            else:
                stored.append(header)
            positions.update(dict.fromkeys(header.stored, len(owners)))
            owners.append(owner)
    config, notes = _config_of(module), module_notes(module)
    weights = reparametrised_headers(dequantised_headers(stored, config))
    weights = [_as_wrapped(weight, wrappers) for weight in weights]
    weights = _changed(merge_complex_parts(weights, notes), change)
    index = HeaderIndex((header for header, _ in weights), config, notes, layout)
    for header, reason in weights:
        position = min((positions[n] for n in header.stored if n in positions), default=len(owners))
        owned_by = owners[position] if position < len(owners) else None
        answers.append((position, header, reason or layers_of(Weight(header, index), owned_by)))
    answers.sort(key=lambda answer: answer[0])
    return _select([(header, answer) for _, header, answer in answers], index, include, exclude)


def _changed(
    weights: list[WeightCandidate], change: WeightTransform | None
) -> list[WeightCandidate]:
    if change is None:
        return weights
    if not callable(change):
        raise TypeError(f"change: expected None or a function, got {type(change).__name__}")
    return change(weights)


def _as_wrapped(weight: WeightCandidate, wrappers: Mapping[str, Wrapper]) -> WeightCandidate:
    """A weight with the updates of all LoRA layers around the module that has it."""
    path = weight.header.stored[0].rpartition(".")[0]
    while not weight.reason and path.rpartition(".")[2] == "base_layer":
        path = path.rpartition(".")[0]
        if path not in wrappers:
            break
        weight = wrappers[path].updated(weight.header)
    return weight


def _config_of(module: nn.Module) -> ModelConfig | None:
    to_dict = getattr(getattr(module, "config", None), "to_dict", None)
    entries = to_dict() if callable(to_dict) else None
    return ModelConfig.of(entries) if isinstance(entries, Mapping) else None


def _select(
    answers: Sequence[tuple[TensorHeader, list[Part] | str]],
    index: HeaderIndex,
    include: Globs,
    exclude: Globs,
) -> Layers:
    """Applies the patterns, and takes tied weights once."""
    included = None if include is None else _Patterns("include", include)
    if included is not None and not len(included):
        raise ValueError("include: expected None or at least one glob, got an empty sequence")
    excluded = _Patterns("exclude", () if exclude is None else exclude)
    layers: list[LayerSpec] = []
    skipped: list[Skipped] = []
    names: list[str] = []
    first_use: dict[Hashable, str] = {}
    for header, answer in answers:
        if isinstance(answer, str):
            name = index.layer_name(header.name)
            names.append(name)
            skipped.append(Skipped(name, header.shape, answer))
            continue
        for number, part in enumerate(answer):
            names.append(part.name)
            key = None if header.identity is None else (header.identity, len(answer), number)
            reason = _left_out(part, included, excluded)
            if not reason and key in first_use:
                reason = f"tied to {first_use[key]}"
            if reason:
                shape = part.shape if len(answer) > 1 else header.shape
                skipped.append(Skipped(part.name, shape, reason))
                continue
            if key is not None:
                first_use[key] = part.name
            combine, stack = header.combine, part.to_stack
            recipe = stack if combine is None else Computed(combine, stack)
            dtype, tensors = header.dtype, header.stored
            layers.append(LayerSpec(part.name, part.kind, tensors, part.shape, dtype, recipe))
    for patterns in filter(None, (included, excluded)):
        patterns.check(names)
    return layers, skipped


def _left_out(part: Part, included: _Patterns | None, excluded: _Patterns) -> str:
    if (pattern := excluded.match(part.name)) is not None:
        return f"excluded by {pattern!r}"
    if included is None:
        return part.left_out
    return "not matched by include" if included.match(part.name) is None else ""


class _Patterns:
    """Globs of names; those without a wildcard are looked up, so that there may be many."""

    def __init__(self, argument: str, value: Globs) -> None:
        patterns = [value] if isinstance(value, str) else value
        if not isinstance(patterns, Sequence) or not all(isinstance(p, str) for p in patterns):
            expected = "None, a glob or a sequence of globs"
            raise TypeError(f"{argument}: expected {expected}, got {value!r}")
        self.argument = argument
        self._names = {pattern for pattern in patterns if not _WILDCARD.search(pattern)}
        self._globs = [pattern for pattern in patterns if pattern not in self._names]

    def __len__(self) -> int:
        return len(self._names) + len(self._globs)

    def match(self, name: str) -> str | None:
        """The pattern that matches a whole name."""
        if name in self._names:
            return name
        return next((pattern for pattern in self._globs if fnmatchcase(name, pattern)), None)

    def check(self, names: Sequence[str]) -> None:
        """Raises ValueError unless each pattern matches one of the names."""
        known = set(names) if self._names else set()
        unmatched = sorted(self._names - known)
        unmatched += [
            pattern
            for pattern in self._globs
            if not any(fnmatchcase(name, pattern) for name in names)
        ]
        if unmatched:
            raise unmatched_pattern(self.argument, unmatched[0], names)
