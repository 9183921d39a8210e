"""The command line of `generate.py`, checked without jax."""

from pathlib import Path
from typing import NamedTuple

from absl import flags

from asa_jax.async_tls.generation_options import (
    SparseOptions,
    define_decoder_flags,
    given_decoder,
)
from asa_jax.data.tokenizer import Tokenizer
from asa_jax.decoding.prompts import Prompt, check_prompts, read_prompt, read_prompts
from asa_jax.decoding.settings import (
    CHUNK_TOKENS,
    MAX_ALTERNATIVES,
    Sampling,
    check_alternatives,
    check_chunk_tokens,
    check_length,
    check_request,
)
from asa_jax.errors import ConfigError
from asa_jax.flags import parse_arguments
from asa_jax.interop.chat import (
    SYSTEM,
    USER,
    ChatTemplate,
    Message,
    encode_messages,
    find_chat_template,
)
from asa_jax.launch import refuse_many_processes
from asa_jax.run_flags import define_run_flags, given_output, given_path, given_workdir
from asa_jax.trained_run import load_run_tokenizer, read_run_config

SOURCES = ("prompt", "prompt_file", "prompts_file", "chat")


class Options(NamedTuple):
    """What to generate.

    Attributes:
        workdir: of the run.
        step: of the checkpoint; None: the newest.
        tokenizer: of the run.
        prompt: text to continue; None: `prompts` or a chat.
        prompts: texts to continue, with their results as JSON lines; None: one text or a chat.
        template: that writes the turns of a chat; None: no chat, or the model has none.
        system_prompt: first message of the chat; None: none.
        batch_size: prompts that are continued at a time.
        num_alternatives: likely tokens to give beside each; None: no log-probabilities.
        load_cache: file of the text to go on with; None: an empty one.
        save_cache: file for the text and its cache; None: no file.
        max_tokens: most tokens of a continuation.
        sampling: how they are drawn.
        seed: of the draws.
        stop: strings that end a continuation.
        chunk_tokens: most tokens that are read at a time.
        sparse: how few of the tokens are attended to; None: full attention.
    """

    workdir: Path
    step: int | None
    tokenizer: Tokenizer
    prompt: str | None
    prompts: list[Prompt] | None
    template: ChatTemplate | None
    system_prompt: str | None
    batch_size: int
    num_alternatives: int | None
    load_cache: Path | None
    save_cache: Path | None
    max_tokens: int
    sampling: Sampling
    seed: int
    stop: tuple[str, ...]
    chunk_tokens: int
    sparse: SparseOptions | None


def parse_options() -> Options:
    """Parses and checks the command line.

    Raises:
        ConfigError: a flag is missing or wrong.
        CheckpointError: --workdir holds no run.
        DataError: a file of prompts cannot be read.
    """
    _define_flags()
    parse_arguments()
    refuse_many_processes("generate.py")
    given = flags.FLAGS
    workdir = given_workdir()
    _check_combination(given)
    stop = tuple(_text("stop", text) for text in given.stop)
    sampling = Sampling(
        given.temperature, given.top_k, given.top_p, given.min_p, given.repetition_penalty
    ).checked()
    least_tokens = 1 if given.save_cache is None else 0
    check_request(given.max_tokens, [given.seed], stop, least_tokens=least_tokens)
    prompt = _prompt(given.prompt, given_path("prompt_file"))
    save_cache = given_output("save_cache")
    cfg = read_run_config(workdir).model
    check_chunk_tokens(given.chunk_tokens, cfg.alignment)
    tokenizer = load_run_tokenizer(workdir)
    start = len(tokenizer.start_ids)
    check_length(start + len(tokenizer.encode(prompt or "")), given.max_tokens)
    check_alternatives(given.log_probabilities or 0, tokenizer.vocab_size)
    template = find_chat_template(workdir) if given.chat else None
    if given.chat:
        _check_chat(workdir, tokenizer, template, given.system_prompt)
    return Options(
        workdir=workdir,
        step=given.step,
        tokenizer=tokenizer,
        prompt=prompt,
        prompts=_prompts(given_path("prompts_file"), tokenizer, given.max_tokens),
        template=template,
        system_prompt=given.system_prompt,
        batch_size=given.batch_size,
        num_alternatives=given.log_probabilities,
        load_cache=given_path("load_cache"),
        save_cache=save_cache,
        max_tokens=given.max_tokens,
        sampling=sampling,
        seed=given.seed,
        stop=stop,
        chunk_tokens=given.chunk_tokens,
        sparse=given_decoder(workdir, cfg),
    )


