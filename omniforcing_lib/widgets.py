"""Things to touch in a notebook. Each has a still twin in `plots`, so that a stored notebook reads without a kernel."""

from __future__ import annotations

import io
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Protocol

import ipywidgets as ipw
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from omniforcing_lib import masks, plots
from omniforcing_lib.layout import AV, LAYOUTS, Clock
from omniforcing_lib.media import wav_bytes

CLOCK = Clock()
STALL_SECONDS = 0.25  # later than this, the player stops catching up and starts its clock anew


class Chunk(Protocol):
    """A piece of a stream.

    Shapes: frames uint8 [F, H, W, 3], samples float [N] mono.
    """

    frames: np.ndarray
    samples: np.ndarray
    start_s: float
    prompt: str


class Stream(Protocol):
    """What gives chunks one by one and takes another prompt between two of them."""

    prompt: str

    def __iter__(self) -> Iterator[Chunk]: ...

    def set_prompt(self, prompt: str) -> None:
        """Follow another prompt from the next chunk on; raise ValueError if it cannot be followed."""


def mask_explorer(seconds: int = 3, tokens_per_frame: int = 16) -> ipw.VBox:
    """Choose a layout, a number of sinks and a block, and see the four masks; the still twin is `plots.mask_grid`."""
    name = ipw.Dropdown(options=list(LAYOUTS), description="layout")
    sinks = ipw.IntSlider(LAYOUTS[name.value].sinks, 0, 24, description="sinks", continuous_update=False)
    block = ipw.Dropdown(description="block")
    picture = ipw.Image(format="png")
    latents = CLOCK.latents(seconds).video

    def draw(_: object = None) -> None:
        layout = replace(LAYOUTS[name.value], sinks=sinks.value)
        dense = {side: mask.numpy() for side, mask in masks.dense(layout, latents, tokens_per_frame).items()}
        picture.value = png(plots.mask_grid(dense, layout, latents, tokens_per_frame, block=block.value))

    def lay_out(_: object = None) -> None:
        layout = LAYOUTS[name.value]
        block.options = [("all", None), *((str(k), k) for k in range(layout.count(latents)))]
        sinks.value = layout.sinks
        draw()

    lay_out()
    name.observe(lay_out, "value")
    for control in (sinks, block):
        control.observe(draw, "value")
    return ipw.VBox([ipw.HBox([name, sinks, block]), picture])


def clip_browser(
    clips: Sequence[AV[np.ndarray]],
    titles: Sequence[str],
    events: Sequence[tuple[Sequence[plots.Timed], Sequence[plots.Timed]]] | None = None,
    clock: Clock = CLOCK,
) -> ipw.VBox:
    """Choose a clip, see its strip with its events (impacts, onsets) and hear it; the still twin is `plots.strip`.

    Shapes: each clip frames uint8 [F, H, W, 3], samples float [N].
    """
    if len(clips) != len(titles) or not clips:
        raise ValueError(f"expected a title for each clip, found {len(clips)} clips and {len(titles)} titles")
    choice = ipw.Dropdown(options=[(title, i) for i, title in enumerate(titles)], description="clip")
    picture, sound = ipw.Image(format="png"), ipw.Audio(format="wav", autoplay=False, loop=False)

    def show(_: object = None) -> None:
        clip, seen = clips[choice.value], events[choice.value] if events else (None, None)
        picture.value = png(plots.strip(clip, *seen, title=titles[choice.value], clock=clock))
        sound.value = wav_bytes(clip.audio, clock.sample_rate)

    show()
    choice.observe(show, "value")
    return ipw.VBox([choice, picture, sound])


def png(fig: Figure) -> bytes:
    """Render a figure as the bytes of a PNG."""
    with io.BytesIO() as buffer:
        fig.savefig(buffer, format="png", metadata={"Software": None})
        return buffer.getvalue()


def jpeg(frame: np.ndarray, scale: int = 4) -> bytes:
    """Render a frame, enlarged by a whole factor, as the bytes of a JPEG.

    Shapes: uint8 [H, W, 3].
    """
    with io.BytesIO() as buffer:
        Image.fromarray(frame.repeat(scale, axis=0).repeat(scale, axis=1)).save(buffer, "jpeg", quality=92)
        return buffer.getvalue()


