"""What frames come from: every frame of a file or a folder, and sources that are none."""

from __future__ import annotations

import functools
import http.server
import os
import threading
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from kp_runtime.errors import BackendError, ImageError, InputError
from kp_runtime.video_container import ends_early
from kp_runtime.video_sink import VideoSink
from kp_runtime.video_source import FileSource, FolderSource, VideoFrame, open_source
from tests.test_video import SIZE_HW, Camera, folder_of_frames, live, picture, video


def test_a_file_gives_every_frame_with_its_time(tmp_path: Path) -> None:
    source = open_source(str(video(tmp_path / "a.avi")))
    assert (source.live, source.rate, source.count, source.size_hw) == (False, 25.0, 20, SIZE_HW)
    frames = list(source)
    assert [frame.index for frame in frames] == list(range(20))
    np.testing.assert_allclose([frame.seconds for frame in frames], np.arange(20) / 25, atol=1e-6)
    assert np.abs([frame.image.mean() - 10 * i for i, frame in enumerate(frames)]).max() < 3


def test_a_file_is_read_once(tmp_path: Path) -> None:
    source = open_source(str(video(tmp_path / "a.avi", 3)))
    assert len(list(source)) == 3
    with pytest.raises(InputError, match=r"a.avi can be read once; open it again"):
        list(source)


def test_a_given_rate_takes_the_place_of_the_files(tmp_path: Path) -> None:
    frames = list(open_source(str(video(tmp_path / "a.avi", 4)), rate=50))
    np.testing.assert_allclose([frame.seconds for frame in frames], [0, 0.02, 0.04, 0.06])
    for rate in (0.0, float("nan"), 5000.0):
        with pytest.raises(InputError, match="the frame rate must be over 0"):
            open_source(str(tmp_path / "a.avi"), rate=rate)


@pytest.mark.parametrize("said", [0.0, 0.5, 1000.0, 90000.0, float("nan")])
def test_a_rate_that_is_none_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: float) -> None:
    """Such as 1000, a time base in milliseconds."""
    path = str(video(tmp_path / "a.avi", 4))

    class Capture:
        def __init__(self, *where: object, opened: Callable[..., cv2.VideoCapture] = cv2.VideoCapture) -> None:
            self.real = opened(*where)

        def __getattr__(self, name: str) -> object:
            return getattr(self.real, name)

        def get(self, what: int) -> float:
            return said if what == cv2.CAP_PROP_FPS else self.real.get(what)

    monkeypatch.setattr(cv2, "VideoCapture", Capture)
    assert open_source(path).rate == 30


def test_a_folder_gives_its_frames_in_order(tmp_path: Path) -> None:
    source = open_source(str(folder_of_frames(tmp_path / "frames")), rate=10)
    assert isinstance(source, FolderSource)
    assert [(f.index, f.seconds, int(f.image[0, 0, 0])) for f in source] == [(i, i / 10, 10 * i) for i in range(6)]
    assert (source.count, source.stem) == (6, "frames")


def test_a_folder_s_numbers_count_as_numbers(tmp_path: Path) -> None:
    names = ["7.png", "08.png", "9.png", "10.png", "a2b10.png", "a10b2.png"]
    for name in reversed(names):
        cv2.imwrite(str(tmp_path / name), picture(10 * names.index(name)))
    assert [int(frame.image[0, 0, 0]) for frame in FolderSource(tmp_path)] == [0, 10, 20, 30, 40, 50]


