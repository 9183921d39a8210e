"""A traced function as a plain list of operations on numbered values.

Calls are written out, what a compiler sees as the same value is one value (reshapes, casts to the
own type, equal operations on equal inputs), and the body of a scan is a program of its own.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from jax.extend.core import Literal as Constant
from jax.extend.core import jaxprs_in_params

Kind = Literal["fused", "sum", "own", "scan"]
GRADIENTS, KEPT, OTHER = "gradients", "activations that the scan keeps", "other activations"

_LOOPS = ("while", "cond")
_KERNELS = ("pallas_call", "mpmd_map")
_OWN = frozenset(
    (
        "dot_general", "conv_general_dilated", "gather", "scatter", "scatter-add", "sort", "top_k",
        "cumsum", "cummax", "cummin", *_LOOPS, *_KERNELS,
    )
)  # fmt: skip
_SUMS = frozenset(
    ("reduce_sum", "reduce_max", "reduce_min", "reduce_and", "reduce_or", "argmax", "argmin")
)
# They give another view of a value, or of many values at once.
_VIEWS = frozenset(
    (
        "reshape", "squeeze", "expand_dims", "transpose", "copy", "name", "optimization_barrier",
        "stop_gradient", "sharding_constraint", "reduce_precision",
    )
)  # fmt: skip
# So do these where they change neither the number of elements nor their type.
_MAYBE_VIEWS = frozenset(("pad", "slice", "convert_element_type", "broadcast_in_dim", *_SUMS))
_RECOMPUTED = frozenset(("checkpoint", "remat", "remat2", "eval_jaxpr"))


class Operation(NamedTuple):
    """One operation.

    Attributes:
        kind: 'fused' runs within what takes its result; 'sum' takes its inputs so, too, but its
            result is an array; 'own' reads and writes arrays; 'scan' repeats its body.
        inputs: numbers of values.
        outputs: likewise.
        carried: of a scan or an update in place: pairs of inputs and the outputs that take over
            their memory.
        of_loss: whether it is part of the loss.
        body: of a scan.
        times: how often a scan runs its body.
    """

    kind: Kind
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    carried: tuple[tuple[int, int], ...] = ()
    of_loss: bool = False
    body: "Program | None" = None
    times: int = 1


@dataclasses.dataclass
class Program:
    """Operations in the order in which they were traced.

    Attributes:
        operations: all, needed or not.
        sizes: bytes in memory of each value; 0 for what lies in memory anyway.
        outside: bytes that reading such a value moves.
        stacks: such values of which a turn of a scan reads its slice.
        labels: what each value is.
        results: values that exist at the end.
        stacked: values that the scan around writes into stacked arrays.
    """

    operations: list[Operation] = dataclasses.field(default_factory=list)
    sizes: list[float] = dataclasses.field(default_factory=list)
    outside: dict[int, float] = dataclasses.field(default_factory=dict)
    stacks: set[int] = dataclasses.field(default_factory=set)
    labels: list[str] = dataclasses.field(default_factory=list)
    results: tuple[int, ...] = ()
    stacked: tuple[int, ...] = ()


def read_program(jaxpr: Any, weights: Mapping[Any, float]) -> Program:
    """Writes out a traced function.

    Args:
        jaxpr: of `jax.make_jaxpr`; its inputs count as memory of someone else.
        weights: by shape of a parameter, the bytes of its float32 gradient on this device.

    Returns:
        The program.
    """
    builder = _Builder(weights)
    inputs = [builder.outside(variable.aval) for variable in jaxpr.invars]
    results = builder.write_out(jaxpr, inputs)
    builder.program.results = tuple(value for value in results if value is not None)
    return builder.program


class _Builder:
    """Fills a program."""

    def __init__(self, weights: Mapping[Any, float]) -> None:
        self.program = Program()
        self._weights = weights
        self._known: dict[Any, list[int]] = {}

    def outside(self, aval: Any) -> int:
        """A value that is in memory anyway."""
        value = self._number(0.0, OTHER)
        self.program.outside[value] = _bytes(aval)
        return value

    def slice(self, aval: Any) -> int:
        """A slice of a stacked array that is in memory anyway."""
        stack, value = self.outside(aval), self._value(aval)
        self.program.stacks.add(stack)
        self.program.operations.append(Operation("fused", (stack,), (value,)))
        return value

    def _number(self, size: float, label: str) -> int:
        self.program.sizes.append(size)
        self.program.labels.append(label)
        return len(self.program.sizes) - 1

    def _value(self, aval: Any, label: str = OTHER) -> int:
        size = self._weights.get(aval.shape) if _bytes(aval) == 4 * aval.size else None
        if size is not None:
            return self._number(size, GRADIENTS)
        return self._number(_bytes(aval), label)

    def write_out(self, jaxpr: Any, inputs: Sequence[int]) -> list[int | None]:
        """Appends the operations of a jaxpr; returns its results, None for constants."""
        numbers: dict[Any, int] = dict(zip(jaxpr.invars, inputs, strict=True))
        numbers |= {
            variable: self._number(_bytes(variable.aval), OTHER) for variable in jaxpr.constvars
        }

        def number(variable: Any) -> int | None:
            return None if isinstance(variable, Constant) else numbers[variable]

        for equation in jaxpr.eqns:
            found = self._equation(equation, [number(x) for x in equation.invars])
            numbers.update(zip(equation.outvars, found, strict=True))
        return [number(variable) for variable in jaxpr.outvars]

    def _equation(self, equation: Any, inputs: list[int | None]) -> list[int]:
        name = equation.primitive.name
        if name == "scan":
            return self._scan(equation, [self._whole(x) for x in inputs])
        inner = _called(equation)
        if inner is not None:
            return self._call(inner, name, [self._whole(x) for x in inputs])
        if _is_view(equation, name):
            return [self._whole(x) for x in inputs[: len(equation.outvars)]]
        return self._operation(equation, name, inputs)

    def _whole(self, value: int | None) -> int:
        """A value; a new one, which costs nothing, for a constant."""
        return self._number(0.0, OTHER) if value is None else value

    def _call(self, jaxpr: Any, name: str, inputs: list[int]) -> list[int]:
        """Writes out a call; what is to be computed anew is not taken from the first time."""
        known = self._known
        if name in _RECOMPUTED:
            self._known = {}
        results = self.write_out(jaxpr, inputs)
        self._known = known
        return [self._whole(value) for value in results]

    def _operation(self, equation: Any, name: str, inputs: list[int | None]) -> list[int]:
        kind: Kind = "own" if name in _OWN else "sum" if name in _SUMS else "fused"
        key = _key(equation, inputs) if name not in (*_LOOPS, *_KERNELS) else object()
        if key in self._known:
            return self._known[key]
        outputs = [self._value(variable.aval) for variable in equation.outvars]
        taken = tuple(value for value in inputs if value is not None)
        in_place = name in ("scatter", "scatter-add", "dynamic_update_slice") and taken
        carried = ((taken[0], outputs[0]),) if in_place else ()
        self.program.operations.append(Operation(kind, taken, tuple(outputs), carried))
        self._known[key] = outputs
        return outputs

    def _scan(self, equation: Any, inputs: list[int]) -> list[int]:
        constants, carry, _ = map(len, equation.params["ft_in"].unpack())
        outputs = [self._value(variable.aval) for variable in equation.outvars[:carry]]
        outputs += [self._value(variable.aval, KEPT) for variable in equation.outvars[carry:]]
        (jaxpr,) = jaxprs_in_params(equation.params)
        operation = Operation(
            kind="scan",
            inputs=tuple(inputs),
            outputs=tuple(outputs),
            carried=tuple(zip(inputs[constants : constants + carry], outputs, strict=False)),
            of_loss="loss" in str(equation.source_info.name_stack),
            body=_body(jaxpr, constants + carry, carry),
            times=equation.params["length"],
        )
        self.program.operations.append(operation)
        return outputs


def _body(jaxpr: Any, whole: int, carry: int) -> Program:
    """The program of one turn of a scan; after `whole` inputs come slices of stacked arrays."""
    builder = _Builder({})
    inputs = [builder.outside(variable.aval) for variable in jaxpr.invars[:whole]]
    inputs += [builder.slice(variable.aval) for variable in jaxpr.invars[whole:]]
    results = builder.write_out(jaxpr, inputs)
    builder.program.results = tuple(value for value in results[:carry] if value is not None)
    builder.program.stacked = tuple(value for value in results[carry:] if value is not None)
    return builder.program


def _called(equation: Any) -> Any:
    """The jaxpr of a call; None where the equation is none."""
    name = equation.primitive.name
    if name in _OWN or name in _SUMS:
        return None
    inner = next(iter(jaxprs_in_params(equation.params)), None)
    takes_all = inner is not None and len(inner.invars) == len(equation.invars)
    return inner if takes_all else None


def _is_view(equation: Any, name: str) -> bool:
    if name in _VIEWS:
        return True
    if name not in _MAYBE_VIEWS:
        return False
    before, after = equation.invars[0].aval, equation.outvars[0].aval
    return bool((before.size, before.dtype) == (after.size, after.dtype))


def _key(equation: Any, inputs: list[int | None]) -> Any:
    """Equal for operations with equal results."""
    operands = tuple(
        str(variable) if number is None else number
        for variable, number in zip(equation.invars, inputs, strict=True)
    )
    return equation.primitive.name, operands, str(equation.params)


def _bytes(aval: Any) -> float:
    """Of an array; 0 for what is none."""
    return float(aval.size * aval.dtype.itemsize) if hasattr(aval, "dtype") else 0.0
