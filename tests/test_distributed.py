"""Laws of teams: any number of processes learns what one learns, and any number goes on from what another stored.

The slow ones: `pytest tests/test_distributed.py -m slow`.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import team
import torch
from safetensors.torch import load_file
from test_train import same

from omniforcing_lib.bounce.codecs import load_codec
from omniforcing_lib.layout import AV
from omniforcing_lib.ltx2 import checkpoints
from omniforcing_lib.training import distributed
from omniforcing_lib.training.data_recipes import world_clips
from omniforcing_lib.training.distributed import ALONE, DistributedContext, MicroBatch
from omniforcing_lib.training.train_config import CODEC

HERE = Path(__file__).parent
LENGTH = 10  # steps; in Stage 3 the student learns in every fourth
JOBS = [("ode", LENGTH, None, {}), ("forcing", LENGTH, None, {})]
Metrics = dict[str, list[float]]


def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def together(size: int, out: Path, jobs: list[tuple]) -> list[Metrics]:
    """Let `size` processes do the jobs; give the numbers of each."""
    out.mkdir(exist_ok=True)
    torch.multiprocessing.start_processes(team.work, (size, port(), str(out), jobs), nprocs=size, start_method="spawn")
    return [json.loads((out / f"{number}.json").read_text()) for number in range(len(jobs))]


def apart(a: Metrics, b: Metrics) -> float:
    """Largest difference of two histories, as a share of numbers above 1."""
    assert a.keys() == b.keys() and all(len(a[name]) == len(b[name]) for name in a)
    return max(abs(x - y) / max(1.0, abs(y)) for name in a for x, y in zip(a[name], b[name], strict=True))


def logged(folder: Path) -> Metrics:
    """Read a run's history by name."""
    numbers: Metrics = {}
    for i, line in enumerate((folder / "history.jsonl").read_text().splitlines()):
        entry = json.loads(line)
        assert entry.pop("step") == i
        for name, value in entry.items():
            numbers.setdefault(name, []).append(value)
    return numbers


@pytest.fixture(scope="module")
def alone() -> dict[str, Metrics]:
    return {name: team.run(name, ALONE, LENGTH) for name in ("ode", "forcing")}


def test_two_processes_learn_what_one_learns_and_hand_a_run_on(alone, tmp_path):
    """Stages 2 and 3 over 10 steps; a run begun by one goes on in two, and in one again (1e-5 in fp32)."""
    folder = tmp_path / "run"
    team.run("ode", ALONE, 3, str(folder))
    *both, passed = together(2, tmp_path / "out", [*JOBS, ("ode", 6, str(folder), {})])
    for (name, *_), found in zip(JOBS, both, strict=True):
        assert apart(found, alone[name]) < 1e-5
    assert len(passed["norm"]) == 3
    assert [path.name for path in folder.glob("state*")] == ["state-00000006"]
    assert {path.suffix for path in (folder / "state-00000006").iterdir()} == {".safetensors", ".json"}
    team.run("ode", ALONE, LENGTH, str(folder))
    assert [path.name for path in folder.glob("state*")] == ["state-00000010"]
    assert apart(logged(folder), alone["ode"]) < 1e-5


@pytest.mark.parametrize("stage", ["ode", "forcing"])
@pytest.mark.parametrize("changes", [{"accumulate": 2}, {"accumulate": 4, "recompute": True}], ids=str)
def test_parts_of_a_batch_add_up_and_blocks_run_again_to_the_same(alone, stage, changes):
    found = team.run(stage, ALONE, 5, **changes)
    assert apart(found, {name: values[: len(found[name])] for name, values in alone[stage].items()}) < 1e-5


def test_parts_of_all_processes_are_the_batch():
    teams = [distributed.DistributedContext(rank, 3) for rank in range(3)]
    rows = [i for t in teams for part in t.micro_batches(12, 2) for i in range(12)[part.rows]]
    assert rows == [*range(12)] and all(part.share == 1 / 6 for t in teams for part in t.micro_batches(12, 2))
    with pytest.raises(ValueError, match="multiple of 6"):
        teams[0].micro_batches(8, 2)


def test_noise_of_a_part_is_its_rows_of_the_noise_of_the_batch():
    like = AV(torch.empty(2, 3, 4), torch.empty(2, 5))
    whole = MicroBatch(6, slice(0, 6)).noise(like, torch.Generator().manual_seed(1))
    part = MicroBatch(6, slice(2, 4)).noise(like, torch.Generator().manual_seed(1))
    assert all(torch.equal(p, w[2:4]) for p, w in zip(part, whole, strict=True))


