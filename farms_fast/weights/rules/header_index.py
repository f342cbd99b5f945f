"""A weight as the rules see it: its header, its names and its neighbours in the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property

from farms_fast.weights.model_config import ModelConfig
from farms_fast.weights.stacks import TensorHeader, leaf_name

# Of a module's main weight, so that only the module's name says what it is for.
_MAIN_LEAVES = frozenset({"weight", "kernel", "w", "weights", "table"})
# Names of layers that GPT-2 stores (in, out).
_GPT2_LEAVES = frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})
# No usual convolution has more positions along a dimension.
MOST_POSITIONS = 31


class HeaderIndex:
    """The weights of a model by name, its config, and `operator_layers.module_notes` of it.

    `layout` is one of `LAYOUTS`.
    """

    def __init__(
        self,
        headers: Iterable[TensorHeader],
        config: ModelConfig | None,
        notes: Mapping[str, str],
        layout: str = "auto",
    ) -> None:
        self.layout = layout
        self.by_name = {header.name: header for header in headers}
        self.config = config or ModelConfig()
        self.notes = notes

    def layer_name(self, tensor_name: str) -> str:
        """The tensor's name without a trailing `.weight`, unless another tensor has that name."""
        base = tensor_name.removesuffix(".weight")
        return tensor_name if base in self.by_name else base

    def sibling_layer(self, tensor_name: str, leaf: str) -> TensorHeader | None:
        """`a.down_proj` for `a.up_proj`, and `a.down_proj.weight` for `a.up_proj.weight`."""
        parent, dot, _ = tensor_name.removesuffix(".weight").rpartition(".")
        suffix = ".weight" if leaf_name(tensor_name) == "weight" else ""
        return self.by_name.get(f"{parent}{dot}{leaf}{suffix}")

    @cached_property
    def kernel_layout(self) -> str:
        """The layout of the kernels that prove theirs, empty where they prove none or several."""
        weights = (Weight(header, self) for header in self.by_name.values())
        proven = {weight.proven_layout for weight in weights if weight.is_kernel} - {""}
        return proven.pop() if len(proven) == 1 else ""

    @cached_property
    def has_transposed_gpt2_layers(self) -> bool:
        """Whether some `c_*` weight is proven to be stored (in, out), so that all of them are."""
        weights = (Weight(header, self) for header in self.by_name.values())
        return any(
            weight.bias_proves_transposed or weight.is_transposed_c_attn
            for weight in weights
            if weight.has_gpt2_name and weight.rank == 2
        )


class Weight:
    """A tensor that the rules make layers of, in its model.

    `name` is the layer's, `leaf` the tensor's within its module.
    """

    def __init__(self, header: TensorHeader, index: HeaderIndex) -> None:
        self.header, self.index = header, index
        self.shape, self.rank = header.shape, len(header.shape)
        self.name, self.leaf = index.layer_name(header.name), header.leaf

    @cached_property
    def bias(self) -> TensorHeader | None:
        """The bias beside a main weight."""
        return self.same_module("bias") if self.leaf in _MAIN_LEAVES else None

    @cached_property
    def role(self) -> str:
        """What the model calls it: the name of its module, or its own if that says more."""
        if self.leaf not in _MAIN_LEAVES:
            return self.leaf
        return leaf_name(self.header.module) or self.leaf

    def same_module(self, leaf: str) -> TensorHeader | None:
        """The tensor `leaf` of the same module, if there is one."""
        return self.index.by_name.get(self.header.neighbour(leaf))

    @property
    def is_kernel(self) -> bool:
        """Whether its name is that of a convolution's weight outside of torch."""
        by_name = self.leaf.endswith("kernel") or (self.leaf in ("w", "weights") and self.rank > 3)
        return by_name and 2 < self.rank < 6 and not self.header.dtype.is_complex

    @property
    def proven_layout(self) -> str:
        """The one layout that its shape and bias allow, empty where that is none or both.

        Channels are at least as many as positions along a dimension. Projections to several heads
        have shapes like kernels too, so for torch's layout it takes more: the bias, or positions
        as many along each dimension.
        """
        count = self.rank - 2
        by_shape = max(self.shape[:count]) <= max(self.shape[count:])
        positions = self.shape[2:]
        torch_by_shape = max(positions) <= max(self.shape[:2])
        equal = count > 1 and len(set(positions)) == 1 and positions[0] <= MOST_POSITIONS
        bias = self.bias.shape if self.bias is not None else ()
        if len(bias) == 1 and (bias[0] in self.shape[:2]) != (bias[0] in self.shape[count:]):
            by_shape &= bias[0] in self.shape[count:]
            torch_by_shape &= bias[0] in self.shape[:2]
            equal = True
        if by_shape == torch_by_shape:
            return ""
        return "channels_last" if by_shape else "torch" if equal else ""

    @property
    def bias_proves_transposed(self) -> bool:
        """Whether it is stored (in, out, ...): its bias has the length of the second dimension."""
        if self.leaf != "weight" or self.bias is None or self.rank < 2:
            return False
        out, inputs = self.shape[:2]
        return self.bias.shape == (inputs,) and inputs != out

    @property
    def has_gpt2_name(self) -> bool:
        """Whether GPT-2 stores a layer of this name (in, out)."""
        return leaf_name(self.name) in _GPT2_LEAVES

    @property
    def is_transposed_c_attn(self) -> bool:
        """Whether the shape alone proves a fused projection to be stored (in, out)."""
        rows, cols = self.shape
        return leaf_name(self.header.name.removesuffix(".weight")) == "c_attn" and cols == 3 * rows

    @property
    def is_transposed(self) -> bool:
        """Whether a matrix is stored (in, out): proven, or of a GPT-2 whose other layers are."""
        if self.bias_proves_transposed or not self.has_gpt2_name:
            return self.bias_proves_transposed
        # A square weight proves nothing by itself, but the layout is one for the whole model.
        square = self.shape[0] == self.shape[1]
        return self.is_transposed_c_attn or (square and self.index.has_transposed_gpt2_layers)