@pytest.mark.parametrize("content", [b"", b"no video at all" * 100])
def test_what_holds_no_frame_says_so(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.mp4"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=r"bad.mp4 has no frame that can be read: it is cut off, empty or no video"):
        open_source(str(path))


def test_an_mp4_without_its_end_says_so(tmp_path: Path) -> None:
    path = video(tmp_path / "a.mp4", codec="mp4v")
    path.write_bytes(path.read_bytes()[:-600])
    with pytest.raises(ImageError, match="has no frame that can be read"):
        open_source(str(path))


@pytest.mark.parametrize(
    ("name", "codec"), [("a.mp4", "mp4v"), ("a.mov", "mp4v"), ("a.avi", "MJPG"), ("a.mkv", "MJPG")]
)
def test_containers_tell_where_they_end(tmp_path: Path, name: str, codec: str) -> None:
    path = video(tmp_path / name, codec=codec)
    data = path.read_bytes()
    assert not ends_early(path)
    for share in (0.5, 0.9, 0.99):
        path.write_bytes(data[: int(share * len(data))])
        assert ends_early(path), share


def test_containers_that_do_not_tell(tmp_path: Path) -> None:
    path = tmp_path / "a"
    assert not ends_early(path)
    head = b"\x1aE\xdf\xa3\x82ab" + b"\x18\x53\x80\x67"
    for whole in (
        b"", b"\x47" * 564, b"FLV\x01" + bytes(90), b"\0\0\0\0mdat" + bytes(9), b"RIFF\0\0\0\0AVI " + bytes(90),
        head + b"\xff" + bytes(20), head + b"\x01" + b"\xff" * 7 + bytes(20), head + b"\x84" + bytes(4), head[:5],
        b"\0\0\0\x10ftyp" + bytes(8) + b"\0\0\0\x01mdat" + (16).to_bytes(8, "big"),
        b"\0\0\0\x10ftyp" + bytes(8) + b"TAGged by its camera " * 3, b"RIFF\xff\xff\xff\xffAVI " + bytes(90),
        b"RIFF\x04\0\0\0AVI " + b"ID3 and the rest " * 3,
        b"\x1aE\xdf\xa3\x82ab" + b"\xec\xff\xff\xff" + b"\x85" + bytes(4),
    ):  # fmt: skip
        path.write_bytes(whole)
        assert not ends_early(path), whole[:24]
    for cut in (head + b"\x85" + bytes(4), b"\0\0\0\x01mdat" + (17).to_bytes(8, "big"), b"RIFF\x09\0\0\0AVI " + b"abc"):
        path.write_bytes(cut)
        assert ends_early(path), cut[:24]


class Shown:
    """An opened video of so many frames, 25 a second, in a container that counts `count`."""

    def __init__(self, frames: int, count: int) -> None:
        self.frames, self.count, self.at = frames, count, 0

    def read(self) -> tuple[bool, np.ndarray | None]:
        self.at += 1
        return (True, picture(7)) if self.at <= self.frames else (False, None)

    def get(self, what: int) -> float:
        known = {cv2.CAP_PROP_FRAME_COUNT: self.count, cv2.CAP_PROP_FPS: 25, cv2.CAP_PROP_POS_MSEC: 40 * (self.at - 1)}
        return float(known[what])

    def release(self) -> None:
        pass


@pytest.mark.parametrize(("frames", "count", "told"), [(100, 101, 0), (100, 112, 0), (100, 150, 1)])
def test_a_count_of_frames_is_an_estimate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, frames: int, count: int, told: int
) -> None:
    """Sound that lasts longer counts as frames; of a trimmed file many are missing, and it is whole."""
    path, said = video(tmp_path / "a.avi"), []
    monkeypatch.setattr(cv2, "VideoCapture", lambda *_: Shown(frames, count))
    source = open_source(str(path), say=said.append)
    assert len(list(source)) == frames
    assert len(said) == told
    assert all("a.avi: 100 of the 150 frames that it counts could be read; it was trimmed" in text for text in said)


def test_a_download_that_breaks_off() -> None:
    with pytest.raises(ImageError, match="there broke off: 100 of the 150 frames that it counts could be read"):
        list(FileSource(Path("a.mp4"), capture=Shown(100, 150), name="there"))


def test_a_name_with_a_colon_is_no_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(list(open_source(video(Path("talk-12:30.avi").absolute()).name))) == 20
    sink = VideoSink(Path("a-12:30.mp4"), "mp4v", 25, SIZE_HW, by_clock=False)
    sink.write(VideoFrame(0, 0, picture(1)), (), picture(1))
    sink.close()
    assert (tmp_path / "a-12:30.mp4").is_file()


def test_two_frames_of_one_time_do_not_take_the_rest_along() -> None:
    class Twice(Shown):
        def get(self, what: int) -> float:
            return 10 * float(self.at - (self.at > 3)) if what == cv2.CAP_PROP_POS_MSEC else super().get(what)

    seconds = [frame.seconds for frame in FileSource(Path("a.mp4"), capture=Twice(9, 9), name="a")]
    np.testing.assert_allclose(seconds, [0, 0.01, 0.02, 0.06, 0.061, 0.062, 0.063, 0.064, 0.07])


