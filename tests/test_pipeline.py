"""Prompt -> video: what comes in, what comes out, and what is kept on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from vdm import TextToVideo
from vdm.checkpoint import read_manifest, save_checkpoint
from vdm.components import SHIPPED, build_components, build_text_encoder, build_vae, load_part, save_parts, states
from vdm.config import Config, load, to_yaml
from vdm.diffusion import ddim_sample, ddpm_sample, dpmpp_sample, initial_noise
from vdm.errors import UserError
from vdm.models.onednn import Packable
from vdm.text.encoder import TOKEN_TABLE

TINY = Path(__file__).parent / "fixtures" / "tiny.yaml"
CLIP = np.ones((4, 16, 16, 3), dtype=np.float32)
PROMPTS = ["pushing a red ball", "holding a blue cup"]


def tiny(*overrides: str) -> Config:
    return load(TINY, overrides)


def make(*overrides: str) -> TextToVideo:
    """A model whose every layer does something: zero-initialised ones are stirred too."""
    config = tiny(*overrides)
    pipe = TextToVideo(config, build_components(config))
    stir = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (*pipe.unet.parameters(), *pipe.text_encoder.parameters()):
            parameter += 0.1 * torch.randn(parameter.shape, generator=stir)
    return pipe


@pytest.fixture(scope="module")
def pipe() -> TextToVideo:
    return make()


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in numbers]


def latents_of(pipe: TextToVideo, prompt: str | Sequence[str] = PROMPTS[0], **options: object) -> Tensor:
    options.setdefault("generator", seeds(*range(1 if isinstance(prompt, str) else len(prompt))))
    frames = pipe(prompt, output_type="latent", **options).frames  # type: ignore[arg-type]
    assert isinstance(frames, Tensor)
    return frames


def assert_same_weights(left: nn.Module, right: nn.Module) -> None:
    ours, theirs = left.state_dict(), right.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def assert_same_model(left: TextToVideo, right: TextToVideo) -> None:
    assert_same_weights(left.unet, right.unet)
    assert_same_weights(left.vae, right.vae)
    assert_same_weights(left.text_encoder, right.text_encoder)


# ---- in less memory


def test_guidance_in_two_calls_and_decoding_in_squares_give_the_same_or_nearly() -> None:
    whole, apart, tiled = (make(*keys) for keys in ((), ("sampling.guidance_at_once=false",), ("sampling.vae_tile=8",)))
    options = {"height": 64, "width": 36, "num_inference_steps": 2, "guidance_scale": 3.0}
    sizes: list[int] = []
    apart.unet.register_forward_hook(lambda _, given, out: sizes.append(len(given[2])))
    torch.testing.assert_close(latents_of(apart, **options), latents_of(whole, **options), rtol=1e-4, atol=1e-5)
    assert sizes == [1] * 4
    seen: list[torch.Size] = []
    tiled.vae.decoder.register_forward_hook(lambda _, given, out: seen.append(given[0].shape[3:]))
    frames = [torch.as_tensor(pipe(PROMPTS[0], generator=seeds(0), **options).frames) for pipe in (tiled, whole)]
    assert len(seen) > 1 and set(seen) == {(8, 8)}
    assert 0.0 < (frames[0] - frames[1]).abs().mean() < 0.05


def test_a_model_that_sampled_by_a_graph_samples_without_a_gpu() -> None:
    one, other = (latents_of(make(f"sampling.cuda_graph={graph}"), height=16, width=16) for graph in ("true", "false"))
    assert torch.equal(one, other)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize(("correlation", "low", "high"), [(0, -0.3, 0.3), (0.95, 0.8, 1.0)])
def test_random_steps_draw_noise_as_it_was_trained_with(
    sampler: str, correlation: float, low: float, high: float
) -> None:
    """From the same start the first steps of two seeds differ by their noise alone."""
    pipe = make(f"training.frame_noise_correlation={correlation}")
    first: list[Tensor] = []
    for seed in (1, 2):
        options: dict[str, Any] = {"sampler": sampler, "num_inference_steps": 2, "output_type": "latent"}
        options |= {"eta": 1.0} if sampler == "ddim" else {}
        pipe(
            "ball", latents=torch.zeros(1, 4, 4, 16, 16), generator=seeds(seed), **options,
            callback=lambda index, t, x: first.append(x.clone()) if index == 0 else None,
        )  # fmt: skip
    noise = (first[0] - first[1])[0]
    pair = torch.stack([noise[:, 0].flatten(), noise[:, 3].flatten()])
    assert low < float(torch.corrcoef(pair)[0, 1]) < high


# ---- to disk and back


def test_save_and_load_keeps_every_bit(pipe: TextToVideo, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "model")
    again = TextToVideo.from_pretrained(tmp_path / "model")
    assert_same_model(pipe, again)
    assert again.config == pipe.config
    assert torch.equal(latents_of(pipe), latents_of(again))


def test_a_part_alone_can_be_saved(pipe: TextToVideo, tmp_path: Path) -> None:
    save_parts(tmp_path / "vae", pipe.config, states({"vae": pipe.vae}), info={"step": 3})
    manifest = read_manifest(tmp_path / "vae")
    assert (manifest.parts, manifest.info) == (["vae"], {"step": 3})
    with pytest.raises(UserError, match="holds no weights of unet, only of vae"):
        TextToVideo.from_pretrained(tmp_path / "vae")


def test_half_precision_on_disk_is_close(pipe: TextToVideo, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "model", dtype=torch.float16)
    again = TextToVideo.from_pretrained(str(tmp_path / "model"))
    for name, tensor in pipe.unet.state_dict().items():
        stored = again.unet.state_dict()[name]
        assert stored.dtype == torch.float32
        assert torch.equal(stored, tensor.half().float())
    assert next(pipe.unet.parameters()).dtype == torch.float32, "saving does not change the model"
    ours, theirs = (np.asarray(one(PROMPTS[0], generator=seeds(0)).frames) for one in (pipe, again))
    assert np.abs(ours - theirs).max() < 0.02
    assert not np.array_equal(ours, theirs)


def test_tokens_that_training_saw_are_kept_and_the_others_share_one_row(tmp_path: Path) -> None:
    pipe = make()
    pipe.text_encoder.train()
    pipe.text_encoder(PROMPTS)
    pipe.text_encoder.eval()
    pipe.save_pretrained(tmp_path / "model")
    again = TextToVideo.from_pretrained(tmp_path / "model")
    seen = pipe.text_encoder.seen_tokens
    assert 5 < int(seen.sum()) < 20
    assert torch.equal(again.text_encoder.seen_tokens, seen)
    ours, theirs = pipe.text_encoder.state_dict()[TOKEN_TABLE], again.text_encoder.state_dict()[TOKEN_TABLE]
    assert torch.equal(theirs[seen], ours[seen])
    assert torch.allclose(theirs[~seen], ours[seen].mean(0).expand_as(theirs[~seen]), atol=1e-6)
    assert torch.equal(pipe.text_encoder(PROMPTS), again.text_encoder(PROMPTS))
    assert (tmp_path / "model" / "text.safetensors").stat().st_size < 100_000


def test_averaged_weights_are_the_ones_that_are_loaded(pipe: TextToVideo, tmp_path: Path) -> None:
    parts = {"unet": pipe.unet, "vae": pipe.vae, "text": pipe.text_encoder}
    weights = {part: module.state_dict() for part, module in parts.items()}
    weights["unet.ema"] = {name: tensor + 1.0 for name, tensor in pipe.unet.state_dict().items()}
    save_checkpoint(tmp_path / "model", config_yaml=to_yaml(pipe.config), weights=weights, info={})
    again = TextToVideo.from_pretrained(tmp_path / "model")
    for average, own in zip(again.unet.parameters(), pipe.unet.parameters(), strict=True):
        assert torch.equal(average, own + 1.0)
    assert_same_weights(again.vae, pipe.vae)


def test_a_folder_without_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no manifest.json"):
        TextToVideo.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        TextToVideo.from_pretrained(tmp_path / "nowhere")


def test_what_the_weights_were_made_from_need_not_be_there(tmp_path: Path) -> None:
    """A run on someone's VAE moves to another machine with its `final` alone."""
    make().save_pretrained(tmp_path / "vae")
    model = make(f"vae.vae_weights={tmp_path / 'vae'}")
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "vae").rename(tmp_path / "gone")
    assert_same_model(TextToVideo.from_pretrained(tmp_path / "model"), model)


