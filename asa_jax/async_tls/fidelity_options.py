"""The command line of `asa_jax.async_tls.fidelity`, checked without jax."""

import dataclasses
from pathlib import Path

from absl import flags

from asa_jax.async_tls.command_line import (
    channels_file,
    define_config_flag,
    given_config,
)
from asa_jax.async_tls.settings import DecodingConfig
from asa_jax.config_evaluation import MAX_EVALUATION_TOKENS
from asa_jax.data.tokenizer import Tokenizer
from asa_jax.errors import ConfigError
from asa_jax.evaluation.options import DEFAULT_FILLER
from asa_jax.flags import parse_arguments
from asa_jax.launch import refuse_many_processes
from asa_jax.run_flags import given_files, given_workdir
from asa_jax.trained_run import load_run_tokenizer, read_run_config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure.

    Attributes:
        workdir: run directory or model folder.
        step: of the checkpoint; None: the newest.
        tokenizer: of the model.
        settings: block size and dense layers are used; budgets are those below.
        channels: file of calibrated channels.
        text: files whose perplexity is measured.
        filler: text that hides needles.
        lengths: tokens of a context.
        budgets: tokens that are kept.
        candidates: tokens of the blocks that level 1 keeps, for each token of the budget; each
            number is measured.
        num_contexts: of each length.
        tail_tokens: decoded at the end of a context.
        task_length: tokens of a prompt of the tasks.
        num_samples: of each task; 0: no tasks.
        output: path of the report without its suffix.
    """

    workdir: Path
    step: int | None
    tokenizer: Tokenizer
    settings: DecodingConfig
    channels: Path
    text: list[Path]
    filler: Path
    lengths: tuple[int, ...]
    budgets: tuple[int, ...]
    candidates: tuple[int, ...]
    num_contexts: tuple[int, ...]
    tail_tokens: int
    task_length: int
    num_samples: int
    output: Path


def parse_options() -> Options:
    """Parses and checks the command line.

    Raises:
        ConfigError: a flag is missing or wrong, or the model is not served.
        CheckpointError: --workdir holds no run.
    """
    _define_flags()
    parse_arguments()
    refuse_many_processes("asa_jax.async_tls.fidelity")
    given = flags.FLAGS
    workdir = given_workdir()
    settings = given_config(read_run_config(workdir).model)
    block, tail = settings.sizes.block_size, given.tail_tokens
    lengths = multiples("lengths", given.lengths, block, 4 * block + tail)
    budgets = multiples("budgets", given.budgets, block, block)
    (task_length,) = multiples("task_length", [given.task_length], block, 8 * block)
    if not given.text:
        raise ConfigError("--text: missing; give text files to measure perplexity on")
    channels = Path(given.channels).expanduser() if given.channels else channels_file(workdir)
    return Options(
        workdir=workdir,
        step=given.step,
        tokenizer=load_run_tokenizer(workdir),
        settings=settings,
        channels=channels,
        text=given_files("text"),
        filler=Path(given.filler).expanduser(),
        lengths=lengths,
        budgets=budgets,
        candidates=multiples("candidates", given.candidates, 1, 1),
        num_contexts=_num_contexts(given.num_contexts, len(lengths)),
        tail_tokens=tail,
        task_length=task_length,
        num_samples=given.num_samples,
        output=prefix(given.output or str(workdir / "async_tls_fidelity")),
    )


def _define_flags() -> None:
    flags.DEFINE_string("workdir", None, "run directory, or model folder")
    flags.DEFINE_integer("step", None, "checkpoint to use; default: the newest", lower_bound=0)
    flags.DEFINE_string("channels", None, "file of channels; default: that of the workdir")
    flags.DEFINE_multi_string("text", [], "text file for perplexity; may be repeated")
    flags.DEFINE_string("filler", str(DEFAULT_FILLER), "text file that hides the needles")
    flags.DEFINE_list("lengths", ["2048", "4096", "8192"], "tokens of a context")
    flags.DEFINE_list("budgets", ["256", "512", "1024", "2048"], "tokens that are kept")
    flags.DEFINE_list("candidates", ["4", "8"], "tokens of level 1 for each that is kept")
    flags.DEFINE_list("num_contexts", ["4"], "contexts of each length, or one number for all")
    flags.DEFINE_integer("tail_tokens", 128, "decoded at the end of a context", lower_bound=2)
    flags.DEFINE_integer("task_length", 2048, "tokens of a prompt of the tasks")
    flags.DEFINE_integer("num_samples", 4, "samples of each task; 0: no tasks", lower_bound=0)
    flags.DEFINE_string("output", None, "report without suffix; default: in the workdir")
    define_config_flag()


def _num_contexts(given: list[object], num_lengths: int) -> tuple[int, ...]:
    numbers = multiples("num_contexts", given, 1, 1)
    if len(numbers) not in (1, num_lengths):
        raise ConfigError(
            f"--num_contexts={','.join(map(str, given))}: must be one number, or one for each of "
            f"the {num_lengths} --lengths"
        )
    return numbers if len(numbers) == num_lengths else numbers * num_lengths


def multiples(flag: str, given: list[object], multiple: int, least: int) -> tuple[int, ...]:
    text = f"--{flag}={','.join(map(str, given))}"
    try:
        numbers = tuple(int(str(number)) for number in given)
    except ValueError:
        raise ConfigError(f"{text}: must be whole numbers with commas between") from None
    in_range = all(least <= n <= MAX_EVALUATION_TOKENS and n % multiple == 0 for n in numbers)
    if not numbers or not in_range:
        blocks = f", multiples of config.async_tls.block_size = {multiple}" * (multiple > 1)
        raise ConfigError(f"{text}: must be from {least} to {MAX_EVALUATION_TOKENS}{blocks}")
    return numbers


def prefix(text: str) -> Path:
    path = Path(text).expanduser()
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--output={text}: must lie in a folder that exists")
    return path
