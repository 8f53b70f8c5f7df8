"""The README's map names files that are there, and all of them."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def files_of_the_map() -> list[str]:
    text = (ROOT / "README.md").read_text()
    (block,) = [b for b in text.split("```")[1::2] if b.startswith("\nkp_runtime/")]
    files, folder = [], ""
    for line in block.strip().splitlines():
        word = line.split()[0]
        if word.endswith("/"):
            folder = word
        else:
            files.append((folder if line.startswith("  ") else "") + word)
    return files


def test_the_map_is_the_house() -> None:
    there = {
        str(p.relative_to(ROOT))
        for name in ("kp_runtime", "kp_train", "kp_export", "kp_cli", "benchmarks")
        for p in (ROOT / name).glob("*.py")
    }
    there |= {
        str(p.relative_to(ROOT))
        for p in (ROOT / "examples").rglob("*")
        if p.suffix in (".py", ".cpp") and p.stem != "setup"
    }
    there = {name for name in there if not name.endswith(("__init__.py", "__main__.py"))}
    assert set(files_of_the_map()) == there
    assert len(files_of_the_map()) == len(there)


def test_links_lead_somewhere() -> None:
    for page in [ROOT / "README.md", ROOT / "examples" / "README.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert "://" in link or (page.parent / link).exists(), f"{page.name}: {link}"
