"""The live player: its Python half by its messages, its page in a browser of our own, the whole in a real Chromium."""

import io
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import nbformat
import numpy as np
import pytest
from PIL import Image

from omniforcing_lib.layout import Clock
from series import widgets

FPS, RATE = 24, 16_000


class Piece(NamedTuple):
    frames: np.ndarray
    samples: np.ndarray
    start_s: float
    prompt: str


class FakeStream:
    """Chunks of 6 frames, each frame of its own grey level."""

    codec = SimpleNamespace(clock=Clock())

    def __init__(self, chunks=3, fail=False):
        self.prompt, self.chunks, self.fail, self.gate = "a red ball, bell", chunks, fail, threading.Event()
        self.gate.set()

    def __iter__(self):
        for k in range(self.chunks):
            self.gate.wait()
            levels = np.arange(6 * k, 6 * k + 6, dtype=np.uint8) * 8
            frames = np.ones((6, 8, 8, 3), np.uint8) * levels[:, None, None, None]
            yield Piece(frames, np.full(4000, k / 4), k / 4, self.prompt)
        if self.fail:
            raise RuntimeError("out of memory")

    def set_prompt(self, prompt):
        if "ball" not in prompt:
            raise ValueError(f"unknown word {prompt!r}")
        self.prompt = prompt


def until(condition, seconds=60):
    """Wait until something holds, and return it."""
    end = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    assert found
    return found


class Page:
    """Stand in for the browser: ask for chunks and keep what comes."""

    def __init__(self, stream):
        self.player, self.got = widgets.Player(stream), []
        self.player.send = lambda said, buffers=(): self.got.append((said, buffers))

    def ask(self):
        self.player._on_more(self.player, {"kind": "more"}, [])

    def more(self):
        """Ask for one chunk and wait for the answer."""
        before = len(self.got)
        self.ask()
        until(lambda: len(self.got) > before)
        return self.got[before]


def test_a_page_gets_every_frame_and_sample_in_order_and_then_the_end():
    page = Page(FakeStream())
    chunks = [page.more() for _ in range(3)]
    assert [(said["frame"], said["sample"]) for said, _ in chunks] == [(0, 0), (6, 4000), (12, 8000)]
    levels = [np.asarray(Image.open(io.BytesIO(bytes_))).mean() for _, (_, *frames) in chunks for bytes_ in frames]
    assert np.abs(np.array(levels) - 8 * np.arange(18)).max() < 3
    sound = np.concatenate([np.frombuffer(buffers[0], "<i2") for _, buffers in chunks]) / 32767
    assert np.abs(sound - np.repeat([0, 0.25, 0.5], 4000)).max() < 1e-4
    assert page.more()[0] == {"kind": "end"} and page.player.notice == "the stream ended"
    page.player.stop()


def test_nothing_is_made_unasked_and_one_chunk_at_a_time():
    stream = FakeStream(chunks=99)
    page = Page(stream)
    page.more()
    stream.gate.clear()
    for _ in range(50):
        page.ask()
    stream.gate.set()
    until(lambda: len(page.got) == 2)
    page.player.stop()
    page.ask()
    assert len(page.got) == 2 and "stopped" in page.player.notice


def test_a_prompt_reaches_the_stream_and_a_wrong_one_is_told():
    page = Page(FakeStream(chunks=9))
    page.player.prompt = "a blue ball, wood"
    assert page.more()[0]["prompt"] == "a blue ball, wood"
    page.player.prompt = "a dog"
    assert page.more()[0]["prompt"] == "a blue ball, wood" and page.player.notice == "unknown word 'a dog'"
    page.player.prompt = "a red ball, pluck"
    assert page.more()[0]["prompt"] == "a red ball, pluck" and page.player.notice == ""
    page.player.stop()


def test_a_failing_stream_is_told_and_leaves_no_thread():
    before = threading.active_count()
    page = Page(FakeStream(chunks=0, fail=True))
    assert page.more()[0] == {"kind": "end"} and page.player.notice == "the stream failed: out of memory"
    page.player.stop()
    assert threading.active_count() == before


