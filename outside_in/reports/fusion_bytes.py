"""How many bytes a fused kernel moves: what it takes of each input, and what it writes.

An input is followed to what is taken of it: a slice or gather reads what it takes, also behind elementwise operations;
an update or scatter in place touches what it writes alone.
"""

from outside_in.reports.hlo import Computation, Instruction

SAME_ARRAY = ("bitcast", "copy", "reshape")
SLICES = ("gather", "dynamic-slice", "slice")
UPDATES = ("dynamic-update-slice", "scatter")
NEEDS_ALL = ("reduce", "dot", "sort", "fusion", "scatter")


def fusion_bytes(computation: Computation) -> float:
    """Return the bytes that a kernel with this body reads and writes."""
    return _Body(computation).bytes


class _Body:
    def __init__(self, computation: Computation) -> None:
        self.instructions, root = computation.instructions, computation.instructions[computation.root]
        self.outputs = root.operands if root.opcode == "tuple" else (root.name,)
        self.users: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for user in self.instructions.values():
            for name in set(user.operands) if user is not root or root.opcode != "tuple" else ():
                self.users[name].append(user)
        self.taken: dict[str, int] = {}
        for name in reversed(self.instructions):  # users first
            self.taken[name] = self._taken(name)

    @property
    def bytes(self) -> float:
        return sum(map(self._written, self.outputs)) + sum(
            self.taken[name] * x.bytes / x.elements
            for name, x in self.instructions.items()
            if x.opcode == "parameter" and x.elements
        )

    def _origin(self, name: str) -> Instruction:
        instruction = self.instructions[name]
        while instruction.opcode in SAME_ARRAY:
            instruction = self.instructions[instruction.operands[0]]
        return instruction

    def _is_in_place(self, update: Instruction) -> bool:
        """Whether an update writes into a parameter that nothing else reads, as XLA then lets it do."""
        target = self._origin(update.operands[0])
        is_output = update.name in {self._origin(name).name for name in self.outputs}
        return is_output and target.opcode == "parameter" and len(self.users[target.name]) == 1

    def _written(self, output: str) -> int:
        source = self._origin(output)
        if source.opcode not in UPDATES or not self._is_in_place(source):
            return self.instructions[output].bytes
        is_scatter = source.opcode == "scatter"
        updates = self.instructions[source.operands[2 if is_scatter else 1]].bytes
        return 2 * updates if is_scatter else updates  # a scatter adds: it reads what it writes

    def _taken(self, name: str) -> int:
        """Count the elements of an array that the kernel needs."""
        whole = self.instructions[name].elements
        if name in self.outputs:
            return whole
        return min(whole, sum(self._taken_by(user, name) for user in self.users[name]))

    def _taken_by(self, user: Instruction, name: str) -> int:
        whole = self.instructions[name].elements
        if user.operands[0] == name and user.opcode in SLICES:
            return self.taken[user.name]
        if user.operands[0] == name and user.opcode in UPDATES:
            return 0 if self._is_in_place(user) else self.taken[user.name]
        is_elementwise = user.elements == whole and user.opcode not in NEEDS_ALL
        return self.taken[user.name] if is_elementwise else whole
