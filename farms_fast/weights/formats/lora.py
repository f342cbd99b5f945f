"""Low-rank adaptation (LoRA, arXiv 2106.09685): weights together with their updates.

The effective weight is `W + scaling * B @ A`, with `scaling = alpha / r` or, rank-stabilised
(arXiv 2312.03732), `alpha / sqrt(r)`. DoRA (arXiv 2402.09353) scales each row to a trained length.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from farms_fast.weights.recipes import Recipe
from farms_fast.weights.stacks import TensorHeader, ToTensor, WeightCandidate

# Before the adapter's names in `LayerSpec.tensors`, to tell them from the base's.
ADAPTER_PREFIX = "adapter:"
UPDATED_PARAMETER = "parameter with a LoRA update, which is read of layers only"
_ROWS = 512  # that are updated at once, in float64
# Ways to begin training that also change the base.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_PART = re.compile(
    r"(?P<target>.+)\.(?P<what>lora_A|lora_B|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector)(?:\.(?P<adapter>(?!weight$|bias$)[^.]+))?(?P<leaf>\.weight|\.bias)?"
)
_FOREIGN = re.compile(r"(?P<target>.+?)\.(?:lora_\w+|token_adapter|trainable_tokens_\w+)(?:\.|$)")


@dataclass(frozen=True)
class LoraUpdate:
    """One update `scaling * B @ A`.

    `transposed` says that the weight is stored (in, out), `dora` that rows have trained lengths.
    """

    scaling: float
    transposed: bool = False
    dora: bool = False


@dataclass(frozen=True)
class ApplyLoraUpdates(Recipe, name="lora/1"):
    """A weight with its updates, computed in float64 and rounded once.

    Takes the tensors of the base weight, then A, B and, for DoRA, the magnitudes of each update.
    """

    base: ToTensor | None
    base_tensors: int
    updates: tuple[LoraUpdate, ...]

    def __call__(self, *tensors: Tensor) -> Tensor:
        """A new tensor of the weight's shape, in float32 at least."""
        base, others = tensors[: self.base_tensors], tensors[self.base_tensors :]
        weight = base[0] if self.base is None else self.base(*base)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        result = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        transposed = self.updates[0].transposed
        before = _as_matrix(weight, transposed)
        after = _as_matrix(result, transposed)  # a view: `result` is contiguous
        factors: list[tuple[LoraUpdate, Tensor, Tensor, Tensor | None]] = []
        rest = iter([tensor.to(weight.device, torch.float64) for tensor in others])
        for update in self.updates:
            a, b = next(rest).flatten(1), next(rest).flatten(1)
            factors.append((update, a, b, next(rest).flatten() if update.dora else None))
        for start in range(0, len(before), _ROWS):
            rows = slice(start, start + _ROWS)
            block = before[rows].to(torch.float64)
            for update, a, b, length in factors:
                block = torch.addmm(block, b[rows], a, alpha=update.scaling)
                if length is not None:
                    block *= length[rows].unsqueeze(1) / torch.linalg.vector_norm(
                        block, dim=1, keepdim=True
                    )
            after[rows] = block
        return result


def _as_matrix(weight: Tensor, transposed: bool) -> Tensor:
    return weight.mT if transposed else weight.flatten(1)


def is_transposed(
    shape: Sequence[int], a: Sequence[int], b: Sequence[int], fan_in_fan_out: bool
) -> bool | str:
    """Whether the weight is stored (in, out), or why the update does not fit it."""
    fits = len(a) > 1 and len(b) > 1 and a[0] == b[1] and math.prod(b[2:]) == 1 and len(shape) > 1
    straight = fits and tuple(shape) == (b[0], *a[1:])
    exchanged = fits and tuple(shape) == (math.prod(a[1:]), b[0])
    if not straight and not exchanged:
        return f"A {tuple(a)} and B {tuple(b)} do not make a {tuple(shape)}"
    return exchanged and (fan_in_fan_out or not straight)


