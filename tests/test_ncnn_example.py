"""examples/ncnn: what it reads, and the C++ program compiled and run, where ncnn is installed for C++."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from qdeploy.artifacts.bundle import open_bundle
from qdeploy.base.numerics import sqnr_db
from qdeploy.engines.base import EngineOptions, load_engine
from tests.installed import load_or_skip
from tests.test_examples import EXAMPLES, run

FOLDER = EXAMPLES / "ncnn"
NEAR_DB = 20.0  # another build of ncnn adds in another order, which moves codes at the edges: 27 dB were measured

pytestmark = pytest.mark.exports


@pytest.fixture(autouse=True)
def installed() -> None:
    load_or_skip("ncnn")


@pytest.fixture
def request_file(int8_ncnn: Path, tmp_path: Path) -> Path:
    run("ncnn/write_request.py", int8_ncnn, "a red dot", tmp_path / "request.txt", 12, folder=tmp_path)
    return tmp_path / "request.txt"


def compute_step(bundle: Path, request_file: Path) -> NDArray[np.float32]:
    """The program's arithmetic, on the Python engine: the picture ``float32[H, W, 3]``, 0 to 255."""
    tokens, shape, numbers, noise = (line.split() for line in request_file.read_text().splitlines())
    count = int(tokens[0])
    texts = np.array(tokens[1:], np.int64).reshape(2, 1, count)
    x = np.array(noise, np.float32).reshape(1, *map(int, shape))
    t, alpha, sigma, guidance, scaling = map(float, numbers)
    engine, options, opened = load_engine("ncnn"), EngineOptions(threads=1), open_bundle(bundle)
    text_encoder, unet, decoder = (
        engine.open_session(opened.path(opened.manifest.components[name].file), options)
        for name in ("text_encoder", "unet", "vae_decoder")
    )
    hidden = np.concatenate([text_encoder.run({"input_ids": text})["hidden"] for text in texts])
    feeds = {"sample": np.repeat(x, 2, 0), "timestep": np.array(int(t), np.int64), "encoder_hidden_states": hidden}
    negative, positive = unet.run(feeds)["noise_pred"]
    clean = (x - sigma * (negative + guidance * (positive - negative))) / alpha / scaling
    image = decoder.run({"latents": clean.astype(np.float32)})["image"][0]
    return ((image.transpose(1, 2, 0) + 1) * 127.5).clip(0, 255)


def test_the_request_is_the_runtimes(int8_ncnn: Path, request_file: Path) -> None:
    latents = open_bundle(int8_ncnn).manifest.latents
    tokens, shape, numbers, noise = (line.split() for line in request_file.read_text().splitlines())
    assert len(tokens) == 1 + 2 * latents.tokens
    assert tuple(map(int, shape)) == latents.shape
    assert len(noise) == np.prod(latents.shape)
    alpha, sigma = map(float, numbers[1:3])
    assert alpha**2 + sigma**2 == pytest.approx(1)
    assert compute_step(int8_ncnn, request_file).std() > 0


def test_the_program_is_about_a_hundred_lines() -> None:
    assert len((FOLDER / "one_step.cpp").read_text().splitlines()) <= 125


@pytest.mark.slow
def test_the_program_makes_the_engines_picture(int8_ncnn: Path, request_file: Path, tmp_path: Path) -> None:
    """Against ncnn's C++ library, as `CMAKE_PREFIX_PATH` or the system has it."""
    if shutil.which("cmake") is None or shutil.which("c++") is None:
        pytest.skip("needs cmake and a C++ compiler")
    build = tmp_path / "build"
    made = subprocess.run(["cmake", "-S", FOLDER, "-B", build], capture_output=True, text=True, check=False)
    if made.returncode != 0 and "ncnn" in made.stderr:
        pytest.skip("ncnn is not installed for C++ (Debian's libncnn-dev, or CMAKE_PREFIX_PATH)")
    assert made.returncode == 0, made.stderr
    made = subprocess.run(["cmake", "--build", build], capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stdout + made.stderr
    out = tmp_path / "picture.ppm"
    done = subprocess.run(
        [build / "one_step", int8_ncnn, request_file, out], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    actual = np.asarray(Image.open(out), np.float32)
    assert sqnr_db(compute_step(int8_ncnn, request_file), actual) > NEAR_DB
    refused = subprocess.run([build / "one_step", tmp_path, request_file, out], capture_output=True, check=False)
    assert refused.returncode == 1
