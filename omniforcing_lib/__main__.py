"""The command line: run the series, make a clip, look into a checkpoint, train."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from omniforcing_lib.options import Command, Parser, one_line, option

LONGEST_CLIP = 600  # seconds of a clip that is made or rendered at once; a student streams without end
LONGEST_STREAM = 86_400  # seconds; a longer clip is a typing error
MOST_STEPS = 1000  # noise levels that a model tells apart
LARGEST_SEED = 2**63 - 1  # the largest that torch's generators take
CHECKPOINT = "teacher, stage2, student, a file, an index or a folder"
ONLY = 'notebooks to run, as "03" or "03,05" (default: all)'


@dataclass(frozen=True, kw_only=True)
class Reproduce(Command):
    """Execute the notebooks and write a report."""

    profile: str = option("amount of work: smoke, cpu, full, gpu or tiny", "cpu")
    only: str = option(ONLY, "")
    parameters: tuple[str, ...] = option("a parameter of the notebooks, as seed=4; may be given again", (), flag="-p")
    out: str = option("run folder (default reports/runs/<time>-<profile>)", "")
    notebooks: str = option("folder of notebooks (default: the series)", "")

    def _run(self) -> None:
        from series import runner

        folder, parameters = Path(self.notebooks or runner.NOTEBOOKS), list(self.parameters)
        runner.reproduce(self.profile, only=self.only, parameters=parameters, out=self.out, folder=folder)


@dataclass(frozen=True, kw_only=True)
class Refresh(Command):
    """Execute the notebooks as stored and store their outputs."""

    only: str = option(ONLY, "")

    def _run(self) -> None:
        from series import runner

        runner.refresh(only=self.only)


@dataclass(frozen=True, kw_only=True)
class Publish(Command):
    """Copy a run's metrics and figures into reports/ and rebuild it."""

    folder: str = option("a run folder of `reproduce`", flag="name")

    def _run(self) -> None:
        from series import runner

        print(f"published {', '.join(runner.publish_run(Path(self.folder)))}")


@dataclass(frozen=True, kw_only=True)
class Report(Command):
    """Rebuild reports/REPORT.md from the committed metrics."""

    def _run(self) -> None:
        from series import runner

        runner.rebuild()


@dataclass(frozen=True, kw_only=True)
class Compare(Command):
    """Compare fresh metrics with committed ones, each within its tol."""

    committed: str = option("folder of metrics", flag="name")
    fresh: str = option("folder of metrics of another run", flag="name")

    def _run(self) -> int:
        from series import claims

        committed, fresh = claims.read_metrics(Path(self.committed)), claims.read_metrics(Path(self.fresh))
        for folder, metrics in ((self.committed, committed), (self.fresh, fresh)):
            if not metrics:
                raise ValueError(f"{folder} holds no metrics; a run of the notebooks writes them")
        changed = claims.differences(committed, fresh)
        print("\n".join(changed) or f"metrics agree: {sum(map(len, committed.values()))} entries")
        return 1 if changed else 0


