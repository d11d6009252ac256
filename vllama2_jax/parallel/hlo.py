"""The text of a compiled XLA program (`compiled.as_text()`), read into instructions.

It is the program of one device, scheduled: instructions stand in the order in which they start.
"""

import dataclasses
import re
from collections.abc import Iterator

_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_BEGINNING = re.compile(r"\s+(ROOT )?%?[\w.\-]+ = |%|ENTRY |\}$|\}, execution_thread=|$")
# What calls a computation as part of the program, not element by element, and in which roles.
CALLERS = ("fusion", "while", "call", "conditional", "async-start", "call-start")
CALLS = (
    "to_apply",
    "calls",
    "body",
    "branch_computations",
    "true_computation",
    "false_computation",
)
# Custom calls that compute nothing.
_BOOKKEEPING = {
    "AllocateBuffer",
    "AssumeGatherIndicesInBound",
    "AsyncCollectiveDone",
    "AsyncCollectiveStart",
    "ConcatBitcast",
    "GatherScatterIndicesBitpacked",
    "PrepareAsyncCallDone",
    "PrepareAsyncCallStart",
}
_ARRAY = re.compile(r"\b([a-z]+)(\d*)\w*\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line.

    Attributes:
      name: without its "%".
      shape: text of the result's, "bf16[8,128]{1,0}" or a tuple of such.
      opcode: "all-gather-start".
      rest: what follows the opening bracket: operands, then attributes.
      root: it is the computation's result.
    """

    name: str
    shape: str
    opcode: str
    rest: str
    root: bool

    @property
    def operands(self) -> list[str]:
        """Names of the instructions whose results it takes."""
        return re.findall(r"%([\w.\-]+)", self.rest[: self._end])

    @property
    def attributes(self) -> str:
        """The text behind the operands."""
        return self.rest[self._end :]

    @property
    def literal(self) -> str:
        """What stands between the brackets, of a constant its value."""
        return self.rest[: self._end]

    @property
    def _end(self) -> int:
        depth = 1
        for match in re.finditer(r"[()]", self.rest):
            depth += 1 if match[0] == "(" else -1
            if not depth:
                return match.start()
        return len(self.rest)

    @property
    def element(self) -> int | None:
        """Which element of a tuple a `get-tuple-element` takes."""
        found = re.search(r"\bindex=(\d+)", self.attributes)
        return int(found[1]) if self.opcode == "get-tuple-element" and found else None

    def called(self, *roles: str) -> list[str]:
        """Names of computations that it calls, e.g. as "body"."""
        names = []
        for role in roles:
            for found in re.finditer(rf"\b{role}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.attributes):
                names += re.findall(r"%?([\w.\-]+)", found[1])
        return names

    @property
    def kernel(self) -> str | None:
        """What a custom call runs: a kernel's name, or the name of the call's target."""
        found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        if self.opcode != "custom-call" or not found or found[1] in _BOOKKEEPING:
            return None
        if found[1] not in ("tpu_custom_call", "__gpu$xla.gpu.triton"):
            return found[1]
        # "jit(step)/transpose(jvp(jit(gmm)))/pallas_call"; the instruction's own name has a number
        scope = re.search(r'op_name="[^"]*?(\w+)\)*/pallas_call', self.attributes)
        return scope[1] if scope else re.sub(r"\.\d+$", "", self.name)

    @property
    def bytes(self) -> int:
        """Of its result; of a tuple, of all arrays in it."""
        return shape_bytes(self.shape)


def shape_bytes(shape: str) -> int:
    """Bytes of the arrays in a shape's text; tokens have none."""
    total = 0
    for kind, bits, sizes in _ARRAY.findall(re.sub(r"\{[^}]*\}", "", shape)):
        count = 1
        for size in filter(None, sizes.split(",")):
            count *= int(size)
        total += count * (8 if kind == "pred" else int(bits or 0)) // 8
    return total


@dataclasses.dataclass(frozen=True)
class Module:
    """A program.

    Attributes:
      computations: {name: {instruction's name: Instruction}}, in order.
      entry: name of the computation that runs.
      num_partitions: devices that run it together.
      working: names of computations that multiply matrices or run kernels.
    """

    computations: dict[str, dict[str, Instruction]]
    entry: str
    num_partitions: int
    working: set[str]

    def works(self, instruction: Instruction) -> bool:
        """Whether it multiplies matrices or runs a kernel, itself or in what it calls."""
        return _works(instruction, self.working)


def _works(instruction, working) -> bool:
    if instruction.opcode in ("dot", "convolution") or instruction.kernel:
        return True
    calls = instruction.opcode in CALLERS
    return calls and any(name in working for name in instruction.called(*CALLS))


def parse(text: str) -> Module:
    """Read a program's text.

    Raises:
      ValueError: if it is none.
    """
    computations: dict[str, dict[str, Instruction]] = {}
    entry = current = None
    for line in _statements(text):
        if current is None:
            found = _COMPUTATION.match(line)
            if found:
                current = computations.setdefault(found[2], {})
                entry = found[2] if found[1] else entry
        elif line.startswith("}"):
            current = None
        elif found := _INSTRUCTION.match(line):
            root, name, shape, opcode, rest = found.groups()
            current[name] = Instruction(name, shape, opcode, rest, bool(root))
    if entry is None:
        raise ValueError("this is no text of an XLA program: it has no ENTRY computation")
    working: set[str] = set()
    for name, computation in computations.items():  # what is called stands above what calls it
        if any(_works(instruction, working) for instruction in computation.values()):
            working.add(name)
    partitions = re.search(r"num_partitions=(\d+)", text[: text.find("\n")])
    return Module(computations, entry, int(partitions[1]) if partitions else 1, working)


def _statements(text) -> Iterator[str]:
    """Lines, but attributes that run over several of them in one."""
    parts: list[str] = []
    for line in text.splitlines():
        if parts and _BEGINNING.match(line):
            yield "".join(parts)
            parts = []
        parts.append(line)
    yield "".join(parts)
