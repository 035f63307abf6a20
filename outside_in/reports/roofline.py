"""A lower bound for the time of a compiled GPU program: each kernel's bytes over bandwidth, or operations over peak.

The roofline model of Williams, Waterman and Patterson, https://doi.org/10.1145/1498765.1498785, kernel by kernel. A
kernel is every instruction that is not a view, of the program and of its loops, times their trip count. Of a
conditional, the branch that moves most counts.
"""

import json
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from outside_in.reports.cards import Card
from outside_in.reports.fusion_bytes import SLICES, fusion_bytes
from outside_in.reports.hlo import Array, Computation, Instruction, Program

VIEWS = (
    "parameter",
    "get-tuple-element",
    "tuple",
    "bitcast",
    "constant",
    "after-all",
    "partition-id",
    "replica-id",
    "iota",
)
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
CALLS = ("calls", "to_apply", "called_computations")
PRODUCTS, ATTENTION, PASSES, COPIES = "products", "attention by cuDNN", "passes over memory", "copies"


class Kernel(NamedTuple):
    kind: str
    name: str
    type: str
    times: int
    bytes: float  # moved, each time
    flops: float  # of matrix products, each time
    float32_flops: float  # those of them that are of float32 numbers


class Send(NamedTuple):
    """What devices send each other at once."""

    kind: str
    times: int
    bytes: float  # that each device sends, each time, if they stand in a ring
    beside: tuple[Kernel, ...]  # what runs while it is under way


class Account(NamedTuple):
    kernels: list[Kernel]
    sends: list[Send]
    endless: int  # loops whose trip count the text does not tell: counted once

    def total(self, what: str) -> float:
        """Return the sum of "times", "bytes" or "flops"."""
        return sum(k.times * (1 if what == "times" else getattr(k, what)) for k in self.kernels)


class Rates(NamedTuple):
    """What a card does in a second."""

    bytes: float
    flops: float  # of bfloat16 numbers
    float32_flops: float
    link: float  # bytes to other cards

    @classmethod
    def of(cls, card: Card, share_of_bytes: float = 1.0, share_of_flops: float = 1.0) -> "Rates":
        """Return a card's rates by its data sheet, or shares of them."""
        flops = 1e12 * share_of_flops
        return cls(card.bandwidth * share_of_bytes, flops * card.peak.bfloat16, flops * card.peak.float32, card.link)

    def seconds(self, kernel: Kernel) -> tuple[float, float]:
        """Return the least time of a kernel's operations, and of its bytes."""
        computing = (kernel.flops - kernel.float32_flops) / self.flops + kernel.float32_flops / self.float32_flops
        return kernel.times * computing, kernel.times * kernel.bytes / self.bytes


class Bound(NamedTuple):
    """The least time of a program, in seconds, by what it waits for."""

    computing: float
    moving: float
    sending: float  # beside nothing else

    @property
    def total(self) -> float:
        return self.computing + self.moving + self.sending

    @classmethod
    def of(cls, account: Account, rates: Rates) -> "Bound":
        pairs = [rates.seconds(kernel) for kernel in account.kernels]
        sending = (
            send.times * max(0.0, send.bytes / rates.link - sum(max(rates.seconds(kernel)) for kernel in send.beside))
            for send in account.sends
        )
        computing = sum(computing for computing, moving in pairs if computing > moving)
        return cls(computing, sum(moving for computing, moving in pairs if computing <= moving), sum(sending))


def account(program: Program, calls: int = 1) -> Account:
    """Count what calls of the program compute, move and send."""
    found = Account([], [], 0)
    for item in _walk(program, program.computations[program.entry], calls):
        if isinstance(item, Kernel):
            found.kernels.append(item)
        elif isinstance(item, Send):
            found.sends.append(item)
        else:
            found = found._replace(endless=found.endless + 1)
    return found