class Player(ipw.VBox):
    """Play a stream live: frames at their pace, the sound of each chunk with it, a prompt to change on the way.

    A thread shows one chunk while another makes the next, so the notebook stays free. Pausing holds the picture; the
    chunk in the ear plays out. The still twin is `plots.strip` of the chunks joined.
    """

    def __init__(self, stream: Stream, *, clock: Clock = CLOCK, scale: int = 4) -> None:
        self.stream, self.clock, self.scale = stream, clock, scale
        self.picture, self.sound = ipw.Image(format="jpeg"), ipw.Audio(format="wav", autoplay=True, loop=False)
        self.prompt = ipw.Text(stream.prompt, description="prompt", continuous_update=False)
        self.button = ipw.ToggleButton(value=False, description="play", icon="play")
        self.readout = ipw.Label("ready")
        super().__init__([ipw.HBox([self.prompt, self.button]), self.picture, self.sound, self.readout])
        self._wish: str | None = None
        self._complaint = ""
        self._playing, self._stopped = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._times: deque[float] = deque(maxlen=clock.fps)
        self._due = 0.0
        self.button.observe(lambda change: self.play() if change.new else self.pause(), "value")
        self.prompt.observe(self._ask, "value")

    def play(self) -> None:
        """Start, or go on."""
        if self._thread.ident is None:
            self._thread.start()
        self._playing.set()
        self.button.value = True

    def pause(self) -> None:
        """Hold the picture; nothing is made beyond the next chunk."""
        self._playing.clear()
        self.button.value = False

    def stop(self) -> None:
        """End for good and wait for the threads; the stream itself stays usable."""
        self._stopped.set()
        self._playing.set()
        if self._thread.ident is not None:
            self._thread.join()
        self.pause()

    def _ask(self, change: object) -> None:
        # The stream is in the maker's hands, which takes the wish between two chunks.
        self._wish = self.prompt.value

    def _run(self) -> None:
        chunks = iter(self.stream)
        with ThreadPoolExecutor(1) as maker:
            coming = maker.submit(self._make, chunks)
            while not self._stopped.is_set():
                if error := coming.exception():
                    self.readout.value = f"the stream failed: {error}"
                    return
                chunk, seconds = coming.result()
                if chunk is None:
                    self.readout.value = f"the stream ended; {self.readout.value}"
                    return
                coming = maker.submit(self._make, chunks)
                self._show(chunk, seconds)

    def _make(self, chunks: Iterator[Chunk]) -> tuple[Chunk | None, float]:
        wish, self._wish = self._wish, None
        began = time.perf_counter()
        if wish is not None:
            self._follow(wish)
        return next(chunks, None), time.perf_counter() - began

    def _follow(self, wish: str) -> None:
        try:
            self.stream.set_prompt(wish)
            self._complaint = ""
        except ValueError as error:
            self._complaint = f" · {error}"

    def _show(self, chunk: Chunk, seconds: float) -> None:
        self.sound.value = wav_bytes(chunk.samples, self.clock.sample_rate)
        for i, frame in enumerate(chunk.frames):
            self._wait()
            if self._stopped.is_set():
                return
            self.picture.value = jpeg(frame, self.scale)
            self._times.append(time.perf_counter())
            if i == len(chunk.frames) - 1:
                self._tell(chunk, seconds)

    def _wait(self) -> None:
        """Sleep until the next frame is due, and as long as the player is paused."""
        self._playing.wait()
        now = time.perf_counter()
        if now > self._due + STALL_SECONDS:
            self._due = now
        time.sleep(max(0.0, self._due - now))
        self._due += 1 / self.clock.fps

    def _tell(self, chunk: Chunk, seconds: float) -> None:
        span = self._times[-1] - self._times[0]
        pace = f"{(len(self._times) - 1) / span:.1f} frames a second" if span else "first frame"
        length = len(chunk.frames) / self.clock.fps
        made = f"{length:.2f} s made in {seconds:.2f} s"
        self.readout.value = f"{chunk.start_s + length:.1f} s · {pace} · {made} · {chunk.prompt}{self._complaint}"
