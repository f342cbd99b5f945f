"""Runs our recipes in llm-compressor itself: python -m tests.recipe_in_llmcompressor.

Not one of the tests, for llm-compressor wants a transformers of its own. Prints, for every recipe,
the largest difference between a layer's sparsity and its ratio.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from farms_fast.adapters.pruning.allocation import allocate_sparsity
from farms_fast.adapters.pruning.recipe import to_recipe
from farms_fast.adapters.pruning.sparsities import Allocation

LAYERS = {
    "self_attn.q_proj": 64 * 64,
    "self_attn.k_proj": 64 * 32,
    "self_attn.v_proj": 64 * 32,
    "self_attn.o_proj": 64 * 64,
    "mlp.gate_proj": 64 * 128,
    "mlp.up_proj": 64 * 128,
    "mlp.down_proj": 64 * 128,
}


def worst_difference(
    folder: str, method: str, allocation: Allocation, n_m: dict[str, tuple[int, int]] | None
) -> float:
    from datasets import Dataset
    from llmcompressor import oneshot
    from transformers import AutoTokenizer, LlamaForCausalLM

    recipe = Path(folder) / "recipe.yaml"
    recipe.write_text(to_recipe(method, allocation, n_m=n_m), encoding="utf-8")
    model = LlamaForCausalLM.from_pretrained(folder)
    tokens = torch.randint(100, (16, 32), generator=torch.Generator().manual_seed(0))
    oneshot(
        model=model,
        recipe=str(recipe),
        dataset=Dataset.from_dict(
            {"input_ids": tokens.tolist(), "attention_mask": [[1] * 32] * 16}
        ),
        processor=AutoTokenizer.from_pretrained(folder),
        max_seq_length=32,
        num_calibration_samples=16,
    )
    return max(
        abs(
            float((model.get_submodule(name).weight == 0).float().mean())
            - (ratio if n_m is None else 1 - n_m[name][0] / n_m[name][1])
        )
        for name, ratio in allocation.ratios.items()
    )


def main() -> None:
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {"[UNK]": 0, **{f"w{number}": number for number in range(1, 100)}}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="[UNK]")),
        unk_token="[UNK]",
        pad_token="[UNK]",
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=100,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
        )
    )
    names = [f"model.layers.{block}.{layer}" for block in range(3) for layer in LAYERS]
    alphas = dict(zip(names, (2 + 3 * torch.rand(len(names))).tolist(), strict=True))
    params = dict(zip(names, [*LAYERS.values()] * 3, strict=True))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        for sparsity, epsilon, level in (
            (0.7, 0.2, "block"),
            (0.7, 0.2, "layer"),
            (0.85, 0.5, "block"),
        ):
            allocation = allocate_sparsity(alphas, sparsity, epsilon, level, params=params)  # type: ignore[arg-type]
            for method in ("sparsegpt", "wanda"):
                for patterns in (None, allocation.n_m(8)):
                    worst = worst_difference(folder, method, allocation, patterns)
                    print(
                        f"{method} {sparsity:g} by {level}{' N:8' if patterns else ''}: "
                        f"off by at most {worst:.4f}"
                    )


if __name__ == "__main__":
    main()
