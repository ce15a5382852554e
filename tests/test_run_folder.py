"""Laws of bad days: a run killed at any moment goes on as if it had not been; what is wrong is refused by name.

The slow ones: `pytest tests/test_run_folder.py -m slow`.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import team
import torch
from safetensors.torch import load_file
from test_train import CAUSAL, QUICK, draw, new_learner, ode_stage, pairs, prompts, same, state

from omniforcing_lib import files
from omniforcing_lib.bounce import world
from omniforcing_lib.bounce.text import TinyText
from omniforcing_lib.layout import AV
from omniforcing_lib.ltx2 import checkpoints
from omniforcing_lib.rollout import RolloutConfig
from omniforcing_lib.training import data_recipes, dataset, recipes, records, run_folder, stages, train
from omniforcing_lib.training.dataset import Clips, Pairs, Prompts, StoredPairs, StoredPrompts, store_prompts
from omniforcing_lib.training.distributed import ALONE
from omniforcing_lib.training.train import Learner
from studies import distill


def test_a_run_that_is_told_to_end_stores_its_state_first(tmp_path, capsys):
    """SIGTERM in step 2: that step is finished and stored, the exit code is 143, the rest runs another time."""
    learners, plain = ode_stage()

    def step(i: int, generator: torch.Generator) -> train.Metrics:
        if i == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(i, generator)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        train.fit(step, learners, 6, folder=tmp_path, progress=False)
    assert end.value.code == 143 and signal.getsignal(signal.SIGTERM) is before
    assert "told to end after step 3" in capsys.readouterr().out
    rest = train.fit(plain, learners, 6, folder=tmp_path, progress=False)
    others, step = ode_stage()
    whole = train.fit(step, others, 6, progress=False)
    assert len(rest.numbers["norm"]) == 3 and same(state(learners["student"]), state(others["student"]))
    lines = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [*range(6)]
    assert [line["video"] for line in lines] == whole.numbers["video"]


def test_two_runs_that_share_a_folder_refuse_each_other(tmp_path):
    learners, step = ode_stage()
    with run_folder.RunFolder(tmp_path, learners, 0, ALONE):
        with pytest.raises(ValueError, match=rf"in use by {socket.gethostname()} process {os.getpid()}"):
            train.fit(step, learners, 1, folder=tmp_path, progress=False)
    train.fit(step, learners, 1, folder=tmp_path, progress=False)


def test_the_lock_of_the_dead_is_taken_over_aloud_and_of_another_host_when_it_has_long_been_silent(tmp_path, capsys):
    learners, step = ode_stage()
    (tmp_path / "lock").write_text(f"{socket.gethostname()} process 999999\n")
    train.fit(step, learners, 1, folder=tmp_path, progress=False)
    assert "taken over from" in capsys.readouterr().out
    (tmp_path / "lock").write_text("another-host process 1\n")
    with pytest.raises(ValueError, match=r"another-host process 1, which cannot be seen.*over in 30 minutes"):
        train.fit(step, learners, 2, folder=tmp_path, progress=False)
    long_ago = time.time() - run_folder.SILENT_S - 60
    for path in tmp_path.rglob("*"):
        os.utime(path, (long_ago, long_ago))
    train.fit(step, learners, 2, folder=tmp_path, progress=False)
    assert "taken over from another-host process 1" in capsys.readouterr().out


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"\x80" * 99])
def test_a_damaged_state_is_refused_by_name(damage, tmp_path):
    learners, step = ode_stage()
    train.fit(step, learners, 1, folder=tmp_path, progress=False)
    (path,) = (tmp_path / "state-00000001").glob("*.safetensors")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"state-00000001 is damaged"):
        train.fit(step, learners, 2, folder=tmp_path, progress=False)


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Read the one state of a run."""
    (path,) = folder.glob("state-*/*.safetensors")
    return load_file(path)


def test_a_state_of_an_earlier_version_is_refused_by_name(tmp_path):
    """Before any step; what is stored now is in folders, for one process too."""
    learners, step = ode_stage()
    (tmp_path / "state.safetensors").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"state.safetensors was stored by an earlier version, whose runs do not go on"
    ):
        train.fit(step, learners, 1, folder=tmp_path, progress=False)


