"""The docs do what they say: the shell and Python blocks of each page run, in order, as a reader would run them.

A page runs in a folder of its own with what `place` puts there; its Python blocks share their names, its shell
blocks their files. A block that can't be run here carries one of the reasons of `NOT_RUN` as the title of its
fence, which the site shows above it:

    ```sh title="Needs a Jetson"

Such a block must look like its reason, and the commands, options, files and make targets in it must exist; where a
reason can be gone, as a package may be installed, its block is run. A new page needs a line in zensical.toml and
nothing here; a reason that is missing is added to `NOT_RUN`.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import cv2
import numpy as np
import pytest
import typer.main
from markdown_it import MarkdownIt

import kp_runtime
from kp_cli import app
from kp_runtime import probes
from kp_runtime.interchange import pts_text
from kp_train.synthetic import drawn_face, write_csv_source

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "examples" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

@dataclass(frozen=True)
class Reason:
    """Why a block is not run: what must stand in it, and whether it can be run here nevertheless."""

    pattern: str
    gone: Callable[[], bool] = lambda: False


def _has_nvrtc() -> bool:
    try:
        probes.nvrtc()
    except Exception:  # whatever an incomplete CUDA does
        return False
    return True


NOT_RUN = {
    "Needs a camera": Reason(r"kp run (0|rtsp:|\"nvargus)|camera"),
    "Needs a CUDA GPU": Reason(r"kp plan|tensorrt|trtexec|bench-gpu|Cuda|bf16-mixed"),
    "Needs a Jetson": Reason(r"sudo |/opt/kp|~/kp|nvpmodel"),
    "Needs emulation": Reason(r"aarch64"),
    "Needs NVRTC": Reason(r"compile_cubin", _has_nvrtc),
    "Needs the full data sets": Reason(r"--data|--calibration"),
    "Needs the network": Reason(r"pip install|make (demo|wheelhouse)"),
    "Takes hours": Reason(r"kp train|train_reference|make (fuzz|soak|nightly)"),
    "Takes minutes": Reason(r"kp (export|bench|eval)|make bench"),
}
"""The titles of blocks that are not run."""

SHOWN = {"text", "toml", "json", "yaml", "ini", "protobuf", "promql", "dockerfile"}
"""Languages of blocks that nobody runs."""


@dataclass(frozen=True)
class Block:
    """A fenced block: its page, the line of its first line of text, its language, its title and its text."""

    page: Path
    line: int
    language: str
    title: str | None
    text: str

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def is_run(self) -> bool:
        known = self.title is None or (self.title in NOT_RUN and NOT_RUN[self.title].gone())
        return known and self.language in ("sh", "python")


def blocks_of(page: Path) -> list[Block]:
    blocks = []
    for token in MarkdownIt().parse(page.read_text(encoding="utf-8")):
        if token.type == "fence" and token.map is not None:
            language, _, rest = token.info.strip().partition(" ")
            title = re.fullmatch(r'title="([^"]*)"', rest)
            assert title or not rest, f"{page.name}: a fence takes a language and title=\"…\" alone, got {token.info}"
            blocks.append(Block(page, token.map[0] + 2, language, title and title[1], token.content))
    return blocks


def all_blocks() -> list[Block]:
    return [block for page in PAGES for block in blocks_of(page)]


def ids(value: Any) -> str:
    return value.where if isinstance(value, Block) else str(value.relative_to(ROOT))


@pytest.fixture(scope="session")
def model_place(tmp_path_factory: pytest.TempPathFactory, astronaut: Path) -> Path:
    """What every page finds: photos, a video, labelled faces, the checkout's bundles and programs."""
    place = tmp_path_factory.mktemp("docs")
    photo = kp_runtime.image_from_file(astronaut)
    for name in ("photo.jpg", "photos/one.jpg", "photos/two.jpg"):
        (place / name).parent.mkdir(exist_ok=True)
        cv2.imwrite(str(place / name), photo)
    _write_video(place, photo[20:260, 60:380])
    write_csv_source(place, people=12)
    _write_pts(place / "photos_68")
    for name in ("examples", "scripts", "packaging"):
        (place / name).symlink_to(ROOT / name)
    for bundle in ("engines/resnet18-68", "engines/resnet18-68-lite"):
        shutil.copytree(ROOT / bundle, place / bundle)
    shutil.copytree(place / "engines" / "resnet18-68", place / "out" / "resnet18-68", copy_function=os.link)
    return place


def _write_video(place: Path, view: np.ndarray) -> None:
    (place / "frames").mkdir()
    size = view.shape[1], view.shape[0]
    video = cv2.VideoWriter(str(place / "talk.mp4"), cv2.VideoWriter_fourcc(*"mp4v"), 25, size)
    for i in range(8):
        frame = np.roll(view, i, axis=1)
        video.write(frame)
        cv2.imwrite(str(place / "frames" / f"{i:03d}.png"), frame)
    video.release()


def _write_pts(folder: Path) -> None:
    folder.mkdir()
    rng = np.random.default_rng(1)
    for i in range(6):
        image, xy = drawn_face(rng)
        cv2.imwrite(str(folder / f"face{i}_0.png"), image)
        (folder / f"face{i}_0.pts").write_text(pts_text(xy))


