"""Bounce: an audio-visual world whose truth is known exactly.

A coloured ball moves at constant speed in a 64x64 box and reflects on the walls; each impact sounds a
decaying tone whose pitch tells the wall and whose timbre comes from the prompt. Position is a triangle wave, so
impact times are closed form at any moment, an hour in as at the start, before zero as after. Every partial is
on an equally tempered grid, so a bank of 62 oscillators can render every sound of this world.

Two switches of `scene` give the ear something that the eye cannot tell. Both are off unless asked for, prompts say
nothing of them, and without them every draw and every bit is what it was. With `hum` a steady tone lies under the
bounces; the seed draws its pitch, so that only what was heard tells how to go on. With `hidden` the box is 96 pixels
wide and the right third is out of sight: the ball is heard to hit the right wall, and when and where it comes back
follows from that moment, see `reentry`.

Shapes: `B` scenes, `F` frames, `N` samples, `J` impacts of a scene.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange

from omniforcing_lib.layout import AV, Clock

Device = torch.device | str
CLOCK = Clock()
SIZE = 64
# Seeds from here on are for evaluation: training never draws them.
HELD_OUT = 10_000_000
RADIUS = 7.0
BORDER = 1.0
LOW, HIGH = BORDER + RADIUS, SIZE - BORDER - RADIUS
SPAN = HIGH - LOW
SPEED = (55.0, 65.0)
STEEPEST = math.radians(20.0)
BACKGROUND = (14, 14, 20)
FRAME = (48, 48, 58)
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (235, 45, 45),
    "green": (45, 205, 70),
    "blue": (60, 90, 245),
    "yellow": (240, 210, 40),
    "magenta": (220, 60, 220),
    "cyan": (40, 210, 220),
}
WALLS = ("left", "right", "top", "bottom")
BANK_HZ = 220.0 * 2.0 ** (np.arange(62) / 12)
# No partial of any wall comes closer than 114 Hz to another wall's fundamental: 20 ms of sound tell the wall.
WALL_NOTES = {"left": 10, "right": 15, "top": 19, "bottom": 25}
ATTACK_S = 0.0025
# The box of a scene with a hidden part goes on to the right of what is seen.
WIDE = 96
# Free notes of the bank, above the walls' fundamentals and 114 Hz or more from each of them, as their partials are.
HUM_NOTES = (28, 30, 32, 33, 35, 36, 40, 42, 45, 48, 51, 52)
HUM_LEVEL = 0.05
# Two walls at once over the tails of all earlier tones stay below 1.
LEVEL = 0.4


class Timbre(NamedTuple):
    """Describe a tone by its partials: semitones above the fundamental, share of the peak, time constant."""

    semitones: tuple[int, ...]
    shares: tuple[float, ...]
    decays_s: tuple[float, ...]

    @property
    def tail_s(self) -> float:
        """Length after which a tone is cut: 8 time constants, 70 dB below its start."""
        return 8 * max(self.decays_s)


TIMBRES: dict[str, Timbre] = {
    "bell": Timbre((0, 12, 19, 24), (0.50, 0.25, 0.15, 0.10), (0.40, 0.30, 0.22, 0.15)),
    "wood": Timbre((0, 24), (0.75, 0.25), (0.06, 0.03)),
    "pluck": Timbre(
        (0, 12, 19, 24, 28, 31), (0.32, 0.24, 0.16, 0.12, 0.09, 0.07), (0.18, 0.15, 0.12, 0.10, 0.08, 0.07)
    ),
}
_PROMPT = re.compile(r"(?:a )?([a-z]+) ball ?, ?([a-z]+)\.?")


class Impact(NamedTuple):
    """Say when the ball meets which wall."""

    time_s: float
    wall: str


@dataclass(frozen=True)
class Scene:
    """Fix everything that happens, at any time: the prompt and the ball's motion at time zero.

    Attributes:
        prompt: a prompt of the grammar, see `prompts`.
        position: x, y of the centre at time zero, in pixels.
        velocity: x, y in pixels per second.
        hum: note of the bank that hums, one of `HUM_NOTES`; None is silent.
        hidden: whether the box is 96 pixels wide, of which the left 64 are seen.
    """

    prompt: str
    position: tuple[float, float]
    velocity: tuple[float, float]
    hum: int | None = None
    hidden: bool = False

    def __post_init__(self) -> None:
        parse(self.prompt)
        if not all(LOW <= p <= HIGH for p in self.position) or not all(self.velocity):
            raise ValueError(
                f"a ball starts within [{LOW}, {HIGH}] and moves along both axes, "
                f"found position {self.position}, velocity {self.velocity}"
            )
        if self.hum is not None and self.hum not in HUM_NOTES:
            raise ValueError(f"a hum is one of the notes {HUM_NOTES}, found {self.hum}")

    @property
    def colour(self) -> str:
        """Colour word of the prompt."""
        return parse(self.prompt)[0]

    @property
    def timbre(self) -> str:
        """Timbre word of the prompt."""
        return parse(self.prompt)[1]

    @property
    def spans(self) -> tuple[float, float]:
        """Length of the centre's way between two walls in pixels: x, y."""
        return (SPAN + (WIDE - SIZE if self.hidden else 0), SPAN)

    @property
    def hum_cents(self) -> float:
        """Pitch of the hum in cents above 220 Hz, exact at any time; NaN without a hum."""
        return math.nan if self.hum is None else 100.0 * self.hum