@pytest.fixture
def watched(tmp_path):
    """Play a stream of seconds in a browser whose time is ours, and tell what was seen and heard."""
    if not shutil.which("node"):
        pytest.skip("no node on the path")
    page = shutil.copy(widgets.HERE / "player.js", tmp_path / "player.mjs")

    def watch(**scenario):
        words = ["node", Path(__file__).with_name("browser.mjs"), page, json.dumps(scenario)]
        return json.loads(subprocess.run(words, check=True, capture_output=True, text=True, timeout=60).stdout)

    return watch


def pauses(seen):
    """Seconds of silence between one piece of sound and the next."""
    return [round(after[0] - before[1], 6) for before, after in pairwise(seen["sounds"])]


def after_sound(seen):
    """Seconds from when the sound of each painted frame is in the ear to its painting, in a stream without stalls."""
    heard = seen["sounds"][0][0] + seen["latency_s"]
    return [time_s - (heard + frame / FPS) for time_s, frame in seen["painted"] if frame]


AWAY = {"on show": [], "hidden": [2, 28], "hidden at once": [0.1, 28]}


@pytest.mark.parametrize("made_s", [0.05, 0.8])
@pytest.mark.parametrize("hidden", AWAY.values(), ids=AWAY)
def test_a_hidden_tab_plays_as_one_on_show(watched, hidden, made_s):
    """Without repaints sound does not pause, and pictures go by its clock: few are held, and the right one comes back.

    A chunk is asked for while the one before it still sounds, as soon as it is needed and no sooner.
    """
    seen = watched(seconds=30, hidden=hidden, made_s=made_s)
    assert set(pauses(seen)) == {0} and seen["stalls"] == 0
    assert seen["most_open"] <= 24 * (1 + 1.5 * 0.8 + 0.25) and seen["asked"] <= 32
    late = after_sound(seen)[-40:]
    assert min(late) > -1e-6 and max(late) < 1 / FPS and seen["painted_closed"] == 0


def test_a_slow_stream_lets_sound_and_picture_wait_together(watched):
    """A chunk that takes longer than it lasts is waited for once, however often it was asked for."""
    seen = watched(seconds=30, made_s=2.5)
    assert pauses(seen)[1:] == pytest.approx([1.5] * 9, abs=0.05) and seen["stalls"] == 9
    assert [frame for _, frame in seen["painted"]] == [*range(1 + 24 * 10)]


@pytest.mark.parametrize("hidden", [[], [2, 28]], ids=["on show", "hidden"])
@pytest.mark.parametrize("end", ["restarted", "shut_down"])
@pytest.mark.parametrize("at", [0.2, 5.5])
def test_a_player_whose_kernel_is_gone_says_so(watched, hidden, end, at):
    """Whether the host says it or the next request fails: what is there is played, then the player pauses and tells."""
    seen = watched(seconds=30, hidden=hidden, **{end: at})
    assert "gone with its kernel" in seen["status"] and seen["state"] == "suspended"
    assert set(pauses(seen)) <= {0} and seen["open"] <= 1
    assert at == 0.2 or seen["now"] >= seen["sounds"][-1][1] - seen["sounds"][0][0]


def test_a_kernel_that_says_nothing_is_told_of(watched):
    """A restart that nobody tells the page about looks like a busy kernel; the reader learns of both."""
    assert "no answer from the kernel" in watched(seconds=30, silent=10)["status"]
    assert watched(seconds=30, made_s=4)["status"].startswith("now:")


