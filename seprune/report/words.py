"""How a report speaks: numbers with their units, and sentences about gates and results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from seprune.measure.latency import Latency
from seprune.measure.metric_names import FRACTIONS, metric_title, metric_value
from seprune.report.measurement import BudgetReport, GateSummary, Measurement, Report

DASH = "–"
SATURATED = 0.5  # of the gate values: above, the gate hardly tells channels apart
PUBLISHED_GAP = 0.02  # between a published and a measured metric, below which all is well
UNSTABLE = 0.5  # rank agreement: below, no fixed order of channels serves all images
MANY = 8  # names in a sentence

COUNTING = (
    "MACs: multiply-adds of convolutions, linear layers and matrix products for one image "
    "(PyTorch's FlopCounterMode / 2). FLOPs = 2 x MACs.",
    "Parameters: every trainable number once, tied weights once.",
    "File: size of model.safetensors.",
    "Latency: median of repeated forward passes after a warm-up, ± the interquartile range; "
    "dense and pruned networks take turns in one process.",
    "Top-1, top-5 and loss: over every image of the reporting set, each counted once.",
)

RUNTIMES = {"eager": "eager", "compiled": "torch.compile", "onnx": "ONNX Runtime",
            "openvino": "OpenVINO"}  # fmt: skip


def percent(fraction: float | None, digits: int = 2) -> str:
    """`0.8735` as `87.35 %`."""
    return DASH if fraction is None else f"{100 * fraction:.{digits}f} %"


def points(difference: float | None) -> str:
    """A difference of fractions in percentage points with its sign."""
    return DASH if difference is None else f"{100 * difference:+.2f}".replace("-", "−")


def quantity(number: float | None, unit: str = "") -> str:
    """`56510000` as `56.5 M`; three significant digits."""
    if number is None:
        return DASH
    scaled, steps = float(number), 0
    while abs(scaled) >= 999.5 and steps < 4:
        scaled, steps = scaled / 1000, steps + 1
    text = f"{scaled:.3g}" if steps else f"{number:g}"
    return f"{text} {'kMGT'[steps - 1] if steps else ''}{unit}".strip()


def size(number: int | None) -> str:
    """Bytes in decimal units."""
    return DASH if number is None else quantity(number, "B")


def milliseconds(latency: Latency | None) -> str:
    """`12.3 ± 0.4`, or the note where it was not measured."""
    if latency is None:
        return DASH
    if latency.median_ms is None or latency.spread_ms is None:
        return latency.note or DASH
    return f"{_short(latency.median_ms, 3)} ± {_short(latency.spread_ms, 1)}"


def _short(number: float, digits: int) -> str:
    """Significant digits, without an exponent: 12, not 1e+01."""
    return f"{float(f'{number:.{digits}g}'):g}"


def duration(seconds: float) -> str:
    """`75.2` as `1 min 15 s`."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def fraction_of(part: float | None, whole: float | None) -> float | None:
    """part / whole where both are there."""
    return None if part is None or not whole else part / whole


def change(measurement: Measurement, base: Measurement | None) -> str:
    """How far the metric is from the baseline's: in points where it is a fraction."""
    if base is None or base is measurement or None in (base.value, measurement.value):
        return DASH
    return metric_change(measurement.metric, (measurement.value or 0) - (base.value or 0))


def metric_change(metric: str, difference: float) -> str:
    """`+0.4 points` of a fraction, `+0.013` of any other number."""
    if metric in FRACTIONS:
        return f"{points(difference)} points"
    return f"{difference:+.3g}".replace("-", "−")


def stage_name(measurement: Measurement) -> str:
    """`fine-tuned · macs 0.5`."""
    return " · ".join(filter(None, (measurement.stage, measurement.budget)))


def last_of(report: Report, budget: BudgetReport) -> Measurement | None:
    """The budget's last measured stage: what the run ended with."""
    found = [m for m in report.measurements if m.budget == budget.label]
    return found[-1] if found else None


def timed_on(report: Report) -> str:
    """The devices and threads that latencies were measured with."""
    every = [x for m in report.measurements for x in m.latency]
    return "; ".join(sorted({f"{x.device}, {threads(x.threads)}" for x in every if not x.note}))


def threads(number: int) -> str:
    """`1 thread`, `2 threads`."""
    return f"{number} thread{'' if number == 1 else 's'}"


def match(latencies: Sequence[Latency], like: Latency) -> Latency | None:
    """The latency at the same batch size, runtime and device as `like`."""
    key = (like.batch, like.runtime, like.device)
    return next((x for x in latencies if (x.batch, x.runtime, x.device) == key), None)


