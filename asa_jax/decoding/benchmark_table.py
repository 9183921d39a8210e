"""Tables and the chart of `benchmark`, from its records."""

from pathlib import Path
from typing import Any

from asa_jax.decoding.cache_tables import name_bytes, name_tokens
from pallas_kernels.measurement import markdown_table

Records = list[dict[str, Any]]
HEADER = (
    "model", "batch", "context", "ms a token", "target ms", "floor ms", "times the floor",
    "tokens/s", "cache", "of accounting",
)  # fmt: skip
TARGETS = {("asa_340m", 1, 65536): 1.0, ("asa_1b", 1, 65536): 1.9}  # milliseconds
TIMES_FLOOR = 1.6
LONG, SHORT, LONGEST = 65536, 4096, 262144
SIZES = ("340m", "1b")


def markdown(records: Records, about: dict[str, str]) -> str:
    """The table, what follows from it, what it was measured on and what failed."""
    decode = [record for record in records if record["row"] == "decode"]
    text = markdown_table(HEADER, [_cells(r) for r in decode if "context" in r])
    text += ["", *_summary(records), "", *(f"- {name}: {value}" for name, value in about.items())]
    text += [
        f"- failed: {r['model']}, {r['row']}, batch {r.get('batch')}, context {r.get('context')}: "
        f"{r['error']}"
        for r in records
        if "error" in r
    ]
    return "\n".join(text) + "\n"


def _cells(record: dict[str, Any]) -> tuple[str, ...]:
    place = record["model"], str(record["batch"]), name_tokens(record["context"])
    if "milliseconds" not in record:
        needed = record.get("needed_bytes")
        reason = "failed" if needed is None else f"does not fit: {name_bytes(needed)}"
        return *place, reason, *[""] * (len(HEADER) - 4)
    time, floor = record["milliseconds"], record["floor_milliseconds"]
    target = TARGETS.get((record["model"], record["batch"], record["context"]))
    allocated, accounted = record["allocated_bytes"], record["accounted_bytes"]
    return (
        *place,
        f"{time:.3f}",
        f"{target:.1f}" if target else "",
        f"{floor:.3f}",
        f"{time / floor:.2f}",
        f"{1e3 * record['batch'] / time:,.0f}",
        name_bytes(accounted),
        f"{100 * allocated / accounted:.1f}%",
    )


def _summary(records: Records) -> list[str]:
    """What the records say of the targets, as far as they were measured."""
    times = {
        (r["model"], r["batch"], r["context"]): r["milliseconds"]
        for r in records
        if "milliseconds" in r
    }
    lines = []
    for size in SIZES:
        asa, full = f"asa_{size}", f"full_{size}"
        longest, short = times.get((asa, 1, LONGEST)), times.get((asa, 1, SHORT))
        if longest and short:
            lines.append(f"- {asa}, batch 1: 256k : 4k = {longest / short:.2f} (at most 1.3)")
        for batch in sorted({batch for model, batch, _ in times if model == full}):
            ours, theirs = times.get((asa, batch, LONG)), times.get((full, batch, LONG))
            if ours and theirs:
                least = " (at least 6)" if batch == 32 else ""
                rate = f"{theirs / ours:.2f} x tokens/s{least}"
                lines.append(f"- {asa} : {full}, batch {batch}, 64k: {rate}")
        lines += _ratio(records, "prefill_seconds", full, asa, "prefill, seconds")
        lines += _ratio(records, "largest_batch", asa, full, "rows that fit")
    over = [r for r in records if _times_floor(r) > TIMES_FLOOR]
    timed = [r for r in records if "milliseconds" in r]
    if timed:
        lines.append(f"- over {TIMES_FLOOR} times the floor: {len(over)} of {len(timed)}")
    return lines


def _ratio(records: Records, field: str, first: str, second: str, title: str) -> list[str]:
    """A line that compares a field of two models."""
    found = {r["model"]: r for r in records if field in r}
    if not {first, second} <= found.keys():
        return []
    one, two = found[first], found[second]
    line = f"- {title}, {name_tokens(one['context'])}: {first} {one[field]:.4g}"
    line += f", {second} {two[field]:.4g}: {one[field] / two[field]:.2f} x (at least 3)"
    if "accounted_batch" in one:
        line += f"; by accounting {one['accounted_batch']} and {two['accounted_batch']}"
    return [line]


def _times_floor(record: dict[str, Any]) -> float:
    if "milliseconds" not in record:
        return 0.0
    return record["milliseconds"] / record["floor_milliseconds"]


def plot(records: Records, about: dict[str, str], path: Path) -> None:
    """Draws time over context with the floor dotted, a panel for each batch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    timed = [record for record in records if "milliseconds" in record]
    batches = sorted({record["batch"] for record in timed}) or [1]
    figure, panels = pyplot.subplots(
        1, len(batches), figsize=(4 * len(batches) + 1, 4.5), layout="constrained",
        sharey=True, squeeze=False,
    )  # fmt: skip
    for panel, batch in zip(panels[0], batches, strict=True):
        for model in dict.fromkeys(record["model"] for record in timed):
            of_model = [r for r in timed if r["model"] == model and r["batch"] == batch]
            contexts = [r["context"] for r in of_model]
            times = [r["milliseconds"] for r in of_model]
            (line,) = panel.plot(contexts, times, marker="o", label=model)
            floors = [r["floor_milliseconds"] for r in of_model]
            panel.plot(contexts, floors, linestyle=":", color=line.get_color())
        panel.set(xscale="log", yscale="log", xlabel="tokens of context", title=f"batch {batch}")
        panel.grid(alpha=0.3)
    panels[0][0].set(ylabel="milliseconds a step (dotted: floor)")
    panels[0][0].legend(fontsize=8)
    figure.suptitle(f"{about.get('device')}, jax {about.get('jax')}, {about['date']}")
    figure.savefig(path, dpi=120)
