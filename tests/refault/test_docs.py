"""The documents against the sources: what they cite must exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "tests" / "README.md", *(ROOT / "docs").glob("*.md")])
PACKAGES = (
    "trace_events",
    "host_mm",
    "kvm_model",
    "emu",
    "guest_payloads",
    "refault",
    "tests",
    "bench",
    "docs",
)


def paths(text: str) -> set[str]:
    """Our files and folders that a document names in backticks."""
    found = set()
    for quoted in re.findall(r"`([^`]+)`", text):
        path = re.split(r":\s", quoted)[0].strip().rstrip(":")
        if path.split("/")[0] in PACKAGES and "/" in path and not re.search(r"[*?<\s]", path):
            found.add(path)
    return found


def citations(text: str) -> set[tuple[str, str]]:
    """(file, name) of every `file: name`."""
    return {(path, name) for path, name in re.findall(r"`([\w/]+\.py):\s+(\w+)`", text)}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_file_that_a_document_names_exists(document):
    missing = [path for path in sorted(paths(document.read_text())) if not (ROOT / path).exists()]
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_function_that_a_document_cites_is_in_that_file(document):
    for path, name in sorted(citations(document.read_text())):
        tree = ast.parse((ROOT / path).read_text())
        names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        assert name in names, f"{path}: {name}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_inside_the_repository_resolves(document):
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
        if "://" not in target:
            assert (document.parent / target).exists(), target


def packages() -> list[Path]:
    found = (init.parent for room in PACKAGES for init in (ROOT / room).rglob("__init__.py"))
    return sorted(folder for folder in found if len(list(folder.glob("*.py"))) > 1)


@pytest.mark.parametrize("folder", packages(), ids=lambda folder: str(folder.relative_to(ROOT)))
def test_the_map_of_a_package_names_its_modules_and_no_other(folder):
    told = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
    modules = {path.stem for path in folder.glob("*.py")} - {"__init__", "__main__"}
    assert {name for name in modules if not re.search(rf"(?<!\w){name}\b", told)} == set()
    named = set(re.findall(r"(?<![\w/])([a-z_0-9]+)\.py\b", told))
    assert named <= modules


def told_elsewhere() -> tuple[set[str], set[str]]:
    """The source files and the test files of the last table of tests/README.md."""
    table = (ROOT / "tests" / "README.md").read_text().partition("## Where else")[2]
    sources, tests = set(), set()
    for row in re.findall(r"^\| (`.*) \| (`.*) \|$", table, re.M):
        for cell, found in zip(row, (sources, tests)):
            folder = ""
            for path in re.findall(r"`([^`]+)`", cell):
                # `a/b.py`, `c.py`: the folder is told once; or the path from the room is told.
                if (ROOT / path).exists():
                    folder = str(Path(path).parent)
                room = folder.split("/")[0]
                near = [p for p in (path, f"{folder}/{path}", f"{room}/{path}") if (ROOT / p).exists()]
                found.add(near[0] if near else path)
    return sources, tests


def test_every_source_file_has_tests_and_the_readme_knows_where():
    sources, tests = told_elsewhere()
    assert {path for path in sources | tests if not (ROOT / path).exists()} == set()
    without = set()
    for room in ("trace_events", "host_mm", "kvm_model", "emu", "guest_payloads", "refault"):
        folder = ROOT / "tests" / ("payloads" if room == "guest_payloads" else room)
        for path in (ROOT / room).rglob("*.py"):
            if not path.stem.startswith("__") and not (folder / f"test_{path.stem}.py").exists():
                without.add(str(path.relative_to(ROOT)))
    assert without - sources == set()


def test_the_reading_guide_cites_enough_to_be_worth_its_name():
    assert len(citations((ROOT / "docs" / "READING.md").read_text())) > 25


def test_every_verb_is_in_the_readme():
    from refault.cli import VERBS

    text = (ROOT / "README.md").read_text()
    assert [verb for verb in VERBS if f"refault {verb}" not in text] == []