@dataclass(frozen=True, kw_only=True)
class ClipConfig(Command):
    """Say which model makes clips, what stands beside it, and where it runs."""

    seed: int = option("of the noise of the first clip", 0, low=0, high=LARGEST_SEED)
    seconds: int = option("length of a clip in seconds; of a teacher's, at most 600", 5, high=LONGEST_STREAM)
    steps: int = option("sampling steps of a dev teacher; others have their own", 40, high=MOST_STEPS)
    model: str = option(CHECKPOINT, "student")
    device: str = option("cpu, cuda, cuda:1 or auto", "cpu")
    dtype: str = option("of the weights", "float32", choices=("float32", "bfloat16"))
    weights: str = option("keep the blocks' weights in e4m3 (default: in --dtype)", "", choices=("fp8",))
    offload: bool = option("keep the blocks in main memory", False)
    attention: str = option("auto, sdpa, flash or flex", "auto")
    capture: bool = option("on a GPU, replay the steady passes of a stream as CUDA graphs", True)
    parts: tuple[str, ...] = option(
        "LTX-2 files or diffusers folder with VAEs and vocoder "
        "(default: the model's own, or ltx-2*.safetensors beside it)",
        (),
    )
    gemma: str = option("folder of Gemma 3 or 4, or LTX-2.5's text encoder (default: gemma* beside the model)", "")
    variant: str = option("what a teacher is (default: as its name says, else dev)", "", choices=("dev", "distilled"))
    contexts: str = option("folder that keeps Gemma's contexts (default: the user's cache)", "")
    lora: tuple[str, ...] = option("LoRA file to add to the weights; may be given again", (), flag="--lora")
    grid: tuple[int, int] = option(
        "tokens of a frame of LTX-2, down and across, of 32 x 32 pixels each", (16, 24), high=1000
    )
    horizon: int | None = option("video latents that a streamed frame of LTX-2 waits for", None, low=0)
    decoder: tuple[str, str] = option("tiny and a TAEHV file: frames that wait for nothing (default: LTX-2's own)", ())

    def bundle(self, prompts: Sequence[str]):
        """Find codec and text encoder of the model, encode all prompts, and say how its weights are loaded."""
        import torch

        from omniforcing_lib import backends, model_bundle
        from omniforcing_lib.ltx2 import checkpoints, lora, low_memory

        checkpoint = checkpoints.read(self.model)
        if checkpoint.causal is None and self.seconds > LONGEST_CLIP:
            limit = f"{LONGEST_CLIP} s, found {self.seconds}"
            raise ValueError(f"--seconds: a teacher makes a clip at once, at most {limit}; a student can stream a day")
        lora.read(self.lora, checkpoint.bare_shapes)
        backends.use(self.attention)
        near = {name: getattr(self, name) for name in ("parts", "gemma", "horizon", "decoder", "contexts", "variant")}
        bundle = model_bundle.of(self.model, device=self.device, dtype=self.dtype, grid=self.grid, **near)
        bundle.choose_attention()
        for prompt in prompts:  # one outside the grammar is refused before any work
            bundle.text.encode([prompt], bundle.device)
        encoder: Any = bundle.text
        if getattr(encoder, "cache", None):  # the contexts are kept there, and Gemma is as large as the model
            encoder.unload()
        print(bundle)
        load = {"device": bundle.device, "dtype": getattr(torch, self.dtype)}
        if self.weights:
            multiplied = low_memory.multiplies(torch.device(bundle.device), load["dtype"], 16, 16)
            print(f"fp8 weights: {low_memory.PRODUCTS[multiplied]}")
        return bundle, load | {"weights": self.weights or None, "offload": self.offload, "loras": self.lora}


@dataclass(frozen=True, kw_only=True)
class Generate(ClipConfig):
    """Make a clip from a prompt."""

    prompt: str = option('for instance "a red ball, bell"')
    out: str = option("file; .safetensors holds frames and samples, and needs no PyAV", writes=".mp4 .safetensors")

    def _run(self) -> None:
        from omniforcing_lib import backends, files, stream
        from omniforcing_lib.ltx2 import checkpoints

        out = Path(self.out)
        if out.suffix == ".mp4" and not backends.installed("av"):
            raise ValueError(f"{out} is written by PyAV: pip install av, or give --out a .safetensors file")
        causal = checkpoints.read(self.model).causal
        bundle, load = self.bundle([self.prompt] if causal else [self.prompt, ""])
        model = checkpoints.load(self.model, **load)
        clip = model, causal, bundle.codec, bundle.text, self.prompt, self.seconds, self.seed
        pieces = stream.clip_pieces(*clip, bundle.sampling(self.steps), capture=self.capture)
        if out.suffix == ".mp4":
            from omniforcing_lib import media

            print(media.write_pieces(out, pieces, bundle.codec.clock))
        else:
            import torch

            frames, samples = (torch.cat([*map(torch.from_numpy, part)]) for part in zip(*pieces, strict=True))
            rates = {"fps": str(bundle.codec.clock.fps), "sample_rate": str(bundle.codec.clock.sample_rate)}
            print(files.write_tensors(out, {"frames": frames, "samples": samples}, rates))