def _walk(program: Program, computation: Computation, times: int) -> Iterator[Kernel | Send | None]:
    """Yield kernels and sends in order; None for a loop of unknown length."""
    under_way: dict[str, list[Kernel]] = {}
    for x in computation.instructions.values():
        if x.opcode in VIEWS:
            continue
        kind = x.opcode.removesuffix("-start").removesuffix("-done")
        if kind in COLLECTIVES:
            if x.opcode == f"{kind}-start":
                under_way[x.name] = []
            else:
                start = computation.instructions[x.operands[0]] if x.opcode == f"{kind}-done" else x
                beside = under_way.pop(start.name, [])
                yield _send(kind, computation, start, times, beside)
            continue
        for item in _run(program, computation, x, times):
            yield item
            if isinstance(item, Kernel):
                for beside in under_way.values():
                    beside.append(item._replace(times=item.times // times))


def _run(program: Program, computation: Computation, x: Instruction, times: int) -> Iterator[Kernel | Send | None]:
    """Yield what one instruction starts."""
    if x.opcode == "while":
        trips = re.search(r'known_trip_count":\{"n":"(\d+)"', x.attributes)
        if not trips:
            yield None
        (body,) = x.computations("body")
        yield from _walk(program, program.computations[body], times * int(trips[1] if trips else 1))
    elif x.opcode == "conditional":
        names = [
            name
            for key in ("branch_computations", "true_computation", "false_computation")
            for name in x.computations(key)
        ]
        branches = [list(_walk(program, program.computations[name], times)) for name in names]
        yield from max(branches, key=lambda items: sum(i.times * i.bytes for i in items if isinstance(i, Kernel)))
    elif x.opcode in ("call", "async-start"):
        yield from _walk(program, _called(program, x), times)
    elif x.opcode in ("fusion", "fusion-start"):
        body = _called(program, x)
        flops = _flops_within(program, body)
        yield Kernel(PRODUCTS if flops[0] else PASSES, x.name, x.type, times, fusion_bytes(body), *flops)
    elif not x.opcode.endswith("-done"):
        yield _kernel(computation, x, times)


def _called(program: Program, x: Instruction) -> Computation:
    """Return the computation that a call or a fusion runs."""
    return next(program.computations[name] for attribute in CALLS for name in x.computations(attribute))


def _send(kind: str, computation: Computation, x: Instruction, times: int, beside: list[Kernel]) -> Send:
    """Return what a collective sends, in a ring: https://docs.nvidia.com/deeplearning/nccl."""
    size = sum(operand.bytes for operand in computation.operands(x))
    others = _group_size(x) - 1
    per_device = {
        "all-reduce": 2 * size * others / (others + 1),
        "all-gather": size * others,  # every device's share reaches all others
        "collective-permute": size,
    }
    return Send(kind, times, per_device.get(kind, size * others / (others + 1)), tuple(beside))


def _group_size(x: Instruction) -> int:
    """Return how many devices a collective joins, from `{{0,1},{2,3}}` or `[2,4]<=[8]`."""
    if listed := re.search(r"replica_groups=\{\{([0-9,]*)\}", x.attributes):
        return len(listed[1].split(","))
    shaped = re.search(r"replica_groups=\[\d+,(\d+)\]", x.attributes)
    return int(shaped[1]) if shaped else 2


def _kernel(computation: Computation, x: Instruction, times: int) -> Kernel:
    """Return the account of an instruction that is a kernel by itself."""
    operands = computation.operands(x)
    moved = sum(operand.bytes for operand in operands) + x.bytes
    if x.opcode in SLICES or x.opcode.startswith("copy"):
        moved = 2 * (x.bytes if x.opcode != "copy-start" else operands[0].bytes)
    elif x.opcode == "dynamic-update-slice":
        moved = 2 * operands[1].bytes
    elif x.opcode == "dot":
        return Kernel(PRODUCTS, x.name, x.type, times, moved, *_dot_flops(operands, x))
    elif x.opcode == "custom-call":
        return _library_call(operands, x, times)
    kind = COPIES if x.opcode.startswith("copy") else x.opcode
    return Kernel(kind, x.name, x.type, times, moved, 0, 0)


def _library_call(operands: list[Instruction], x: Instruction, times: int) -> Kernel:
    """Return the account of a call into cuBLAS, cuDNN or another library."""
    target = re.search(r'custom_call_target="([^"]+)"', x.attributes)
    name = target[1] if target else x.opcode
    results = x.arrays[:1] + [a for a in x.arrays[1:] if a.dtype not in ("s8", "u8")]  # without the workspace
    moved = sum(operand.bytes for operand in operands) + sum(result.bytes for result in results)
    if "matmul" in name or "gemm" in name:
        given = re.search(r'"dot_dimension_numbers":(\{.*?\})', x.attributes)
        assert given, x.name
        axes = {key: [int(axis) for axis in value] for key, value in json.loads(given[1]).items()}
        flops = _product_flops(
            operands[0].arrays[0],
            operands[1].arrays[0],
            axes["lhs_contracting_dimensions"],
            axes["lhs_batch_dimensions"],
        )
        return Kernel(PRODUCTS, x.name, x.type, times, moved, *flops)
    if "fmha" in name:
        scores = re.search(r'"intermediate_tensor_shape":.*?"dimensions": ?\[([^\]]*)\]', x.attributes)
        assert scores, x.name
        sizes = [int(size) for size in re.findall(r"\d+", scores[1])]  # B, N, T, S
        products = 5 if "Backward" in name else 2
        flops = 2 * products * _share_seen(x.attributes, sizes[-1]) * math.prod(sizes) * operands[0].arrays[0].shape[-1]
        return Kernel(ATTENTION, x.name, x.type, times, moved, flops, 0)
    return Kernel(name, x.name, x.type, times, moved, 0, 0)


def _share_seen(attributes: str, length: int) -> float:
    """Return which share of all pairs of positions cuDNN's attention computes."""
    if not re.search(r'"mask_type": ?"[A-Z_]*CAUSAL"', attributes):
        return 1
    window = re.search(r'"sliding_window_length": ?"?(\d+)', attributes)
    share = min(int(window[1]) / length, 1) if window and int(window[1]) else 1  # 0: none
    return share * (1 - share / 2)


def _product_flops(left: Array, right: Array, contracted: list[int], batch: list[int]) -> tuple[float, float]:
    """Return a product's operations, and those of float32 numbers."""
    shared = math.prod(left.shape[axis] for axis in (*contracted, *batch))
    flops = 2 * left.elements * right.elements / shared
    return flops, flops if "f32" in (left.dtype, right.dtype) else 0


def _dot_flops(operands: list[Instruction], dot: Instruction) -> tuple[float, float]:
    axes = dot.integers("lhs_contracting_dims"), dot.integers("lhs_batch_dims")
    return _product_flops(operands[0].arrays[0], operands[1].arrays[0], *axes)


def _flops_within(program: Program, computation: Computation) -> tuple[float, float]:
    """Sum the operations of the products in a fused computation."""
    flops, float32_flops = 0.0, 0.0
    for x in computation.instructions.values():
        if x.opcode == "dot":
            inner = _dot_flops(computation.operands(x), x)
        elif x.opcode in ("fusion", "call"):
            inner = _flops_within(program, _called(program, x))
        else:
            continue
        flops, float32_flops = flops + inner[0], float32_flops + inner[1]
    return flops, float32_flops
