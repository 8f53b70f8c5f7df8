from __future__ import annotations

import dataclasses
import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from kp_runtime.bench_compare import compared
from kp_runtime.bench_page import bench_page
from kp_runtime.bench_plots import Point, batch_curves, distribution, milliseconds, stage_bar, ticks
from kp_runtime.bench_results import (
    Bench,
    BenchSettings,
    ColdStart,
    FileRun,
    NetworkCase,
    PhotoRun,
    Setup,
    Times,
    times_from_turns,
)
from kp_runtime.html_page import clean
from kp_runtime.machine import Jetson, machine_from_system

EVIL = "<title><script>alert('x')</script>&\"a\".onnx"
VOID = {"meta", "br"}
SVG = re.compile(r"<svg.*?</svg>", re.DOTALL)


def times(ms: float, seed: int = 0) -> Times:
    rng = np.random.default_rng(seed)
    return times_from_turns([(ms / 1e3 * rng.lognormal(0, 0.1, 20)).tolist() for _ in range(5)])


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """Two files at three batch sizes; the machine is one that tells nothing of itself."""
    files = ("model.fp32.onnx", "model.int8.onnx")
    cold = ColdStart(3, 123.4, 5.6, 30.0, None)
    ways = {"8": {"by 4": 1.0, "whole": 2.0}}
    network = []
    for i, file in enumerate(files):
        for batch in (1, 4, 8):
            measured = times((i + 1) * 7.0 * batch, seed=batch + i)
            network.append(NetworkCase(file, batch, measured.summary.p50_ms / batch, measured))
    stages = {name: times(ms, i) for i, (name, ms) in enumerate((("read", 5.0), ("detect", 50.0), ("map back", 0.01)))}
    setup = Setup("out/tiny", "photos/face.png", "b" * 64, (480, 640), 1, "Haar", BenchSettings((1, 4, 8)),
                  machine_from_system(tmp_path))  # fmt: skip
    runs = [
        FileRun(file, letter * 64, 1_500_000, "fp32", "ort-cpu", 0.1, ways, cold)
        for file, letter in zip(files, "cd", strict=True)
    ]
    return Bench(setup, "2026-01-02T03:04:05+00:00", (0.5, 0.4, 0.3), None, tuple(runs), tuple(network),
                 PhotoRun(files[0], times(56.0), stages), {})  # fmt: skip


class Checker(HTMLParser):
    """Every tag that opens also closes; texts and tags are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [f"{name}={value}" for name, value in attrs if name in ("src", "href", "style", "onload")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def checked(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == []
    assert checker.links == []
    return checker


def elements(svg: str, tag: str) -> Iterator[ET.Element]:
    return ET.fromstring(svg).iter(tag)


def words(svg: str) -> list[str]:
    return [text.text or "" for text in elements(svg, "text")]


def test_the_page_is_whole_and_asks_for_nothing(bench: Bench, tmp_path: Path) -> None:
    page = bench_page(bench, tmp_path / "deep" / "b.html").read_text(encoding="utf-8")
    checker = checked(page)
    assert "script" not in checker.tags
    assert not re.search(r"https?:|url\(|@import|//", page)
    assert "prefers-color-scheme: dark" in page
    assert page.index("figure { overflow: visible }") > page.index("overflow-x: auto }", page.index("figure {"))
    assert page.count("<th") == page.count("<th scope=col") + page.count("<th scope=row")
    tables = re.findall('<div class=wide tabindex=0 role=region aria-label="[^"]+"><table>(.*?)</table>', page)
    assert len(tables) == page.count("<table>") > 3
    for table in tables:  # each row begins with what it is about
        assert all(row.startswith("<th scope=") for row in re.findall("<tr>(.*?)</tr>", table))
    assert "<th scope=col></th>" not in page
    assert "<th scope=col class=text></th>" not in page
    svgs = SVG.findall(page)
    assert len(svgs) == 2 + 6 + 1
    for svg in svgs:
        root = ET.fromstring(svg)
        assert root.get("role") == "img"
        assert [child.tag for child in list(root)[:2]] == ["title", "desc"]
        assert root[0].text
        assert root.get("aria-label") == f"{root[0].text}: {root[1].text}"


def test_all_numbers_stand_in_the_page(bench: Bench, tmp_path: Path) -> None:
    checker = checked(bench_page(bench, tmp_path / "b.html").read_text(encoding="utf-8"))
    texts = set(checker.texts)
    for measured in (*(case.times for case in bench.network), bench.photo.whole, *bench.photo.stages.values()):
        s = measured.summary
        assert {f"{value:.3f}" for value in (s.p50_ms, s.p95_ms, s.p99_ms, s.max_ms, s.min_ms, s.mean_ms)} <= texts
        assert f"{s.p50_low_ms:.3f} to {s.p50_high_ms:.3f}" in texts
    assert {
        "b" * 64,
        "c" * 64,
        "d" * 64,
        "by 4",
        "1.5",
        "123",
        "5.60",
        "30",
        "0.50, 0.40, 0.30 (1, 5, 15 minutes)",
    } <= texts
    assert "load average after" not in texts
    assert {"not told by the system", "none of those looked for", "its own choice"} <= texts


def test_a_jetson_is_described(bench: Bench, tmp_path: Path) -> None:
    jetson = Jetson("R36", None, "pmode:0002", 306, None, 1020)
    machine = dataclasses.replace(
        bench.setup.machine, jetson=jetson, device="Jetson Orin", mhz=1500, governor="schedutil"
    )
    other = dataclasses.replace(bench, setup=dataclasses.replace(bench.setup, machine=machine))
    texts = set(checked(bench_page(other, tmp_path / "b.html").read_text(encoding="utf-8")).texts)
    assert {"R36", "pmode:0002", "now 306 MHz to 1020", "Jetson Orin", "now 1500 MHz", "schedutil"} <= texts


def test_text_from_outside_is_escaped(bench: Bench, tmp_path: Path) -> None:
    """A file's name may hold anything that a disk takes."""
    for name in (EVIL, "a\udcff\x01\n.onnx"):
        files = tuple(dataclasses.replace(file, file=name) for file in bench.files[:1])
        network = tuple(dataclasses.replace(case, file=name) for case in bench.network[:3])
        machine = dataclasses.replace(bench.setup.machine, cpu=name, governor=name)
        setup = dataclasses.replace(bench.setup, bundle=name, photo=name, detector=name, machine=machine)
        stages = {name: bench.photo.stages["read"]}
        photo = dataclasses.replace(bench.photo, file=name, stages=stages)
        odd = dataclasses.replace(bench, files=files, network=network, setup=setup, photo=photo)
        page = bench_page(odd, tmp_path / "b.html", compared(odd, odd)).read_text(encoding="utf-8")
        checker = checked(page)
        assert "script" not in checker.tags
        for svg in SVG.findall(page):
            ET.fromstring(svg)
        assert page.count(clean(name)) > 10