def test_a_text_encoder_starts_from_a_checkpoint_of_its_own(tmp_path: Path) -> None:
    save_parts(tmp_path / "text", make().config, states({"text": make("seed=7").text_encoder}))
    weights = f"text.text_weights={tmp_path / 'text'}"
    for start in (build_components(tiny(weights)).text_encoder, build_text_encoder(tiny(weights))):
        assert_same_weights(start, make("seed=7").text_encoder)
    with pytest.raises(UserError, match="text.text_heads is 2, but .*text was trained with 1; use that"):
        build_text_encoder(tiny(weights, "text.text_heads=2"))
    (tmp_path / "text" / "manifest.json").unlink()
    with pytest.raises(UserError, match="has no manifest.json"):
        build_text_encoder(tiny(weights))


def test_the_shipped_model_is_there_and_small() -> None:
    pipe = TextToVideo.from_pretrained()
    frames = pipe(
        "pushing a red ball from left to right", num_inference_steps=1, num_frames=2, generator=seeds(0)
    ).frames
    assert frames.shape == (1, 2, 64, 64, 3)
    assert sum(path.stat().st_size for path in SHIPPED.parent.rglob("*.safetensors")) <= 16_000_000
    smoke = load(TINY.parents[2] / "configs" / "smoke.yaml")
    assert_same_weights(build_vae(smoke), pipe.vae)  # what `vae_weights: shipped` means


