"""What a run will be and need.

Known before anything is downloaded or compiled.
"""

import math
import re
import shutil

from jax.sharding import Mesh

from checkpointing import find_checkpoints
from model import parameter_shapes
from outside_in.config import (
    ModelConfig,
    TrainConfig,
    devices_at_start,
    steps_per_epoch,
    tokens_per_global_step,
    with_sequences_per_step,
)
from outside_in.config_files import MAX_COUNT
from outside_in.data.builtin import find_builtin
from outside_in.data.run_length import (
    NOTHING_KNOWN,
    KnownData,
    find_data_tokenizer,
    find_lengths,
    known_data,
    total_steps,
)
from outside_in.data.sources import availability, dataset_folder
from outside_in.data.token_files import TRAIN
from outside_in.data.tokenizer import assumed
from outside_in.inference.load import find_initial_weights
from outside_in.loss import chunk_size
from outside_in.optimizer import final_learning_rate, schedule_steps
from outside_in.reports.flops import flops_per_token, formula
from outside_in.reports.loggers import check_installed
from outside_in.runtime import target
from outside_in.runtime.devices import bytes_available, initialize_devices
from outside_in.runtime.machine import memory_bytes
from outside_in.runtime.mesh import FSDP, describe_mesh, make_mesh, one_device
from outside_in.storage.run_directory import RunDirectory
from outside_in.storage.text import counted
from outside_in.update_rules import MATRIX_NDIM, count_moments, describe_rule

GIB = 2**30
BLOCK = re.compile(r"^blocks\.\d+\.")  # they are alike


def check(run: RunDirectory, model_config: ModelConfig, config: TrainConfig) -> None:
    """Print what a run will be and need: `--check`."""
    print(initialize_devices())
    mesh = make_mesh(config.mesh)
    if model_config.emb_dim > MAX_COUNT:  # what follows would not be within float64
        check_fits(model_config, config, mesh)
    try:
        status = availability(config.dataset)
    except ValueError:
        print("data: missing")
        raise
    memory = estimate_memory(model_config, config, mesh)
    print(*describe(run, model_config, config, known_data(config), mesh), memory, f"data: {status}", sep="\n")
    if not target.elsewhere():  # where other data and memory may be
        refuse(run, model_config, config, mesh)


def refuse(run: RunDirectory, model: ModelConfig, train: TrainConfig, mesh: Mesh) -> None:
    """Raise ValueError where training would, as far as headers tell."""
    check_installed(run, train.log_to)
    devices, folder = mesh.devices.size, dataset_folder(train.dataset, fetch=False)
    newest = find_checkpoints(run.checkpoints)[-1:]
    started_on = devices_at_start(train, newest[0].meta) if newest else devices
    sequences = started_on * train.gradient_accumulation_steps * train.microbatch_size
    train = with_sequences_per_step(train, sequences, devices)
    find_data_tokenizer(model, train)
    steps = (total_steps(model, train, devices) or 0) // train.epochs  # 0: of data that are not here yet
    if (folder / TRAIN).is_file():
        find_lengths(folder, model, train, steps, devices)
    find_initial_weights(run, model, train)
    tokens = steps * tokens_per_global_step(model, train, devices)
    if 2 * tokens > memory_bytes():  # uint16
        raise ValueError(f"train.json: {tokens:,} tokens do not fit into this machine's memory; use fewer tokens")
    check_fits(model, train, mesh)


def check_fits(model: ModelConfig, train: TrainConfig, mesh: Mesh) -> None:
    """Raise ValueError when a device cannot hold the parameters, their moments, and one hidden state."""
    shapes = parameter_shapes(model)
    parameters = sum(map(math.prod, shapes.values()))
    hidden = train.microbatch_size * model.context_length * model.emb_dim
    state = parameters + count_moments(train, shapes)
    if 4 * state // mesh.shape[FSDP] + 2 * hidden > bytes_available():
        what, keys = "parameters and their moments need", "emb_dim or n_layers"
        if hidden > parameters:
            what, keys = "hidden states need", "microbatch_size or context_length"
        raise ValueError(f"out of memory: {what} more than {bytes_available() / GIB:,.0f} GiB; use a smaller {keys}")


