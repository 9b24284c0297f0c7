"""What the documents name exists, and the README's example runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_make_targets_exist(page):
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = re.findall(r"(?:^|`)make ([a-z][\w-]*)", page.read_text(), re.MULTILINE)
    assert [name for name in named if name not in targets] == []


def test_readme_example_runs(capsys):
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(examples) == 1
    exec(compile(examples[0], "README.md", "exec"), {"__name__": "readme"})
    assert capsys.readouterr().out.startswith("1 1\n")


def run_page(name: str) -> None:
    """Run all python blocks of a page as one program, with the page's line numbers."""
    text = (ROOT / "docs" / name).read_text()
    names: dict[str, object] = {"__name__": name}
    for block in re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        program = "\n" * text[: block.start(1)].count("\n") + block.group(1)
        exec(compile(program, name, "exec"), names)


# Pages whose blocks are a program. ir.md is not among them: its blocks are texts of traces.
@pytest.mark.parametrize(
    ("page", "printed"),
    [
        ("training.md", "def backward("),
        ("executors.md", "executor 'wrong': its result is off by"),
        ("examine.md", "same results as eager"),
        ("sharp-edges.md", ""),
        ("faq.md", ""),
        ("executors-gpu.md", ""),
        ("transforms.md", ""),
        ("accelerators.md", "numpy_device declined torch.mm 1x: strides"),
        ("reading-traces.md", 't1 is "cpu f32[4, 6]"; what should replace it is "cpu f32[]"'),
    ],
)
def test_page_runs(page, printed, capsys):
    run_page(page)
    assert printed in capsys.readouterr().out


def test_every_page_with_python_blocks_runs_somewhere():
    run = {
        "training.md",
        "executors.md",
        "examine.md",
        "sharp-edges.md",
        "faq.md",
        "transforms.md",
        "reading-traces.md",
    }
    run |= {"kernels.md", "accelerators.md", "executors-gpu.md"}  # below
    with_blocks = {p.name for p in PAGES if p.parent.name == "docs" and "```python" in p.read_text()}
    assert with_blocks - run - {"ir.md", "architecture.md"} == set()  # those show texts of traces


def test_the_reference_names_what_there_is():
    import thunder

    text = (ROOT / "docs" / "api.md").read_text()
    for name in re.findall(r"`(thunder(?:\.\w+)+)`", text):
        found = thunder
        for part in name.split(".")[1:]:
            found = getattr(found, part)
    elsewhere = ("dynamo", "extend", "executors", "transforms", "pytorch_executor")
    exported = {f"thunder.{n}" for n in thunder.__all__ if n not in elsewhere}
    exported |= {f"thunder.extend.{n}" for n in thunder.extend.__all__}
    assert exported - set(re.findall(r"`(thunder(?:\.\w+)+)`", text)) == set()


def test_kernels_page_examples_run(capsys):
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "kernels.md").read_text(), re.DOTALL)
    assert len(examples) == 3
    for example in examples:
        exec(compile(example, "kernels.md", "exec"), {"__name__": "kernels"})
    assert capsys.readouterr().out == "tensor(2.)\n"


def test_coverage_page_has_the_sections_that_the_tools_write(tmp_path):
    from tests.harness.report import COVERAGE, write_section

    copy = tmp_path / "coverage.md"
    copy.write_text(COVERAGE.read_text())
    for name in ("models", "models-train", "ops", "ops-grad"):
        write_section(name, ["twelve of twelve"], copy)
    assert copy.read_text().count("twelve of twelve") == 4
    write_section("ops", ["eleven"], copy)
    assert copy.read_text().count("twelve of twelve") == 3
    with pytest.raises(ValueError, match="no section"):
        write_section("absent", [], copy)
