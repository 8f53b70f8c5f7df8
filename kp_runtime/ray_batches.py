"""Many photos on Ray Data: a pool of actors with a model each, on one machine or a cluster, resumable.

A folder of results holds

    keypoints.parquet   a row a face, as `kp predict --format parquet` writes it; made when a run ends
    photos/             a row a photo, also of one without a face or with an error; grows while it runs
    state/              the list of photos, the settings, and Ray's checkpoint: which photos are done

Ray writes a part of `photos/` and then marks its photos as done; a part whose photos are not marked is
deleted when the run goes on. So each photo is in there once, whatever was killed.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kp_runtime.cores import default_threads
from kp_runtime.detect import Detector
from kp_runtime.errors import BackendError, DataError, InputError, KpError, MissingExtraError, reason_of
from kp_runtime.face_table import import_pyarrow, parquet_table
from kp_runtime.files import write_file, writing
from kp_runtime.frame import import_cv2
from kp_runtime.labelled_face import LabelledFace, as_text
from kp_runtime.photos import predict_photo
from kp_runtime.pipeline import Model

__all__ = ["BatchResult", "Tools", "predict_batches"]

Step = Callable[[int, int], None]

_RAYS_OWN = 2
"""Cores that are left to Ray, for leaving out what is done and for reading and writing; with none it waits for ever."""


@dataclass(frozen=True)
class Tools:
    """What an actor opens and needs. Ray sends it to the actors, so the functions must be importable there.

    Attributes:
        model: opens the model.
        detector: opens the face detector.
        cpus: cores that an actor is given.
        gpus: GPUs that an actor is given.
        looks: see `Model.__call__`.
        mirror: likewise.
    """

    model: Callable[[], Model]
    detector: Callable[[], Detector]
    cpus: int = 1
    gpus: int = 0
    looks: int = 1
    mirror: bool = False


@dataclass(frozen=True)
class BatchResult:
    """What a folder of results holds after a run.

    Attributes:
        photos: how many were asked for.
        done: how many of them are done, with those that failed.
        before: how many were done when the run began.
        faces: rows of `keypoints.parquet`.
        failed: what is wrong with each photo that can't be used.
        path: `keypoints.parquet`.
        stopped: whether Ctrl-C ended the run.
    """

    photos: int
    done: int
    before: int
    faces: int
    failed: tuple[str, ...]
    path: Path
    stopped: bool


def predict_batches(
    photos: Sequence[Path], out: Path, tools: Tools, settings: dict[str, Any], *, address: str = "local", step: Step
) -> BatchResult:
    """Finds the keypoints of all faces on photos, or goes on with it.

    Args:
        photos: the photos; every machine of a cluster must see them, and `out`, under the same paths. In the
            results they have their whole paths.
        out: the folder of the results.
        tools: what each actor opens.
        settings: what decides the results, as plain data; a run goes on only with the same ones.
        address: `local` starts Ray on this machine, for loopback alone, until the run ends; otherwise a
            cluster's `host:port` or `auto`.
        step: is told from another thread how many photos are done, and of how many.

    Raises:
        MissingExtraError: Ray or pyarrow is not installed.
        BackendError: no cluster answers, or Ray gave up.
        InputError: a photo twice, or `out` holds results of other settings.
    """
    ray = _ray(address)
    names = [str(photo.absolute()) for photo in photos]
    if len(set(names)) < len(names):
        raise InputError("a photo is named twice; name each one once")
    for name in names:
        if name != as_text(name):
            raise InputError(f"{as_text(name)} is no text in UTF-8, which Ray's tables need; rename the photo")
    _same_settings(out, settings)
    before = len(_done(out) & set(names))
    stopped = False
    if before < len(names):
        _write_list(names, out)
        with _cluster(ray, address), _told(out, set(names), step):
            try:
                _run(ray, len(names) - before, out.resolve(), tools)
            except KeyboardInterrupt:
                stopped = True
            except ray.exceptions.RayError as error:
                cause = getattr(error, "cause", None) or error
                raise BackendError(
                    f"Ray gave up: {type(cause).__name__}: {_last_line(cause)}; what is done is kept, and the same "
                    "command goes on"
                ) from error
    result = _collect(out, names, before, stopped)
    if not stopped and result.done < result.photos:
        raise DataError(
            f"{result.photos - result.done} photos are marked as done, but no file in {out / 'photos'} that can be "
            f"read holds them; begin anew with another --out"
        )
    return result


class _Predictor:
    """An actor: photos' names in, a row a photo out."""

    def __init__(self, tools: Tools) -> None:
        import_cv2().setNumThreads(tools.cpus)
        self.tools = tools
        self.model, self.detector = tools.model(), tools.detector()

    def __call__(self, batch: Any) -> Any:
        pa, _ = import_pyarrow()
        rows = [self._row(name) for name in batch["image"].to_pylist()]
        numbers = pa.list_(pa.list_(pa.float64()))
        columns = [("image", pa.string()), ("error", pa.string()), ("boxes", numbers), ("keypoints", numbers)]
        return pa.Table.from_pylist(rows, pa.schema(columns))

    def _row(self, name: str) -> dict[str, Any]:
        tools = self.tools
        try:
            found = predict_photo(
                self.model, Path(name), detector=self.detector, looks=tools.looks, mirror=tools.mirror
            ).keypoints
        except (KpError, OSError) as error:
            return {"image": name, "error": " ".join(str(error).split()), "boxes": [], "keypoints": []}
        points = [xy.ravel().tolist() for xy in found.xy]
        return {"image": name, "error": None, "boxes": found.boxes_xyxy.tolist(), "keypoints": points}