# ---- what comes out


def test_shapes_and_ranges_of_the_output_types(pipe: TextToVideo) -> None:
    clips = {
        kind: pipe(PROMPTS, num_frames=3, height=16, width=24, generator=seeds(0, 1), output_type=kind).frames  # type: ignore[arg-type]
        for kind in ("np", "pt", "latent")
    }
    frames, tensor, latent = clips["np"], clips["pt"], clips["latent"]
    assert isinstance(frames, np.ndarray) and isinstance(tensor, Tensor) and isinstance(latent, Tensor)
    assert frames.shape == (2, 3, 16, 24, 3) and frames.dtype == np.float32
    assert tensor.shape == (2, 3, 3, 16, 24)
    assert latent.shape == (2, 4, 3, 4, 6)
    assert 0.0 <= frames.min() < frames.max() <= 1.0
    assert np.array_equal(frames, tensor.permute(0, 1, 3, 4, 2).numpy())
    with torch.no_grad():
        decoded = ((pipe.vae.decode(latent) + 1) / 2).clamp(0, 1)
    assert torch.allclose(decoded.transpose(1, 2), tensor, atol=1e-5)


def test_defaults_come_from_the_config(pipe: TextToVideo) -> None:
    spelled_out = latents_of(
        pipe, num_inference_steps=2, num_frames=4, height=16, width=16, guidance_scale=2.0, eta=0.0, sampler="ddim"
    )
    assert torch.equal(latents_of(pipe), spelled_out)
    assert not torch.equal(latents_of(pipe, num_inference_steps=3), spelled_out)


def test_a_clip_does_not_depend_on_its_neighbours(pipe: TextToVideo) -> None:
    together = latents_of(pipe, PROMPTS, generator=seeds(5, 6), negative_prompt=["dark", "bright"])
    for i in range(2):
        alone = latents_of(pipe, PROMPTS[i], generator=seeds(5 + i), negative_prompt=["dark", "bright"][i])
        assert torch.allclose(together[i], alone[0], atol=1e-4)


