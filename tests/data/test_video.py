"""Videos: sampled frames and their metadata, for every source; broken ones are bad rows."""

from __future__ import annotations

import builtins

import numpy as np
import pytest
from PIL import Image

from tpcompress.data.bad_rows import BadRow
from tpcompress.data.video import VideoSampling, check_video, open_video

LEVELS = [10 * i for i in range(24)]  # the grey level of every frame tells its index


def frames() -> list[Image.Image]:
    return [Image.new("RGB", (32, 24), (level, level, level)) for level in LEVELS]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The same 24 frames at 12 per second, in several containers."""
    av = pytest.importorskip("av")
    folder = tmp_path_factory.mktemp("videos")
    for suffix, codec in (("mp4", "mpeg4"), ("mkv", "mpeg4"), ("avi", "mpeg4")):
        with av.open(str(folder / f"v.{suffix}"), "w") as container:
            stream = container.add_stream(codec, rate=12)
            stream.width, stream.height, stream.pix_fmt = 32, 24, "yuv420p"
            for image in frames():
                container.mux(stream.encode(av.VideoFrame.from_image(image)))
            container.mux(stream.encode())
    first, *rest = frames()
    for suffix in ("gif", "webp", "png"):
        first.save(folder / f"v.{suffix}", save_all=True, append_images=rest, duration=80, lossless=True)
    return folder


def levels(found: np.ndarray) -> list[int]:
    return [round(float(frame.mean())) for frame in found]


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi", "gif", "webp", "png"])
@pytest.mark.parametrize("source", ["path", "bytes"])
def test_files_give_evenly_spread_frames(suffix, source, files):
    path = files / f"v.{suffix}"
    video = str(path) if source == "path" else {"bytes": path.read_bytes(), "path": None}
    check_video(video)
    found, metadata = open_video(video, VideoSampling(num_frames=6))
    assert (found.shape, found.dtype) == ((6, 24, 32, 3), np.uint8)
    assert metadata.frames_indices == [0, 4, 8, 12, 16, 20]
    np.testing.assert_allclose(levels(found), [LEVELS[i] for i in metadata.frames_indices], atol=3)
    fps = 12.5 if suffix in ("gif", "webp", "png") else 12
    assert (metadata.total_num_frames, round(metadata.fps, 3)) == (24, fps)
    assert metadata.duration == pytest.approx(24 / fps)
    assert (metadata.width, metadata.height) == (32, 24)


@pytest.mark.parametrize(
    ("sampling", "indices"),
    [
        (VideoSampling(fps=3), [0, 4, 8, 12, 16, 20]),
        (VideoSampling(fps=0.1), [0]),
        (VideoSampling(fps=100), list(range(24))),
        (VideoSampling(fps=6, max_frames=3), [0, 8, 16]),
        (VideoSampling(num_frames=None), list(range(24))),
        (VideoSampling(num_frames=100), list(range(24))),
        (VideoSampling(num_frames=5), [0, 4, 9, 14, 19]),
    ],
)
def test_sampling(sampling, indices, files):
    found, metadata = open_video(files / "v.mp4", sampling)
    assert metadata.frames_indices == indices
    np.testing.assert_allclose(levels(found), [LEVELS[i] for i in indices], atol=3)


@pytest.mark.parametrize("kind", ["images", "paths", "bytes", "array"])
def test_frames_are_a_video(kind, tmp_path):
    for index, image in enumerate(frames()):
        image.save(tmp_path / f"{index}.png")
    paths = [tmp_path / f"{index}.png" for index in range(24)]
    video = {
        "images": frames(),
        "paths": [str(path) for path in paths],
        "bytes": [{"bytes": path.read_bytes(), "path": None} for path in paths],
        "array": np.stack([np.asarray(image) for image in frames()]),
    }[kind]
    check_video(video)
    found, metadata = open_video(video, VideoSampling(num_frames=4))
    assert levels(found) == [LEVELS[i] for i in (0, 6, 12, 18)]
    assert (metadata.total_num_frames, metadata.fps, metadata.duration) == (24, None, None)
    found, metadata = open_video(video, VideoSampling(fps=2))  # the rate that the frames were taken at
    assert (len(found), metadata.fps, metadata.duration) == (24, 2, 12)


def test_a_turned_video_is_upright(tmp_path):
    av = pytest.importorskip("av")
    image = Image.new("RGB", (32, 16), "black")
    image.paste("white", (0, 0, 8, 8))  # top left
    with av.open(str(tmp_path / "v.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())
    content = bytearray((tmp_path / "v.mp4").read_bytes())
    at = content.index(b"tkhd") + 44  # the display matrix: 16.16, and 2.30 in every third number
    one = 1 << 16
    numbers = (0, one, 0, -one, 0, 0, 16 * one, 0, 1 << 30)
    content[at : at + 36] = b"".join(number.to_bytes(4, "big", signed=True) for number in numbers)
    found, _ = open_video({"bytes": bytes(content), "path": None}, VideoSampling())
    assert found.shape == (1, 32, 16, 3)
    assert found[0, :6, -6:].mean() > 200  # turned clockwise by 90 degrees: top right
    assert found[0, -8:].mean() < 50


def test_broken_videos_are_bad_rows(files, tmp_path):
    whole, whole_gif = (files / "v.avi").read_bytes(), (files / "v.gif").read_bytes()
    cases = {
        "missing video: .*gone.mp4$": tmp_path / "gone.mp4",
        "missing video: neither path, bytes nor frames": None,
        "missing video: an empty list": [],
        "corrupt video: .* is a folder": tmp_path,
        "corrupt video: no.mp4 .InvalidDataError": {"bytes": b"<html>not found</html>" * 50, "path": "no.mp4"},
        "corrupt video: .*ends after|corrupt video: .*Error": {"bytes": whole[: len(whole) // 2], "path": "half.avi"},
        "corrupt video: cut.mp4": {"bytes": (files / "v.mp4").read_bytes()[:1500], "path": "cut.mp4"},
        "corrupt image: cut.gif|corrupt video: cut.gif": {"bytes": whole_gif[:200], "path": "cut.gif"},
        "missing image: .*gone.png": [str(tmp_path / "gone.png")],
        "corrupt video: frames of .* differ in size: 32 x 24, 8 x 8": [frames()[0], Image.new("RGB", (8, 8))],
        "corrupt video: array .2, 3. of float64": np.zeros((2, 3)),
        "remote video: https addresses are not read": "https://example.com/v.mp4",
    }  # fmt: skip
    for reason, video in cases.items():
        with pytest.raises(BadRow, match=f"^({reason})"):
            open_video(video, VideoSampling())


def test_a_file_without_video_is_a_bad_row(tmp_path):
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "sound.mkv"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    for look in (check_video, lambda video: open_video(video, VideoSampling())):
        with pytest.raises(BadRow, match=r"^corrupt video: .*sound.mkv has no video stream"):
            look(tmp_path / "sound.mkv")


def test_without_av_the_package_is_named(files, monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **options):
        if name == "av":
            raise ModuleNotFoundError("No module named 'av'", name="av")
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"^av is not installed; .*pip install 'tpcompress\[media\]'"):
        open_video(files / "v.mp4", VideoSampling())
    assert len(open_video(str(files / "v.gif"), VideoSampling())[0]) == 8


def test_wrong_samplings_are_refused():
    for options, message in (
        ({"num_frames": 0}, "^num_frames must be at least 1 frame, got 0"),
        ({"max_frames": 0}, "^max_frames must be at least 1 frame"),
        ({"fps": 0}, "^fps must be a positive number"),
        ({"fps": float("nan")}, "^fps must be a positive number"),
    ):
        with pytest.raises(ValueError, match=message):
            VideoSampling(**options)
