"""The tensors of a model by name, for rules that need a tensor's neighbours."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property

from farms_fast.weights.model_config import ModelConfig
from farms_fast.weights.stacks import TensorHeader

__all__ = ["GPT2_LEAVES", "HeaderIndex", "is_transposed_c_attn", "is_weight", "leaf_name"]


class HeaderIndex:
    """The headers of a whole model and its config, for rules that need a tensor's neighbours.

    `notes` are what the modules tell, from `farms_fast.weights.rules.operator_layers.module_notes`.
    """

    def __init__(
        self,
        headers: Iterable[TensorHeader],
        config: ModelConfig | None = None,
        notes: Mapping[str, str] | None = None,
    ) -> None:
        self.by_name = {header.name: header for header in headers}
        self.config = config or ModelConfig()
        self.notes = notes or {}

    def layer_name(self, tensor_name: str) -> str:
        """The tensor's name without a trailing `.weight`, unless another tensor has that name."""
        base = tensor_name.removesuffix(".weight")
        return tensor_name if base in self.by_name else base

    def beside(self, tensor_name: str, leaf: str) -> TensorHeader | None:
        """The tensor `leaf` of the same module, if there is one."""
        parent, dot, _ = tensor_name.rpartition(".")
        return self.by_name.get(parent + dot + leaf)

    def sibling(self, tensor_name: str, leaf: str) -> TensorHeader | None:
        """The weight of the layer `leaf` beside that of the tensor.

        `a.down_proj` for `a.up_proj`, and `a.down_proj.weight` for `a.up_proj.weight`.
        """
        parent, dot, _ = tensor_name.removesuffix(".weight").rpartition(".")
        suffix = ".weight" if is_weight(tensor_name) else ""
        return self.by_name.get(f"{parent}{dot}{leaf}{suffix}")

    def stored_in_by_out(self, header: TensorHeader) -> bool:
        """Whether the bias proves a weight to be stored (in, out, ...), not (out, in, ...)."""
        if not is_weight(header.name) or len(header.shape) < 2:
            return False
        bias = self.beside(header.name, "bias")
        out, inputs = header.shape[:2]
        return bias is not None and bias.shape == (inputs,) and inputs != out

    @cached_property
    def has_transposed_gpt2_layers(self) -> bool:
        """Whether some `c_*` weight is proven to be stored (in, out), so that all of them are."""
        return any(
            self.stored_in_by_out(header) or is_transposed_c_attn(header)
            for header in self.by_name.values()
            if leaf_name(self.layer_name(header.name)) in GPT2_LEAVES and len(header.shape) == 2
        )


GPT2_LEAVES = frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})


def leaf_name(name: str) -> str:
    """What stands after the last dot."""
    return name.rpartition(".")[2]


def is_weight(tensor_name: str) -> bool:
    """Whether the tensor is called `weight` in its module."""
    return leaf_name(tensor_name) == "weight"


def is_transposed_c_attn(header: TensorHeader) -> bool:
    """Whether the shape alone proves a fused projection to be stored (in, out)."""
    rows, cols = header.shape
    return leaf_name(header.name.removesuffix(".weight")) == "c_attn" and cols == 3 * rows