def test_a_comparison_stands_in_the_page(bench: Bench, tmp_path: Path) -> None:
    longer = bench.network[0].times
    longer = times_from_turns([[ms * 2 / 1e3 for ms in turn] for turn in longer.turns_ms])
    new = dataclasses.replace(bench, network=(dataclasses.replace(bench.network[0], times=longer), *bench.network[1:]))
    machine = dataclasses.replace(bench.setup.machine, governor="other")
    new = dataclasses.replace(new, setup=dataclasses.replace(bench.setup, machine=machine))
    page = bench_page(new, tmp_path / "b.html", compared(bench, new, anyway=True)).read_text(encoding="utf-8")
    texts = checked(page).texts
    assert page.count("<td class=slower>slower</td>") == 1
    assert texts.count("not distinguishable") == 9
    assert "no fair comparison: governor not known, then other" in texts


def test_a_histogram_holds_every_sample() -> None:
    measured = times_from_turns([[0.010] * 60, [0.020] * 30, [0.5]])
    svg = distribution("a case", measured, 2)
    bars = [(float(r.get("x", "")), float(r.get("height", ""))) for r in elements(svg, "rect")]
    assert len(bars) == 3
    tallest = max(height for _, height in bars)
    assert [round(height / tallest, 3) for _, height in bars] == pytest.approx([1, 0.5, 2 / tallest], abs=0.002)
    # the axis is a logarithm: 10 to 20 is as long as a fiftieth of 10 to 500 says
    x = [at for at, _ in bars]
    assert (x[1] - x[0]) / (x[2] - x[0]) == pytest.approx(math.log(2) / math.log(50), abs=0.02)


def test_percentiles_are_marked_where_they_are() -> None:
    measured = times(10.0)
    svg = distribution("a case", measured, 0)
    labels = {
        float(t.get("x", "")): float((t.text or "").split()[0])
        for t in elements(svg, "text")
        if "soft" in (t.get("class") or "")
    }
    (x0, ms0), (x1, ms1) = min(labels.items()), max(labels.items())
    step = (x1 - x0) / math.log(ms1 / ms0)
    marks = [float(line.get("x1", "")) for line in elements(svg, "line") if "ink" in (line.get("class") or "")]
    s = measured.summary
    assert marks == pytest.approx([x0 + step * math.log(ms / ms0) for ms in (s.p50_ms, s.p95_ms, s.p99_ms)], abs=0.1)
    assert [word for word in words(svg) if word.startswith("p")] == ["p50", "p95", "p99"]
    bars = [float(r.get("x", "")) for r in elements(svg, "rect")]
    assert min(bars) < marks[0] < max(bars)


