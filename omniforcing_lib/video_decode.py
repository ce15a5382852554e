"""Pictures and sound of a video file, placed by their timestamps: the parts of `media.read_clip`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from fractions import Fraction
from heapq import heappop, heappush
from typing import Any

import av
import numpy as np
from av.container import InputContainer
from av.video.reformatter import Colorspace, Interpolation, VideoReformatter

SCALER = Interpolation.AREA | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.FULL_CHR_H_INP
BT709, UNTAGGED = 1, 2  # colour tags of ISO 23091-2; the second means "unspecified"
HDR = {16: "PQ", 18: "HLG"}  # transfer functions of HDR in ISO 23091-2
SDR_WHITE = 203  # cd/m2 of HDR's reference white, which is 255 in SDR
BT2020_TO_BT709 = np.array([(1.6605, -0.5876, -0.0728), (-0.1246, 1.1329, -0.0083), (-0.0182, -0.1006, 1.1187)]).T
TURNS = ((1, 0, 0, 1), (0, -1, 1, 0), (-1, 0, 0, -1), (0, 1, -1, 0))  # display matrices, quarters counterclockwise
HD_HEIGHT = 720  # by convention an untagged picture is BT.709 from this height and BT.601 below
MOST_PIXELS = 1 << 26  # of one picture: twice 8K; a damaged header may claim any size
DECODING_ORDER = {"avi", "asf"}  # formats whose timestamps say when a packet is decoded, not when its picture is shown
GAP_SECONDS = Fraction(1, 100)  # less is no gap in the sound, because Matroska rounds timestamps to milliseconds


class Shown:
    """Iterate over (start, end, frame) of a video stream in seconds; `start` and `end` are those of the whole stream.

    Starts never decrease. The last picture is shown until `until` at least.
    """

    def __init__(self, container: InputContainer, stream: av.VideoStream, until: Fraction = Fraction(0)) -> None:
        stream.thread_type = "AUTO"
        stream.codec_context.options = {"max_pixels": str(MOST_PIXELS)}
        self.container, self.stream, self.until = container, stream, until
        self.start = self.end = Fraction(0)
        self.count = 0

    def __iter__(self) -> Iterator[tuple[Fraction, Fraction, av.VideoFrame]]:
        usual, latest = 1 / Fraction(self.stream.average_rate or 24), None
        for ticks, frame in self._timed():
            time = self.end if ticks is None else ticks * (frame.time_base or Fraction(1))
            latest = time if latest is None else max(time, latest)
            if not self.count:
                self.start = latest
            self.count += 1
            self.end = latest + (frame.duration * (frame.time_base or Fraction(1)) if frame.duration else usual)
            yield latest - self.start, max(self.end, self.until) - self.start, frame

    def _timed(self) -> Iterator[tuple[int | None, av.VideoFrame]]:
        """Give each frame its time; where only packets have times, the n-th picture shown gets the n-th time."""
        ordered = self.container.format.name not in DECODING_ORDER
        times: list[int] = []
        for packet in self.container.demux(self.stream):
            if packet.dts is not None and packet.size:
                heappush(times, packet.dts)
            for frame in packet.decode():
                yield frame.pts if ordered else heappop(times) if times else None, frame

    def notes(self, fps: int) -> list[str]:
        """Say that the rate changes, if it does."""
        rate = self.stream.average_rate
        return [] if rate == fps else [f"{float(rate or 0):.5g} -> {fps} frames per second"]


def on_show(shown: Iterable[tuple[Fraction, Fraction, av.VideoFrame]], fps: int) -> Iterator[av.VideoFrame]:
    """Yield for each tick of `fps` the frame that is shown: the last that starts at most half a tick after it.

    `shown` gives (start, end, frame) with increasing starts from 0; the last frame is shown until its end.
    """
    tick, frame, end = 0, None, Fraction(0)
    for time, stop, next_frame in shown:
        while frame is not None and Fraction(2 * tick + 1, 2 * fps) < time:
            yield frame
            tick += 1
        frame, end = next_frame, stop
    while frame is not None and (not tick or Fraction(2 * tick + 1, 2 * fps) < end):
        yield frame
        tick += 1


class Fit:
    """Turn decoded frames into RGB arrays of one size: square pixels, upright, SDR, cropped about the centre."""

    def __init__(self, size: tuple[int, int] | None, pixel_aspect: Fraction | None) -> None:
        self.size, self.pixel_aspect, self.scaler = size, pixel_aspect or Fraction(1), VideoReformatter()
        self.source, self.transfer = (0, 0), UNTAGGED

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        """Render one frame; ValueError if it has to be scaled so much before cropping that it would fill the memory.

        Shapes: returns uint8 [H, W, 3].
        """
        a, b, c, d = _axes(frame)
        turned = abs(a) + abs(d) < abs(b) + abs(c)
        right, down = (c, b) if turned else (a, d)
        stored = (frame.height, round(frame.width * self.pixel_aspect))
        self.source, self.transfer = stored[:: -1 if turned else 1], frame.color_trc
        height, width = (self.size or self.source)[:: -1 if turned else 1]
        factor = max(height / stored[0], width / stored[1])
        if stored[0] * stored[1] * factor**2 > MOST_PIXELS:
            raise ValueError(f"a picture of {stored[1]}x{stored[0]} is too narrow for {width}x{height}; crop the file")
        pixels = self._scaled(frame, stored, factor)
        top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
        pixels = pixels[top : top + height, left : left + width]
        pixels = (pixels.swapaxes(0, 1) if turned else pixels)[:: -1 if down < 0 else 1, :: -1 if right < 0 else 1]
        pixels = on_sdr(pixels, frame.color_trc, frame.color_primaries) if frame.color_trc in HDR else pixels
        return np.ascontiguousarray(pixels)

    def _scaled(self, frame: av.VideoFrame, stored: tuple[int, int], factor: float) -> np.ndarray:
        hdr = frame.color_trc in HDR
        guess = Colorspace.ITU709 if frame.height >= HD_HEIGHT else Colorspace.ITU601
        return self.scaler.reformat(
            frame,
            height=round(stored[0] * factor),
            width=round(stored[1] * factor),
            format="gbrp16le" if hdr else "rgb24",
            src_colorspace=(Colorspace.BT2020 if hdr else guess) if frame.colorspace == UNTAGGED else None,
            interpolation=SCALER,
            threads=1,
        ).to_ndarray()

    def notes(self) -> list[str]:
        """Say what was cut off: pixels, or brightness."""
        notes = []
        if self.transfer in HDR:
            notes.append(f"{HDR[self.transfer]} -> SDR, what is brighter than {SDR_WHITE} cd/m2 cut off")
        if self.size and self.size[0] * self.source[1] != self.size[1] * self.source[0]:
            shape = f"{self.size[1]}:{self.size[0]}"
            notes.append(f"{self.source[1]}x{self.source[0]} cropped about the centre to {shape}")
        return notes


def _axes(frame: av.VideoFrame) -> tuple[int, int, int, int]:
    """Give the display matrix (a, b, c, d): stored axis x points to (a, b) on the screen, axis y to (c, d)."""
    side_data: Any
    with suppress(ValueError, KeyError):  # PyAV gives no side data at all if it has no name for some of it
        side_data = frame.side_data
        a, b, _, c, d = np.frombuffer(side_data["DISPLAYMATRIX"], np.int32)[:5].tolist()
        return a, b, c, d
    return TURNS[round(frame.rotation / 90) % 4]


def on_sdr(signal: np.ndarray, transfer: int, primaries: int) -> np.ndarray:
    """Convert a PQ or HLG picture to SDR whose white is HDR's reference white (BT.2408, BT.2100).

    Shapes: uint16 [H, W, 3] to uint8 [H, W, 3].
    """
    signal = signal / 65535
    if HDR[transfer] == "PQ":
        root = signal ** (32 / 2523)
        light = 10_000 * ((root - 3424 / 4096).clip(0) / (2413 / 128 - 2392 / 128 * root)) ** (16384 / 2610)
    else:
        scene = np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - 0.55991073) / 0.17883277) + 0.28466892) / 12)
        light = 1000 * scene * (scene @ (0.2627, 0.6780, 0.0593))[..., None] ** 0.2
    light = light / SDR_WHITE if primaries == BT709 else light / SDR_WHITE @ BT2020_TO_BT709
    return np.rint(255 * light.clip(0, 1) ** (1 / 2.4)).astype(np.uint8)


class Track:
    """A stretch of mono sound on our clock, filled by frames at their timestamps."""

    def __init__(self, rate: int, origin: Fraction, length: int) -> None:
        self.rate, self.origin = rate, origin
        self.samples = np.zeros(length, np.float32)
        self.end = origin
        self.form: tuple[str, str, int] | None = None
        self.resampler: av.AudioResampler | None = None
        self.position = 0

    def add(self, frame: av.AudioFrame) -> None:
        """Mix, resample and place one frame; a gap before it stays silent."""
        time = self.end if frame.pts is None else frame.pts * (frame.time_base or Fraction(1))
        form = (frame.format.name, frame.layout.name, frame.sample_rate)
        if form != self.form or abs(time - self.end) > GAP_SECONDS:
            self.flush()
            # FFmpeg's mix of two channels can be 3 dB louder than either; the option keeps it within [-1, 1].
            self.resampler = av.AudioResampler("fltp", "mono", self.rate, options={"rematrix_maxval": "1.0"})
            self.form, self.end = form, time
            self.position = round((time - self.origin) * self.rate)
        self.end += Fraction(frame.samples, frame.sample_rate)
        if self.resampler is not None:
            self._place(self.resampler.resample(frame))

    def flush(self) -> None:
        """Place the samples that are left in the resampler."""
        if self.resampler is not None:
            self._place(self.resampler.resample(None))
            self.resampler = None

    def _place(self, frames: Iterable[av.AudioFrame | None]) -> None:
        for frame in frames:
            piece = np.empty(0) if frame is None else frame.to_ndarray()[0]
            start, stop = max(self.position, 0), max(self.position + len(piece), 0)
            room = self.samples[start:stop]
            room[:] = piece[start - self.position :][: len(room)]
            self.position += len(piece)
