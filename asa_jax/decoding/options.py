"""The command line of `generate.py`, checked without jax."""

from pathlib import Path
from typing import NamedTuple

from absl import flags

from asa_jax.data.tokenizer import Tokenizer
from asa_jax.decoding.settings import Sampling, check_request
from asa_jax.errors import ConfigError, DataError
from asa_jax.flags import parse_arguments
from asa_jax.launch import refuse_many_processes
from asa_jax.trained_run import load_run_tokenizer, read_run_config

# Far more text than a model can read; a larger file was not meant.
MAX_PROMPT_BYTES = 2**26


class Options(NamedTuple):
    """What to generate.

    Attributes:
        workdir: of the run.
        step: of the checkpoint; None: the newest.
        tokenizer: of the run.
        prompt: text to continue.
        max_tokens: most tokens of the continuation.
        sampling: how they are drawn.
        seed: of the draws.
    """

    workdir: Path
    step: int | None
    tokenizer: Tokenizer
    prompt: str
    max_tokens: int
    sampling: Sampling
    seed: int


def parse_options() -> Options:
    """Parses and checks the command line.

    Raises:
        ConfigError: a flag is missing or wrong.
        CheckpointError: --workdir holds no run.
        DataError: the prompt file cannot be read.
    """
    _define_flags()
    parse_arguments()
    refuse_many_processes("generate.py")
    given = flags.FLAGS
    if not given.workdir:
        raise ConfigError("--workdir: missing; give a run directory, such as --workdir=runs/tiny")
    sampling = Sampling(given.temperature, given.top_k, given.top_p).checked()
    check_request(given.max_tokens, [given.seed])
    prompt = _prompt(given.prompt, given.prompt_file)
    workdir = Path(given.workdir).expanduser()
    read_run_config(workdir)
    return Options(
        workdir=workdir,
        step=given.step,
        tokenizer=load_run_tokenizer(workdir),
        prompt=prompt,
        max_tokens=given.max_tokens,
        sampling=sampling,
        seed=given.seed,
    )


def _define_flags() -> None:
    flags.DEFINE_string("workdir", None, "run directory")
    flags.DEFINE_integer("step", None, "checkpoint to use; default: the newest", lower_bound=0)
    flags.DEFINE_string("prompt", None, "text to continue; '' starts with a line break")
    flags.DEFINE_string("prompt_file", None, "UTF-8 file with the text to continue")
    flags.DEFINE_integer("max_tokens", 200, "most tokens to generate")
    flags.DEFINE_float("temperature", 0.8, "divides the logits; 0: the most likely token always")
    flags.DEFINE_integer("top_k", 0, "draw from the k most likely tokens; 0: from all")
    flags.DEFINE_float("top_p", 0.95, "draw from the most likely tokens of this probability")
    flags.DEFINE_integer("seed", 0, "of the draws: the same seed, the same text")


def _prompt(text: str | None, file: str | None) -> str:
    if (text is None) == (file is None):
        raise ConfigError("--prompt: give either --prompt or --prompt_file")
    if file is not None:
        return read_prompt(Path(file).expanduser())
    assert text is not None
    try:
        text.encode()
    except UnicodeEncodeError as error:  # bytes of the command line that are no text
        raise ConfigError(f"--prompt: character {error.start} is not UTF-8") from None
    return text


def read_prompt(path: Path) -> str:
    """Reads a prompt as it stands.

    Raises:
        DataError: it cannot be read, is too large or is not UTF-8.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_PROMPT_BYTES + 1)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    if len(content) > MAX_PROMPT_BYTES:
        raise DataError(f"{path}: larger than {MAX_PROMPT_BYTES} bytes, too long for a prompt")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8") from None
