"""The command line: run the series, make a clip, look into a checkpoint, train."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

LONGEST_LINE = 600
LONGEST_CLIP = 600  # seconds that are held in memory; `stream.Streamer` goes on without end
LARGEST_SEED = 2**63 - 1  # what torch's generators take


class Parser(argparse.ArgumentParser):
    """Answer bad input with one line on stderr and exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Exit with 2, without the usage text that hides the message."""
        self.exit(2, f"error: {_one_line(message)} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 1 for a run that failed, 2 for bad input."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments) or 0
    except (ValueError, OSError) as error:
        return _fail(error, 2)
    except RuntimeError as error:
        # Imported here: the runner is not needed to answer `--help` or to render a clip.
        from omniforcing_lib.pages.runner import NotebookFailed

        if not isinstance(error, NotebookFailed):
            raise
        return _fail(error, 1)


def _fail(error: Exception, code: int) -> int:
    print(f"error: {_one_line(str(error))}", file=sys.stderr)
    return code


def _one_line(text: str) -> str:
    """Give a message that quotes what somebody typed, or a file says, as one line of bounded length."""
    line = "".join(sign if sign.isprintable() else " " for sign in " ".join(text.split()))
    return line if len(line) <= LONGEST_LINE else f"{line[: LONGEST_LINE // 2]} ... {line[-LONGEST_LINE // 3 :]}"


def _parser() -> Parser:
    parser = Parser(prog="omniforcing", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(name: str, run, text: str) -> Parser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(run=run)
        return added

    reproduce = command("reproduce", _reproduce, "execute the notebooks and write a report")
    reproduce.add_argument("--profile", default="cpu", help="smoke, cpu, full or gpu (default cpu)")
    reproduce.add_argument("--only", default="", help='notebooks to run, as "03" or "03,05"')
    reproduce.add_argument("-p", dest="parameters", action="append", default=[], metavar="NAME=VALUE")
    reproduce.add_argument("--out", default="", help="run folder (default reports/runs/<time>-<profile>)")
    reproduce.add_argument("--notebooks", type=Path, help="folder of notebooks (default: the series)")

    refresh = command("refresh", _refresh, "execute the notebooks as stored and store their outputs")
    refresh.add_argument("--only", default="")

    publish = command("publish", _publish, "copy a run's metrics and figures into reports/ and rebuild it")
    publish.add_argument("folder", type=Path)

    command("report", _report, "rebuild reports/REPORT.md from the committed metrics")

    compare = command("compare", _compare, "compare fresh metrics with committed ones, each within its tol")
    compare.add_argument("committed", type=Path)
    compare.add_argument("fresh", type=Path)

    generate = command("generate", _generate, "make a clip from a prompt")
    generate.add_argument("--prompt", required=True, help='for instance "a red ball, bell"')
    generate.add_argument("--seed", type=int, default=0)
    generate.add_argument("--out", type=Path, required=True)
    generate.add_argument("--steps", type=int, default=40, help="of a teacher (default 40)")
    _takes_model(generate)

    export = command("export-clips", _export_clips, "make the clips that VBench or JavisBench read, with a manifest")
    export.add_argument("--prompts", type=Path, required=True, help="a prompt a line; a longer one after a tab")
    export.add_argument("--tool", default="vbench", help="vbench or javisbench (default vbench)")
    export.add_argument("--pattern", default="", help="name, of {prompt}, {sample}, {number} (default: the tool's)")
    export.add_argument("--samples", type=int, default=0, help="clips a prompt (default: the tool's)")
    export.add_argument("--seed", type=int, default=0, help="of the first clip; each has its own")
    export.add_argument("--steps", type=int, default=40, help="of a teacher (default 40)")
    export.add_argument("--out", type=Path, required=True, help="folder")
    _takes_model(export)

    render = command("render", _render, "render a true clip of the Bounce world")
    render.add_argument("--prompt", help="drawn from the seed when left out")
    render.add_argument("--seconds", type=int, default=5)
    render.add_argument("--seed", type=int, default=0)
    render.add_argument("--out", type=Path, required=True)

    score = command("score", _score, "measure models by the protocol of the reports: held-out seeds, through an mp4")
    score.add_argument("--models", nargs="+", default=["teacher", "stage2", "student"])
    score.add_argument("--clips", type=int, default=64, help="clips a seed (default 64)")
    score.add_argument("--seeds", type=int, default=3)
    score.add_argument("--seconds", type=int, default=5)
    score.add_argument("--steps", type=int, nargs="+", default=[40], help="teacher steps; a column each")
    score.add_argument("--unprompted", action="store_true", help="a column of the teacher without a prompt")
    score.add_argument("--long", action="store_true", help="students alone, in spans of 10 s of one long roll-out each")
    score.add_argument("--out", type=Path, default=Path("reports/scores"))

    ablate = command("ablate", _ablate, "train Stage 3 with one part changed at a time, seed by seed, and measure")
    ablate.add_argument("--arms", nargs="+", default=[], help="names of arms (default: all)")
    ablate.add_argument("--seeds", type=int, default=2)
    ablate.add_argument("--out", type=Path, default=Path("reports/ablations"), help="finished runs there are kept")

    inspect = command("inspect", _inspect, "print a checkpoint's configuration, size and keys")
    inspect.add_argument("checkpoint", help="teacher, stage2, student, a file, an index or a folder")

    export = command("export", _export, "write a checkpoint's transformer in another format, bit for bit")
    export.add_argument("checkpoint", help="teacher, stage2, student, a file, an index or a folder")
    export.add_argument("--to", choices=("ltx2", "diffusers"), required=True)
    export.add_argument("--out", type=Path, required=True, help="a .safetensors file, or for diffusers a new folder")

    train = command("train", _train, "train one stage, alone or under torchrun, or plan the memory of Stage 3")
    train.add_argument("stage", choices=("codec", "teacher", "prompts", "pairs", "stage2", "stage3", "plan"))
    train.add_argument("rest", nargs=argparse.REMAINDER, help="options of that stage; --help lists them")
    return parser


def _reproduce(arguments: argparse.Namespace) -> None:
    from omniforcing_lib.pages import runner

    runner.reproduce(
        arguments.profile,
        only=arguments.only,
        parameters=arguments.parameters,
        out=arguments.out,
        folder=arguments.notebooks or runner.NOTEBOOKS,
    )


def _refresh(arguments: argparse.Namespace) -> None:
    from omniforcing_lib.pages import runner

    runner.refresh(only=arguments.only)


def _publish(arguments: argparse.Namespace) -> None:
    from omniforcing_lib.pages import runner

    print(f"published {', '.join(runner.publish_run(arguments.folder))}")


def _report(arguments: argparse.Namespace) -> None:
    from omniforcing_lib.pages import runner

    runner.rebuild()


def _compare(arguments: argparse.Namespace) -> int:
    from omniforcing_lib.pages import claims

    committed = claims.read_metrics(arguments.committed)
    if not committed:
        raise ValueError(f"{arguments.committed} holds no metrics; make nb-refresh writes them")
    found = claims.differences(committed, claims.read_metrics(arguments.fresh))
    print("\n".join(found) or f"metrics agree: {sum(map(len, committed.values()))} entries")
    return 1 if found else 0


def _takes_model(parser: Parser) -> None:
    """Add what says which model makes clips, what stands beside it, and where it runs."""
    parser.add_argument("--seconds", type=int, default=5)
    parser.add_argument("--model", default="student", help="student, teacher, a checkpoint file, an index or a folder")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--weights", choices=("fp8",), help="keep the blocks' weights in e4m3")
    parser.add_argument("--offload", action="store_true", help="keep the blocks in main memory")
    parser.add_argument("--attention", default="auto", help="auto, sdpa, flash or flex (default auto)")
    parser.add_argument("--parts", default="", help="LTX-2 file or diffusers folder with VAEs, vocoder, connectors")
    parser.add_argument("--gemma", default="", help="folder of Gemma 3 (default: gemma* beside the model)")
    parser.add_argument("--grid", type=int, nargs=2, default=(16, 24), help="LTX-2's tokens of a frame (16 24)")
    parser.add_argument("--horizon", type=int, help="video latents that a streamed frame of LTX-2 waits for")


def _beside(arguments: argparse.Namespace, prompts: Sequence[str]):
    """Find codec and text encoder of the model, encode all prompts, and say how its weights are loaded."""
    import torch

    from omniforcing_lib import backends
    from omniforcing_lib.lab import companions

    backends.use(arguments.attention)
    near = {"parts": arguments.parts, "gemma": arguments.gemma, "horizon": arguments.horizon}
    place = {"device": arguments.device, "dtype": arguments.dtype, "grid": tuple(arguments.grid)}
    beside = companions.of(arguments.model, **place, **near)
    for prompt in prompts:  # one outside the grammar is refused before any work
        beside.text.encode([prompt], beside.device)
    print(beside)
    load = {"device": arguments.device, "dtype": getattr(torch, arguments.dtype)}
    return beside, load | {"weights": arguments.weights, "offload": arguments.offload}


def _generate(arguments: argparse.Namespace) -> None:
    from omniforcing_lib.live import stream
    from omniforcing_lib.pages import media

    _check_clip(arguments)
    beside, load = _beside(arguments, [arguments.prompt])
    how = {"codec": beside.codec, "text": beside.text, "guidance": beside.guidance, "load": load}
    how["steps"] = arguments.steps
    clip = stream.generate(arguments.prompt, arguments.seconds, arguments.seed, arguments.model, **how)
    print(media.write_clip(arguments.out, clip, beside.codec.clock))


def _export_clips(arguments: argparse.Namespace) -> None:
    from omniforcing_lib.lab import submission
    from omniforcing_lib.live import stream
    from omniforcing_lib.weights import checkpoints

    _check_numbers(arguments)
    tool = submission.tool_of(arguments.tool, arguments.pattern, arguments.samples)
    prompts = submission.read_prompts(arguments.prompts)
    submission.clips_of(tool, prompts, arguments.seed)
    beside, load = _beside(arguments, [*prompts.values(), ""])
    causal, model = checkpoints.read(arguments.model).causal, checkpoints.load(arguments.model, **load)

    def make(prompt: str, seed: int):
        parts = model, causal, beside.codec, beside.text, prompt, arguments.seconds, seed
        return stream.make_clip(*parts, steps=arguments.steps, guidance=beside.guidance)

    made = {"steps": arguments.steps, "guidance": str(beside.guidance)}
    made = made if causal is None else {"causal": causal.to_metadata()}
    said = {name: getattr(arguments, name) for name in ("seconds", "dtype", "weights", "horizon")}
    said |= {"model": Path(arguments.model).name, "resolution": submission.resolution(beside.codec, model.config)}
    how = {"clock": beside.codec.clock, "seed": arguments.seed, "protocol": said | made}
    print(submission.write(make, prompts, tool, arguments.out, **how))


def _render(arguments: argparse.Namespace) -> None:
    from omniforcing_lib.bounce import world
    from omniforcing_lib.pages import media

    _check_clip(arguments)
    scene = world.scene(arguments.seed, arguments.prompt)
    print(media.write_clip(arguments.out, world.render(scene, seconds=arguments.seconds), world.CLOCK))


def _check_clip(arguments: argparse.Namespace) -> None:
    _check_numbers(arguments)
    if arguments.out.suffix != ".mp4":
        raise ValueError(f"--out is an .mp4 file, found {arguments.out}")
    if not arguments.out.resolve().parent.is_dir():
        raise ValueError(f"--out {arguments.out}: there is no such folder")


def _check_numbers(arguments: argparse.Namespace) -> None:
    if not 1 <= arguments.seconds <= LONGEST_CLIP:
        raise ValueError(f"--seconds is a whole number from 1 to {LONGEST_CLIP}, found {arguments.seconds}")
    if not 0 <= arguments.seed <= LARGEST_SEED:
        raise ValueError(f"--seed is from 0 to {LARGEST_SEED}, found {arguments.seed}")


def _score(arguments: argparse.Namespace) -> None:
    from omniforcing_lib.lab import protocol
    from omniforcing_lib.weights import checkpoints

    systems = {}
    for model in arguments.models:
        if checkpoints.read(model).causal is not None:
            systems[Path(model).stem] = protocol.System(model)
            continue
        for steps in arguments.steps:
            systems[f"{Path(model).stem}, {steps} steps"] = protocol.System(model, steps)
        if arguments.unprompted:
            systems[f"{Path(model).stem}, no prompt"] = protocol.System(model, min(arguments.steps), prompted=False)
    trial = protocol.Trial(arguments.clips, arguments.seeds, arguments.seconds)
    print((protocol.run_long if arguments.long else protocol.run)(systems, trial, arguments.out))


def _ablate(arguments: argparse.Namespace) -> None:
    from omniforcing_lib.lab import ablations
    from omniforcing_lib.pages import claims

    folder = ablations.run(arguments.out, arms=arguments.arms or tuple(ablations.ARMS), seeds=arguments.seeds)
    for found in (ablations.table(folder), ablations.gains(folder)):
        rows = {
            arm: {name: claims.quote({"value": mean, "interval": interval}) for name, (mean, interval) in row.items()}
            for arm, row in found.items()
        }
        if rows:
            print(claims.plain_table([{"arm": arm} | row for arm, row in rows.items()]), end="\n\n")


def _inspect(arguments: argparse.Namespace) -> None:
    from omniforcing_lib.weights import checkpoints

    print(checkpoints.inspect(arguments.checkpoint))


def _export(arguments: argparse.Namespace) -> None:
    from omniforcing_lib.weights import checkpoints

    written = checkpoints.export(arguments.checkpoint, arguments.out, to=arguments.to)
    print("\n".join([str(written), *checkpoints.left_out(checkpoints.read(arguments.checkpoint), arguments.to)]))


def _train(arguments: argparse.Namespace) -> int:
    from omniforcing_lib.lab import recipes
    from omniforcing_lib.training import journal

    try:
        recipes.main([arguments.stage, *arguments.rest])
    except journal.Diverged as error:
        return _fail(error, 1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
