"""Read any video file as a clip on our clock, and write clips as mp4 files whose sound stays in place.

A clip is `AV(frames, samples)`: frames uint8 [F, H, W, 3] at `clock.fps`, samples float32 [N] mono in [-1, 1] at
`clock.sample_rate`. Both start with the first picture shown, and F frames go with `clock.samples_of(F)` samples.
Pictures and sound are placed by their timestamps and not by counting, because AAC begins with samples of its own
(priming) whose number only the timestamps tell.
"""

from __future__ import annotations

import io
import os
import re
import warnings
import wave
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple, NoReturn, TypeVar

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.stream import Disposition, Stream
from av.video.reformatter import Colorspace, VideoReformatter

from omniforcing_lib.files import replacing
from omniforcing_lib.layout import AV, Clock
from omniforcing_lib.video_decode import BT709, SCALER, Fit, Shown, Track, on_show

CLOCK = Clock()
SHORT_SIDE = 256  # small clips are enlarged to this: players show them, and halved chroma loses nothing
ROWS_OF_A_THREAD = 256  # each thread encodes a slice, so their number is part of the file and not left to the machine
LIMITED_RANGE = 1  # the tag of ISO 23091-2
AAC_BIT_RATE = 192_000
LAYOUTS = {1: "mono", 2: "stereo"}
AAC_BITS_PER_SAMPLE = 6  # the format's limit, 6144 bits per frame of 1024 samples: 96 kb/s at 16 kHz
MOST_BYTES = 4 << 30  # of frames that one clip may fill: 4 hours at 64x64
MATROSKA, SEGMENT = "matroska,webm", b"\x18\x53\x80\x67"  # the id of the element that holds all others
SEARCHED = 4096  # bytes in which the segment begins: more than a Matroska file's first element takes
TAIL_SECONDS = Fraction(1, 4)  # a whole file may end this much earlier than its header says

S = TypeVar("S", bound=Stream)


class MediaNote(UserWarning):
    """Say in one line what was changed to read a file on our clock."""


class _Picture(NamedTuple):
    frames: np.ndarray
    start: Fraction
    end: Fraction
    declared: Fraction
    notes: list[str]


class _Sound(NamedTuple):
    samples: np.ndarray
    end: Fraction
    notes: list[str]


def read_clip(
    path: str | Path, *, clock: Clock = CLOCK, size: tuple[int, int] | None = (64, 64), seconds: int | None = None
) -> AV[np.ndarray]:
    """Read a video file of any rate, size and sound as a clip on `clock`.

    Each frame is the picture shown at its time, upright, cropped about the centre to the aspect of `size` and scaled.
    Sound is mixed to mono, resampled and placed by its timestamps. Of several tracks the default one is read. A
    `MediaNote` warning says what was changed in time, shape, light or sound.

    Args:
        path: of the file.
        clock: of the clip.
        size: height and width of its frames; None keeps the file's own.
        seconds: reads the first K seconds (24K + 1 frames), None all.

    Shapes: frames uint8 [F, H, W, 3], samples float32 [clock.samples_of(F)] in [-1, 1].

    Raises:
        ValueError: the file is missing, is no media file, has no picture, is truncated, shorter than `seconds` or too
            long for the memory.
    """
    path = Path(path)
    wanted = None if seconds is None else clock.frames(range(clock.latents(seconds).video)).stop
    with _opened(path) as container:
        picture = _read_picture(path, container, clock.fps, size, wanted)
    with _opened(path) as container:
        sound = _read_sound(path, container, clock, picture.start, len(picture.frames), to_the_end=wanted is None)
        if wanted is None and container.format.name != MATROSKA:
            length = picture.end - picture.start if picture.declared else max(picture.end, sound.end)
            declared = picture.declared or Fraction(container.duration or 0, av.time_base)
            if length < declared - TAIL_SECONDS:
                _refuse_truncated(path, f"{float(declared):.2f} s", f"{float(length):.2f} s")
    if notes := picture.notes + sound.notes:
        warnings.warn(f"{path.name}: {'; '.join(notes)}", MediaNote, stacklevel=2)
    return AV(picture.frames, sound.samples)


