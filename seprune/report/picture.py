"""Accuracy against FLOPs as a small PNG, which a model card shows on any hub."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from seprune.measure.metric_names import FRACTIONS, metric_title
from seprune.report import words
from seprune.report.compare import UNRECOVERED
from seprune.report.measurement import Measurement, Report

WIDTH, HEIGHT, SCALE = 720, 400, 3  # drawn larger, then scaled down: smooth lines
LEFT, RIGHT, TOP, BOTTOM = 84, 24, 24, 64
_INK, _GREY, _GRID, _PAPER = "#24292f", "#6e7781", "#d8dee4", "#ffffff"
_DENSE, _OTHER, _OWN = "#24292f", "#9aa5b1", "#1f6feb"


@dataclass(frozen=True)
class _Axis:
    """From values to pixels."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]

    def at(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)


def accuracy_picture(report: Report, own: Measurement) -> bytes | None:
    """A PNG of the deciding metric of all networks of a report against their FLOPs.

    None where fewer than two networks were measured. Cut networks that were recovered afterwards
    are left out.

    Args:
        own: the one that the card is of, drawn stronger.
    """
    points = [m for m in report.measurements if m.value is not None and not _mended(report, m)]
    if len({m.macs for m in points}) < 2 or own not in points:
        return None
    unit = 100 if own.metric in FRACTIONS else 1
    across, divisor = _flops_axis(points)
    up = _axis([unit * (m.value or 0.0) for m in points], SCALE * (HEIGHT - BOTTOM), SCALE * TOP)
    image = Image.new("RGB", (SCALE * WIDTH, SCALE * HEIGHT), _PAPER)
    draw = ImageDraw.Draw(image)
    _frame(draw, across, up)
    title = metric_title(own.metric)
    name = "GFLOPs" if divisor == 1e9 else "MFLOPs"
    _text(draw, (WIDTH / 2 + LEFT / 2, HEIGHT - 20), f"{name} of one image", anchor="mm")
    _text(draw, (12, 8), f"{title} in %" if unit == 100 else title, anchor="la")
    for m in sorted(points, key=lambda m: m is own):
        place = across.at(2 * m.macs / divisor), up.at(unit * (m.value or 0.0))
        _point(draw, place, m, strong=m is own)
    small = image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    small.quantize(64).save(stream, "PNG", optimize=True)
    return stream.getvalue()


def _mended(report: Report, m: Measurement) -> bool:
    """Whether the network was recovered afterwards, so that nobody keeps it."""
    later = report.measurements[report.measurements.index(m) + 1 :]
    return m.stage in UNRECOVERED and any(n.budget == m.budget for n in later)


def _flops_axis(points: list[Measurement]) -> tuple[_Axis, float]:
    """The axis from no FLOPs on, and what they are divided by."""
    most = max(2 * m.macs for m in points)
    divisor = 1e9 if most >= 1e9 else 1e6
    ends = SCALE * LEFT, SCALE * (WIDTH - RIGHT)
    return _axis([0.0, 1.04 * most / divisor], *ends, exact=True), divisor


def _axis(values: list[float], start: float, end: float, *, exact: bool = False) -> _Axis:
    """An axis over these values with round ticks; with a margin unless they are its ends."""
    low, high = min(values), max(values)
    margin = 0.0 if exact else max(0.15 * (high - low), 1e-3 * max(abs(high), 1e-9))
    low, high = low - margin, high + margin
    rough = (high - low) / 5
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * k for k in (1, 2, 2.5, 5, 10) if size * k >= rough)
    first = math.ceil(low / step - 1e-9)
    ticks = tuple(k * step for k in range(first, math.floor(high / step + 1e-9) + 1))
    return _Axis(low, high, start, end, ticks)


def _frame(draw: ImageDraw.ImageDraw, across: _Axis, up: _Axis) -> None:
    """Grid lines and the numbers beside them."""
    for tick in up.ticks:
        draw.line([(across.start, up.at(tick)), (across.end, up.at(tick))], _GRID, SCALE)
        where = LEFT - 10.0, up.at(tick) / SCALE
        _text(draw, where, f"{tick:.6g}", anchor="rm", colour=_GREY)
    for tick in across.ticks:
        draw.line([(across.at(tick), up.start), (across.at(tick), up.end)], _GRID, SCALE)
        where = across.at(tick) / SCALE, HEIGHT - BOTTOM + 14.0
        _text(draw, where, f"{tick:.6g}", anchor="mm", colour=_GREY)


def _point(
    draw: ImageDraw.ImageDraw, place: tuple[float, float], m: Measurement, *, strong: bool
) -> None:
    """A dot, labelled on the side that has space."""
    x, y = place
    colour = _DENSE if m.stage == "baseline" else _OWN if strong else _OTHER
    size = SCALE * (8 if strong else 6)
    draw.ellipse([(x - size, y - size), (x + size, y + size)], colour, _PAPER, SCALE)
    right = x > SCALE * WIDTH * 0.6
    where = (x / SCALE + (-14 if right else 14), y / SCALE)
    _text(draw, where, words.stage_name(m), anchor="rm" if right else "lm",
          colour=_INK if strong or m.stage == "baseline" else _GREY)  # fmt: skip


def _text(
    draw: ImageDraw.ImageDraw,
    place: tuple[float, float],
    text: str,
    *,
    anchor: str,
    colour: str = _INK,
) -> None:
    font = ImageFont.load_default(15 * SCALE)
    plain = text.replace("·", "-")
    draw.text((SCALE * place[0], SCALE * place[1]), plain, colour, font, anchor=anchor)
