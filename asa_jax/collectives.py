"""The collectives of a compiled program, from its HLO text."""

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

OPERATIONS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(
    rf"= (?P<type>.*?) (?P<op>{'|'.join(OPERATIONS)})(?P<start>-start)?\((?P<rest>.*)$"
)
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_CALLED = re.compile(
    r"(?:to_apply|calls|body|condition|branch_computations)=(\{[^}]*\}|%?[\w.\-]+)"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_GROUPS = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}")
_IOTA_GROUPS = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
# Over axes of a mesh, or over parts of them: 'axis':(what is before the part)its size.
_MESH_GROUPS = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")
_AXIS = re.compile(r"'([^']*)'(?:=(\d+))?(?::\((\d+)\)(\d+))?")
_SOURCE = re.compile(r'op_name="([^"]*)"')


class Collective(NamedTuple):
    """One kind of collective of a program.

    Attributes:
        op: one of OPERATIONS.
        axes: mesh axes whose devices take part.
        shapes: dtype and shape of the arrays that each device receives.
        bytes: of one execution on one device: of the whole arrays, so what is received by an
            all-gather, and what is given to a reduce-scatter.
        times: executions in one run of the program.
        source: where in the traced program the first of them comes from.
    """

    op: str
    axes: tuple[str, ...]
    shapes: tuple[str, ...]
    bytes: int
    times: int
    source: str


def collectives(hlo: str, mesh_shape: Mapping[str, int]) -> list[Collective]:
    """Lists the collectives of a compiled program, the largest in total first.

    Args:
        hlo: `jitted.lower(...).compile().as_text()`.
        mesh_shape: sizes of the mesh axes in order, as `mesh.shape`.

    Returns:
        One entry for each operation, shape and set of axes. Loops whose number of turns the
        compiler does not know count once.
    """
    lines = _computations(hlo)
    found: Counter[Collective] = Counter()
    sources: dict[Collective, str] = {}
    for name, runs in _runs(lines).items():
        for line in lines[name]:
            match = _INSTRUCTION.search(line)
            if match:
                kind = _describe(match, mesh_shape)
                if not kind.axes:  # of one device each
                    continue
                found[kind] += runs
                source = _SOURCE.search(line)
                sources.setdefault(kind, source[1] if source else "")
    merged = [
        kind._replace(times=times, source=sources[kind]) for kind, times in found.items() if times
    ]
    return sorted(merged, key=lambda c: -c.bytes * c.times)


def _computations(hlo: str) -> dict[str, list[str]]:
    """The lines of each computation; that of the entry is ''."""
    lines: dict[str, list[str]] = {}
    current: list[str] = []
    for line in hlo.splitlines():
        header = _COMPUTATION.match(line)
        if header:
            current = lines.setdefault("" if header[1] else header[2], [])
        else:
            current.append(line)
    return lines


def _runs(lines: Mapping[str, list[str]]) -> Counter[str]:
    """How often each computation runs in one run of the program."""
    runs: Counter[str] = Counter()

    def visit(name: str, times: int) -> None:
        runs[name] += times
        for line in lines[name]:
            trips = _TRIPS.search(line) if " while(" in line else None
            for called in _names(line):
                if called in lines:
                    visit(called, times * int(trips[1]) if trips else times)

    visit("", 1)
    return runs


def _names(line: str) -> Iterator[str]:
    for called in _CALLED.findall(line):
        for name in called.strip("{}").split(","):
            yield name.strip().removeprefix("%")


def _describe(match: re.Match[str], mesh_shape: Mapping[str, int]) -> Collective:
    op, arrays = match["op"], _ARRAY.findall(match["type"])
    if match["start"] and op != "all-reduce":
        # An asynchronous start has its operands beside its results, and sometimes contexts.
        arrays = [array for array in arrays if array != ("u32", "")]
        arrays = arrays[len(arrays) // 2 :]
    groups = _device_groups(match["rest"])
    size = sum(_num_bytes(dtype, dims) for dtype, dims in arrays)
    if op == "reduce-scatter":
        size *= len(groups[0])
    shapes = tuple(f"{dtype}[{dims}]" for dtype, dims in arrays)
    return Collective(op, _axes(groups, mesh_shape), shapes, size, 0, "")


def _device_groups(text: str) -> list[list[int]]:
    mesh = _MESH_GROUPS.search(text)
    if mesh:
        return _mesh_groups(_AXIS.findall(mesh[1]), _AXIS.findall(mesh[2]))
    iota = _IOTA_GROUPS.search(text)
    if iota:
        shape, dims = (_integers(part) for part in iota.groups()[:2])
        ids = np.arange(math.prod(dims)).reshape(dims)
        if iota[3]:
            ids = ids.transpose(_integers(iota[3]))
        return ids.reshape(shape).tolist()
    listed = _GROUPS.search(text)
    return [_integers(group) for group in re.findall(r"\{([\d,]+)\}", listed[1])] if listed else []


def _mesh_groups(mesh: list[tuple[str, ...]], taken: list[tuple[str, ...]]) -> list[list[int]]:
    sizes = {name: int(size) for name, size, _, _ in mesh}
    parts = {name: (int(before or 1), int(size or sizes[name])) for name, _, before, size in taken}
    dims: list[int] = []
    grouped: list[int] = []
    for name, size in sizes.items():
        before, part = parts.get(name, (size, 1))
        grouped += [len(dims) + 1] if name in parts else []
        dims += [before, part, size // (before * part)]
    rest = [dim for dim in range(len(dims)) if dim not in grouped]
    ids = np.arange(math.prod(sizes.values())).reshape(dims).transpose([*rest, *grouped])
    return ids.reshape(-1, math.prod(part for _, part in parts.values())).tolist()


def _axes(groups: list[list[int]], mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
    """Mesh axes along which the devices of a group differ; all of them without groups."""
    if not groups:
        return tuple(mesh_shape)
    sizes = tuple(mesh_shape.values())
    differ = [
        len(set(coordinates)) > 1
        for group in groups
        for coordinates in np.transpose([np.unravel_index(device, sizes) for device in group])
    ]
    by_axis = np.reshape(differ, (len(groups), len(sizes))).any(axis=0)
    return tuple(itertools.compress(mesh_shape, by_axis))


def _num_bytes(dtype: str, dims: str) -> int:
    bits = 8 if dtype == "pred" else int(re.sub(r"\D*(\d+).*", r"\1", dtype))
    return math.prod(_integers(dims)) * bits // 8


def _integers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]
