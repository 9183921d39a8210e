"""Turns text into a token folder (`shards.py` describes it).

python -m asa_jax.data.prepare --input 'texts/train/*' --validation-input 'texts/validation/*' \\
    --tokenizer texts/tokenizer.json --output tokens/

The same command, run again after an interruption, goes on from the last finished shards; run again
when nothing changed, it says so.
"""

import argparse
import contextlib
import dataclasses
import errno
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from asa_jax.data.rounds import PROGRESS, Request, State, write_rounds
from asa_jax.data.shard_writer import PARTIAL, locked, verify_shard, whole_file, write_json
from asa_jax.data.shards import (
    FORMAT_VERSION,
    MANIFEST,
    SPLITS,
    TOKENIZER,
    open_token_folder,
    read_json,
    shard_from_json,
    token_dtype,
)
from asa_jax.data.sources import SUFFIXES, find_inputs
from asa_jax.data.tokenizer import BYTES, Tokenizer, load_tokenizer
from asa_jax.errors import ConfigError, DataError, UserError

DEFAULT_SHARD_TOKENS = 2**26


def prepare(options: argparse.Namespace) -> str:
    """Makes or completes a token folder.

    Args:
        options: what `parse` returns.

    Returns:
        One line that says what the folder holds.

    Raises:
        DataError: the input, the folder or the disk cannot be used.
        ConfigError: an option is out of range.
    """
    tokenizer = load_tokenizer(options.tokenizer, options.end_of_document)
    request = _request(options, tokenizer)
    with _disk_errors(options.output), locked(options.output):
        if options.overwrite:
            _remove(options.output)
        if _is_finished(options.output, request):
            return f"{_describe(options.output)}; nothing to do"
        state = _load_state(options.output, request, tokenizer)
        write_rounds(options.output, request, state, tokenizer)
        _finish(options.output, request, state, tokenizer)
    return f"{_describe(options.output)}; {state.skipped} empty documents skipped"


def _request(options: argparse.Namespace, tokenizer: Tokenizer) -> Request:
    if not 0 <= options.validation_fraction < 1:
        raise ConfigError(f"--validation-fraction {options.validation_fraction}: must be in [0, 1)")
    if options.shard_tokens < 1:
        raise ConfigError(f"--shard-tokens {options.shard_tokens}: must be positive")
    if options.workers is not None and options.workers < 1:
        raise ConfigError(f"--workers {options.workers}: must be positive")
    validation = find_inputs(options.validation_input)
    splits = dict.fromkeys(validation, "validation")
    for file in find_inputs(options.input):
        splits.setdefault(file, "train" if validation else "hash")
    return Request(
        files=[[*file, split] for file, split in splits.items()],
        text_field=options.text_field,
        prompt_field=options.prompt_field,
        validation_fraction=options.validation_fraction,
        shard_tokens=options.shard_tokens,
        tokenizer_fingerprint=tokenizer.fingerprint,
        end_of_document=tokenizer.end_of_document,
    )


