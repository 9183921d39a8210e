"""Zero-shot copying: does a model repeat an identifier that it has seen once, far back?

    python -m experiments.copying --workdir=runs/asa --output=copying.json

In held-out documents of the run's first source (code), an identifier of several tokens is looked
for that occurs for the second time in a window. Its first token is given; the others can hardly be
guessed but by copying. Scored under teacher forcing, by distance between the two places, beside
first occurrences of identifiers of the same kind, which cannot be copied.
"""

import argparse
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from asa_jax.config import MeshConfig
from asa_jax.data.shards import open_token_folder
from asa_jax.data.tokenizer import Tokenizer
from asa_jax.errors import ConfigError, DataError, exit_on_user_error
from asa_jax.evaluation.perplexity import choose_windows
from asa_jax.evaluation.results import standard_error
from asa_jax.evaluation.scorer import Scorer, TokenScores
from asa_jax.interop.restore import restore_model
from asa_jax.sharding import make_mesh
from asa_jax.trained_run import load_run_tokenizer
from asa_jax.training.compilation_cache import use_compilation_cache
from pallas_kernels import dispatch

MIN_TOKENS = 3
# A name that is no common word: one with an underscore inside, as kernel code has them.
_IDENTIFIER = re.compile(r"[A-Za-z]\w*_\w*[A-Za-z0-9]")
_DISTANCES = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)


class Occurrence(NamedTuple):
    """An identifier in a window.

    Attributes:
        start: its first token.
        stop: behind its last token.
        distance: tokens from its only earlier occurrence; None where there is none.
    """

    start: int
    stop: int
    distance: int | None


def token_texts(tokenizer: Tokenizer) -> list[str]:
    """The text of each token by itself."""
    return [tokenizer.decode([index]) for index in range(tokenizer.vocab_size)]


def find_occurrences(tokens: np.ndarray, texts: Sequence[str]) -> list[Occurrence]:
    """First and second occurrences of identifiers of several tokens in a window.

    An identifier counts where its tokens but the first, which may hold the space before it, occur
    as a sequence at most once earlier in the window.

    Args:
        tokens: int [n].
        texts: of every token id.

    Returns:
        In order of their place.
    """
    found: list[Occurrence] = []
    places: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for start, stop in _identifiers([texts[token] for token in tokens]):
        name = tuple(tokens[start + 1 : stop].tolist())
        earlier = places[name]
        if len(earlier) < 2 and _count(tokens[: start + 1], name) == len(earlier):
            found.append(Occurrence(start, stop, start - earlier[0] if earlier else None))
        earlier.append(start)
    return found


def _identifiers(pieces: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Spans of tokens that are an identifier and nothing else but a space before it."""
    ends = np.cumsum([len(piece) for piece in pieces])
    for match in _IDENTIFIER.finditer("".join(pieces)):
        start = int(np.searchsorted(ends, match.start(), side="right"))
        stop = int(np.searchsorted(ends, match.end() - 1, side="right")) + 1
        is_whole = "".join(pieces[start:stop]).strip() == match[0]
        if is_whole and stop - start >= MIN_TOKENS:
            yield start, stop


def _count(tokens: np.ndarray, name: tuple[int, ...]) -> int:
    """How often a sequence occurs."""
    if len(tokens) < len(name):
        return 0
    views = np.lib.stride_tricks.sliding_window_view(tokens, len(name))
    return int(np.all(views == np.array(name), axis=1).sum())


class Measured(NamedTuple):
    """Scores of an identifier: whether all of its tokens but the first are right, and their nats.

    Attributes:
        distance: as of `Occurrence`.
        exact: 1 or 0.
        nats: mean of a token.
    """

    distance: int | None
    exact: float
    nats: float


def measure(occurrences: Iterable[Occurrence], scores: TokenScores) -> list[Measured]:
    """Reads the scores of a window at its identifiers."""
    # Scores start at the second token.
    spans = [(o.distance, slice(o.start, o.stop - 1)) for o in occurrences]
    return [
        Measured(distance, float(scores.correct[span].all()), float(scores.nll[span].mean()))
        for distance, span in spans
    ]


def summarise(measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """Means by distance; `distance` holds the bounds, null for what was never seen before.

    Args:
        measured: identifiers of all windows.

    Returns:
        A record for each group that holds identifiers: distance, count, exact, exact_error, nats.
    """
    bounds = [None, *zip((0, *_DISTANCES), _DISTANCES, strict=False)]
    groups: list[list[Measured]] = [[] for _ in bounds]
    for item in measured:
        place = 0
        if item.distance is not None:
            place = 1 + int(np.searchsorted(_DISTANCES, item.distance))
        groups[place].append(item)
    return [_record(bound, group) for bound, group in zip(bounds, groups, strict=True) if group]


def _record(bound: tuple[int, int] | None, group: Sequence[Measured]) -> dict[str, Any]:
    exact = float(np.mean([item.exact for item in group]))
    return {
        "distance": bound,
        "count": len(group),
        "exact": exact,
        "exact_error": standard_error(exact, len(group)),
        "nats": float(np.mean([item.nats for item in group])),
    }


def run(options: argparse.Namespace) -> None:
    """Restores the run, measures and writes the records."""
    if options.length < 1 or options.windows < 1:
        raise ConfigError("--length and --windows: must be positive")
    use_compilation_cache()
    mesh = make_mesh(MeshConfig(data=1, fsdp=-1, tensor=1, context=1))
    config, params, step = restore_model(options.workdir, mesh)
    print(dispatch.describe(config.model.implementation), file=sys.stderr)
    tokenizer = load_run_tokenizer(options.workdir)
    parts = open_token_folder(config.data.sources[0]).split("validation")
    if not parts:
        raise DataError(f"{config.data.sources[0]}: no validation documents")
    windows = choose_windows(parts, options.length, options.windows * options.length)
    tokens = [parts[w.part].read(w.start, w.tokens) for w in windows]
    texts = token_texts(tokenizer)
    scores = Scorer(config, params, tokenizer, mesh).score(tokens)
    measured = [
        item
        for window, score in zip(tokens, scores, strict=True)
        for item in measure(find_occurrences(window, texts), score)
    ]
    result = {
        "step": step,
        "length": options.length,
        "windows": len(windows),
        "devices": f"{jax.device_count()} {jax.devices()[0].device_kind}",
        "groups": summarise(measured),
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(prog="python -m experiments.copying")
    parser.add_argument("--workdir", type=Path, required=True, help="run directory")
    parser.add_argument("--output", type=Path, required=True, help="the JSON file")
    parser.add_argument("--length", type=int, default=8192, help="tokens of a window")
    parser.add_argument("--windows", type=int, default=256, help="windows, about, at most")
    with exit_on_user_error():
        run(parser.parse_args(arguments))


if __name__ == "__main__":
    main()
