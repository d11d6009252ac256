"""How often each instruction of a program runs: loops know, or tell by their counters."""

import dataclasses
import re
from collections.abc import Iterator

from vllama2_jax.parallel.hlo import CALLS, Instruction, Module


@dataclasses.dataclass(frozen=True)
class Run:
    """An instruction that runs.

    Attributes:
      instruction: which.
      times: how often.
      computation: in which it stands.
      uncounted: it is a loop with an unknown number of turns.
    """

    instruction: Instruction
    times: int
    computation: dict[str, Instruction]
    uncounted: bool = False


def runs(module: Module) -> Iterator[Run]:
    """Every instruction that runs, in order, and how often.

    Loops are multiplied, also nested ones. Every branch of a conditional counts, as if all were
    taken. Fusions, asynchronous calls and what reductions apply are not entered.
    """
    return _runs(module, _Scope(module.computations[module.entry]), 1)


def _runs(module, scope, times):
    for instruction in scope.computation.values():
        if instruction.opcode == "while":
            inside = scope.loop(module, instruction)
            turns = inside.turns(instruction)
            yield Run(instruction, times, scope.computation, turns is None)
            yield from _runs(module, inside, times * (1 if turns is None else turns))
            continue
        yield Run(instruction, times, scope.computation)
        if instruction.opcode in ("call", "conditional"):
            for name in instruction.called(*CALLS):
                yield from _runs(module, _Scope(module.computations[name]), times)


_COPIES = (
    "copy",
    "bitcast",
    "convert",
    "reshape",
    "copy-start",
    "copy-done",
    "optimization-barrier",
)
_TURNS = {"LT": 0, "LE": 1, "GT": 0, "GE": 1, "NE": 0}


@dataclasses.dataclass(frozen=True)
class _Scope:
    """A computation, and if it is a loop's body, what the loop carries into it.

    Attributes:
      computation: its instructions.
      condition: those of the loop's condition.
      outer: where the loop stands.
      carried: names there of what it starts with.
    """

    computation: dict[str, Instruction]
    condition: dict[str, Instruction] | None = None
    outer: "_Scope | None" = None
    carried: list[str] | None = None

    def loop(self, module: Module, loop: Instruction) -> "_Scope":
        """The body of a loop that stands here."""
        carried = self.computation[loop.operands[0]]
        return _Scope(
            module.computations[loop.called("body")[0]],
            module.computations[loop.called("condition")[0]],
            self,
            carried.operands if carried.opcode == "tuple" else None,
        )

    def turns(self, loop: Instruction) -> int | None:
        """How often the loop's body runs: as XLA notes, or as start, step and limit say."""
        noted = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if noted:
            return int(noted[1])
        test = _root(self.condition)
        direction = re.search(r"direction=(\w\w)", test.attributes)
        if self.carried is None or test.opcode != "compare" or not direction:
            return None
        counter, bound = test.operands
        index = _source(self.condition, counter).element
        if index is None or direction[1] not in _TURNS:
            return None
        limit = self._value(self.condition, bound)
        start = self.outer._value(self.outer.computation, self.carried[index])
        step = self._step(_root(self.computation).operands[index], index)
        if None in (limit, start) or not step:
            return None
        return max(0, -((start - limit - _TURNS[direction[1]] * (1 if step > 0 else -1)) // step))

    def _value(self, computation, name) -> int | None:
        """A number that does not change from turn to turn."""
        found = _source(computation, name)
        if found.opcode == "constant":
            return int(found.literal) if re.fullmatch(r"-?\d+", found.literal) else None
        if found.opcode in ("add", "subtract", "multiply"):
            left, right = (self._value(computation, operand) for operand in found.operands)
            if None in (left, right):
                return None
            return {"add": left + right, "subtract": left - right}.get(found.opcode, left * right)
        if found.element is None or self.carried is None:
            return None
        kept = _source(self.computation, _root(self.computation).operands[found.element])
        if kept.element != found.element:
            return None
        return self.outer._value(self.outer.computation, self.carried[found.element])

    def _step(self, name, index) -> int | None:
        """By how much a turn raises the number that the loop carries at `index`."""
        found = _source(self.computation, name)
        if found.element == index:
            return 0
        if found.opcode not in ("add", "subtract"):
            return None
        left, right = found.operands
        for counter, other in ((left, right), (right, left)):
            done, more = self._step(counter, index), self._value(self.computation, other)
            if None not in (done, more):
                return done + more if found.opcode == "add" else done - more
        return None


def _root(computation) -> Instruction:
    return next(i for i in reversed(computation.values()) if i.root)


def _source(computation, name) -> Instruction:
    """The instruction of that name, or what it is a copy of."""
    found = computation[name]
    while found.opcode in _COPIES:
        found = computation[found.operands[0]]
    return found
