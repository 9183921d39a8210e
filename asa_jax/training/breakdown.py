"""Where the time of a training step goes: a table from a profile of some steps.

python -m asa_jax.training.breakdown --config=configs/asa_340m.py --config.data.batch_size=8 \\
    --config.data.sources="('tokens/bundled',)" --output=docs/results/asa_340m_8k

Without --output nothing is written. --kernels=30 lists the 30 kernels that take longest too. XLA's
command buffers are off, since a profile does not say to which operation of the model a kernel of
theirs belongs; a step without profile is timed beside it.
"""

import os
from pathlib import Path

from absl import flags

from asa_jax.config import Config
from asa_jax.flags import exit_on_error, parse_config_flag, run_command

if __name__ == "__main__":
    flags.DEFINE_string("output", None, "writes OUTPUT.md and OUTPUT.json")
    flags.DEFINE_integer("kernels", 0, "lists so many kernels, the longest first", lower_bound=0)
    CONFIG = exit_on_error(parse_config_flag)
    OUTPUT = None if flags.FLAGS.output is None else Path(flags.FLAGS.output)
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_enable_command_buffer="

import re
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
from jax.profiler import ProfileData

from asa_jax.errors import UserError
from asa_jax.sharding import make_mesh
from asa_jax.training.device_memory import take_device_memory
from asa_jax.training.feed import Feed
from asa_jax.training.run_directory import open_sources
from asa_jax.training.step import make_trainer
from asa_jax.training.timed_steps import run_steps
from pallas_kernels.measurement import describe_setting, markdown_table, write_report

WARM_STEPS, TIMED_STEPS, PROFILED_STEPS = 3, 6, 3
PASSES = ("forward", "recomputed", "backward")
# Named scopes of the model and of the operations, of which the innermost counts.
_SCOPES = re.compile(
    r"\b(embedding|norm|attention|mlp|loss|optimizer|sliding_window_attention|"
    r"compressed_attention|select_blocks|selected_attention)\b"
)
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = .*\bop_name=\"([^\"]*)\"", re.MULTILINE)
_SHAPE = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (\([^)]*\)|\S+) ", re.MULTILINE)
_MATRIX_PRODUCT = re.compile("gemm|nvjet|cublas|cutlass|dot")
# On a CPU they enclose the instructions of their bodies, which count themselves.
_CONTROL_FLOW = re.compile(r"(while|call|conditional)(\.|$)")


class Kernel(NamedTuple):
    """A kernel that ran.

    Attributes:
        name: of the kernel.
        instruction: of the compiled program, which launched it.
        start: seconds.
        end: seconds.
    """

    name: str
    instruction: str
    start: float
    end: float


class Breakdown(NamedTuple):
    """Seconds of one step on one device.

    Attributes:
        parts: by part of the model, kind (kernel, products, other) and pass; those of kernels that
            ran side by side add up to more than `busy`.
        launches: by kernel name and instruction, and how often it ran; the longest first.
        busy: while at least one kernel ran.
        span: from the first kernel of all steps to the end of the last, divided by the steps.
    """

    parts: dict[tuple[str, str, str], float]
    launches: dict[tuple[str, str], tuple[float, float]]
    busy: float
    span: float


def read_kernels(profile: ProfileData) -> Iterator[Kernel]:
    """The kernels of a profile that ran on the first GPU, or on the CPU where there is none."""
    gpu = [plane for plane in profile.planes if plane.name == "/device:GPU:0"]
    for plane in gpu or profile.planes:
        for line in plane.lines:
            if gpu and not line.name.startswith("Stream"):
                continue
            for event in line.events:
                instruction = _instruction(event, default=event.name if gpu else None)
                if instruction and not _CONTROL_FLOW.match(instruction):
                    start = event.start_ns * 1e-9
                    yield Kernel(event.name, instruction, start, start + event.duration_ns * 1e-9)


def _instruction(event: Any, default: str | None) -> str | None:
    with warnings.catch_warnings():  # jaxlib's own type of statistics has no module
        warnings.simplefilter("ignore", DeprecationWarning)
        return dict(event.stats).get("hlo_op", default)


def op_names(program: str) -> dict[str, str]:
    """Where in the model each instruction of a compiled program, given as text, comes from."""
    return dict(_INSTRUCTION.findall(program))


def break_down(kernels: Iterable[Kernel], sources: Mapping[str, str], steps: int) -> Breakdown:
    """Sums kernel times by part of the model, kind and pass.

    Args:
        kernels: of some steps.
        sources: `op_names` of the program.
        steps: their number.

    Returns:
        The mean of a step. Kernels of an unknown instruction are of the part 'unknown'.

    Raises:
        UserError: there is no kernel.
    """
    ordered = sorted(kernels, key=lambda kernel: kernel.start)
    if not ordered:
        raise UserError(
            f"the profile of {steps} steps holds no kernel, so nothing can be broken down; another "
            "profiler may hold the device (CUPTI serves one at a time)"
        )
    parts: defaultdict[tuple[str, str, str], float] = defaultdict(float)
    launches: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    busy, last = 0.0, ordered[0].start
    for kernel in ordered:
        parts[_place(kernel, sources.get(kernel.instruction, ""))] += kernel.end - kernel.start
        launches[kernel.name, kernel.instruction].append(kernel.end - kernel.start)
        busy += max(0.0, kernel.end - max(kernel.start, last))
        last = max(last, kernel.end)
    means = {place: seconds / steps for place, seconds in parts.items()}
    longest = sorted(launches.items(), key=lambda entry: -sum(entry[1]))
    counted = {names: (sum(times) / steps, len(times) / steps) for names, times in longest}
    return Breakdown(means, counted, busy / steps, (last - ordered[0].start) / steps)


