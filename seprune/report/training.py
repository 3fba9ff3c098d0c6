"""How a run's trainings went: loss and metric by epoch, from metrics.jsonl."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from seprune.errors import InputError, first_line
from seprune.measure.metric_names import FRACTIONS, metric_title, metric_value
from seprune.report import axes, words
from seprune.report.axes import COLOURS, Figure
from seprune.report.measurement import Report, TrainedEpoch, TrainingCurve
from seprune.runtime.reading import parse_json, read_text
from seprune.runtime.typed import typed

MOST_EPOCHS = 1_000_000
_NUMBERS = ("loss", "validation_loss", "lr")


def read_training(path: Path, *, stage: str, budget: str | None, metric: str) -> TrainingCurve:
    """The epochs in a `metrics.jsonl`.

    Args:
        stage, budget: of the measurement of the network that was trained.
        metric: the one that decides.

    Raises:
        InputError: the file is damaged; names the line.
    """
    fix = "give the same `seprune run` command again"
    epochs = []
    for number, line in enumerate(read_text(path, lines=MOST_EPOCHS).splitlines(), 1):
        source = f"{path}:{number}"
        try:
            found = parse_json(line)
        except ValueError as error:
            what = f"{source}: not valid JSON"
            raise InputError(what, why=first_line(error), fix=fix, code="damaged") from error
        row = typed(dict[str, float | None], found, source=source, fix=fix)
        plain = {name: row.get(name) for name in _NUMBERS}
        epochs.append(TrainedEpoch(epoch=number, value=row.get(metric), **plain))
    return TrainingCurve(stage, budget, metric, epochs)


def title(training: TrainingCurve) -> str:
    """`baseline`, `fine-tuned · macs 0.5`."""
    return " · ".join(filter(None, (training.stage, training.budget)))


def loss(report: Report) -> Figure:
    """Loss by epoch: a colour for each network, whole lines on the images trained on."""
    traces = []
    for training, colour in _coloured(report.training):
        for part, dash, values in (
            ("training images", "solid", [e.loss for e in training.epochs]),
            ("validation split", "dot", [e.validation_loss for e in training.epochs]),
        ):
            if axes.finite(values).size:
                name = f"{title(training)}, {part}"
                traces.append(_line(training, name, values, colour) | {"hovertemplate": _hover()})
                traces[-1]["line"]["dash"] = dash
    layout = axes.layout("epoch", "loss", height=340)
    layout["yaxis"] |= axes.scale(axes.finite([v for t in traces for v in t["y"]]))
    return {"data": traces, "layout": layout}


def metric(report: Report) -> Figure:
    """The deciding metric on the validation split by epoch; a star for the epoch that was kept."""
    traces = []
    percent = 100 if report.metric in FRACTIONS else 1
    for training, colour in _coloured(report.training):
        values = [None if e.value is None else percent * e.value for e in training.epochs]
        if not axes.finite(values).size:
            continue
        line = _line(training, title(training), values, colour)
        kept = _kept(report, training)
        size = [14 if n == kept else 5 for n in range(len(values))]
        mark = ["star" if n == kept else "circle" for n in range(len(values))]
        line["marker"] |= {"size": size, "symbol": mark}
        traces.append(line | {"hovertemplate": _hover()})
    unit = " (%)" if percent == 100 else ""
    name = f"{axes.label(metric_title(report.metric))} on the validation split{unit}"
    return {"data": traces, "layout": axes.layout("epoch", name, height=340)}


def table(report: Report) -> list[list[str]]:
    """Head and a row for each epoch of each training."""
    head = ["network", "epoch", "loss", "validation loss", metric_title(report.metric), "rate"]
    return [head, *(row for t in report.training for row in _rows(t))]


def _rows(training: TrainingCurve) -> Iterator[list[str]]:
    for e in training.epochs:
        numbers = [words.DASH if v is None else f"{v:.4g}" for v in (e.loss, e.validation_loss)]
        rate = words.DASH if e.lr is None else f"{e.lr:.2g}"
        value = metric_value(training.metric, e.value)
        yield [title(training), str(e.epoch), *numbers, value, rate]


def _coloured(trainings: Sequence[TrainingCurve]) -> Iterator[tuple[TrainingCurve, str]]:
    """The dense network in the colour of text, each budget in one of its own."""
    colours = iter(COLOURS * (1 + len(trainings) // len(COLOURS)))
    for training in trainings:
        yield training, "@ink" if training.budget is None else next(colours)


def _line(
    training: TrainingCurve, name: str, values: Sequence[float | None], colour: str
) -> Figure:
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": axes.label(name),
        "x": [e.epoch for e in training.epochs],
        "y": [None if v is None else axes.short(v) for v in values],
        "line": {"color": colour, "width": 2},
        "marker": {"color": colour, "size": 5},
    }


def _hover() -> str:
    return "%{y:.4g} after epoch %{x}"


def _kept(report: Report, training: TrainingCurve) -> int | None:
    """The epoch whose weights were chosen, from 0; None where it is not known or none was."""
    budget = report.budget(training.budget)
    best: Any = budget.tuning.get("best_epoch") if budget else None
    return best if isinstance(best, int) and best >= 0 else None
