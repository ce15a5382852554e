"""What stands beside a checkpoint: the world for the miniature, stand-ins of the right shapes for an LTX-2 without."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from synthetic import CONFIGS, ltx2_file

from omniforcing_lib import model_bundle
from omniforcing_lib.config import MINIATURE, ModelConfig
from omniforcing_lib.flow import DISTILLED_SIGMAS, Guidance
from omniforcing_lib.layout import AV, PAPER
from omniforcing_lib.ltx2.codec import LTX2Codec
from omniforcing_lib.rollout import RolloutConfig, new_cache
from omniforcing_lib.stream import Sampling, Streamer
from omniforcing_lib.transformer import Transformer
from series import runner
from studies import anatomy, bench, cost, probes

OTHERS = {"in_channels": 24, "out_channels": 24, "audio_in_channels": 16, "audio_out_channels": 16}


@pytest.fixture(scope="module", params=["2.0", "2.3", "2.5"])
def beside(request, tmp_path_factory):
    """A tiny LTX-2 file whose latents and text no codec of ours fits."""
    config = replace(CONFIGS[request.param], **OTHERS, caption_channels=40)
    path = ltx2_file(tmp_path_factory.mktemp("ltx2") / "tiny.safetensors", request.param, config=config)
    return model_bundle.of(str(path), grid=(2, 3))


def test_the_miniature_has_its_world():
    beside = model_bundle.of()
    assert beside.has_ground_truth and "truth is known" in str(beside) and len(beside.names) == 18
    found = beside.examples(2, 0, 1)
    assert len(found.clips) == len(found.prompts) == len(found.latents.video) == 2


def test_an_ltx2_file_alone_gets_stand_ins_and_says_so(beside):
    assert not beside.has_ground_truth and "stand-in" in str(beside)
    found, context = beside.examples(2, 0, 1), beside.context()
    assert found.clips == [] and found.latents.map(lambda x: x.shape[1:]) == ((4, 2, 3, 24), (26, 16))
    assert context.context.map(lambda c: c.shape[-1]) == model_bundle.text_widths(beside.load().config)
    assert not torch.equal(context.context.video[0], context.context.video[1])
    assert torch.equal(beside.encode(beside.names[:1]).audio, context.context.audio[:1])


def test_a_gemma_of_another_version_is_refused(tmp_path):
    """Gemma 3 has the width that LTX-2.5's connectors take, and would give contexts that mean nothing to it."""
    path, gemma = ltx2_file(tmp_path / "ltx-2.5.safetensors", "2.5", config=CONFIGS["2.5"]), tmp_path / "gemma-3"
    gemma.mkdir()
    (gemma / "config.json").write_text('{"model_type": "gemma3"}')
    with pytest.raises(ValueError, match=r"gemma-3: this is gemma3, and ltx-2\.5\.safetensors was trained with gemma4"):
        model_bundle.of(str(path))


def test_what_a_teacher_is_stands_in_its_name_or_is_asked_for(tmp_path):
    """A distilled one is sampled without guidance at its own levels, from 2.5 on with noise at each step."""
    found = {}
    for name, version, kind in (
        ("ltx-2.3-dev", "2.3", ""),
        ("ltx-2.3-distilled", "2.3", ""),
        ("ltx-2.5-x", "2.5", "distilled"),
        ("ltx-2.5-distilled", "2.5", "dev"),
    ):
        bundle = model_bundle.of(str(ltx2_file(tmp_path / f"{name}.safetensors", version)), grid=(1, 1), variant=kind)
        found[name] = bundle.sampling(30)
        said = "taken for distilled" if name == "ltx-2.3-distilled" else "taken for dev"
        assert (said in str(bundle)) == (not kind)
    guidance = model_bundle.guidance_of(CONFIGS["2.3"])
    assert found["ltx-2.3-dev"] == found["ltx-2.5-distilled"] == Sampling(30, guidance)
    assert found["ltx-2.3-distilled"] == Sampling(DISTILLED_SIGMAS, Guidance())
    assert found["ltx-2.5-x"] == Sampling(DISTILLED_SIGMAS, Guidance(), ancestral=True)


