"""The map in docs/house.md names all files and no others; the pages' links and the README's numbers hold."""

from __future__ import annotations

import re
from pathlib import Path

from kp_runtime.manifest import Manifest
from tests.test_imports import imported_modules

ROOT = Path(__file__).resolve().parents[1]


def files_of_the_map() -> list[str]:
    text = (ROOT / "docs" / "house.md").read_text()
    (block,) = text.split("```")[1::2]
    files, folder = [], ""
    for line in block.removeprefix("text").strip().splitlines():
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


def test_the_map_is_in_reading_order() -> None:
    """No file stands before one of its package that it imports."""
    above: dict[str, list[str]] = {}
    for name in files_of_the_map():
        package, _, file = name.partition("/")
        if package == "examples":
            continue
        files = {path.stem for path in (ROOT / package).glob("*.py")} - {"__init__"}
        needed = imported_modules((ROOT / name).read_text(encoding="utf-8"), package) & files
        assert needed <= set(above.setdefault(package, [])), name
        above[package].append(file.removesuffix(".py"))


def test_links_lead_somewhere() -> None:
    pages = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "examples/README.md")]
    for page in [*pages, *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert "://" in link or (page.parent / link).exists(), f"{page.name}: {link}"


def test_the_guide_for_changes_names_what_make_has() -> None:
    named = set(re.findall(r"make ([\w-]+)", (ROOT / "CONTRIBUTING.md").read_text()))
    assert named - set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)) == set()


def test_the_models_are_as_good_as_their_manifests_say() -> None:
    readme = (ROOT / "README.md").read_text()
    rows = re.findall(r"^\| \[`(engines/[\w-]+)`\].*? px \| (.*?) \| (.*?) \| (.*?) \|", readme, re.M)
    assert [name for name, *_ in rows] == ["engines/resnet18-68", "engines/resnet18-68-lite"]
    columns = (
        "photos_68 held-out tenth",
        "youtube_faces_68 training rows of held-out people",
        "youtube_faces_68 test rows",
    )
    for name, *shown in rows:
        manifest = Manifest.read(ROOT / name)
        for faces, told in zip(columns, shown, strict=True):
            if "training rows" in faces and any(source.get("whole") for source in manifest.training["sources"]):
                before = re.fullmatch(r"(\d\.\d\d%), \[before it learned them, too\]\((docs/\w+\.md)#[\w-]+\)", told)
                assert before, told
                section = (ROOT / before[2]).read_text().partition("## Tight boxes")[2]
                row = re.search(r"^\| mean of the weights of both \| \S+ \| \S+ \| (\S+) \|", section, re.M)
                assert row, before[2]
                assert before[1] == row[1]
                continue
            line = manifest.accuracy[f"{faces}, boxes from the own detector"]
            low, high = (100 * end for end in line["nme_interval"])
            assert told == f"{line['nme']:.2%} ({low:.2f} to {high:.2f})", (name, faces)
