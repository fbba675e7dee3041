"""Pictures from folder and lmdb, bounded and never through links; their x_t has the noise its label says."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import lmdb
import numpy as np
import pytest
import torch
from PIL import Image

from qdeploy.base.errors import PictureError, UsageError
from qdeploy.base.pictures import find_picture_files, open_picture_set
from qdeploy.calibrate.record.pictures import read_pictures
from qdeploy.calibrate.record.raw_data import RawDataSettings, calibration_from_pictures
from qdeploy.models.source import LatentDiffusion
from qdeploy.sampling import NoiseSchedule, make_scheduler

SIDE = 16


def picture(seed: int, size: tuple[int, int] = (24, 20)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    data = tmp_path / "data"
    (data / "below").mkdir(parents=True)
    for number, name in enumerate(("a.png", "b.jpg", "below/c.webp")):
        picture(number).save(data / name)
    (data / "readme.txt").write_text("not a picture")
    return data


def write_lmdb(path: Path, values: dict[bytes, bytes]) -> Path:
    with lmdb.open(str(path), map_size=2**24) as environment, environment.begin(write=True) as transaction:
        for key, value in values.items():
            transaction.put(key, value)
    (path / "lock.mdb").unlink()
    return path


def encode_picture(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind)
    return buffer.getvalue()


def test_the_noise_is_that_of_the_label(tiny_model: LatentDiffusion, folder: Path) -> None:
    """(x_t - sqrt(alpha_bar) x_0) / sqrt(1 - alpha_bar) is standard normal, for low and high t apart."""
    settings = RawDataSettings(folder, samples=200, steps=10, batch=64)
    recording = calibration_from_pictures(tiny_model, ["a cat"], settings)
    alpha_bar = torch.from_numpy(NoiseSchedule.from_config(tiny_model.scheduler_config).alphas_cumprod)
    a_t = alpha_bar[recording.timestep][:, None, None, None]
    x0 = recording.latents.float() * tiny_model.latents.scaling_factor
    epsilon = (recording.sample.float() - a_t.sqrt() * x0) / (1 - a_t).sqrt()
    low = recording.timestep < 500
    for part in (epsilon[low], epsilon[~low]):
        assert part.std() == pytest.approx(1.0, abs=0.02)
        assert part.mean() == pytest.approx(0.0, abs=0.02)


def test_labels_are_the_schedulers_own_steps_evenly(tiny_model: LatentDiffusion, folder: Path) -> None:
    settings = RawDataSettings(folder, samples=200, steps=10, scheduler="dpm++")
    recording = calibration_from_pictures(tiny_model, ["a cat"], settings)
    config = {**tiny_model.scheduler_config, "_class_name": "DPMSolverMultistepScheduler"}
    steps = make_scheduler(config, 10).timesteps
    assert set(recording.timestep.tolist()) == set(steps.tolist())
    counts = recording.timestep.unique(return_counts=True)[1]
    assert counts.min() > 5  # 20 expected, standard deviation 4.2
    assert counts.max() < 40


def test_decoder_latents_are_the_posterior_mean(tiny_model: LatentDiffusion, folder: Path) -> None:
    recording = calibration_from_pictures(tiny_model, ["a"], RawDataSettings(folder, samples=3, seed=1))
    images = torch.from_numpy(np.stack(list(read_pictures(folder, 3, 1, SIDE, SIDE))))
    with torch.no_grad():
        expected = tiny_model.vae_decoder.inner.encode(images).latent_dist.mean
    assert torch.allclose(recording.latents.float(), expected, atol=5e-3, rtol=5e-3)
    assert recording.provenance["data"] == "data"


def test_an_unconditional_model_takes_no_text(unconditional_model: LatentDiffusion, folder: Path) -> None:
    recording = calibration_from_pictures(unconditional_model, [], RawDataSettings(folder, samples=4))
    assert recording.contexts is None
    assert recording.count("unet") == 4


def test_pictures_are_cut_to_the_centre_and_scaled(tmp_path: Path) -> None:
    wide = np.zeros((SIDE, 3 * SIDE, 3), np.uint8)
    wide[:, SIDE : 2 * SIDE] = 255
    Image.fromarray(wide).save(tmp_path / "wide.png")
    (recording,) = read_pictures(tmp_path, 1, 0, SIDE, SIDE)
    assert recording.shape == (3, SIDE, SIDE)
    assert recording.dtype == np.float32
    assert (recording == 1).all()


def test_each_picture_once_before_any_repeats(folder: Path) -> None:
    shown = [picture.tobytes() for picture in read_pictures(folder, 6, 0, SIDE, SIDE)]
    assert len(set(shown[:3])) == len(set(shown)) == 3


def test_an_lmdb_gives_the_pictures_of_its_values(tmp_path: Path) -> None:
    pictures = {
        f"{i:040x}".encode(): encode_picture(picture(i), kind) for i, kind in enumerate(("WEBP", "JPEG", "PNG"))
    }
    data = write_lmdb(tmp_path / "lsun", pictures)
    decoded = list(read_pictures(data, 4, 0, SIDE, SIDE))
    files = tmp_path / "files"
    files.mkdir()
    for key, value in pictures.items():
        (files / f"{key.decode()}.png").write_bytes(value)
    expected = list(read_pictures(files, 4, 0, SIDE, SIDE))
    assert all(np.array_equal(a, b) for a, b in zip(decoded, expected, strict=True))
    assert sorted(path.name for path in data.iterdir()) == ["data.mdb"]  # reading creates no files


@pytest.mark.parametrize(
    ("content", "words"), [(None, "not a readable lmdb"), ({}, "empty lmdb"), ({b"k": b"no picture"}, "entry b'k'")]
)
def test_a_bad_lmdb(tmp_path: Path, content: dict[bytes, bytes] | None, words: str) -> None:
    data = tmp_path / "lsun"
    data.mkdir()
    if content is None:
        (data / "data.mdb").write_bytes(b"nothing of the kind" * 1000)
    else:
        write_lmdb(data, content)
    with pytest.raises(PictureError, match=words):
        list(read_pictures(data, 1, 0, SIDE, SIDE))


def test_links_out_of_the_folder_are_not_followed(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    picture(9).save(outside / "secret.png")
    os.symlink(outside / "secret.png", folder / "z.png")
    os.symlink(outside, folder / "y")
    os.symlink(folder / "a.png", folder / "inside.png")
    os.symlink("nowhere.png", folder / "x.png")
    os.symlink("loop.png", folder / "loop.png")
    files, left_out = find_picture_files(folder)
    assert [path.name for path in files] == ["a.png", "b.jpg", "c.webp", "inside.png"]
    assert [path.name for path in left_out] == ["loop.png", "x.png", "y", "z.png"]
    assert len(open_picture_set(folder)) == 4
    assert "4 links" in caplog.text
    assert f"z.png -> {outside / 'secret.png'}" in caplog.text
    (tmp_path / "lsun").mkdir()
    os.symlink(write_lmdb(tmp_path / "real", {b"k": b"v"}) / "data.mdb", tmp_path / "lsun" / "data.mdb")
    with pytest.raises(PictureError, match="link out of its folder"):
        list(read_pictures(tmp_path / "lsun", 1, 0, SIDE, SIDE))


def test_a_folder_of_links_out_of_it_says_so(tmp_path: Path) -> None:
    picture(9).save(tmp_path / "secret.png")
    (tmp_path / "data").mkdir()
    os.symlink(tmp_path / "secret.png", tmp_path / "data" / "z.png")
    with pytest.raises(UsageError, match=r"no \.png.*1 links in .* were left out .*z\.png -> .*copy the files"):
        open_picture_set(tmp_path / "data")


def test_a_hub_caches_snapshot_links_to_its_blobs(tmp_path: Path) -> None:
    """Everything there is a link, by its relative path, to a file that is named by its hash."""
    cache = tmp_path / "datasets--a--b"
    snapshot = cache / "snapshots" / "0123abc"
    (snapshot / "train").mkdir(parents=True)
    (cache / "blobs").mkdir()
    for number in range(3):
        picture(number).save(cache / "blobs" / f"hash{number}", format="PNG")
        os.symlink(f"../../../blobs/hash{number}", snapshot / "train" / f"{number}.png")
    picture(9).save(tmp_path / "secret.png")
    os.symlink(tmp_path / "secret.png", snapshot / "train" / "9.png")
    for data in (snapshot, snapshot / "train"):
        files, left_out = find_picture_files(data)
        assert [path.name for path in files] == ["0.png", "1.png", "2.png"]
        assert [path.name for path in left_out] == ["9.png"]
        assert len(list(read_pictures(data, 3, 0, SIDE, SIDE))) == 3


@pytest.mark.parametrize("content", [b"", b"text", "cut", "gif"])
def test_an_unreadable_picture_is_named(tmp_path: Path, content: bytes | str) -> None:
    if content == "cut":
        content = encode_picture(picture(0), "PNG")[:60]
    elif content == "gif":
        content = encode_picture(picture(0), "GIF")  # renamed: only the three formats are decoded
    (tmp_path / "broken.png").write_bytes(content)
    with pytest.raises(PictureError, match=r"broken\.png (cannot be read|is GIF by its content)"):
        list(read_pictures(tmp_path, 1, 0, SIDE, SIDE))


@pytest.mark.parametrize("size", [(9000, 9000), (13000, 13000), (20000, 20000)])
def test_a_picture_bomb_is_refused(tmp_path: Path, size: tuple[int, int]) -> None:
    header = b"IHDR" + struct.pack(">II", *size) + b"\x08\x02\0\0\0"  # says so, and holds nothing
    content = encode_picture(picture(0), "PNG")
    (tmp_path / "bomb.png").write_bytes(content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:])
    with pytest.raises(PictureError, match=r"bomb\.png.*pixels"):
        list(read_pictures(tmp_path, 1, 0, SIDE, SIDE))


def test_a_folder_without_pictures(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no \.png"):
        list(read_pictures(tmp_path, 1, 0, SIDE, SIDE))
    with pytest.raises(UsageError, match="not a folder"):
        list(read_pictures(tmp_path / "none", 1, 0, SIDE, SIDE))


def read_all(data: Path) -> int:
    pictures = open_picture_set(data)
    return sum(len(encoded) for _, encoded in pictures.read_encoded(range(len(pictures))))


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.5, 0.99])
def test_a_cut_lmdb_is_refused_before_it_is_mapped(tmp_path: Path, share: float) -> None:
    """Its C library would read pages beyond the file, which ends the process (SIGBUS)."""
    data = write_lmdb(tmp_path / "lsun", {str(n).encode(): bytes(3000) for n in range(200)})
    assert read_all(data) == 600_000
    os.truncate(data / "data.mdb", int((data / "data.mdb").stat().st_size * share))
    with pytest.raises(PictureError, match=r"is cut; copy it again|no header of one"):
        open_picture_set(data)