def torchrun(size: int, *arguments: str) -> subprocess.Popen:
    """Start a team under torchrun, in a session of its own."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={size}", f"--master-port={port()}"]
    return subprocess.Popen(
        [*command, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
    )


def until(path: Path, lines: int) -> None:
    """Wait until a file has so many lines."""
    for _ in range(2400):
        if path.exists() and len(path.read_text().splitlines()) >= lines:
            return
        time.sleep(0.05)
    raise AssertionError(f"{path} did not reach {lines} lines")


def test_processes_share_the_rendering_and_get_the_clips_of_one():
    codec, made = load_codec(CODEC), {}

    class Share(DistributedContext):
        def all_gather(self, thing):
            made[self.rank] = thing
            return [made.get(rank, 2 * thing) for rank in range(self.size)]

    whole = world_clips(codec, range(5), 1, batch=1, progress=False)
    # The second process only makes its share; the first one then gets both.
    for rank in (1, 0):
        shared = world_clips(codec, range(5), 1, batch=1, progress=False, group=Share(rank, 2))
    assert [len(made[rank]) for rank in (0, 1)] == [3, 2]
    assert all(map(torch.equal, (*shared.latents, shared.prompt), (*whole.latents, whole.prompt)))


@pytest.mark.slow
def test_a_run_of_two_processes_goes_on_in_four_and_in_one(alone, tmp_path):
    """Stage 3; the four hold two replicas of two shards, and recompute and accumulate as they like."""
    folder = tmp_path / "run"
    together(2, tmp_path / "two", [("forcing", 4, str(folder), {})])
    together(4, tmp_path / "four", [("forcing", 7, str(folder), {"replicas": 2, "recompute": True})])
    team.run("forcing", ALONE, LENGTH, str(folder))
    assert [path.name for path in folder.glob("state*")] == ["state-00000010"]
    history = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    found = {name: [row[name] for row in history if name in row] for name in alone["forcing"]}
    assert apart(found, alone["forcing"]) < 1e-5


@pytest.mark.slow
def test_bfloat16_and_recomputing_in_a_team(tmp_path):
    changes = {"amp": True, "accumulate": 2, "recompute": True}
    (found,) = together(2, tmp_path, [("forcing", 8, None, changes)])
    assert apart(found, team.run("forcing", ALONE, 8, amp=True)) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "steps"), [("stage2", 20), ("stage3", 20), ("on-policy", 5)])
def test_the_shipped_miniature_learns_in_two_processes_what_it_learns_in_one(stage, steps, tmp_path):
    """The command line, with pairs made in a folder of shards by both; losses to 1e-5, norms to 1e-4.

    On policy, rounding grows fast: the teacher follows its ODE from the student's states. One process that takes its
    batch in two parts leaves one that does not as far as two processes do (LOG.md), so its first steps tell.
    """
    shared = ["--steps", str(steps), "--batch", "4", "--seconds", "1", "--score", "0"]
    shared += ["--pairs", str(tmp_path / "pairs"), "--count", "20"] if stage != "stage3" else []
    for size in (2, 1):
        folder = tmp_path / str(size)
        arguments = ["-m", "omniforcing_lib", "train", stage, *shared, "--folder", str(folder)]
        arguments += ["--out", str(folder / "out.safetensors")]
        run = torchrun(size, *arguments)
        text, _ = run.communicate(timeout=900)
        assert run.returncode == 0, text
    found, expected = (
        [json.loads(line) for line in (tmp_path / n / "history.jsonl").read_text().splitlines()] for n in ("2", "1")
    )
    assert len(found) == len(expected) == steps
    for a, b in zip(found, expected, strict=True):
        limits = {name: (1e-4 if "norm" in name else 1e-5) * max(1.0, abs(value)) for name, value in b.items()}
        assert all(abs(a[name] - b[name]) < limit for name, limit in limits.items()), (a, b)
    two, one = (checkpoints.load(tmp_path / n / "out.safetensors").state_dict() for n in ("2", "1"))
    assert all((two[name] - one[name]).abs().max() < 0.02 for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["die=1:4", "silent=1:4"])
def test_the_others_end_within_a_minute_of_a_lost_process_and_say_why(fault, tmp_path):
    run = torchrun(2, str(HERE / "team.py"), "forcing", "500", str(tmp_path), fault)
    until(tmp_path / "history.jsonl", 4)
    start = time.monotonic()
    text, _ = run.communicate(timeout=300)
    assert time.monotonic() - start < 90  # the limit is 50 s; the rest is for a busy machine
    assert run.returncode != 0 and "rank 0 of 2 ends" in text
    assert [path.name for path in tmp_path.glob("state-*")] == ["state-00000003"]


def end(run: subprocess.Popen) -> None:
    """Ask torchrun to end, as a scheduler does."""
    run.send_signal(signal.SIGTERM)


def kill(run: subprocess.Popen) -> None:
    """Kill torchrun and its processes at once, as a lost node does."""
    workers = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    for pid in (run.pid, *map(int, workers)):
        os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("fault", [end, kill])
def test_a_team_that_is_ended_or_killed_goes_on_to_the_same_bits(fault, tmp_path):
    """After SIGTERM it goes on from the step it was in, after kill -9 from the last of every third."""
    run = torchrun(2, str(HERE / "team.py"), "ode", "12", str(tmp_path / "cut"), "nap=.2")
    until(tmp_path / "cut" / "history.jsonl", 5)
    fault(run)
    text, _ = run.communicate(timeout=120)
    (state,) = (tmp_path / "cut").glob("state-*")
    assert run.returncode != 0 and 3 <= int(state.name.removeprefix("state-")) < 12
    assert fault is kill or "told to end after step" in text
    for folder in ("cut", "unbroken"):
        again = torchrun(2, str(HERE / "team.py"), "ode", "12", str(tmp_path / folder))
        text, _ = again.communicate(timeout=300)
        assert again.returncode == 0, text
    assert same(*(load_file(tmp_path / name / "final.safetensors") for name in ("cut", "unbroken")))