@pytest.mark.parametrize("longest", [1.001, 1.01, 2, 20, 100, 299, 1000])
def test_an_axis_always_tells_its_unit(longest: float) -> None:
    for shortest in np.geomspace(0.02, 900, 60).tolist():
        spread = np.geomspace(shortest, shortest * longest, 30).tolist()
        axis = [
            text
            for text in words(distribution("a", times_from_turns([spread]), 0))
            if re.fullmatch("[0-9.]+( ms)?", text)
        ]
        assert sum(text.endswith(" ms") for text in axis) == 1, axis


def test_samples_that_are_all_alike_are_a_bar() -> None:
    svg = distribution("a case", times_from_turns([[0.01], [0.01]]), 0)
    assert len(list(elements(svg, "rect"))) == 1
    assert "2 samples" in svg


def test_batch_curves_are_to_scale() -> None:
    curves = {"a": [Point(1, 20, 18, 23), Point(2, 15, 15, 15), Point(8, 10, 9, 12)], "b": [Point(1, 5, 5, 5)]}
    svg = batch_curves(curves)
    scale = {
        float(t.text or ""): float(t.get("y", "")) - 4 for t in elements(svg, "text") if t.get("text-anchor") == "end"
    }
    low, high = min(scale), max(scale)
    assert low == 0

    def y(ms: float) -> float:
        return scale[0] + (scale[high] - scale[0]) * ms / high

    circles = [(float(c.get("cx", "")), float(c.get("cy", ""))) for c in elements(svg, "circle")]
    assert [cy for _, cy in circles] == pytest.approx([y(ms) for ms in (20, 15, 10, 5)], abs=0.05)
    x = [cx for cx, _ in circles]
    assert x[0] == x[3]
    assert (x[1] - x[0]) * 3 == pytest.approx(x[2] - x[0], abs=0.05)
    upright = {
        (float(e.get("y1", "")), float(e.get("y2", ""))) for e in elements(svg, "line") if e.get("x1") == e.get("x2")
    }
    assert any(found == pytest.approx((y(18), y(23)), abs=0.05) for found in upright)
    assert {"a", "b", "1", "2", "8"} <= set(words(svg))


def test_labels_of_near_curves_do_not_touch() -> None:
    curves = {f"file {i}": [Point(1, 10 + i / 100, 10, 11)] for i in range(8)}
    svg = batch_curves(curves)
    at = sorted(float(t.get("y", "")) for t in elements(svg, "text") if (t.text or "").startswith("file"))
    assert len(at) == 8
    assert np.diff(at).min() > 19


def test_labels_stay_in_the_picture() -> None:
    curves = {f"file {i}": [Point(1, 0.1, 0.1, 0.1)] for i in range(8)} | {"slow": [Point(1, 100, 90, 110)]}
    svg = batch_curves(curves)
    zero = next(float(t.get("y", "")) for t in elements(svg, "text") if t.text == "0")
    at = [float(t.get("y", "")) for t in elements(svg, "text") if (t.text or "").startswith("file")]
    assert max(at) <= zero
    assert min(at) > 0


def test_stages_are_as_long_as_they_take() -> None:
    svg = stage_bar({"read": 10.0, "detect": 30.0, "map back": 0.001})
    x = [float(r.get("x", "")) for r in elements(svg, "rect")]
    wide = [float(r.get("width", "")) for r in elements(svg, "rect")]
    assert (x[2] - x[1]) / (x[1] - x[0]) == pytest.approx(3, abs=0.01)
    assert wide[2] == 0.5
    assert {"read 10.0", "detect 30.0"} <= set(words(svg))
    assert "map back" not in words(svg)
    assert "map back: 0.0010 ms" in svg


@pytest.mark.parametrize(
    ("low", "high", "found"),
    [
        (9.8, 10.9, [10.0, 10.5]),
        (4, 75, [5, 10, 20, 50]),
        (0.02, 900, [0.1, 1, 10, 100]),
        (10.01, 10.02, [10.01, 10.015, 10.02]),
        (7.0, 7.0, [7.0]),
    ],
)
def test_ticks_are_round_and_inside(low: float, high: float, found: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(found)


@pytest.mark.parametrize(
    ("ms", "text"),
    [
        (0, "0"),
        (0.0123456, "0.0123"),
        (0.5, "0.500"),
        (1.2345, "1.23"),
        (12.345, "12.3"),
        (123.45, "123"),
        (54321, "54321"),
    ],
)
def test_three_digits(ms: float, text: str) -> None:
    assert milliseconds(ms) == text