def failing(when: set[int], limit: float = 1e4) -> tuple[dict[str, Learner], train.Step]:
    """Build a stage whose loss is not a number in some steps."""
    learner = new_learner(replace(QUICK, limit=limit))

    def step(i: int, generator: torch.Generator) -> train.Metrics:
        loss = learner.model.proj_out.weight.square().sum() * (float("nan") if i in when else 1.0)
        return {"video": loss.detach(), "norm": learner.update(loss)}

    return {"student": learner}, step


def test_bad_steps_change_nothing_are_counted_and_end_the_run_when_they_follow_each_other(tmp_path):
    learners, step = failing({1, 2, 4, 5, 6})
    with pytest.raises(run_folder.Diverged, match=r"steps 4 to 6 .* 3 updates skipped; .*diverged.json"):
        train.fit(step, learners, 9, seed=5, folder=tmp_path, give_up=3, progress=False)
    assert learners["student"].skipped == 5
    report = json.loads((tmp_path / "diverged.json").read_text())
    assert report["seed"] == 5 and [row["step"] for row in report["steps"]] == [4, 5, 6]
    assert all(row["norm"] == row["video"] == "nan" for row in report["steps"])
    assert all(value.isfinite().all() for value in stored_tensors(tmp_path).values())


def test_a_gradient_over_the_limit_is_skipped():
    learners, step = failing(set(), limit=1e-3)
    before = state(learners["student"])
    train.fit(step, learners, 2, progress=False)
    assert learners["student"].skipped == 2 and same(state(learners["student"]), before)


def test_history_lines_of_steps_that_run_again_are_dropped(tmp_path):
    learners, step = ode_stage()
    train.fit(step, learners, 2, folder=tmp_path, progress=False)
    with (tmp_path / "history.jsonl").open("a") as file:
        file.write('{"step": 2, "video": 9}\n{"step": 3, "vid')
    train.fit(step, learners, 4, folder=tmp_path, progress=False)
    lines = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3] and lines[2]["video"] != 9


def stored(folder: Path, count: int = 5) -> Pairs:
    """Write pairs as shards of two; give them as a single file gives them."""
    held = pairs(count)

    def make(rows: range) -> Pairs:
        some = slice(rows.start, rows.stop)
        return Pairs(held.states.map(lambda s: s[some]), held.sigmas, held.prompt[some])

    dataset.store_pairs(folder, make, count, {"sigmas": held.sigmas.tolist()}, rows_per_shard=2)
    held.save(folder / "one.safetensors", prompts().names)
    return Pairs.load(folder / "one.safetensors")


class Encoder:
    """Give the contexts of `prompts`, each for its name."""

    identity = "known"

    def encode(self, names: list[str], dtype: torch.dtype) -> AV[torch.Tensor]:
        rows = [[*prompts().names, ""].index(name) for name in names]
        return prompts().context.map(lambda context: context[rows].to(dtype))


def stored_prompts(folder: Path) -> StoredPrompts:
    return StoredPrompts(store_prompts(folder, Encoder(), prompts().names, rows_per_shard=2))


def narrow() -> Prompts:
    """Give the contexts as they are stored, in bfloat16."""
    return replace(prompts(), context=prompts().context.map(lambda context: context.bfloat16().float()))


def test_shards_give_the_rows_of_one_file_and_train_to_the_same_bits(tmp_path):
    held, read = stored(tmp_path), StoredPairs(tmp_path)
    index = torch.tensor([4, 0, 3, 3])
    (a, a_prompt), (b, b_prompt) = held.take(index), read.take(index)
    assert all(map(torch.equal, a, b)) and torch.equal(a_prompt, b_prompt)
    assert len(read) == 5 and read.shapes == held.shapes and torch.equal(read.sigmas, held.sigmas)
    told = stored_prompts(tmp_path / "prompts")
    assert all(map(torch.equal, told.negative, narrow().negative)) and told.names == prompts().names
    ends = []
    for data, text in ((held, narrow()), (read, told)):
        learner = new_learner()
        train.fit(stages.ode_stage(learner, data, text, CAUSAL, batch=4), {"student": learner}, 3, progress=False)
        ends.append(state(learner))
    assert same(*ends)


