"""Continues a text with a trained model; the text streams to the terminal as it is drawn.

    python generate.py --workdir=runs/tiny --prompt="It is a truth"
    python generate.py --workdir=runs/tiny --prompt_file=chapter.txt --temperature=0

The continuation goes to stdout, all else to stderr. It ends with the document, or after
--max_tokens.

Exit codes: 0 done; 1 the checkpoint or a file cannot be used, or memory does not suffice; 2 a flag
is wrong; 130 Ctrl-C.
"""

from asa_jax.decoding.options import Options, parse_options
from asa_jax.flags import exit_on_error, run_command

if __name__ == "__main__":
    # Before the seconds that it takes to import jax.
    OPTIONS = exit_on_error(parse_options)

import io
import sys

from asa_jax.decoding.generate import Generator
from asa_jax.training.checkpoint import restore_params
from asa_jax.training.compilation_cache import use_compilation_cache
from pallas_kernels import dispatch

SHOWN_CHARACTERS = 300


def main(options: Options) -> None:
    """Restores the run and prints what it makes of the prompt."""
    use_compilation_cache()
    config, params, step = restore_params(options.workdir, step=options.step)
    texts = Generator(config, params, options.tokenizer).stream(
        [options.prompt],
        max_tokens=options.max_tokens,
        sampling=options.sampling,
        seed=options.seed,
    )
    print(f"{options.workdir}, step {step}", file=sys.stderr)
    print(dispatch.describe(config.model.implementation), file=sys.stderr)
    show_prompt(options.prompt)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8
    for (text,) in texts:
        print(text, end="", flush=True)
    print()


def show_prompt(prompt: str) -> None:
    """Writes the end of the prompt before its continuation, where both appear on a terminal."""
    if sys.stderr.isatty() and sys.stdout.isatty():
        dots = "..." if len(prompt) > SHOWN_CHARACTERS else ""
        print(f"{dots}{prompt[-SHOWN_CHARACTERS:]}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_command(lambda: main(OPTIONS))
