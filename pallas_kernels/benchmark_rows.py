"""Rows of the benchmark's table, and the process that measures one of them.

`python -m pallas_kernels.benchmark_rows NAME LENGTHS` compiles, prints a line, waits for a line on
its input, and then prints a measurement a line, all as JSON. See `benchmark`, which runs it.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.benchmark_floors import (
    Work,
    compressed_work,
    dense_work,
    num_compressed,
    select_work,
    selected_work,
    window_work,
)
from pallas_kernels.cases import Case
from pallas_kernels.compressed_attention import compressed_attention
from pallas_kernels.select_blocks import select_blocks
from pallas_kernels.selected_attention import selected_attention
from pallas_kernels.sliding_window_attention import sliding_window_attention
from pallas_kernels.timed_calls import Call, time_calls

KERNEL: dispatch.Implementation = "mosaic_gpu"
DENSE_LAYER, PAIR = "dense cuDNN, 16/4 x 64", "ASA pair, q k v to o"  # names of rows

ASA = Case(
    "ASA", 0, num_heads=16, num_kv_heads=2, head_dim=160, value_dim=128, shares_value=True,
    num_selected_blocks=64,
)  # fmt: skip
NSA_16 = Case(
    "NSA 16/4 x 64", 0, num_heads=16, num_kv_heads=4, head_dim=64, value_dim=64, block_size=64,
    compression_block_size=32, num_selected_blocks=16,
)  # fmt: skip
NSA_64 = dataclasses.replace(
    NSA_16, name="NSA 64/4 x 128", num_heads=64, head_dim=128, value_dim=128,
    queries_per_selection=1,
)  # fmt: skip
MLA = Case(
    "MLA 16 x 96/64", 0, num_heads=16, num_kv_heads=16, head_dim=96, value_dim=64, window_size=512
)
DENSE = Case("16/4 x 64", 0, num_heads=16, num_kv_heads=4, head_dim=64, value_dim=64)

Shapes = dict[str, tuple[int, ...]]


def random_lists(case: Case, share_half: bool = False) -> jax.Array:
    """Lists of the first, the own and the previous block and of random ones between.

    Args:
      case: Sizes.
      share_half: Whether the queries of a block have every other random entry in common, as
        neighbours of a trained model have many; else their lists hardly overlap.

    Returns:
      int32 [1, M, K, L], ascending, -1 where there are fewer blocks.
    """
    num_groups = case.num_tokens // case.queries_per_selection
    size = case.num_selected_blocks
    group = jnp.arange(num_groups, dtype=jnp.int32)[:, None, None]
    own = group * case.queries_per_selection // case.block_size
    ends = (own - 2) * jnp.arange(size - 2) // (size - 3) + 1  # one random block between each two
    widths = jnp.maximum(ends[..., 1:] - ends[..., :-1], 1)
    shape = (num_groups, case.num_kv_heads, size - 3)
    draws = jax.random.randint(jax.random.key(1), shape, 0, 2**30)
    if share_half:
        groups_of_block = case.block_size // case.queries_per_selection
        of_first = draws[jnp.arange(num_groups) // groups_of_block * groups_of_block]
        draws = jnp.where(jnp.arange(size - 3) % 2, draws, of_first)
    between = ends[..., :-1] + draws % widths
    given = jnp.concatenate([0 * own, own - 1, own], axis=-1)
    given = jnp.broadcast_to(given, (*shape[:2], 3))
    lists = jnp.concatenate([given[..., :1], between, given[..., 1:]], axis=-1)
    every = jnp.arange(size, dtype=jnp.int32)
    every = jnp.where(every <= own, every, -1)
    return jnp.where(own < size, every, lists)[None].astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
      name: Operation and, if it has several rows, shape.
      op: The operation, by which rows are chosen.
      case: Sizes, but for the number of tokens.
      shapes: Names and shapes of the arrays that are differentiated.
      function: Takes a case, these arrays and lists of blocks.
      work: Of a forward pass, or with the backward one.
      targets: Milliseconds (forward, forward and backward) by number of tokens.
      lists: Draws the lists of blocks of a case.
    """

    name: str
    op: str
    case: Case
    shapes: Callable[[Case], Shapes]
    function: Callable[..., Any]
    work: Callable[[Case, bool], list[Work]]
    targets: dict[int, tuple[float | None, float | None]]
    lists: Callable[[Case], jax.Array] = random_lists

    @property
    def has_backward(self) -> bool:
        """Whether there is a gradient to time."""
        return self.op != "select_blocks"

    def floor(self, case: Case, backward: bool) -> float:
        """Returns the least possible milliseconds, added up over parts that run in turn."""
        return sum(part.milliseconds() for part in self.work(case, backward))