def prompts() -> list[str]:
    """List the 18 prompts of the grammar."""
    return [f"a {colour} ball, {timbre}" for colour in COLOURS for timbre in TIMBRES]


def prompts_in_turn(count: int) -> list[str]:
    """Give `count` prompts of the grammar, each in its turn."""
    return [prompts()[i % len(prompts())] for i in range(count)]


def parse(prompt: str) -> tuple[str, str]:
    """Read colour and timbre from a prompt; case and spaces do not matter.

    Raises ValueError with the valid words when the prompt is outside the grammar.
    """
    match = _PROMPT.fullmatch(" ".join(prompt.lower().split()))
    if match and match[1] in COLOURS and match[2] in TIMBRES:
        return match[1], match[2]
    raise ValueError(
        f"a prompt reads 'a COLOUR ball, TIMBRE' with COLOUR one of {', '.join(COLOURS)} "
        f"and TIMBRE one of {', '.join(TIMBRES)}; found {prompt[:80]!r}"
    )


def scene(seed: int, prompt: str | None = None, *, hum: bool = False, hidden: bool = False) -> Scene:
    """Draw a scene; the same seed starts alike under every prompt and every switch.

    Start and quadrant are uniform; the direction keeps 20 degrees off the axes, so that both pairs of walls
    sound.

    Args:
        seed: of the prompt, the motion and the pitch of the hum.
        prompt: a prompt of the grammar; None draws one.
        hum: whether a steady tone lies under the bounces.
        hidden: whether the box goes on to the right, out of sight; the ball starts in sight all the same.
    """
    rng = np.random.default_rng(seed)
    drawn = prompts()[rng.integers(len(COLOURS) * len(TIMBRES))]
    x, y = rng.uniform(LOW, HIGH, 2)
    angle = rng.uniform(STEEPEST, math.pi / 2 - STEEPEST) + rng.integers(4) * math.pi / 2
    speed = rng.uniform(*SPEED)
    velocity = (float(speed * math.cos(angle)), float(speed * math.sin(angle)))
    # The pitch is drawn last: a hum changes no other draw.
    note = HUM_NOTES[rng.integers(len(HUM_NOTES))] if hum else None
    return Scene(drawn if prompt is None else prompt, (float(x), float(y)), velocity, note, hidden)


def positions(scene: Scene, times_s: np.ndarray) -> np.ndarray:
    """Locate the centre at any times.

    Shapes: times [T] seconds -> [T, 2] pixels, x then y.
    """
    run = np.asarray(scene.position) - LOW + np.multiply.outer(times_s, scene.velocity)
    return fold(run, np.array(scene.spans))


def fold(run: np.ndarray, span: np.ndarray | float = SPAN) -> np.ndarray:
    """Reflect a way that walls do not stop, counted from the low wall, into the box: pixels to pixels."""
    return LOW + span - np.abs(np.mod(run, 2 * span) - span)


def impacts(scene: Scene, start_s: float, end_s: float) -> list[Impact]:
    """List the impacts with start <= time < end in order of time, in closed form."""
    hits = [
        hit
        for axis, walls in enumerate((WALLS[:2], WALLS[2:]))
        for hit in _axis_impacts(scene, axis, walls, start_s, end_s)
    ]
    return sorted(hit for hit in hits if start_s <= hit.time_s < end_s)


def _axis_impacts(scene: Scene, axis: int, walls: Sequence[str], start: float, end: float) -> list[Impact]:
    """Find where the unfolded coordinate passes a multiple of the span: even multiples are the low wall."""
    run, speed, span = scene.position[axis] - LOW, scene.velocity[axis], scene.spans[axis]
    ends = sorted((run + speed * start, run + speed * end))
    crossed = range(math.floor(ends[0] / span), math.ceil(ends[1] / span) + 1)
    return [Impact((m * span - run) / speed, walls[m % 2]) for m in crossed]


