"""Q-Diffusion's .pt layout, both ways; and files that are cut, hostile or something else."""

from __future__ import annotations

import dataclasses
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from qdeploy.base.errors import CalibrationError, UsageError
from qdeploy.calibrate.dataset import CalibrationSet, check_shapes
from qdeploy.calibrate.record.qdiffusion import calibration_from_qdiffusion, save_qdiffusion

S, N, LATENT, TEXT = 10, 4, (4, 8, 8), (16, 32)


def parts(text: bool = True) -> dict[str, Any]:
    """A set whose x at step s, sample n is filled with s + n / 10."""
    generator = torch.Generator().manual_seed(0)
    value = torch.arange(S)[:, None] + torch.arange(N) / 10
    made = {"xs": value[..., None, None, None].expand(S, N, *LATENT).clone()}
    made["ts"] = torch.arange(S).flip(0)[:, None].expand(S, N) * 100 + 1
    if text:
        made["cs"] = torch.randn(1, N, *TEXT, generator=generator).expand(S, N, *TEXT)
        made["ucs"] = torch.randn(1, 1, *TEXT, generator=generator).expand(S, N, *TEXT)
    return made


def write(folder: Path, content: Any) -> Path:
    torch.save(content, folder / "set.pt")
    return folder / "set.pt"


@pytest.mark.parametrize("lists", [False, True])
@pytest.mark.parametrize("text", [False, True])
def test_every_pair_is_read(tmp_path: Path, lists: bool, text: bool) -> None:
    content = parts(text)
    converted = calibration_from_qdiffusion(
        write(tmp_path, {name: list(part) if lists else part for name, part in content.items()})
    )
    assert torch.equal(converted.sample.float(), content["xs"].flatten(0, 1).half().float())
    assert torch.equal(converted.timestep, content["ts"].flatten())
    assert converted.count("text_encoder") == converted.count("vae_decoder") == 0
    assert list(converted.batches("text_encoder", 2)) == list(converted.batches("vae_decoder", 2)) == []
    assert converted.count("unet") == S * N * (2 if text else 1)
    check_shapes(converted, LATENT, TEXT if text else None)
    if text:
        assert len(converted.contexts) == 1 + N  # equal embeddings are kept once
        assert torch.equal(converted.contexts[0], content["ucs"][0, 0].half())
        assert torch.equal(converted.contexts[converted.prompt], content["cs"].flatten(0, 1).half())


@pytest.mark.parametrize(("cali_st", "steps"), [(1, [0]), (2, [0, 5]), (5, [0, 2, 4, 6, 8]), (4, [0, 2, 4, 6, 8])])
def test_cali_st_and_cali_n_choose_as_q_diffusion_does(tmp_path: Path, cali_st: int, steps: list[int]) -> None:
    """``range(0, nsteps, nsteps // cali_st)`` and ``[:cali_n]`` of its get_train_samples."""
    content = parts()
    converted = calibration_from_qdiffusion(write(tmp_path, content), cali_st, 3)
    assert torch.equal(converted.timestep, content["ts"][steps, :3].flatten())
    assert torch.equal(converted.sample, content["xs"][steps, :3].flatten(0, 1).half())
    assert torch.equal(converted.contexts[converted.prompt], content["cs"][steps, :3].flatten(0, 1).half())