def token_shapes(case: Case, num_keys: int | None = None) -> Shapes:
    """Query, key and, if it is not a part of the key, value."""
    num_keys = case.num_tokens if num_keys is None else num_keys
    shapes: Shapes = {
        "query": (1, case.num_tokens, case.num_heads, case.head_dim),
        "key": (1, num_keys, case.num_kv_heads, case.head_dim),
    }
    if not case.shares_value:
        shapes["value"] = (1, num_keys, case.num_kv_heads, case.value_dim)
    return shapes


def compressed_shapes(case: Case) -> Shapes:
    """Query and compressed key and value."""
    return token_shapes(case, num_compressed(case))


def pair_shapes(case: Case) -> Shapes:
    """Those of a local and of a global layer."""
    local = {f"local_{name}": shape for name, shape in token_shapes(with_length(MLA, case)).items()}
    return local | token_shapes(case) | {"gates": (1, case.num_tokens, case.num_heads, 2)}


def with_length(case: Case, other: Case) -> Case:
    """The case with the number of tokens of another."""
    return dataclasses.replace(case, num_tokens=other.num_tokens)


def window_row(case: Case, arrays: dict[str, jax.Array], _: jax.Array) -> Any:
    """Sliding window attention."""
    return sliding_window_attention(
        arrays["query"], arrays["key"], arrays["value"],
        window_size=case.window_size, implementation=KERNEL,
    )  # fmt: skip


def compressed_row(case: Case, arrays: dict[str, jax.Array], _: jax.Array) -> Any:
    """Compressed attention."""
    return compressed_attention(
        arrays["query"], arrays["key"], arrays.get("value"), value_dim=case.value_dim,
        block_size=case.compression_block_size, stride=case.compression_stride,
        implementation=KERNEL,
    )  # fmt: skip


def select_row(
    case: Case, arrays: dict[str, jax.Array], _: jax.Array, lse: jax.Array | None = None
) -> jax.Array:
    """Choice of blocks, lists included."""
    shape = arrays["query"].shape[:3]
    return select_blocks(
        arrays["query"], arrays["key"], jnp.full(shape, 8.0) if lse is None else lse,
        num_selected_blocks=case.num_selected_blocks, block_size=case.block_size,
        compression_block_size=case.compression_block_size,
        compression_stride=case.compression_stride,
        queries_per_selection=case.queries_per_selection, implementation=KERNEL,
    )  # fmt: skip


def selected_row(case: Case, arrays: dict[str, jax.Array], lists: jax.Array) -> Any:
    """Attention to the blocks of given lists."""
    return selected_attention(
        arrays["query"], arrays["key"], arrays.get("value"), lists, value_dim=case.value_dim,
        block_size=case.block_size, queries_per_selection=case.queries_per_selection,
        implementation=KERNEL,
    )  # fmt: skip


def pair_row(case: Case, arrays: dict[str, jax.Array], _: jax.Array) -> Any:
    """A local and a global layer of ASA, from query, key and value to output."""
    local = {name: arrays[f"local_{name}"] for name in ("query", "key", "value")}
    local_output, _lse = window_row(MLA, local, _)
    key = arrays["key"]
    blocks = key.reshape(1, -1, case.block_size, *key.shape[2:])
    pooled = blocks.astype(jnp.float32).mean(2).astype(key.dtype)
    pooled_arrays = {"query": arrays["query"], "key": pooled}
    compressed, lse = compressed_row(case, pooled_arrays, _)
    lists = select_row(case, pooled_arrays, _, lse)
    selected, _lse = selected_row(case, arrays, lists)
    gates = arrays["gates"]
    return local_output, gates[..., :1] * compressed + gates[..., 1:] * selected


def dense_row(_: Case, arrays: dict[str, jax.Array], __: jax.Array) -> jax.Array:
    """Dense causal attention by cuDNN."""
    return jax.nn.dot_product_attention(
        arrays["query"], arrays["key"], arrays["value"], is_causal=True, implementation="cudnn"
    )


def causal_row(case: Case, arrays: dict[str, jax.Array], _: jax.Array) -> Any:
    """Dense causal attention by the kernel of sliding windows: one as long as the sequence."""
    return window_row(dataclasses.replace(case, window_size=case.num_tokens), arrays, _)


def pair_work(case: Case, backward: bool) -> list[Work]:
    """The four parts, one after another."""
    return [
        *window_work(with_length(MLA, case), backward),
        *compressed_work(case, backward),
        *select_work(case, False),
        *selected_work(case, backward),
    ]


def _targets(*values: tuple[float | None, float | None]) -> Any:
    return dict(zip((8192, 32768, 65536), values, strict=True))


