"""What print and a notebook show: short, aligned, escaped."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

import seprune
from seprune.graph.groups import find_structure
from seprune.runtime.short_table import ROWS, ShortTable


def test_columns_are_aligned_and_numbers_have_separators():
    table = ShortTable.of("two rows", ("name", "channels"), [("a", 1024), ("long.name", 8)])
    assert table.text() == "two rows\nname       channels\na          1,024\nlong.name  8"


def test_a_long_table_is_cut_and_says_how_many_rows_are_left_out():
    table = ShortTable.of("many", ("row",), [(n,) for n in range(ROWS + 1234)])
    lines = table.text().splitlines()
    assert (lines[-2], lines[-1]) == (str(ROWS - 1), "... and 1,234 more")
    assert "<p>... and 1,234 more</p>" in table.to_html()


def test_html_and_control_characters_are_escaped():
    table = ShortTable.of("<b>", ("x",), [("<script>\x1b[2J",)])
    assert "<script>" not in table.to_html()
    assert "&lt;script&gt;\\x1b[2J" in table.to_html()
    assert "\x1b" not in table.text()


class Wide(nn.Module):
    """A stem of 512 channels with a gate, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.gate, self.head = (
            nn.Conv2d(3, 512, 1),
            nn.Linear(512, 512),
            nn.Linear(512, 9),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = x * self.gate(x.mean((2, 3))).sigmoid()[:, :, None, None]
        return self.head(x.mean((2, 3)))


def test_what_people_print_is_a_short_table():
    torch.manual_seed(0)
    model, images = Wide(), torch.rand(4, 3, 8, 8)
    structure = find_structure(model, images)
    statistics = seprune.collect_statistics(model, [images], structure=structure)
    importance = seprune.score(structure, statistics)
    plan = seprune.make_plan(structure, importance, macs=0.5)
    shown = SimpleNamespace(
        **{n: repr(v) for n, v in locals().items() if hasattr(v, "_short_table")}
    )

    assert shown.structure.splitlines()[0] == (
        f"gates: 1, dependency groups: 2, MACs: {64 * 3 * 512 + 512 * 512 + 512 * 9:,}, "
        f"parameters: {4 * 512 + 513 * 512 + 513 * 9:,}"
    )
    assert shown.structure.splitlines()[2].split() == ["stem", "512", "512", ":sigmoid", "prunable"]
    mean = float(statistics.values[":sigmoid"]["mean"].mean())
    assert shown.statistics.splitlines()[2].split() == [":sigmoid", "512", f"{mean:.4f}"]
    assert shown.importance.splitlines()[2].split()[:2] == ["stem", "512"]
    after = plan.widths()["stem"][1]
    assert shown.plan.splitlines()[2].split() == ["stem", "512", str(after)]
    assert max(map(len, vars(shown).values())) < 500
    assert all(v._repr_html_().startswith("<table>") for v in (structure, plan))


def test_results_that_hold_a_network_do_not_print_it():
    torch.manual_seed(0)
    model, x = Wide(), torch.rand(40, 3, 8, 8)
    structure = seprune.analyse(model, x[:2])
    statistics = seprune.collect_statistics(model, [x], structure=structure)
    plan = seprune.make_plan(structure, seprune.score(structure, statistics), macs=0.5)
    refitted = seprune.refit(model, seprune.prune(model, plan, x[:1]), plan, [x])
    lines = repr(refitted).splitlines()
    assert lines[0] == f"refitted layers: {len(refitted.layers)}, skipped: {len(refitted.skipped)}"
    name, (before, after) = next(iter(refitted.errors.items()))
    assert lines[2].split() == [name, f"{before:.4f}", f"{after:.4f}"]
    batches = [(x, torch.arange(40) % 9)]
    settings = seprune.FineTuneSettings(epochs=2, lr=0.01, recalibrate=0)
    tuned = seprune.finetune(model, (batches, batches), settings)
    rows = [line.split() for line in repr(tuned).splitlines()]
    assert rows[0] == ["chosen:", *tuned.chosen.split()]
    assert rows[2] == ["start", f"{tuned.before.value:.4f}", f"{tuned.before.loss:.4f}"]
    assert rows[4][:2] == ["epoch", "2"]
    assert rows[4][3] == f"{tuned.history[1].validation_loss:.4f}"
    holding = [
        getattr(seprune, name)
        for name in seprune.__all__
        if "model" in getattr(getattr(seprune, name), "__dataclass_fields__", {})
    ]
    assert {c for c in holding if not hasattr(c, "_short_table")} <= {
        seprune.Teacher,
        seprune.Report,
    }
    assert {seprune.Refitted, seprune.FineTuned, seprune.Compressed} <= set(holding)
