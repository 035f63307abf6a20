"""What the two JAX programs share: the model and the tokens that they start from, and what they say of the machine."""

import argparse
from collections.abc import Callable
from typing import Any

import flax
import jax
import optax
from shapes import load_tokens

from model import GPTModel, count_parameters, model_of
from outside_in.config import ModelConfig, TrainConfig
from outside_in.data.loader import TokenStream
from outside_in.weights import load_model


def make_model(args: argparse.Namespace, config: ModelConfig, train: TrainConfig) -> GPTModel:
    model = model_of(config, train)
    if args.weights:
        load_model(args.weights, model)
    return model


def make_stream(args: argparse.Namespace, config: ModelConfig, train: TrainConfig) -> TokenStream:
    tokens = jax.device_put(load_tokens(args, config, train), jax.local_devices(backend="cpu")[0])
    shape = (train.gradient_accumulation_steps, train.microbatch_size, config.context_length)
    return TokenStream(tokens, shape, train.objective, train.seed, train.shuffle)


def describe(config: ModelConfig) -> dict[str, Any]:
    peak_bytes = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return {**versions(), "parameters": count_parameters(config), "peak_device_bytes": peak_bytes}


def versions() -> dict[str, Any]:
    libraries = {module.__name__: module.__version__ for module in (jax, flax, optax)}
    return {"device": jax.local_devices()[0].device_kind, "versions": libraries}


def product(size: int, precision: str) -> Callable[[], Any]:
    matrix = jax.random.normal(jax.random.key(0), (size, size), precision)
    return lambda: (matrix @ matrix).block_until_ready()
