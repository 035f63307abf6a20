"""What a run would need and reach on a GPU that is not there: its training step, compiled for that card.

Needs JAX's CUDA wheels, but no driver: https://docs.jax.dev/en/latest/aot.html. XLA then knows the memory exactly, and
every kernel; how long those take is bounded from below by `reports.roofline`.
"""

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta

import jax
import jax._src.cudnn.fused_attention_stablehlo as cudnn
from jax.experimental import topologies

from outside_in.config import ModelConfig, TrainConfig, steps_per_epoch, tokens_per_global_step
from outside_in.data.run_length import known_data
from outside_in.diagnostics import memory, preflight
from outside_in.layers.kernels import describe_attention
from outside_in.reports import hlo, roofline
from outside_in.reports.cards import CARDS, Card
from outside_in.reports.flops import mfu
from outside_in.reports.roofline import ATTENTION, Account, Bound, Rates
from outside_in.runtime import target
from outside_in.runtime.mesh import make_mesh
from outside_in.storage.run_directory import RunDirectory
from outside_in.storage.text import counted

MEMORY_SHARE = 0.75  # of a GPU's, that JAX takes unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise
REACHED_FLOPS, REACHED_BYTES = 0.8, 0.9  # of the data sheet, by large products and passes on an H200
NOT_IN_IT = (
    "the least time of bytes and products, not a measurement. Not in it: gaps between kernels, kernels below their "
    "best rate, softmax, GELU and norms, validation, checkpoints. docs/performance.md compares it with real steps"
)


@contextlib.contextmanager
def compiling_for(name: str, count: int) -> Iterator[Card]:
    """Compile for `count` cards inside the block. Raises ValueError when that is not possible."""
    card = CARDS[name]
    # To lower cuDNN's attention, JAX asks the GPU that is here, and offers no public way to name another.
    cudnn.check_compute_capability = lambda capability: card.architecture.capability >= _numbers(capability)
    cudnn.is_cuda_compute_capability_equal = lambda capability: card.architecture.capability == _numbers(capability)
    try:
        topology = topologies.get_topology_desc(
            name, platform="cuda", topology=f"1x{count}x1", target_config=card.target_config
        )
    except NotImplementedError:
        raise ValueError(
            f"--device {name}: expected JAX's CUDA wheels, which are not installed; on Linux, "
            f"uv run --group cuda train.py RUN --check --device {name} installs them (5.4 GB)"
        ) from None
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"--device {name}: XLA does not know such a card: {_first_line(error)}") from error
    share = float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", MEMORY_SHARE))
    with target.compiling_for(target.Target(topology.devices, share * card.memory_bytes)):
        try:
            yield card
        except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
            raise ValueError(f"--device {name}: XLA refuses to compile the step: {_first_line(error)}") from error


def _numbers(capability: str) -> tuple[int, ...]:
    return tuple(int(part) for part in capability.split("."))


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]


def devices_of(config: TrainConfig) -> int:
    """Return the devices that a run's mesh names; what it leaves open counts once."""
    return config.mesh.fsdp * max(config.mesh.data, 1)


def find_microbatch(run: RunDirectory, model: ModelConfig, config: TrainConfig, name: str, count: int | None) -> None:
    """Print the memory that each `microbatch_size` needs on a card: `--find-microbatch --device`."""
    with compiling_for(name, count or devices_of(config)):
        memory.find_microbatch(run, model, config)


