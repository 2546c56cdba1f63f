"""Every payload has its page, and the page says what the source says."""

from __future__ import annotations

from pathlib import Path

import pytest

from guest_payloads.builder import build, payload_info, payload_names

DOCS = Path(__file__).resolve().parents[2] / "docs" / "payloads"


@pytest.mark.parametrize("name", payload_names())
def test_the_page_has_title_params_and_vmcalls(name: str) -> None:
    text = (DOCS / f"{name}.md").read_text()
    info = payload_info(name)
    assert text.startswith(f"# {name}\n")
    assert info.title in text
    for param in info.params:
        assert f"| `{param.name}` | {param.default} | {param.doc} |" in text
    for call in info.vmcalls:
        assert f"`{call}`" in text


def test_no_page_is_left_over() -> None:
    assert {path.stem for path in DOCS.glob("*.md")} == {*payload_names(), "README"}


def test_the_example_of_the_guide_builds(tmp_path: Path) -> None:
    lines = (DOCS / "README.md").read_text().split("`mine.s`, anywhere:\n\n")[1].splitlines()
    source = []
    for line in lines:
        if line and not line.startswith("    "):
            break
        source.append(line[4:])
    body = "\n".join(source).split("refault run mine.s")[0]
    (tmp_path / "mine.s").write_text(body)
    assert b"the sum\0" in build(tmp_path / "mine.s")
