"""What a file shows and sounds, placed by its timestamps: the parts that `media.read_clip` is made of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from fractions import Fraction

import av
import numpy as np
from av.video.reformatter import Colorspace, Interpolation, VideoReformatter

SCALER = Interpolation.AREA | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.FULL_CHR_H_INP
UNTAGGED = 2  # the colour tag of ISO 23091-2 for "not said"
HD_HEIGHT = 720  # by convention an untagged picture is BT.709 from this height and BT.601 below
MOST_PIXELS = 1 << 26  # of one picture: twice 8K; a header may claim more than any memory holds
GAP_SECONDS = Fraction(1, 100)  # Matroska rounds times to milliseconds: less than this is not a gap in the sound


class Shown:
    """Iterate over (start, end, frame) of a video stream in seconds and remember when it started and ended."""

    def __init__(self, container: av.container.InputContainer, stream: av.VideoStream) -> None:
        stream.thread_type = "AUTO"
        stream.codec_context.options = {"max_pixels": str(MOST_PIXELS)}
        self.container, self.stream = container, stream
        self.start = self.end = Fraction(0)
        self.count = 0

    def __iter__(self) -> Iterator[tuple[Fraction, Fraction, av.VideoFrame]]:
        usual = 1 / Fraction(self.stream.average_rate or 24)
        for frame in self.container.decode(self.stream):
            time = self.end if frame.pts is None else frame.pts * frame.time_base
            if not self.count:
                self.start = time
            self.count += 1
            self.end = time + (frame.duration * frame.time_base if frame.duration else usual)
            yield time - self.start, self.end - self.start, frame

    def notes(self, fps: int) -> list[str]:
        """Say that the rate changes, if it does."""
        rate = self.stream.average_rate
        return [] if rate == fps else [f"{float(rate or 0):.5g} -> {fps} frames a second"]


def nearest(shown: Iterable[tuple[Fraction, Fraction, av.VideoFrame]], fps: int) -> Iterator[av.VideoFrame]:
    """Yield for each tick of `fps` the frame that starts nearest; `shown` gives (start, end, frame), starts growing."""
    tick, frame = 0, None
    begin = end = Fraction(0)
    for time, stop, after in shown:
        while frame is not None and Fraction(2 * tick, fps) <= begin + time:
            yield frame
            tick += 1
        begin, end, frame = time, stop, after
    while frame is not None and Fraction(2 * tick, fps) < begin + end:
        yield frame
        tick += 1


class Fit:
    """Turn decoded frames into RGB arrays of one size: square pixels, upright, cropped about the centre."""

    def __init__(self, size: tuple[int, int] | None, pixel_aspect: Fraction | None) -> None:
        self.size, self.pixel_aspect, self.scaler = size, pixel_aspect or Fraction(1), VideoReformatter()
        self.source = (0, 0)

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        """Render one frame; ValueError if so much is cut off that what is cut would fill the memory.

        Shapes: returns uint8 [H, W, 3].
        """
        quarters = round(frame.rotation / 90)
        stored = (frame.height, round(frame.width * self.pixel_aspect))
        self.source = _turned(stored, quarters)
        height, width = _turned(self.size, quarters) if self.size else stored
        factor = max(height / stored[0], width / stored[1])
        if stored[0] * stored[1] * factor**2 > MOST_PIXELS:
            raise ValueError(f"a picture of {stored[1]}x{stored[0]} is too narrow for {width}x{height}; crop the file")
        pixels = self._scaled(frame, stored, factor)
        top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
        return np.ascontiguousarray(np.rot90(pixels[top : top + height, left : left + width], quarters))

    def _scaled(self, frame: av.VideoFrame, stored: tuple[int, int], factor: float) -> np.ndarray:
        guess = Colorspace.ITU709 if frame.height >= HD_HEIGHT else Colorspace.ITU601
        return self.scaler.reformat(
            frame,
            height=round(stored[0] * factor),
            width=round(stored[1] * factor),
            format="rgb24",
            src_colorspace=guess if frame.colorspace == UNTAGGED else None,
            interpolation=SCALER,
            threads=1,
        ).to_ndarray()

    def notes(self) -> list[str]:
        """Say that pixels were cut off, if they were."""
        if self.size is None or self.size[0] * self.source[1] == self.size[1] * self.source[0]:
            return []
        return [f"{self.source[1]}x{self.source[0]} cropped about the centre to {self.size[1]}:{self.size[0]}"]


def _turned(size: tuple[int, int], quarters: int) -> tuple[int, int]:
    return size[::-1] if quarters % 2 else size


class Track:
    """A stretch of mono sound on our clock, filled by frames that know when they sound."""

    def __init__(self, rate: int, origin: Fraction, length: int) -> None:
        self.rate, self.origin = rate, origin
        self.samples = np.zeros(length, np.float32)
        self.end = origin
        self.form: tuple[str, str, int] | None = None
        self.resampler: av.AudioResampler | None = None
        self.position = 0

    def add(self, frame: av.AudioFrame) -> None:
        """Mix, resample and place one frame; a gap before it stays silent."""
        time = self.end if frame.pts is None else frame.pts * frame.time_base
        form = (frame.format.name, frame.layout.name, frame.sample_rate)
        if form != self.form or abs(time - self.end) > GAP_SECONDS:
            self.flush()
            # FFmpeg's own mix of two channels is louder than either by 3 dB: the limit keeps a mix within [-1, 1].
            self.resampler = av.AudioResampler("fltp", "mono", self.rate, options={"rematrix_maxval": "1.0"})
            self.form, self.end = form, time
            self.position = round((time - self.origin) * self.rate)
        self.end += Fraction(frame.samples, frame.sample_rate)
        self._place(self.resampler.resample(frame))

    def flush(self) -> None:
        """Place what the resampler still holds."""
        if self.resampler is not None:
            self._place(self.resampler.resample(None))
            self.resampler = None

    def _place(self, frames: list[av.AudioFrame | None]) -> None:
        for frame in frames:
            piece = np.empty(0) if frame is None else frame.to_ndarray()[0]
            start, stop = max(self.position, 0), max(self.position + len(piece), 0)
            room = self.samples[start:stop]
            room[:] = piece[start - self.position :][: len(room)]
            self.position += len(piece)
