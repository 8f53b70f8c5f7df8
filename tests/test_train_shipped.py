"""`scripts/train-shipped`: the chain holds together and goes on after a kill; `kp` and `python` are doubles."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest
import typer.main

from kp_cli import app

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "train-shipped"
MEAN = SCRIPT.with_name("mean_weights.py")

KP = """#!/usr/bin/env bash
# notes its words; leaves a bundle, or where KP_KILLED is its folder a state, and ends as if it was killed
printf '%q ' "$@" >>"$KP_WORDS"
echo >>"$KP_WORDS"
while [ "$1" != --out ]; do shift; done
mkdir -p "$2/state"
if [ "${KP_KILLED:-}" = "$(basename "$2")" ]; then
    touch "$2/state/last.state"
    kill -KILL $$
fi
touch "$2/manifest.json"
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    for name in ("kp", "python"):
        (tmp_path / name).write_text(KP)
        (tmp_path / name).chmod(0o755)
    return tmp_path


def chain(place: Path, killed: str = "", status: int = 0, **variables: str) -> list[list[str]]:
    """The commands of one try; folders that are kept are said, each once."""
    words = place / "words"
    words.write_text("")
    environment = {"PATH": f"{place}:{os.environ['PATH']}", "KP_WORDS": str(words), "KP_KILLED": killed, **variables}
    done = subprocess.run(
        ["bash", SCRIPT, "rows of faces.csv", "photos", place / "out"],
        env=environment,
        capture_output=True,
        check=False,
    )
    assert done.returncode == status, done.stderr
    return [shlex.split(line) for line in words.read_text().splitlines()]


def value(words: list[str], option: str) -> str | None:
    return words[words.index(option) + 1] if option in words else None


def test_what_begins_from_nothing_is_under_the_licence_of_what_ships(place: Path) -> None:
    shipped = json.loads((SCRIPT.parents[1] / "engines" / "resnet18-68" / "manifest.json").read_text(encoding="utf-8"))
    for words in chain(place):
        terms = [words[i + 1] for i, word in enumerate(words) if word == "--licence"]
        if value(words, "--weights") == "none":
            assert dict(text.split("=", 1) for text in terms) == shipped["licence"]
        else:  # it has that of its start
            assert not terms


def test_each_run_starts_from_one_that_is_done(place: Path) -> None:
    done: list[str] = []
    for words in chain(place):
        if words[0] == "train":
            starts = [start for option in ("--init", "--teacher") if (start := value(words, option))]
        else:
            starts = words[1 : words.index("--out")] if words[0] == str(MEAN) else words[1:2]
        assert set(starts) <= set(done), words
        out = value(words, "--out")
        assert out is not None
        assert out not in done
        done.append(out)
    assert [name for out in done if (name := Path(out).name).startswith("resnet")] == [
        "resnet18-68",
        "resnet18-68-lite",
    ]
    assert chain(place) == [], "nothing is left to do"


def test_the_command_line_knows_every_option(place: Path) -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    runs = chain(place)
    assert [words[0] for words in runs if words[0] not in commands] == [str(MEAN)] * 2
    for words in (words for words in runs if words[0] in commands):
        known = {name for parameter in commands[words[0]].params for name in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known, words


def test_another_seed_is_another_one_for_each_run(place: Path) -> None:
    runs = {out: words for words in chain(place) if words[0] == "train" and (out := value(words, "--out"))}
    (place / "out").rename(place / "elsewhere")
    for words in chain(place, SEED="10", PRECISION="bf16-mixed"):
        if words[0] == "train":
            first = runs.pop(str(value(words, "--out")))
            first[first.index("--seed") + 1] = str(int(str(value(first, "--seed"))) + 10)
            first[first.index("--precision") + 1] = "bf16-mixed"
            assert words == first
    assert not runs


@pytest.mark.parametrize("killed", ["a", "taught", "full-last"])
def test_a_killed_run_goes_on_and_what_was_done_stays(place: Path, killed: str) -> None:
    whole = chain(place)
    (place / "out").rename(place / "elsewhere")
    before = chain(place, killed, 137)
    after = chain(place)
    assert before + after[1:] == whole
    assert after[0] == [*before[-1], "--resume"]


def test_what_is_missing_is_said() -> None:
    done = subprocess.run(["bash", SCRIPT, "rows.csv"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("train-shipped: name both data sets and a folder")