@dataclass(frozen=True, kw_only=True)
class ExportClips(ClipConfig):
    """Make the clips that VBench, JavisBench or StreamAVBench read, with a manifest."""

    prompts: str = option("a file, a prompt or StreamAVBench's case per line; what to make after a tab")
    tool: str = option("vbench, javisbench or streamavbench, whose clips last 180 s", "vbench")
    pattern: str = option("name, of {prompt}, {sample}, {number} (default: the tool's)", "")
    samples: int = option("clips of a prompt; 0 is the tool's own number", 0, low=0)
    out: str = option("folder of clips and manifest", writes="folder")

    def _run(self) -> None:
        from omniforcing_lib import stream
        from omniforcing_lib.ltx2 import checkpoints
        from studies import benchmark_export

        tool = benchmark_export.tool_of(self.tool, self.pattern, self.samples)
        prompts = benchmark_export.read_prompts(Path(self.prompts))
        benchmark_export.clips_of(tool, prompts, self.seed)
        bundle, load = self.bundle([*prompts.values(), ""])
        checkpoint = checkpoints.read(self.model)
        model = functools.cache(lambda: checkpoints.load(self.model, **load))  # not before the folder is known to fit

        def make(prompt: str, seed: int):
            clip = model(), checkpoint.causal, bundle.codec, bundle.text, prompt, self.seconds, seed
            return stream.clip_pieces(*clip, how, capture=self.capture)

        how = bundle.sampling(self.steps)
        made = vars(how) | {"guidance": str(how.guidance)}
        made = made if checkpoint.causal is None else {"causal": checkpoint.causal.to_metadata()}
        protocol = {"seconds": self.seconds, "dtype": self.dtype, "weights": self.weights or None}
        protocol |= {"horizon": self.horizon, "model": Path(self.model).name, **made}
        protocol |= {"decoder": [Path(w).name for w in self.decoder], "lora": [Path(path).name for path in self.lora]}
        protocol |= {"resolution": benchmark_export.resolution(bundle.codec, checkpoint.config)}
        clock, out = bundle.codec.clock, self.out
        print(benchmark_export.write(make, prompts, tool, Path(out), clock=clock, seed=self.seed, protocol=protocol))


@dataclass(frozen=True, kw_only=True)
class Render(Command):
    """Render a true clip of the Bounce world."""

    prompt: str = option("of the clip (default: drawn from the seed)", "")
    seconds: int = option("length of the clip in seconds", 5, high=LONGEST_CLIP)
    seed: int = option("of the world", 0, low=0, high=LARGEST_SEED)
    out: str = option("file", writes=".mp4")

    def _run(self) -> None:
        from omniforcing_lib import media
        from omniforcing_lib.bounce import world

        scene = world.scene(self.seed, self.prompt or None)
        print(media.write_clip(Path(self.out), world.render(scene, seconds=self.seconds), world.CLOCK))


@dataclass(frozen=True, kw_only=True)
class Score(Command):
    """Measure models by the protocol of the reports: held-out seeds, through an mp4."""

    models: tuple[str, ...] = option(f"each {CHECKPOINT}", ("teacher", "stage2", "student"))
    clips: int = option("clips of a seed", 64)
    seeds: int = option("disjoint sets of seeds", 3)
    seconds: int = option("length of a clip in seconds", 5, high=LONGEST_CLIP)
    steps: tuple[int, ...] = option("sampling steps of a teacher; a column each", (40,), high=MOST_STEPS)
    selection: bool = option("clips of the seeds by which choices are made", False)
    unprompted: bool = option("a column of the teacher without a prompt", False)
    long: bool = option("students alone, in spans of 10 s of one long roll-out each", False)
    hum: bool = option("a steady tone lies under the bounces; what is heard of it is measured too", False)
    hidden: bool = option("the box goes on out of sight; of short clips, where the ball comes back is measured", False)
    codec: str = option(".safetensors file of the codec of the models' latents (default: the world's shipped one)", "")
    out: str = option("folder", "reports/scores", writes="folder")

    def _run(self) -> None:
        from omniforcing_lib import files
        from series import plots
        from studies import protocol

        systems = protocol.systems_of(self.models, self.steps, unprompted=self.unprompted)
        first = protocol.SELECTION if self.selection else protocol.Trial.first
        shipped = "codec_hum" if self.hum or self.hidden else "codec"
        codec = self.codec or str(files.DATA / f"{shipped}.safetensors")
        how = {"hum": self.hum, "hidden": self.hidden, "codec": codec}
        trial = protocol.Trial(self.clips, self.seeds, self.seconds, first=first, **how)
        if self.long:
            print(protocol.run_long(systems, trial, Path(self.out)))
        else:
            print(protocol.run(systems, trial, Path(self.out), plots.contact_sheet))