def speed_up(report: Report, latency: Latency) -> float | None:
    """How many times faster than the baseline at the same batch size and runtime."""
    dense = match(report.baseline.latency, latency) if report.baseline else None
    if dense is None or dense.median_ms is None or not latency.median_ms:
        return None
    return dense.median_ms / latency.median_ms


def gate_remarks(gates: Sequence[GateSummary]) -> list[str]:
    """Saturation, rank agreement and idle gates, in words: a sentence each, naming the gates."""
    full = [(g, g.saturated) for g in gates if (g.saturated or 0) > SATURATED]
    torn = [
        (g, g.rank_agreement)
        for g in gates
        if g.rank_agreement is not None and g.rank_agreement < UNSTABLE
    ]
    idle = [g.name for g in gates if not g.runs]
    remarks = []
    if full:
        names = _named([f"{g.name} ({percent(share, 0)})" for g, share in full])
        remarks.append(
            f"Saturated, most values below 0.05 or above 0.95: {names}. As a switch such a gate "
            "hardly tells channels apart; prefer a criterion that uses gradients."
        )
    if torn:
        names = _named([f"{g.name} ({agreement:.2f})" for g, agreement in torn])
        remarks.append(
            f"The order of channels changes from image to image (rank agreement below {UNSTABLE:g})"
            f": {names}. No fixed choice of channels serves all images."
        )
    if idle:
        remarks.append(f"No statistics, for they never ran in the forward pass: {_named(idle)}.")
    return remarks or _all_well(gates)


def _named(names: Sequence[str]) -> str:
    """The names, the middle left out where there are many."""
    if len(names) <= MANY:
        return ", ".join(names)
    return f"{', '.join(names[: MANY - 2])}, {len(names) - MANY + 1} more, and {names[-1]}"


def _all_well(gates: Sequence[GateSummary]) -> list[str]:
    agreements = [g.rank_agreement for g in gates if g.rank_agreement is not None]
    if not agreements:
        return []
    return [
        f"No gate is saturated, and images agree on the order of channels (rank agreement "
        f"{min(agreements):.2f} to {max(agreements):.2f})."
    ]


def not_pruned(report: Report) -> list[tuple[str, list[str]]]:
    """Each reason with the groups that it keeps whole."""
    found: dict[str, list[str]] = {}
    for row in report.not_pruned:
        found.setdefault(row.get("reason", ""), []).append(row.get("group", ""))
    return list(found.items())