NO_TARGETS = _targets((None, None), (None, None), (None, None))
HALF_SHARED = functools.partial(random_lists, share_half=True)
ROWS = (
    Row(DENSE_LAYER, "dense", DENSE, token_shapes, dense_row, dense_work, NO_TARGETS),
    Row("dense, 16/4 x 64", "dense", DENSE, token_shapes, causal_row, dense_work, NO_TARGETS),
    Row("selected, NSA 16/4 x 64", "selected_attention", NSA_16, token_shapes, selected_row,
        selected_work, _targets((0.30, 0.9), (1.2, 3.5), (2.4, 7.0))),
    Row("selected, NSA 64/4 x 128", "selected_attention", NSA_64, token_shapes, selected_row,
        selected_work, _targets((1.3, 4.0), (5.5, 16), (11, 33))),
    Row("selected, ASA", "selected_attention", ASA, token_shapes, selected_row,
        selected_work, _targets((0.25, 1.2), (1.0, 5), (2.0, 10))),
    Row("selected, NSA 64/4 x 128, half shared", "selected_attention", NSA_64, token_shapes,
        selected_row, selected_work, NO_TARGETS, HALF_SHARED),
    Row("selected, ASA, half shared", "selected_attention", ASA, token_shapes, selected_row,
        selected_work, NO_TARGETS, HALF_SHARED),
    Row("compressed, NSA 64/4 x 128", "compressed_attention", NSA_64, compressed_shapes,
        compressed_row, compressed_work, _targets((0.20, 0.8), (2.0, 8), (7.5, 30))),
    Row("compressed, ASA", "compressed_attention", ASA, compressed_shapes,
        compressed_row, compressed_work, _targets((0.06, 0.25), (0.55, 2.2), (1.9, 7.5))),
    Row("select, ASA", "select_blocks", ASA, compressed_shapes, select_row,
        select_work, _targets((0.08, None), (0.4, None), (0.9, None))),
    Row("select, NSA 16/4 x 64", "select_blocks", NSA_16, compressed_shapes, select_row,
        select_work, NO_TARGETS),
    Row("window 512, MLA 16 x 96/64", "sliding_window_attention", MLA, token_shapes, window_row,
        window_work, _targets((0.09, 0.35), (0.35, 1.3), (0.65, 2.4))),
    Row(PAIR, "pair", ASA, pair_shapes, pair_row,
        pair_work, _targets((0.55, 2.2), (2.5, 10), (5.6, 21))),
)  # fmt: skip


def with_gradient(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its gradient, given the cotangents of its results; those of lse are 0."""

    def run(arrays: dict[str, jax.Array], lists: jax.Array, given: list[jax.Array]) -> Any:
        results, pullback = jax.vjp(lambda arrays: function(arrays, lists), arrays)
        leaves, structure = jax.tree.flatten(results)
        ready = iter(given)
        cotangents = [next(ready) if is_output(x) else jnp.zeros_like(x) for x in leaves]
        return results, pullback(jax.tree.unflatten(structure, cotangents))

    return run


def is_output(result: Any) -> bool:
    """Whether a result of an operation is not the log-sum-exp."""
    return result.dtype == jnp.bfloat16


def timed_function(row: Row, case: Case, backward: bool) -> Callable[..., Any]:
    """The function of a row, of what `draw` draws."""

    def function(arrays: dict[str, jax.Array], lists: jax.Array) -> Any:
        return row.function(case, arrays, lists)

    return with_gradient(function) if backward else function


def draw(row: Row, case: Case, backward: bool) -> tuple[Any, ...]:
    """Random arguments of a row: arrays, lists and, for the gradient, cotangents."""

    def normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return jax.random.normal(key, shape, jnp.bfloat16)

    shapes, lists = row.shapes(case), row.lists(case)
    keys = jax.random.split(jax.random.key(0), len(shapes))
    arrays = {name: normal(key, shapes[name]) for key, name in zip(keys, shapes, strict=True)}
    if not backward:
        return arrays, lists
    results = jax.eval_shape(timed_function(row, case, False), arrays, lists)
    outputs = [result for result in jax.tree.leaves(results) if is_output(result)]
    keys = jax.random.split(jax.random.key(2), len(outputs))
    return arrays, lists, [normal(key, x.shape) for key, x in zip(keys, outputs, strict=True)]


def calls(row: Row, lengths: list[int]) -> Iterator[Call]:
    """What is timed of a row: at each length the forward pass, and both where it has a gradient."""
    for length in lengths:
        case = dataclasses.replace(row.case, num_tokens=length)
        for backward in (False, True) if row.has_backward else (False,):
            yield Call(
                {"length": length, "backward": backward},
                functools.partial(_call, timed_function(row, case, backward)),
                functools.partial(draw, row, case, backward),
            )


def _call(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    return function(*arguments)


def main(name: str, lengths: str) -> None:
    """Measures the row of this name; see the module."""
    row = next(row for row in ROWS if row.name == name)
    time_calls(calls(row, [int(length) for length in lengths.split(",")]))


if __name__ == "__main__":
    main(*sys.argv[1:])