@dataclass(frozen=True, kw_only=True)
class Cures(Command):
    """Train Stage 3 with one remedy against collapse at a time, from Stage 2, and measure."""

    names: tuple[str, ...] = option("names of remedies (default: all)", ())
    seeds: int = option("training seeds of each remedy", 3)
    out: str = option("folder; finished runs there are kept", "reports/cures", writes="folder")

    def _run(self) -> None:
        from studies import cures

        print(cures.run(self.out, names=self.names, seeds=self.seeds))


@dataclass(frozen=True, kw_only=True)
class Extended(Command):
    """Train Stages 2 and 3 in the world with a hum and a hidden wall, one part changed at a time, and measure."""

    teacher: str = option("teacher of that world: a file, an index or a folder (default: data/teacher_hum)", "")
    codec: str = option(".safetensors file of its codec (default: data/codec_hum)", "")
    pairs: str = option(".safetensors file of its trajectories, by `train pairs` (default: data/ode_pairs_hum)", "")
    arms: tuple[str, ...] = option("names of arms (default: all)", ())
    seeds: int = option("training seeds of each arm", 5)
    out: str = option("folder; finished runs there are kept", "reports/extended", writes="folder")

    def _run(self) -> None:
        from series import claims
        from studies import extended

        there = extended.shipped()
        names = (self.teacher or there.teacher, self.codec or there.codec, self.pairs or there.pairs)
        folder = extended.run(self.out, extended.Sources(*names), arms=self.arms, seeds=self.seeds)
        if rows := extended.told(folder):
            print(claims.plain_table(rows))


@dataclass(frozen=True, kw_only=True)
class Ablate(Command):
    """Train Stage 3 with one part changed at a time, seed by seed, and measure."""

    arms: tuple[str, ...] = option("names of arms (default: all)", ())
    seeds: int = option("training seeds of each arm", 2)
    out: str = option("folder; finished runs there are kept", "reports/ablations", writes="folder")

    def _run(self) -> None:
        from series import claims
        from studies import ablations

        folder, trials = ablations.run(self.out, arms=self.arms, seeds=self.seeds), ablations.TRIALS
        for table in (trials.table(folder), trials.gains(folder, ablations.BASE)):
            rows = [
                {"arm": arm} | {name: claims.quote({"value": m, "interval": i}) for name, (m, i) in row.items()}
                for arm, row in table.items()
            ]
            if rows:
                print(claims.plain_table(rows), end="\n\n")


@dataclass(frozen=True, kw_only=True)
class Sinks(Command):
    """Train the stored runs of notebook 03: the study over seeds, the phase diagram."""

    plans: tuple[str, ...] = option("which runs", ("study", "phase"), choices=("study", "phase"))
    arms: tuple[str, ...] = option("names of arms (default: all of the plan)", ())
    seeds: int = option("training seeds; 0 takes the plan's", 0, low=0)
    steps: int = option("steps of each run; 0 takes the plan's", 0, low=0)
    out: str = option("folder; finished runs there are kept", "reports/sinks", writes="folder")

    def _run(self) -> None:
        from series import claims
        from studies import sink_runs

        if self.arms and len(self.plans) > 1:
            raise ValueError(f"--arms are of one plan, found {' and '.join(self.plans)}: give --plans with one name")
        for plan in self.plans:
            print(sink_runs.run(plan, self.out, arms=self.arms, seeds=self.seeds, steps=self.steps))
            print(claims.plain_table(sink_runs.table(sink_runs.stored(plan, self.out).traces)))


@dataclass(frozen=True, kw_only=True)
class Bench(Command):
    """Measure a GPU with a model of random weights, phase by phase, and store every figure."""

    size: str = option("of the model", "19b", choices=("19b", "bench", "miniature"))
    device: str = option("cpu, cuda, cuda:1 or auto", "auto")
    phases: tuple[str, ...] = option("names of phases (default: all)", ())
    budget: float = option("seconds for all phases together", 570.0)
    out: str = option("folder (default reports/gpu, for a CPU reports/runs/gpu)", "", writes="folder")

    def _run(self) -> None:
        from studies import gpu_bench

        print(gpu_bench.run(self.size, self.device, self.phases, self.budget, self.out))


