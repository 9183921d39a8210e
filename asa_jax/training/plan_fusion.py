"""Memory and traffic of a program as a compiler runs it: with operations fused.

XLA computes elementwise work where its result is taken. It stores a value that a product, kernel
or scan takes, and one that several operations take if reading it costs less than computing it
again from what it is made of. A stored value occupies memory until its last use. Within a scan
comes last what only its stacked results need; those are gradients of weights, whose products hold
their inputs until then. `tests/training/test_plan_measured.py` holds the account to XLA's for an
H100.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from asa_jax.training.plan_program import Operation, Program

LAYERS, LOSS = "one group of layers", "one chunk of the loss"


class Demand(NamedTuple):
    """What a program asks of a device.

    Attributes:
        peak: bytes that exist at once, without its inputs.
        causes: of the peak, by label.
        moved: bytes that fused operations read and write.
        copied: bytes that go into stacked arrays and out of them beside that.
    """

    peak: float
    causes: dict[str, float]
    moved: float
    copied: float


def demand(program: Program) -> Demand:
    """Runs a program without data.

    Args:
        program: of `read_program`.

    Returns:
        Its memory and its traffic.
    """
    fusion = _Fusion(program)
    inner = {
        i: demand(program.operations[i].body)  # type: ignore[arg-type]
        for i in fusion.order
        if program.operations[i].kind == "scan"
    }
    moved, copied = _traffic(fusion, inner)
    peak, causes = _peak(fusion, inner)
    return Demand(peak, causes, moved, copied)


class _Fusion:
    """Which values are stored, and the operations that store them in the order they run.

    Attributes:
        program: that is run.
        order: numbers of its operations that read and write arrays.
        reads: by number of an operation, the stored values that it reads.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        operations = program.operations
        needed = _needed(operations, (*program.results, *program.stacked))
        self._takers: defaultdict[int, list[int]] = defaultdict(list)
        self._maker: dict[int, int] = {}
        for i in needed:
            for value in set(operations[i].inputs):
                self._takers[value].append(i)
            self._maker.update(dict.fromkeys(operations[i].outputs, i))
        self._fused = self._find_fused(needed)
        self._sources: dict[int, frozenset[int]] = {}
        stored = [i for i in needed if not self._fused.issuperset(operations[i].outputs)]
        self.reads = {i: self._read(operations[i].inputs) for i in stored}
        # What only stacked results need comes last.
        first = set(_needed(operations, program.results)) if program.stacked else set(stored)
        self.order = sorted(stored, key=lambda i: (i not in first, i))

    def _find_fused(self, needed: list[int]) -> set[int]:
        """The values that no operation stores."""
        operations, fused = self.program.operations, set[int]()
        # What reads a value if nothing of it is stored on the way.
        readers: dict[int, frozenset[tuple[str, int]]] = {}
        for i in reversed(needed):
            for value in operations[i].outputs if operations[i].kind == "fused" else ():
                takers = self._takers[value]
                made = {x for taker in takers for x in operations[taker].outputs if x in fused}
                ends = [("operation", i) for i in takers if fused.isdisjoint(operations[i].outputs)]
                ends += [("stack", value)] if value in self.program.stacked else []
                readers[value] = frozenset(ends).union(*(readers[x] for x in made))
                if not self._is_worth_storing(value, len(readers[value])):
                    fused.add(value)
        return fused

    def _is_worth_storing(self, value: int, readers: int) -> bool:
        """Whether a value of a fused operation is needed as an array, or pays as one."""
        operations = self.program.operations
        takers = (operations[i].kind for i in self._takers[value])
        if value in self.program.results or not {"own", "scan"}.isdisjoint(takers):
            return True
        made_of = sum(map(self.bytes, operations[self._maker[value]].inputs))
        return readers > 1 and readers * made_of > made_of + self.bytes(value) * (1 + readers)

    def bytes(self, value: int) -> float:
        """That reading a value moves."""
        return self.program.sizes[value] + self.program.outside.get(value, 0.0)

    def is_stored(self, value: int) -> bool:
        """Whether it is an array in memory."""
        return value not in self._fused

    def maker(self, value: int) -> Operation | None:
        """The operation that makes a value; None for inputs."""
        return self.program.operations[self._maker[value]] if value in self._maker else None

    def is_taken(self, value: int) -> bool:
        """Whether an operation takes it."""
        return bool(self._takers[value])

    def sources(self, value: int) -> frozenset[int]:
        """The stored values that computing this one reads."""
        if value not in self._sources:
            maker = self.maker(value) if value in self._fused else None
            self._sources[value] = self._read(maker.inputs) if maker else frozenset((value,))
        return self._sources[value]

    def _read(self, values: Iterable[int]) -> frozenset[int]:
        return frozenset().union(*(self.sources(value) for value in values))


def _needed(operations: list[Operation], results: Iterable[int]) -> list[int]:
    """Numbers of the operations that results depend on."""
    wanted, found = set(results), []
    for i in reversed(range(len(operations))):
        if not wanted.isdisjoint(operations[i].outputs):
            wanted.update(operations[i].inputs)
            found.append(i)
    return found[::-1]


def _traffic(fusion: _Fusion, inner: dict[int, Demand]) -> tuple[float, float]:
    """Bytes that fused operations move, and that are copied into stacked arrays and out of them."""
    moved = copied = 0.0
    program = fusion.program
    for i in fusion.order:
        operation = program.operations[i]
        if operation.kind == "scan":
            moved += operation.times * inner[i].moved
            copied += operation.times * inner[i].copied
            # Stacked arrays begin as zeros.
            copied += sum(program.sizes[x] for x in operation.outputs[len(operation.carried) :])
            continue
        passed = sum(map(fusion.bytes, fusion.reads[i])) + sum(map(fusion.bytes, operation.outputs))
        if not program.stacks.isdisjoint(operation.inputs):
            copied += passed
        elif operation.kind != "own":
            moved += passed
    for value in program.stacked:
        maker = fusion.maker(value)
        if not fusion.is_stored(value):
            moved += fusion.bytes(value) + sum(map(fusion.bytes, fusion.sources(value)))
        elif fusion.is_taken(value) or (maker and maker.kind in ("own", "scan")):
            copied += 2 * fusion.bytes(value)
    return moved, copied


def _peak(fusion: _Fusion, inner: dict[int, Demand]) -> tuple[float, dict[str, float]]:
    """Most bytes at once, and what they are by label."""
    program = fusion.program
    last = {value: i for i in fusion.order for value in fusion.reads[i]}
    last |= dict.fromkeys(program.results, -1)
    alive: dict[int, float] = {}
    most: tuple[float, dict[str, float]] = (0.0, {})
    total = 0.0
    for i in fusion.order:
        operation = program.operations[i]
        new = {value: program.sizes[value] for value in operation.outputs if value not in alive}
        alive |= new
        total += sum(new.values())
        taken_over = {old for old, _ in operation.carried if last.get(old) == i and old in alive}
        beside = inner[i].peak if i in inner else 0.0
        now = total + beside - sum(alive[value] for value in taken_over)
        if now > most[0]:
            inside = {LOSS if operation.of_loss else LAYERS: beside} if beside else {}
            causes = defaultdict(float, inside)
            for value in alive.keys() - taken_over:
                causes[program.labels[value]] += alive[value]
            most = (now, dict(causes))
        for value in [x for x in alive if last.get(x, i) == i]:
            total -= alive.pop(value)
    return most
