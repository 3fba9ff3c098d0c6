"""The README says what the results say, and its commands are real."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def _script():
    spec = importlib.util.spec_from_file_location("readme", ROOT / "benchmarks" / "readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("marker", list(_script().TABLES))
def test_every_table_is_what_the_kept_results_render_to(marker):
    script = _script()
    text = (ROOT / script.TABLES[marker][0]).read_text()
    assert f"<!-- {marker}: made by benchmarks/readme.py -->" in text
    assert script.rendered(text, marker) == text


@pytest.mark.parametrize("figure", list(_script().FIGURES))
def test_every_figure_is_what_the_kept_results_draw(figure):
    assert (ROOT / figure).read_text() == _script().drawn(figure)


def test_every_command_in_the_readme_exists():
    from seprune.cli import app

    known = {c.name or c.callback.__name__ for c in app.registered_commands} | {
        "recipes",
        "latency-table",
    }
    text = (ROOT / "README.md").read_text()
    used = set(re.findall(r"^seprune (\w+)", text, re.MULTILINE))
    used |= set(re.findall(r"`seprune (\w+)", text))
    assert used
    assert used <= known


def test_every_name_of_the_python_example_exists():
    import seprune

    text = (ROOT / "README.md").read_text()
    used = set(re.findall(r"seprune\.([A-Za-z_]+)\(", text))
    assert used <= set(seprune.__all__)


def test_the_python_of_the_readme_runs_as_printed(tmp_path, monkeypatch):
    import torch

    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 2
    monkeypatch.chdir(tmp_path)
    images = torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    names = {"images": images, "loader": list(images.split(8)), "model": None}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    import seprune

    assert seprune.count(names["small"], images[:1]).macs <= 0.5 * 40_815_200
    saved = seprune.load(tmp_path / "small")
    assert seprune.count(saved, images[:1]).macs <= 0.5 * 40_815_200


def test_every_link_in_readme_and_docs_leads_somewhere():
    pages = [
        ROOT / "README.md",
        ROOT / "README.zh-CN.md",
        ROOT / "CONTRIBUTING.md",
        *(ROOT / "docs").glob("*.md"),
    ]
    for page in pages:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_anchor_in_the_docs_is_a_heading():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target, anchor in re.findall(r"\]\(([^)#\s]*)#([^)]+)\)", page.read_text()):
            if "://" not in target:
                other = page.parent / target if target else page
                heads = re.findall(r"^#+ (.+)$", other.read_text(), re.MULTILINE)
                slugs = {
                    re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-") for h in heads
                }
                assert anchor in slugs, f"{page.name}: {target}#{anchor}"


def test_the_chinese_readme_has_the_same_code_numbers_and_links():
    english, chinese = ((ROOT / name).read_text() for name in ("README.md", "README.zh-CN.md"))
    for pattern in (r"```\w+\n.*?```", r"<!-- s.*?<!-- end -->", r"<picture>.*?</picture>"):
        assert re.findall(pattern, english, re.DOTALL) == re.findall(pattern, chinese, re.DOTALL)
    links = [set(re.findall(r"\]\(([^)]+)\)", text)) for text in (english, chinese)]
    assert links[0] - {"README.zh-CN.md"} == links[1] - {"README.md"}
    for marker in ("six", "speeds"):
        assert _script().rendered(chinese, marker) == chinese
