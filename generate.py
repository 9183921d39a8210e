"""Continues a text with a trained model; the text streams to the terminal as it is drawn.

    python generate.py --workdir=runs/tiny --prompt="It is a truth"
    python generate.py --workdir=runs/tiny --prompt_file=book.txt --max_tokens=0 --save_cache=b
    python generate.py --workdir=runs/tiny --load_cache=b --chat
    python generate.py --workdir=models/SmolLM2-135M-Instruct --chat --system_prompt="Be brief."
    python generate.py --workdir=runs/tiny --prompts_file=prompts.jsonl > completions.jsonl

The continuation goes to stdout, all else to stderr. It ends with the document, before a --stop, or
after --max_tokens. A chat ends with Ctrl-D; Ctrl-C ends an answer.

Exit codes: 0 done; 1 the checkpoint or a file cannot be used, or memory does not suffice; 2 a flag
is wrong; 130 Ctrl-C.
"""

from asa_jax.decoding.options import Options, parse_options
from asa_jax.flags import exit_on_error, run_command

if __name__ == "__main__":
    # Before the seconds that it takes to import jax.
    OPTIONS = exit_on_error(parse_options)

import contextlib
import io
import json
import sys

from asa_jax.async_tls.runners import OffloadRunner, make_runner
from asa_jax.decoding.batches import complete_prompts, to_json
from asa_jax.decoding.chat import Chat
from asa_jax.decoding.conversation import Conversation
from asa_jax.decoding.generate import Generator
from asa_jax.decoding.progress import show_progress
from asa_jax.errors import DataError
from asa_jax.interop.restore import restore_model
from asa_jax.training.compilation_cache import use_compilation_cache
from pallas_kernels import dispatch

SHOWN_CHARACTERS = 300


def main(options: Options) -> None:
    """Restores the run and prints what it makes of the prompt, the prompts or the lines."""
    use_compilation_cache()
    config, params, step = restore_model(options.workdir, step=options.step)
    sparse, size = options.sparse, options.tokenizer.vocab_size
    runner = sparse and make_runner(sparse, config.model, params, size, options.chunk_tokens)
    generator = Generator(
        config, params, options.tokenizer, chunk_tokens=options.chunk_tokens, runner=runner
    )
    print(f"{options.workdir}, step {step}", file=sys.stderr)
    print(dispatch.describe(config.model.implementation), file=sys.stderr)
    if isinstance(runner, OffloadRunner):
        print(runner.backend_line, file=sys.stderr)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8

    if options.prompts is not None:
        complete(generator, options)
    else:
        converse(generator, options)
    if sparse and sparse.show_engine and isinstance(runner, OffloadRunner):
        print(runner.figures.describe(), file=sys.stderr)


def converse(generator: Generator, options: Options) -> None:
    """Continues the prompt, or answers lines; saves the text."""
    loaded = options.load_cache
    conversation = Conversation.load(generator, loaded) if loaded else Conversation(generator)
    try:
        if options.prompt is None:
            chat(conversation, options)
        else:
            answer(conversation, options.prompt, options, shown=options.prompt)
    finally:  # the text so far, after an error or an interrupt too
        if options.save_cache and conversation.tokens:
            conversation.save(options.save_cache)


def complete(generator: Generator, options: Options) -> None:
    """Prints a JSON line for each prompt."""
    assert options.prompts is not None
    with show_progress("prompts") as progress:
        for prompt, completion in complete_prompts(
            generator,
            options.prompts,
            seed=options.seed,
            batch_size=options.batch_size,
            progress=progress,
            max_tokens=options.max_tokens,
            sampling=options.sampling,
            stop=options.stop,
            num_alternatives=options.num_alternatives or 0,
        ):
            wanted = options.num_alternatives is not None
            result = to_json(prompt, completion, log_probabilities=wanted)
            print(json.dumps(result, ensure_ascii=False), flush=True)


def chat(conversation: Conversation, options: Options) -> None:
    """Answers lines until there are no more."""
    talk = Chat(conversation, options.tokenizer, options.template, options.system_prompt)
    if options.template is None:
        print("no chat template: lines go to the model as they are", file=sys.stderr)
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        try:
            line = input()
            line.encode()  # in a C locale bytes that are no text come as surrogates
        except EOFError:
            return
        except UnicodeError:
            raise DataError("stdin: a line is not UTF-8") from None
        try:
            answer(talk, line, options)
        except KeyboardInterrupt:
            print()


def answer(talk: Conversation | Chat, text: str, options: Options, shown: str = "") -> None:
    """Reads a text and prints its continuation as it comes, on a terminal behind what is shown."""
    with contextlib.ExitStack() as stack:
        with show_progress("tokens read") as progress:
            parts = talk.answer(
                text,
                max_tokens=options.max_tokens,
                sampling=options.sampling,
                seed=options.seed,
                stop=options.stop,
                progress=progress,
            )
            stack.callback(parts.close)
            first = next(parts)
        show_prompt(shown)
        print(first, end="", flush=True)
        for part in parts:
            print(part, end="", flush=True)
    print()


def show_prompt(prompt: str) -> None:
    """Writes the end of the prompt before its continuation, where both appear on a terminal."""
    if sys.stderr.isatty() and sys.stdout.isatty():
        dots = "..." if len(prompt) > SHOWN_CHARACTERS else ""
        print(f"{dots}{prompt[-SHOWN_CHARACTERS:]}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_command(lambda: main(OPTIONS))
