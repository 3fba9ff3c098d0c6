"""The table of other tasks: means, spreads, what is bold."""

from __future__ import annotations

from task_table import table


def rows(method, macs, **values):
    return [
        {"task": "detection", "seed": str(seed), "method": method, "macs": macs, "stage": stage,
         "metric": "map", "value": str(value)}
        for stage, found in values.items()
        for seed, value in enumerate(found)
    ]  # fmt: skip


def test_a_block_has_means_over_seeds_and_the_best_of_each_column_in_bold():
    kept = [
        *rows("dense", "1.0", dense=(0.5, 0.6)),
        *rows("default", "0.5", cut=(0.2, 0.3), refitted=(0.5, 0.5), tuned=(0.5,)),
        *rows("l2", "0.5", cut=(0.3, 0.3, 0.9), refitted=(0.4, 0.5), tuned=(0.3,)),
    ]
    assert table({"rows": kept}).splitlines()[2:] == [
        "| detection at 0.5; dense mAP 55.0 ± 7.1 | seprune's default | 25.0 ± 7.1 | "
        "**50.0 ± 0.0** | **50.0 (1 seed)** |",
        "|  | `l2` | **30.0 ± 0.0** | 45.0 ± 7.1 | 30.0 (1 seed) |",  # of seeds that all have
    ]