@pytest.mark.parametrize(("steps", "per_step", "words"), [(11, None, "1 to 10"), (0, 1, "--cali-st"), (1, 5, "1 to 4")])
def test_more_than_the_file_holds(tmp_path: Path, steps: int, per_step: int | None, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        calibration_from_qdiffusion(write(tmp_path, parts()), steps, per_step)


def test_there_and_back(tmp_path: Path, calibration: CalibrationSet) -> None:
    """PNDM's repeated second timestep stays two steps of the layout."""
    save_qdiffusion(calibration, tmp_path / "c.pt")
    written = torch.load(tmp_path / "c.pt", weights_only=True)
    assert written["xs"].shape == (6, 3, 4, 8, 8)
    assert written["ts"].shape == (6, 3)
    assert written["cs"].shape == written["ucs"].shape == (6, 3, 16, 32)
    assert written.pop("made_by").startswith("qdeploy ")  # by which a later run knows it for its own
    assert {part.dtype for name, part in written.items() if name != "ts"} == {torch.float32}
    converted = calibration_from_qdiffusion(tmp_path / "c.pt")
    for mine, theirs in zip(converted.batches("unet", 4), calibration.batches("unet", 4), strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_a_set_that_is_no_run_cannot_be_written(tmp_path: Path, calibration: CalibrationSet) -> None:
    shuffled = dataclasses.replace(calibration, timestep=calibration.timestep.flip(0))
    with pytest.raises(CalibrationError, match=r"write it to a \.safetensors file"):
        save_qdiffusion(shuffled, tmp_path / "c.pt")
    assert list(tmp_path.iterdir()) == []


def test_float_timesteps(tmp_path: Path) -> None:
    content = parts(text=False)
    content["ts"] = content["ts"].float()
    assert calibration_from_qdiffusion(write(tmp_path, content)).timestep.dtype == torch.int64
    content["ts"] = content["ts"] + 0.5
    with pytest.raises(CalibrationError, match="whole timesteps"):
        calibration_from_qdiffusion(write(tmp_path, content))


class Hostile:
    """Would touch a file when unpickled the ordinary way."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return Path.touch, (self.marker,)


def test_a_pickle_is_never_executed(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    hostile = {**parts(), "xs": Hostile(marker)}
    torch.save(hostile, tmp_path / "new.pt")
    torch.save(hostile, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Hostile(marker)))
    for name in ("new.pt", "old.pt", "bare.pt"):
        with pytest.raises(CalibrationError, match="qdeploy calibrate"):
            calibration_from_qdiffusion(tmp_path / name)
    assert not marker.exists()


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.999])
def test_a_cut_file(tmp_path: Path, share: float) -> None:
    path = write(tmp_path, parts())
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CalibrationError, match="qdeploy calibrate"):
        calibration_from_qdiffusion(path)


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, parts())
    with zipfile.ZipFile(path) as stored, zipfile.ZipFile(tmp_path / "z.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        for name in stored.namelist():
            packed.writestr(name, stored.read(name))
    with pytest.raises(CalibrationError, match="compressed"):
        calibration_from_qdiffusion(tmp_path / "z.pt")


def change_parts(**changes: Any) -> dict[str, Any]:
    return {name: part for name, part in {**parts(), **changes}.items() if part is not None}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (torch.zeros(5, 3, 32, 32), "finished pictures"),
        (change_parts(ts=None), "`xs` and `ts`"),
        (change_parts(ucs=None), "one of `cs` and `ucs`"),
        (change_parts(xs=torch.zeros(S + 1, N, *LATENT)), "must agree"),
        (change_parts(cs=torch.zeros(S, N + 1, *TEXT)), "must agree"),
        (change_parts(ucs=torch.zeros(S, N, 3, 32)), "different shapes"),
        (change_parts(xs=torch.zeros(S, N, 8, 8)), "4 equal dimensions"),
        (change_parts(xs=[torch.zeros(N, 4, 8, 8 + i) for i in range(S)]), "4 equal dimensions"),
        (change_parts(ts=torch.zeros(S)), "1 equal dimensions"),
        (change_parts(ts=torch.zeros(S, 0)), "not be empty"),
        (change_parts(xs=[1, 2]), "nor a list"),
        (change_parts(xs=torch.zeros((S, N, *LATENT), device="meta")), "nor a list"),
        (change_parts(xs=torch.zeros(1).expand(S, N, 4, 2**14, 2**14)), "save fewer samples"),
        (change_parts(xs=torch.full((S, N, *LATENT), float("nan"))), "`xs` holds NaN"),
        (change_parts(xs=torch.full((S, N, *LATENT), 1e6)), "float16"),
        (change_parts(cs=torch.full((S, N, *TEXT), float("inf"))), "`cs` holds NaN"),
        (change_parts(ts=torch.full((S, N), -1)), "whole timesteps"),
        (change_parts(ucs=torch.randn(S, N, *TEXT)), "several unconditional"),
        (change_parts(xs=torch.zeros(1).expand(S, N, 4, 2**10, 2**10)), "`xs` describes"),
        (change_parts(ts=torch.zeros(1).expand(S, N), xs=torch.zeros(1).expand(S, N, 4, 512, 512)), "`xs` describes"),
        (
            change_parts(cs=torch.zeros(1).expand(S, N, 2**10, 2**10), ucs=torch.zeros(1).expand(S, N, 2**10, 2**10)),
            "`cs` describes",
        ),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, content: Any, words: str) -> None:
    with pytest.raises(CalibrationError, match=words):
        calibration_from_qdiffusion(write(tmp_path, content))