def test_one_generator_serves_all_clips_in_turn(pipe: TextToVideo) -> None:
    first, second = seeds(3)[0], seeds(3)[0]
    noise = initial_noise((4, 4, 4, 4), [first, first])
    assert not torch.equal(noise[0], noise[1])
    from_one = latents_of(pipe, PROMPTS, generator=second)
    assert torch.allclose(from_one, latents_of(pipe, PROMPTS, latents=noise), atol=1e-5)
    assert torch.equal(latents_of(pipe, generator=seeds(3)[0]), latents_of(pipe, generator=seeds(3)))


def test_without_a_generator_torchs_own_draws(pipe: TextToVideo) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        first, second = latents_of(pipe, generator=None), latents_of(pipe, generator=None)
    assert not torch.equal(first, second)
    assert torch.equal(first, latents_of(pipe, generator=seeds(3)[0]))


@pytest.mark.parametrize("options", [{"sampler": "ddpm"}, {"eta": 1.0}], ids=["ddpm", "eta 1"])
def test_random_samplers_draw_from_the_clips_own_generator(pipe: TextToVideo, options: dict[str, object]) -> None:
    drawn = latents_of(pipe, PROMPTS, generator=seeds(1, 2), num_inference_steps=3, **options)
    again = latents_of(pipe, PROMPTS, generator=seeds(1, 2), num_inference_steps=3, **options)
    assert torch.equal(drawn, again)
    alone = latents_of(pipe, PROMPTS[1], generator=seeds(2), num_inference_steps=3, **options)
    assert torch.allclose(alone[0], drawn[1], atol=1e-4)
    assert not torch.allclose(drawn, latents_of(pipe, PROMPTS, generator=seeds(1, 2), num_inference_steps=3), atol=1e-2)


def test_guidance_weighs_prompt_against_negative_prompt(pipe: TextToVideo) -> None:
    ball, cup = PROMPTS
    conditional = latents_of(pipe, ball, guidance_scale=1.0)
    assert torch.equal(latents_of(pipe, ball, guidance_scale=1.0, negative_prompt=cup), conditional)
    assert not torch.allclose(latents_of(pipe, cup, guidance_scale=1.0), conditional, atol=1e-3)

    for scale in (0.0, 0.5):  # as in diffusers, guidance begins above 1
        assert torch.equal(latents_of(pipe, ball, guidance_scale=scale, negative_prompt=cup), conditional)

    guided = latents_of(pipe, ball, guidance_scale=3.0)
    assert torch.equal(latents_of(pipe, ball, guidance_scale=3.0, negative_prompt=""), guided)
    assert not torch.allclose(latents_of(pipe, ball, guidance_scale=3.0, negative_prompt=cup), guided, atol=1e-3)
    assert not torch.allclose(conditional, guided, atol=1e-3)


def test_lower_precision_inside_float32_outside(tmp_path: Path) -> None:
    pipe = make()
    exact = pipe(PROMPTS[0], generator=seeds(0)).frames
    low = pipe.to("cpu", torch.bfloat16)(PROMPTS[0], generator=seeds(0)).frames
    assert isinstance(low, np.ndarray) and isinstance(exact, np.ndarray)
    assert {p.dtype for p in pipe.unet.parameters()} == {p.dtype for p in pipe.vae.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in pipe.text_encoder.parameters()} == {torch.float32}
    assert low.dtype == np.float32
    assert 0.0 < np.abs(low - exact).mean() < 0.02


# ---- the keywords of diffusers


def test_embeddings_stand_for_prompts(pipe: TextToVideo) -> None:
    ball, cup = (pipe.text_encoder([prompt]).detach() for prompt in PROMPTS)
    wanted = latents_of(pipe, PROMPTS[0], negative_prompt=PROMPTS[1])
    options = {"generator": seeds(0), "output_type": "latent"}
    found = pipe(prompt_embeds=ball, negative_prompt_embeds=cup, **options).frames  # type: ignore[arg-type]
    assert torch.equal(found, wanted)