def test_what_a_bundle_can_do_is_asked_of_its_properties(beside):
    assert beside.decodes_at_once and not replace(beside, codec=LTX2Codec.__new__(LTX2Codec)).decodes_at_once
    assert beside.training_bytes == 20 * sum(p.numel() for p in beside.load().parameters())
    assert beside.fits_training and beside.training_bytes < beside.memory_bytes
    assert beside.config == beside.load().config and beside.shipped == {}


def test_a_student_lent_from_the_teacher_streams_what_the_whole_decodes_to(beside):
    model, causal = beside.student()
    assert model.config.num_audio_sink_tokens == causal.layout.sinks == 16
    make = [beside.codec, beside.text, beside.names[0]]
    with torch.inference_mode():
        chunks = bench.watch(Streamer(model, causal, *make), 3).chunks
        whole = bench.offline(Streamer(model, causal, *make), 3)
    assert [(len(c.frames), len(c.samples)) for c in chunks] == [(1, 160), (24, 16_000), (24, 16_000)]
    assert bench.equal(bench.joined(chunks), whole, 1e-6)


def test_variants_share_the_weights_and_casting_one_leaves_the_others(beside):
    model, other = beside.load(), beside.load(sinks=4, changes={"rope_type": "interleaved"})
    assert other.proj_out.weight.data_ptr() == model.proj_out.weight.data_ptr()
    assert other.audio_sink_tokens.shape[1] == 4 and model.config.rope_type == "split"
    other.double()
    assert beside.load().proj_out.weight.dtype == torch.float32


def test_contexts_of_full_precision_reach_a_model_of_half(beside):
    """ODE pairs are made by a bfloat16 teacher from contexts that trainers read in float32."""
    model, example = beside.load().bfloat16(), beside.examples(1, 0, 1)
    level = torch.full((1,), 0.5)
    with torch.no_grad():
        out = model(example.latents, AV(level, level), beside.context().take(torch.tensor([0])))
    assert out.map(lambda x: x.dtype) == (torch.bfloat16, torch.bfloat16)


def test_wrong_settings_are_seen_and_the_right_ones_are_not(beside):
    model, example = beside.load(), beside.examples(1, 0, 1)
    text = beside.encode(example.prompts)
    for changes, moved in (({}, False), (anatomy.RELEASED_CODE, True)):
        found = anatomy.astray(model, beside.load(changes=changes), example.latents, text)
        assert (max(found.logits) < 0.9) == moved and (min(found.output) > 0.01) == moved


def test_each_block_has_its_level_where_the_text_is_modulated_too(beside):
    model, example = beside.load(sinks=16), beside.examples(1, 0, 2)
    clip = probes.noisy_clip(example.latents, beside.encode(example.prompts), 0, PAPER)
    assert max(probes.cached_against_masked(model, clip, PAPER)) <= 1e-5


def test_the_bytes_of_a_cache_are_those_of_the_cache():
    model = Transformer(MINIATURE.with_sinks(16))
    for causal in (RolloutConfig(), RolloutConfig(window=0), RolloutConfig(window=9)):
        assert cost.cache_bytes(model.config, causal, 16, 4) == new_cache(model, causal, (4, 4), 1).nbytes
    assert cost.parameters(ModelConfig()) == pytest.approx(18.88e9, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("version", ["2.0", "2.3", "2.5"])
def test_the_notebooks_run_on_an_ltx2_file(tmp_path, version):
    """All of them, on a file of 0.9 M parameters: nothing in them is specific to the miniature."""
    config = replace(CONFIGS[version], **OTHERS, caption_channels=40)
    path = ltx2_file(tmp_path / "tiny.safetensors", version, config=config)
    out = runner.reproduce("smoke", parameters=[f"teacher={path}"], out=str(tmp_path / "run"))
    for metrics in (out / "metrics").glob("*.json"):
        assert "sync_f1" not in metrics.read_text(), f"{metrics.name} tells quality that nobody can know"
    assert len(list((out / "metrics").glob("*.json"))) == len(runner.select())