@contextmanager
def _opened(path: Path) -> Iterator[InputContainer]:
    """Open a file for reading, and turn errors of FFmpeg into a ValueError that names the file."""
    if not path.is_file() or not path.stat().st_size:
        problem = "an empty file" if path.is_file() else "a folder" if path.is_dir() else "nothing there"
        raise ValueError(f"{path}: expected a video file, found {problem}")
    try:
        with av.open(str(path), metadata_errors="replace") as container:
            yield container
    except FFmpegError as error:
        problem = f"what FFmpeg calls {error.strerror!r}"
        raise ValueError(f"{path}: expected a whole video file, found {problem}; get the file again") from error


def _refuse_truncated(path: Path, expected: str, found: str) -> NoReturn:
    lengths = f"expected {expected} as its header says, found {found}"
    raise ValueError(f"{path}: {lengths}: the file is truncated; get it again or read fewer seconds")


def _last_shown(path: Path, container: InputContainer, stream: av.VideoStream, *, whole: bool) -> Fraction:
    """Read until when a Matroska file shows its last picture; 0 where it does not say.

    A block need not say how long it lasts, and FFmpeg reports the longest stream's length for all streams. A tag tells
    it, limited by the file's length because tools that cut a film copy the tag of the whole one; without sound, the
    file's length tells it. Raises ValueError if the file is to be read `whole` and is truncated.
    """
    if container.format.name != MATROSKA:
        return Fraction(0)
    if (end := _segment_end(path)) > path.stat().st_size:
        if whole:
            _refuse_truncated(path, f"{end} bytes", str(path.stat().st_size))
        return Fraction(0)
    length = Fraction(container.duration or 0, av.time_base)
    if time := re.fullmatch(r"(\d{1,9}):(\d\d):(\d\d(?:\.\d{1,9})?)", stream.metadata.get("DURATION", "")):
        return min(length, int(time[1]) * 3600 + int(time[2]) * 60 + Fraction(time[3]))
    return Fraction(0) if container.streams.audio else length


def _segment_end(path: Path) -> int:
    """Give the byte at which a Matroska file says that it ends; 0 where it does not, its writer was not closed."""
    with path.open("rb") as file:
        segment = re.search(SEGMENT + b"(.{8})", file.read(SEARCHED), re.DOTALL)
    if not segment or not segment[1][0]:
        return 0
    # Sizes are written in 1 to 8 bytes; the zeros before the first one say in how many, and all ones mean "unknown".
    width = 9 - segment[1][0].bit_length()
    size = int.from_bytes(segment[1][:width]) - (1 << 7 * width)
    return 0 if size == (1 << 7 * width) - 1 else segment.start(1) + width + size


def _default(streams: Sequence[S]) -> S:
    """Choose the track that the file calls the default one, else the first."""
    return next((stream for stream in streams if stream.disposition & Disposition.default), streams[0])


def _read_picture(
    path: Path, container: InputContainer, fps: int, size: tuple[int, int] | None, wanted: int | None
) -> _Picture:
    # 1. Choose the track. For FFmpeg a music file's cover is a video stream, and a text file is a video of letters.
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams or container.format.name == "tty":
        streams_found = "text" if streams else " and ".join(s.type for s in container.streams) or "no stream"
        raise ValueError(f"{path}: expected a video stream, found {streams_found}")
    stream = _default(streams)
    _check_codec(path, stream)
    # 2. Take for each tick of the clock the picture that is shown, fitted to the size.
    shown = Shown(container, stream, _last_shown(path, container, stream, whole=wanted is None))
    fit = Fit(size, stream.sample_aspect_ratio)
    frames: list[np.ndarray] = []
    for frame in on_show(_bounded(path, shown, fps, size, wanted), fps):
        try:
            frames.append(fit(frame))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        if len(frames) == wanted:
            break
    # 3. A film that ends one frame early is completed; one that ends earlier is refused.
    notes = shown.notes(fps) + fit.notes()
    if wanted is not None and len(frames) == wanted - 1:
        frames.append(frames[-1])
        notes.append(f"{wanted} frames make {wanted // fps} s and a first one, found {wanted - 1}: last one held")
    if not frames or len(frames) < (wanted or 1):
        length = f"{len(frames)} ({float(len(frames) / fps):.2f} s)"
        raise ValueError(f"{path}: expected {wanted or 'some'} frames at {fps} fps, found {length}; read fewer seconds")
    declared = (stream.duration or 0) * (stream.time_base or Fraction(0))
    return _Picture(np.stack(frames), shown.start, shown.end, declared, notes)


