"""Many photos on Ray: each one once, whatever is killed. What starts Ray is skipped where it is not installed."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest

from kp_runtime import BackendError, DataError, InputError, load, ray_batches
from kp_runtime.interchange import faces_from_file
from kp_runtime.photos import photos_from_paths, predict_photo, write_results
from kp_runtime.ray_batches import Tools, _told, predict_batches

pytest.importorskip("pyarrow", reason="pyarrow is not installed")
pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None, reason="ray is not installed: pip install 'kp-edge[ray]'"
    ),
    pytest.mark.filterwarnings("ignore"),
]
PHOTOS = 40


class Boxes:
    """A detector: two boxes in each photo, none in a dark one."""

    def __call__(self, image: np.ndarray, layout: str = "bgr") -> np.ndarray:
        boxes = np.array([[20.0, 30.0, 80.0, 100.0], [40.5, 20.25, 90.0, 90.0]])
        return boxes if image.mean() > 10 else boxes[:0]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Photos of noise, one dark and one that is none."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(1)
    for i in range(PHOTOS - 1):
        cv2.imwrite(str(folder / f"{i:03d}.png"), rng.integers(0, 255 if i else 5, (120, 110, 3), np.uint8))
    (folder / "bad.jpg").write_text("no photo")
    return photos_from_paths([folder])


def faces_of(path: Path) -> dict[str, list[tuple[bytes, bytes]]]:
    found: dict[str, list[tuple[bytes, bytes]]] = {}
    for face in faces_from_file(path):
        assert face.box_xyxy is not None
        found.setdefault(face.image, []).append((face.xy.tobytes(), face.box_xyxy.tobytes()))
    return found


@pytest.mark.slow
def test_a_killed_actor_loses_nothing(photos: list[Path], bundle: Path, tmp_path: Path) -> None:
    """Each photo is in the result once, with the faces that `predict_photo` finds; then nothing is left to do."""
    import pyarrow.parquet as pq

    tools = Tools(partial(load, bundle, "ort-cpu", 1), Boxes)
    killed: list[int] = []
    beyond: list[set[str]] = []
    lock = threading.Lock()

    def kill_once(done: int, count: int) -> None:
        with lock:
            if not killed and done < count:
                beyond.append(_addresses() - LOOPBACK)
                actors = _processes("ray::MapWorker(MapBatches(_Predictor))")
                for pid in actors[:1]:
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)

    result = predict_batches(photos, tmp_path, tools, {"model": "a"}, step=kill_once)
    assert killed, "no actor was there to be killed"
    assert beyond == [set()], "Ray listens to other machines"
    assert (result.photos, result.done, result.before, result.stopped) == (PHOTOS, PHOTOS, 0, False)
    assert [text for text in result.failed if "bad.jpg is no image" in text] == list(result.failed)
    assert len(result.failed) == 1
    rows = Counter(pq.read_table(tmp_path / "photos", columns=["image"])["image"].to_pylist())
    assert rows == Counter(map(str, photos))

    model = load(bundle, "ort-cpu", 1)
    alone = [predict_photo(model, path, detector=Boxes()) for path in photos if path.suffix == ".png"]
    write_results(alone, tmp_path / "alone", "parquet")
    assert faces_of(result.path) == faces_of(tmp_path / "alone" / "keypoints.parquet")
    assert result.faces == 2 * (PHOTOS - 2)

    again = predict_batches(photos, tmp_path, tools, {"model": "a"}, step=kill_once)
    assert (again.done, again.before, again.faces) == (PHOTOS, PHOTOS, result.faces)
    with pytest.raises(InputError, match=r"holds results of other settings \(model a -> b\)"):
        predict_batches(photos, tmp_path, tools, {"model": "b"}, step=kill_once)


@pytest.mark.slow
def test_actors_that_want_a_gpu(photos: list[Path], bundle: Path, tmp_path: Path) -> None:
    """Ray only counts GPUs, so one that is made up will do; the model stays on the CPU."""
    ray = ray_batches._ray("local")
    ray.init(address="local", num_cpus=3, num_gpus=1, include_dashboard=False, log_to_driver=False)
    try:
        tools = Tools(partial(load, bundle, "ort-cpu", 1), Boxes, gpus=1)
        result = predict_batches(photos, tmp_path, tools, {}, step=lambda done, count: None)
    finally:
        ray.shutdown()
    assert (result.photos, result.done, result.faces) == (PHOTOS, PHOTOS, 2 * (PHOTOS - 2))


LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
"""127.0.0.1, the same in IPv6, and ::1, as Linux's /proc/net writes them."""


