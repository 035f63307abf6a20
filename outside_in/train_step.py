"""Everything that is jitted for training: one call of the training step, and one of the evaluation step.

Both are compiled ahead of their first call, once in a run: so it is known what they need before they need it, and
arguments of another form are refused.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from model import GPTModel
from outside_in.config import TrainConfig
from outside_in.data.loader import BATCH_SPECS, Batch
from outside_in.layers.dropout import Dropout
from outside_in.norms_by_layer import update_and_measure
from outside_in.optimizer import UpdateReport, update_report
from outside_in.runtime.devices import compiler_options, give_back_freed_memory
from outside_in.runtime.mesh import AXES, DATA, FSDP, array_shardings, array_spec, one_device
from outside_in.weights import named_arrays

NORM_SCALE = 2.0**-100  # squares of what float32 can hold, times this, can be added up in float32


class GradientDiagnostics(NamedTuple):
    """What tells where a gradient stopped being finite; norms are in the order of `weights.named_arrays`."""

    losses: jax.Array  # (A,), of each microbatch
    gradient_norms: jax.Array  # (P,), of each parameter
    scaled_norms: jax.Array  # (P,), times NORM_SCALE, where one of those is not finite; else 0


class StepReport(NamedTuple):
    """What one call of the training step returns."""

    loss: jax.Array  # mean of the call
    update: UpdateReport
    diagnostics: GradientDiagnostics
    layer_norms: jax.Array | None = None  # (3, L); of `norms_by_layer`


@partial(nnx.jit, static_argnames=("config", "mesh"), donate_argnames=("model", "optimizer"))
def train_step(
    model: GPTModel,
    optimizer: nnx.Optimizer,
    batch: Batch,
    seed_key: jax.Array,
    config: TrainConfig,
    mesh: Mesh | None = None,
) -> StepReport:
    """Train on the microbatches of one call; the last call of a global step updates the parameters.

    Returns its report, on the device.
    """
    mesh = mesh or one_device()
    loss, grads, losses_A = mean_gradient(model, batch, seed_key, mesh)
    layer_norms = update_and_measure(model, optimizer, grads, config)
    for module in (model, optimizer):  # what comes out lies where it came from
        state = nnx.state(module)
        nnx.update(module, jax.lax.with_sharding_constraint(state, array_shardings(state, mesh)))
    report = StepReport(loss, update_report(optimizer, config), gradient_diagnostics(losses_A, grads), layer_norms)
    return jax.lax.with_sharding_constraint(report, NamedSharding(mesh, PartitionSpec()))


@partial(nnx.jit, static_argnames="mesh")
def eval_step(model: GPTModel, inputs_BT: jax.Array, targets_BT: jax.Array, mesh: Mesh | None = None) -> jax.Array:
    """Return `model.loss` on each device's share of the sequences, (devices,), dropout off."""
    mesh = mesh or one_device()
    graph, state = nnx.split(model)

    def on_device(state: nnx.State, inputs_BT: jax.Array, targets_BT: jax.Array) -> jax.Array:
        loss = nnx.merge(graph, state).loss(inputs_BT, targets_BT)
        return jax.lax.all_gather(loss, AXES)

    return shard_map_with_gather(mesh, on_device, [PartitionSpec(AXES)] * 2, PartitionSpec())(
        state, inputs_BT, targets_BT
    )


class Compiled:
    """A compiled step. Called with arguments of another form, it raises RuntimeError and changes nothing."""

    def __init__(self, name: str, function: Any, *arguments: Any) -> None:
        """Compile a jitted function for arguments like these, which may be abstract; see `nnx.jit`."""
        self._name = name
        self._compiled = function.lower(*arguments).compile(compiler_options())
        give_back_freed_memory()

    def __call__(self, *arguments: Any) -> Any:
        """Take the arguments without the static ones."""
        try:
            return self._compiled(*arguments)
        except (TypeError, ValueError) as error:
            differences = "; ".join(line for line in str(error).splitlines() if line.startswith("Argument '"))
            message = differences or " ".join(str(error).split())
            raise RuntimeError(f"the {self._name} would have to be compiled a second time: {message}") from error

    @property
    def bytes_needed(self) -> int:
        """Return the device memory that it needs, arguments included, by XLA's count."""
        stats = self._compiled.memory_analysis()
        kept = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
        return kept + stats.temp_size_in_bytes + stats.generated_code_size_in_bytes

    @property
    def text(self) -> str:
        """Return the compiled program as XLA prints it."""
        return self._compiled.as_text()


