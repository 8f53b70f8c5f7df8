"""kp tune: what is tried and which is chosen; but in one test with made-up times."""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import kp_runtime
from kp_runtime import tune
from kp_runtime.cores import usable_cores
from kp_runtime.errors import BackendError, ImageError, InputError
from kp_runtime.frame import image_from_file
from kp_runtime.manifest import Manifest, file_entry
from kp_runtime.tune import beside, run_tune
from kp_runtime.tune_results import TuneSettings, Tuning, check_chosen, milliseconds_from_text, write_tuning
from kp_runtime.tuned import tuned_from_file
from tests.models import tiny_bundle

BOX = np.array([[181.0, 88.0, 269.0, 178.0]])
DATA = "faces of a test"


def astronaut_box(image: object, layout: str = "bgr") -> np.ndarray:
    return BOX


def make_bundle(
    folder: Path, rises: dict[str, Any], nme: float | None = 0.04, faces: int = 100, size: int = 64
) -> Path:
    """The tiny bundle with its graph as a file of each precision, whose rise is recorded (None: without labels).

    A rise of "no" leaves the file out of the report.
    """
    tiny_bundle(folder, size)
    manifest = Manifest.read(folder)
    files = dict(manifest.files)
    rows: list[dict[str, Any]] = []
    for precision, rise in rises.items():
        name = f"model.{precision}.onnx"
        if precision != "fp32":
            shutil.copy(folder / "model.fp32.onnx", folder / name)
        files[name] = dataclasses.replace(files["model.fp32.onnx"], precision=precision, parent_sha256=folder.name)
        rows += [{"file": name, "rise": rise, "nme": 0.21, "faces": 512}] if rise != "no" else []
    if "fp32" not in rises:
        del files["model.fp32.onnx"]
    (folder / "parity.json").write_text(json.dumps(rows))
    files["parity.json"] = file_entry(folder / "parity.json", "report")
    accuracy = {} if nme is None else {DATA: {"nme": nme, "faces": faces}}
    dataclasses.replace(manifest, files=files, accuracy=accuracy).write(folder)
    return folder


def made_up(ms: dict[str, float], spread: float = 0.0) -> Callable[..., Any]:
    """`measure_in_turns` with times of ours: by `bundle/file`, times the threads, over 20 turns."""
    rng = np.random.default_rng(0)

    def measure(cases: dict[str, Any], **_: object) -> dict[str, list[list[float]]]:
        turns = {}
        for name, case in cases.items():
            backend = case.func.backend
            median = ms[backend.report.file] * (1 + (backend.threads - 1) * 0.5) / 1e3
            turns[name] = [[median * (1 + spread * float(rng.uniform(-1, 1))) for _ in range(5)] for _ in range(20)]
        return turns

    return measure


@pytest.fixture(autouse=True)
def quick_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kp_runtime.timing.RESAMPLES", 100)


@pytest.fixture
def tuned_by(astronaut: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tuning]:
    """`run_tune` with made-up times."""

    def run(bundles: list[Path], ms: dict[str, float], spread: float = 0.0, **settings: Any) -> Tuning:
        monkeypatch.setattr(tune, "measure_in_turns", made_up(ms, spread))
        return run_tune(bundles, astronaut, astronaut_box, TuneSettings(threads=(1,), **settings))

    return run


@pytest.mark.parametrize(
    ("text", "ms"),
    [("5ms", 5), ("800us", 0.8), ("800 µs", 0.8), ("0.02s", 20), (" 2.5ms ", 2.5), ("1s", 1000)],
)
def test_a_budget_has_a_unit(text: str, ms: float) -> None:
    assert milliseconds_from_text(text) == pytest.approx(ms)


@pytest.mark.parametrize(
    "text", ["", "5", "ms", "-5ms", "0ms", "5 minutes", "5ms5", "nan s", "1e3ms", "5,5ms", "5ms" * 50]
)
def test_a_budget_that_is_none(text: str) -> None:
    with pytest.raises(InputError, match=r"a budget is a time over 0 such as 5ms, 800us or 0\.02s; got"):
        milliseconds_from_text(text)