def check(run: RunDirectory, model: ModelConfig, config: TrainConfig, name: str, count: int | None) -> None:
    """Print what a run needs on a card, and reaches there at best: `--check --device`.

    Raises ValueError when it does not fit.
    """
    with compiling_for(name, count or devices_of(config)) as card:
        preflight.check(run, model, config)
        step = memory.compile_for_shapes(model, config)
        needed, available = memory.gib(step.bytes_needed), memory.gib(memory.bytes_available())
        print(
            f"card    {getattr(card.peak, config.precision):g} TFLOP/s in {config.precision}, "
            f"{card.bandwidth / 1e12:g} TB/s, {memory.gib(card.memory_bytes)}, of which JAX takes {available}",
            f"needs   {needed} by XLA's account of the compiled step",
            *describe(roofline.account(hlo.parse(step.text), config.calls_per_step), model, config, card),
            sep="\n",
        )
        if step.bytes_needed > memory.bytes_available():
            raise ValueError(
                f"--device {name}: the step needs {needed}, JAX takes {available} of such a card "
                f"(XLA_PYTHON_CLIENT_MEM_FRACTION); --find-microbatch --device {name} says what fits"
            )


def describe(account: Account, model: ModelConfig, config: TrainConfig, card: Card) -> list[str]:
    """Return the account of a global step, a line per subject."""
    lines = [_attention(account, model, config)]
    lines.append(
        f"kernels {account.total('times'):,} a step: {account.total('bytes') / 1e9:,.1f} GB moved, "
        f"{account.total('flops') / 1e12:,.2f} TFLOP in products"
    )
    if account.endless:
        lines.append(f"WARNING {counted(account.endless, 'loop')} of unknown length counted once")
    bound = Bound.of(account, Rates.of(card))
    shares = {"operations": bound.computing, "bytes": bound.moving, "other devices": bound.sending}
    waits = ", ".join(f"{seconds / bound.total:.0%} {what}" for what, seconds in shares.items() if seconds)
    slower = Bound.of(account, Rates.of(card, REACHED_BYTES, REACHED_FLOPS))
    reached = f"at {REACHED_FLOPS:.0%} of the operations and {REACHED_BYTES:.0%} of the bandwidth, as an H200 reached"
    lines += [
        f"bound   {bound.total * 1e3:,.1f} ms a step ({waits}): {_speed(bound, model, config, card)}",
        f"        {slower.total * 1e3:,.1f} ms {reached}: {_speed(slower, model, config, card)}",
    ]
    return [*lines, *_sent(account, Rates.of(card)), f"note    {NOT_IN_IT}"]


def _attention(account: Account, model: ModelConfig, config: TrainConfig) -> str:
    if kernels := sum(kernel.times for kernel in account.kernels if kernel.kind == ATTENTION):
        return f"cudnn   takes the attention, {counted(kernels, 'kernel')} a step"
    reason = describe_attention(config.precision, model.head_width, config.drop_rate, target.platform())
    return f"cudnn   {'finds no attention' if 'by cuDNN' in reason else reason}"


def _speed(bound: Bound, model: ModelConfig, config: TrainConfig, card: Card) -> str:
    """Say what a step's least time means: tokens/s, MFU, and the length of the run."""
    devices = make_mesh(config.mesh).devices.size
    speed = tokens_per_global_step(model, config, devices) / bound.total
    share = mfu(speed / devices, model, card.device_kind, config.precision)
    steps = steps_per_epoch(model, config, known_data(config).tokens, devices)
    line = f"at most {round(speed, -3):,.0f} tokens/s, MFU {share:.1%}"
    return line + (f", the run {timedelta(seconds=round(steps * config.epochs * bound.total))}" if steps else "")


def _sent(account: Account, rates: Rates) -> list[str]:
    """Return a line per kind of collective: how often, how much, and how much of it beside other kernels."""
    lines = []
    for kind in dict.fromkeys(send.kind for send in account.sends):
        sends = [send for send in account.sends if send.kind == kind]
        gigabytes = sum(send.times * send.bytes for send in sends) / 1e9
        seconds = gigabytes * 1e9 / rates.link
        alone = Bound.of(account._replace(kernels=[], sends=sends), rates).sending
        lines.append(
            f"sent    {kind}: {sum(send.times for send in sends)} a step, {gigabytes:.2f} GB from each device if they "
            f"stand in a ring, {seconds * 1e3:.1f} ms at {rates.link / 1e9:g} GB/s, "
            f"{1 - alone / seconds:.0%} of it beside other kernels"
        )
    return lines