@contextlib.contextmanager
def _disk_errors(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        hint = ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            hint = "; finished shards are kept, make room and run the same command again"
        raise DataError(f"{output}: cannot be written ({error.strerror}){hint}") from None


def _remove(output: Path) -> None:
    # The manifest first: from here on the folder is unfinished.
    for name in (MANIFEST, PROGRESS, TOKENIZER):
        (output / name).unlink(missing_ok=True)
    for split in SPLITS:
        for path in [*output.glob(f"{split}-*.bin"), *output.glob(f"{split}-*.offsets.npy")]:
            path.unlink()


def _is_finished(output: Path, request: Request) -> bool:
    if not (output / MANIFEST).exists():
        return False
    _refuse_other_request(output, read_json(output / MANIFEST).get("request"), request)
    try:
        open_token_folder(output)
    except DataError as error:
        print(f"{error}: doing so", file=sys.stderr)
        _remove(output)
        return False
    return True


def _refuse_other_request(output: Path, before: Any, request: Request) -> None:
    now = dataclasses.asdict(request)
    before = before if isinstance(before, dict) else {}
    changed = ", ".join(name for name in now if before.get(name) != now[name])
    if changed:
        raise DataError(
            f"{output}: was made from something else ({changed} changed); choose another --output "
            "or add --overwrite"
        )


def _load_state(output: Path, request: Request, tokenizer: Tokenizer) -> State:
    for partial in output.glob(f"*{PARTIAL}"):
        partial.unlink()
    path = output / PROGRESS
    if not path.exists():
        return State(shards=[])
    content = read_json(path)
    _refuse_other_request(output, content.get("request"), request)
    try:
        state = State(**content["state"])
    except (KeyError, TypeError):
        raise DataError(f"{path}: not the progress of a prepare; add --overwrite") from None
    for record in state.shards:
        shard = shard_from_json(record, str(path))
        verify_shard(output, shard, token_dtype(tokenizer.vocab_size))
    print(f"{output}: {len(state.shards)} finished shards verified, going on", file=sys.stderr)
    return state


def _finish(output: Path, request: Request, state: State, tokenizer: Tokenizer) -> None:
    if not any(shard["name"].startswith("train") for shard in state.shards):
        raise DataError(
            f"no training text: {len(request.files)} files, {state.skipped} empty documents"
        )
    if tokenizer.source is not None:
        with whole_file(output / TOKENIZER) as file:
            file.write(tokenizer.source.encode())
    manifest = {
        "format_version": FORMAT_VERSION,
        "vocab_size": tokenizer.vocab_size,
        "dtype": token_dtype(tokenizer.vocab_size).name,
        "tokenizer": BYTES if tokenizer.source is None else TOKENIZER,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "end_of_document": tokenizer.end_of_document,
        "end_of_document_id": tokenizer.end_of_document_id,
        "skipped_empty_documents": state.skipped,
        "shards": state.shards,
        "request": dataclasses.asdict(request),
    }
    write_json(output / MANIFEST, manifest)
    (output / PROGRESS).unlink()


def _describe(output: Path) -> str:
    folder = open_token_folder(output)
    parts = [
        f"{folder.total(split, 'tokens'):,} {split} tokens in "
        f"{folder.total(split, 'documents'):,} documents"
        for split in SPLITS
    ]
    return f"{output}: {', '.join(parts)}"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line; exits with code 2 on an unknown option."""
    parser = argparse.ArgumentParser(
        prog="python -m asa_jax.data.prepare", description="Turn text into token shards."
    )
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        help=f"files, quoted globs or hf://datasets/... of {', '.join(SUFFIXES)}",
    )
    parser.add_argument("--tokenizer", required=True, help="a tokenizer.json, or 'bytes'")
    parser.add_argument("--output", type=Path, required=True, help="the token folder")
    parser.add_argument("--validation-input", nargs="+", default=(), help="files of validation")
    parser.add_argument(
        "--validation-fraction",
        type=float,
        default=0.01,
        help="share of documents, without --validation-input (default 0.01)",
    )
    parser.add_argument("--text-field", default="text", help="of JSONL and Parquet records")
    parser.add_argument("--prompt-field", help="of what is read before the text and not learnt")
    parser.add_argument("--end-of-document", help="token that ends a document, if unusual")
    parser.add_argument(
        "--shard-tokens",
        type=int,
        default=DEFAULT_SHARD_TOKENS,
        help="a shard ends, and progress is kept, at this many tokens",
    )
    parser.add_argument("--workers", type=int, help="threads (default: one a core)")
    parser.add_argument("--overwrite", action="store_true", help="start anew in --output")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command."""
    options = parse(arguments)
    if options.workers is not None:
        # Read by the tokenizer library when it encodes its first batch.
        os.environ["RAYON_NUM_THREADS"] = str(options.workers)
    try:
        print(prepare(options))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print(f"{options.output}: stopped; run the same command again to go on", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