def _define_flags() -> None:
    define_run_flags()
    flags.DEFINE_string("prompt", None, "text to continue; '' starts with a line break")
    flags.DEFINE_string("prompt_file", None, "UTF-8 file with the text to continue")
    flags.DEFINE_string("prompts_file", None, 'JSON lines {"prompt": ...}, results as JSON lines')
    flags.DEFINE_bool("chat", False, "read lines and answer each, on the terminal")
    flags.DEFINE_string("system_prompt", None, "first message of a --chat by a chat template")
    flags.DEFINE_string("load_cache", None, "go on with the text of this file")
    flags.DEFINE_string("save_cache", None, "file for the text and its cache at the end")
    flags.DEFINE_integer("max_tokens", 200, "most tokens to generate; 0: only save_cache")
    flags.DEFINE_float("temperature", 0.8, "divides the logits; 0: the most likely token always")
    flags.DEFINE_integer("top_k", 0, "draw from the k most likely tokens; 0: from all")
    flags.DEFINE_float("top_p", 0.95, "draw from the most likely tokens of this probability")
    flags.DEFINE_float("min_p", 0.0, "draw from tokens this many times as likely as the first")
    flags.DEFINE_float("repetition_penalty", 1.0, "makes tokens that came before less likely")
    flags.DEFINE_multi_string("stop", [], "text that ends the continuation; may be repeated")
    flags.DEFINE_integer("seed", 0, "of the draws: the same seed, the same text")
    flags.DEFINE_integer("batch_size", 8, "prompts of a file at a time", lower_bound=1)
    flags.DEFINE_integer(
        "log_probabilities", None, "give those of tokens, and of this many likely alternatives",
        lower_bound=0, upper_bound=MAX_ALTERNATIVES,
    )  # fmt: skip
    flags.DEFINE_integer("chunk_tokens", CHUNK_TOKENS, "most tokens to read at a time")
    define_decoder_flags()


def _check_combination(given: flags.FlagValues) -> None:
    """Raises a ConfigError unless the flags go together."""
    sources = [name for name in SOURCES if given[name].value not in (None, False)]
    if len(sources) != 1:
        raise ConfigError("--prompt: give one of --prompt, --prompt_file, --prompts_file, --chat")
    if given.prompts_file is not None:
        for name in ("load_cache", "save_cache"):
            if given[name].value is not None:
                raise ConfigError(f"--{name}: holds one text, --prompts_file has many")
    else:
        for name in ("log_probabilities", "batch_size"):
            if given[name].present:
                raise ConfigError(f"--{name}: goes with --prompts_file")
    if given.system_prompt is not None and not given.chat:
        raise ConfigError("--system_prompt: goes with --chat")


def _prompts(path: Path | None, tokenizer: Tokenizer, max_tokens: int) -> list[Prompt] | None:
    if path is None:
        return None
    prompts = read_prompts(path)
    check_prompts(path, prompts, tokenizer, max_tokens)
    return prompts


def _check_chat(
    workdir: Path, tokenizer: Tokenizer, template: ChatTemplate | None, system: str | None
) -> None:
    """Writes a first turn, which a broken template or one without system prompts cannot."""
    if template is None and system is not None:
        raise ConfigError(f"--system_prompt: {workdir} has no chat template, which would place it")
    if template is not None:
        first = (
            [] if system is None else [{"role": SYSTEM, "content": _text("system_prompt", system)}]
        )
        messages: list[Message] = [*first, {"role": USER, "content": "?"}]
        encode_messages(template, tokenizer, messages)


def _prompt(text: str | None, file: Path | None) -> str | None:
    if file is not None:
        return read_prompt(file)
    return None if text is None else _text("prompt", text)


def _text(flag: str, text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # bytes of the command line that are no text
        raise ConfigError(f"--{flag}: character {error.start} is not UTF-8") from None
    return text