def test_a_clock_that_begins_anew_goes_on() -> None:
    """As where two transport streams were joined. Its container tells the length of the second one."""

    class Joined(Shown):
        def get(self, what: int) -> float:
            return 80.0 * ((self.at - 1) % 50) if what == cv2.CAP_PROP_POS_MSEC else super().get(what)

    seconds = [frame.seconds for frame in FileSource(Path("a.ts"), capture=Joined(100, 150), name="a")]
    np.testing.assert_allclose(np.diff(seconds), [*[0.08] * 49, 0.04, *[0.08] * 49])


def test_a_clock_that_jumps_ahead_is_believed() -> None:
    """As in a recording that was cut."""

    class Cut(Shown):
        def get(self, what: int) -> float:
            return super().get(what) + (6e4 if what == cv2.CAP_PROP_POS_MSEC and self.at > 50 else 0)

    seconds = [frame.seconds for frame in FileSource(Path("a.mp4"), capture=Cut(99, 99), name="a")]
    np.testing.assert_allclose(np.diff(seconds), [*[0.04] * 49, 60.04, *[0.04] * 48])


@pytest.mark.parametrize("stamp", [0.0, 2100.0, 3.6e6])
def test_one_wrong_stamp_is_passed_over(stamp: float) -> None:
    class Wrong(Shown):
        def get(self, what: int) -> float:
            return stamp if what == cv2.CAP_PROP_POS_MSEC and self.at == 50 else super().get(what)

    seconds = [frame.seconds for frame in FileSource(Path("a.ts"), capture=Wrong(99, 99), name="a")]
    np.testing.assert_allclose(seconds, np.arange(99) / 25)


def test_sources_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no video, folder, camera index, address .* 'nothing.mp4'"):
        open_source("nothing.mp4")
    with pytest.raises(InputError, match="there is no video, folder"):
        open_source("a" * 300)
    for camera in ("12345", "9" * 5000, "1" + 9 * "0"):
        with pytest.raises(InputError, match=f"there is no camera {camera}"):
            open_source(camera)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="pipe is a pipe or a device; give a video file, or a camera by its index"):
        open_source(str(tmp_path / "pipe"))
    cv2.imwrite(str(tmp_path / "a.png"), picture(3))
    with pytest.raises(InputError, match=r"a.png is a photo: kp predict"):
        open_source(str(tmp_path / "a.png"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ImageError, match="holds no photos"):
        open_source(str(tmp_path / "empty"))
    with pytest.raises(ImageError, match="camera 3 gives no frame; check that it is connected"):
        live(Camera())


@pytest.mark.skipif(os.name != "posix", reason="names of files are bytes on POSIX alone")
def test_names_that_are_no_text(tmp_path: Path) -> None:
    """OpenCV ends the process at them."""
    name = os.fsdecode(b"talk\xff.mp4")
    video(tmp_path / "talk.mp4").rename(tmp_path / name)
    for source in (str(tmp_path / name), "rtsp://" + name, name + " ! appsink"):
        with pytest.raises(InputError, match=r"its name is no text in UTF-8, which OpenCV needs; rename it"):
            open_source(source)
    with pytest.raises(InputError, match="rename it"):
        VideoSink(tmp_path / name, "mp4v", 25, SIZE_HW, by_clock=False)


def test_what_is_there_and_an_address_may_have_an_exclamation_mark(tmp_path: Path) -> None:
    video(tmp_path / "a!.mp4", codec="mp4v")
    folder_of_frames(tmp_path / "f!")
    assert isinstance(open_source(str(tmp_path / "a!.mp4")), FileSource)
    assert isinstance(open_source(str(tmp_path / "f!")), FolderSource)
    with pytest.raises(ImageError, match=r"rtsp://127.0.0.1:1/x gives no frame"):
        open_source("rtsp://u:p!@127.0.0.1:1/x")


def test_a_pipeline_needs_an_opencv_with_gstreamer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cv2.videoio_registry, "hasBackend", lambda backend: False)
    with pytest.raises(BackendError, match="is built without GStreamer"):
        open_source("videotestsrc ! appsink")


