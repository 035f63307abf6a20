# /// script
# requires-python = ">=3.11"
# dependencies = ["numpy", "pydantic>=2.12,<3", "safetensors", "torch>=2.8", "tqdm"]
# ///
"""The same model and optimizer in plain PyTorch, as its good users write them, to compare with.

The GPT of nanoGPT, https://github.com/karpathy/nanoGPT, with names and defaults of ours, so that weights fit both.
On a CPU PyTorch computes while it is called: `dispatch_seconds` is null there.
"""

import argparse
import contextlib
import math
import re
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent.parent))  # this program has an environment of its own, without the project

import numpy as np
import shapes
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from outside_in.config import ModelConfig, TrainConfig, tokens_per_global_step
from outside_in.runtime import cli

INIT_STD = 0.02
START_FACTOR, END_FACTOR = 1e-5, 0.1  # of the peak learning rate
ATTENTION = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


class CausalSelfAttention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_heads = config.n_heads
        self.query_key_value = nn.Linear(config.emb_dim, 3 * config.emb_dim, bias=config.qkv_bias)
        self.output = nn.Linear(config.emb_dim, config.emb_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        heads = (batch, length, self.n_heads, width // self.n_heads)
        q, k, v = (part.view(heads).transpose(1, 2) for part in self.query_key_value(x).chunk(3, dim=-1))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.output(mixed.transpose(1, 2).reshape(x.shape))


class FeedForward(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.expand = nn.Linear(config.emb_dim, 4 * config.emb_dim)
        self.project = nn.Linear(4 * config.emb_dim, config.emb_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.project(functional.gelu(self.expand(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.emb_dim)
        self.attention = CausalSelfAttention(config)
        self.feed_forward_norm = nn.LayerNorm(config.emb_dim)
        self.feed_forward = FeedForward(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.feed_forward_norm(x))


class GPT(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.emb_dim)
        self.position_embedding = nn.Embedding(config.context_length, config.emb_dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.output_norm = nn.LayerNorm(config.emb_dim)
        self.head = nn.Linear(config.emb_dim, config.vocab_size, bias=False)
        if config.tied_head:
            self.head.weight = self.token_embedding.weight
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif "norm" not in name:
                is_residual = name.endswith(("attention.output.weight", "project.weight"))
                nn.init.normal_(parameter, std=INIT_STD / (2 * config.n_layers) ** 0.5 if is_residual else INIT_STD)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the mean loss."""
        x = self.token_embedding(tokens) + self.position_embedding(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return functional.cross_entropy(self.head(self.output_norm(x)).flatten(0, 1), targets.flatten())


def load_our_weights(path: Path, model: GPT, config: ModelConfig) -> None:
    """Put the weights of a `model.safetensors` of ours into the model; kernels are stored the other way round."""
    weights = {
        re.sub(r"\.(embedding|scale|kernel)$", ".weight", name): array.T if name.endswith(".kernel") else array
        for name, array in load_file(path).items()
    }
    if config.tied_head:
        weights["head.weight"] = weights["token_embedding.weight"]
    model.load_state_dict(weights)


def share_of_peak(train: TrainConfig, step: int) -> float:
    """Return the learning rate of global step `step` (from 0): linear warm-up, then a cosine."""
    warmup = int(shapes.SCHEDULE_STEPS * train.warmup_period_percent / 100)
    if step < warmup:
        return START_FACTOR + (1 - START_FACTOR) * step / warmup
    progress = min((step - warmup) / (shapes.SCHEDULE_STEPS - warmup), 1)
    return END_FACTOR + (1 - END_FACTOR) * (1 + math.cos(math.pi * progress)) / 2


class PyTorch:
    def __init__(self, args: argparse.Namespace, config: ModelConfig, train: TrainConfig) -> None:
        torch.manual_seed(train.seed)
        torch.set_float32_matmul_precision("high")  # TF32 on a GPU, as JAX takes by itself
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.steps_ahead = int(self.device.type == "cuda")
        self.config, self.train = config, train
        self.attention = partial(sdpa_kernel, ATTENTION[args.attention]) if args.attention else contextlib.nullcontext
        self.tokens = shapes.load_tokens(args, config, train)
        self.model = GPT(config).to(self.device)
        if args.weights:
            load_our_weights(args.weights, self.model, config)
        self.mean_loss = torch.compile(self.model, mode=args.compile) if args.compile else self.model
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=train.learning_rate,
            betas=(train.beta1, train.beta2),
            eps=train.epsilon,
            weight_decay=train.weight_decay,
            fused=True,
        )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, partial(share_of_peak, train))
        self.global_step = 0
        self.place_batch()

    def place_batch(self) -> None:
        per_step = tokens_per_global_step(self.config, self.train)
        first = self.global_step % ((len(self.tokens) - 1) // per_step) * per_step
        tokens = torch.from_numpy(self.tokens[first : first + per_step + 1].astype(np.int64))
        if self.device.type == "cuda":
            tokens = tokens.pin_memory().to(self.device, non_blocking=True)
        shape = (self.train.gradient_accumulation_steps, self.train.microbatch_size, self.config.context_length)
        self.batch = tokens[:-1].view(shape), tokens[1:].view(shape)

    def start_step(self) -> tuple[torch.Tensor, float | None]:
        began = time.perf_counter()
        step_loss = torch.zeros((), device=self.device)
        half = self.train.precision == "bfloat16"
        for inputs, targets in zip(*self.batch, strict=True):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=half), self.attention():
                loss = self.mean_loss(inputs, targets) / self.train.gradient_accumulation_steps
            loss.backward()
            step_loss += loss.detach()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.train.clipping_max_norm or math.inf)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.global_step += 1
        return step_loss, time.perf_counter() - began if self.steps_ahead else None

    def loss(self, started: torch.Tensor) -> float:
        return started.item()

    def product(self, size: int) -> Callable[[], Any]:
        matrix = torch.randn(size, size, device=self.device, dtype=getattr(torch, self.train.precision))

        def multiply() -> None:
            matrix @ matrix
            if self.device.type == "cuda":
                torch.cuda.synchronize()

        return multiply

    def describe(self) -> dict[str, Any]:
        on_gpu = self.device.type == "cuda"
        return {
            "device": torch.cuda.get_device_name() if on_gpu else "cpu",
            "versions": {"torch": torch.__version__},
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "peak_device_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        }


def main(args: argparse.Namespace) -> int:
    return shapes.run(args, PyTorch)


def make_parser() -> cli.ArgumentParser:
    parser = shapes.make_parser("Measure the same training in PyTorch; prints one JSON object.")
    parser.add_argument(
        "--compile",
        nargs="?",
        const="default",
        metavar="MODE",
        help="torch.compile, in this mode of it if one is named",
    )
    parser.add_argument("--attention", choices=ATTENTION, help="the implementation; else PyTorch chooses")
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
