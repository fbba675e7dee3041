"""A training folder of another layout, of other pictures, or with a broken checkpoint is refused and named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from qdeploy.base.errors import UsageError
from training.layout import LAYOUT, MARKER, check_work, claim_work, run_script
from training.loop import LoopState

PICTURES = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)


def test_a_folder_is_claimed_once_and_then_known(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()  # fetched before: of no layout
    claim_work(tmp_path, PICTURES)
    marker = (tmp_path / MARKER).read_bytes()
    (tmp_path / "diffusion.ckpt").touch()
    claim_work(tmp_path, PICTURES)
    assert (tmp_path / MARKER).read_bytes() == marker
    assert json.loads(marker)["layout"] == LAYOUT
    assert json.loads(marker)["pictures"] == 3


@pytest.mark.parametrize("name", ["vae.ckpt", "diffusion.ckpt", "training.json"])
def test_an_older_layout_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    with pytest.raises(UsageError, match=rf"{tmp_path.name} is a training folder of an older layout.*{name}.*--work"):
        claim_work(tmp_path, PICTURES)
    assert [path.name for path in tmp_path.iterdir()] == [name]  # nothing was begun in it


@pytest.mark.parametrize(
    ("text", "came"), [('{"layout": 1}', "1"), ('{"layout": 3}', "3"), ("[]", "None"), ('{"lay', "None"), ("", "None")]
)
def test_another_or_an_unreadable_marker_is_refused(text: str, came: str, tmp_path: Path) -> None:
    (tmp_path / MARKER).write_text(text)
    with pytest.raises(UsageError, match=f"{MARKER}: got layout {came}, expected {LAYOUT}; .*--work"):
        check_work(tmp_path)


def test_other_pictures_are_refused(tmp_path: Path) -> None:
    claim_work(tmp_path, PICTURES)
    for others, count in ((PICTURES[:2], 2), (PICTURES[::-1], 3)):
        with pytest.raises(UsageError, match=f"trained on 3 pictures .*choose {count} "):
            claim_work(tmp_path, others)


def written(path: Path, modules: dict[str, torch.nn.Module]) -> torch.optim.Optimizer:
    optimizer = torch.optim.Adam(next(iter(modules.values())).parameters())
    LoopState(seen=8, step=2, loss=0.5).save(path, modules, optimizer)
    return optimizer


@pytest.mark.parametrize("kept", [0, 0.3, 0.95])
def test_a_cut_checkpoint_is_named(kept: float, tmp_path: Path) -> None:
    path, modules = tmp_path / "x.ckpt", {"module": torch.nn.Linear(200, 200)}
    optimizer = written(path, modules)
    with path.open("r+b") as file:
        file.truncate(int(kept * path.stat().st_size))
    with pytest.raises(UsageError, match=r"x\.ckpt is cut or no checkpoint"):
        LoopState.resume(path, modules, optimizer)


def test_another_scripts_checkpoint_is_refused(tmp_path: Path) -> None:
    path, vae = tmp_path / "x.ckpt", torch.nn.Linear(2, 2)
    optimizer = written(path, {"vae": vae})
    with pytest.raises(UsageError, match=r"x\.ckpt holds \['vae'\], expected \['averaged', 'model'\]"):
        LoopState.resume(path, {"model": vae, "averaged": vae}, optimizer)
    torch.save([1], path)
    with pytest.raises(UsageError, match=r"x\.ckpt holds \[\]"):
        LoopState.resume(path, {"vae": vae}, optimizer)


def test_a_users_error_is_one_paragraph(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "vq.ckpt").touch()
    with pytest.raises(SystemExit) as stopped:
        run_script(lambda: check_work(tmp_path))
    said = capsys.readouterr().err
    assert stopped.value.code == UsageError.exit_code
    assert said.startswith("Error: ")
    assert said.count("\n") == 1