def test_the_callback_sees_every_so_many_steps(pipe: TextToVideo) -> None:
    seen: list[tuple[int, int, Tensor]] = []
    options = {"generator": seeds(0), "output_type": "latent", "num_inference_steps": 5, "callback_steps": 2}
    last = pipe(PROMPTS[0], callback=lambda *args: seen.append(args), **options).frames  # type: ignore[arg-type]
    assert [(step, t) for step, t, _ in seen] == [(0, 999), (2, 599), (4, 199)]
    assert torch.equal(seen[-1][2], last)


def test_weights_are_packed_while_it_samples_and_no_longer(pipe: TextToVideo) -> None:
    layers, kept = [layer for layer in pipe.unet.modules() if isinstance(layer, Packable)], []

    def count(index: int, t: int, x: Tensor) -> None:
        kept.append(sum(bool(layer.packs) for layer in layers))

    before = latents_of(pipe)
    pipe(PROMPTS[0], generator=seeds(0), num_inference_steps=2, output_type="latent", callback=count)
    assert kept == [len(layers)] * 2
    with torch.no_grad():
        for weight in pipe.unet.parameters():
            weight += 0.1
    assert not torch.allclose(latents_of(pipe), before)


def test_the_result_is_a_tuple_with_a_name(pipe: TextToVideo) -> None:
    result = pipe(PROMPTS, generator=seeds(0, 1), return_dict=False)
    (frames,) = result
    assert frames is result.frames is result[0]


def test_images_are_the_frames_in_bytes(pipe: TextToVideo) -> None:
    exact = pipe(PROMPTS, generator=seeds(0, 1)).frames
    images = pipe(PROMPTS, generator=seeds(0, 1), output_type="pil").frames
    assert [len(clip) for clip in images] == [4, 4] and images[0][0].size == (16, 16)
    assert (
        np.abs(np.stack([[np.asarray(frame) for frame in clip] for clip in images]) / 255 - exact).max()
        <= 0.5 / 255 + 1e-6
    )


def test_latents_say_the_size(pipe: TextToVideo) -> None:
    noise = torch.randn(2, 4, 3, 2, 6, generator=seeds(0)[0])
    assert pipe(PROMPTS, latents=noise).frames.shape == (2, 3, 8, 24, 3)
    with pytest.raises(UserError, match=r"latents must be \(2, 4, 3, 4, 6\), got \(2, 4, 3, 2, 6\)"):
        pipe(PROMPTS, latents=noise, height=16)


def test_one_generator_draws_the_noise_of_all_clips_at_once(pipe: TextToVideo) -> None:
    noise = torch.randn(2, 4, 4, 4, 4, generator=seeds(3)[0])
    found = pipe(PROMPTS, generator=seeds(3)[0], output_type="latent").frames
    assert torch.equal(found, pipe(PROMPTS, latents=noise, output_type="latent").frames)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpmpp"])
