"""Try many thousand hostile inputs: each is accepted, or refused with a ValueError; nothing else may happen.

python tests/reliability/fuzz.py --each 2000 [--seed 0] [--only checkpoints] [--out FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import resource
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import attacks
import numpy as np
import psutil
import torch
from tqdm import tqdm
from watch import write

from omniforcing_lib import __main__ as command_line
from omniforcing_lib import media
from omniforcing_lib.bounce import world
from omniforcing_lib.bounce.codec_parts import CodecConfig
from omniforcing_lib.bounce.codecs import TinyCodec
from omniforcing_lib.bounce.text import TinyText
from omniforcing_lib.config import MINIATURE
from omniforcing_lib.layout import AV, PAPER, Clock
from omniforcing_lib.ltx2 import checkpoints
from omniforcing_lib.rollout import RolloutConfig
from omniforcing_lib.stream import Streamer
from omniforcing_lib.transformer import Transformer

LONGEST_MESSAGE = 1000
SECONDS_EACH = 20  # of computing: no input may hold the reader longer
BYTES = 3 << 30  # address space beyond what the process has: no input may need more
TINY = replace(
    MINIATURE,
    num_layers=1,
    num_attention_heads=2,
    attention_head_dim=12,
    audio_num_attention_heads=2,
    audio_attention_head_dim=8,
    cross_attention_dim=24,
    audio_cross_attention_dim=16,
    in_channels=3,
    out_channels=3,
    audio_in_channels=5,
    audio_out_channels=5,
    caption_channels=8,
)


class Broken(AssertionError):
    """Say which law an input broke."""


def refused(attempt: Callable[[], object]) -> bool:
    """Run an attempt: False if it is accepted, True for a ValueError that can be read; anything else goes on."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            attempt()
    except ValueError as error:
        if not 0 < len(str(error)) <= LONGEST_MESSAGE:
            raise Broken(f"a message of {len(str(error))} characters: {str(error)[:80]!r}") from error
        return True
    return False


@dataclass
class Targets:
    """What is attacked, each as a function of a random generator that tells whether the input was refused."""

    folder: Path

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        causal = RolloutConfig(PAPER, steps=(1000, 500, 0), window=1)
        self.model = Transformer(TINY.with_sinks(PAPER.sinks)).eval().requires_grad_(False)
        for parameter in self.model.parameters():
            parameter.data = torch.randn(parameter.shape) * 0.3
        student = checkpoints.save(self.model, self.folder / "student.safetensors", causal=causal)
        self.student = student.read_bytes()
        scene = world.scene(0, "a red ball, bell")
        self.film = media.write_clip(self.folder / "film.mp4", world.render(scene, seconds=1)).read_bytes()
        small = {"hidden": 8, "oscillators": 5, "windows": (160,), "per_frame": 4, "mixed": 8}
        codec = TinyCodec(CodecConfig(size=8, patch=4, channels=AV(3, 5), encoder=(4,), decoder=(4, 4), **small)).eval()
        self.stream = Streamer(self.model, causal, codec, TinyText(channels=8), "a red ball, bell")
        self.clone_sharded = Streamer(self.model, causal, codec, TinyText(channels=8), "a red ball, bell")
        for _ in range(3):
            self.stream.step(), self.clone_sharded.step()
        self.state = self.stream.save(self.folder / "stream.safetensors").read_bytes()
        self.inside = self.folder / "inside"
        self.inside.mkdir()

    def checkpoints(self, dice: Random) -> bool:
        """Read, compare and load a broken checkpoint."""
        path = self.inside / "broken.safetensors"
        path.write_bytes(dice.choice(attacks.CHECKPOINT_ATTACKS)(dice, self.student))
        return refused(lambda: checkpoints.load(path))

    def films(self, dice: Random) -> bool:
        """Read a broken film, whole or its first second."""
        path = self.inside / "broken.mp4"
        path.write_bytes(attacks.broken_film(dice, self.film))
        return refused(lambda: self._check_clip(media.read_clip(path, seconds=dice.choice([None, 1]))))

    def odd_films(self, dice: Random) -> bool:
        """Read a whole film that is unusual."""
        path = attacks.odd_film(dice, self.inside / "odd.mkv")
        size = dice.choice([(64, 64), None])
        return refused(lambda: self._check_clip(media.read_clip(path, size=size, seconds=dice.choice([None, None, 1]))))

    @staticmethod
    def _check_clip(clip: AV[np.ndarray]) -> None:
        frames, samples = clip
        whole = len(samples) == Clock().samples_of(len(frames)) and np.abs(samples).max(initial=0) <= 1
        if not (whole and len(frames) and frames.dtype == np.uint8):
            raise Broken(f"a clip of {frames.shape} frames and {samples.shape} samples")

    def prompts(self, dice: Random) -> bool:
        """Encode a text that is hardly a prompt."""
        return refused(lambda: TinyText().encode([attacks.prompt(dice)]))

    def commands(self, dice: Random) -> bool:
        """Give the command line wrong words: exit code 2, one line, nothing written."""
        words = attacks.command(dice, self.inside)
        said, before = io.StringIO(), sorted(self.inside.rglob("*"))
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            try:
                code = command_line.main(words)
            except SystemExit as exit:
                code = exit.code
        lines = said.getvalue().strip().splitlines()
        if code != 2 or len(lines) != 1 or len(lines[0]) > LONGEST_MESSAGE:
            raise Broken(f"exit code {code}, {len(lines)} lines of {[len(line) for line in lines][:5]} characters")
        if sorted(self.inside.rglob("*")) != before:
            raise Broken("a refused command wrote a file")
        return True

    def streams(self, dice: Random) -> bool:
        """Resume from a broken state: accepted, or refused and the stream goes on with the bits of its twin."""
        path = self.inside / "broken_stream.safetensors"
        path.write_bytes(attacks.stream_state(dice, self.state))
        if not refused(lambda: self.stream.resume(path)):
            self.stream.step()
            self.clone_sharded.resume(self.folder / "stream.safetensors")
            self.stream.resume(self.folder / "stream.safetensors")
            return False
        mine, its = self.stream.step(), self.clone_sharded.step()
        if not (np.array_equal(mine.frames, its.frames) and np.array_equal(mine.samples, its.samples)):
            raise Broken("a refused state changed the stream")
        return True