def _check_codec(path: Path, stream: av.VideoStream | av.AudioStream) -> None:
    if stream.codec_context is None:
        raise ValueError(
            f"{path}: expected {stream.type} in a codec that FFmpeg knows, found another; convert the file"
        )


def _bounded(
    path: Path, shown: Shown, fps: int, size: tuple[int, int] | None, wanted: int | None
) -> Iterator[tuple[Fraction, Fraction, av.VideoFrame]]:
    """Pass on what is shown, but refuse what would fill the memory: a damaged file may claim any timestamp."""
    for start, stop, frame in shown:
        height, width = size or (frame.height, frame.width)
        count = int(max(start, stop) * fps) if wanted is None else wanted
        if count * height * width * 3 > MOST_BYTES:
            claimed = f"{count} frames of {width}x{height} ({count / fps:.0f} s)"
            raise ValueError(
                f"{path}: expected at most {MOST_BYTES / 1e9:.1f} GB of frames, found {claimed}; read fewer"
            )
        yield start, stop, frame


def _read_sound(
    path: Path, container: InputContainer, clock: Clock, origin: Fraction, frames: int, *, to_the_end: bool
) -> _Sound:
    length = clock.samples_of(frames)
    if not container.streams.audio:
        return _Sound(np.zeros(length, np.float32), Fraction(0), ["no sound: silence instead"])
    stream = _default(container.streams.audio)
    _check_codec(path, stream)
    note = f"{stream.rate} Hz {stream.layout.name} -> {clock.sample_rate} Hz mono"
    notes = [] if (stream.rate, stream.layout.nb_channels) == (clock.sample_rate, 1) else [note]
    track = Track(clock.sample_rate, origin, length)
    needed = origin + Fraction(length, clock.sample_rate)
    for frame in container.decode(stream):
        track.add(frame)
        if not to_the_end and track.end > needed + 1:
            break
    track.flush()
    if (missing := needed - track.end) > TAIL_SECONDS:
        notes.append(f"sound ends {float(missing):.2f} s before the picture: silence after it")
    if to_the_end and -missing > TAIL_SECONDS:
        notes.append(f"sound goes on for {float(-missing):.2f} s after the picture: left out")
    return _Sound(track.samples.clip(-1, 1), track.end, notes)