def not_real(dtypes: Iterable[torch.dtype]) -> str:
    """Why weight and factors of these dtypes are not added; updates are computed in float64."""
    return "complex numbers" if any(dtype.is_complex for dtype in dtypes) else ""


def not_applied(base: TensorHeader, problem: str) -> WeightCandidate:
    """The weight, not analysed because its update is not understood."""
    return WeightCandidate(base, f"weight whose LoRA update cannot be applied: {problem}")


def with_updates(
    base: TensorHeader, updates: Sequence[LoraUpdate], tensors: Sequence[str]
) -> WeightCandidate:
    """The weight `base` with updates, whose tensors are `tensors` in their order."""
    dtype = torch.promote_types(base.dtype, torch.float32)
    recipe = ApplyLoraUpdates(base.combine, len(base.stored), tuple(updates))
    stored = (*base.stored, *tensors)
    return WeightCandidate(TensorHeader(base.name, base.shape, dtype, None, stored, recipe))


@dataclass
class _Target:
    """The tensors of one target by their role, and why they cannot be applied."""

    parts: dict[str, TensorHeader] = field(default_factory=dict)
    problem: str = ""


class Adapter:
    """The tensors of a PEFT adapter, and what they make of the weights of a base model."""

    def __init__(
        self, config: Mapping[str, Any], headers: Sequence[TensorHeader], description: str
    ) -> None:
        self._config, self._description = config, description
        self._check_config()
        self._targets: dict[str, _Target] = {}
        self._replaced: dict[str, TensorHeader] = {}
        self._biases: list[TensorHeader] = []
        adapters: set[str] = set()
        for header in headers:
            name = header.name.removeprefix("base_model.model.")
            match = _PART.fullmatch(name)
            foreign = _FOREIGN.match(name)
            if match is not None and match["leaf"] != ".bias":
                adapters.add(match["adapter"] or "")
                target = self._targets.setdefault(match["target"], _Target())
                target.parts[re.sub("lora_(embedding_)?", "", match["what"])] = header
            elif match is not None:
                self._biases.append(header)
            elif foreign is not None:
                target = self._targets.setdefault(foreign["target"], _Target())
                target.problem = f"{name.removeprefix(foreign['target'] + '.')} is not understood"
                target.parts[name] = header
            else:
                plain = re.sub(r"\.(base_layer|modules_to_save(\.default)?)(?=\.)", "", name)
                self._replaced[plain] = header
        if len(adapters) > 1:
            names = ", ".join(sorted(adapters))
            raise self._error(f"expected the tensors of one adapter, got {len(adapters)}: {names}")

    def _error(self, problem: str) -> ValueError:
        return ValueError(f"{self._description}: {problem}")

    def __call__(self, weights: Sequence[WeightCandidate]) -> list[WeightCandidate]:
        """The weights of the base with the adapter's changes, or why one does not fit."""
        by_name = {weight.header.name: number for number, weight in enumerate(weights)}
        result = [self._unless_parameter(weight) for weight in weights]
        appended = [WeightCandidate(header) for header in self._biases]
        for name, header in self._replaced.items():
            number = _number_of(name, by_name)
            own_name = name if number is None else weights[number].header.name
            tensors = (ADAPTER_PREFIX + header.name,)
            stored = TensorHeader(own_name, header.shape, header.dtype, header.identity, tensors)
            if number is None:
                appended.append(WeightCandidate(stored))
            else:
                result[number] = WeightCandidate(stored)
        missing = 0
        for target, entry in self._targets.items():
            number = _number_of(f"{target}.weight", by_name)
            if number is None:
                missing += 1
                part = next(iter(entry.parts.values()))
                header = TensorHeader(f"{target}.weight", part.shape, part.dtype)
                reason = "LoRA update of a weight that the base does not have"
                appended.append(WeightCandidate(header, reason))
            elif not result[number].reason:
                result[number] = self._updated(target, entry, result[number].header)
        if self._targets and missing == len(self._targets):
            first = next(iter(self._targets))
            raise self._error(
                f"expected updates of weights of the base, got none among {missing} (the first is"
                f" for {first + '.weight'!r}): is it another model's adapter?"
            )
        return result + appended

    def _unless_parameter(self, weight: WeightCandidate) -> WeightCandidate:
        """The weight, with a reason if the adapter changes it as a bare parameter."""
        names = self._config.get("target_parameters")
        names = names if isinstance(names, (list, tuple)) else ()
        if any(f".{weight.header.name}".endswith(f".{name}") for name in names):
            return WeightCandidate(weight.header, UPDATED_PARAMETER)
        return weight

    def _updated(self, target: str, entry: _Target, base: TensorHeader) -> WeightCandidate:
        a, b, length = (entry.parts.get(what) for what in ("A", "B", "magnitude_vector"))
        if entry.problem:
            return not_applied(base, entry.problem)
        if a is None or b is None:
            return not_applied(base, f"it has no lora_{'B' if b is None else 'A'}")
        fan_in_fan_out = self._config.get("fan_in_fan_out") is True
        transposed = is_transposed(base.shape, a.shape, b.shape, fan_in_fan_out)
        if isinstance(transposed, str):
            return not_applied(base, transposed)
        if length is not None and "embedding" in a.name:
            return not_applied(base, "DoRA of an embedding")
        if length is not None and math.prod(length.shape) != b.shape[0]:
            return not_applied(base, f"a magnitude of shape {length.shape} for {b.shape[0]} rows")
        parts = [a, b] if length is None else [a, b, length]
        if problem := not_real([base.dtype, *(part.dtype for part in parts)]):
            return not_applied(base, problem)
        update = LoraUpdate(self._scaling(target, a), transposed, length is not None)
        return with_updates(base, [update], [ADAPTER_PREFIX + part.name for part in parts])

    def _scaling(self, target: str, a: TensorHeader) -> float:
        rank = a.shape[0]
        expected = self._of_pattern("rank_pattern", target, "r", rank)
        if expected != rank:
            wanted = f"expected rank {expected:g} as in the config"
            raise self._error(f"{a.name}: {wanted}, got shape {a.shape}")
        alpha = self._of_pattern("alpha_pattern", target, "lora_alpha", math.nan)
        if math.isnan(alpha):
            raise self._error("expected a number as lora_alpha, got none")
        return alpha / (math.sqrt(rank) if self._config.get("use_rslora") is True else rank)

    def _of_pattern(self, patterns: str, target: str, entry: str, default: float) -> float:
        """PEFT's rule: the first pattern that matches the end of the target's name."""
        value = self._config.get(entry, default)
        table = self._config.get(patterns)
        for pattern, other in table.items() if isinstance(table, Mapping) else ():
            try:
                matches = re.match(rf"(.*\.)?({pattern})$", target)
            except re.error as error:
                raise self._error(
                    f"expected a regular expression in {patterns}, got {pattern!r}: {error}"
                ) from None
            if matches:
                value = other
                break
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise self._error(f"expected a number as {entry}, got {value!r}")
        return float(value)

    def _check_config(self) -> None:
        kind = self._config.get("peft_type", "LORA")
        if kind != "LORA":
            raise self._error(f"expected an adapter of peft_type 'LORA', got {kind!r}")
        start = self._config.get("init_lora_weights", True)
        if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
            raise self._error(
                "expected an adapter of the base as it is, got one with init_lora_weights="
                f"{start!r}, which has changed its base: convert it to a plain LoRA adapter first"
                " (PEFT's save_pretrained does so)"
            )
        if self._config.get("layer_replication"):
            raise self._error("expected no layer_replication, got one")


def _number_of(name: str, by_name: Mapping[str, int]) -> int | None:
    """The number of a weight of the base; one of the two names may have a prefix more."""
    pieces = name.split(".")
    for first in range(len(pieces) - 1):
        if (number := by_name.get(".".join(pieces[first:]))) is not None:
            return number
    longer = [number for other, number in by_name.items() if other.endswith(f".{name}")]
    return longer[0] if len(longer) == 1 else None
