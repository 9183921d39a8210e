"""The command line of `eval.py`, checked without jax."""

import dataclasses
import importlib.util
from pathlib import Path

from absl import flags

from asa_jax.config import EvaluationConfig
from asa_jax.data.tokenizer import Tokenizer
from asa_jax.errors import ConfigError
from asa_jax.flags import PROJECT, parse_arguments
from asa_jax.launch import refuse_many_processes
from asa_jax.run_flags import check_file, define_run_flags, given_files, given_workdir
from asa_jax.trained_run import load_run_tokenizer, read_run_config

DEFAULT_FILLER = PROJECT / "texts" / "validation" / "northanger_abbey.txt"
# Each evaluation setting of the run has a flag that takes its place.
_OVERRIDES = tuple(field.name for field in dataclasses.fields(EvaluationConfig))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What to evaluate.

    Attributes:
        workdir: of the run.
        step: of the checkpoint; None: the newest.
        evaluation: settings of the run where no flag takes their place.
        tokenizer: of the run.
        text: files whose perplexity is measured instead of the validation split.
        filler: text that hides the needles.
        multiple_choice: JSONL files of examples.
        key_value: JSONL files of key-value retrieval.
        lm_eval: JSONL files of examples, to score through lm-eval.
        limit: examples of each file; None: all.
        output: folder of the report.
    """

    workdir: Path
    step: int | None
    evaluation: EvaluationConfig
    tokenizer: Tokenizer
    text: list[Path]
    filler: Path
    multiple_choice: list[Path]
    key_value: list[Path]
    lm_eval: list[Path]
    limit: int | None
    output: Path


def _define_flags() -> None:
    define_run_flags()
    flags.DEFINE_list("tasks", None, "tasks instead of the run's evaluation.tasks; '' for none")
    flags.DEFINE_list("lengths", None, "window and prompt lengths in tokens")
    flags.DEFINE_list("depths", None, "depths of needles, from 0 to 1")
    flags.DEFINE_integer("samples", None, "generated samples of each length and depth")
    flags.DEFINE_integer("batch_tokens", None, "tokens of one forward pass, at most")
    flags.DEFINE_integer("perplexity_tokens", None, "predictions for each text and length, at most")
    flags.DEFINE_integer("position_bucket_tokens", None, "positions in a bucket of the loss curve")
    flags.DEFINE_integer("seed", None, "seed of the generated tasks")
    flags.DEFINE_multi_string("text", [], "text file for the perplexity task, instead of the run's")
    flags.DEFINE_string("filler", str(DEFAULT_FILLER), "text file that hides the needles")
    flags.DEFINE_multi_string("multiple_choice", [], "JSONL file of examples; docs/evaluation.md")
    flags.DEFINE_multi_string("key_value", [], "JSONL file of key-value retrieval")
    flags.DEFINE_multi_string("lm_eval", [], "JSONL file to score through lm-eval (extra 'eval')")
    flags.DEFINE_integer("limit", None, "examples of each file; default: all", lower_bound=1)
    flags.DEFINE_string("output", None, "folder of the report; default: WORKDIR/evaluation")


def parse_options() -> Options:
    """Parses and checks the command line.

    Raises:
        ConfigError: a flag is missing or wrong.
        CheckpointError: --workdir holds no run.
    """
    _define_flags()
    parse_arguments()
    refuse_many_processes("eval.py")
    given = flags.FLAGS
    workdir, filler = given_workdir(), Path(given.filler).expanduser()
    check_file("filler", filler)
    if given.lm_eval and importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("--lm_eval: lm-eval is not installed; run pip install -e '.[eval]'")
    return Options(
        workdir=workdir,
        step=given.step,
        evaluation=_evaluation(read_run_config(workdir).evaluation),
        tokenizer=load_run_tokenizer(workdir),
        text=given_files("text"),
        filler=filler,
        multiple_choice=given_files("multiple_choice"),
        key_value=given_files("key_value"),
        lm_eval=given_files("lm_eval"),
        limit=given.limit,
        output=Path(given.output).expanduser() if given.output else workdir / "evaluation",
    )


def _evaluation(config: EvaluationConfig) -> EvaluationConfig:
    changes = {name: value for name in _OVERRIDES if (value := flags.FLAGS[name].value) is not None}
    if "lengths" in changes:
        changes["lengths"] = _numbers("lengths", changes["lengths"], int)
    if "depths" in changes:
        changes["depths"] = _numbers("depths", changes["depths"], float)
    if "tasks" in changes:
        changes["tasks"] = tuple(changes["tasks"])
    return dataclasses.replace(config, **changes)


def _numbers[T: (int, float)](name: str, texts: list[str], kind: type[T]) -> tuple[T, ...]:
    try:
        return tuple(kind(text) for text in texts)
    except ValueError:
        raise ConfigError(
            f"--{name}={','.join(texts)}: must be numbers with commas between"
        ) from None