def test_as_many_faces_are_timed_as_were_asked_for(
    tmp_path: Path, astronaut: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = set()

    def measure(cases: dict[str, Any], **given: Any) -> dict[str, list[list[float]]]:
        timed.update(len(case.args[1]) for case in cases.values())
        return made_up({"model.fp32.onnx": 1.0})(cases, **given)

    monkeypatch.setattr(tune, "measure_in_turns", measure)
    settings = TuneSettings(faces=3, threads=(1,))
    run_tune([make_bundle(tmp_path / "net", {"fp32": 0.0})], astronaut, astronaut_box, settings)
    assert timed == {3}


@pytest.mark.parametrize(("cores", "threads"), [(1, [1]), (4, [1, 2, 4]), (6, [1, 2, 4, 6])])
def test_threads_that_are_tried(cores: int, threads: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "default_threads", lambda: cores)
    assert tune._threads("ort-cpu", TuneSettings()) == threads


def test_everything_is_measured_and_the_settings_open(
    tmp_path: Path, astronaut: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "SCREENING_S", 0)
    bundle = make_bundle(tmp_path / "full", {"fp32": 0.0, "int8": 0.02})
    phases: dict[str, float] = {}
    settings = TuneSettings(budget_ms=60_000, faces=3, threads=(1,), seconds=0, samples=3)
    result = run_tune(
        [bundle], astronaut, astronaut_box, settings, step=lambda phase, share: phases.update({phase: share})
    )
    assert phases == dict.fromkeys(("opening", "accuracy", "a first look", "measuring"), 1.0)
    assert {(t.file, t.backend, t.threads) for t in result.trials} == {
        ("model.fp32.onnx", "ort-cpu", 1),
        ("model.int8.onnx", "ort-cpu", 1),
    }
    for trial in result.trials:
        assert set(trial.ways) == {"whole", "one by one"}
        assert trial.feeding == min(trial.ways, key=trial.ways.__getitem__)
        assert trial.times is not None
        assert trial.times.summary.samples >= 3
    assert result.chosen is not None
    assert result.trials[result.chosen].verdict == "chosen"
    assert result.tuned is not None
    assert result.tuned.feeding == result.trials[result.chosen].feeding

    settings_file, table = write_tuning(result, tmp_path / "deep" / "tuned.json")
    written = json.loads(table.read_text())
    assert written["schema"] == 1
    assert written["trials"][0]["times"]["turns_ms"] == [list(turn) for turn in result.trials[0].times.turns_ms]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = kp_runtime.load(tuned=settings_file)
    assert (model.backend.report.file, model.backend.threads) == (result.trials[result.chosen].file, 1)
    image = image_from_file(astronaut)
    np.testing.assert_array_equal(model(image, BOX).xy, kp_runtime.load(bundle, threads=1)(image, BOX).xy)
    model(image, np.tile(BOX, (3, 1)))
    assert model.backend.batch_times() == {}, "how to feed three faces is known: nothing was tried"


def test_links_to_the_bundle_stay_in_the_settings(tmp_path: Path, tuned_by: Callable[..., Tuning]) -> None:
    """As to the newest release. Both may lie behind a link, too."""
    bundle = make_bundle(tmp_path / "deep" / "er" / "net", {"fp32": 0.0})
    (tmp_path / "current").symlink_to(bundle)
    (tmp_path / "link").symlink_to(bundle.parent)
    result = tuned_by([bundle], {"model.fp32.onnx": 1.0})
    assert result.tuned is not None
    for folder, out, place in (
        ("current", "t.json", "current"),
        ("link/net", "link/t.json", "net"),
        ("current", "link/t.json", "../../current"),
        ("link/../er/net", "t.json", "deep/er/net"),
    ):
        tuned = dataclasses.replace(result.tuned, bundle=str(tmp_path / folder))
        write_tuning(dataclasses.replace(result, tuned=tuned), tmp_path / out)
        assert tuned_from_file(tmp_path / out).bundle == place
        assert kp_runtime.load(tuned=tmp_path / out).backend.report.file == "model.fp32.onnx"


def test_threads_are_doubled_up_to_all_cores(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "one", {"fp32": 0.0})
    candidates, left_out = tune._open([bundle], TuneSettings(backends=("ort-cpu",)), lambda share: None)
    cores = usable_cores()
    assert [c.threads for c in candidates] == sorted({cores, *(1 << i for i in range(10) if 1 << i <= cores)})
    assert not left_out


def test_what_does_not_open_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = make_bundle(tmp_path / "gpu", {"fp32": 0.0, "fp16": 0.0})
    monkeypatch.setattr(tune, "has_driver", lambda: False)
    _, left_out = tune._open([bundle], TuneSettings(threads=(1,)), lambda share: None)
    assert left_out == dict.fromkeys(("tensorrt", "ort-cuda"), "this machine has no NVIDIA driver")
    monkeypatch.setattr(tune, "has_driver", lambda: True)
    _, left_out = tune._open([bundle], TuneSettings(threads=(1,)), lambda share: None)
    assert list(left_out) == [f"{bundle / f'model.{p}.onnx'}, ort-cuda" for p in ("fp32", "fp16")]
    with pytest.raises(BackendError, match=r"nothing of .*gpu runs here: .*ort-cuda"):
        tune._open([bundle], TuneSettings(backends=("ort-cuda",)), lambda share: None)


MS = {"model.fp32.onnx": 8.0, "model.fp16.onnx": 6.0, "model.int8.onnx": 4.0}


def test_the_fastest_that_keeps_the_accuracy(tmp_path: Path, tuned_by: Callable[..., Tuning]) -> None:
    bundle = make_bundle(tmp_path / "b", {"fp32": 0.0, "fp16": 0.01, "int8": 0.2})
    result = tuned_by([bundle], MS, budget_ms=7)
    assert [(t.file, t.verdict) for t in result.trials] == [
        ("model.int8.onnx", "rise over 0.1"),
        ("model.fp16.onnx", "chosen"),
        ("model.fp32.onnx", "p95 over 7 ms"),
    ]
    assert result.tuned is not None
    assert (result.tuned.file, result.tuned.threads, result.tuned.faces) == ("model.fp16.onnx", 1, 1)
    assert [tuned_by([bundle], MS, max_rise=rise).tuned.file for rise in (0.2, 0.1, 0.0)] == [  # type: ignore[union-attr]
        "model.int8.onnx",
        "model.fp16.onnx",
        "model.fp32.onnx",
    ]
    check_chosen(result)


def test_the_ratio_is_against_what_load_takes(tmp_path: Path, astronaut: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = make_bundle(tmp_path / "b", {"fp32": 0.0, "int8": 0.2})
    monkeypatch.setattr(tune, "measure_in_turns", made_up({"model.fp32.onnx": 2.0, "model.int8.onnx": 4.0}))
    result = run_tune([bundle], astronaut, astronaut_box, TuneSettings(threads=tuple({1, usable_cores()})))
    assert result.over_default is not None
    # load() takes int8 on all cores, which loses accuracy: it is measured all the same
    assert result.over_default.value == pytest.approx(2.0 / (4.0 * (1 + (usable_cores() - 1) * 0.5)))
    assert result.trials[result.chosen or 0].file == "model.fp32.onnx"
    limited = run_tune([bundle], astronaut, astronaut_box, TuneSettings(threads=(1,), precisions=("fp32",)))
    assert limited.over_default is None


def test_an_unknown_rise_is_not_chosen_unless_allowed(tmp_path: Path, tuned_by: Callable[..., Tuning]) -> None:
    bundle = make_bundle(tmp_path / "b", {"fp32": 0.0, "int8": "no"})
    assert [t.verdict for t in tuned_by([bundle], MS).trials] == ["rise not known", "chosen"]
    assert [t.verdict for t in tuned_by([bundle], MS, allow_unknown=True).trials] == ["chosen", "slower"]
    alone = make_bundle(tmp_path / "alone", {"int8": "no"})
    result = tuned_by([alone], MS)
    assert (result.fastest, result.chosen, result.tuned) == (None, None, None)
    with pytest.raises(InputError, match=r"of none it is known: give --data FACES, or --allow-unknown"):
        check_chosen(result)


def test_of_two_that_are_as_fast_the_more_accurate(tmp_path: Path, tuned_by: Callable[..., Tuning]) -> None:
    bundle = make_bundle(tmp_path / "b", {"fp32": 0.0, "int8": 0.05})
    ms = {"model.fp32.onnx": 4.01, "model.int8.onnx": 4.0}
    result = tuned_by([bundle], ms, spread=0.2)
    assert {t.file: t.verdict for t in result.trials} == {
        "model.fp32.onnx": "chosen",
        "model.int8.onnx": "as fast, but less accurate or of more threads",
    }
    assert tuned_by([bundle], ms | {"model.fp32.onnx": 5.0}, spread=0.1).tuned.file == "model.int8.onnx"  # type: ignore[union-attr]


@pytest.mark.parametrize(("turns", "verdict"), [(5, "longer median"), (6, "slower")])
def test_of_few_turns_none_is_called_slower(
    turns: int, verdict: str, tmp_path: Path, astronaut: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(cases: dict[str, Any], **_: object) -> dict[str, list[list[float]]]:
        return {name: found[:turns] for name, found in made_up(MS)(cases).items()}

    monkeypatch.setattr(tune, "measure_in_turns", measure)
    bundle = make_bundle(tmp_path / "b", {"fp32": 0.0, "int8": 0.05})
    result = run_tune([bundle], astronaut, astronaut_box, TuneSettings(threads=(1,)))
    assert [trial.verdict for trial in result.trials] == ["chosen", verdict]


def test_of_two_that_are_as_fast_and_accurate_fewer_threads(
    tmp_path: Path, astronaut: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(cases: dict[str, Any], **_: object) -> dict[str, list[list[float]]]:
        return {name: [[0.004], [0.005], [0.006]] for name in cases}

    monkeypatch.setattr(tune, "measure_in_turns", measure)
    bundle = make_bundle(tmp_path / "b", {"fp32": 0.0})
    result = run_tune([bundle], astronaut, astronaut_box, TuneSettings())
    assert result.tuned is not None
    assert result.tuned.threads == 1


def test_a_file_that_is_better_by_chance_is_no_more_accurate(
    tmp_path: Path, astronaut: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two that keep the accuracy and are as fast, the one of the shorter median is taken."""

    def measure(cases: dict[str, Any], **_: object) -> dict[str, list[list[float]]]:
        longer = {"model.fp32.onnx": 0.0, "model.int8.onnx": 1e-4}
        added = {name: longer[case.func.backend.report.file] for name, case in cases.items()}
        return {name: [[0.004 + more], [0.005 + more], [0.006 + more]] for name, more in added.items()}

    monkeypatch.setattr(tune, "measure_in_turns", measure)
    bundle = make_bundle(tmp_path / "b", {"fp32": 0.0, "int8": -0.02})
    result = run_tune([bundle], astronaut, astronaut_box, TuneSettings(threads=(1,)))
    assert result.tuned is not None
    assert result.tuned.file == "model.fp32.onnx"


def test_what_was_tried_is_closed(
    tmp_path: Path, tuned_by: Callable[..., Tuning], monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[str] = []
    monkeypatch.setattr(kp_runtime.Model, "close", lambda model: closed.append(model.backend.report.file))
    tuned_by([make_bundle(tmp_path / "b", {"fp32": 0.0, "int8": 0.05})], MS)
    assert sorted(closed) == ["model.fp32.onnx", "model.int8.onnx"]


def test_p95_is_held_to_the_budget(tmp_path: Path, astronaut: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file with the shorter median now and then takes long."""

    def measure(cases: dict[str, Any], **_: object) -> dict[str, list[list[float]]]:
        times = {"model.fp32.onnx": [0.004] * 20, "model.int8.onnx": [0.002] * 18 + [0.009] * 2}
        return {name: [times[case.func.backend.report.file]] * 5 for name, case in cases.items()}

    monkeypatch.setattr(tune, "measure_in_turns", measure)
    monkeypatch.setattr(tune, "FINALISTS", 1)  # one by its median, and one by its 95th percentile
    monkeypatch.setattr(tune, "_default", lambda *_: None)
    bundle = make_bundle(tmp_path / "b", {"fp32": 0.0, "int8": 0.05})
    chosen = {
        budget: run_tune([bundle], astronaut, astronaut_box, TuneSettings(budget, threads=(1,))).tuned
        for budget in (5, 10)
    }
    assert {budget: tuned and tuned.file for budget, tuned in chosen.items()} == {
        5: "model.fp32.onnx",
        10: "model.int8.onnx",
    }


def test_five_of_a_hundred_calls_may_take_longer(
    tmp_path: Path, astronaut: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = [[0.002] * 19 + [0.009]] * 5
    monkeypatch.setattr(tune, "measure_in_turns", lambda cases, **_: dict.fromkeys(cases, turns))
    bundle = make_bundle(tmp_path / "b", {"fp32": 0.0})
    assert run_tune([bundle], astronaut, astronaut_box, TuneSettings(5, threads=(1,))).tuned is not None


def test_engines_are_warm_before_they_are_timed(
    tmp_path: Path, astronaut: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warmed: list[int] = []

    def measure(cases: dict[str, Any], **_: object) -> None:
        assert warmed == [3]
        raise KeyboardInterrupt

    monkeypatch.setattr(kp_runtime.Model, "warmup", lambda model, faces: warmed.append(faces))
    monkeypatch.setattr(tune, "measure_in_turns", measure)
    bundle = make_bundle(tmp_path / "b", {"fp32": 0.0})
    with pytest.raises(KeyboardInterrupt):
        run_tune([bundle], astronaut, astronaut_box, TuneSettings(faces=3, threads=(1,)))


def test_a_call_is_fed_as_the_next_larger_batch_that_was_tried() -> None:
    tried = {16: {"by 4": 1.0}, 4: {"whole": 1.0}}
    engine: Any = SimpleNamespace(batch_times=lambda: tried)
    assert [tune._ways(engine, faces) for faces in (1, 4, 5, 16, 17)] == [{}, tried[4], tried[16], tried[16], {}]


def test_nothing_fits(tmp_path: Path, tuned_by: Callable[..., Tuning]) -> None:
    bundle = make_bundle(tmp_path / "b", {"fp32": 0.0, "int8": 0.2})
    result = tuned_by([bundle], MS, budget_ms=1)
    assert result.chosen is None
    with pytest.raises(
        InputError,
        match=r"nothing that keeps the accuracy fits 1 ms for 1 face\(s\); the fastest is b/model.fp32.onnx "
        r"on ort-cpu, 1 thread: p50 8.00 ms, p95 8.00 ms; give it more time \(--budget\), or try a smaller ",
    ):
        check_chosen(result)
    old = tmp_path / "tuned.json"
    old.write_text("the old settings")
    assert write_tuning(result, old) == [tmp_path / "tuned.tried.json"]
    assert old.read_text() == "the old settings"
    assert json.loads((tmp_path / "tuned.tried.json").read_text())["chosen"] is None


def test_only_the_best_are_measured_again(
    tmp_path: Path, tuned_by: Callable[..., Tuning], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "FINALISTS", 1)
    bundle = make_bundle(tmp_path / "b", {"fp32": 0.0, "fp16": 0.0, "int8": 0.0})
    monkeypatch.setattr(tune, "_default", lambda *_: None)
    result = tuned_by([bundle], MS)
    assert {t.file: (t.times is None, t.verdict) for t in result.trials} == {
        "model.int8.onnx": (False, "chosen"),
        "model.fp16.onnx": (True, "slower at a first look"),
        "model.fp32.onnx": (True, "slower at a first look"),
    }


def test_a_smaller_model_is_tried_too(tmp_path: Path, tuned_by: Callable[..., Tuning]) -> None:
    first = make_bundle(tmp_path / "net", {"fp32": 0.0}, nme=0.0430)
    assert beside(first) is None
    lite = make_bundle(tmp_path / "net-lite", {"fp16": 0.01}, nme=0.0435, size=32)
    assert beside(first) == lite
    result = tuned_by([first, lite], MS)
    assert result.trials[0].rise.points == pytest.approx(0.06)
    assert result.tuned is not None
    assert Path(result.tuned.bundle) == lite
    model = kp_runtime.load(tuned=write_tuning(result, tmp_path / "t" / "tuned.json")[0])
    assert model.spec.size == 32
    assert json.loads((tmp_path / "t" / "tuned.json").read_text())["bundle"] == str(Path("..") / "net-lite")
    (tmp_path / "link.json").symlink_to(tmp_path / "t" / "tuned.json")
    assert kp_runtime.load(tuned=write_tuning(result, tmp_path / "link.json")[0]).spec.size == 32, "in the link's place"
    assert tuned_by([first, lite], MS, max_rise=0.05).tuned.file == "model.fp32.onnx"  # type: ignore[union-attr]


def test_another_kind_of_model_is_not_compared(tmp_path: Path, tuned_by: Callable[..., Tuning]) -> None:
    first, other = (make_bundle(tmp_path / name, {"fp32": 0.0}) for name in ("a", "b"))
    manifest = Manifest.read(other)
    dataclasses.replace(manifest, spec=dataclasses.replace(manifest.spec, box="frame")).write(other)
    with pytest.raises(InputError, match=r"b is no smaller model of the same kind as .*a: its points or boxes"):
        tuned_by([first, other], MS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"faces": 0}, "a call has 1 to 1000000 faces, got 0"),
        ({"faces": 10**18}, "a call has 1 to 1000000 faces, got 1000000000000000000"),
        ({"samples": 0}, "samples from 1 on"),
        ({"seconds": float("nan")}, "seconds from 0 on"),
        ({"max_rise": float("nan")}, "number of percentage points, got nan"),
        ({"budget_ms": 0.0}, "a budget is over 0 ms"),
        ({"backends": ("cuda",)}, "there is no backend 'cuda'; choose from tensorrt"),
        ({"precisions": ("int4",)}, "there is no precision 'int4'; choose from fp32"),
        ({"threads": (0,)}, "threads must be 1 to"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str, bundle: Path, astronaut: Path) -> None:
    with pytest.raises(InputError, match=message):
        run_tune([bundle], astronaut, astronaut_box, TuneSettings(**settings))


def test_a_precision_that_no_bundle_has(bundle: Path, astronaut: Path) -> None:
    with pytest.raises(InputError, match=r"no bundle has a model file of precision int8, only fp32; kp export can add"):
        run_tune([bundle], astronaut, lambda image: np.empty((0, 4)), TuneSettings(precisions=("int8",)))


def test_a_photo_without_a_face(bundle: Path, astronaut: Path) -> None:
    with pytest.raises(ImageError, match=r"no face was found on .*astronaut\.png; tune on a photo with one: --photo"):
        run_tune([bundle], astronaut, lambda image: np.empty((0, 4)), TuneSettings(threads=(1,)))


def test_the_smaller_model_is_found_from_within_and_behind_a_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "store").mkdir()
    for name in ("net", "net-lite"):
        make_bundle(tmp_path / name, {"int8": 0.0})
    link = tmp_path / "store" / "link"
    link.symlink_to(tmp_path / "net")
    monkeypatch.chdir(tmp_path / "net")
    for given in (Path(), Path("../net"), link, tmp_path / "net"):
        found = beside(given)
        assert found is not None
        assert (found / "manifest.json").exists(), given
    assert beside(Path("../net")) == Path("../net-lite")
    assert beside(tmp_path / "net-lite") is None
