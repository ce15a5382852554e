"""LTX-2.5 as it is published: split files read as one, both video decoders, Gemma 4; wrong files are told apart."""

from __future__ import annotations

import json
import struct
from collections import Counter

import pytest
import tiny_ltx2
import torch
from diffusers import AutoencoderKLLTX2Video, LTX2Pipeline, LTX2VideoTransformer3DModel
from diffusers.models.autoencoders.ltx2_diffusion_decoder import LTX2VideoDiffusionDecoderModel
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
from safetensors.torch import load_file, save_file
from tiny_ltx2 import SIZE, split_files

from omniforcing_lib import model_bundle, safetensors_io
from omniforcing_lib.config import ModelConfig
from omniforcing_lib.layout import AV
from omniforcing_lib.ltx2 import checkpoints, formats, part_configs, parts
from omniforcing_lib.ltx2.codec import load_ltx2_codec
from omniforcing_lib.ltx2.formats import PREFIX
from omniforcing_lib.ltx2.gemma import NEGATIVE, GemmaText

NEWEST = ("apply_gated_attention", "cross_attention_adaln", "caption_proj_before_connector")
PUBLISHED = ModelConfig(**dict.fromkeys(NEWEST, True), ff_bias=False, use_keyframes_abs_pos_embedding=True)
PROMPTS = ["a red ball, bell", "a blue ball", ""]


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """Paths of transformer, text encoder, audio VAE, and video VAE of both kinds."""
    return list(split_files(tmp_path_factory.mktemp("split")).values())