def describe(
    run: RunDirectory,
    model: ModelConfig,
    train: TrainConfig,
    data: KnownData = NOTHING_KNOWN,
    mesh: Mesh | None = None,
) -> list[str]:
    """Return the preflight, one line per subject."""
    mesh = mesh or one_device()
    devices = mesh.devices.size
    shapes = parameter_shapes(model)
    parameters = sum(map(math.prod, shapes.values()))
    tokens_per_step = tokens_per_global_step(model, train, devices)
    steps = steps_per_epoch(model, train, data.tokens, devices)
    on_each = f" on each of {devices} devices" if devices > 1 else ""
    microbatches = counted(train.gradient_accumulation_steps, "microbatch", "microbatches")
    grouped = f" ({model.n_kv_heads} of keys and values)" if model.n_kv_heads else ""
    lines = [
        f"model   {parameters:,} parameters: {counted(model.n_layers, 'layer')}, "
        f"{counted(model.n_heads, 'head')}{grouped}, "
        f"width {model.emb_dim}, context {model.context_length:,}, vocabulary {model.vocab_size:,}",
        f"step    {tokens_per_step:,} tokens: {microbatches} of "
        f"{counted(train.microbatch_size, 'sequence')}{on_each}, in {counted(train.calls_per_step, 'compiled call')}, "
        f"{train.precision}",
        *describe_mesh({BLOCK.sub("blocks.*.", name): shape for name, shape in shapes.items()}, mesh),
    ]
    if steps is None:
        lines.append(f"run     all tokens of {train.dataset}, not here yet, {counted(train.epochs, 'epoch')}")
    else:
        tokens = steps * train.epochs * tokens_per_step
        ratio = f", {tokens / parameters:.3g} tokens per parameter (20 is about compute-optimal)"
        lines.append(
            f"run     {counted(steps * train.epochs, 'step')}, {tokens:,} tokens ({counted(train.epochs, 'epoch')} of "
            f"{train.dataset}){ratio if train.objective == 'next-token' else ''}"
        )
        lines += [_learning_rate(train, steps * train.epochs, tokens_per_step)] if steps else []
    if train.optimizer != "adamw":
        lines.append(describe_rule(train, shapes))
    min_ndim = MATRIX_NDIM if train.weight_decay_on == "matrices" else 0
    decaying = sum(math.prod(shape) for shape in shapes.values() if len(shape) >= min_ndim)
    lines.append(f"decay   {train.weight_decay:g} on {decaying:,} of {parameters:,} parameters")
    if train.initial_weights is not None:
        lines.append(f"origin  the weights in {train.initial_weights}")
    lines.append(f"tokens  {_tokenizer(model, train, data)}")
    if data.leaked_share is not None:
        lines.append(
            f"data    {data.leaked_share:.1%} of validation occurs in the training tokens, according to data.json"
        )
    lines.append(f"flops   {flops_per_token(model) / 1e6:,.1f} MFLOP per token: {formula(model)}")
    lines.append(_disk(run, train, parameters, count_moments(train, shapes)))
    return lines + [f"WARNING {warning}" for warning in model.warnings()]


def _learning_rate(train: TrainConfig, total_steps: int, tokens_per_step: int) -> str:
    """Return the corner points of the learning rate's schedule."""
    warmup, decay = schedule_steps(train, total_steps, tokens_per_step)
    peak = train.learning_rate
    parts = [f"0 → {peak:g} in {counted(warmup, 'step')}" if warmup else f"{peak:g} from the first step"]
    if warmup + decay < total_steps:
        parts.append(f"constant to step {total_steps - decay:,}")
    if decay:
        shape = "cosine" if train.schedule == "cosine" else "linear"
        parts.append(f"{shape} to {final_learning_rate(train):g} at step {total_steps:,}")
    return f"rate    learning rate {', '.join(parts)}"


def _tokenizer(model: ModelConfig, train: TrainConfig, data: KnownData) -> str:
    if data.tokenizer:
        return f"of the tokenizer {data.tokenizer}"
    if builtin := find_builtin(train.dataset):  # not made yet
        return f"of a tokenizer of {builtin.vocab_size:,} ids, which is trained when training starts"
    if known := assumed(model.vocab_size):
        return f"of the tokenizer {known}, which is assumed: the data name none"
    return "of an unknown tokenizer, so there are no samples and no bits per byte; put its tokenizer.json into the data"


def estimate_memory(model: ModelConfig, train: TrainConfig, mesh: Mesh | None = None) -> str:
    """Return a line that estimates the memory of each device.

    The state is exact, the activations are an upper bound.
    """
    fsdp = (mesh or one_device()).shape[FSDP]
    shapes = parameter_shapes(model)
    parameters = sum(map(math.prod, shapes.values()))
    spread = 1 + count_moments(train, shapes) / parameters + (train.microbatches_per_call is not None)  # MultiSteps'
    copies = 1 + spread / fsdp + (fsdp > 1)  # and whole: the gradient, and what is gathered of the parameters
    copies += train.gradient_accumulation_steps > train.calls_per_step  # a microbatch's gradient beside their mean
    positions = train.microbatch_size * model.context_length
    width = {"float32": 4, "bfloat16": 2}[train.precision]  # bytes
    rows = min(positions, train.loss_rows_per_chunk or chunk_size(model.vocab_size, "gpu"))  # on the CPU it is fewer
    of_cap = 0 if model.logit_soft_cap is None else 4  # bytes
    logits = (4 + width + of_cap) * rows * model.vocab_size  # a chunk of them as float32, and their gradient
    weights = model.n_heads * model.context_length if train.drop_rate else 0  # of attention: kept if some are dropped
    inner = (3 if model.activation == "swiglu" else 2) * model.inner_width
    hidden = (12 if model.qk_norm else 8) * model.emb_dim + inner
    per_layer = positions * (hidden * width + 4 * weights)
    layers = model.n_layers * per_layer
    if train.remat == "blocks" and model.n_layers:
        layers = per_layer + model.n_layers * positions * width * model.emb_dim
    state, activations = 4 * copies * parameters, logits + layers
    return (
        f"memory  about {(state + activations) / GIB:.2f} GiB: {state / GIB:.2f} parameters, moments and gradients, "
        f"{activations / GIB:.2f} logits and activations"
    )


def _disk(run: RunDirectory, train: TrainConfig, parameters: int, moments: int) -> str:
    accumulated = parameters if train.microbatches_per_call is not None else 0
    checkpoint = 4 * (parameters + moments + accumulated)
    free = shutil.disk_usage(run.path).free
    if train.keep_checkpoints is None:
        return f"disk    {checkpoint / GIB:.2f} GiB a checkpoint, all are kept; {free / GIB:.1f} GiB free"
    needed = checkpoint * (train.keep_checkpoints + 2)  # the best one, and the one being written
    line = f"disk    {checkpoint / GIB:.2f} GiB a checkpoint, at most {needed / GIB:.2f} GiB; {free / GIB:.1f} GiB free"
    return line if needed < free else f"{line}: WARNING: not enough"
