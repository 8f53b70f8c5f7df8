"""The docs do what they say: the shell and Python blocks of each page run, in order, as a reader would run them.

A page runs in a process and a folder of its own, with what `first_place` puts there; its Python blocks share their
names, its shell blocks their files. `CONTINUES` names the pages that go on where another one ended. The title of a
fence, which the site shows above the block, may say more:

    ```sh title="Exits with 1"     the block is run, and must end so
    ```sh title="Needs a Jetson"   it is not run, for a reason of `NOT_RUN`

A block that is not run must look like its reason, and the commands, options, files and make targets in it must exist;
where a reason can be gone, as a package may be installed, it is run. A new page needs a line in zensical.toml and
nothing here; a reason that is missing is added to `NOT_RUN`.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib.util
import inspect
import io
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tomllib
import typer.main
from markdown_it import MarkdownIt

import kp_runtime
from kp_cli import app
from kp_runtime import photos, probes, video_sink
from kp_runtime.pts import pts_text
from kp_train.synthetic import drawn_face, write_csv_source

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "examples" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CONTINUES = {"export.md": "own_data.md"}
"""The page that the readers of another one have read, and whose files they have."""

EXITS = "Exits with "


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
    "Needs a Ray cluster": Reason(r"--ray \S+:"),
    "Needs Ray": Reason(r"--ray local", lambda: importlib.util.find_spec("ray") is not None),
    "Needs a Triton server": Reason(r"triton"),
    "Needs emulation": Reason(r"aarch64"),
    "Needs NVRTC": Reason(r"compile_cubin", _has_nvrtc),
    "Needs the full data sets": Reason(r"--data|--calibration"),
    "Needs the network": Reason(r"pip install|make (demo|wheelhouse)"),
    "Takes hours": Reason(r"kp train|train_reference|train-shipped|make (fuzz|soak|nightly)"),
    "Takes minutes": Reason(r"kp (export|bench|eval|tune|refit|train-detector)|make bench"),
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
        free = self.title is None or self.title.startswith(EXITS)
        return self.language in ("sh", "python") and (free or (self.title in NOT_RUN and NOT_RUN[self.title].gone()))


def blocks_of(page: Path) -> list[Block]:
    blocks = []
    for token in MarkdownIt().parse(page.read_text(encoding="utf-8")):
        if token.type == "fence" and token.map is not None:
            language, _, rest = token.info.strip().partition(" ")
            title = re.fullmatch(r'title="([^"]*)"', rest)
            assert title or not rest, f'{page.name}: a fence takes a language and title="…" alone, got {token.info}'
            blocks.append(Block(page, token.map[0] + 2, language, title and title[1], token.content))
    return blocks


def all_blocks() -> list[Block]:
    return [block for page in PAGES for block in blocks_of(page)]


def ids(value: Any) -> str:
    return value.where if isinstance(value, Block) else str(value.relative_to(ROOT))


@pytest.fixture(scope="session")
def first_place(tmp_path_factory: pytest.TempPathFactory, astronaut: Path) -> Path:
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
    for bundle in ("engines/resnet18-68", "engines/resnet18-68-lite", "engines/face-detector"):
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


@pytest.fixture(scope="session")
def runs(first_place: Path, request: pytest.FixtureRequest) -> Iterator[dict[str, Future[None]]]:
    """The pages of this session's tests by name, run two at a time from the first to the last."""
    asked = dict.fromkeys(item.callspec.params["page"] for item in request.session.items if _runs_a_page(item))
    began = {CONTINUES.get(page.name, page.name) for page in asked}
    spawning = get_context("spawn")
    with ProcessPoolExecutor(2, spawning, max_tasks_per_child=1) as pool:
        futures: dict[str, Future[None]] = {}
        chains = [
            [page, *(follower for follower in asked if CONTINUES.get(follower.name) == page.name)]
            for page in RUN
            if page.name in began
        ]
        for chain in sorted(chains, key=len, reverse=True):  # the longest begins first
            future = pool.submit(_run_pages, chain, first_place)
            futures |= {member.name: future for member in chain}
        yield futures
        pool.shutdown(cancel_futures=True)


RUN = [page for page in PAGES if any(block.is_run for block in blocks_of(page))]


def _runs_a_page(item: pytest.Item) -> bool:
    return getattr(item, "originalname", "") == test_a_page_does_what_it_shows.__name__


@pytest.mark.parametrize("page", RUN, ids=ids)
def test_a_page_does_what_it_shows(page: Path, runs: dict[str, Future[None]]) -> None:
    runs[page.name].result()