def machine(facts: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """What a run ran on, as people say it: name and text."""
    for name, value in facts.items():
        if name == "extras" and isinstance(value, dict):
            known = (extra.get("packages") or {} for extra in value.values())
            versions = {p: v for packages in known for p, v in packages.items()}
            yield name, ", ".join(f"{p} {v or 'missing'}" for p, v in versions.items())
        elif name == "pair" and isinstance(value, dict):
            if not value.get("fits", True):
                yield "torch and torchvision", f"do not fit: {value.get('reason')}"
        elif name == "disk_free":
            yield "free disk", size(value)
        elif name == "devices" and isinstance(value, list):
            yield name, "; ".join(map(_device, value))
        else:
            yield name, value


def _device(facts: Mapping[str, Any]) -> str:
    more = [size(facts["memory"])] if facts.get("memory") else []
    more += [threads(facts["threads"])] if facts.get("threads") else []
    return ", ".join([f"{facts.get('device')} ({facts.get('name')})", *more])


def choice(facts: Mapping[str, Any]) -> list[str]:
    """Which plan was chosen, by `PlanChoice.facts`."""
    trials = facts.get("trials") or []
    if not trials:
        return [f"{facts['chosen']}: all candidate plans are the same"] if facts else []
    errors = [
        f"{t['name']} "
        + (
            f"as {t['same_as']}"
            if t["same_as"]
            else ("not finite" if t["error"] is None else f"{t['error']:.4f}")
        )
        for t in trials
    ]
    lines = [
        f"{facts['chosen']} of {len(trials)} candidates; error of the network's outputs on "
        f"held-out images, without labels: {', '.join(errors)}"
    ]
    if facts["close"]:
        lines.append(f"within 10 % of it, so perhaps as good: {', '.join(facts['close'])}")
    return lines


def finite(metrics: Mapping[str, float | None]) -> dict[str, float]:
    """Those that have a value."""
    return {name: value for name, value in metrics.items() if value is not None}


def published(known: Mapping[str, float], measured: Mapping[str, float]) -> list[str]:
    """What was published beside what was measured; a warning where they are far apart."""
    lines = []
    for name in sorted(set(known) & set(measured)):
        own, theirs = (metric_value(name, found[name]) for found in (measured, known))
        line = f"{metric_title(name)}: {own} measured, {theirs} published with the weights"
        if abs(measured[name] - known[name]) > PUBLISHED_GAP:
            line = f"warning: {line}; look at the order of the classes (folders are sorted as "
            line += "text: 10 comes before 2), at the preprocessing, and at the images"
        lines.append(line)
    return lines


def plan(budget: BudgetReport) -> list[str]:
    """How a plan was chosen, and what it takes out as a whole."""
    kinds = {"gates": "gates held at their mean", "blocks": "blocks left out"}
    out = [f"{kinds[kind]}: {_named(names)}" for kind, names in budget.removed.items() if names]
    return choice(budget.choice) + out


def tuning(numbers: Mapping[str, float | str | None]) -> list[str]:
    """What fine-tuning did, by `FineTuned.numbers`."""
    if not numbers:
        return []
    epoch = int(numbers["best_epoch"] or 0) + 1
    scores = [
        ("start", "as given", "validation_before"),
        ("recalibrated", "BatchNorm recalibrated", "validation_recalibrated"),
        (f"epoch {epoch}", f"epoch {epoch}", "validation_best"),
    ]
    known = [
        f"{metric_value(str(numbers['metric']), float(numbers[key] or 0))} {name}"
        + (", chosen" if numbers["chosen"] == candidate else "")
        for candidate, name, key in scores
        if numbers[key] is not None
    ]
    title = metric_title(str(numbers["metric"]))
    sentences = [f"{title} {_SPLIT}: {', '.join(known)}"] if known else []
    if numbers["chosen"] == "start" and numbers["epochs"]:
        sentences.append("no epoch was better than the network as given, which is returned")
    if numbers["epochs"]:
        sentences.append(_how_trained(numbers))
    if float(numbers["accumulate"] or 1) > 1:
        sentences.append(
            f"every step in {numbers['accumulate']:.0f} micro-batches of the same batch together"
        )
    if numbers["rollbacks"]:
        sentences.append("the loss became NaN once: rolled back, then half the learning rate")
    return sentences


_SPLIT = "on the validation split (images that the checkpoint may have been trained on)"


def _how_trained(numbers: Mapping[str, float | str | None]) -> str:
    trials = f", the best of {numbers['trials']} trials" if numbers["trials"] else ""
    norms = "running statistics" if numbers["norms"] == "eval" else "the statistics of the batch"
    return (
        f"trained by {numbers['optimizer']} at a learning rate of {numbers['lr']:.2g}{trials}; "
        f"BatchNorm by {norms}"
    )


def missing(report: Report) -> list[str]:
    """What is not in the numbers: skipped images, uncounted operators, idle stages."""
    notes = [f"Images skipped in {name}." for name in _skipped(report.data.get("skipped"))]
    if report.not_counted:
        notes.append(
            "Operators that ran but have no MAC formula, counted as 0: "
            + ", ".join(report.not_counted)
            + "."
        )
    for m in report.measurements:
        if m.nonfinite:
            notes.append(f"{stage_name(m)}: {m.nonfinite} of {m.count} outputs were not finite.")
    if len(report.measurements) < 2 and not report.budgets:
        notes.append("This run is not finished: what it has not measured yet is left out.")
    return notes


def not_timed(report: Report) -> list[str]:
    """A sentence for each runtime and reason, with the batch sizes."""
    notes: dict[tuple[str, str], set[int]] = {}
    for m in report.measurements:
        for x in m.latency:
            if x.note:
                notes.setdefault((x.runtime, x.note), set()).add(x.batch)
    return [
        f"Latency at batch {', '.join(map(str, sorted(batches)))} "
        f"({RUNTIMES.get(runtime, runtime)}) was not measured: {note.rstrip('.')}."
        for (runtime, note), batches in sorted(notes.items())
    ]


def _skipped(skipped: object) -> list[str]:
    """`train: 3` for each data set with skipped images; a list names them one by one."""
    if isinstance(skipped, dict):
        counts = {k: len(v) if isinstance(v, list) else v for k, v in skipped.items()}
        return [f"{name}: {number}" for name, number in counts.items() if number]
    if isinstance(skipped, list):
        return [str(path) for path in skipped]
    return [f"the data: {skipped}"] if skipped else []