KINDS = ("checkpoints", "films", "odd_films", "prompts", "commands", "streams")


@contextlib.contextmanager
def limited(seconds: int, more_bytes: int) -> Iterator[None]:
    """Stop what takes too long, or too much memory, with an error."""

    def stop(*_: object) -> None:
        raise Broken(f"more than {seconds} s of computing")

    before = resource.getrlimit(resource.RLIMIT_AS)
    held = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (held + more_bytes, before[1]))
    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, before)


def attack(targets: Targets, kind: str, each: int, seed: int) -> dict[str, object]:
    """Try `each` inputs of a kind; count what happened and keep one example of each way to break a law."""
    counts, broken = Counter(), {}
    for i in tqdm(range(each), desc=kind, mininterval=5):
        try:
            with limited(SECONDS_EACH, BYTES):
                outcome = "refused" if getattr(targets, kind)(Random(f"{kind} {seed} {i}")) else "accepted"
        except BaseException as error:  # a law broken in any way is what is looked for
            if isinstance(error, KeyboardInterrupt):
                raise
            outcome, last = "broken", traceback.extract_tb(error.__traceback__)[-1]
            said = f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}: {str(error)[:160]}"
            broken.setdefault(said.split(":")[0] + str(last.lineno), {"first": i, "says": said, "times": 0})[
                "times"
            ] += 1
        counts[outcome] += 1
    return {**counts, "inputs": each, "broken_ways": list(broken.values())}


def main() -> int:
    """Run what the options say."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--each", type=int, default=2000, help="inputs of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--out", default="", help="default reports/reliability/fuzz.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        targets = Targets(Path(folder))
        before = psutil.Process().memory_info().rss
        kinds = {kind: attack(targets, kind, options.each, options.seed) for kind in options.only}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    broken = sum(kind.get("broken", 0) for kind in kinds.values())
    found = {"ok": not broken, "inputs": options.each * len(kinds), "broken": broken, "seed": options.seed}
    found |= {"rss_mb_before": round(before / 1e6), "rss_mb_peak": round(peak / 1e6), "kinds": kinds}
    print(json.dumps(kinds, indent=1, ensure_ascii=False))
    return not write("fuzz", options.out, found)


if __name__ == "__main__":
    sys.exit(main())