def latents(frames: int = 4) -> AV[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = AV((1, frames, 2, 2, 16), (1, 8 * frames - 6, 32))
    return shapes.map(lambda shape: torch.randn(shape, generator=generator))


def raw(z: AV[torch.Tensor], vae: torch.nn.Module) -> torch.Tensor:
    """Undo the normalisation as diffusers' pipelines do."""
    video = z.video.permute(0, 4, 1, 2, 3)
    return LTX2Pipeline._denormalize_latents(video, vae.latents_mean, vae.latents_std, 1.0)


@torch.no_grad()
def test_the_convolutional_decoder_decodes_as_in_diffusers(split):
    transformer, _, audio, convolutional, _ = split
    z, vae = latents(), tiny_ltx2.modules("2.5")["vae"]
    codec = load_ltx2_codec([transformer, audio, convolutional], SIZE)
    expected = vae.decode(raw(z, vae), None, return_dict=False)[0].clamp(-1, 1)
    assert torch.equal(codec.decode(z).video, expected.permute(0, 2, 3, 4, 1)) and expected.std() > 0.01
    assert codec.clock.sample_rate == 48_000 and next(codec.vocoder.parameters()).dtype == torch.float32


@pytest.mark.slow
@torch.no_grad()
def test_the_diffusion_decoder_decodes_as_in_diffusers(split, tmp_path):
    """By the model that diffusers' decode pipeline drives, with the same noise; a stream waits for the whole clip."""
    _, _, audio, convolutional, diffuses = split
    described = tiny_ltx2.DIFFUSION_VAE["decoder"]
    names = ("stage_channels", "stage_depths", "stage_kernels", "stage5_kernel", "t_emb_dim", "head_dim")
    strides, reductions = zip(*described["upsamples"], strict=True)
    reference = LTX2VideoDiffusionDecoderModel(
        latent_channels=16,
        decoder_upsample_strides=strides,
        decoder_upsample_channel_reductions=reductions,
        **{f"decoder_{name}": described[name] for name in names},
    ).eval()
    made = tiny_ltx2.shaken(part_configs.diffusion_decoder(tiny_ltx2.DIFFUSION_VAE, {}), 9).state_dict()
    reference.decoder.load_state_dict(made)
    # a file may hold constant gates, which are multiplied into the layers before them, and tensors that nobody reads
    gates, block = torch.tensor([0.5, 2.0] * 4), reference.decoder.diff_blocks[0]
    extra = {f"decoder.diff_blocks.0.gate_{kind}": gates.clone() for kind in ("msa", "mlp", "ctx")}
    extra |= {"decoder.coarse_x.weight": gates.clone(), "decoder.type_emb": gates.clone()}
    for layer in (block.attn.to_out[0], block.mlp.w_down, block.context_proj):
        for parameter in layer.parameters():
            parameter.mul_(gates.reshape(-1, *[1] * (parameter.ndim - 1)))
    vae, z = tiny_ltx2.modules("2.5")["vae"], latents(3)
    codec = load_ltx2_codec([audio, changed(diffuses, tmp_path, **extra)], SIZE)
    decoded, state = codec.decode(z), codec.start()
    expected = reference.decode(raw(z, vae), torch.Generator().manual_seed(0), return_dict=False)[0].clamp(-1, 1)
    assert torch.allclose(decoded.video, expected.permute(0, 2, 3, 4, 1), atol=1e-6) and expected.std() > 0.01
    assert codec.decode(z, state).video.shape[1] == 0
    assert torch.allclose(codec.finish(state).video, decoded.video, atol=1e-6)
    # the encoder is that of the convolutional file
    clip = AV(torch.rand(1, 9, *SIZE, 3), torch.zeros(1, 800))
    other = load_ltx2_codec([audio, convolutional], SIZE)
    assert torch.equal(codec.encode(clip).video, other.encode(clip).video)


@torch.no_grad()
def test_contexts_of_gemma_4_are_those_of_diffusers(split):
    """Each prompt begins with <bos>, and the model is the one that was stored."""
    text = GemmaText(split[1], split[:2], length=16, dtype=torch.float32)
    ours = text.encode(PROMPTS)
    words, _, connectors = text._load()
    assert words("a ball").input_ids == [2, *(tiny_ltx2.WORDS.index(word) + 4 for word in ("a", "ball"))]
    pipeline = LTX2Pipeline.__new__(LTX2Pipeline)
    pipeline.register_modules(tokenizer=words, text_encoder=tiny_ltx2.gemma_4())
    hidden, mask = pipeline._get_gemma_prompt_embeds([*PROMPTS[:2], NEGATIVE], max_sequence_length=16, device="cpu")
    video, audio, _ = connectors(hidden, mask, padding_side="left")
    assert torch.allclose(ours.video, video, atol=1e-5) and torch.allclose(ours.audio, audio, atol=1e-5)
    assert not torch.allclose(ours.video[0], ours.video[1], atol=1e-2)


def test_split_files_are_found_by_name_or_named(split, tmp_path, monkeypatch):
    """The convolutional decoder goes before the one that diffuses; a file of another version is passed by."""
    transformer, gemma, audio, convolutional, diffuses = split
    old = tiny_ltx2.whole_file(transformer.with_name("ltx-2-19b-dev.safetensors"))
    bundle = model_bundle.of(str(transformer), grid=(2, 2))
    assert set(bundle.text.ltx2) == {transformer, gemma, audio, convolutional} and bundle.text.gemma == gemma
    named = model_bundle.of(str(transformer), grid=(2, 2), parts=[str(diffuses)])
    assert set(named.text.ltx2) == {transformer, gemma, audio, diffuses}
    whole = model_bundle.ltx2_parts.companions(old, "2.0")
    assert whole == ([old], frozenset())
    old.unlink()
    said = checkpoints.inspect(transformer)
    assert "beside it: " in said and "then missing: nothing" in said
    assert f"a Gemma of version {tiny_ltx2.GEMMA_VERSION}" in said
    monkeypatch.chdir(transformer.parent)
    assert f"beside it: {convolutional.name}" in checkpoints.inspect(transformer.name)
    alone = tmp_path / transformer.name
    alone.write_bytes(transformer.read_bytes())
    assert "to decode, missing: video VAE, audio VAE, vocoder" in checkpoints.inspect(alone)


def changed(path, folder, metadata=None, **tensors):
    """Copy a file with other metadata, and with tensors added; None drops one."""
    found, said = load_file(path), safetensors_io.one_file(path).metadata | (metadata or {})
    found = {name: tensor for name, tensor in (found | tensors).items() if tensor is not None}
    folder.mkdir(exist_ok=True)
    save_file(found, folder / path.name, {name: text for name, text in said.items() if text is not None})
    return folder / path.name


def config_of(path, part, **changes):
    config = json.loads(safetensors_io.one_file(path).metadata["config"])
    return {"config": json.dumps(config | {part: config[part] | changes})}


def other_gemma(split, folder, **changes):
    described = json.loads(safetensors_io.one_file(split[1]).metadata["gemma_config"]) | changes
    return changed(split[1], folder, {"gemma_config": json.dumps(described)})


NORM = "model.layers.0.post_feedforward_layernorm.weight"
WRONG = {
    "a video VAE for a model": (lambda s, f: {"source": s[3]}, "holds no transformer but video VAE; give the trans"),
    "a text encoder for a model": (lambda s, f: {"source": s[1]}, "but text encoder, text projection, tokenizer; give"),
    "Gemma 3": (
        lambda s, f: {"gemma": tiny_ltx2.gemma_folder(f / "g")},
        "this is gemma3_text, and .* with gemma4-tiny-v1",
    ),
    "another Gemma 4": (
        lambda s, f: {"gemma": other_gemma(s, f, gemma_version="gemma4-stock")},
        "this is gemma4-stock, and .* was trained with gemma4-tiny-v1",
    ),
    "a Gemma 4 of no version": (
        lambda s, f: {"gemma": other_gemma(s, f, gemma_version=None)},
        "this is gemma4_unified, and .* was trained with gemma4-tiny-v1",
    ),
    "a Gemma of another size": (
        lambda s, f: {"gemma": other_gemma(s, f, text_config={"model_type": "gemma4_unified_text"})},
        "the tensors do not fit its `gemma_config`",
    ),
    "a VAE for a Gemma": (lambda s, f: {"gemma": s[2]}, "is no text encoder: its metadata has no `gemma_config`"),
    "no tokenizer": (lambda s, f: {"gemma": changed(s[1], f, tokenizer_json=None)}, "holds no `tokenizer_json`"),
    "a layer of Gemma missing": (lambda s, f: {"gemma": changed(s[1], f, **{NORM: None})}, "Missing key.*feedforward"),
    "connectors without bias": (
        lambda s, f: {"parts": [changed(s[0], f, config_of(s[0], "transformer", connector_ff_bias=False))]},
        "connector_ff_bias is false; diffusers' connectors have biases only",
    ),
    "no audio VAE": (
        lambda s, f: {"source": changed(s[0], f), "parts": [s[3]], "gemma": s[1]},
        "lacks audio VAE, voco",
    ),
    "half a decoder": (
        lambda s, f: {"parts": [changed(s[4], f, **{"decoder.conv_out.bias": None})]},
        "Missing key.*conv_out",
    ),
    "a VAE without config": (lambda s, f: {"parts": [changed(s[3], f, {"config": "{}"})]}, "has no part 'vae'"),
    "a broken VAE": (
        lambda s, f: {"parts": [changed(s[3], f, **{"encoder.conv_in.conv.bias": torch.full((16,), torch.nan)})]},
        "encoder.conv_in.conv.bias holds values that are not finite",
    ),
}


@pytest.mark.parametrize("wrong, says", WRONG.values(), ids=WRONG)
def test_a_wrong_part_has_its_own_word(wrong, says, split, tmp_path):
    given = {name: list(map(str, v)) if name == "parts" else str(v) for name, v in wrong(split, tmp_path / "x").items()}
    with pytest.raises(ValueError, match=says):
        model_bundle.of(given.pop("source", str(split[0])), grid=(2, 2), **given).text._load()


def sparse(path, shapes, metadata):
    """Write a file of these shapes without its bytes: a header and a hole."""
    header, end = {"__metadata__": metadata}, 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return path


def full(cls, names, **config):
    """Give the names and shapes of a module of the published size, as a file of Lightricks has them."""
    with torch.device("meta"):
        return {names(name): t.shape for name, t in cls(**config).state_dict().items()}


def blocks(kinds, counts, ending=""):
    """Describe residual stacks with a resampler between each two, as a VAE's config lists them."""
    listed = [["res_x", {"num_layers": counts[0]}]]
    for (kind, multiplier), count in zip(kinds, counts[1:], strict=True):
        listed += [[f"compress_{kind}{ending}", {"multiplier": multiplier}], ["res_x", {"num_layers": count}]]
    return listed


ENCODER = blocks((("space", 2), ("time", 2), ("all", 2), ("all", 1)), (4, 6, 4, 2, 2), "_res")
CONVOLUTIONAL = {
    "encoder_blocks": ENCODER,
    "decoder_blocks": blocks((("space", 2), ("time", 2), ("all", 1), ("all", 2)), (4, 6, 4, 2, 2)),
    "timestep_conditioning": False,
    "spatial_padding_mode": "zeros",
}


@pytest.fixture
def published(tmp_path):
    """Files with all names and shapes of LTX-2.5 (specification 1.12), by diffusers' classes of the published sizes."""
    config = formats.to_diffusers(PUBLISHED)
    del config["_class_name"]
    shapes = full(LTX2VideoTransformer3DModel, lambda n: PREFIX + formats.DIFFUSERS.bare(n), **config)
    text = {"caption_channels": 3840, "text_proj_in_factor": 49, "per_modality_projections": True, "proj_bias": True}
    text |= {
        "video_hidden_dim": 4096,
        "audio_hidden_dim": 2048,
        "connector_rope_base_seq_len": 4096,
        "rope_type": "split",
    }
    for stream, size in (("video", 128), ("audio", 64)):
        named = {"num_attention_heads": 32, "attention_head_dim": size, "num_layers": 8, "num_learnable_registers": 128}
        text |= {f"{stream}_connector_{name}": value for name, value in named.items()} | {f"{stream}_gated_attn": True}
    connectors = full(LTX2TextConnectors, part_configs.TEXT.to_ltx2, **text)
    projection = {name: connectors.pop(name) for name in list(connectors) if name.startswith(part_configs.PROJECTIONS)}
    described = PUBLISHED.to_metadata() | {"caption_channels": 3840}
    described |= {"connector_num_attention_heads": 32, "connector_positional_embedding_max_pos": [4096]}
    metadata = {"model_version": "2.5.0", "config": json.dumps({"transformer": described})}
    names = part_configs.video_names(CONVOLUTIONAL)
    vae = full(
        AutoencoderKLLTX2Video,
        lambda name: names.to_ltx2(name).removeprefix("vae."),
        block_out_channels=(256, 512, 1024, 1024),
        decoder_block_out_channels=(256, 512, 512, 1024),
        layers_per_block=(4, 6, 4, 2, 2),
        decoder_layers_per_block=(4, 6, 4, 2, 2),
        decoder_spatio_temporal_scaling=(True,) * 4,
        decoder_inject_noise=(False,) * 5,
        upsample_type=("spatiotemporal", "spatiotemporal", "temporal", "spatial"),
        upsample_residual=(False,) * 4,
        upsample_factor=(2, 2, 1, 2),
        decoder_spatial_padding_mode="zeros",
    )
    return {
        "transformer": sparse(tmp_path / "ltx-2.5-22b-dev-transformer-bf16.safetensors", shapes | connectors, metadata),
        "text": sparse(tmp_path / "gemma4-12b-with-proj-ltx-2.5-bf16.safetensors", projection, {"config": "{}"}),
        "vae": sparse(tmp_path / "vae.safetensors", vae, {"config": json.dumps({"vae": CONVOLUTIONAL})}),
        "whole": sparse(tmp_path / "whole.safetensors", shapes | connectors | projection, metadata),
    }


@pytest.mark.slow
def test_files_of_the_published_size_load_strictly_whole_and_split(published, monkeypatch):
    """Every name and shape of the 22B on the meta device; its transformer's file holds 4,349 tensors."""
    monkeypatch.setattr(
        parts.Reader, "get", lambda self, name, *_: torch.empty(self._entries[name].shape, device="meta")
    )
    counts = Counter(formats.group(name) for name in safetensors_io.one_file(published["transformer"]).entries)
    assert counts == {None: 4349 - 258, "text connectors": 258}
    for name in ("transformer", "whole"):
        model = checkpoints.load(published[name], device="meta", dtype=torch.bfloat16)
        assert model.config == PUBLISHED and 18.9e9 < sum(p.numel() for p in model.parameters()) < 21e9
        source = [published["transformer"], published["text"]] if name == "transformer" else published[name]
        with torch.device("meta"):
            connectors = parts.load(source, "connectors")
            assert connectors.config.text_proj_in_factor == 49
    with torch.device("meta"):
        assert parts.load([published["vae"]], "vae").config.decoder_block_out_channels == (256, 512, 512, 1024)
