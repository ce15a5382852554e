"""How much work a run does: one frozen record for each profile, and nothing else to choose but the seed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace


@dataclass(frozen=True)
class Profile:
    """Say how long, how many and how often for every notebook.

    Attributes:
        name: smoke, cpu, full or gpu.
        seconds: length of an ordinary clip.
        clips: clips of each system that notebook 04 scores.
        forced_clips: clips that notebook 04 rolls out on a true past and on the student's own.
        long_clips: roll-outs of `long_seconds` in notebook 04.
        teacher_steps: Euler steps of the guided teacher.
        fresh_ablations: make notebook 04's ablations anew instead of reading the stored ones.
        ode_pairs: teacher trajectories that Stage 2 regresses on; what is not stored is sampled.
        stage2_steps: optimiser steps of causal ODE regression.
        stage2_batch: clips of each of those steps.
        stage3_steps: generator steps of self-forcing DMD.
        stage3_batch: clips of each of those steps, and of each step of the critic.
        stage3_lr: learning rates of its student and of its critic.
        policy_steps: steps of the regression on the student's own states.
        policy_batch: clips of each of those steps.
        sink_counts: sink numbers that notebook 03 compares.
        sink_steps: training steps of each of those variants.
        sink_clips: clips of each of those steps; six times as many judge.
        long_seconds: length of the long roll-out whose drift is measured.
        bench_seconds: length of the stream that notebook 05 times.
        bench_grid: tokens of a frame of notebook 05's random models.
        bench_blocks: blocks that it streams from them, with a window and without.
        bench_turns: rounds of whatever it times in turn.
        switches: streams that it asks for another prompt on the way.
        seeds: training seeds of a comparison.
        teacher_clips: clips that notebook 01 samples from the teacher and scores.
        mask_seconds: clip lengths at which notebook 02 times attention.
        grid: tokens of a frame for a teacher that comes without its codec.
        dtype: of weights that are not trained.
        precisions: in which notebook 02 compares the cached pass with the masked one.
    """

    name: str
    seconds: int
    clips: int
    forced_clips: int
    long_clips: int
    teacher_steps: int
    fresh_ablations: bool
    ode_pairs: int
    stage2_steps: int
    stage2_batch: int
    stage3_steps: int
    stage3_batch: int
    stage3_lr: tuple[float, float]
    policy_steps: int
    policy_batch: int
    sink_counts: tuple[int, ...]
    sink_steps: int
    sink_clips: int
    long_seconds: int
    bench_seconds: int
    bench_grid: tuple[int, int]
    bench_blocks: int
    bench_turns: int
    switches: int
    seeds: int
    teacher_clips: int
    mask_seconds: tuple[int, ...]
    grid: tuple[int, int]
    dtype: str
    precisions: tuple[str, ...]

    def override(self, changes: Mapping[str, object]) -> Profile:
        """Replace fields by name; a None keeps the profile's own value. Counts are 1 or more."""
        kept = {name: value for name, value in changes.items() if value is not None}
        if unknown := sorted(set(kept) - {field.name for field in fields(self)}):
            known = ", ".join(field.name for field in fields(self))
            raise ValueError(f"profile {self.name!r} has no field {', '.join(unknown)}; it has {known}")
        if low := [f"{name}={value}" for name, value in kept.items() if type(value) is int and value < 1]:
            raise ValueError(f"profile {self.name!r} counts from 1, found {', '.join(low)}; 0 takes its own value")
        return replace(self, **kept)


SMOKE = Profile(
    name="smoke",
    seconds=5,
    clips=6,
    forced_clips=4,
    long_clips=2,
    teacher_steps=10,
    fresh_ablations=False,
    ode_pairs=18,
    stage2_steps=6,
    stage2_batch=2,
    stage3_steps=2,
    stage3_batch=2,
    stage3_lr=(1e-4, 2e-4),
    policy_steps=2,
    policy_batch=2,
    sink_counts=(0, 16),
    sink_steps=3,
    sink_clips=2,
    long_seconds=16,
    bench_seconds=8,
    bench_grid=(8, 12),
    bench_blocks=8,
    bench_turns=2,
    switches=2,
    seeds=1,
    teacher_clips=4,
    mask_seconds=(5, 10, 20, 40, 80),
    grid=(2, 3),
    dtype="float32",
    precisions=("float32", "float64"),
)
CPU = replace(
    SMOKE,
    name="cpu",
    clips=54,
    forced_clips=18,
    long_clips=6,
    teacher_steps=40,
    ode_pairs=90,
    stage2_steps=100,
    stage2_batch=4,
    stage3_steps=40,
    stage3_batch=4,
    policy_steps=20,
    policy_batch=4,
    sink_counts=(0, 1, 2, 4, 8, 16, 24),
    sink_steps=25,
    sink_clips=4,
    long_seconds=60,
    bench_seconds=60,
    bench_grid=(16, 24),
    bench_blocks=9,
    bench_turns=3,
    switches=32,
    seeds=3,
    teacher_clips=16,
    mask_seconds=(5, 10, 20, 40, 80, 160),
)
FULL = replace(
    CPU,
    name="full",
    clips=90,
    forced_clips=54,
    long_clips=32,
    fresh_ablations=True,
    ode_pairs=384,
    stage2_steps=1500,
    stage2_batch=8,
    stage3_steps=290,
    stage3_batch=16,
    stage3_lr=(6e-5, 1.5e-4),
    policy_steps=100,
    policy_batch=8,
    sink_steps=300,
    long_seconds=180,
    bench_seconds=180,
    seeds=3,
)
GPU = replace(
    CPU,
    name="gpu",
    clips=90,
    bench_seconds=120,
    teacher_clips=4,
    mask_seconds=(5, 10, 20),
    grid=(16, 24),
    dtype="bfloat16",
    precisions=("bfloat16",),
)
"""For one GPU of 80 GB: the 19B in bf16 at 512 x 768; what trains it is left out, see the README."""

PROFILES = {profile.name: profile for profile in (SMOKE, CPU, FULL, GPU)}


def from_name(name: str) -> Profile:
    """Return the profile of that name; raise ValueError that lists the names otherwise."""
    if name not in PROFILES:
        raise ValueError(f"unknown profile {name!r}; choose one of {', '.join(PROFILES)}")
    return PROFILES[name]
