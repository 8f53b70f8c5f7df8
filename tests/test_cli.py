"""The `kp` command as a person types it: what it prints, what it writes, how it fails."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main

import kp_cli
import kp_runtime
from kp_cli import report
from kp_export.parity import LIMITS
from kp_runtime.doctor import Diagnosis
from kp_runtime.manifest import Manifest
from kp_runtime.ray_batches import BatchResult
from kp_runtime.video import VideoRun
from tests.test_export import small_checkpoint

COMMANDS = tuple(typer.main.get_command(kp_cli.app).commands)  # type: ignore[attr-defined]


def status_of(*words: object) -> int:
    """Runs `kp WORDS`; its exit status."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", ["kp", *map(str, words)])
        try:
            kp_cli.main()
        except SystemExit as stop:
            return int(stop.code or 0)
    return 0


def kp(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """Runs `kp WORDS`; exit status, standard output, standard error."""
    status, captured = status_of(*words), capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.parametrize("command", [(), *((c,) for c in COMMANDS)])
def test_help_names_every_option(
    command: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    status, out, _ = kp(capsys, *command, "--help")
    assert status == 0
    assert kp(capsys, *command, "-h")[:2] == (0, out)
    assert "Usage" in out
    if not command:
        assert all(name in out for name in COMMANDS)
        return
    said = typer.main.get_command(kp_cli.app).commands[command[0]].help  # type: ignore[attr-defined]
    examples = {line.strip() for line in said.splitlines() if "Example:" in line}
    assert examples
    assert examples <= {line.strip() for line in out.splitlines()}  # whole lines, to be pasted


def test_help_lists_what_runs_without_the_tools_first() -> None:
    commands = typer.main.get_command(kp_cli.app).commands  # type: ignore[attr-defined]
    imports = re.compile(r"^ {4}from kp_(train|export)", re.MULTILINE)
    need_tools = [bool(imports.search(inspect.getsource(commands[name].callback))) for name in COMMANDS]
    first = COMMANDS.index("train")
    assert need_tools == [False] * first + [True] * (len(COMMANDS) - first)


@pytest.mark.parametrize(("revision", "told"), [("c0ffee", ", revision c0ffee"), (None, "")])
def test_the_version_is_said_and_of_a_checkout_the_revision(
    revision: str | None, told: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kp_runtime.files.git_revision", lambda: revision)
    assert kp(capsys, "--version") == (0, f"kp {kp_runtime.__version__}{told}\n", "")


def test_what_help_says_of_the_commands_is_not_cut(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = kp(capsys, "--help")[1].partition("Commands:\n")[2].splitlines()
    assert len(lines) >= len(COMMANDS)
    assert [line for line in lines if line.endswith(("...", "…"))] == []


def test_ctrl_c_while_imports_run_is_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("raise KeyboardInterrupt\n")
    done = subprocess.run([sys.executable, "-m", "kp_cli"], cwd=tmp_path, capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")


def test_wrong_usage_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert kp(capsys, "predict", "--nonsense")[0] == 2
    assert kp(capsys, "eval", "x")[0] == 2


def test_no_cell_of_a_table_is_cut_on_a_narrow_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes the output for a terminal
    report.print_table("\x1btitle", ("file", "p99"), [("a" * 300, "0.123456789")])
    assert "a" * 300 in (out := capsys.readouterr().out)
    assert out.splitlines()[0] == r"\x1btitle"  # without spaces up to the table's end
    assert "0.123456789" in out


def test_a_file_beside_no_manifest_is_named(
    capsys: pytest.CaptureFixture[str], astronaut: Path, tmp_path: Path
) -> None:
    (tmp_path / "model.onnx").touch()
    status, _, err = kp(capsys, "predict", astronaut, "--model", tmp_path / "model.onnx")
    assert status == 1
    assert f"{tmp_path / 'model.onnx'} lies in no bundle: there is no manifest.json beside it" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("predict", "nowhere.jpg"), "there is no photo or folder at nowhere.jpg"),
        (("predict", "{photo}", "--box", "1,2,3"), "a box is X0,Y0,X1,Y1"),
        (("predict", "{photo}", "--box", "nan,2,3,4"), "is not finite"),
        (("predict", "{photo}", "--box", "9,9,5,5"), "under one pixel"),
        (("predict", "{photo}", "--box", "900,900,950,950"), "outside the 512 x 512 image"),
        (("predict", "{photo}", "--format", "xml"), "there is no format 'xml'"),
        (("predict", "{photo}", "--detector", "yunet=none.onnx"), "there is no YuNet model at none.onnx"),
        (("predict", "{photo}", "--detector", "own=nowhere"), "nowhere is not a bundle"),
        (("predict", "{photo}", "--detector", "own="), "there is no detector 'own='; choose from auto"),
        (("predict", "{photo}", "--model", "nowhere"), "is not a bundle"),
        (("predict", "{photo}", "--model", "{bundle}", "--looks", "0"), "kp: looks must be 1 or more; got 0\n"),
        (
            ("filter", "{photo}", "--effect", "hat", "--model", "{bundle}", "--looks", "0"),
            "kp: looks must be 1 or more",
        ),
        (("predict", "{photo}", "--drawn", "{photo}"), "the drawn picture would replace the photo"),
        (("predict", "{photo}", "--box", "1,1,9,9", "--detector", "haar"), "--box is instead of detecting"),
        (("predict", "{photo}", "--times", "--json"), "--times prints a table: leave out --json"),
        (("pack", "{bundle}", "--out", "", "--precision", "fp32"), "kp: an argument is empty: --out ''; a shell var"),
        (("pack", "{bundle}", "--precision", "fp32", "--out="), "kp: an argument is empty: fp32 --out=; a shell var"),
        (("run", ""), "is empty: run ''; a shell variable may not be set: name a value, or leave it out"),
        (("run", "x" * 300 + " ! appsink", "--model", "{bundle}"), "GStreamer"),
        (("run", "{photo}", "--model", "{bundle}", "--threads", "0"), "threads must be 1 to"),
        (("run", "{photo}", "--detector", "yunet=x.onnx", "--smallest", "0.2"), "leave out --smallest"),
        (
            ("filter", "{photo}", "--effect", "hat", "--detector", "yunet=x.onnx", "--smallest", "0.2"),
            "leave out --small",
        ),
        (("run", "/dev/video1000", "--model", "{bundle}"), "there is no camera 1000"),
        (("convert", "nowhere.pts", "{out}"), "nowhere.pts can't be read: No such file"),
        (("convert", "nowhere", "{out}", "--from", "pts"), "nowhere can't be read: No such file"),
        (("export", "{bundle}/typo", "--triton", "{out}"), "/typo is not a bundle"),
        (("export", "{bundle}/golden.npz", "--triton", "{out}"), "golden.npz is not a bundle: it has no manifest.json"),
        (("train", "--data", "x", "--out", "{out}", "--pairs", "1-2"), "pairs must be left out with 68 points: they"),
        (("train", "--data", "x", "--out", "{out}", "--points", "68", "--pairs", "1-2"), "must be left out with 68"),
        (("bench", "{bundle}/model.fp32.onnx"), "give its folder, not"),
        (("bench", "nowhere"), "nowhere is not a bundle: there is nothing at "),
        (("eval", "{bundle}", "--data", "x", "--detector", "own=d"), "--detector goes with --boxes detector"),
        (("bench", "{bundle}", "--out", "{bundle}"), "is a folder; name a file in it"),
        (("bench", "{bundle}", "--html", "/"), "/ is a folder; name a file in it"),
        (("bench", "{bundle}", "--out", "{out}", "--html", "{out}"), "--html would replace the results in"),
        (("bench", "{bundle}", "--compare", "{out}", "--html", "{out}"), "--html would replace the results in"),
        (("predict", "{photo}", "--model", "{bundle}", "--out", "{photo}"), "can't write into"),
        (("predict", "{photo}", "--drawn", "{bundle}"), "is a folder; name a file in it"),
        (("filter", "{photo}", "--effect", "hat", "--model", "{bundle}", "--out", "{photo}"), "can't write into"),
        (("convert", "x.csv", "{out}.parquet", "--images", "x"), "--images is for COCO"),
        (("predict", "a\x1b]0;x\x07.jpg"), r"at a\x1b]0;x\x07.jpg"),
        (("bench", "{bundle}", "--batch", "0"), "batch sizes must be 1 to 1000000, got 0"),
        (("bench", "{bundle}", "--threads", "9999"), "threads must be 1 to"),
        (("bench", "{bundle}", "--precision", "int8"), "no ONNX file or TensorRT plan of precision int8, only fp32"),
        (("bench", "{bundle}", "--with", "x"), "go with --compare OLD"),
        (("bench", "{bundle}", "--compare-anyway"), "go with --compare OLD"),
        (("bench", "{bundle}", "--compare", "x", "--with", "y"), "--with measures nothing"),
        (("bench", "--compare", "x", "--with", "y", "--batch", "1"), "--with measures nothing"),
        (("bench", "--compare", "x", "--with", "y", "--samples", "7"), "--with measures nothing"),
        (("bench", "{bundle}", "--compare", "nowhere.json"), "nowhere.json can't be read"),
        (("bench", "{bundle}", "--compare", "{bundle}/manifest.json"), "is no results file of kp bench"),
        (("inspect", "nowhere"), "is not a bundle"),
        (("export", "nowhere"), "nowhere is not a bundle: there is nothing at"),
        (("eval", "nowhere", "--data", "x"), "nowhere is not a bundle: there is nothing at"),
        (("eval", "{bundle}/model.fp32.onnx", "--data", "x"), "neither a CSV"),
        (("export", "{bundle}", "--engine", "required"), "no plan can be built here: TensorRT is not installed here"),
        (("export", "{bundle}", "--calibration", "{out}"), "--calibration finds the ranges of int8: add --int8"),
        (("export", "{bundle}", "--int8", "--calibration", "{out}"), "neither a CSV of 68 points nor a folder"),
        (("plan", "{bundle}", "--max-batch", "0"), "batch sizes must be 1 <= min <= opt <= max"),
        (("plan", "{bundle}"), "has no model.fp16.onnx"),
        (("verify", "{bundle}"), "has no file checkpoint.safetensors: take the one that it was packed from, or pack"),
        (("train", "--data", "x", "--out", "{out}"), "neither a CSV"),
        (("train", "--data", "x", "--out", "{out}", "--epochs", "0"), "epochs must be"),
    ],
)
def test_a_fault_is_one_line_and_exit_1(
    capsys: pytest.CaptureFixture[str],
    bundle: Path,
    astronaut: Path,
    tmp_path: Path,
    words: tuple[str, ...],
    message: str,
) -> None:
    filled = [word.format(photo=astronaut, bundle=bundle, out=tmp_path / "o") for word in words]
    if words[0] == "predict" and "--model" not in words:
        filled += ["--model", str(bundle), "--out", str(tmp_path)]
    status, _, err = kp(capsys, *filled)
    assert status == 1
    assert err.startswith("kp: ")
    assert err.count("\n") == 1
    assert message in err


def test_the_docs_name_the_keys_of_json(
    capsys: pytest.CaptureFixture[str], bundle: Path, astronaut: Path, tmp_path: Path
) -> None:
    page = (Path(__file__).resolve().parents[1] / "docs" / "quickstart.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `kp ([^`]+)` \| (.*) \|$", page, re.MULTILINE))
    told = {command: set(re.findall("`(.*?)`", keys)) for command, keys in rows.items()}

    (tmp_path / "torn.png").write_bytes(b"torn")
    for words in (("predict",), ("filter", "--effect", "hat")):
        photos = (astronaut, tmp_path / "torn.png", "--model", bundle, "--out", tmp_path / "out")
        photo, torn = json.loads(kp(capsys, *words, *photos, "--json")[1])
        assert photo.keys() | torn.keys() == told[words[0]]
    faces = tmp_path / "faces.csv"
    words = ("predict", astronaut, "--model", bundle, "--out", tmp_path, "--format", "csv")
    assert kp(capsys, *words)[0] == 0
    (tmp_path / "keypoints.csv").rename(faces)
    words = ("convert", faces, tmp_path / "b.txt", "--to", "csv", "--json")
    assert json.loads(kp(capsys, *words)[1]).keys() == told["convert"]
    assert {field.name for field in dataclasses.fields(VideoRun)} == told["run"]
    assert {field.name for field in dataclasses.fields(BatchResult)} == told["predict --ray"]


def test_pts_files_without_photos_are_said(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from kp_train.synthetic import write_csv_source

    data = write_csv_source(tmp_path, people=2)
    assert kp(capsys, "convert", data, tmp_path / "alone")[::2] == (0, "")
    status, _, err = kp(capsys, "convert", tmp_path / "alone", tmp_path / "b.csv")
    assert status == 0
    assert err == "no photo lies beside 4 of the .pts files, so the names of their images have no suffix\n"
    status, _, err = kp(capsys, "convert", data, tmp_path / "alone")
    assert status == 1
    assert "person0_0.pts is there already" in err


@pytest.mark.parametrize(
    ("said", "told"), [("Unable to allocate 14.9 GiB", "Unable to allocate 14.9 GiB"), ("", "take less at once")]
)
def test_too_little_memory_is_one_line(capsys: pytest.CaptureFixture[str], said: str, told: str) -> None:
    with pytest.raises(SystemExit, match="1"), report.one_line_errors("kp"):
        raise MemoryError(said)  # NumPy says how much, Python nothing
    assert capsys.readouterr().err == f"kp: there is too little memory: {told}\n"


def test_a_link_that_leads_to_itself_is_one_line(
    capsys: pytest.CaptureFixture[str], bundle: Path, tmp_path: Path
) -> None:
    link = tmp_path / "link"
    link.symlink_to(link)
    for source, out_folder in ((link, tmp_path / "o"), (bundle, link)):
        status, out, err = kp(capsys, "pack", source, "--precision", "fp32", "--out", out_folder)
        assert (status, out, err.count("\n")) == (1, "", 1), err
        assert err.startswith("kp: ")
        assert str(link) in err


def test_a_folder_that_can_not_be_written_is_said(
    capsys: pytest.CaptureFixture[str], bundle: Path, astronaut: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    status, _, err = kp(capsys, "predict", astronaut, "--model", bundle, "--out", tmp_path / "file" / "out")
    assert status == 1
    assert "can't write" in err


@pytest.mark.parametrize("words", [("predict",), ("filter", "--effect", "hat")], ids=" ".join)
def test_a_folder_that_may_not_be_written_is_said_before_the_first_photo(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, bundle: Path,
    astronaut: Path, tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.setattr(os, "access", lambda _, mode: not mode & os.W_OK)  # root may write everywhere
    told = f"kp: can't write into {tmp_path}: it may not be written; name another folder with --out\n"
    assert kp(capsys, *words, astronaut, "--model", bundle, "--out", tmp_path) == (1, "", told)


def test_inspect_tells_a_changed_file(capsys: pytest.CaptureFixture[str], bundle: Path, tmp_path: Path) -> None:
    status, out, _ = kp(capsys, "inspect", bundle)
    assert status == 0
    assert "model.fp32.onnx" in out
    copied = Path(shutil.copytree(bundle, tmp_path / "copy"))
    dataclasses.replace(Manifest.read(copied), licence={"weights": "for research"}).write(copied)
    assert "licence of the weights: for research\n" in kp(capsys, "inspect", copied)[1]
    model = copied / "model.fp32.onnx"
    model.write_bytes(model.read_bytes()[:-1] + b"x")
    status, out, err = kp(capsys, "inspect", copied)
    assert status == 1
    assert "BAD" in out
    assert "sha256" in err
    status, out, _ = kp(capsys, "inspect", copied, "--json")
    assert status == 1
    assert json.loads(out)["files"]["golden.npz"] == "ok"


@pytest.mark.parametrize("nme", [10**400, float("nan")], ids=["huge", "NaN"])
@pytest.mark.parametrize("words", [(), ("--json",)], ids=["text", "json"])
def test_inspect_of_a_number_that_is_none_is_one_line(
    nme: float, words: tuple[str, ...], capsys: pytest.CaptureFixture[str], bundle: Path, tmp_path: Path
) -> None:
    copied = Path(shutil.copytree(bundle, tmp_path / "copy"))
    dataclasses.replace(Manifest.read(copied), accuracy={"x": {"nme": nme, "faces": 1}}).write(copied)
    status, out, err = kp(capsys, "inspect", copied, *words)
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert "can't be read as JSON" in err


def test_doctor_says_what_works(capsys: pytest.CaptureFixture[str], bundle: Path, tmp_path: Path) -> None:
    status, out, _ = kp(capsys, "doctor", bundle)
    lines = out.splitlines()
    assert any(line.startswith("ok ") and "golden keypoints 0.000 px from PyTorch's" in line for line in lines)
    assert "ort-cpu" in lines[-1]
    healthy = not any(line.startswith("problem ") for line in lines)
    assert (status, lines[-1].endswith("see the problems")) == ((0, False) if healthy else (1, True))
    status, out, _ = kp(capsys, "doctor", tmp_path, "--json")
    told = json.loads(out)
    assert (status, told["working"], told["healthy"]) == (1, [], False)
    (bundle_line,) = [finding for finding in told["findings"] if finding["subject"] == "bundle"]
    assert bundle_line["status"] == "problem"
    assert "is not a bundle" in bundle_line["found"]
    assert bundle_line["advice"]


def test_doctor_gives_a_backend_its_time(
    capsys: pytest.CaptureFixture[str], bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[object] = []

    def diagnosed(*_: object, backend_seconds: float, **__: object) -> Diagnosis:
        given.append(backend_seconds)
        return Diagnosis((), ("ort-cpu",))

    monkeypatch.setattr("kp_runtime.doctor.diagnose", diagnosed)
    assert kp(capsys, "doctor", bundle, "--timeout", 7, "--json")[0] == 0
    assert given == [7]


def test_export_and_verify_as_typed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_checkpoint(tmp_path / "run")
    status, out, err = kp(capsys, "export", tmp_path / "run", "--out", tmp_path / "b")
    assert status == 0
    assert out.splitlines()[-1] == f"bundle: {tmp_path / 'b'}"
    assert "model.fp32.onnx" in out
    assert "these faces have no labels" in out
    assert err.splitlines()[-1].startswith("no TensorRT plan was built: TensorRT is not installed here")
    status, out, _ = kp(capsys, "verify", tmp_path / "b", "--out", tmp_path / "page")
    assert status == 0
    assert "model.fp32.onnx: passed" in out
    assert (tmp_path / "page" / "verify.html").is_file()
    monkeypatch.setitem(LIMITS, "fp32", dataclasses.replace(LIMITS["fp32"], max_px=-1.0))
    status, out, err = kp(capsys, "verify", tmp_path / "b")
    assert status == 1
    assert "\nmodel.fp32.onnx: failed\n" in out
    assert err.count("model.fp32.onnx is too far from PyTorch: worst point") == 1
    assert err.endswith("; what to do: docs/parity.md\n")
    status, out, _ = kp(capsys, "inspect", tmp_path / "b")
    assert "21 fp32" in out


@pytest.mark.parametrize("recipe", ["default", "seed"])
def test_a_run_ends_with_the_commands_that_come_next(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    from kp_train.synthetic import write_csv_source

    asked = []

    def run(sources: list[Any], config: Any, out: Path, **rest: object) -> Path:
        asked.append((config.keep, config.augment, config.val_fraction, [source.whole for source in sources]))
        return out / "checkpoint.safetensors"

    monkeypatch.setattr("kp_train.train.train", run)
    data, out = write_csv_source(tmp_path / "my faces", people=2), tmp_path / "my run"
    words = ("train", "--recipe", recipe, "--data", f"{data}=1.5", "--out", out, "--keep", "last", "--augment", "bent")
    status, printed, _ = kp(capsys, *words, "--val-fraction", "0.2", "--whole", data)
    assert status == 0
    assert asked == [("last", "bent", 0.2, [True])]
    status, _, err = kp(capsys, *words, "--whole", f"{data}=1.5")
    assert (status, len(asked)) == (1, 1)
    assert f"--whole {data}=1.5 is none of the --data; name one of these, without a weight" in err
    commands = [shlex.split(line, comments=True)[1:] for line in printed.splitlines()[2:]]
    if recipe == "seed":
        assert commands == [["kp", "export", str(out), "--fp16"]]
    else:
        refit = ["kp", "refit", str(out), "--data", f"{data}=1.5", "--out", f"{out}-refitted"]
        assert commands == [refit, ["kp", "export", f"{out}-refitted", "--fp16"]]


def test_a_shell_in_a_replaced_bundle_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, bundle: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "a b"))
    monkeypatch.chdir(copy)
    status, _, err = kp(capsys, "pack", ".", "--precision", "fp32", "--out", ".")
    assert status == 0
    assert err == f"this shell stands in the folder that was replaced; go to the new one: cd '{copy}'\n"


def test_a_shell_in_a_removed_folder_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    told = "kp: the folder that this shell stands in was removed; go to another one with cd\n"
    assert kp(capsys, "pack", bundle, "--precision", "fp32", "--out", "a") == (1, "", told)
    assert kp(capsys, "pack", bundle, "--precision", "fp32", "--out", tmp_path / "b")[::2] == (0, "")
