"""Results files of `kp bench`: read as they were written, and what is wrong with one is a line."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from kp_runtime.bench_results import Bench, json_from_bench, results_from_file, write_results
from kp_runtime.errors import InputError
from tests.bench_run import steady


def test_a_document_is_read_as_it_was_written(bench: Bench, tmp_path: Path) -> None:
    path = write_results(bench, tmp_path / "deep" / "b.json")
    assert results_from_file(path) == bench
    raw = json.loads(path.read_text())
    assert raw == json.loads(json.dumps(json_from_bench(bench)))
    assert (raw["schema"], next(iter(raw))) == (1, "schema")
    assert any(
        line.strip().startswith("[0.") or line.strip().startswith("[1") for line in path.read_text().splitlines()
    )
    raw["later"] = raw["setup"]["later"] = "a field that is added"
    path.write_text(json.dumps(raw))
    assert results_from_file(path) == bench


def test_odd_names_survive_the_document(bench: Bench, tmp_path: Path) -> None:
    odd = dataclasses.replace(bench.setup, photo="a [  1,  2 ]\n[\n 3\n].png \udcff")
    other = dataclasses.replace(bench, setup=odd)
    assert results_from_file(write_results(other, tmp_path / "b.json")) == other


def changed(raw: Any, path: list[Any], value: Any) -> Any:
    """A document with one value replaced."""
    raw = json.loads(json.dumps(raw))
    inner = raw
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return raw


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["schema"], 2, "has schema 2, this release reads 1: run kp bench --out again"),
        (["schema"], "1", "has schema '1'"),
        (["network"], {}, "network must be a list, got {}"),
        (["network", 0, "batch"], "8", "network.batch must be a whole number, got 8"),
        (["network", 0, "batch"], 0, "a batch size must be 1 or more, got 0"),
        (["network", 0, "times", "turns_ms", 0, 0], 0, "each sample must be over 0 ms"),
        (["network", 0, "times", "turns_ms", 0, 0], float("nan"), "turns_ms must be a number, got nan"),
        (["network", 0, "times", "turns_ms"], [], "must have turns"),
        (["network", 0, "times", "turns_ms"], [[]], "each turn samples"),
        (["network", 0, "times", "summary", "p99_ms"], 1e-9, "percentiles must rise"),
        (["setup", "machine", "cores"], True, "setup.machine.cores must be a whole number, got True"),
        (["setup", "machine", "versions", "numpy"], 2, "setup.machine.versions.numpy must be text, got 2"),
        (["setup", "machine"], None, "setup.machine must be an object"),
        (["files", 0], {"file": "a"}, "files lacks sha256"),
    ],
)
def test_a_wrong_document_is_said(bench: Bench, tmp_path: Path, path: list[Any], value: Any, message: str) -> None:
    file = tmp_path / "b.json"
    file.write_text(json.dumps(changed(json_from_bench(bench), path, value)))
    with pytest.raises(InputError) as caught:
        results_from_file(file)
    assert message in str(caught.value)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is no JSON"), ("[]", "is no results file"), ('{"schema": 1}', "is no results file"), ("\udcff", "no JSON")],
)
def test_what_is_no_document(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "b.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=message):
        results_from_file(tmp_path / "b.json")
    with pytest.raises(InputError, match="can't be read"):
        results_from_file(tmp_path / "none.json")


def leaves(raw: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = raw.items() if isinstance(raw, dict) else enumerate(raw[:1]) if isinstance(raw, list) else ()
    return [path, *(leaf for key, value in items for leaf in leaves(value, (*path, key)))]


def test_no_wrong_value_is_more_than_one_line(bench: Bench, tmp_path: Path) -> None:
    """Whatever stands in a field, the answer is results or an InputError."""
    small, file = json.loads(json.dumps(json_from_bench(steady(bench)))), tmp_path / "b.json"
    for path in leaves(small)[1:]:
        for value in (None, -1, 10**400, "x", [], {}):
            file.write_text(json.dumps(changed(small, list(path), value)))
            said = ""
            try:
                results_from_file(file)
            except InputError as error:
                said = str(error)
            assert "\n" not in said