class Crossing(NamedTuple):
    """Say when the ball's centre passes x = `HIGH`, where the whole ball is just in sight.

    Attributes:
        time_s: moment in seconds.
        y: height of the centre in pixels.
        speed_y: pixels per second, downwards positive.
    """

    time_s: float
    y: float
    speed_y: float


def reentry(out: Crossing, heard_s: float) -> Crossing:
    """Tell from the moment of the hidden impact when and where the ball is back in sight.

    The way back to x = `HIGH` is as long as the way out, so it takes as long; meanwhile y goes on as before.
    """
    away = 2 * (heard_s - out.time_s)
    run = out.y - LOW + out.speed_y * away
    back = out.speed_y if math.floor(run / SPAN) % 2 == 0 else -out.speed_y
    return Crossing(out.time_s + away, float(fold(run)), back)


def tone(timbre: str, note: int, ages_s: np.ndarray) -> np.ndarray:
    """Sound one impact: a sum of decaying tempered partials after a linear attack.

    Shapes: ages [T] seconds since the impact, >= 0 -> [T] float64.
    """
    wave = np.zeros_like(ages_s)
    for up, share, decay in zip(*TIMBRES[timbre], strict=True):
        wave += share * np.exp(-ages_s / decay) * np.sin(2 * np.pi * BANK_HZ[note + up] * ages_s)
    return LEVEL * np.minimum(ages_s / ATTACK_S, 1.0) * wave


def render(scene: Scene, latents: AV[range] | None = None, *, seconds: int = 5, clock: Clock = CLOCK) -> AV[np.ndarray]:
    """Render the frames and samples of a range of latents, or of a whole clip.

    Every value depends on its own time only: rendering [a, b) then [b, c) equals [a, c) to the bit.
    Shapes: AV(uint8 [F, 64, 64, 3], float32 [N] in [-1, 1]).
    """
    spans = clock.latents(seconds).map(range) if latents is None else latents
    sound = _sound(scene, clock.samples(spans.audio), clock.sample_rate)
    return AV(_frames(scene, clock.frames(spans.video), clock.fps), sound)


def _frames(scene: Scene, span: range, fps: int) -> np.ndarray:
    centres = positions(scene, np.asarray(span, dtype=float) / fps)
    pixel = np.arange(SIZE) + 0.5
    across, down = (pixel - rearrange(c, "f -> f 1") for c in centres.T)
    distance = np.sqrt(rearrange(across, "f w -> f 1 w") ** 2 + rearrange(down, "f h -> f h 1") ** 2)
    cover = rearrange(np.clip(RADIUS + 0.5 - distance, 0.0, 1.0), "f h w -> f h w 1")
    box = _box(scene.hidden)
    return np.rint(box + cover * (np.array(COLOURS[scene.colour], dtype=float) - box)).astype(np.uint8)


def _box(hidden: bool) -> np.ndarray:
    """Draw what is seen of the empty box: float64 [64, 64, 3] in [0, 255]; a hidden part leaves the right side open."""
    box = np.empty((SIZE, SIZE, 3))
    box[:] = FRAME
    edge = int(BORDER)
    box[edge:-edge, edge : None if hidden else -edge] = BACKGROUND
    return box


