"""Videos of a row: decoding and the choice of frames.

Files are decoded by PyAV (package `av`), animated GIF, WebP and PNG by Pillow. A video can also be a list of images or
a uint8 array (T, H, W, 3): its frames.
"""

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from transformers.video_utils import VideoMetadata

from tpcompress.data.bad_rows import BadRow, shown
from tpcompress.data.images import check_image, open_image, reference, to_rgb

VIDEO_SUFFIXES = ("mp4", "mov", "mkv", "webm", "avi", "m4v", "mpg", "mpeg", "wmv", "flv", "ts", "ogv", "3gp", "gif")
ANIMATED_MAGIC = (b"GIF8", b"RIFF", b"\x89PNG")
TOLERATED_LOSS = 0.1  # share of the announced frames that a file may lack


@dataclass(frozen=True)
class VideoSampling:
    """Which frames of a video are read.

    Args:
        num_frames: number of frames, spread evenly; None for all. Shorter videos give all they have.
        fps: frames per second of the video; takes precedence over `num_frames`. Frames given as a list are taken to
            be this far apart.
        max_frames: limit for `fps` and for all frames; more are thinned out evenly.

    Raises:
        ValueError: a number of frames below 1, or a rate that is not positive.
    """

    num_frames: int | None = 8
    fps: float | None = None
    max_frames: int | None = None

    def __post_init__(self) -> None:
        for name in ("num_frames", "max_frames"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1 frame, got {value}; leave it out for no limit.")
        if self.fps is not None and not self.fps > 0:
            raise ValueError(f"fps must be a positive number of frames per second, got {self.fps}.")

    def indices(self, total: int, fps: float | None) -> list[int]:
        """Indices of the frames that are read of a video.

        Args:
            total: number of frames of the video.
            fps: its frames per second; None for a list of frames, which are all read where `self.fps` is set.
        """
        wanted = total if self.fps is not None or self.num_frames is None else self.num_frames
        if self.fps is not None and fps:
            wanted = max(1, int(total / fps * self.fps))
        wanted = min(wanted, total, self.max_frames or total)
        return (np.arange(wanted) * total // wanted).tolist()


def open_video(video: Any, sampling: VideoSampling) -> tuple[np.ndarray, VideoMetadata]:
    """Read the sampled frames of one video of a row.

    Args:
        video: path, `{"bytes", "path"}`, list of images (frames), or uint8 array (T, H, W, 3).
        sampling: which frames.

    Returns:
        frames uint8 (T, H, W, 3), upright RGB; and metadata with `fps` (that of the sampling for lists of
        frames), `total_num_frames`, `frames_indices` and `duration`.

    Raises:
        BadRow: the video is missing or corrupt, or its frames differ in size.
        ImportError: the file needs `av`, which is not installed.
    """
    if isinstance(video, np.ndarray):
        return _of_array(video, sampling)
    if isinstance(video, Sequence) and not isinstance(video, str | bytes):
        return _of_frames(video, sampling)
    name, source = _source(video)
    try:
        with _opened(name, source) as file:
            return _animated(name, file, sampling) if _is_animated(file) else _decoded(name, file, sampling)
    except FileNotFoundError:
        raise BadRow(f"missing video: {name}") from None
    except IsADirectoryError:
        raise BadRow(f"corrupt video: {name} is a folder") from None


def check_video(video: Any) -> None:
    """Check what can be seen without decoding: that a file exists and starts with a video stream.

    Raises:
        BadRow: the video is missing or corrupt.
        ImportError: the file needs `av`, which is not installed.
    """
    if isinstance(video, np.ndarray):
        return
    if isinstance(video, Sequence) and not isinstance(video, str | bytes):
        for frame in video:
            check_image(frame)
        return
    name, source = _source(video)
    try:
        with _opened(name, source) as file:
            if _is_animated(file):
                check_image({"bytes": file.read(), "path": name})
            else:
                with _container(name, file):
                    pass
    except FileNotFoundError:
        raise BadRow(f"missing video: {name}") from None
    except IsADirectoryError:
        raise BadRow(f"corrupt video: {name} is a folder") from None


def _source(video: Any) -> tuple[str, str | bytes]:
    """A name for error messages, and the path or bytes of a file."""
    found = reference(video, "video")
    if not isinstance(found, dict):
        raise BadRow(f"missing video: neither path, bytes nor frames ({type(video).__name__})")
    if found["bytes"] is not None:
        return shown(found["path"] or "video bytes in the data set"), found["bytes"]
    return shown(found["path"]), found["path"]


def _opened(name: str, source: str | bytes) -> BinaryIO:
    return BytesIO(source) if isinstance(source, bytes) else Path(source).open("rb")


def _is_animated(file: BinaryIO) -> bool:
    """Whether Pillow reads the file: GIF, WebP (not AVI, which is RIFF as well) or PNG."""
    start = file.read(12)
    file.seek(0)
    return start.startswith(ANIMATED_MAGIC) and (not start.startswith(b"RIFF") or start[8:12] == b"WEBP")


def _of_array(video: np.ndarray, sampling: VideoSampling) -> tuple[np.ndarray, VideoMetadata]:
    if video.ndim != 4 or video.shape[-1] != 3 or video.dtype != np.uint8 or not len(video):
        raise BadRow(f"corrupt video: array {video.shape} of {video.dtype}; give uint8 (frames, height, width, 3)")
    indices = sampling.indices(len(video), None)
    return video[indices], _metadata(video[0], len(video), sampling.fps, indices, "array")


def _of_frames(video: Sequence[Any], sampling: VideoSampling) -> tuple[np.ndarray, VideoMetadata]:
    if not len(video):
        raise BadRow("missing video: an empty list of frames")
    indices = sampling.indices(len(video), None)
    frames = _stacked("list of frames", [np.asarray(open_image(video[index])) for index in indices])
    return frames, _metadata(frames[0], len(video), sampling.fps, indices, "pillow")


def _animated(name: str, file: BinaryIO, sampling: VideoSampling) -> tuple[np.ndarray, VideoMetadata]:
    opened = open_image({"bytes": file.read(), "path": name}, decode=False)
    try:
        total, milliseconds = getattr(opened, "n_frames", 1), 0.0
        for index in range(total):  # durations are stored per frame
            opened.seek(index)
            opened.load()  # WebP has the duration only then
            milliseconds += opened.info.get("duration", 0) or 100  # browsers play frames without a duration at 10 fps
        fps = 1000 * total / milliseconds
        indices = sampling.indices(total, fps)
        images = []
        for index in indices:
            opened.seek(index)
            images.append(np.asarray(to_rgb(opened)))
    except Exception as error:  # as in `open_image`
        raise BadRow(f"corrupt video: {name} ({type(error).__name__})") from None
    frames = _stacked(name, images)
    return frames, _metadata(frames[0], total, fps, indices, "pillow")


def _decoded(name: str, file: BinaryIO, sampling: VideoSampling) -> tuple[np.ndarray, VideoMetadata]:
    total, fps = _length(name, file)
    indices = sampling.indices(total, fps)
    found, seen = _frames_at(name, file, indices)
    if len(found) < len(indices):  # the container announced more frames than it holds
        if seen < (1 - TOLERATED_LOSS) * total:
            raise BadRow(f"corrupt video: {name} ends after {seen} of {total} frames")
        total, indices = seen, sampling.indices(seen, fps)
        found, _ = _frames_at(name, file, indices)
    frames = _stacked(name, found)
    return frames, _metadata(frames[0], total, fps, indices, "pyav")


def _length(name: str, file: BinaryIO) -> tuple[int, float]:
    """Number of frames and frames per second of a file."""
    with _container(name, file) as container:
        stream = container.streams.video[0]
        rate = stream.average_rate or stream.guessed_rate
        # Some containers (WebM, Matroska) store no number of frames; packets are counted without decoding.
        total = stream.frames or sum(packet.size > 0 for packet in container.demux(stream))
    if not total:
        raise BadRow(f"corrupt video: {name} has no frames")
    return total, float(rate) if rate else 24.0


def _frames_at(name: str, file: BinaryIO, indices: list[int]) -> tuple[list[np.ndarray], int]:
    """The frames at ascending indices, as far as the file goes, and the number of frames seen."""
    found: list[np.ndarray] = []
    seen = 0
    with _container(name, file) as container:
        for frame in container.decode(container.streams.video[0]):
            if seen == indices[len(found)]:
                turned = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
                found.append(np.ascontiguousarray(turned))
            seen += 1
            if len(found) == len(indices):
                break
    return found, seen


@contextmanager
def _container(name: str, file: BinaryIO) -> Any:
    """The opened container of a file with a video stream; errors of FFmpeg become `BadRow`."""
    try:
        import av
    except ImportError as error:
        message = "av is not installed; it decodes videos. Install it with: pip install 'tpcompress[media]'"
        raise ImportError(message, name="av") from error
    file.seek(0)
    try:
        with av.open(file) as container:
            if not container.streams.video:
                raise BadRow(f"corrupt video: {name} has no video stream")
            yield container
    except av.FFmpegError as error:
        raise BadRow(f"corrupt video: {name} ({type(error).__name__})") from None


def _stacked(name: str, images: list[np.ndarray]) -> np.ndarray:
    sizes = {image.shape for image in images}
    if len(sizes) > 1:
        height_width = sorted(f"{shape[1]} x {shape[0]}" for shape in sizes)
        raise BadRow(f"corrupt video: frames of {name} differ in size: {', '.join(height_width[:3])}")
    return np.stack(images)


def _metadata(frame: np.ndarray, total: int, fps: float | None, indices: list[int], backend: str) -> VideoMetadata:
    height, width = frame.shape[:2]
    return VideoMetadata(
        total_num_frames=total,
        fps=fps,
        width=width,
        height=height,
        duration=None if fps is None else total / fps,
        video_backend=backend,
        frames_indices=indices,
    )
