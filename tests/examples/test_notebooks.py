"""The notebooks of examples/: executed again, and kept with outputs and pictures."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[2] / "examples" / "notebooks").glob("*.ipynb"))
SMALL = 250_000  # bytes


def outputs(notebook: dict) -> list[dict]:
    return [o for c in notebook["cells"] if c["cell_type"] == "code" for o in c["outputs"]]


def test_there_are_the_four():
    assert [path.stem for path in NOTEBOOKS] == [
        "prune_timm_seresnet", "segmentation", "your_own_criterion", "your_own_module",
    ]  # fmt: skip


def _texts(output):
    """What an output shows, without its pictures."""
    kinds = {k: v for k, v in output.get("data", {}).items() if not k.startswith("image/")}
    return [output.get("text", ""), kinds]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_with_its_pictures_and_without_errors_or_paths(path):
    text = path.read_text()
    notebook = json.loads(text)
    code = [c for c in notebook["cells"] if c["cell_type"] == "code"]
    assert [c["execution_count"] for c in code] == list(range(1, len(code) + 1))
    found = outputs(notebook)
    assert any("image/png" in o.get("data", {}) for o in found)
    assert not [o for o in found if o["output_type"] == "error" or o.get("name") == "stderr"]
    shown = json.dumps([c["source"] for c in code] + [_texts(o) for o in found])
    assert not re.findall(r"(?<![\w.:/<])/\w+/|site-packages", shown)
    assert len(text) < SMALL


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, monkeypatch, tmp_path):
    reason = "the extra notebooks is not installed"
    for name in ("ipykernel", "matplotlib"):
        pytest.importorskip(name, reason=reason)
    client = pytest.importorskip("nbclient", reason=reason)
    nbformat = pytest.importorskip("nbformat", reason=reason)
    notebook = nbformat.read(path, as_version=4)
    pictures = sum("image/png" in o.get("data", {}) for o in outputs(notebook))
    how = {"timeout": 1500, "kernel_name": "python3", "resources": {"metadata": {"path": tmp_path}}}
    client.NotebookClient(notebook, **how).execute()  # raises what a cell raises
    assert sum("image/png" in o.get("data", {}) for o in outputs(notebook)) == pictures
