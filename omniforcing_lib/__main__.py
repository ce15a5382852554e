"""The command line: run the series, make a clip, look into a checkpoint, train."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from omniforcing_lib import files

LONGEST_LINE = 600
LONGEST_CLIP = 600  # seconds of a file; `stream.Streamer` goes on without end
MOST_STEPS = 1000  # levels of noise that a model tells apart
LARGEST_SEED = 2**63 - 1  # what torch's generators take
CHECKPOINT = "teacher, stage2, student, a file, an index or a folder"


class Parser(argparse.ArgumentParser):
    """Answer bad input with one line on stderr and exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Exit with 2, without the usage text that hides the message."""
        self.exit(2, f"error: {_one_line(message)} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 1 for a run that failed, 2 for bad input."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a sign that a terminal does not know is no reason to fail
            stream.reconfigure(errors="replace")
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments) or 0
    except (ValueError, OSError) as error:
        return _fail(error, 2)
    except RuntimeError as error:
        # Imported here: the runner is not needed to answer `--help` or to render a clip.
        from series.runner import NotebookFailed

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
    reproduce.add_argument("--profile", default="cpu", help="amount of work: smoke, cpu, full or gpu (default cpu)")
    reproduce.add_argument("--only", default="", help='notebooks to run, as "03" or "03,05" (default: all)')
    named = {"dest": "parameters", "action": "append", "default": [], "metavar": "NAME=VALUE"}
    reproduce.add_argument("-p", **named, help="a parameter of the notebooks, as seed=4; may be given again")
    reproduce.add_argument("--out", default="", help="run folder (default reports/runs/<time>-<profile>)")
    reproduce.add_argument("--notebooks", type=_path, help="folder of notebooks (default: the series)")

    refresh = command("refresh", _refresh, "execute the notebooks as stored and store their outputs")
    refresh.add_argument("--only", default="", help='notebooks to run, as "03" or "03,05" (default: all)')

    publish = command("publish", _publish, "copy a run's metrics and figures into reports/ and rebuild it")
    publish.add_argument("folder", type=_path, help="a run folder of `reproduce`")

    command("report", _report, "rebuild reports/REPORT.md from the committed metrics")

    compare = command("compare", _compare, "compare fresh metrics with committed ones, each within its tol")
    compare.add_argument("committed", type=_path, help="folder of metrics")
    compare.add_argument("fresh", type=_path, help="folder of metrics of another run")

    generate = command("generate", _generate, "make a clip from a prompt")
    generate.add_argument("--prompt", required=True, help='for instance "a red ball, bell"')
    _takes_number(generate, "--seed", 0, (0, LARGEST_SEED), "of the noise")
    generate.add_argument("--out", type=_clip, required=True, help="an .mp4 file")
    _takes_model(generate)

    export = command("export-clips", _export_clips, "make the clips that VBench or JavisBench read, with a manifest")
    export.add_argument(
        "--prompts", type=_path, required=True, help="a file, a prompt a line; a longer one after a tab"
    )
    export.add_argument("--tool", default="vbench", help="vbench or javisbench (default vbench)")
    export.add_argument("--pattern", default="", help="name, of {prompt}, {sample}, {number} (default: the tool's)")
    _takes_number(export, "--samples", 0, (0, None), "clips a prompt; 0 is the tool's own number")
    _takes_number(export, "--seed", 0, (0, LARGEST_SEED), "of the first clip; each has its own")
    export.add_argument("--out", type=_folder, required=True, help="folder of clips and manifest")
    _takes_model(export)

    render = command("render", _render, "render a true clip of the Bounce world")
    render.add_argument("--prompt", help="drawn from the seed when left out")
    _takes_number(render, "--seconds", 5, (1, LONGEST_CLIP), "length of the clip in seconds")
    _takes_number(render, "--seed", 0, (0, LARGEST_SEED), "of the world")
    render.add_argument("--out", type=_clip, required=True, help="an .mp4 file")

    score = command("score", _score, "measure models by the protocol of the reports: held-out seeds, through an mp4")
    models = ["teacher", "stage2", "student"]
    score.add_argument("--models", nargs="+", default=models, help=f"each {CHECKPOINT} (default {' '.join(models)})")
    _takes_number(score, "--clips", 64, (1, None), "clips a seed")
    _takes_number(score, "--seeds", 3, (1, None), "disjoint sets of seeds")
    _takes_number(score, "--seconds", 5, (1, LONGEST_CLIP), "length of a clip in seconds")
    _takes_number(score, "--steps", (40,), (1, MOST_STEPS), "sampling steps of a teacher; a column each", nargs="+")
    score.add_argument("--selection", action="store_true", help="clips of the seeds by which choices are made")
    score.add_argument("--unprompted", action="store_true", help="a column of the teacher without a prompt")
    score.add_argument("--long", action="store_true", help="students alone, in spans of 10 s of one long roll-out each")
    score.add_argument("--out", type=_folder, default="reports/scores", help="folder (default reports/scores)")

    cure = command(
        "cures", _cures, "train Stage 3 with one remedy against collapse at a time, from Stage 2, and measure"
    )
    cure.add_argument("--names", nargs="+", default=[], help="names of remedies (default: all)")
    _takes_number(cure, "--seeds", 3, (1, None), "training seeds of each remedy")
    _takes_runs(cure, "reports/cures")

    ablate = command("ablate", _ablate, "train Stage 3 with one part changed at a time, seed by seed, and measure")
    ablate.add_argument("--arms", nargs="+", default=[], help="names of arms (default: all)")
    _takes_number(ablate, "--seeds", 2, (1, None), "training seeds of each arm")
    _takes_runs(ablate, "reports/ablations")

    sinks = command("sinks", _sinks, "train the stored runs of notebook 03: the study over seeds, the phase diagram")
    sinks.add_argument(
        "--plans", nargs="+", default=["study", "phase"], choices=("study", "phase"), help="which runs (default: both)"
    )
    sinks.add_argument("--arms", nargs="+", default=[], help="names of arms (default: all of the plan)")
    _takes_number(sinks, "--seeds", 0, (0, None), "training seeds; 0 takes the plan's")
    _takes_number(sinks, "--steps", 0, (0, None), "steps of each run; 0 takes the plan's")
    _takes_runs(sinks, "reports/sinks")

    inspect = command("inspect", _inspect, "print a checkpoint's configuration, size and keys")
    inspect.add_argument("checkpoint", help=CHECKPOINT)

    export = command("export", _export, "write a checkpoint's transformer in another format, bit for bit")
    export.add_argument("checkpoint", help=CHECKPOINT)
    export.add_argument("--to", choices=("ltx2", "diffusers"), required=True, help="format")
    export.add_argument("--out", type=_path, required=True, help="a .safetensors file, or for diffusers a new folder")

    train = command("train", _train, "train one stage, alone or under torchrun, or plan the memory of Stage 3")
    stages = ("codec", "teacher", "prompts", "pairs", "stage2", "stage3", "on-policy", "plan")
    train.add_argument("stage", choices=stages, help="what to make")
    train.add_argument("rest", nargs=argparse.REMAINDER, help="options of that stage; --help lists them")
    return parser


def _checked(read: Callable[[str], Path | int]) -> Callable[[str], Path | int]:
    """Let argparse say what `read` says of a word that it refuses."""

    def word(text: str) -> Path | int:
        try:
            return read(text)
        except (ValueError, OSError) as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return word


_path = _checked(files.given)


@_checked
def _clip(text: str) -> Path:
    """Take a clip that can be written."""
    path = files.given(text)
    if path.suffix != ".mp4":
        raise ValueError(f"expected an .mp4 file, found {path}")
    if not path.parent.is_dir():
        raise ValueError(f"{path}: there is no such folder as {path.parent}")
    files.check_file(path)
    return path


@_checked
def _folder(text: str) -> Path:
    """Take a folder that can be written, there or not."""
    path = files.given(text)
    files.check_folder(path)
    return path


def _takes_runs(parser: Parser, usual: str) -> None:
    """Add the folder of a comparison that goes on where it stopped."""
    help_line = f"folder; finished runs there are kept (default {usual})"
    parser.add_argument("--out", type=_folder, default=usual, help=help_line)


def _takes_number(
    parser: Parser,
    option: str,
    default: int | tuple[int, ...] | None,
    span: tuple[int, int | None],
    text: str,
    **how: object,
) -> None:
    """Add an option that is a whole number from `span[0]` to `span[1]`, and says so, with its default."""
    least, most = span
    wanted = f"{least} to {most}" if most else f"{least} or more"

    def read(word: str) -> int:
        if not word.removeprefix("-").isdecimal() or not least <= int(word) <= (most or LARGEST_SEED):
            raise ValueError(f"expected a whole number, {wanted}, found {word[:40]!r}")
        return int(word)

    many = default if isinstance(default, tuple) else (default,)
    told = "" if default is None else f" (default {' '.join(map(str, many))})"
    text = f"{text}, {wanted}{told}"
    parser.add_argument(option, type=_checked(read), default=default, metavar="N", help=text, **how)


def _reproduce(arguments: argparse.Namespace) -> None:
    from series import runner

    runner.reproduce(
        arguments.profile,
        only=arguments.only,
        parameters=arguments.parameters,
        out=arguments.out,
        folder=arguments.notebooks or runner.NOTEBOOKS,
    )


def _refresh(arguments: argparse.Namespace) -> None:
    from series import runner

    runner.refresh(only=arguments.only)


def _publish(arguments: argparse.Namespace) -> None:
    from series import runner

    print(f"published {', '.join(runner.publish_run(arguments.folder))}")


def _report(arguments: argparse.Namespace) -> None:
    from series import runner

    runner.rebuild()


def _compare(arguments: argparse.Namespace) -> int:
    from series import claims

    committed, fresh = claims.read_metrics(arguments.committed), claims.read_metrics(arguments.fresh)
    for folder, metrics in ((arguments.committed, committed), (arguments.fresh, fresh)):
        if not metrics:
            raise ValueError(f"{folder} holds no metrics; a run of the notebooks writes them")
    found = claims.differences(committed, fresh)
    print("\n".join(found) or f"metrics agree: {sum(map(len, committed.values()))} entries")
    return 1 if found else 0


def _takes_model(parser: Parser) -> None:
    """Add what says which model makes clips, what stands beside it, and where it runs."""
    _takes_number(parser, "--seconds", 5, (1, LONGEST_CLIP), "length of a clip in seconds")
    _takes_number(parser, "--steps", 40, (1, MOST_STEPS), "sampling steps of a teacher; a student has its own")
    parser.add_argument("--model", default="student", help=f"{CHECKPOINT} (default student)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 or auto (default cpu)")
    kinds = ("float32", "bfloat16")
    parser.add_argument("--dtype", default="float32", choices=kinds, help="of the weights (default float32)")
    parser.add_argument("--weights", choices=("fp8",), help="keep the blocks' weights in e4m3 (default: in --dtype)")
    parser.add_argument("--offload", action="store_true", help="keep the blocks in main memory")
    parser.add_argument("--attention", default="auto", help="auto, sdpa, flash or flex (default auto)")
    near = "(default: the model's own, or ltx-2*.safetensors beside it)"
    parser.add_argument("--parts", default="", help=f"LTX-2 file or diffusers folder with VAEs and vocoder {near}")
    parser.add_argument("--gemma", default="", help="folder of Gemma 3 (default: gemma* beside the model)")
    parser.add_argument("--contexts", default="", help="folder that keeps Gemma's contexts (default: the user's cache)")
    grid = "tokens of a frame of LTX-2, down and across, of 32 x 32 pixels each"
    _takes_number(parser, "--grid", (16, 24), (1, 1000), grid, nargs=2)
    _takes_number(parser, "--horizon", None, (0, None), "video latents that a streamed frame of LTX-2 waits for")


def _beside(arguments: argparse.Namespace, prompts: Sequence[str]):
    """Find codec and text encoder of the model, encode all prompts, and say how its weights are loaded."""
    import torch

    from omniforcing_lib import backends, model_bundle

    backends.use(arguments.attention)
    near = {name: getattr(arguments, name) for name in ("parts", "gemma", "horizon", "contexts")}
    place = {"device": arguments.device, "dtype": arguments.dtype, "grid": tuple(arguments.grid)}
    beside = model_bundle.of(arguments.model, **place, **near)
    beside.choose_attention()
    for prompt in prompts:  # one outside the grammar is refused before any work
        beside.text.encode([prompt], beside.device)
    print(beside)
    load = {"device": beside.device, "dtype": getattr(torch, arguments.dtype)}
    return beside, load | {"weights": arguments.weights, "offload": arguments.offload}


def _generate(arguments: argparse.Namespace) -> None:
    from omniforcing_lib import media, stream
    from omniforcing_lib.ltx2 import checkpoints

    beside, load = _beside(arguments, [arguments.prompt])
    causal, model = checkpoints.read(arguments.model).causal, checkpoints.load(arguments.model, **load)
    parts = model, causal, beside.codec, beside.text, arguments.prompt, arguments.seconds, arguments.seed
    pieces = stream.clip_pieces(*parts, steps=arguments.steps, guidance=beside.guidance)
    print(media.write_pieces(arguments.out, pieces, beside.codec.clock))


def _export_clips(arguments: argparse.Namespace) -> None:
    from omniforcing_lib import stream
    from omniforcing_lib.ltx2 import checkpoints
    from studies import benchmark_export

    tool = benchmark_export.tool_of(arguments.tool, arguments.pattern, arguments.samples)
    prompts = benchmark_export.read_prompts(arguments.prompts)
    benchmark_export.clips_of(tool, prompts, arguments.seed)
    beside, load = _beside(arguments, [*prompts.values(), ""])
    checkpoint = checkpoints.read(arguments.model)
    model = functools.cache(lambda: checkpoints.load(arguments.model, **load))  # not before the folder is known to fit

    def make(prompt: str, seed: int):
        parts = model(), checkpoint.causal, beside.codec, beside.text, prompt, arguments.seconds, seed
        return stream.make_clip(*parts, steps=arguments.steps, guidance=beside.guidance)

    made = {"steps": arguments.steps, "guidance": str(beside.guidance)}
    made = made if checkpoint.causal is None else {"causal": checkpoint.causal.to_metadata()}
    said = {name: getattr(arguments, name) for name in ("seconds", "dtype", "weights", "horizon")}
    said |= {
        "model": Path(arguments.model).name,
        "resolution": benchmark_export.resolution(beside.codec, checkpoint.config),
    }
    how = {"clock": beside.codec.clock, "seed": arguments.seed, "protocol": said | made}
    print(benchmark_export.write(make, prompts, tool, arguments.out, **how))


def _render(arguments: argparse.Namespace) -> None:
    from omniforcing_lib import media
    from omniforcing_lib.bounce import world

    scene = world.scene(arguments.seed, arguments.prompt)
    print(media.write_clip(arguments.out, world.render(scene, seconds=arguments.seconds), world.CLOCK))


def _score(arguments: argparse.Namespace) -> None:
    from series import plots
    from studies import protocol

    systems = protocol.systems_of(arguments.models, arguments.steps, unprompted=arguments.unprompted)
    first = {"first": protocol.SELECTION} if arguments.selection else {}
    trial = protocol.Trial(arguments.clips, arguments.seeds, arguments.seconds, **first)
    if arguments.long:
        print(protocol.run_long(systems, trial, arguments.out))
    else:
        print(protocol.run(systems, trial, arguments.out, plots.contact_sheet))


def _ablate(arguments: argparse.Namespace) -> None:
    from series import claims
    from studies import ablations

    folder = ablations.run(arguments.out, arms=arguments.arms or tuple(ablations.ARMS), seeds=arguments.seeds)
    for found in (ablations.table(folder), ablations.gains(folder)):
        rows = {
            arm: {name: claims.quote({"value": mean, "interval": interval}) for name, (mean, interval) in row.items()}
            for arm, row in found.items()
        }
        if rows:
            print(claims.plain_table([{"arm": arm} | row for arm, row in rows.items()]), end="\n\n")


def _cures(arguments: argparse.Namespace) -> None:
    from studies import cures

    print(cures.run(arguments.out, names=arguments.names or tuple(cures.REMEDIES), seeds=arguments.seeds))


def _sinks(arguments: argparse.Namespace) -> None:
    from series import claims
    from studies import sink_runs

    if arguments.arms and len(arguments.plans) > 1:
        raise ValueError(f"--arms are of one plan, found {' and '.join(arguments.plans)}: give --plans with one name")
    asked = {"arms": arguments.arms, "seeds": arguments.seeds, "steps": arguments.steps}
    for plan in arguments.plans:
        print(sink_runs.run(plan, arguments.out, **asked))
        print(claims.plain_table(sink_runs.table(sink_runs.stored(plan, arguments.out).traces)))


def _inspect(arguments: argparse.Namespace) -> None:
    from omniforcing_lib.ltx2 import checkpoints

    print(checkpoints.inspect(arguments.checkpoint))


def _export(arguments: argparse.Namespace) -> None:
    from omniforcing_lib.ltx2 import checkpoints

    written = checkpoints.export(arguments.checkpoint, arguments.out, to=arguments.to)
    print("\n".join([str(written), *checkpoints.left_out(checkpoints.read(arguments.checkpoint), arguments.to)]))


def _train(arguments: argparse.Namespace) -> int:
    from omniforcing_lib.training import recipes, run_folder

    try:
        recipes.main([arguments.stage, *arguments.rest], Parser)
    except run_folder.Diverged as error:
        return _fail(error, 1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