def _addresses() -> set[str]:
    """Where this user's processes of Ray listen."""
    package = Path(importlib.import_module("ray").__file__ or "").parent
    sockets = set()
    for pid in _processes("ray::") + _processes("", f"{package}/"):
        for file in Path(f"/proc/{pid}/fd").glob("*"):
            with contextlib.suppress(OSError):
                sockets.add(str(file.readlink()))
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and f"socket:[{words[9]}]" in sockets:
                found.add(words[1].partition(":")[0])
    assert found, "Ray listens nowhere: the test looks at the wrong processes"
    return found


def _processes(name: str, part: str = "") -> list[int]:
    """The processes whose command begins so and holds a part, by Linux's /proc: Ray names workers by what they do."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if line.startswith(name) and part in line:
            found.append(int(folder.name))
    return found


def test_a_name_that_is_no_text_is_refused_before_ray_starts(tmp_path: Path) -> None:
    tools = Tools(partial(load, tmp_path, "ort-cpu", 1), Boxes)
    with pytest.raises(InputError, match=r"udcff\.jpg is no text in UTF-8, which Ray's tables need; rename the photo"):
        predict_batches([Path(os.fsdecode(b"\xff.jpg"))], tmp_path, tools, {}, step=lambda done, count: None)


def test_other_photos_of_the_folder_are_no_progress(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    marks = tmp_path / "state" / "done"
    marks.mkdir(parents=True)
    pq.write_table(pa.table({"image": ["a", "b"]}), marks / "1.parquet")
    told: list[tuple[int, int]] = []
    with _told(tmp_path, {"b", "c"}, lambda done, count: told.append((done, count))):
        for _ in range(100):
            if told:
                break
            time.sleep(0.05)
    assert told == [(1, 2)]


@pytest.mark.slow
def test_ctrl_c_leaves_a_readable_file_and_the_command_goes_on(
    photos: list[Path], bundle: Path, tmp_path: Path
) -> None:
    import pyarrow.parquet as pq

    command = [
        sys.executable, "-m", "kp_cli", "predict", "--ray", "local", str(photos[0].parent), "--out", str(tmp_path),
        "--model", str(bundle), "--json",
    ]  # fmt: skip
    first = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert first.stderr is not None
    for line in first.stderr:
        if line.endswith("photos\n"):
            os.killpg(first.pid, signal.SIGINT)  # as a terminal does
            break
    printed, complaint = first.communicate(timeout=300)
    assert "Traceback" not in complaint
    before = json.loads(printed)
    if before["done"] < PHOTOS:  # on a busy machine the line is read when all is done
        assert first.returncode == 130, complaint
    assert pq.read_table(tmp_path / "keypoints.parquet").num_rows == before["faces"]
    assert pq.read_table(tmp_path / "photos").num_rows == before["done"]

    second = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    after = json.loads(second.stdout)
    assert second.returncode == 1
    assert "1 of 40 photos failed" in second.stderr
    assert (after["photos"], after["done"]) == (PHOTOS, PHOTOS)
    assert after["before"] > 0


def test_no_cluster_is_one_line(photos: list[Path], bundle: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    tools = Tools(partial(load, bundle, "ort-cpu", 1), Boxes)
    for wrong in (address, "nowhere"):
        with pytest.raises(BackendError, match=f"no Ray cluster answers at {wrong} .*ray start --head"):
            predict_batches(photos, tmp_path, tools, {}, address=wrong, step=lambda done, count: None)


@pytest.mark.slow
def test_a_cluster_and_its_token(photos: list[Path], bundle: Path, tmp_path: Path) -> None:
    """`ray start` asks for the token of its user's home; who has another one is told in one line."""
    homes = {name: tmp_path / name for name in ("same", "other", "none")}
    for name, home in homes.items():
        (home / ".ray").mkdir(parents=True)
        if name != "none":
            (home / ".ray" / "auth_token").write_text(name * 16)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [
        sys.executable, "-m", "kp_cli", "predict", "--ray", address, str(photos[1]), "--model", str(bundle), "--out",
    ]  # fmt: skip
    short = tempfile.mkdtemp(prefix="kp")  # a socket's path has room for 107 bytes
    head = subprocess.Popen(
        [
            sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--node-ip-address=127.0.0.1",
            f"--port={address.partition(':')[2]}", "--num-cpus=4", "--include-dashboard=false", "--disable-usage-stats",
            f"--temp-dir={short}",
        ],
        env=os.environ | {"HOME": str(homes["same"])}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip
    try:
        for _ in range(600):
            assert head.poll() is None, head.communicate()[0]
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", int(address[10:])), 1):
                break
            time.sleep(0.2)
        for name, extra in (("same", {}), ("other", {}), ("none", {"RAY_AUTH_MODE": "token"})):
            asked = subprocess.run(
                [*command, str(tmp_path / "out")], env=os.environ | {"HOME": str(homes[name])} | extra,
                capture_output=True, text=True, timeout=300, check=False,
            )  # fmt: skip
            if name == "same":
                assert asked.stderr in ("", "1 of 1 photos\n")  # the last look may come too late
                assert (asked.returncode, "1 of 1 photos" in asked.stdout) == (0, True)
                shutil.rmtree(tmp_path / "out")
            else:
                assert asked.returncode == 1
                assert re.fullmatch(
                    rf"kp: no Ray cluster answers at {address} .* copy its ~/.ray/auth_token to this machine .*\n",
                    asked.stderr,
                ), asked.stderr
    finally:
        head.terminate()
        head.communicate(timeout=60)
        shutil.rmtree(short)


def test_a_photo_twice(photos: list[Path], bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="named twice"):
        predict_batches(photos[:1] * 2, tmp_path, Tools(lambda: load(bundle), Boxes), {}, step=lambda done, count: None)


def never(done: int, count: int) -> None:
    raise AssertionError("nothing was to be done")


def test_a_photo_of_the_same_name_elsewhere_is_another(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is done is remembered by whole paths: without Ray, from marks like its own."""
    out, listed = tmp_path / "out", []
    tools = Tools(partial(load, bundle, "ort-cpu", 1), Boxes)
    monkeypatch.setattr(ray_batches, "_write_list", lambda names, out: listed.extend(names))
    monkeypatch.setattr(ray_batches, "_cluster", lambda ray, address: contextlib.nullcontext())
    monkeypatch.setattr(ray_batches, "_run", lambda *args: mark(out, listed))
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        result = predict_batches([Path("x.jpg")], out, tools, {}, step=lambda done, count: None)
        assert (result.done, result.before) == (1, 0)
    assert listed == [str(tmp_path / "a" / "x.jpg"), str(tmp_path / "b" / "x.jpg")]
    assert predict_batches([Path("x.jpg")], out, tools, {}, step=never).before == 1


def mark(out: Path, names: list[str]) -> None:
    """Results and marks of photos without a face, as a run leaves them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for folder in (out / "photos", out / "state" / "done"):
        folder.mkdir(parents=True, exist_ok=True)
        rows = [{"image": name, "error": None, "boxes": [], "keypoints": []} for name in names[-1:]]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{len(names)}.parquet")


@pytest.mark.parametrize(("name", "text"), [("settings.json", "[]"), ("done/a.parquet", "")])
def test_a_damaged_state(name: str, text: str, bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "state" / "done").mkdir(parents=True)
    (tmp_path / "state" / name).write_text(text)
    with pytest.raises(DataError, match=f"{Path(name).name} can't be read .*; begin anew with another --out"):
        predict_batches([Path("x.jpg")], tmp_path, Tools(lambda: load(bundle), Boxes), {}, step=never)


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("state/done", r"1\.parquet can't be read .*; begin anew"),
        ("photos", "no file in .*photos that can be read holds"),
    ],
)
def test_a_file_with_damage_inside(folder: str, message: str, bundle: Path, tmp_path: Path) -> None:
    """As a power cut may leave one: begin and end are there, so pyarrow fails where it reads the rows."""
    mark(tmp_path, [str(Path("x.jpg").absolute())])
    path = tmp_path / folder / "1.parquet"
    data = path.read_bytes()
    path.write_bytes(data[:4] + bytes(60) + data[64:])
    with pytest.raises(DataError, match=message):
        predict_batches([Path("x.jpg")], tmp_path, Tools(lambda: load(bundle), Boxes), {}, step=never)