# Two players: the shipped student, and flashes of light that each come with a click.
CELLS = (
    """from omniforcing_lib import stream
from omniforcing_lib.bounce import codecs, text
from omniforcing_lib.ltx2 import checkpoints
from series import widgets

codec, causal = codecs.shipped_codec(), checkpoints.read("student").causal
live = stream.Streamer(checkpoints.load("student"), causal, codec, text.TinyText(), "a red ball, bell")
widgets.Player(live)""",
    """import numpy as np


class Flashes:
    codec, prompt = codec, "flashes"

    def __iter__(self):
        frames, samples = np.zeros((24, 64, 64, 3), np.uint8), np.zeros(16000)
        frames[[4, 5, 6, 16, 17, 18]] = 255
        for start in (4, 16):
            samples[start * 16000 // 24 :][:1600] = 0.8 * np.sin(np.arange(1600) * 0.4)
        while True:
            yield stream.Chunk(frames, samples, 0.0, self.prompt)


widgets.Player(Flashes())""",
)
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
STATE = """player => { const e = player.engine, p = e.pieces; return {
    state: e.context?.state, now: e.now, ahead: e.ahead, frames: e.seen.frames, stalls: e.seen.stalls,
    asked: e.asked, answer: e.seen.answer, samples: p.length ? p.at(-1).sample + p.at(-1).sound.length : 0,
    energy: p.reduce((sum, piece) => sum + piece.sound.reduce((s, x) => s + x * x, 0), 0) } }"""
PICTURE = """player => { const c = player.querySelector(".of-picture");
    return [...c.getContext("2d").getImageData(0, 0, c.width, c.height).data] }"""
# When light and sound rise, both in ms of performance.now(): pixels at each repaint, samples at the graph's output.
RISES = """async player => {
    const e = player.engine, tap = new AnalyserNode(e.context, { fftSize: 2048 });
    e.out.connect(tap);
    const sound = new Float32Array(2048), canvas = player.querySelector(".of-picture");
    const rises = { light: [], sound: [] };
    let [lit, heard] = [true, 0];
    for (const end = performance.now() + 5000; performance.now() < end; ) {
        await new Promise(requestAnimationFrame);
        const level = canvas.getContext("2d").getImageData(32, 32, 1, 1).data[0] > 128;
        if (level && !lit) rises.light.push(performance.now());
        lit = level;
        tap.getFloatTimeDomainData(sound);
        const now = e.context.currentTime, first = sound.findIndex((x) => Math.abs(x) > 0.2);
        const at = now - (2048 - first) / e.rate;
        if (first > 0 && at > heard + 0.25) {
            heard = at;
            rises.sound.push(performance.now() - 1000 * (now - at) + 1000 * e.context.outputLatency);
        }
    }
    return rises;
}"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def answers(port):
    with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


@contextmanager
def served(kind, folder):
    """Serve a notebook with both players and give its address."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    notebook.metadata.kernelspec = {"name": "python3", "language": "python", "display_name": "Python 3"}
    nbformat.write(notebook, folder / "player.ipynb")
    settings = folder / "settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    quiet = '{"fetchNews": "false", "checkForUpdates": false}'
    (settings / "notification.jupyterlab-settings").write_text(quiet)
    port, programs = free_port(), Path(sys.executable).parent
    command = {
        "lab": [
            programs / "jupyter-lab",
            "--allow-root",
            "--IdentityProvider.token=",
            f"--ServerApp.root_dir={folder}",
        ],
        "voila": [programs / "voila", folder / "player.ipynb"],
    }[kind]
    home = {"JUPYTERLAB_SETTINGS_DIR": settings.parent.parent, "JUPYTER_CONFIG_DIR": folder / "config"}
    environment = {**os.environ, **{name: str(path) for name, path in home.items()}}
    with (folder / "server.log").open("w") as log:
        words = [str(programs / command[0]), *command[1:], "--no-browser", f"--port={port}"]
        server = subprocess.Popen(words, env=environment, stdout=log, stderr=log)
    try:
        until(lambda: answers(port) or server.poll() is not None)
        assert server.poll() is None, (folder / "server.log").read_text()
        yield f"http://127.0.0.1:{port}/" + ("doc/tree/player.ipynb" if kind == "lab" else "")
    finally:
        server.terminate()
        server.wait(20)