@pytest.fixture
def place(model_place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of `model_place` by links, which is the current folder: what writes a file replaces it."""
    shutil.copytree(model_place, tmp_path / "place", symlinks=True, copy_function=os.link)
    monkeypatch.chdir(tmp_path / "place")
    monkeypatch.syspath_prepend(ROOT)
    modules = set(sys.modules)
    yield tmp_path / "place"
    for name in set(sys.modules) - modules:
        if name.partition(".")[0] == "examples":
            del sys.modules[name]


@pytest.mark.parametrize("page", [page for page in PAGES if any(b.is_run for b in blocks_of(page))], ids=ids)
def test_a_page_does_what_it_shows(page: Path, place: Path) -> None:
    names = types.ModuleType("page").__dict__
    for block in filter(lambda block: block.is_run, blocks_of(page)):
        if block.language == "sh":
            _run_shell(block)
        else:
            padded = "\n" * (block.line - 1) + block.text  # so that an error names the page's line
            exec(compile(padded, str(page), "exec"), names)


def _run_shell(block: Block) -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    threads = {"OMP_NUM_THREADS": "1", "KP_CACHE": str(Path("cache").resolve()), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.text],
        env=os.environ | threads | {"PATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{block.where} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
    assert "Traceback" not in done.stderr, f"{block.where}:\n{done.stderr}"


@pytest.mark.parametrize("block", [b for b in all_blocks() if b.title is not None], ids=ids)
def test_what_is_not_run_has_a_reason_and_exists(block: Block) -> None:
    assert block.title in NOT_RUN, f"{block.where}: {block.title!r} is none of {', '.join(NOT_RUN)}"
    assert re.search(NOT_RUN[block.title].pattern, block.text), f"{block.where} does not look like {block.title!r}"
    if block.language == "python":
        ast.parse(block.text)
    else:
        for words in commands_of(block):
            _check_command(words, block.where)


def commands_of(block: Block) -> Iterator[list[str]]:
    """The simple commands of a shell block as words, without what is set for them."""
    for line in block.text.replace("\\\n", " ").splitlines():
        for words in _commands(shlex.shlex(line, posix=True, punctuation_chars="();&|<>")):
            while words and re.fullmatch(r"\w+=.*", words[0]):
                del words[0]
            if words:
                yield words


def _commands(lexer: shlex.shlex) -> Iterator[list[str]]:
    lexer.whitespace_split = True
    words: list[str] = []
    for word in [*lexer, ";"]:
        if set(word) <= set("();&|"):
            yield words
            words = []
        else:
            words.append(word)


def _check_command(words: list[str], where: str) -> None:
    words = words[1:] if words[0] == "sudo" else words
    name = Path(words[0]).name
    if name == "kp":
        _check_kp(words[1:], where)
    elif name == "make":
        targets = [word for word in words[1:] if "=" not in word]
        known = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        assert set(targets) <= known, f"{where}: make has no {set(targets) - known}"
    elif name == "pip" and (extras := re.search(r"\.\[([\w,]+)\]", " ".join(words))):
        with open(ROOT / "pyproject.toml", "rb") as file:
            known = set(tomllib.load(file)["project"]["optional-dependencies"])
        assert set(extras[1].split(",")) <= known, f"{where}: an extra of {extras[1]} is none of the project's"
    elif name in ("python", "python3") and words[1:2] and words[1].endswith(".py"):
        assert (ROOT / words[1]).is_file(), f"{where}: there is no {words[1]}"
    elif name in ("python", "python3") and words[1:2] == ["-m"] and words[2].startswith("benchmarks."):
        assert (ROOT / words[2].replace(".", "/")).with_suffix(".py").is_file(), f"{where}: there is no {words[2]}"
    elif words[0].startswith(("scripts/", "examples/", "packaging/")):
        assert (ROOT / words[0]).is_file(), f"{where}: there is no {words[0]}"


def _check_kp(words: list[str], where: str) -> None:
    """That a command and its options exist; a value `$D` stands for options and is left out."""
    group = typer.main.get_command(app)
    assert isinstance(group, click.Group)
    command = group.get_command(click.Context(group), words[0])
    assert command is not None, f"{where}: there is no kp {words[0]}"
    known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    given = {word.partition("=")[0] for word in words[1:] if re.match(r"-\D", word)}
    assert given <= known | {"--help"}, f"{where}: kp {words[0]} has no {', '.join(given - known)}"


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_fences_are_of_a_known_kind(page: Path) -> None:
    blocks = blocks_of(page)
    fences = len(re.findall(r"^\s*(?:```|~~~)", page.read_text(encoding="utf-8"), re.MULTILINE))
    assert fences == 2 * len(blocks), f"{page.name}: a fence is not closed, or lies in an indented block"
    for block in blocks:
        if page.parent.name == "docs":
            assert block.language in {"sh", "python", *SHOWN}, f"{block.where}: {block.language!r} is no language here"
        if block.language not in ("sh", "python"):
            assert not re.match(r"\$ |kp |pip |make ", block.text), f"{block.where} holds a command: make it sh"
            assert block.title is None or block.title not in NOT_RUN, f"{block.where} is not run anyway"


def test_every_page_is_in_the_navigation() -> None:
    with open(ROOT / "zensical.toml", "rb") as file:
        sections = tomllib.load(file)["project"]["nav"]
    pages = [page for section in sections for group in section.values() for entry in group for page in entry.values()]
    assert sorted(pages) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))


def test_every_public_name_is_in_the_reference() -> None:
    shown = re.findall(r"^::: kp_runtime\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert sorted(shown) == sorted(kp_runtime.__all__)
