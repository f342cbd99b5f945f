"""A small Llama, trained on tokens."""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Size:
    """What a model is and how it is trained."""

    vocabulary: int
    hidden: int
    inner: int
    layers: int
    heads: int
    seqlen: int
    batch: int
    peak_rate: float = 1e-3

    def model(self, seed: int) -> nn.Module:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=self.vocabulary,
                hidden_size=self.hidden,
                intermediate_size=self.inner,
                num_hidden_layers=self.layers,
                num_attention_heads=self.heads,
                num_key_value_heads=self.heads,
                max_position_embeddings=self.seqlen,
                tie_word_embeddings=False,
                bos_token_id=0,
                eos_token_id=0,
                pad_token_id=None,
                use_cache=False,
            )
        )


@dataclass(frozen=True)
class Training:
    """What a training has done."""

    steps: int
    tokens: int
    seconds: float
    loss: float


def train(
    model: nn.Module,
    size: Size,
    tokens: torch.Tensor,
    *,
    seed: int,
    seconds: float | None = None,
    steps: int | None = None,
) -> Training:
    """Trains with AdamW on windows at random, for a number of steps or for a time.

    The rate rises over the first twentieth and falls as a cosine to a tenth of its peak. With a
    time, how far a training is goes by the clock, so that it ends on time on any machine; with a
    number of steps it repeats itself.
    """
    device = next(model.parameters()).device
    on_gpu = device.type == "cuda"
    text = tokens.to(device)
    generator = torch.Generator(device=device).manual_seed(seed)
    offsets = torch.arange(size.seqlen, device=device)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
        lr=size.peak_rate,
        betas=(0.9, 0.95),
        fused=on_gpu,
    )
    precision = torch.autocast("cuda", dtype=torch.bfloat16) if on_gpu else contextlib.nullcontext()
    model.train()
    start = time.perf_counter()
    done, last, loss = 0, 0.0, torch.zeros(())
    while True:
        part = done / steps if steps is not None else (time.perf_counter() - start) / (seconds or 0)
        if part >= 1:
            break
        warm = min(1.0, part / 0.05 + 1e-3)
        rate = size.peak_rate * warm * (0.55 + 0.45 * math.cos(math.pi * part))
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts = torch.randint(
            len(text) - size.seqlen, (size.batch, 1), generator=generator, device=device
        )
        window = text[starts + offsets]
        with precision:
            loss = model(input_ids=window, labels=window).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done += 1
        # Reading the loss waits for the device: without it the clock runs ahead of the work.
        if done % 20 == 0 or not on_gpu:
            last = float(loss.detach())
    last = float(loss.detach())
    model.eval()
    return Training(done, done * size.batch * size.seqlen, time.perf_counter() - start, last)