def compile_train_step(
    model: GPTModel,
    optimizer: nnx.Optimizer,
    batch: Batch,
    seed_key: jax.Array,
    config: TrainConfig,
    mesh: Mesh | None = None,
) -> Compiled:
    return Compiled("training step", train_step, model, optimizer, batch, seed_key, config, mesh)


def compile_eval_step(
    model: GPTModel, inputs_BT: jax.Array, targets_BT: jax.Array, mesh: Mesh | None = None
) -> Compiled:
    return Compiled("evaluation step", eval_step, model, inputs_BT, targets_BT, mesh)


def mean_loss_of_calls(reports: Sequence[StepReport]) -> float:
    """Return the mean loss of a global step's calls, once they have ended."""
    return float(np.mean(jax.device_get([report.loss for report in reports]), dtype=np.float64))


def steps_ahead() -> int:
    """Return how many steps may run before the first's report is fetched.

    One, so that a GPU never waits for Python. Zero on the CPU, where a second step would double the memory and gain
    nothing.
    """
    return 0 if jax.default_backend() == "cpu" else 1


def dropout_of(seed_key: jax.Array, global_step: jax.Array, first_sequence: jax.Array, sequences: int) -> Dropout:
    """Return the dropout of a microbatch.

    Its masks depend on the seed, the global step (from 0) and the index of the sequence in that step alone.
    """
    step_key = jax.random.fold_in(seed_key, global_step)
    numbers_B = first_sequence + jnp.arange(sequences, dtype=jnp.uint32)
    return Dropout(jax.vmap(jax.random.fold_in, in_axes=(None, 0))(step_key, numbers_B))


def mean_gradient(
    model: GPTModel, batch: Batch, seed_key: jax.Array, mesh: Mesh | None = None
) -> tuple[jax.Array, nnx.State, jax.Array]:
    """Return the mean of `model.loss`, and its gradient, for a call.

    The mean is over its microbatches, and over the devices that share each. Parameters that are sharded over `fsdp` are
    gathered once; gradients are summed on each device, and reduced over all of them once, at the end. Also returns the
    loss of each microbatch, (A,).
    """
    mesh = mesh or one_device()
    graph, state = nnx.split(model)

    def on_device(state: nnx.State, batch: Batch, seed_key: jax.Array) -> tuple[jax.Array, nnx.State, jax.Array]:
        grads, losses_A = accumulate_microbatches(nnx.merge(graph, state), batch, seed_key, mesh.devices.size)
        losses_A = jax.lax.pmean(losses_A, AXES)
        return losses_A.mean(), jax.tree.map(partial(reduce_gradient, mesh=mesh), grads), losses_A

    specs = jax.tree.map(lambda x: array_spec(x.shape, mesh), nnx.state(model, nnx.Param))
    in_specs = [BATCH_SPECS, PartitionSpec()]
    out = PartitionSpec(), specs, PartitionSpec()
    return shard_map_with_gather(mesh, on_device, in_specs, out)(state, batch, seed_key)


def shard_map_with_gather(
    mesh: Mesh, on_device: Callable[..., Any], in_specs: list[Any], out_specs: Any
) -> Callable[..., Any]:
    """Return a `shard_map` of `on_device` that gathers parameters sharded over `fsdp` first.

    What is returned takes the parameters, whose specs are those of the rule, and arguments with `in_specs`.
    """

    def gather(x: jax.Array, spec: PartitionSpec) -> jax.Array:
        return jax.lax.all_gather(x, FSDP, axis=len(spec) - 1, tiled=True) if len(spec) else x

    def sharded(params: nnx.State, *others: Any) -> Any:
        specs = jax.tree.map(lambda x: array_spec(x.shape, mesh), params)
        return jax.shard_map(
            lambda params, *others: on_device(jax.tree.map(gather, params, specs), *others),
            mesh=mesh,
            in_specs=(specs, *in_specs),
            out_specs=out_specs,
            check_vma=False,
        )(params, *others)

    return sharded


def reduce_gradient(grad: jax.Array, mesh: Mesh) -> jax.Array:
    """Sum a gradient over all devices; each keeps its shard where the parameter is sharded."""
    spec = array_spec(grad.shape, mesh)
    if not len(spec):
        return jax.lax.psum(grad, AXES)
    part = jax.lax.psum_scatter(grad, FSDP, scatter_dimension=len(spec) - 1, tiled=True)
    return jax.lax.psum(part, DATA)