def _sound(scene: Scene, span: range, rate: int) -> np.ndarray:
    """Add the tones up in order of time, each computed whole, so that where a clip is cut changes no bit."""
    tail = TIMBRES[scene.timbre].tail_s
    out = np.zeros(len(span))
    for time_s, wall in impacts(scene, span.start / rate - tail, span.stop / rate):
        first = math.ceil(time_s * rate)
        grid = np.arange(first, first + round(tail * rate))
        wave = tone(scene.timbre, WALL_NOTES[wall], grid / rate - time_s)
        a, b = max(first, span.start), min(first + len(wave), span.stop)
        out[max(a - span.start, 0) : max(b - span.start, 0)] += wave[a - first : max(b - first, a - first)]
    if scene.hum is not None and len(span):
        seconds = range(span.start // rate, -(-span.stop // rate))
        hum = np.concatenate([_hum(scene.hum, np.arange(k * rate, (k + 1) * rate) / rate) for k in seconds])
        out += hum[span.start - seconds.start * rate :][: len(span)]
    return out.astype(np.float32)


def _hum(note: int, times_s: np.ndarray) -> np.ndarray:
    """Sound the hum at any times, with phase 0 at time 0. Shapes: [T] seconds -> [T] float64."""
    return HUM_LEVEL * np.sin(2 * np.pi * np.mod(BANK_HZ[note] * times_s, 1.0))


def render_batch(
    scenes: Sequence[Scene], seconds: int, device: Device = "cpu", *, clock: Clock = CLOCK
) -> AV[torch.Tensor]:
    """Render whole clips of many scenes at once on a CPU or a CUDA device, for training.

    Shapes: AV(float32 [B, F, 64, 64, 3], float32 [B, N]), both in [-1, 1].
    """
    spans = clock.latents(seconds).map(range)
    frames, samples = len(clock.frames(spans.video)), len(clock.samples(spans.audio))
    audio = torch.zeros(len(scenes), samples, device=device)
    for name in TIMBRES:
        rows = [b for b, s in enumerate(scenes) if s.timbre == name]
        if rows:
            group = _sound_batch([scenes[b] for b in rows], samples, clock.sample_rate, device)
            audio[torch.tensor(rows, device=device)] = group
    for b, s in enumerate(scenes):
        if s.hum is not None:
            audio[b] += _hum_batch(s.hum, samples, clock.sample_rate, device)
    return AV(_frames_batch(scenes, frames, clock.fps, device), audio)


def _frames_batch(scenes: Sequence[Scene], frames: int, fps: int, device: Device) -> torch.Tensor:
    centres = np.stack([positions(s, np.arange(frames) / fps) for s in scenes])
    pixel = torch.arange(SIZE, device=device) + 0.5
    across, down = pixel - rearrange(torch.tensor(centres).float().to(device), "b f xy -> xy b f 1")
    distance = torch.hypot(rearrange(across, "b f w -> b f 1 w"), rearrange(down, "b f h -> b f h 1"))
    cover = rearrange((RADIUS + 0.5 - distance).clamp_(0.0, 1.0), "b f h w -> b f h w 1")
    boxes = rearrange(np.stack([_box(s.hidden) for s in scenes]), "b h w c -> b 1 h w c")
    box = torch.tensor(boxes / 127.5 - 1, dtype=torch.float32, device=device)
    ball = torch.tensor([COLOURS[s.colour] for s in scenes], dtype=torch.float32, device=device) / 127.5 - 1
    return torch.lerp(box, rearrange(ball, "b c -> b 1 1 1 c"), cover)


def _sound_batch(scenes: Sequence[Scene], samples: int, rate: int, device: Device) -> torch.Tensor:
    """Add the j-th tone of every scene at once; all scenes share a timbre, so all tones share a length."""
    timbre = TIMBRES[scenes[0].timbre]
    length = round(timbre.tail_s * rate)
    hits = [impacts(s, -timbre.tail_s, samples / rate) for s in scenes]
    # A scene with fewer impacts is padded with one that ends where the clip begins.
    most = max(map(len, hits))
    padded = [h + [Impact(-length / rate, WALLS[0])] * (most - len(h)) for h in hits]
    times = torch.tensor([[hit.time_s for hit in h] for h in padded], dtype=torch.float64, device=device)
    notes = torch.tensor([[WALL_NOTES[hit.wall] for hit in h] for h in padded], device=device)
    buffer = torch.zeros(len(scenes), samples + 2 * length, device=device)
    hertz = torch.tensor(BANK_HZ, device=device)[notes]
    rows, steps = torch.arange(len(scenes), device=device)[:, None], torch.arange(length, device=device)
    for time, pitch in zip(times.T[:, :, None], hertz.T[:, :, None], strict=True):
        grid = torch.ceil(time * rate).long() + steps
        buffer[rows, grid + length] += _tone_batch(timbre, pitch, grid.double() / rate - time)
    return buffer[:, length : length + samples]


def _tone_batch(timbre: Timbre, pitch: torch.Tensor, ages: torch.Tensor) -> torch.Tensor:
    age, wave = ages.float(), torch.zeros_like(ages, dtype=torch.float32)
    for up, share, decay in zip(*timbre, strict=True):
        # The phase is reduced in float64: float32 loses a thousandth of a cycle within a second.
        phase = torch.frac(pitch * 2.0 ** (up / 12) * ages).float()
        wave += share * torch.exp(-age / decay) * torch.sin(2 * math.pi * phase)
    return LEVEL * (age / ATTACK_S).clamp(max=1.0) * wave


def _hum_batch(note: int, samples: int, rate: int, device: Device) -> torch.Tensor:
    times = torch.arange(samples, dtype=torch.float64, device=device) / rate
    return HUM_LEVEL * torch.sin(2 * math.pi * torch.frac(BANK_HZ[note] * times).float())
