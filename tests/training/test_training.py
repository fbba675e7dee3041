"""What the training scripts do exactly: folded normalisation, clustering, going on, and the cards' figures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import VQModel

from qdeploy.models.components import find_nearest_codes
from training.denoising import draw_timesteps, velocity_loss
from training.figures import frechet, nearest, ranks, spread, white_corners
from training.loop import Training, make_parser
from training.vq import VQ, decode_latents, encode_codes, encode_latents, k_means, nearest_indices, normalize_latents

RNG = np.random.default_rng(0)
PICTURES = RNG.integers(0, 256, (40, 64, 64, 3), dtype=np.uint8)


def test_normalised_latents_decode_to_the_same_pictures() -> None:
    torch.manual_seed(0)
    vq = VQModel(**VQ | {"num_vq_embeddings": 16}).requires_grad_(False)
    x = torch.rand(2, 3, 64, 64)
    before = encode_latents(vq, x)
    pictures = decode_latents(vq, before)
    returned = normalize_latents(vq, before)
    after = encode_latents(vq, x)
    torch.testing.assert_close(after, returned, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(after.mean(dim=(0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-4)
    assert after.std().item() == pytest.approx(1, abs=1e-3)
    torch.testing.assert_close(decode_latents(vq, after), pictures, rtol=1e-3, atol=1e-4)


def test_k_means_leaves_no_code_without_members() -> None:
    torch.manual_seed(0)
    centres = 10 * torch.randn(8, 4)
    latents = torch.cat([centres[:1].expand(3000, 4), (centres[:, None] + 0.01 * torch.randn(8, 50, 4)).flatten(0, 1)])
    codes = k_means(latents, 40)
    assert len(nearest_indices(latents, codes).unique()) == 40
    assert (latents - codes[nearest_indices(latents, codes)]).abs().max() < 0.1


def test_codes_are_those_that_the_decoder_looks_up() -> None:
    z, codes = torch.randn(2, 4, 3, 3), torch.randn(10, 4)
    assert torch.equal(encode_codes(z, codes), find_nearest_codes(z, codes))


def test_velocity_of_a_perfect_predictor() -> None:
    alphas_cumprod, latents = torch.linspace(0.99, 0.01, 1000), torch.randn(8, 4, 2, 2)

    def predict(noisy: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        alpha, sigma = (share[t].sqrt()[:, None, None, None] for share in (alphas_cumprod, 1 - alphas_cumprod))
        return (alpha * noisy - latents) / sigma  # v = (alpha x_t - x0) / sigma

    assert velocity_loss(predict, alphas_cumprod, latents, draw_timesteps(8, rising=False)).item() < 1e-6


@pytest.mark.parametrize(("rising", "mean"), [(False, 500), (True, 625)])
def test_timesteps(rising: bool, mean: int) -> None:
    t = draw_timesteps(2000, rising)
    assert 0 <= t.min() < 10 < 990 < t.max() <= 999
    assert t.float().mean().item() == pytest.approx(mean, abs=5)


def test_a_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    def training(samples: int) -> Training:
        torch.manual_seed(0)
        module = torch.nn.Linear(2, 1)
        settings = make_parser("", samples=samples, batch=4, lr=0.1).parse_args(["--work", str(tmp_path)])
        optimizer = torch.optim.Adam(module.parameters(), lr=settings.lr)
        return Training(tmp_path / "x.ckpt", {"module": module}, optimizer, settings)

    def run(training: Training) -> torch.Tensor:
        training.run(10, lambda chosen: training.modules["module"](torch.ones(len(chosen), 2)).square().mean())
        return training.modules["module"].weight.detach().clone()

    first = run(training(20))
    again = training(40)
    assert again.state.step == 5
    assert torch.equal(again.modules["module"].weight, first)
    assert not torch.equal(run(again), first)
    assert again.state.seen == 40


def test_figures() -> None:
    white = np.full_like(PICTURES, 255)
    assert frechet(PICTURES, PICTURES) == pytest.approx(0, abs=1e-6)
    darker = (PICTURES // 2).astype(np.uint8)
    assert frechet(darker, PICTURES) > frechet(PICTURES[:20], PICTURES[20:])
    assert frechet(white, white - 51) == pytest.approx(192 * 0.2**2)  # no covariance: only squared means
    assert nearest(PICTURES, PICTURES) == pytest.approx(0, abs=1e-3)
    assert nearest(white, white - 51) == pytest.approx(51)
    assert spread(white) == pytest.approx(0, abs=1e-3)
    assert spread(np.stack([white[0], white[0] - 51])) == pytest.approx(51)
    assert (white_corners(white), white_corners(PICTURES)) == (1, 0)
    assert ranks(PICTURES[:2], np.array([0, 5]), PICTURES)[0] == 0
