"""Laws of clips for other tools: their names, one seed each, a manifest that is right, nothing made twice."""

from __future__ import annotations

import json
import wave

import av
import numpy as np
import pytest

from omniforcing_lib.__main__ import main
from omniforcing_lib.layout import AV, Clock
from studies import benchmark_export

PROMPTS = {"a cat": "a grey cat on a wall, purring", "a dog": "a dog"}
CLOCK = Clock(sample_rate=24_000)


def maker(asked: list):
    """Note what is asked for; give a clip of one second, in two pieces, in stereo, whose loudness tells the seed."""

    def make(prompt: str, seed: int) -> AV[np.ndarray]:
        asked.append((prompt, seed))
        frames = np.full((25, 16, 16, 3), 10 * seed % 256, np.uint8)
        yield AV(frames[:1], np.zeros((0, 2), np.float32))
        yield AV(frames[1:], np.full((24_240, 2), 0.01 * seed, np.float32))

    return make


def test_vbench_finds_five_clips_a_prompt(tmp_path):
    """`{prompt}-{index}.mp4`, index 0 to 4, under VBench's own prompt; generated from the longer one; seeds differ."""
    asked: list = []
    tool = benchmark_export.tool_of("vbench")
    manifest = benchmark_export.write(
        maker(asked), PROMPTS, tool, tmp_path, clock=CLOCK, seed=7, protocol={"seconds": 1}
    )
    names = {f"{prompt}-{i}.mp4" for prompt in PROMPTS for i in range(5)}
    assert {path.name for path in tmp_path.iterdir()} == names | {"manifest.json"}
    assert asked == [(prompt, 7 + 5 * n + i) for n, prompt in enumerate(PROMPTS.values()) for i in range(5)]
    said = json.loads(manifest.read_text())
    assert said["protocol"] == {"seconds": 1, "fps": 24, "sample_rate": 24_000, "seed": 7}
    assert {clip["file"] for clip in said["clips"]} == names
    assert said["clips"][6] == {"file": "a dog-1.mp4", "tool_prompt": "a dog", "prompt": "a dog", "seed": 13}
    with av.open(str(tmp_path / "a cat-3.mp4")) as container:
        assert (container.streams.video[0].frames, container.streams.audio[0].layout.name) == (25, "stereo")
        assert (container.streams.video[0].width, container.streams.video[0].height) == (16, 16)


def test_javisbench_finds_sound_beside_each_row(tmp_path):
    benchmark_export.write(
        maker([]), PROMPTS, benchmark_export.tool_of("javisbench"), tmp_path, clock=CLOCK, protocol={}
    )
    names = {f"sample_{i:04d}.{kind}" for i in range(2) for kind in ("mp4", "wav")}
    assert {path.name for path in tmp_path.iterdir()} == names | {"manifest.json"}
    with wave.open(str(tmp_path / "sample_0001.wav")) as sound:
        assert (sound.getnchannels(), sound.getframerate(), sound.getnframes()) == (2, 24_000, 24_240)


def test_streamavbench_is_told_what_each_clip_took(tmp_path):
    """A line a case: frames of the file, seconds in the order of time; a run that goes on keeps the lines of before."""
    cases, tool = {"P-0001": "a cat purrs", "P-0002": "a dog barks"}, benchmark_export.tool_of("streamavbench")
    how = {"clock": CLOCK, "protocol": {"model": "models/omniforcing-1.safetensors"}}
    benchmark_export.write(maker([]), {"P-0001": "a cat purrs"}, tool, tmp_path / "first", **how)
    asked: list = []
    for again in range(2):
        benchmark_export.write(maker(asked), cases, tool, tmp_path, **how)
        lines = (tmp_path / "manifest.jsonl").read_text().splitlines()
        told = [json.loads(line) for line in lines]
        assert [line["case_id"] for line in told] == list(cases) and len(asked) == 2 + again
        for line in told:
            assert line["model_id"] == "omniforcing-1" and (tmp_path / line["video_path"]).is_file()
            runtime = line["runtime"]
            assert runtime["generated_video_frames"] == 25
            assert 0 < runtime["time_to_first_chunk_seconds"] < runtime["generation_time_seconds"]
        if not again:  # a run that died before it noted the second clip
            (tmp_path / "manifest.jsonl").write_text(lines[0] + "\n")
    assert json.loads((tmp_path / "manifest.jsonl").read_text().splitlines()[0]) == told[0]
    for line in ("I-0001", "a cat"):
        with pytest.raises(ValueError, match="a line is a case of the progressive track, P-0001"):
            benchmark_export.clips_of(tool, {line: "a cat"})


def test_what_is_there_is_not_made_again_and_never_mixed(tmp_path):
    """A run that died goes on with what is missing; clips of another protocol are not put beside the first."""
    asked: list = []
    tool = benchmark_export.tool_of("vbench", samples=2)
    how = {"clock": CLOCK, "protocol": {"steps": 4}}
    benchmark_export.write(maker(asked), PROMPTS, tool, tmp_path, **how)
    (tmp_path / "a cat-1.mp4").unlink()
    asked.clear()
    benchmark_export.write(maker(asked), PROMPTS, tool, tmp_path, **how)
    assert asked == [("a grey cat on a wall, purring", 1)]
    for other in ({"seed": 1} | how, how | {"protocol": {"steps": 3}}):
        with pytest.raises(ValueError, match="another protocol"):
            benchmark_export.write(maker(asked), PROMPTS, tool, tmp_path, **other)


def test_names_that_cannot_be_are_refused(tmp_path):
    tool = benchmark_export.tool_of("vbench")
    for prompt in ("a/b", "x" * 240):
        with pytest.raises(ValueError, match="cannot name a file"):
            benchmark_export.clips_of(tool, {prompt: prompt})
    with pytest.raises(ValueError, match="one name"):
        benchmark_export.clips_of(benchmark_export.tool_of("vbench", "{prompt}"), PROMPTS)
    with pytest.raises(ValueError, match="vbench, javisbench"):
        benchmark_export.tool_of("fvd")
    (tmp_path / "prompts.txt").write_text("a cat\na cat\n")
    with pytest.raises(ValueError, match="each once"):
        benchmark_export.read_prompts(tmp_path / "prompts.txt")
    (tmp_path / "prompts.txt").write_text("a cat\ta grey cat on a wall, purring\n\na dog\n")
    assert benchmark_export.read_prompts(tmp_path / "prompts.txt") == PROMPTS


def test_the_command_line_exports_a_students_clips(tmp_path, capsys):
    """The shipped student, a second a clip: names, clock and resolution in the manifest; a second run makes none."""
    (tmp_path / "prompts.txt").write_text("a red ball, bell\n")
    options = ["--prompts", str(tmp_path / "prompts.txt"), "--samples", "1", "--seconds", "1", "--seed", "3"]
    command = ["export-clips", *options, "--out", str(tmp_path / "clips")]
    assert main(command) == 0 == main(command)
    assert "manifest.json" in capsys.readouterr().out
    said = json.loads((tmp_path / "clips" / "manifest.json").read_text())
    assert said["protocol"]["resolution"] == [64, 64] and said["protocol"]["sample_rate"] == 16_000
    assert said["protocol"]["causal"]["steps"] and said["clips"][0]["seed"] == 3
    assert (tmp_path / "clips" / "a red ball, bell-0.mp4").is_file()
