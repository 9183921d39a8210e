"""Which blocks of the past do queries choose, and how alike are the lists of neighbours?

    python -m experiments.selection --workdir=runs/asa --output=selection.json

Held-out windows of the run's sources are read but for their end, and that a token at a time with
the caches of decoding, which hold the lists in force. What lists share is what kernels can read
once for several of them.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from asa_jax.config import MeshConfig, ModelConfig
from asa_jax.data.shards import open_token_folder
from asa_jax.decoding.steps import empty_state, read_chunk
from asa_jax.errors import ConfigError, DataError, exit_on_user_error
from asa_jax.interop.restore import restore_model
from asa_jax.model.transformer import abstract_model
from asa_jax.sharding import make_mesh
from asa_jax.training.compilation_cache import use_compilation_cache
from pallas_kernels import dispatch

DECODED_TOKENS = 256
NEIGHBOURS = 16  # lists in a row whose different blocks are counted


def read_lists(cfg: ModelConfig, params: Any, tokens: np.ndarray) -> np.ndarray:
    """The lists of the last queries of windows.

    Args:
        cfg: the architecture.
        params: nested dict of parameters, on one device.
        tokens: int32 [B, T], T a multiple of `cfg.alignment` above DECODED_TOKENS.

    Returns:
        int32 [N, layers, B, K, L]: lists in a row, one every `cfg.queries_per_selection` tokens,
        of the layers that select, -1 where a list has fewer than L blocks.
    """
    rows, length = tokens.shape
    prompt = length - DECODED_TOKENS
    lengths = np.full(rows, prompt, np.int32)
    state = empty_state(cfg=cfg, num_rows=rows, cache_length=length)
    state = read_chunk(params, state, tokens[:, :prompt], np.int32(0), lengths, cfg=cfg)

    @jax.jit
    def decode(params: Any, cache: Any, tokens: jax.Array) -> jax.Array:
        model = nnx.merge(abstract_model(cfg)[0], params)

        def step(carry: Any, new: jax.Array) -> tuple[Any, jax.Array]:
            position, cache = carry
            _, cache = model.decode(new, position, cache)
            return (position + 1, cache), _lists(cache)

        return jax.lax.scan(step, (jnp.asarray(lengths), cache), tokens.T)[1]

    lists = np.asarray(decode(params, state.cache, tokens[:, prompt:]))
    return lists[:: cfg.queries_per_selection]


def _lists(cache: Any) -> jax.Array:
    """The lists in force of all layers, [layers, B, K, L]; scanned layers stand together."""
    found = [
        leaf.reshape(-1, *leaf.shape[-3:])
        for path, leaf in jax.tree_util.tree_leaves_with_path(cache)
        if jax.tree_util.keystr(path[-1:]) == ".block_indices"
    ]
    return jnp.concatenate(found)


def describe_lists(lists: np.ndarray, cfg: ModelConfig, start: int) -> dict[str, float]:
    """What lists in a row share, and how far back they reach.

    Args:
        lists: int [N, ..., L] of queries that are `cfg.queries_per_selection` tokens apart, -1
            where there is no block.
        cfg: sizes.
        start: position of the first query.

    Returns:
        repeated, the share of a list's blocks that the list before has too; distinct, different
        blocks of NEIGHBOURS lists in a row for each block listed; beyond_window, the share of
        listed blocks that end before the window of the query; median_distance in tokens.
    """
    listed = lists >= 0
    common = np.any(lists[1:, ..., None] == lists[:-1, ..., None, :], axis=-1) & listed[1:]
    whole = len(lists) // NEIGHBOURS * NEIGHBOURS
    runs = np.moveaxis(lists[:whole].reshape(-1, NEIGHBOURS, *lists.shape[1:]), 1, -2)
    runs = np.sort(runs.reshape(-1, NEIGHBOURS * lists.shape[-1]), axis=-1)
    is_new = (np.diff(runs, axis=-1, prepend=-1) > 0) & (runs >= 0)
    positions = start + cfg.queries_per_selection * np.arange(len(lists))
    positions = positions.reshape(-1, *[1] * (lists.ndim - 1))
    ends = (lists + 1) * cfg.selection_block_size
    distances = np.maximum(0, positions - ends + 1)[listed]
    return {
        "repeated": float(common.sum() / listed[1:].sum()),
        "distinct": float(is_new.sum() / (runs >= 0).sum()),
        "beyond_window": float(np.mean(distances >= cfg.window_size)),
        "median_distance": float(np.median(distances)),
    }


def run(options: argparse.Namespace) -> None:
    """Restores the run, reads the lists and writes the record."""
    use_compilation_cache()
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, tensor=1, context=1), jax.devices()[:1])
    config, params, step = restore_model(options.workdir, mesh)
    cfg = config.model
    _check(options, cfg)
    print(dispatch.describe(cfg.implementation), file=sys.stderr)
    records = []
    for source in config.data.sources:
        tokens = read_windows(source, options.length, options.windows)
        lists = read_lists(cfg, params, tokens)
        start = options.length - DECODED_TOKENS
        layers = [describe_lists(lists[:, i], cfg, start) for i in range(lists.shape[1])]
        records.append({"source": source, "windows": len(tokens), "layers": layers})
    result = {
        "step": step,
        "length": options.length,
        "queries_per_selection": cfg.queries_per_selection,
        "blocks": cfg.num_selected_blocks,
        "sources": records,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")


def read_windows(source: str, length: int, most: int) -> np.ndarray:
    """Whole windows of held-out documents, evenly spread.

    Args:
        source: token folder.
        length: tokens of a window.
        most: windows, at most.

    Returns:
        int32 [windows, length].

    Raises:
        DataError: no document is long enough.
    """
    parts = open_token_folder(source).split("validation")
    places = [
        (documents, start)
        for documents in parts
        for first, stop in itertools.pairwise(documents.offsets)
        for start in range(first, stop - length + 1, length)
    ]
    if not places:
        raise DataError(f"{source}: no validation document has {length} tokens")
    chosen = np.linspace(0, len(places) - 1, min(most, len(places))).round().astype(int)
    return np.stack([places[i][0].read(places[i][1], length) for i in chosen]).astype(np.int32)


def _check(options: argparse.Namespace, cfg: ModelConfig) -> None:
    selects = "global" in cfg.layer_kinds or (
        "nsa" in cfg.layer_kinds and "selection" in cfg.nsa_branches
    )
    if not selects:
        raise ConfigError(f"--workdir={options.workdir}: its layers select no blocks")
    multiple = cfg.alignment
    if options.length <= DECODED_TOKENS or options.length % multiple:
        raise ConfigError(
            f"--length={options.length}: must be a multiple of {multiple} above {DECODED_TOKENS}"
        )
    if options.windows < 1:
        raise ConfigError(f"--windows={options.windows}: must be positive")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m experiments.selection")
    parser.add_argument("--workdir", type=Path, required=True, help="run directory")
    parser.add_argument("--output", type=Path, required=True, help="the JSON file")
    parser.add_argument("--length", type=int, default=8192, help="tokens of a window")
    parser.add_argument("--windows", type=int, default=16, help="of each source, at most")
    with exit_on_user_error():
        run(parser.parse_args(arguments))


if __name__ == "__main__":
    main()