def _run(ray: Any, photos: int, out: Path, tools: Tools) -> None:
    """Ray's part: list -> what is not done -> actors -> photos/."""
    data = importlib.import_module("ray.data")
    checkpoint = importlib.import_module("ray.data.checkpoint")
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # an error is said once, by us
    context = data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.checkpoint_config = checkpoint.CheckpointConfig(
        "image", str(out / "state" / "done"), delete_checkpoint_on_success=False
    )
    context.checkpoint_config.checkpoint_actor_pool_max_size = 1  # it holds a core
    try:
        most = (int(ray.cluster_resources().get("CPU", 0)) - _RAYS_OWN) // tools.cpus
        if most < 1:
            raise BackendError(f"the Ray cluster has too few cores: {_RAYS_OWN + tools.cpus} are needed at least")
        if tools.gpus:
            most = int(ray.cluster_resources().get("GPU", 0)) // tools.gpus
            if not most:
                raise BackendError("the Ray cluster has no GPU; take --backend ort-cpu")
        rows = data.read_parquet(str(out / "state" / "photos.parquet"))
        # what is lost when a machine is: this many photos for each of its actors
        part = max(4, min(1024, photos // 100))
        rows = rows.repartition(target_num_rows_per_block=part)
        rows = rows.map_batches(
            _Predictor,
            fn_constructor_args=(tools,),
            batch_size=part if tools.gpus else None,  # Ray wants a number beside GPUs
            batch_format="pyarrow",
            compute=data.ActorPoolStrategy(min_size=1, max_size=most),
            num_cpus=tools.cpus,
            num_gpus=tools.gpus or None,
        )
        writers = min(most, -(-photos // part))  # Ray warns of more than there are parts
        rows.write_parquet(str(out / "photos"), ray_remote_args={"num_cpus": 0.1}, concurrency=writers)
    finally:
        context.checkpoint_config = None


def _same_settings(out: Path, settings: dict[str, Any]) -> None:
    """Keeps the settings in the folder, or compares them with those kept there."""
    path = out / "state" / "settings.json"
    if path.exists():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(before, dict):
                raise ValueError("no JSON object")
        except ValueError as error:
            raise DataError(f"{path} can't be read ({error}); begin anew with another --out") from error
        if odd := [
            f"{key} {before.get(key)} -> {settings[key]}" for key in settings if before.get(key) != settings[key]
        ]:
            raise InputError(
                f"{out} holds results of other settings ({', '.join(odd)}); name another folder with --out"
            )
        return
    write_file(path, json.dumps(settings, indent=1) + "\n")


def _write_list(names: Sequence[str], out: Path) -> None:
    pa, pq = import_pyarrow()
    with writing(out / "state" / "photos.parquet") as temporary:
        pq.write_table(pa.table({"image": list(names)}), temporary)


def _marks(out: Path) -> list[Path]:
    """Ray's marks: a file of photos for each part that is whole."""
    return [path for path in (out / "state" / "done").glob("*.parquet") if not path.name.endswith(".pending.parquet")]


def _done(out: Path) -> set[str]:
    """The photos that are marked as done."""
    pa, pq = import_pyarrow()
    done: set[str] = set()
    for path in _marks(out):
        try:
            done.update(pq.read_table(path, columns=["image"])["image"].to_pylist())
        except (pa.ArrowException, KeyError, OSError) as error:  # damage inside is an OSError
            raise DataError(f"{path} can't be read ({reason_of(error)}); begin anew with another --out") from error
    return done


def _collect(out: Path, names: Sequence[str], before: int, stopped: bool) -> BatchResult:
    """Writes `keypoints.parquet` from the parts; one that a kill cut off is passed over, as its photos are not done."""
    pa, pq = import_pyarrow()
    wanted, failed, faces = set(names), [], 0
    path = out / "keypoints.parquet"
    with writing(path) as temporary, pq.ParquetWriter(temporary, parquet_table([]).schema) as writer:
        for part in sorted((out / "photos").glob("*.parquet")):
            try:
                rows = pq.read_table(part).to_pylist()
            except (pa.ArrowInvalid, OSError):  # cut off, or damaged inside
                continue
            found = []
            for row in rows:
                if row["image"] not in wanted:
                    continue
                wanted.remove(row["image"])
                if row["error"] is not None:
                    failed.append(row["error"])
                for box, points in zip(row["boxes"], row["keypoints"], strict=True):
                    found.append(LabelledFace(row["image"], np.reshape(points, (-1, 2)), np.array(box)))
            writer.write_table(parquet_table(found))
            faces += len(found)
    return BatchResult(len(names), len(names) - len(wanted), before, faces, tuple(failed), path, stopped)


@contextlib.contextmanager
def _told(out: Path, names: set[str], step: Step) -> Iterator[None]:
    """Tells `step` how far Ray is, each time that it has marked more."""
    pa, pq = import_pyarrow()
    over = threading.Event()

    def look() -> None:
        seen: dict[Path, int] = {}
        told = 0
        while not over.wait(0.2):
            for path in _marks(out):
                if path not in seen:
                    with contextlib.suppress(OSError, pa.ArrowException):  # still being written
                        seen[path] = len(names & set(pq.read_table(path, columns=["image"])["image"].to_pylist()))
            if (done := sum(seen.values())) > told:
                step(done, len(names))
                told = done

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextlib.contextmanager
def _cluster(ray: Any, address: str) -> Iterator[None]:
    """A connection to Ray, or a Ray of one's own; as it was before afterwards."""
    if ray.is_initialized():
        yield
        return
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    try:
        if address == "local":
            with _silent():
                ray.init(address="local", include_dashboard=False, num_cpus=default_threads() + _RAYS_OWN, **quiet)
        else:
            _answers(address)
            with _silent():
                ray.init(address=address, **quiet)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise BackendError(
            f"no Ray cluster answers at {address} ({_last_line(error)}); begin one with ray start --head, "
            "copy its ~/.ray/auth_token to this machine where it has one, or take --ray local"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Nothing comes to stderr: Ray's core writes there until it has read that it should not."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _answers(address: str) -> None:
    """Asks whether somebody listens there: Ray itself would try for a minute."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit():
        socket.create_connection((host, int(port)), timeout=5).close()
    elif address != "auto":
        raise ValueError("an address is local, auto or host:port")


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1].strip()[:300] if lines else type(error).__name__


def _ray(address: str) -> Any:
    # Ray counts its users over the network, and listens to it, unless it is told otherwise before it is imported
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # nor on stderr; an error is raised
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    token = os.path.expanduser("~/.ray/auth_token")  # noqa: PTH111  Path's own raises where there is no home
    if address != "local" and Path(token).exists():
        # `ray start` asks for the token that an earlier local run left there, and Ray's clients do not send it unasked
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    try:
        importlib.import_module("ray.data")
        return importlib.import_module("ray")
    except ImportError as error:
        raise MissingExtraError("ray[data]", "ray", "predicting on Ray") from error
