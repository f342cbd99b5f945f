"""What a model's config.json says and the headers of its tensors do not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_HEADS = ("num_attention_heads", "n_head", "n_heads")
_KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "kv_n_heads")
# query_key_value of these goes head by head: q, k and v of one head together.
_HEAD_BY_HEAD = frozenset({"gpt_neox", "gpt_neox_japanese", "bloom", "persimmon"})


@dataclass(frozen=True)
class ModelConfig:
    """The entries of a config that matter here; zero or empty where it has none.

    `heads` counts query heads, `key_heads` key heads, each with one value head; `position_groups`
    those of the convolution that makes positions (wav2vec 2.0).
    """

    model_type: str = ""
    heads: int = 0
    key_heads: int = 0
    head_dim: int = 0
    position_groups: int = 0
    quantization: Mapping[str, Any] = field(default_factory=dict)
    _new_falcon: bool = False
    _multi_query: bool = False

    @classmethod
    def of(cls, entries: Mapping[str, Any]) -> ModelConfig:
        """From the entries of a config.json; ignores what it does not understand."""
        quantization = entries.get("quantization_config") or entries.get("compression_config")
        # Models of several modalities nest the language model's entries.
        text = entries.get("text_config")
        if isinstance(text, Mapping) and not _count(entries, _HEADS):
            quantization = quantization or text.get("quantization_config")
            entries = text
        heads = _count(entries, _HEADS)
        width = _count(entries, ("hidden_size", "n_embd", "d_model"))
        attention = entries.get("attn_config")  # MPT and DBRX
        nested = attention if isinstance(attention, Mapping) else {}
        multi_query = entries.get("multi_query") is True
        key_heads = _count(entries, _KEY_HEADS) or _count(nested, _KEY_HEADS)
        key_heads = key_heads or (min(1, heads) if multi_query else heads)
        return cls(
            model_type=str(entries.get("model_type", "")),
            heads=heads,
            key_heads=key_heads,
            head_dim=_count(entries, ("head_dim",)) or (width // heads if heads else 0),
            position_groups=_count(entries, ("num_conv_pos_embedding_groups",)),
            quantization=quantization if isinstance(quantization, Mapping) else {},
            _new_falcon=entries.get("new_decoder_architecture") is True,
            _multi_query=multi_query,
        )

    def grouped_heads(self, leaf: str) -> tuple[int, int] | None:
        """The number of head groups of a fused projection and of query heads in each, if known."""
        if not self.heads or not self.key_heads or self.heads % self.key_heads:
            return None
        by_key_head = (self.key_heads, self.heads // self.key_heads)
        if leaf == "wqkv" and self.model_type.startswith("internlm2"):
            return by_key_head
        if leaf == "c_attn" and self.model_type == "gpt_bigcode":
            return None if self._multi_query else (self.heads, 1)
        if leaf != "query_key_value":
            return None
        if self.model_type in ("falcon", "RefinedWeb", "RefinedWebModel"):
            if self._new_falcon or self.model_type == "RefinedWeb":
                return by_key_head
            # Of several query heads and one key head, or of as many key heads.
            multi = self._multi_query or self.model_type == "RefinedWebModel"
            return (1, self.heads) if multi else (self.heads, 1)
        return (self.heads, 1) if self.model_type in _HEAD_BY_HEAD else None

    @property
    def quantised_by(self) -> str:
        """The quantisation method's name, empty when the config names none."""
        return str(self.quantization.get("quant_method") or "") if self.quantization else ""


def _count(entries: Mapping[str, Any], names: tuple[str, ...]) -> int:
    for name in names:
        value = entries.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return 0
