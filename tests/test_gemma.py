"""Laws of the text path: what diffusers' pipeline makes of a prompt, once, and from the disk ever after."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from diffusers import LTX2Pipeline
from tiny_ltx2 import MODEL, diffusers_folder, gemma_folder, whole_file

from omniforcing_lib import model_bundle
from omniforcing_lib.__main__ import Generate
from omniforcing_lib.layout import Clock
from omniforcing_lib.ltx2 import gemma
from omniforcing_lib.ltx2.gemma import GemmaText

LENGTH = 16
PROMPTS = ["a red ball, bell", "a blue ball", ""]


@pytest.fixture(scope="module", params=["2.0", "2.3"])
def files(request, tmp_path_factory):
    """A folder with a tiny Gemma, a whole LTX-2 file and the same as a diffusers folder."""
    folder = tmp_path_factory.mktemp("text")
    whole_file(folder / "ltx2.safetensors", request.param)
    diffusers_folder(folder / "diffusers", request.param)
    gemma_folder(folder / "gemma")
    return folder


def encoder(files, source: str = "ltx2.safetensors", **changes) -> GemmaText:
    return GemmaText(files / "gemma", files / source, **{"length": LENGTH, "dtype": torch.float32} | changes)


def test_contexts_are_those_of_diffusers_pipeline(files):
    """Tokens, hidden states, normalisation, connectors: the pipeline's own functions give the same two contexts."""
    text = encoder(files)
    ours = text.encode(PROMPTS)
    tokenizer, model, connectors = text._load()
    pipeline = LTX2Pipeline.__new__(LTX2Pipeline)
    pipeline.register_modules(tokenizer=tokenizer, text_encoder=model)
    asked = [*PROMPTS[:2], gemma.NEGATIVE]
    with torch.no_grad():
        hidden, mask = pipeline._get_gemma_prompt_embeds(asked, max_sequence_length=LENGTH, device="cpu")
        video, audio, seen = connectors(hidden, mask, padding_side="left")
    assert seen.all() and not mask.all()
    assert torch.allclose(ours.video, video, atol=1e-5) and torch.allclose(ours.audio, audio, atol=1e-5)
    assert ours.map(lambda t: t.shape) == (video.shape, audio.shape) and video.shape[1] == LENGTH
    assert not torch.allclose(ours.video[0], ours.video[1], atol=1e-2)


def test_a_single_file_and_a_folder_give_the_same_contexts(files):
    one, other = encoder(files), encoder(files, "diffusers")
    contexts = one.encode(PROMPTS)
    assert all(torch.equal(a, b) for a, b in zip(contexts, other.encode(PROMPTS), strict=True))
    width = contexts.video.shape[-1]
    assert width == (MODEL.caption_channels if "text_proj_in.weight" in one._modules[2].state_dict() else 24)


def test_a_cached_prompt_loads_nothing(files, tmp_path, monkeypatch):
    """The second encoder, a new process for all it knows, reads what the first one wrote; one file a prompt."""
    first = encoder(files, cache=tmp_path)
    made = first.encode(PROMPTS)
    assert first._modules and len(list(tmp_path.iterdir())) == len(PROMPTS)
    first.unload()
    assert first._modules is None
    second = encoder(files, cache=tmp_path)
    monkeypatch.setattr(GemmaText, "_load", lambda self: pytest.fail("the encoder was loaded"))
    for text in (first, second):
        again = text.encode(PROMPTS[::-1])
        assert text._modules is None and all(torch.equal(a, b.flip(0)) for a, b in zip(again, made, strict=True))
    half = second.encode(PROMPTS[:1], dtype=torch.bfloat16)
    assert half.video.dtype == torch.bfloat16