@pytest.mark.parametrize("row", [-1, 5])
def test_a_row_that_is_not_there_is_refused(row, tmp_path):
    stored(tmp_path)
    with pytest.raises(ValueError, match=f"rows 0 to 4, asked for {row}"):
        records.Records(tmp_path).rows([row])


def test_a_damaged_shard_is_refused_by_name_and_made_again_alone(tmp_path):
    stored(tmp_path)
    first, bad = tmp_path / "rows-00000.safetensors", tmp_path / "rows-00001.safetensors"
    data, made = bytearray(bad.read_bytes()), first.stat().st_mtime_ns
    data[-3] ^= 1
    bad.write_bytes(data)
    with pytest.raises(ValueError, match=r"rows-00001.safetensors is damaged: its sha256 .* remove it and index.json"):
        StoredPairs(tmp_path)
    bad.unlink()
    with pytest.raises(ValueError, match=r"rows-00001.safetensors is missing"):
        StoredPairs(tmp_path)
    (tmp_path / "index.json").unlink()
    held = stored(tmp_path)
    assert first.stat().st_mtime_ns == made
    assert all(map(torch.equal, StoredPairs(tmp_path).take(torch.arange(5))[0], held.states))


def test_shards_made_under_other_settings_and_folders_of_something_else_are_refused(tmp_path):
    stored(tmp_path)
    (tmp_path / "rows-00000.safetensors").rename(tmp_path / "kept")
    sigmas = CAUSAL.sigmas.float().tolist()
    for rows, notes, name in ((5, {"sigmas": [1.0]}, "sigmas"), (7, {"sigmas": sigmas}, "count 5, found 7")):
        with pytest.raises(ValueError, match=rf"rows-00001.safetensors was made under other settings: {name}"):
            records.write(tmp_path, rows, 2, lambda rows: pytest.fail("made"), {"kind": "pairs", **notes})
    (tmp_path / "kept").rename(tmp_path / "rows-00000.safetensors")
    with pytest.raises(ValueError, match="holds 'pairs', expected 'prompts'"):
        StoredPrompts(tmp_path)


@pytest.mark.parametrize("number", [-2, 2, 9])
def test_numbers_that_are_no_prompts_are_refused(number, tmp_path):
    """Held or stored, and by a stage before its first step."""
    told = stored_prompts(tmp_path)
    for known in (narrow(), told):
        assert all(map(torch.equal, known.take(torch.tensor([-1])), narrow().negative))
        with pytest.raises(ValueError, match=f"from 0 to 1, asked for number {number}"):
            known.take(torch.tensor([1, number]))
        data = replace(pairs(), prompt=torch.tensor([0, number, 1]))
        with pytest.raises(ValueError, match=f"asked for number {number}"):
            stages.ode_stage(new_learner(), data, known, CAUSAL, batch=4)
        with pytest.raises(ValueError, match=f"asked for number {number}"):
            stages.flow_stage(new_learner(), Clips(distill.ends(data), data.prompt), known, batch=4)


def test_contexts_of_another_encoder_are_refused(tmp_path):
    store_prompts(tmp_path, TinyText(8), ["a red ball, bell"])
    with pytest.raises(ValueError, match=r"text 'TinyText\(channels=8, length=6\)', found 'TinyText\(channels=16"):
        store_prompts(tmp_path, TinyText(16), ["a red ball, bell"])
    with pytest.raises(ValueError, match=r"names .'a red ball, bell'., found .'a red ball, wood'."):
        store_prompts(tmp_path, TinyText(8), ["a red ball, wood"])


@pytest.fixture
def free_pairs(monkeypatch):
    """Let trajectories cost nothing, and note how many are made."""
    made = []

    def pairs(teacher, prompts, guidance, step_list, seeds, latents, grid, *, first, progress):
        made.extend(seeds)
        shapes = teacher.config.latent_shapes(latents, grid)
        states = shapes.map(lambda shape: draw(len(seeds), len(step_list), *shape, seed=seeds[0]))
        index = torch.arange(first, first + len(seeds)) % len(prompts)
        return Pairs(states, RolloutConfig(steps=tuple(step_list)).sigmas.float(), index)

    monkeypatch.setattr(dataset, "ode_pairs", pairs)
    return made