@dataclass(frozen=True, kw_only=True)
class Inspect(Command):
    """Print a checkpoint's configuration, size and keys."""

    checkpoint: str = option(CHECKPOINT, flag="name")

    def _run(self) -> None:
        from omniforcing_lib.ltx2 import checkpoints

        print(checkpoints.inspect(self.checkpoint))


@dataclass(frozen=True, kw_only=True)
class Export(Command):
    """Write a checkpoint's transformer in another format, bit for bit."""

    checkpoint: str = option(CHECKPOINT, flag="name")
    to: str = option("format", choices=("ltx2", "diffusers"))
    out: str = option("a .safetensors file, or for diffusers a new folder")

    def _run(self) -> None:
        from omniforcing_lib.ltx2 import checkpoints

        written = checkpoints.export(self.checkpoint, Path(self.out), to=self.to)
        print("\n".join([str(written), *checkpoints.left_out(checkpoints.read(self.checkpoint), self.to)]))


@dataclass(frozen=True, kw_only=True)
class Convert(Command):
    """Turn a pickle that was published as a checkpoint into safetensors; every other command refuses pickles."""

    checkpoint: str = option("a .pt, .pth, .ckpt or .bin file", flag="name")
    out: str = option("file", writes=".safetensors")

    def _run(self) -> None:
        from omniforcing_lib import files
        from omniforcing_lib.ltx2 import exports

        written, given = exports.convert(self.checkpoint, self.out), files.given(self.checkpoint)
        print(f"{written}: tensors alone, nothing was executed. A pickle can run code wherever else it is opened:")
        print(f"warning: compare sha256 {files.sha256(given)} of {given} with its publisher's, and keep the new file")


@dataclass(frozen=True, kw_only=True)
class Train(Command):
    """Train one stage, alone or under torchrun, or plan the memory of Stage 3."""

    stage: str = option(
        "what to make",
        flag="name",
        choices=("codec", "teacher", "prompts", "pairs", "first-block", "stage2", "stage3", "on-policy", "plan"),
    )
    rest: tuple[str, ...] = option("options of that stage; --help lists them", flag="...")

    def _run(self) -> int:
        from omniforcing_lib.training import recipes, run_folder

        try:
            recipes.main(self.stage, *self.rest)
        except run_folder.Diverged as error:
            return _fail(error, 1)
        return 0


COMMANDS: dict[str, type[Command]] = {
    "reproduce": Reproduce,
    "refresh": Refresh,
    "publish": Publish,
    "report": Report,
    "compare": Compare,
    "generate": Generate,
    "export-clips": ExportClips,
    "render": Render,
    "score": Score,
    "cures": Cures,
    "ablate": Ablate,
    "extended": Extended,
    "sinks": Sinks,
    "bench": Bench,
    "inspect": Inspect,
    "export": Export,
    "convert": Convert,
    "train": Train,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 1 for a run that failed, 2 for bad input."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a sign that a terminal does not know is no reason to fail
            stream.reconfigure(errors="replace")
    try:
        return parse(sys.argv[1:] if argv is None else argv).run() or 0
    except (ValueError, OSError) as error:
        return _fail(error, 2)
    except RuntimeError as error:
        from series.runner import NotebookFailed

        if not isinstance(error, NotebookFailed):
            raise
        return _fail(error, 1)


def parse(words: Sequence[str]) -> Command:
    """Read a command and its options; bad ones end the program with one line and code 2."""
    given = vars(parser().parse_args(words))
    return COMMANDS[given.pop("command")].of(given)


def parser() -> Parser:
    """Build the parser of all commands."""
    whole = Parser(prog="omniforcing", description=__doc__)
    commands = whole.add_subparsers(required=True, metavar="command", dest="command")
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=command.__doc__, description=command.__doc__).add_options(command)
    return whole


def _fail(error: Exception, code: int) -> int:
    print(f"error: {one_line(str(error))}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
