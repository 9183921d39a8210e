"""A whole corpus: packages fetched one after the other, then built in processes."""

import contextlib
import functools
import multiprocessing
import signal
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from asa_jax.data.progress import show_progress
from asa_jax.data.shard_writer import PARTIAL, locked
from asa_jax.errors import DataError
from experiments.corpus.build import build_package, request
from experiments.corpus.download import fetch
from experiments.corpus.manifest import Corpus
from experiments.corpus.packages import Package


def build_corpus(
    packages: Sequence[Package], output: Path, archives: Path, seed: int, workers: int
) -> Corpus:
    """Makes or completes a corpus folder.

    Args:
        packages: what goes in; one that is not available is told in a line and left out.
        output: the corpus folder.
        archives: keeps the downloaded packages.
        seed: of the split into training and validation.
        workers: processes; the files do not depend on it.

    Returns:
        The finished corpus.

    Raises:
        DataError: no package could be had, one is damaged, or a process was killed.
    """
    with locked(output):
        for partial in output.glob(f"*/*{PARTIAL}"):
            partial.unlink()
        found = _fetch_all(packages, archives)
        corpus = Corpus(output)
        left = {p: path for p, path in found.items() if not corpus.holds(request(p, path, seed))}
        if left:
            _build_all(left, corpus, output, seed, workers)
    return corpus


def _fetch_all(packages: Sequence[Package], archives: Path) -> dict[Package, Path]:
    found = {}
    for number, package in enumerate(packages, start=1):
        try:
            found[package] = fetch(package, archives)
        except DataError as error:
            _say(str(error))
        else:
            _say(f"package {number} of {len(packages)}: {found[package].name}")
    if not found:
        raise DataError("none of the packages is available; run apt-get update, then this again")
    return found


def _build_all(
    left: dict[Package, Path], corpus: Corpus, output: Path, seed: int, workers: int
) -> None:
    # The largest first, so that it does not run alone at the end.
    sizes = {package: path.stat().st_size for package, path in left.items()}
    context = multiprocessing.get_context("spawn")
    counts = context.Array("q", len(left))
    with (
        show_progress(sum(sizes.values()), "packages") as report,
        ProcessPoolExecutor(workers, context, _set_counts, (counts,)) as pool,
        contextlib.ExitStack() as on_exit,
    ):
        # After an error nothing more is begun.
        on_exit.callback(pool.shutdown, wait=False, cancel_futures=True)
        pending: set[Future[dict[str, Any]]] = {
            pool.submit(_build_counted, index, package, left[package], output, seed)
            for index, package in enumerate(sorted(left, key=lambda p: -sizes[p]))
        }
        while pending:
            done, pending = wait(pending, timeout=1, return_when="FIRST_COMPLETED")
            for future in done:
                corpus.add(_record(future))
            report(sum(counts[:]), len(corpus.packages))


def _record(future: Future[dict[str, Any]]) -> dict[str, Any]:
    try:
        return future.result()
    except BrokenProcessPool:
        raise DataError(
            "a process was killed, perhaps for want of memory; run the same command again with "
            "fewer --workers to go on"
        ) from None


_counts: Any = None  # of a worker process: bytes done of each package


def _set_counts(counts: Any) -> None:
    global _counts
    _counts = counts
    # An interrupt at the keyboard reaches every process; only the first has something to say.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _build_counted(
    index: int, package: Package, archive: Path, output: Path, seed: int
) -> dict[str, Any]:
    report: Callable[[int], None] = functools.partial(_counts.__setitem__, index)
    record = build_package(package, archive, output, seed, report)
    report(archive.stat().st_size)
    return record


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