PAIRS = {"count": 4, "seconds": 1}
OTHERS = {
    "teacher": {"teacher": "stage2"},
    "prompts": {"prompts": "turned"},
    "cfg": {"cfg": (5.0, 3.0)},
    "count": {"count": 20},
    "latents": {"seconds": 2},
    "grid": {"grid": (2, 8)},
    "steps": {"layout": "released"},
}


@pytest.mark.parametrize("name", ["pairs", "pairs.safetensors"])
def test_pairs_made_under_other_settings_are_refused_by_name(name, free_pairs, tmp_path, monkeypatch):
    """By `train pairs` onto them and by `train stage2`, before a model is loaded; training may have another seed."""
    path, out = str(tmp_path / name), str(tmp_path / "out.safetensors")
    turned = store_prompts(tmp_path / "turned", TinyText(), world.prompts()[::-1])
    recipes.MakePairs(out=path, **PAIRS).run()
    recipes.MakePairs(out=path, **PAIRS).run()
    assert free_pairs == [0, 1, 2, 3]
    monkeypatch.setattr(checkpoints, "load", lambda *a, **k: pytest.fail("a model is loaded"))
    for setting, change in OTHERS.items():
        changed = PAIRS | change | ({"prompts": str(turned)} if "prompts" in change else {})
        if setting == "steps":
            monkeypatch.setattr(RolloutConfig, "from_layout", lambda *a: RolloutConfig(steps=(1000, 522, 0)))
        for again in (recipes.MakePairs(out=path, **changed), recipes.Stage2(out=out, pairs=path, **changed)):
            with pytest.raises(ValueError, match=rf"{name} was made under other settings: .*{setting}.*, found"):
                again.run()
    monkeypatch.undo()
    for setting, change in {"seed 0, found 1": {"seed": 1}, "amp False, found True": {"amp": True}}.items():
        config = recipes.MakePairs(out=path, **PAIRS | change)
        with pytest.raises(ValueError, match=setting):
            config.run()
        held = config.ode_pairs(path, config.contexts(), RolloutConfig())
        assert len(held) == 4 and held.notes["seed"] == 0


def test_shipped_pairs_still_serve_and_say_what_is_not_known_of_them(capsys):
    path, config = str(files.DATA / "ode_pairs.safetensors"), data_recipes.PairsConfig(count=90)
    assert len(config.ode_pairs(path, config.contexts(), RolloutConfig())) == 90
    assert "does not say its teacher, cfg, steps, text: taken on trust" in capsys.readouterr().out
    turned = Prompts.of(TinyText(), world.prompts()[::-1])
    with pytest.raises(ValueError, match=r"prompts 18 prompts \(\w{16}\), found 18 prompts \(\w{16}\)"):
        config.ode_pairs(path, turned, RolloutConfig())


def test_a_file_of_pairs_serves_as_it_is_stored_from_the_first_run_on(free_pairs, tmp_path):
    """States are kept in bfloat16: who made them trains on what another run reads."""
    path, config = str(tmp_path / "x.safetensors"), data_recipes.PairsConfig(**PAIRS)
    first, second = (config.ode_pairs(path, config.contexts(), RolloutConfig()) for _ in range(2))
    assert all(map(torch.equal, first.states, second.states))


RUN = {"pairs": "", "count": 4, "seconds": 1, "batch": 2, "steps": 1}
CHANGES = {
    "teacher": {"teacher": "stage2"},
    "pairs": {"pairs": "other.safetensors"},
    "sinks": {"sinks": 3},
    "batch": {"batch": 4},
    "lr": {"lr": 1e-3},
    "cfg": {"cfg": (5.0, 3.0)},
    "seed": {"seed": 1},
    "amp": {"amp": True},
    "limit": {"limit": 9.0},
    "prompts": {"prompts": "turned"},
}


