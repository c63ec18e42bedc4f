"""Reads a program that XLA has scheduled: what stands where, and where a value comes from."""

from __future__ import annotations

import dataclasses
import re

#: Instructions that only name other values.
NAMES = ("get-tuple-element", "tuple", "bitcast", "opt-barrier")


@dataclasses.dataclass
class Instruction:
    """One line of a computation.

    Attributes:
      name: of its value.
      opcode: of the instruction.
      operands: names of other values of the computation.
      line: all of it.
    """

    name: str
    opcode: str
    operands: list[str]
    line: str

    @property
    def target(self) -> str:
        """What a custom call calls; empty if it is none."""
        found = re.search(r'custom_call_target="(\w+)"', self.line)
        return found.group(1) if found else ""

    @property
    def start(self) -> int | None:
        """The number that start and done share; None if it is neither."""
        if not re.fullmatch(r"freeio_\w+_start|freeio_done", self.target):
            return None
        return int(re.search(r"\bstart = (\d+) : i64", self.line).group(1))

    @property
    def index(self) -> int:
        """Of a get-tuple-element."""
        return int(re.search(r"\bindex=(\d+)", self.line).group(1))

    @property
    def aliases(self) -> dict[int, int]:
        """Which result of a custom call lies in which operand."""
        found = re.search(r"output_to_operand_aliasing=\{(.*?)\}, \w", self.line)
        pairs = re.findall(r"\{(\d*)\}: \((\d+), \{\}\)", found.group(1)) if found else ()
        return {int(result or 0): int(operand) for result, operand in pairs}


class Computation:
    """Instructions in the order in which they run."""

    def __init__(self, lines: list[str]):
        self.instructions = [i for line in lines if (i := _parse(line)) is not None]
        self._by_name = {i.name: i for i in self.instructions}

    def origin(self, name: str) -> tuple[str, int]:
        """(instruction that makes the value, which of its results), behind all other names."""
        index = 0
        while True:
            made = self._by_name[name]
            if made.opcode == "get-tuple-element":
                index, (name,) = made.index, made.operands
                made = self._by_name[name]
                if made.opcode == "opt-barrier":
                    (name,) = made.operands
                    made = self._by_name[name]
                if made.opcode != "tuple":
                    return name, index
                name, index = made.operands[index], 0
            elif made.opcode == "bitcast":
                (name,) = made.operands
            else:
                return name, index

    def users(self, name: str) -> list[Instruction]:
        """What uses an instruction's results, behind all other names."""
        return [
            i
            for i in self.instructions
            if i.opcode not in NAMES and any(self.origin(o)[0] == name for o in i.operands)
        ]


def _parse(line: str) -> Instruction | None:
    found = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)$", line)
    if not found:
        return None
    name, rest = found.groups()
    # Behind the type, which may be a tuple of types.
    opcode, operands = re.search(r" ([a-z][\w\-]*)\((.*?)\)", f" {rest}").groups()
    if opcode in ("parameter", "constant", "iota", "partition-id"):
        operands = ""
    operands = re.sub(r"/\*.*?\*/", "", operands)
    names = [o.split()[-1].lstrip("%") for o in operands.split(",") if o.strip()]
    return Instruction(name, opcode, names, line)


def computations(text: str) -> list[Computation]:
    """All computations of a program's text, each in the order in which it runs."""
    assert "is_scheduled=true" in text.splitlines()[0]
    found, lines = [], None
    for line in text.splitlines():
        if re.match(r"\S.*\) -> .*\{$", line):
            lines = []
        elif line.startswith("}") and lines is not None:
            found.append(Computation(lines))
            lines = None
        elif lines is not None:
            lines.append(line)
    return found
