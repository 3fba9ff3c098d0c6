"""What a reader sees first: how much faster, how accurate, how large."""

from __future__ import annotations

from typing import Any

from seprune.measure.latency import Latency
from seprune.measure.metric_names import FRACTIONS, metric_title, metric_value
from seprune.report import words
from seprune.report.measurement import BudgetReport, Measurement, Report


def asked_for(report: Report) -> Latency | None:
    """The latency of a budget's last network that is shown first: on the runtime asked for."""
    ends = [m for budget in report.budgets if (m := words.last_of(report, budget)) is not None]
    timed = [x for m in ends for x in m.latency if x.median_ms is not None]
    return min(timed, key=lambda x: (x.runtime != report.runtime, x.batch), default=None)


def headline(report: Report) -> str:
    """`1.83x as fast (macs 0.5) in ONNX Runtime, batch 1, 1 thread`; empty without latencies."""
    like = asked_for(report)
    if like is None:
        return ""
    speeds = [(b.label, s) for b in report.budgets if (s := _speed(report, b, like)) is not None]
    texts = ", ".join(f"{speed:.2f}x as fast ({budget})" for budget, speed in speeds)
    return f"{texts} in {_where(like)}" if texts else ""


def tile(report: Report, budget: BudgetReport) -> dict[str, Any]:
    """One budget's end against the baseline: a large number, what it is, and before -> after."""
    end, base = words.last_of(report, budget), report.baseline
    if end is None or base is None:
        kept = (words.percent(budget.reached, 1), "of the MACs", "", "")
        return {"label": budget.label, "facts": [kept]}
    was = f"{metric_value(base.metric, base.value)} before, {words.change(end, base)}"
    facts = [
        (metric_value(end.metric, end.value), metric_title(end.metric), was, _tone(end, base)),
        _share("MACs", end.macs, base.macs),
        _share("parameters", end.params, base.params),
    ]
    return {"label": words.stage_name(end), "facts": _speed_fact(report, budget) + facts}


def _speed_fact(report: Report, budget: BudgetReport) -> list[tuple[str, str, str, str]]:
    like = asked_for(report)
    speed = _speed(report, budget, like) if like else None
    end, base = words.last_of(report, budget), report.baseline
    if like is None or speed is None or end is None or base is None:
        return []
    times = [words.match(m.latency, like) for m in (base, end)]
    before, after = (f"{x.median_ms:.3g}" if x and x.median_ms else words.DASH for x in times)
    tone = "good" if speed > 1 else "bad"
    return [(f"{speed:.2f}x", "as fast", f"{before} → {after} ms in {_where(like)}", tone)]


def _share(name: str, after: int, before: int) -> tuple[str, str, str, str]:
    kept = words.percent(words.fraction_of(after, before), 1)
    return kept, f"of the {name}", f"{words.quantity(before)} → {words.quantity(after)}", ""


def _speed(report: Report, budget: BudgetReport, like: Latency) -> float | None:
    end = words.last_of(report, budget)
    base = report.baseline
    pair = [words.match(m.latency, like) for m in (base, end) if m is not None]
    if any(x is not None and x.noisy for x in pair):
        return None  # a speed-up would be one of the other work on the machine
    latency = pair[-1] if end and pair else None
    return words.speed_up(report, latency) if latency else None


def _where(like: Latency) -> str:
    runtime = words.RUNTIMES.get(like.runtime, like.runtime)
    return f"{runtime}, batch {like.batch}, {words.threads(like.threads)}"


def _tone(end: Measurement, base: Measurement) -> str:
    """How a number is coloured: as good as the baseline, or more than a hundredth worse."""
    if end.value is None or base.value is None:
        return ""
    gain = end.value - base.value if end.higher_is_better else base.value - end.value
    lost = 0.01 if end.metric in FRACTIONS else 0.01 * abs(base.value)
    return "good" if gain >= 0 else "bad" if gain < -lost else ""