def test_a_prompt_that_is_cut_is_reported_with_both_counts_each_time(files, tmp_path):
    """Computed or cached; with its beginning-of-sequence token. A prompt that just fits is not."""
    text = encoder(files, cache=tmp_path)
    said = r"'a ball a ball .*'\.\.\. has 21 tokens, the encoder takes 16: the last 5 are left out"
    for again in (text, text, encoder(files)):
        with pytest.warns(UserWarning, match=said):
            context = again.encode(["a ball " * 10])
    assert torch.equal(context.video, text.encode(["a ball " * 7 + "a"]).video)


def test_the_encoder_is_gone_before_the_model_is_loaded(files, tmp_path, monkeypatch):
    """It is as large as the model; the contexts of the prompts are in the cache."""
    text = encoder(files, cache=tmp_path)
    found = SimpleNamespace(text=text, device="cpu", choose_attention=lambda: None)
    monkeypatch.setattr(model_bundle, "of", lambda *_, **__: found)
    Generate(prompt="a red ball", out="x.mp4").bundle(PROMPTS)
    assert len(list(tmp_path.iterdir())) == len(PROMPTS) and text._modules is None


def test_a_cache_that_cannot_be_written_costs_a_warning_and_no_context(files, tmp_path, recwarn):
    """A folder below a file can neither be read nor made; the second prompt does not warn again."""
    (tmp_path / "file").write_text("")
    text = encoder(files, cache=tmp_path / "file" / "contexts")
    made = [text.encode([prompt]) for prompt in PROMPTS]
    warned = [str(warning.message) for warning in recwarn if "contexts are not kept" in str(warning.message)]
    assert len(warned) == 1 and str(tmp_path / "file" / "contexts") in warned[0]
    right = encoder(files).encode(PROMPTS)
    assert all(
        torch.equal(torch.cat(parts), whole) for parts, whole in zip(zip(*made, strict=True), right, strict=True)
    )


def test_contexts_are_kept_for_the_user_and_not_in_the_models_folder(files, tmp_path, monkeypatch):
    monkeypatch.setattr(model_bundle, "load_ltx2_codec", lambda *_, **__: SimpleNamespace(grid=(2, 3), clock=Clock()))
    monkeypatch.setenv("HOME", str(tmp_path))
    kept = {}
    for name, folder in (("", ".cache"), (str(tmp_path / "xdg"), "xdg")):
        monkeypatch.setenv("XDG_CACHE_HOME", name)
        kept[folder] = model_bundle.of(str(files / "ltx2.safetensors")).text.cache
    assert kept == {folder: tmp_path / folder / "omniforcing" / "contexts" for folder in kept}
    assert model_bundle.of(str(files / "ltx2.safetensors"), contexts="~/mine").text.cache == tmp_path / "mine"
    assert not (files / "gemma" / "contexts").exists()


def test_another_encoder_does_not_find_the_cache(files, tmp_path):
    """One number changed in the weights, another length, another precision: other contexts, under other names."""
    texts = [encoder(files), encoder(files, length=24), encoder(files, dtype=torch.bfloat16)]
    assert len({text.identity for text in texts}) == 3
    assert encoder(files).identity == encoder(files).identity
    copy, names = tmp_path / "weights.safetensors", []
    raw = bytearray((files / "ltx2.safetensors").read_bytes())
    for last in (0, 1):
        raw[-1] = last
        copy.write_bytes(raw)
        names.append(gemma.fingerprint([copy]))
    assert names[0] != names[1]


def test_a_bad_cache_or_model_is_refused_by_name(files, tmp_path):
    text = encoder(files, cache=tmp_path)
    text.encode(PROMPTS[:1])
    (kept,) = tmp_path.iterdir()
    kept.write_bytes(b"broken")
    with pytest.raises(ValueError, match="delete it"):
        text.encode(PROMPTS[:1])
    with pytest.raises(ValueError, match=r"config\.json"):
        GemmaText(tmp_path, files / "ltx2.safetensors")
    with pytest.raises(ValueError, match="registers"):
        encoder(files, length=12).encode(["a ball"])
