"""Tables and the chart of `benchmark`, from its records."""

from pathlib import Path
from typing import Any

from asa_jax.decoding.cache_tables import name_bytes, name_tokens
from pallas_kernels.benchmark_chart import plot_over_context
from pallas_kernels.measurement import markdown_report, markdown_table

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

    def place(record: dict[str, Any]) -> str:
        at = f"batch {record.get('batch')}, context {record.get('context')}"
        return f"{record['model']}, {record['row']}, {at}"

    decode = [record for record in records if record["row"] == "decode"]
    table = markdown_table(HEADER, [_cells(r) for r in decode if "context" in r])
    return markdown_report(table, about, records, place, _summary(records))


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
    """Draws time over context, a panel for each batch."""
    plot_over_context(
        records, about, path,
        line="model", panel=lambda r: f"batch {r['batch']}", unit="milliseconds",
    )  # fmt: skip