def accumulate_microbatches(
    model: GPTModel, batch: Batch, seed_key: jax.Array, devices: int
) -> tuple[nnx.State, jax.Array]:
    """Sum the gradients of this device's sequences, one microbatch after another.

    The sum is the device's share of the mean over all devices. Also returns the loss of each microbatch, (A,).
    """
    global_step, first = batch.position
    count, sequences, _ = batch.inputs.shape

    def add(total: nnx.State, microbatch: Any) -> tuple[nnx.State, jax.Array]:
        inputs_BT, targets_BT, i = microbatch
        first_sequence = (i * devices + jax.lax.axis_index(AXES).astype(jnp.uint32)) * sequences
        dropout = dropout_of(seed_key, global_step, first_sequence, sequences)
        loss, grads = loss_and_gradient(model, inputs_BT, targets_BT, dropout, 1 / (count * devices))
        return jax.tree.map(jnp.add, total, grads), loss

    microbatches = (batch.inputs, batch.targets, first + jnp.arange(count, dtype=jnp.uint32))
    zeros = jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.Param))
    return jax.lax.scan(add, zeros, microbatches)


def loss_and_gradient(
    model: GPTModel, inputs_BT: jax.Array, targets_BT: jax.Array, dropout: Dropout | None, scale: float = 1.0
) -> tuple[jax.Array, nnx.State]:
    """Return `model.loss`, and the gradient of `scale` times it by all parameters.

    Raises ValueError when the forward pass changes a variable of the model: training would not keep that.
    """
    graph, params, constants = nnx.split(model, nnx.Param, ...)

    def scaled_loss(params: nnx.State) -> tuple[jax.Array, jax.Array]:
        model = nnx.merge(graph, params, jax.tree.map(lambda x: x, constants))  # variables of its own
        before = named_arrays(nnx.state(model, nnx.All(nnx.Variable, nnx.Not(nnx.Param))))
        loss = model.loss(inputs_BT, targets_BT, dropout)
        after = named_arrays(nnx.state(model))
        if changed := [name for name, array in before.items() if after.get(name) is not array]:
            raise ValueError(
                f"model.py: the forward pass changes {changed[0]}, which training would not keep; "
                "return what is to be kept, and draw random numbers with `dropout(x, rate)`"
            )
        return scale * loss, loss

    grads, loss = jax.grad(scaled_loss, has_aux=True)(params)
    return loss, grads


def backward_order(model: GPTModel) -> list[str]:
    """Return parameter names in the order in which their gradients are computed."""
    graph, params, constants = nnx.split(model, nnx.Param, ...)
    tokens_BT = jax.ShapeDtypeStruct((1, model.config.context_length), jnp.uint16)

    def gradients(params: nnx.State, constants: nnx.State, tokens_BT: jax.Array) -> list[jax.Array]:
        model = nnx.merge(graph, params, constants)
        return list(named_arrays(loss_and_gradient(model, tokens_BT, tokens_BT, None)[1]).values())

    names = list(named_arrays(params))
    if graph not in _BACKWARD_ORDERS:
        try:
            jaxpr = jax.make_jaxpr(gradients)(params, constants, tokens_BT).jaxpr
        except Exception:  # a loss that takes no single sequence: what only names things must not end a training
            _BACKWARD_ORDERS[graph] = names
        else:
            made_at = {id(array): i for i, equation in enumerate(jaxpr.eqns) for array in equation.outvars}
            moments = {name: made_at.get(id(array), -1) for name, array in zip(names, jaxpr.outvars)}
            _BACKWARD_ORDERS[graph] = sorted(names, key=lambda name: moments[name])
    return _BACKWARD_ORDERS[graph]


_BACKWARD_ORDERS: dict[nnx.GraphDef, list[str]] = {}  # of each form of model that was asked for


def gradient_diagnostics(losses_A: jax.Array, grads: nnx.State) -> GradientDiagnostics:
    """Return the norms of all gradients, also scaled where one is not finite.

    Where one call is a global step, the optimizer needs the same sums, and XLA takes them once. The scaled norms tell
    whether a gradient is not finite, or only the sum of squares was too large for float32.
    """
    arrays = list(named_arrays(grads).values())

    def norms(scale: float) -> jax.Array:
        return jnp.stack([optax.tree.norm(scale * array).astype(jnp.float32) for array in arrays])

    norms_P = norms(1.0)
    scaled_P = jax.lax.cond(jnp.isfinite(norms_P).all(), lambda: jnp.zeros_like(norms_P), lambda: norms(NORM_SCALE))
    return GradientDiagnostics(losses_A, norms_P, scaled_P)