def test_a_clip_is_started_from_as_its_noised_latents(pipe: TextToVideo, sampler: str) -> None:
    """By hand: encoded, noised to the step that comes after those left out, and denoised from there."""
    clip = torch.rand(4, 3, 16, 16, generator=seeds(5)[0])
    options: dict[str, Any] = {"sampler": sampler, "num_inference_steps": 5, "guidance_scale": 1.0}
    seen: list[tuple[int, int]] = []
    found = pipe(
        PROMPTS, video=clip, strength=0.65, generator=seeds(0, 1), output_type="latent", **options,
        callback=lambda index, t, x: seen.append((index, t)),
    ).frames  # fmt: skip
    times = pipe.schedule.timesteps(5)
    assert seen == list(enumerate(times.tolist()[2:])), "int(0.65 * 5) steps"
    with torch.no_grad():
        z = pipe.vae.encode(clip.transpose(0, 1)[None] * 2 - 1).mode()
        noise = initial_noise((4, 4, 4, 4), seeds(0, 1))
        x = pipe.schedule.add_noise(z.expand(2, -1, -1, -1, -1), noise, times[2].expand(2))
        cond = pipe.text_encoder(PROMPTS)
        shared: dict[str, Any] = {"num_steps": 5, "skip": 2}
        if sampler != "dpmpp":
            generators = seeds(0, 1)
            initial_noise((4, 4, 4, 4), generators)  # what the steps draw comes after it
            shared |= {"generators": generators}
        denoise = {"ddim": ddim_sample, "ddpm": ddpm_sample, "dpmpp": dpmpp_sample}[sampler]
        expected = denoise(lambda x, t: pipe.unet(x, t, cond), x, pipe.schedule, **shared)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_clips_to_start_from_are_arrays_tensors_and_bytes_alike(pipe: TextToVideo) -> None:
    video = np.random.default_rng(0).integers(0, 256, (2, 3, 8, 12, 3), dtype=np.uint8)
    tensor = torch.from_numpy(video).movedim(-1, -3)
    pictures = [[Image.fromarray(frame) for frame in clip] for clip in video]
    made = [
        pipe(PROMPTS, video=one, generator=seeds(0, 1), output_type="latent").frames
        for one in (video, video.astype(np.float64) / 255, tensor, tensor.float() / 255, pictures, list(video))
    ]
    assert made[0].shape == (2, 4, 3, 2, 3), "it says the size"
    for other in made[1:]:
        torch.testing.assert_close(other, made[0], rtol=1e-3, atol=1e-4)
    alone = pipe(PROMPTS[1], video=video[1], generator=seeds(1), output_type="latent").frames
    torch.testing.assert_close(alone[0], made[0][1], rtol=1e-3, atol=1e-4)


# ---- what is refused


