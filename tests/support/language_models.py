"""Small language models of several families, randomly initialised, and a tokenizer for them."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

VOCABULARY = 101
POSITIONS = 64


def _config(cls: Any, **more: Any) -> Callable[[], Any]:
    def make() -> Any:
        return cls(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=VOCABULARY,
            max_position_embeddings=POSITIONS,
            pad_token_id=None,
            bos_token_id=0,
            eos_token_id=0,
            **more,
        )

    return make


def bert_config(**more: Any) -> Any:
    """Of a model that attends in both directions, unless `is_decoder`."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return transformers.BertConfig(
        **(sizes | {"num_attention_heads": 4, "vocab_size": VOCABULARY} | more)
    )


# Windows of attention that are shorter than the samples, so that layers have different masks.
FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": _config(transformers.LlamaConfig),
    "mistral": _config(transformers.MistralConfig, sliding_window=5),
    "qwen2": _config(transformers.Qwen2Config),
    "qwen3": _config(transformers.Qwen3Config, head_dim=8),
    "gemma": _config(transformers.GemmaConfig, head_dim=8),
    "gemma2": _config(transformers.Gemma2Config, head_dim=8, sliding_window=5),
    "gemma3": _config(
        transformers.Gemma3TextConfig,
        head_dim=8,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "opt": lambda: transformers.OPTConfig(
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        vocab_size=VOCABULARY,
        max_position_embeddings=POSITIONS,
        pad_token_id=None,
        bos_token_id=0,
        eos_token_id=0,
    ),
    "gpt2": lambda: transformers.GPT2Config(
        n_embd=32,
        n_layer=3,
        n_head=4,
        vocab_size=VOCABULARY,
        n_positions=POSITIONS,
        bos_token_id=0,
        eos_token_id=0,
    ),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        vocab_size=VOCABULARY,
        max_position_embeddings=POSITIONS,
        bos_token_id=0,
        eos_token_id=0,
    ),
}
CONTAINERS = {"opt": "model.decoder.layers", "gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers"}


def small_model(family: str = "llama", seed: int = 0) -> Any:
    """In evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family]())
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                # Larger than the usual start, so that masks and positions matter to the outputs.
                nn.init.normal_(parameter, std=0.3)
            elif name.endswith("bias"):
                nn.init.normal_(parameter, std=0.1)
    return model.eval()


def some_tokens(samples: int = 6, seqlen: int = 16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (samples, seqlen), generator=generator)


def small_tokenizer() -> Any:
    """A token for each of the words w0 to w99."""
    words = {"<unk>": 0} | {f"w{number}": number + 1 for number in range(VOCABULARY - 1)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def write_words(path: Path, count: int) -> Path:
    draw = random.Random(0)
    path.write_text(" ".join(f"w{draw.randrange(100)}" for _ in range(count)))
    return path