def test_a_run_goes_on_under_its_own_settings_and_its_file_credits_them(free_pairs, tmp_path, monkeypatch, capsys):
    """What it learns from may not change, and is refused by name before a model is loaded; its length may."""
    monkeypatch.chdir(tmp_path)
    store_prompts("turned", TinyText(), world.prompts()[::-1])
    recipes.MakePairs(out="x.safetensors", **PAIRS).run()
    given = RUN | {"pairs": "x.safetensors", "out": "out.safetensors", "folder": "run", "score": 0}
    other = Pairs.load("x.safetensors")
    replace(other, states=other.states.map(torch.neg)).save("other.safetensors", world.prompts(), other.notes)
    recipes.Stage2(**given).run()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "load", lambda *a, **k: pytest.fail("a model is loaded"))
        for setting, change in CHANGES.items():
            with pytest.raises(ValueError, match=rf"run/state-00000001 was trained with .*{setting} .*, found"):
                recipes.Stage2(**given | change).run()
        with pytest.raises(ValueError, match="stage 'stage2', found 'stage3'"):
            recipes.Stage3(folder="run", score=0).run()
    capsys.readouterr()
    Path("x.safetensors").rename("moved.safetensors")
    given |= {"pairs": "moved.safetensors", "steps": 3, "every": 7, "checkpoint_activations": True}
    recipes.Stage2(**given).run()
    said, notes = capsys.readouterr().out, checkpoints.read("out.safetensors").metadata["notes"]
    assert "goes on from step 1: steps 1, found 3; every 500, found 7" in said
    assert notes["steps"] == 3 and notes["changes"] == ["of 1 steps up to step 1"] and notes["lr"] == 5e-4
    assert notes["teacher"]["sha256"] == checkpoints.read("teacher").fingerprint[:16] and notes["stage"] == "stage2"
    assert notes["pairs"]["sha256"] == records.content("moved.safetensors")["sha256"]


def test_a_run_that_ended_early_credits_the_steps_that_it_took(free_pairs, tmp_path):
    out = str(tmp_path / "out.safetensors")
    recipes.Stage2(out=out, **RUN | {"steps": 9}, minutes=1e-6, score=0).run()
    notes = checkpoints.read(out).metadata["notes"]
    assert (notes["steps"], notes["of"]) == (1, 9)


def test_a_state_that_does_not_say_its_settings_goes_on_aloud(tmp_path, capsys):
    """A run may begin without settings; the history says from where on more is known."""
    learners, step = ode_stage()
    train.fit(step, learners, 1, folder=tmp_path, progress=False)
    found = train.fit(step, learners, 2, folder=tmp_path, progress=False, settings={"lr": 1.0})
    assert "does not say its lr: taken on trust" in capsys.readouterr().out
    assert found.changes == ["of 1 steps up to step 1", "lr not known up to step 1"] and found.done == 2
    with pytest.raises(ValueError, match=r"lr 1.0, found 2.0"):
        train.fit(step, learners, 2, folder=tmp_path, progress=False, settings={"lr": 2.0})


