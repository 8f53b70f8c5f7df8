"""What follows faces: `kp run`."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from pathlib import Path
from typing import Annotated

import typer

from kp_cli.options import (
    EFFECT_NAMES,
    ELSE_DEFAULT,
    Detector,
    Json,
    PublicKey,
    Smallest,
    Tuned,
    check_effect,
    load_model,
    note_boxes,
    open_detector,
    quiet_opencv,
    stopped_by_signals,
    whole_detector_name,
)
from kp_cli.report import frames_progress, note, print_json, print_run
from kp_runtime.errors import InputError


def run(
    source: Annotated[
        str,
        typer.Argument(help="A video, a folder of frames, a camera's index, rtsp://…, or a GStreamer pipeline."),
    ],
    model: Annotated[Path | None, typer.Option(help="A bundle, or an ONNX file in one; " + ELSE_DEFAULT)] = None,
    out: Annotated[Path, typer.Option(help="Folder for the annotated video and the results.")] = Path("out"),
    formats: Annotated[
        list[str] | None,
        typer.Option("--format", help="mp4, avi, jsonl, parquet. Repeatable; mp4 and jsonl when left out."),
    ] = None,
    show: Annotated[
        bool, typer.Option("--show", help="Show the frames in a window; with no --format, only that.")
    ] = False,
    effect: Annotated[
        str | None, typer.Option(metavar="NAME", help="Instead of points and boxes: " + EFFECT_NAMES)
    ] = None,
    smooth: Annotated[
        bool | None,
        typer.Option(
            "--smooth/--no-smooth", help="Steady the points (One-Euro), not for measurements; with blur not, else so."
        ),
    ] = None,
    detect_every: Annotated[
        int | None, typer.Option(min=1, help="Frames between two looks for new faces; 1 with blur, else 30.")
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option("--fps", help="Frames a second of the source; what it says when left out, of a folder 30."),
    ] = None,
    patience: Annotated[
        float, typer.Option(min=0.0, help="Seconds that a camera or stream which went away is opened anew.")
    ] = 60.0,
    smallest: Smallest = None,
    detector: Detector = "auto",
    threads: Annotated[
        int | None,
        typer.Option(help="Threads of engine and OpenCV; all cores but one, which is for files, when left out."),
    ] = None,
    tuned: Tuned = None,
    public_key: PublicKey = None,
    metrics: Annotated[
        str | None, typer.Option(metavar="[HOST:]PORT", help="Serve metrics for Prometheus at /metrics meanwhile.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Follow the faces of a video, a camera or a stream.

    Writes an annotated video and a row a face and frame. Ctrl-C ends it; what was written stays whole.

    Example: kp run talk.mp4 --format mp4 --format parquet
    """
    stop = threading.Event()
    quiet_opencv()
    from kp_runtime.cores import default_threads
    from kp_runtime.effect_pictures import open_effect
    from kp_runtime.frame import import_cv2
    from kp_runtime.prometheus import Metrics, address_from_text
    from kp_runtime.track import Tracker, TrackerSettings
    from kp_runtime.video import Window, draw_effect, draw_tracks, run_video
    from kp_runtime.video_sink import open_sinks
    from kp_runtime.video_source import open_source

    wanted = formats or ([] if show else ["mp4", "jsonl"])
    if effect and not show and not {"mp4", "avi"} & set(wanted):
        raise InputError("--effect goes with --format mp4, --format avi or --show")
    address = address_from_text(metrics) if metrics else None
    watch = Metrics() if address else None
    draw = draw_effect(open_effect(effect)) if effect else draw_tracks
    few = max(1, default_threads() - 1) if threads is None else threads  # reading, drawing and writing go on meanwhile
    import_cv2().setNumThreads(few)
    named = whole_detector_name(detector, public_key, smallest)
    opened = load_model(model, tuned, "auto", threads if tuned else few, public_key)
    opened.check_boxes()
    check_effect(effect, opened.spec)
    note_boxes(opened.spec)
    hide = effect == "blur"  # then a face too many is better than one that is seen
    found = open_detector(named, smallest=smallest or (0.05 if hide else 0.1), threads=few, public_key=public_key)
    settings = TrackerSettings(
        detect_every=detect_every or (1 if hide else 30),
        smooth=not hide if smooth is None else smooth,
        trust_detector=hide,
    )
    tracker = watch.tracker(opened, found, settings) if watch else Tracker(opened, found, settings)
    frames = open_source(source, rate=rate, patience=patience, stop=stop, say=note)
    window = Window(frames.name) if show else None
    with contextlib.ExitStack() as stack:
        if watch and address:
            host = f"[{address[0]}]" if ":" in address[0] else address[0]
            note(f"metrics: http://{host}:{stack.enter_context(watch.served(*address))}/metrics")
        signalled = stack.enter_context(stopped_by_signals(stop))
        step = stack.enter_context(frames_progress(frames.name, frames.count))
        sinks = open_sinks(
            wanted, out, frames.stem, rate=frames.rate, size_hw=frames.size_hw, live=frames.live,
            points=opened.spec.points, drawn=Path(effect).stem if effect else "keypoints", say=note,
        )  # fmt: skip
        result = run_video(frames, tracker, sinks, draw=draw, window=window, stop=stop, step=step, metrics=watch)
    if as_json:
        print_json(dataclasses.asdict(result))
    else:
        print_run(frames.name, result)
    if signalled.is_set() and not frames.live:
        raise typer.Exit(130)  # as a shell reports Ctrl-C; a camera has no other end
