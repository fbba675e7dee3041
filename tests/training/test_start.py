"""Training that begins with the weights of a built-in model: the same predictions, and a pipeline folder at the end."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from qdeploy.models.builtin import find_builtin_folder
from qdeploy.models.source import load_model
from training import diffusion, unconditional
from training.data import Emoji
from training.loop import LoopState
from training.probe import load_averaged_pipeline

TOLERANCE = 1e-4  # of fp16 weights read as float32 by two ways


def test_text_to_image_begins_where_the_model_stands(tmp_path: Path) -> None:
    vae, tokenizer, model = diffusion.start_from(find_builtin_folder("emoji"))
    source = load_model("builtin:emoji")
    noisy, t = torch.randn(1, 8, 16, 16), torch.tensor([500])
    tokens = diffusion.tokenize(tokenizer, ["a cat"])
    assert torch.equal(tokens, source.tokenize(["a cat"])["text_encoder"])
    with torch.no_grad():
        expected = source.unet(noisy, t, source.embed({"text_encoder": tokens}))
        torch.testing.assert_close(model(noisy, t, tokens), expected, rtol=0, atol=TOLERANCE)
        changed = model.unet.conv_out.bias.add_(1)
    diffusion.save_pipeline(tmp_path / "model", vae, model, tokenizer)
    again = load_model(str(tmp_path / "model"))
    assert again.latents == source.latents
    torch.testing.assert_close(again.unet.inner.conv_out.bias, changed.float(), rtol=1e-3, atol=1e-3)


def test_unconditional_begins_where_the_model_stands() -> None:
    _, unet = unconditional.begun_from(find_builtin_folder("emoji-uncond"))
    source = load_model("builtin:emoji-uncond")
    noisy, t = torch.randn(1, 4, 16, 16), torch.tensor([500])
    with torch.no_grad():
        torch.testing.assert_close(unet(noisy, t).sample, source.unet(noisy, t), rtol=0, atol=TOLERANCE)


def test_a_probe_reads_the_averaged_weights(tmp_path: Path) -> None:
    _, _, model = diffusion.start_from(find_builtin_folder("emoji"))
    averaged = diffusion.make_averaged_copy(model)
    averaged.update_parameters(model)
    with torch.no_grad():
        model.unet.conv_out.bias.add_(1)  # what the averaged weights do not follow
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    LoopState(seen=64, step=2, loss=0.25).save(tmp_path / "x.ckpt", {"model": model, "averaged": averaged}, optimizer)
    pipe, state = load_averaged_pipeline(find_builtin_folder("emoji"), tmp_path / "x.ckpt")
    assert (state.seen, state.loss) == (64, 0.25)
    assert torch.equal(pipe.unet.conv_out.bias, averaged.module.unet.conv_out.bias)


def test_captions_of_a_batch() -> None:
    pixels = np.zeros((64, 64, 3), np.uint8)
    emoji = [Emoji(name, (), name, "g", "s", pixels) for name in ("cat", "dog")]
    drawn = diffusion.draw_training_captions(emoji, np.array([0, 1] * 500), np.random.default_rng(0))
    assert set(drawn) == {"cat", "dog", ""}
    assert drawn.count("") / len(drawn) == pytest.approx(diffusion.CAPTION_DROPOUT, abs=0.03)