@pytest.fixture(scope="module")
def chromium():
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="needs the extra `browser`: pip install -e .[browser]"
    )
    pytest.importorskip("voila", reason="needs the extra `browser`: pip install -e .[browser]")
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if not path:
        pytest.skip("no chromium on the path; apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=FLAGS.split())
        yield browser
        browser.close()


def state_until(player, condition):
    """Wait until the page's state fulfils a condition, and return the state."""

    def fulfilled():
        state = player.evaluate(STATE)
        return state if condition(state) else None

    return until(fulfilled)


def status_until(player, words):
    """Wait until the page says these words."""
    status = player.query_selector(".of-status")
    until(lambda: words in status.inner_text())


def ball_colour(player):
    pixels = np.array(player.evaluate(PICTURE)).reshape(-1, 4)[:, :3]
    return pixels[pixels.max(1) > 128].mean(0)


def ask(player, prompt):
    box = player.query_selector(".of-prompt")
    box.fill(prompt)
    box.press("Enter")


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lab", "voila"])
def test_a_browser_shows_and_sounds_the_stream_and_follows_a_prompt(chromium, tmp_path, kind):
    with served(kind, tmp_path) as address:
        page = chromium.new_page(viewport={"width": 1100, "height": 800})
        page.set_default_timeout(180_000)  # Voilà answers once its cells have run, which a busy machine takes time for
        errors = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address)
        if kind == "lab":
            page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status=idle]")
            for cell in page.query_selector_all(".jp-CodeCell")[: len(CELLS)]:
                until(lambda cell=cell: started(cell, page))
        page.wait_for_function("document.querySelectorAll('.of-player').length == 2")
        student, flashes = page.query_selector_all(".of-player")
        check_student(student, page, Path(os.environ.get("SHOTS", tmp_path)) / f"player_{kind}.png")
        late = sound_after_light(flashes)
        print(f"{kind}: sound after light {np.round(late).astype(int).tolist()} ms")
        assert len(late) >= 4 and abs(np.median(late)) < 2 * 1000 / FPS
        assert not errors
        page.close()


def started(cell, page):
    """Run a cell of JupyterLab, which loses keys while its plugins start, and tell whether it runs."""
    cell.query_selector(".cm-content").click()
    page.keyboard.press("Shift+Enter")
    page.wait_for_timeout(1000)
    return "[ ]" not in cell.query_selector(".jp-InputPrompt").inner_text()


def check_student(player, page, shot):
    play = player.query_selector(".of-play")
    play.click()
    state = state_until(player, lambda s: s["frames"] >= 24 and s["ahead"] > 0)
    assert state["state"] == "running" and state["samples"] > RATE and state["energy"] > 1
    pictures = set()
    for _ in range(6):
        frames = player.evaluate(STATE)["frames"]
        state_until(player, lambda s, frames=frames: s["frames"] > frames + 2)
        pictures.add(bytes(player.evaluate(PICTURE)))
    assert len(pictures) == 6 and ball_colour(player).argmax() == 0
    ask(player, "a blue ball, wood")
    status_until(player, "now: a blue ball, wood")
    state_until(player, lambda s: s["answer"])
    assert ball_colour(player).argmax() == 2
    shot.parent.mkdir(exist_ok=True)
    page.screenshot(path=shot)
    ask(player, "a pink ball, bell")
    status_until(player, "cyan")
    play.click()
    held = state_until(player, lambda s: s["state"] == "suspended" and not s["asked"])
    time.sleep(0.5)
    assert player.evaluate(STATE) == held


def sound_after_light(player):
    """Milliseconds from each flash seen to its click heard, measured at the canvas and at the sound's output."""
    player.scroll_into_view_if_needed()
    player.query_selector(".of-play").click()
    state_until(player, lambda s: s["frames"] > 6)
    rises = {name: np.array(times) for name, times in player.evaluate(RISES).items()}
    gaps = rises["sound"][:, None] - rises["light"]
    return [row[np.abs(row).argmin()] for row in gaps if np.abs(row).min() < 250]