def _place(kernel: Kernel, source: str) -> tuple[str, str, str]:
    """Part, kind and pass of a kernel."""
    scopes = _SCOPES.findall(source)
    part = scopes[-1] if scopes else "other" if source else "unknown"
    kind = "other"
    if part in kernel.name:
        kind = "kernel"
    elif _MATRIX_PRODUCT.search(f"{kernel.name} {kernel.instruction}"):
        kind = "products"
    if "rematted_computation" in source:
        return part, kind, "recomputed"
    return part, kind, "backward" if "transpose(" in source else "forward"


def profile_steps(config: Config) -> dict[str, Any]:
    """Trains some steps and profiles some more.

    Args:
        config: the run.

    Returns:
        device, jax; step_seconds, data_wait_seconds without profile; argument_bytes and
        temporary_bytes of the program on a device; breakdown; program, the compiled text.
    """
    sources, mesh = open_sources(config), make_mesh(config.mesh)
    with jax.set_mesh(mesh), Feed(config, sources, mesh) as feed:
        trainer = make_trainer(config, mesh, sources[0].tokenizer().byte_lengths())
        batch, _ = feed.next()
        compiled: Any = trainer.lower(batch).compile()
        trainer = trainer._replace(step=compiled)
        state, _ = run_steps(trainer, feed, trainer.init(), WARM_STEPS)
        state, times = run_steps(trainer, feed, state, TIMED_STEPS)
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                run_steps(trainer, feed, state, PROFILED_STEPS)
            (file,) = Path(folder).rglob("*.xplane.pb")
            kernels = list(read_kernels(ProfileData.from_file(str(file))))
    memory, program = compiled.memory_analysis(), compiled.as_text()
    return {
        "device": f"{jax.device_count()} {jax.devices()[0].device_kind}",
        "jax": jax.__version__,
        "step_seconds": times.total,
        "data_wait_seconds": times.data_wait,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "breakdown": break_down(kernels, op_names(program), PROFILED_STEPS),
        "program": program,
    }


def rows(breakdown: Breakdown) -> list[tuple[str, ...]]:
    """Lines of the table, the longest first, in milliseconds and per cent of the span."""
    places = sorted({(part, kind) for part, kind, _ in breakdown.parts})
    sums = {
        place: [breakdown.parts.get((*place, name), 0.0) for name in PASSES] for place in places
    }
    lines = [
        (*place, *(f"{1e3 * x:.2f}" for x in (*times, sum(times))), _share(sum(times), breakdown))
        for place, times in sorted(sums.items(), key=lambda entry: -sum(entry[1]))
    ]
    idle = breakdown.span - breakdown.busy
    blank = ("",) * len(PASSES)
    return [*lines, ("no kernel runs", "", *blank, f"{1e3 * idle:.2f}", _share(idle, breakdown))]


def kernel_rows(breakdown: Breakdown, program: str, number: int) -> list[tuple[str, ...]]:
    """Lines of the table of the kernels that take longest: ms, runs, name, result and source.

    Those of the same source and result, as layers have them without scan, are one line.
    """
    sources, shapes = op_names(program), dict(_SHAPE.findall(program))
    lines: defaultdict[tuple[str, str], list[tuple[float, float, str]]] = defaultdict(list)
    for (name, instruction), (seconds, runs) in breakdown.launches.items():
        place = shapes.get(instruction, ""), sources.get(instruction, instruction)
        lines[place].append((seconds, runs, name))
    sums = [
        (sum(s for s, _, _ in each), sum(r for _, r, _ in each), each[0][2], *place)
        for place, each in lines.items()
    ]
    sums.sort(key=lambda line: -line[0])
    return [(f"{1e3 * s:.2f}", f"{runs:g}", *texts) for s, runs, *texts in sums[:number]]


def _share(seconds: float, breakdown: Breakdown) -> str:
    return f"{100 * seconds / breakdown.span:.1f}"


def main(config: Config, output: Path | None, number_of_kernels: int) -> None:
    """Measures, prints the tables and writes them where asked to."""
    take_device_memory()
    record = profile_steps(config)
    breakdown, program = record.pop("breakdown"), record.pop("program")
    about = describe_setting([record], "asa_jax.training.breakdown", None)
    rate = config.data.batch_size * config.data.sequence_length / record["step_seconds"]
    about |= {
        "step": f"{1e3 * record['step_seconds']:.1f} ms without profile, {rate:,.0f} tokens/s; "
        f"with profile {1e3 * breakdown.span:.1f} ms",
        "input wait": f"{1e3 * record['data_wait_seconds']:.2f} ms a step",
        "memory of a device": f"state and batch {record['argument_bytes'] / 2**30:.2f} GiB, "
        f"temporaries {record['temporary_bytes'] / 2**30:.2f} GiB",
    }
    header = ("part", "kind", *(f"{name} ms" for name in PASSES), "sum ms", "%")
    lines = [*markdown_table(header, rows(breakdown)), ""]
    if number_of_kernels:
        header = ("ms", "runs", "kernel", "result", "from")
        longest = kernel_rows(breakdown, program, number_of_kernels)
        lines += [*markdown_table(header, longest), ""]
    text = "\n".join(lines + [f"- {name}: {value}" for name, value in about.items()]) + "\n"
    print(text, end="")
    if output is not None:
        record["parts"] = [
            {"part": part, "kind": kind, "pass": name, "seconds": seconds}
            for (part, kind, name), seconds in breakdown.parts.items()
        ]
        write_report(
            output, text, about, [record | {"busy": breakdown.busy, "span": breakdown.span}]
        )


if __name__ == "__main__":
    run_command(lambda: main(CONFIG, OUTPUT, flags.FLAGS.kernels))
