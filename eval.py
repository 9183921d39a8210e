"""Evaluates a trained run: perplexity by position, retrieval, recall, multiple choice.

    python eval.py --workdir=runs/tiny
    python eval.py --workdir=runs/tiny --tasks=perplexity --lengths=8192 --text=novel.txt
    python eval.py --workdir=runs/tiny --tasks= --multiple_choice=piqa.jsonl

Prints tables and writes results.json and pictures to WORKDIR/evaluation; docs/evaluation.md says
what is measured. The configuration comes from the run.

Exit codes: 0 done; 1 the checkpoint or a file cannot be used; 2 a flag is wrong; 130 Ctrl-C, after
the report of what was measured.
"""

from asa_jax.evaluation.options import Options, parse_options
from asa_jax.flags import exit_on_error, run_command

if __name__ == "__main__":
    # Before the seconds that it takes to import jax.
    OPTIONS = exit_on_error(parse_options)

import dataclasses
import datetime
import shlex
import sys
from typing import Any

import jax
from rich.console import Console

from asa_jax.config import Config, MeshConfig, config_to_dict
from asa_jax.decoding.generate import Generator
from asa_jax.errors import ConfigError
from asa_jax.evaluation.generated import GENERATED_TASKS, generated_jobs, key_value_job
from asa_jax.evaluation.multiple_choice import choice_job
from asa_jax.evaluation.perplexity import perplexity_jobs, text_sources, validation_sources
from asa_jax.evaluation.progress import EvaluationProgress
from asa_jax.evaluation.report import print_report, write_report
from asa_jax.evaluation.results import Job, Result
from asa_jax.evaluation.retrieval import read_haystack
from asa_jax.evaluation.scorer import Scorer
from asa_jax.interop.restore import restore_model
from asa_jax.sharding import make_mesh
from asa_jax.training.compilation_cache import use_compilation_cache
from pallas_kernels import dispatch


def main(options: Options) -> None:
    """Restores the run, measures job by job, and reports, also what was measured until Ctrl-C."""
    start = datetime.datetime.now(datetime.UTC)
    use_compilation_cache()
    # Parameters and rows over all devices, however many trained the run.
    mesh = make_mesh(MeshConfig(data=1, fsdp=-1, tensor=1, context=1))
    config, params, step = restore_model(options.workdir, mesh, options.step)
    print(dispatch.describe(config.model.implementation), file=sys.stderr)
    config = dataclasses.replace(config, evaluation=options.evaluation)
    scorer = Scorer(config, params, options.tokenizer, mesh)
    generator = Generator(config, params, options.tokenizer, mesh)
    jobs = plan(options, config, scorer, generator)
    options.output.mkdir(parents=True, exist_ok=True)  # fails now, not after hours of measuring

    results: list[Result] = []
    try:
        measure(jobs, scorer, results)
    finally:
        if results and jax.process_index() == 0:
            header = {
                "run": str(options.workdir),
                "step": step,
                "date": start.isoformat(timespec="seconds"),
                "command": shlex.join(["python", *sys.argv]),
                "devices": f"{jax.device_count()} {jax.devices()[0].device_kind}",
                "config": config_to_dict(config),
            }
            report(options, step, header, results)


def plan(options: Options, config: Config, scorer: Scorer, generator: Generator) -> list[Job]:
    """Reads and checks the input of everything that is to be measured."""
    cfg, tokenizer = config.evaluation, scorer.tokenizer
    jobs: list[Job] = []
    if "perplexity" in cfg.tasks:
        texts = text_sources(options.text, tokenizer)
        texts = texts or validation_sources(config.data.sources, tokenizer)
        jobs += perplexity_jobs(cfg, scorer, texts)
    if set(cfg.tasks) & set(GENERATED_TASKS):
        jobs += generated_jobs(cfg, scorer, read_haystack(options.filler, tokenizer))
    jobs += [key_value_job(path, scorer, options.limit) for path in options.key_value]
    jobs += [choice_job(path, scorer, options.limit) for path in options.multiple_choice]
    if options.lm_eval:
        # lm-eval is an extra.
        from asa_jax.evaluation.lm_eval_adapter import HarnessModel, harness_job

        model = HarnessModel(scorer, generator, config.data.sequence_length)
        jobs.append(harness_job(options.lm_eval, scorer, model, options.limit))
    if not jobs:
        raise ConfigError("--tasks: nothing to measure; name tasks or give files")
    return jobs


def measure(jobs: list[Job], scorer: Scorer, results: list[Result]) -> None:
    """Runs the jobs and appends what they give to `results`."""
    total = sum(job.tokens for job in jobs)
    quiet = jax.process_index() != 0
    with EvaluationProgress(total, Console(stderr=True), quiet=quiet) as progress:
        scorer.on_tokens = progress.advance
        for job in jobs:
            progress.begin(job.name)
            results += job.run()


def report(options: Options, step: int, header: dict[str, Any], results: list[Result]) -> None:
    """Prints the tables, writes the files and names them."""
    print_report(results, Console())
    title = f"{options.workdir.name}, step {step}"
    for path in write_report(results, header, title, options.output):
        print(f"  {path}")


if __name__ == "__main__":
    run_command(lambda: main(OPTIONS))
