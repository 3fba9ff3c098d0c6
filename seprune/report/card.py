"""The model card: README.md of a saved folder, ready for a model hub."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seprune.measure.metric_names import metric_title, metric_value
from seprune.report import words
from seprune.report.measurement import Measurement, Report
from seprune.runtime.text import printable
from seprune.runtime.typed import read_typed

TAGS = {  # of a Hub, by task
    "classification": "image-classification",
    "multi_label": "image-classification",
    "segmentation": "image-segmentation",
    "detection": "object-detection",
    "embedding": "image-feature-extraction",
}
HERE = "path/to/this/folder"  # where a card says that the network is, until it is pushed
HUB_METRICS = {"top1": "accuracy", "top5": "top-5 accuracy", "miou": "mean_iou"}


def model_card(report: Report, measurement: Measurement, *, picture: str | None = None) -> str:
    """Markdown with the front matter that hubs read; the numbers are `measurement`'s.

    Args:
        picture: name of the file beside it that shows the metric against FLOPs.
    """
    budget = report.budget(measurement.budget)
    base = report.baseline
    made = _line(f", channels chosen by {budget.criterion} ({budget.allocation})" if budget else "")
    kept = words.percent(words.fraction_of(measurement.macs, base.macs if base else None), 1)
    sections = [
        _front_matter(report, measurement),
        f"# {_line(report.name)}",
        f"`{_line(report.model.get('name'))}`, {measurement.stage}: {kept} of the MACs{made}.",
        "## Use",
        f'```python\nimport seprune\n\nmodel = seprune.load("{HERE}")\n```',
        *_preparing(report.data.get("preprocessing")),
        "No pickle is read: `config.json` names the architecture and the cuts, "
        "`model.safetensors` holds the weights, `SHA256SUMS` their hashes.",
        "## Results",
        _results(report, measurement),
        *_measured(report, measurement, picture),
        "## Made with",
        f"```sh\n{_code(report.command)}\n```",
        f"Seed {report.seed}, {_line(report.created)}.",
    ]
    if remarks := words.missing(report) + words.not_timed(report):
        sections += ["## Not in the numbers", "\n".join(f"- {_line(x)}" for x in remarks)]
    return "\n\n".join(sections) + "\n"


def _measured(report: Report, m: Measurement, picture: str | None) -> list[str]:
    """Which images the numbers are of, and the picture of them."""
    if not m.count:
        return ["Nothing was measured on images."]
    title = _line(metric_title(m.metric))
    shown = [f"![{title} against FLOPs]({picture})"] if picture else []
    name = _line(data_name(report.data.get("source")))
    return [*shown, f"{title[:1].upper()}{title[1:]} is of {m.count:,} images of {name}."]


def data_name(source: object) -> str:
    """What a data set is called elsewhere: a card goes to others, the paths of a machine do not."""
    text = str(source)
    if text.startswith("torchvision/"):
        return text.removeprefix("torchvision/").partition(":")[0].lower()
    if text.startswith("hf:"):
        return text.removeprefix("hf:").partition(":")[0]
    return text.rstrip("/").rpartition("/")[2] or "images"


def _preparing(given: Any) -> list[str]:
    """How an image becomes an input, in words and as code that needs no seprune."""
    if given is None:
        return []
    from seprune.data.preprocessing import as_code  # with torch, which reading a report needs not
    from seprune.models.preprocessing import Preprocessing

    known = Preprocessing.of(given)
    return [
        f"## Images\n\n{_line(known)}. Without seprune:",
        f"```python\n{as_code(known)}```",
    ]


def _front_matter(report: Report, m: Measurement) -> str:
    """YAML; JSON strings are YAML strings, so quoting is left to json."""
    lines = ["library_name: seprune", "tags:", "- pruning", "- squeeze-and-excitation"]
    lines += tagged(report.data.get("task"), report.model.get("base_model"))
    found = words.finite(m.metrics)
    if not found:
        return "---\n" + "\n".join(lines) + "\n---"
    name, data = (json.dumps(x) for x in (report.name, data_name(report.data.get("source"))))
    kinds = {HUB_METRICS.get(n, n): value for n, value in found.items()}
    kind = TAGS.get(str(report.data.get("task")), "image-classification")
    lines += [f"datasets:\n- {data}", "metrics:", *(f"- {json.dumps(n)}" for n in kinds)]
    lines += ["model-index:", f"- name: {name}", "  results:", "  - task:"]
    lines += [f"      type: {kind}", f"    dataset:\n      name: {data}\n      type: {data}"]
    lines.append("    metrics:")
    lines += [f"    - type: {json.dumps(n)}\n      value: {v}" for n, v in kinds.items()]
    return "---\n" + "\n".join(lines) + "\n---"


def tagged(task: object, base: object) -> list[str]:
    """Front matter for the task, and for the published weights that a network comes from."""
    lines = [f"pipeline_tag: {TAGS[str(task)]}"] if str(task) in TAGS else []
    if isinstance(base, str) and not base.startswith("torchvision/"):  # a repository of a Hub
        lines.append(f"base_model: {json.dumps(base)}")
    return lines


@dataclass(frozen=True)
class _Described:
    """What `config.json` of a folder tells of its network; whoever wrote it may have meant harm."""

    architecture: str | None = None
    task: str | None = None
    base_model: str | None = None
    metrics: dict[str, float] | None = None
    preprocessing: dict[str, Any] | None = None


def folder_card(config: Path, title: str) -> str:
    """The card of a folder that no report has described, from its `config.json`.

    Raises:
        InputError: it does not hold what seprune writes.
    """
    known = read_typed(_Described, config, fix="save the network again", code="damaged")
    base = known.base_model
    lines = ["library_name: seprune", "tags:", "- pruning", "- squeeze-and-excitation"]
    sections = [
        "---\n" + "\n".join([*lines, *tagged(known.task, base)]) + "\n---",
        f"# {_line(title)}",
        f"`{_line(known.architecture)}`, pruned by seprune"
        + (f", from `{_line(base)}`." if base else "."),
        "## Use",
        f'```python\nimport seprune\n\nmodel = seprune.load("{HERE}")\n```',
    ]
    sections += _preparing(known.preprocessing)
    if known.metrics:
        found = known.metrics.items()
        rows = [f"| {_line(metric_title(k))} | {metric_value(k, v)} |" for k, v in found]
        sections += ["## Results", "\n".join(["| metric | value |", "|---|--:|", *rows])]
    return "\n\n".join(sections) + "\n"


def _results(report: Report, measurement: Measurement) -> str:
    base = [report.baseline] if report.baseline and measurement.stage != "baseline" else []
    rows = [*base, measurement]
    titles = [_line(metric_title(name)) for name in report.metrics]
    head = ["network", *titles, "MACs", "parameters", "file"]
    lines = [f"| {' | '.join(head)} |", f"|---|{'--:|' * (len(head) - 1)}"]
    for m in rows:
        cells = [
            _line(words.stage_name(m)),
            *(metric_value(name, m.metrics.get(name)) for name in report.metrics),
            f"{m.macs:,}",
            f"{m.params:,}",
            words.size(m.bytes),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _line(text: object) -> str:
    """One line of Markdown: names come from files and folders."""
    plain = printable(" ".join(str(text).split()), keep="")
    for mark, shown in (("|", "\\|"), ("<", "&lt;"), ("`", "'"), ("[", "\\[")):
        plain = plain.replace(mark, shown)
    return plain


def _code(text: str) -> str:
    """One line inside of a fence, which it cannot end."""
    return printable(text, keep="").replace("```", "~~~")
