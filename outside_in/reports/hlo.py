"""Reads the text of a compiled program: XLA's optimized HLO, as `compiled.as_text()` gives it."""

import math
import re
from typing import NamedTuple

WIDTHS = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8}  # bytes
WIDTHS |= {f"{sign}{bits}": bits // 8 for sign in "su" for bits in (8, 16, 32, 64)}
SHAPE = re.compile(rf"\b({'|'.join(WIDTHS)})\[([0-9,]*)\]")
HEADER = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\) -> .* \{$")
INSTRUCTION = re.compile(
    r"^\s+(?P<root>ROOT )?%?(?P<name>[\w.\-]+) = (?P<type>\(.*?\)|\S+) (?P<opcode>[\w\-]+)\((?P<rest>.*)$"
)
NAME = re.compile(r"%([\w.\-]+)")


class Array(NamedTuple):
    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.elements * WIDTHS[self.dtype]


class Instruction(NamedTuple):
    name: str
    type: str  # one array, or a tuple of them, with layouts
    opcode: str
    operands: tuple[str, ...]  # names
    attributes: str  # what follows the operands

    @property
    def arrays(self) -> list[Array]:
        """Return the arrays of its result."""
        return arrays(self.type)

    @property
    def elements(self) -> int:
        return sum(array.elements for array in self.arrays)

    @property
    def bytes(self) -> int:
        return sum(array.bytes for array in self.arrays)

    def computations(self, attribute: str) -> list[str]:
        """Return the names that an attribute gives, such as those of `calls=`."""
        listed = re.search(rf"\b{attribute}=(\{{[^}}]*\}}|%[\w.\-]+)", self.attributes)
        return NAME.findall(listed[1]) if listed else []

    def integers(self, attribute: str) -> list[int]:
        """Return the numbers of an attribute such as `dimensions={0,1}`."""
        listed = re.search(rf"\b{attribute}=\{{([0-9,]*)\}}", self.attributes)
        return [int(number) for number in listed[1].split(",") if number] if listed else []


class Computation(NamedTuple):
    instructions: dict[str, Instruction]  # by name, in the order in which they run
    root: str

    def operands(self, instruction: Instruction) -> list[Instruction]:
        return [self.instructions[name] for name in instruction.operands]


class Program(NamedTuple):
    computations: dict[str, Computation]
    entry: str


def arrays(text: str) -> list[Array]:
    """Return the arrays of a type such as `(f32[2,3]{1,0}, s32[])`."""
    return [Array(dtype, tuple(int(size) for size in sizes.split(",") if size)) for dtype, sizes in SHAPE.findall(text)]


def parse(text: str) -> Program:
    """Read a program. Raises ValueError when the text holds none."""
    computations: dict[str, Computation] = {}
    entry, name, root, instructions = "", "", "", dict[str, Instruction]()
    for line in text.splitlines():
        if header := HEADER.match(line):
            name, instructions = header["name"], {}
            entry = name if header["entry"] else entry
        elif line.startswith("}") and name:
            computations[name], name = Computation(instructions, root), ""
        elif name and (match := INSTRUCTION.match(line)):
            operands, attributes = _split(match["rest"])
            instructions[match["name"]] = Instruction(
                match["name"], match["type"], match["opcode"], operands, attributes
            )
            root = match["name"] if match["root"] else root
    if entry not in computations:
        raise ValueError("expected the text of a compiled program (HLO with an ENTRY), got something else")
    return Program(computations, entry)


def _split(rest: str) -> tuple[tuple[str, ...], str]:
    """Return the names inside the parenthesis that is open at the start, and what follows it."""
    depth = 1
    for position, character in enumerate(rest):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return tuple(NAME.findall(rest[:position])), rest[position + 1 :]
    return tuple(NAME.findall(rest)), ""