class ClipWriter:
    """Write an mp4 (H.264 and AAC) piece by piece; the whole file appears when the `with` block ends without error.

    Until then it grows in a folder beside its place, `.NAME.PROCESS.part`, and plays, all but the last seconds: a run
    that is killed leaves it there, and one that is interrupted (Ctrl-C) finishes it as `NAME.cut.mp4`.

    Frames are enlarged by a whole factor `scale`; None takes the smallest that makes the short side at least
    SHORT_SIDE and both sides even, as H.264's halved chroma needs. `read_clip` scales back. Sound has 1 or 2
    `channels`.

    Raises:
        ValueError: a side is odd after `scale`, a piece has another shape, or nothing was written.
    """

    def __init__(
        self,
        path: str | Path,
        clock: Clock = CLOCK,
        size: tuple[int, int] = (64, 64),
        *,
        scale: int | None = None,
        channels: int = 1,
    ) -> None:
        self.path, self.clock, self.size, self.channels = Path(path), clock, size, channels
        self.scale = _whole_scale(size) if scale is None else scale
        self.written, self._scaler = AV(0, 0), VideoReformatter()
        if any(side * self.scale % 2 or side < 1 for side in size):
            sides = f"{size[0]}x{size[1]} at scale {self.scale}"
            raise ValueError(f"{path}: H.264 needs even sides, found {sides}; use an even scale or None")

    def __enter__(self) -> ClipWriter:
        with ExitStack() as stack:
            partial = stack.enter_context(replacing(self.path))
            options = {"movflags": "+delay_moov+default_base_moof", "frag_duration": "1000000", "flush_packets": "1"}
            options |= {"fflags": "+bitexact"}
            self._container = stack.enter_context(av.open(str(partial), "w", format="mp4", options=options))
            self._streams: AV[Any] = AV(self._add_picture(), self._add_sound())
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            if isinstance(error, KeyboardInterrupt) and min(self.written):
                self._finish(self.path.with_suffix(f".cut{self.path.suffix}"))
            self._stack.__exit__(kind, error, trace)
            return
        with self._stack:
            if not min(self.written):
                raise ValueError(f"{self.path}: expected frames and samples, found {tuple(self.written)}; write some")
            partial = Path(self._container.name)
            os.replace(self._finish(partial.with_name("whole")), partial)

    def write(self, piece: AV[np.ndarray]) -> None:
        """Append frames and samples; a piece may hold any number of either.

        Shapes: frames uint8 [F, H, W, 3], samples float [N], or [N, 2]; values beyond [-1, 1] are clipped.
        """
        _check_piece(self.path, piece, self.size, self.channels)
        for frame in piece.video:
            self._write_frame(frame)
        if len(piece.audio):
            self._write_samples(piece.audio.clip(-1, 1).astype(np.float32))

    def _finish(self, path: Path) -> Path:
        """End both streams, and copy the fragments into a file with one index in front of all."""
        for stream in self._streams:
            self._container.mux(stream.encode(None))
        self._container.close()
        options = {"movflags": "+faststart", "fflags": "+bitexact"}
        with av.open(self._container.name) as parts, av.open(str(path), "w", format="mp4", options=options) as whole:
            streams = [whole.add_stream_from_template(stream) for stream in parts.streams]
            for packet in parts.demux():
                if packet.dts is not None:  # what ends a stream has no time
                    packet.stream = streams[packet.stream_index]
                    whole.mux(packet)
        return path

    def _add_picture(self) -> av.VideoStream:
        stream = self._container.add_stream("libx264", rate=self.clock.fps, options={"crf": "12", "preset": "veryfast"})
        stream.height, stream.width = (side * self.scale for side in self.size)
        stream.pix_fmt = "yuv420p"
        context = stream.codec_context
        context.thread_count = max(1, stream.height // ROWS_OF_A_THREAD)
        context.colorspace = context.color_primaries = context.color_trc = BT709
        context.color_range = LIMITED_RANGE
        return stream

    def _add_sound(self) -> av.AudioStream:
        rate = self.clock.sample_rate
        stream = self._container.add_stream("aac", rate=rate, layout=LAYOUTS[self.channels])
        stream.bit_rate = min(AAC_BIT_RATE, AAC_BITS_PER_SAMPLE * rate)
        return stream

    def _write_frame(self, pixels: np.ndarray) -> None:
        enlarged = pixels.repeat(self.scale, axis=1).repeat(self.scale, axis=0)  # whole rows are copied last: faster
        frame = self._scaler.reformat(
            av.VideoFrame.from_ndarray(enlarged, "rgb24"),
            format="yuv420p",
            dst_colorspace=Colorspace.ITU709,
            dst_color_range=LIMITED_RANGE,
            interpolation=SCALER,
            threads=1,
        )
        frame.pts, frame.time_base = self.written.video, Fraction(1, self.clock.fps)
        self._container.mux(self._streams.video.encode(frame))
        self.written = self.written._replace(video=self.written.video + 1)

    def _write_samples(self, samples: np.ndarray) -> None:
        planes = np.ascontiguousarray(samples.reshape(len(samples), self.channels).T)
        frame = av.AudioFrame.from_ndarray(planes, "fltp", LAYOUTS[self.channels])
        frame.sample_rate = self.clock.sample_rate
        # A frame without a time is muxed as if the encoder's priming were sound: 64 ms late at 16 kHz.
        frame.pts, frame.time_base = self.written.audio, Fraction(1, self.clock.sample_rate)
        self._container.mux(self._streams.audio.encode(frame))
        self.written = self.written._replace(audio=self.written.audio + len(samples))


def write_clip(path: str | Path, clip: AV[np.ndarray], clock: Clock = CLOCK, *, scale: int | None = None) -> Path:
    """Write a whole clip as an mp4, atomically, and return its path; `scale` as in `ClipWriter`.

    Shapes: frames uint8 [F, H, W, 3], samples float [N], or [N, 2] for stereo, in [-1, 1].
    """
    return write_pieces(path, [clip], clock, scale=scale)


def write_pieces(
    path: str | Path, pieces: Iterable[AV[np.ndarray]], clock: Clock = CLOCK, *, scale: int | None = None
) -> Path:
    """Write a clip as its pieces come, and keep none of them in memory; otherwise as `write_clip`."""
    pieces = iter(pieces)
    piece = next(pieces)
    channels = 1 if piece.audio.ndim == 1 else piece.audio.shape[1]
    with ClipWriter(path, clock, piece.video.shape[1:3], scale=scale, channels=channels) as writer:
        while piece is not None:
            writer.write(piece)
            piece = None  # freed before the next one is made
            piece = next(pieces, None)
    return Path(path)


def wav_bytes(samples: np.ndarray, rate: int = CLOCK.sample_rate) -> bytes:
    """Render sound as the bytes of a 16-bit wav file.

    Shapes: samples float [N], or [N, 2] for stereo, in [-1, 1], `rate` per second.
    """
    with io.BytesIO() as buffer:
        with open_wav(buffer, samples.shape[1] if samples.ndim == 2 else 1, rate) as sound:
            sound.writeframes(pcm(samples))
        return buffer.getvalue()


def open_wav(target: str | BinaryIO, channels: int, rate: int) -> wave.Wave_write:
    """Begin a 16-bit wav file; `writeframes(pcm(samples))` appends to it."""
    sound = wave.open(target, "wb")
    sound.setparams((channels, 2, rate, 0, "NONE", ""))
    return sound


def pcm(samples: np.ndarray) -> bytes:
    """Render sound as 16-bit numbers, low byte first, channels interleaved; values beyond [-1, 1] are clipped.

    Shapes: samples float [N] or [N, 2].
    """
    return np.rint(samples.clip(-1, 1) * 32767).astype("<i2").tobytes()


def _whole_scale(size: tuple[int, int]) -> int:
    scale = max(1, -(-SHORT_SIDE // min(size)))
    return scale + 1 if scale % 2 and any(side % 2 for side in size) else scale


def _check_piece(path: Path, piece: AV[np.ndarray], size: tuple[int, int], channels: int) -> None:
    frames, samples = piece
    if frames.dtype != np.uint8 or frames.shape[1:] != (*size, 3):
        shape = f"{frames.dtype} {list(frames.shape)}"
        raise ValueError(f"{path}: expected frames uint8 [F, {size[0]}, {size[1]}, 3], found {shape}")
    has_channels = samples.shape[1:] == ((channels,) if channels > 1 else ())
    if not has_channels or samples.dtype.kind != "f" or not np.isfinite(samples).all():
        shape, expected = f"{samples.dtype} {list(samples.shape)}", "[N]" if channels == 1 else "[N, 2]"
        raise ValueError(
            f"{path}: expected finite float samples {expected}, found {shape}; mix to mono or make a stereo writer"
        )