@pytest.mark.parametrize(
    "shape",
    [pytest.param((72, 64), id="NV12"), pytest.param((48, 64, 2), id="YUY2"), pytest.param((1, 999), id="JPEG")],
)
def test_frames_of_a_pipeline_are_bgr_or_grey(shape: tuple[int, ...]) -> None:
    """What OpenCV's GStreamer gives of frames of 48 rows: NV12 as one plane of 72, which looks like a grey picture."""

    class Pipeline(Camera):
        def __init__(self, *shape: int) -> None:
            super().__init__()
            self.shape = shape

        def read(self) -> tuple[bool, np.ndarray | None]:
            return True, np.zeros(self.shape, np.uint8)

        def get(self, property_: int) -> float:
            return 48 if property_ == cv2.CAP_PROP_FRAME_HEIGHT else 0

    camera = Pipeline(*shape)
    with pytest.raises(ImageError, match="neither BGR nor grey; put videoconvert ! video/x-raw,format=BGR"):
        live(camera)
    assert camera.released
    assert live(Pipeline(48, 64)).size_hw == live(Pipeline(48, 64, 3)).size_hw == (48, 64)


@pytest.mark.parametrize(
    ("address", "name", "stem"),
    [
        (
            "rtsp://me:secret@camera.local:554/live?token=x",
            "rtsp://camera.local:554/live",
            "rtsp_camera_local_554_live_c4689ff9",
        ),
        ("rtsp://camera.local?user=me&password=secret", "rtsp://camera.local", "rtsp_camera_local_6a8a7a8f"),
        ("rtsp://camera.local/live", "rtsp://camera.local/live", "rtsp_camera_local_live_5729c351"),
        (" rtsp://me:secret@camera.local/live ", "rtsp://camera.local/live", "rtsp_camera_local_live_5729c351"),
        ("rtsp://me:sec?ret@camera.local/live", "rtsp://…", "rtsp_5729c351"),
        ("rtsp://me:sec/ret@camera.local/live", "rtsp://…", "rtsp_5729c351"),
        ("rtsp://camera.local?password=sec@ret", "rtsp://…", "rtsp_85e4aea1"),
    ],
)
def test_passwords_stay_out_of_messages(address: str, name: str, stem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cv2, "VideoCapture", lambda *words: Camera(5))
    source = open_source(address)
    assert (source.name, source.stem) == (name, stem)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("rtsp://nvr/cam/realmonitor?channel=1", "rtsp://nvr/cam/realmonitor?channel=2"),
        ("rtsp://me:p/w@one/live", "rtsp://me:p/w@other/live"),
        ("rtsp://me:p?w@one/live", "rtsp://me:p?w@other/live"),
        ("v4l2src device=/dev/video0 ! appsink", "v4l2src device=/dev/video1 ! appsink"),
    ],
)
def test_two_sources_share_no_files(one: str, other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cv2, "VideoCapture", lambda *words: Camera(5))
    monkeypatch.setattr(cv2.videoio_registry, "hasBackend", lambda backend: True)
    assert open_source(one).stem != open_source(other).stem == open_source(other).stem


@pytest.mark.parametrize(
    "text", ["rtsp:/admin:SECRET@cam1/live", "'rtsp://me:SECRET@cam'", "rtsp:/cam?password=SECRET"]
)
def test_a_mistyped_address_stays_out_of_messages(text: str) -> None:
    with pytest.raises(InputError, match=r"address .* of that name \(left out here: it may hold a password\)$") as told:
        open_source(text)
    assert "SECRET" not in str(told.value)


def test_a_file_behind_an_address_is_a_file(tmp_path: Path) -> None:
    path = video(tmp_path / "a.avi", 12)
    handler = functools.partial(QuietHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        source = open_source(f"http://me:secret@127.0.0.1:{server.server_port}/a.avi")
        assert (source.live, source.count, source.rate) == (False, 12, 25.0)
        assert source.name == f"http://127.0.0.1:{server.server_port}/a.avi"
        assert source.stem.startswith(f"http_127_0_0_1_{server.server_port}_a_avi_")
        assert [frame.index for frame in source] == list(range(12))
        server.shutdown()
    source = open_source(path.as_uri(), rate=5)
    assert (source.live, source.count, source.rate) == (False, 12, 5)


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *words: object) -> None:
        pass


def test_a_file_is_closed_when_nobody_wants_more_of_it() -> None:
    class Closing(Shown):
        closed = False

        def release(self) -> None:
            self.closed = True

    capture = Closing(9, 9)
    frames = iter(FileSource(Path("a.mp4"), capture=capture, name="a"))
    next(frames)
    assert not capture.closed
    frames.close()  # type: ignore[attr-defined]
    assert capture.closed
