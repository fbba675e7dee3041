"""What would be published: both packages build, pass twine's check, and hold what they need and nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from email import message_from_bytes
from email.message import Message
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
BASE_LIMIT_BYTES = 175 * 2**20  # of the base install without compiled Python files, as `make` and containers install it
HEAVY = {"torch", "diffusers", "transformers", "onnx", "matplotlib", "rich", "qdeploy-builtin-models"}


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of wheels and source archives, built from a copy of the sources as the tag v1.2.3 would be."""
    folder = tmp_path_factory.mktemp("dist")
    sources = folder / "sources"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
    for name in ("qdeploy", "builtin_models"):
        shutil.copytree(ROOT / name, sources / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    for project in (sources, sources / "builtin_models"):
        command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist"), str(project)]
        environment = os.environ | {"SETUPTOOLS_SCM_PRETEND_VERSION_FOR_QDEPLOY": "1.2.3", "PYTHONPATH": ""}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder / "dist"


def open_wheel(dist: Path, name: str) -> tuple[list[str], Message]:
    """Names of the files in the wheel, and its metadata."""
    (path,) = dist.glob(f"{name}-*.whl")
    with zipfile.ZipFile(path) as wheel:
        (metadata,) = (file for file in wheel.namelist() if file.endswith(".dist-info/METADATA"))
        return wheel.namelist(), message_from_bytes(wheel.read(metadata))


def test_twine_has_nothing_to_say(dist: Path) -> None:
    files = sorted(map(str, dist.iterdir()))
    assert len(files) == 4
    done = subprocess.run(
        [sys.executable, "-m", "twine", "check", "--strict", *files], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("PASSED") == 4


def test_the_wheel_has_the_tag_as_its_version_and_every_file_of_the_package(dist: Path) -> None:
    names, metadata = open_wheel(dist, "qdeploy")
    assert metadata["Version"] == "1.2.3"
    sources = {path for path in (ROOT / "qdeploy").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert {path.relative_to(ROOT).as_posix() for path in sources} <= set(names)
    assert {name.split("/")[0] for name in names} == {"qdeploy", "qdeploy-1.2.3.dist-info"}
    assert not any(name.endswith(".safetensors") for name in names)
    assert {line.split(",")[0] for line in metadata.get_all("Project-URL")} >= {"Documentation", "Source", "Issues"}


def test_the_base_asks_for_nothing_heavy(dist: Path) -> None:
    _, metadata = open_wheel(dist, "qdeploy")
    asked = [Requirement(line) for line in metadata.get_all("Requires-Dist")]
    assert not HEAVY & {requirement.name for requirement in asked if requirement.marker is None}


def test_the_models_are_whole_in_a_wheel_of_their_own(dist: Path) -> None:
    names, _ = open_wheel(dist, "qdeploy_builtin_models")
    folder = ROOT / "builtin_models"
    sources = {path for path in (folder / "qdeploy_builtin_models").rglob("*") if path.is_file()}
    expected = {path.relative_to(folder).as_posix() for path in sources if "__pycache__" not in path.parts}
    assert expected == {name for name in names if ".dist-info/" not in name}


def collect_requirements(name: str, collected: dict[str, Distribution]) -> None:
    """Add the distribution ``name`` and all that it needs without extras, as installed here."""
    if name in collected:
        return
    collected[name] = distribution(name)
    for line in collected[name].requires or []:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            collect_requirements(requirement.name, collected)


def measure_bytes(installed: Distribution) -> int:
    paths = (Path(str(file.locate())) for file in installed.files or () if file.suffix != ".pyc")
    return sum(path.stat().st_size for path in paths if path.is_file())


def test_the_base_install_stays_small() -> None:
    """Summed over what is installed here; `qdeploy` itself is an editable install, so its sources are counted."""
    collected: dict[str, Distribution] = {}
    collect_requirements("qdeploy", collected)
    sizes = {name: measure_bytes(installed) for name, installed in collected.items()}
    sizes["qdeploy"] = sum(path.stat().st_size for path in (ROOT / "qdeploy").rglob("*") if path.suffix != ".pyc")
    assert {"onnxruntime", "numpy", "tokenizers"} <= set(sizes)
    assert sum(sizes.values()) <= BASE_LIMIT_BYTES, sorted(sizes.items(), key=lambda item: -item[1])[:12]