def _run_pages(pages: list[Path], first_place: Path) -> None:
    """Runs pages one after the other in a copy of `first_place` by links: what writes a file replaces it."""
    place = first_place.with_name(pages[0].stem)
    shutil.copytree(first_place, place, symlinks=True, copy_function=os.link)
    os.chdir(place)
    sys.path.insert(0, str(place))
    for page in pages:
        names: dict[str, Any] = {}
        for block in map(_on_free_ports, filter(lambda block: block.is_run, blocks_of(page))):
            if block.language == "sh":
                _run_shell(block)
            else:
                padded = "\n" * (block.line - 1) + block.text  # so that an error names the page's line
                with contextlib.redirect_stdout(io.StringIO()):
                    exec(compile(padded, str(page), "exec"), names)


@functools.cache
def _free_port(named: str) -> str:
    """The port that stands for a page's own in this process: another run of the tests may use that."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def _on_free_ports(block: Block) -> Block:
    ports = re.compile(r"\b(8123|9100)\b")
    return replace(block, text=ports.sub(lambda match: _free_port(match[1]), block.text))


def _run_shell(block: Block) -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    more = {"OMP_NUM_THREADS": "1", "KP_CACHE": str(Path("cache").resolve()), "PYTHONPATH": str(ROOT), "PATH": path}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.text],
        env=os.environ | more, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    wanted = int(block.title.removeprefix(EXITS)) if block.title and block.title.startswith(EXITS) else 0
    said = f"{block.where} ended with {done.returncode}, not {wanted}:\n{done.stdout}{done.stderr}"
    assert done.returncode == wanted, said
    assert wanted or "Traceback" not in done.stderr, said


@pytest.mark.parametrize("block", [b for b in all_blocks() if b.title is not None and not b.is_run], ids=ids)
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
    if name in ("kp", "torchrun"):
        _check_kp(words[[Path(word).name for word in words].index("kp") + 1 :], where)
    elif name == "make":
        targets = [word for word in words[1:] if "=" not in word]
        known = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        assert set(targets) <= known, f"{where}: make has no {set(targets) - known}"
    elif name == "pip" and (extras := re.search(r"(?:\.|kp-edge)\[([\w,]+)\]", " ".join(words))):
        with open(ROOT / "pyproject.toml", "rb") as file:
            known = set(tomllib.load(file)["project"]["optional-dependencies"])
        assert set(extras[1].split(",")) <= known, f"{where}: an extra of {extras[1]} is none of the project's"
        is_copy = extras[0].startswith(".") and "cli" in extras[1] and "-e" not in words
        assert not is_copy, f"{where}: without -e, kp finds no model beside its code"
    elif name in ("python", "python3") and words[1:2] and words[1].endswith(".py"):
        assert (ROOT / words[1]).is_file(), f"{where}: there is no {words[1]}"
    elif name in ("python", "python3") and words[1:2] == ["-m"] and words[2].startswith("benchmarks."):
        assert (ROOT / words[2].replace(".", "/")).with_suffix(".py").is_file(), f"{where}: there is no {words[2]}"
    elif words[0].startswith(("scripts/", "examples/", "packaging/")):
        assert (ROOT / words[0]).is_file(), f"{where}: there is no {words[0]}"


def _check_kp(words: list[str], where: str) -> None:
    """That a command and its options exist."""
    commands: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert words[0] in commands, f"{where}: there is no kp {words[0]}"
    known = {name for parameter in commands[words[0]].params for name in (*parameter.opts, *parameter.secondary_opts)}
    given = {word.partition("=")[0] for word in words[1:] if re.match(r"-\D", word)}
    assert given <= known | {"--help"}, f"{where}: kp {words[0]} has no {', '.join(given - known)}"


@pytest.mark.parametrize(
    ("text", "title", "wrong"),
    [
        ("false; true", None, "ended with 1, not 0"),
        ("true", "Exits with 1", "ended with 0, not 1"),
        ("echo Traceback >&2", None, "Traceback"),
        ("kp train --data a.csv --epoch 3", "Takes hours", "kp train has no --epoch"),
        ("sudo kp trane", "Needs a Jetson", "there is no kp trane"),
        ("X=1 make fuzzy; make fuzz", "Takes hours", "make has no .'fuzzy'"),
        ('pip install ".[image,imago]"', "Needs the network", "an extra of image,imago"),
        ('pip install ".[image,ort,cli]"', "Needs the network", "without -e, kp finds no model"),
        ("pip install 'kp-edge[metric]'", "Needs the network", "an extra of metric "),
        ("python scripts/nothing.py | kp train", "Takes hours", "there is no scripts/nothing.py"),
        ("ls", "Needs a Jetson", "does not look like"),
        ("ls", "Needs patience", "is none of"),
    ],
)
def test_wrong_blocks_are_found(text: str, title: str | None, wrong: str) -> None:
    block = Block(ROOT / "docs" / "index.md", 1, "sh", title, text)
    with pytest.raises(AssertionError, match=wrong):
        (_run_shell if block.is_run else test_what_is_not_run_has_a_reason_and_exists)(block)


@pytest.mark.parametrize(("name", "count"), [("README.md", 2), ("docs/index.md", 2), ("docs/quickstart.md", 1)])
def test_what_is_typed_first_has_no_comment(name: str, count: int) -> None:
    """zsh, the shell of Macs, hands what stands behind a `#` to the command."""
    shell = [block for block in blocks_of(ROOT / name) if block.language == "sh"]
    assert [block.where for block in shell[:count] if "#" in block.text] == []


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


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent.name == "docs"], ids=ids)
def test_links_stay_on_the_site(page: Path) -> None:
    """The builder finds pages and places that do not exist, but not what lies outside of docs/."""
    parsed = MarkdownIt().parse(page.read_text(encoding="utf-8"))
    links = [str(child.attrs.get("href", "")) for token in parsed for child in token.children or ()]
    assert [link for link in links if link.startswith(("..", "/"))] == []


def test_every_page_is_in_the_navigation() -> None:
    with open(ROOT / "zensical.toml", "rb") as file:
        sections = tomllib.load(file)["project"]["nav"]
    pages = [page for section in sections for group in section.values() for entry in group for page in entry.values()]
    assert sorted(pages) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))


def test_every_public_name_is_in_the_reference() -> None:
    shown = re.findall(r"^::: kp_runtime\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert sorted(shown) == sorted(kp_runtime.__all__)


def test_the_reference_tells_each_argument_of_a_function() -> None:
    """Of what is called, too. Where there are over two: one or two may stand in the sentence."""
    for name in kp_runtime.__all__:
        value = getattr(kp_runtime, name)
        value = getattr(value, "__call__", None) if inspect.isclass(value) else value  # noqa: B004
        if inspect.isfunction(value) and len(named := inspect.signature(value).parameters) > 2:
            told = re.findall(r"^    (\w+): ", inspect.getdoc(value) or "", re.MULTILINE)
            assert [argument for argument in named if argument not in ("self", *told)] == [], name


def test_the_reference_sends_nobody_to_a_docstring_that_it_does_not_show() -> None:
    texts = {name: inspect.getdoc(getattr(kp_runtime, name)) or "" for name in kp_runtime.__all__}
    assert [name for name, text in texts.items() if "file's docstring" in text or "`signing." in text] == []


def test_the_reference_says_what_needs_opencv() -> None:
    names = ["CenterDetector", "HaarDetector", "YuNetDetector", "draw_keypoints", "image_from_bytes", "image_from_file"]
    texts = {name: inspect.getdoc(getattr(kp_runtime, name)) or "" for name in [*names, "load_detector", "open_effect"]}
    assert [name for name, text in texts.items() if "MissingExtraError: OpenCV" not in text] == []


@pytest.mark.parametrize(("page", "formats"), [("quickstart.md", photos.FORMATS), ("video.md", video_sink.FORMATS)])
def test_a_page_tells_what_is_in_each_format(page: str, formats: Collection[str]) -> None:
    """In a table that begins with `--format`."""
    table = (ROOT / "docs" / page).read_text(encoding="utf-8").partition("\n| `--format` |")[2].partition("\n\n")[0]
    cells = [row.split("|")[1] for row in table.splitlines()[1:]]
    assert sorted(re.findall(r"`(\w+)`", " ".join(cells))) == sorted(formats)


def test_the_variables_stand_in_one_table() -> None:
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "kp_runtime").glob("*.py")]
    read = set(re.findall(r"""(?:environ\.get\(|VARIABLE = )"(KP_\w+)\"""", "\n".join(sources)))
    page = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(KP_\w+)` \|", page, re.MULTILINE)) == read


def test_the_reference_shows_where_arguments_come_from() -> None:
    names = re.findall(r"^::: (\S+)\.(\w+)$", (ROOT / "docs" / "api_more.md").read_text(), re.MULTILINE)
    nodes = [
        node
        for module in {module for module, _ in names}
        for node in ast.parse((ROOT / module.replace(".", "/")).with_suffix(".py").read_text(encoding="utf-8")).body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
    ]
    shown = {name for _, name in names}
    texts = [ast.get_docstring(node) or "" for node in nodes if node.name in shown]
    sources = {source for text in texts for source in re.findall(r"from `(?:\w+\.)?(\w+)`", text)}
    assert sources
    assert sources <= shown
