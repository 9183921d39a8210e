"""Prints how many bytes the key/value caches of models take.

    python -m asa_jax.decoding.cache
    python -m asa_jax.decoding.cache --config=configs/asa_340m.py --config.model.window_size=1024 \\
        --lengths=4096,65536 --json=cache.json --png=cache.png

Without --config it compares arms of the 340M and 1B models; with it, that model with what NSA and
grouped-query attention take at its sizes. Nothing is allocated: bytes are those of the shapes that
`init_cache` gives. docs/decoding.md explains the columns.
"""

from asa_jax.decoding.cache_options import Options, parse_options
from asa_jax.flags import exit_on_error, run_command

if __name__ == "__main__":
    # Before the seconds that it takes to import jax.
    OPTIONS = exit_on_error(parse_options)

import json

from rich.console import Console

from asa_jax.decoding.cache_bytes import cache_report
from asa_jax.decoding.cache_tables import (
    allocated_table,
    kind_table,
    plot_lengths,
    to_json,
    unevicted_table,
)

TABLE_WIDTH = 118


def main(options: Options) -> None:
    """Measures, prints the tables and writes the files asked for."""
    comparisons = {
        title: {name: cache_report(cfg, options.lengths) for name, cfg in models.items()}
        for title, models in options.comparisons.items()
    }
    console = Console(width=max(TABLE_WIDTH, Console().width))
    for title, reports in comparisons.items():
        for table in (allocated_table, unevicted_table, kind_table):
            console.print(table(title, reports))
    if options.json:
        options.json.write_text(json.dumps(to_json(comparisons), indent=2) + "\n")
    if options.png:
        plot_lengths(comparisons, options.png)


if __name__ == "__main__":
    run_command(lambda: main(OPTIONS))