@pytest.mark.parametrize("name", ["../rows-00000.safetensors", "/etc/passwd", "rows.pkl"])
def test_an_index_reaches_nothing_outside_its_folder(name, tmp_path):
    (tmp_path / "index.json").write_text(json.dumps({"shards": [{"file": name, "rows": 1, "sha256": ""}], "notes": {}}))
    with pytest.raises(ValueError, match="beside it"):
        records.Records(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", '{"shards": 3, "notes": {}}', '{"shards": [{}], "notes": {}}'])
def test_a_damaged_index_is_refused_by_name(text, tmp_path):
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(ValueError, match=r"index.json cannot be read"):
        records.Records(tmp_path)


def test_trajectories_made_in_shards_are_those_made_at_once(tmp_path):
    """Noise and prompt of a clip follow from its number alone."""
    teacher, sizes = team.model(0).requires_grad_(False).eval(), AV(3, 6)
    how = (dataset.Guidance(cfg=AV(2.0, 2.0)), CAUSAL.steps)

    def make(rows: range) -> Pairs:
        shape = {"steps": 4, "batch": 2, "progress": False}
        return dataset.ode_pairs(teacher, prompts(), *how, rows, sizes, (2, 2), **shape, first=rows.start)

    dataset.store_pairs(tmp_path, make, 6, {"sigmas": CAUSAL.sigmas.tolist()}, rows_per_shard=2)
    (states, prompt), whole = StoredPairs(tmp_path).take(torch.arange(6)), make(range(6))
    assert all(torch.equal(a, b.bfloat16().float()) for a, b in zip(states, whole.states, strict=True))
    assert torch.equal(prompt, whole.prompt)


@pytest.mark.slow
def test_trajectories_made_in_bfloat16_are_near_those_in_float32(tmp_path):
    """The command line, with `--amp` and without; a folder of shards each."""
    for name, more in (("wide", []), ("narrow", ["--amp"])):
        recipes.main("pairs", "--count", "2", "--seconds", "1", "--out", str(tmp_path / name), *more)
    wide, narrow = (StoredPairs(tmp_path / name).take(torch.arange(2))[0] for name in ("wide", "narrow"))
    assert all(torch.equal(a[:, 0], b[:, 0]) for a, b in zip(wide, narrow, strict=True))
    assert all(0 < (a - b).abs().mean() < 0.1 * a.std() for a, b in zip(wide, narrow, strict=True))


@pytest.mark.slow
def test_a_run_killed_five_times_at_random_ends_as_one_never_killed(tmp_path):
    """Kill -9, whatever the run is doing; the weights at the end are the same to the bit."""
    dice, command = random.Random(0), [sys.executable, str(Path(__file__).parent / "team.py"), "forcing", "60"]
    killed, unbroken, faults = tmp_path / "killed", tmp_path / "unbroken", 0
    while faults < 5:
        run = subprocess.Popen([*command, str(killed), "nap=.05"])
        while not (killed / "lock").exists() or str(run.pid) not in (killed / "lock").read_text():
            assert run.poll() is None, "the run ended by itself"
            time.sleep(0.02)
        time.sleep(dice.uniform(0, 2))
        run.kill()
        faults += run.wait() == -signal.SIGKILL
        assert not (killed / "final.safetensors").exists(), "the run ended before it was killed five times"
    for folder in (killed, unbroken):
        subprocess.run([*command, str(folder)], check=True)
    assert same(load_file(killed / "final.safetensors"), load_file(unbroken / "final.safetensors"))
    assert same(stored_tensors(killed), stored_tensors(unbroken))
    assert (killed / "history.jsonl").read_text() == (unbroken / "history.jsonl").read_text()


def test_first_blocks_serve_the_student_and_prompts_that_they_were_made_for(tmp_path):
    path = str(tmp_path / "first.safetensors")
    recipes.FirstBlock(out=path, clips=2, count=3, steps=1, batch=1).run()
    config, causal = recipes.OnPolicy(first_block=path), checkpoints.read("stage2").causal
    prompts = config.contexts()
    pairs = config.first_pairs(prompts, causal)
    assert (
        len(pairs) == 3 and pairs.shapes.video[:2] == (4, 4) and recipes.OnPolicy().first_pairs(prompts, causal) is None
    )
    turned = Prompts.of(TinyText(), world.prompts()[::-1])
    for other, said in ((turned, "prompts"), (prompts, "sigmas")):
        steps = causal.steps if other is turned else (1000, 909, 725, 0)
        with pytest.raises(ValueError, match=f"made under other settings: {said}"):
            config.first_pairs(other, replace(causal, steps=steps))


def test_other_pairs_are_no_first_blocks_and_are_refused_before_any_pair_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "ode_pairs", lambda *_, **__: pytest.fail("pairs are made"))
    wrong, out = str(files.DATA / "ode_pairs.safetensors"), str(tmp_path / "student.safetensors")
    with pytest.raises(ValueError, match="no first blocks"):
        recipes.OnPolicy(first_block=wrong, pairs=str(tmp_path / "pairs"), count=2, out=out).run()
    assert not [*tmp_path.iterdir()]