@pytest.mark.parametrize(
    ("prompt", "options", "sentence"),
    [
        ([], {}, "0 prompts"),
        (PROMPTS, {"negative_prompt": ["one"]}, "2 prompts and 1 negative"),
        (PROMPTS, {"generator": seeds(0)}, "1 generators for 2 prompts"),
        (
            "ball",
            {"latents": torch.zeros(1, 4, 4, 4, 5), "width": 16},
            r"latents must be \(1, 4, 4, 4, 4\), got \(1, 4, 4, 4, 5\)",
        ),
        ("ball", {"output_type": "gif"}, "np, pt, pil or latent"),
        ("ball", {"height": 18}, "height=18 is not divisible by 4"),
        ("ball", {"width": 30}, "width=30 is not divisible by 4"),
        ("ball", {"num_frames": 9}, "max_num_frames=8"),
        ("ball", {"num_frames": 0}, "num_frames is 0"),
        ("ball", {"num_inference_steps": 0}, "num_inference_steps is 0"),
        ("ball", {"sampler": "euler"}, "ddim, ddpm, dpmpp"),
        ("ball", {"eta": 1.5}, "eta is 1.5"),
        ("ball", {"eta": 0.5, "sampler": "dpmpp"}, "eta is not for the sampler dpmpp"),
        ("ball", {"video": CLIP, "strength": 0.0}, "strength is 0.0, of 2 steps"),
        ("ball", {"video": CLIP, "strength": 1.1}, "strength is 1.1, of 2 steps"),
        (
            "ball",
            {"video": CLIP, "strength": 0.4},
            "strength is 0.4, of 2 steps; it must be above 0, at most 1, and enough for a step",
        ),
        ("ball", {"video": CLIP + 0.1}, "video must be of uint8, or of floats in .0, 1."),
        ("ball", {"video": CLIP[..., :2]}, r"or a tensor \(B, T, 3, H, W\), got \(1, 4, 2, 16, 16\)"),
        ("ball", {"video": CLIP[0, ..., 0]}, "video must be an array, a tensor or a list of frames"),
        ("ball", {"video": [CLIP[0], CLIP[1, :8]]}, "video must be an array, a tensor or a list of frames"),
        ("ball", {"video": "clip.mp4"}, "video must be an array, a tensor or a list of frames"),
        ("ball", {"video": CLIP, "height": 24}, r"video is 1 clips of \(4, 16, 16\), for 1 of \(4, 24, 16\)"),
        ("ball", {"video": np.stack([CLIP] * 3)}, "video is 3 clips .* give one, or as many"),
    ],
)
def test_impossible_wishes_are_one_sentence(
    pipe: TextToVideo, prompt: str | list[str], options: dict[str, object], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        pipe(prompt, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


# ---- building


def test_the_seed_alone_decides_the_first_weights() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one = build_components(tiny())
    assert torch.equal(torch.get_rng_state(), before), "the global generator is left alone"
    torch.manual_seed(99)
    same, other = build_components(tiny()), build_components(tiny("seed=1"))
    for part, module in one.modules().items():
        assert_same_weights(module, same.modules()[part])
        changed = zip(module.parameters(), other.modules()[part].parameters(), strict=True)
        assert any(not torch.equal(ours, theirs) for ours, theirs in changed), part


def test_vae_weights_are_taken_over(tmp_path: Path) -> None:
    donor = make("seed=7")
    donor.save_pretrained(tmp_path / "donor")
    parts = build_components(tiny(f"vae.vae_weights={tmp_path / 'donor'}"))
    assert_same_weights(parts.vae, donor.vae)
    assert_same_weights(parts.unet, build_components(tiny()).unet)  # only the VAE is taken over


def test_the_latents_of_a_vae_may_be_scaled_anew(tmp_path: Path) -> None:
    donor = make()
    donor.save_pretrained(tmp_path / "donor")
    vae = build_vae(tiny(f"vae.vae_weights={tmp_path / 'donor'}", "vae.scaling_factor=0.5"))
    video = torch.rand(1, 3, 2, 16, 16, generator=seeds(0)[0]) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(vae.encode(video).mode(), 0.5 * donor.vae.encode(video).mode())
        torch.testing.assert_close(
            vae.decode(vae.encode(video).mode()), donor.vae.decode(donor.vae.encode(video).mode())
        )


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("vae.vae_channels=[8, 8, 16]", r"vae.vae_channels is \(8, 8, 16\), but .* \(8, 8, 8\)"),
        ("vae.image_channels=1", "vae.image_channels is 1, but .* 3"),
    ],
)
def test_vae_weights_of_another_shape_are_refused(tmp_path: Path, override: str, sentence: str) -> None:
    make().save_pretrained(tmp_path / "donor")
    with pytest.raises(UserError, match=sentence):
        build_components(tiny(f"vae.vae_weights={tmp_path / 'donor'}", override))
    with pytest.raises(UserError, match="does not exist"):
        build_vae(tiny(f"vae.vae_weights={tmp_path / 'nowhere'}"))


def test_an_image_vae_may_get_temporal_layers_but_not_lose_them(tmp_path: Path) -> None:
    """They start at zero, so the autoencoder is at first what it was."""
    donor = make()
    donor.save_pretrained(tmp_path / "donor")
    video_vae = build_vae(tiny(f"vae.vae_weights={tmp_path / 'donor'}", "vae.temporal_decoder=true"))
    z = torch.randn(1, donor.vae.config.latent_channels, 3, 2, 2, generator=seeds(0)[0])
    with torch.no_grad():
        torch.testing.assert_close(video_vae.decode(z), donor.vae.decode(z))
    make("vae.temporal_decoder=true").save_pretrained(tmp_path / "video")
    with pytest.raises(UserError, match="this config has no decoder.time"):
        build_vae(tiny(f"vae.vae_weights={tmp_path / 'video'}"))


def test_weights_that_do_not_fit_are_named(tmp_path: Path) -> None:
    make().save_pretrained(tmp_path / "donor")
    wider = build_components(tiny("model.channel_mult=[1, 3]"))
    with pytest.raises(UserError, match="the unet weights in .*: .* in this config; use the config") as caught:
        load_part(wider.unet, tmp_path / "donor", "unet")
    assert "\n" not in str(caught.value)
