"""Things to touch in a notebook. Each has a still twin in `plots`, so that a stored notebook reads without a kernel."""

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Lock

import ipywidgets as ipw
import numpy as np
from anywidget import AnyWidget
from PIL import Image
from traitlets import Bool, Bunch, Int, Unicode

from omniforcing_lib import masks
from omniforcing_lib.layout import AV, LAYOUTS, Clock
from omniforcing_lib.media import pcm, wav_bytes
from omniforcing_lib.stream import Streamer
from series import plots

CLOCK = Clock()
HERE = Path(__file__).parent


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
        picture.value = plots.png(plots.mask_grid(dense, layout, latents, tokens_per_frame, block=block.value))

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
    *,
    ordered: bool = False,
) -> ipw.VBox:
    """Choose a clip, see its strip with its events (impacts, onsets) and hear it; the still twin is `plots.strip`.

    Clips that are `ordered`, such as the states of a denoising, are chosen by a slider.

    Shapes: each clip frames uint8 [F, H, W, 3], samples float [N].
    """
    if len(clips) != len(titles) or not clips:
        raise ValueError(f"expected a title for each clip, found {len(clips)} clips and {len(titles)} titles")
    chooser = ipw.SelectionSlider if ordered else ipw.Dropdown
    choice = chooser(options=[(title, i) for i, title in enumerate(titles)], description="clip")
    picture, sound = ipw.Image(format="png"), ipw.Audio(format="wav", autoplay=False, loop=False)

    def show(_: object = None) -> None:
        clip, seen = clips[choice.value], events[choice.value] if events else (None, None)
        picture.value = plots.png(plots.strip(clip, *seen, title=titles[choice.value], clock=clock))
        sound.value = wav_bytes(clip.audio, clock.sample_rate)

    show()
    choice.observe(show, "value")
    return ipw.VBox([choice, picture, sound])


def jpeg(frame: np.ndarray) -> bytes:
    """Render a frame as the bytes of a JPEG, colours as sharp as lightness and no rings that an eye finds.

    Shapes: uint8 [H, W, 3].
    """
    with io.BytesIO() as buffer:
        Image.fromarray(frame).save(buffer, "jpeg", quality=98, subsampling=0)
        return buffer.getvalue()


class Player(AnyWidget):
    """Play a stream live, in JupyterLab or Voilà: sound and picture on one clock, a prompt to change on the way.

    The page (`player.js`) holds the clock, the sound's own, and asks for a chunk when it nearly needs one; a thread
    then makes it, so the notebook stays free and a paused or closed page makes nothing. The still twin is
    `plots.strip` of the chunks joined.

    Attributes:
        prompt: what the stream shall follow, from the next chunk on.
        playing: whether the page plays; a browser wants a click before the first sound.
        notice: what the reader must know: a refused prompt, the end, a failure.
    """

    _esm = HERE / "player.js"
    _css = HERE / "player.css"
    prompt = Unicode().tag(sync=True)
    playing = Bool(False).tag(sync=True)
    notice = Unicode("").tag(sync=True)
    fps = Int().tag(sync=True)
    sample_rate = Int().tag(sync=True)

    def __init__(self, stream: Streamer) -> None:
        self.stream, clock = stream, stream.codec.clock
        super().__init__(prompt=stream.prompt, fps=clock.fps, sample_rate=clock.sample_rate)
        self._chunks, self._sent, self._wish = iter(stream), AV(0, 0), None
        self._maker, self._making = ThreadPoolExecutor(1), Lock()
        self.observe(self._ask, "prompt")
        self.on_msg(self._on_more)

    def stop(self) -> None:
        """End for good and wait for the chunk in the making; the stream itself stays usable."""
        self.playing, self.notice = False, self.notice or "the player was stopped; run the cell again"
        self._maker.shutdown(cancel_futures=True)

    def _ask(self, change: Bunch) -> None:
        # The stream is in the maker's hands, which takes the wish between two chunks.
        self._wish = change.new

    def _on_more(self, _: object, content: dict, buffers: object) -> None:
        """Make one chunk if none is in the making; two pages that ask at once share it."""
        if content.get("kind") == "more" and self._making.acquire(blocking=False):
            try:
                self._maker.submit(self._make).add_done_callback(self._deliver)
            except RuntimeError:  # after stop
                self._making.release()

    def _make(self) -> tuple[dict[str, object], list[bytes]]:
        began = time.perf_counter()
        wish, self._wish = self._wish, None
        if wish is not None:
            self._follow(wish)
        chunk = next(self._chunks, None)
        if chunk is None:
            self.notice = "the stream ended"
            return {"kind": "end"}, []
        said = {"kind": "chunk", "frame": self._sent.video, "sample": self._sent.audio, "prompt": chunk.prompt}
        self._sent = AV(self._sent.video + len(chunk.frames), self._sent.audio + len(chunk.samples))
        said |= {"length_s": len(chunk.frames) / self.fps, "made_s": time.perf_counter() - began}
        samples = chunk.samples if chunk.samples.ndim == 1 else chunk.samples.mean(-1)
        return said, [pcm(samples), *map(jpeg, chunk.frames)]

    def _follow(self, wish: str) -> None:
        try:
            self.stream.set_prompt(wish)
            self.notice = ""
        except ValueError as error:
            self.notice = str(error)

    def _deliver(self, chunk: Future) -> None:
        self._making.release()
        if chunk.cancelled():
            return
        if error := chunk.exception():
            self.notice = f"the stream failed: {error}"
            self.send({"kind": "end"})
        else:
            self.send(*chunk.result())
