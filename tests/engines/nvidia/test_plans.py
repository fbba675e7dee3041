"""Plans on disk: found again by their key, and refused when anything is another's."""

from __future__ import annotations

import dataclasses
import json
import stat
from pathlib import Path

import pytest

from qdeploy.base.errors import EngineError
from qdeploy.base.files import hash_file
from qdeploy.engines.nvidia.caches import make_cache_folder
from qdeploy.engines.nvidia.plans import (
    PlanKey,
    build_key,
    cache_plan,
    read_bundled_plan,
    read_cached_plan,
    record_built,
    write_plan,
)
from qdeploy.engines.nvidia.profiles import Shapes

KEY = PlanKey("a" * 64, "10.9.0", "9.0", '{"x":[[1],[1],[1]]}')
OTHERS = {"onnx_sha256": "b" * 64, "tensorrt": "11.1.0", "sm": "8.9", "profile": "{}", "strongly_typed": False}


def test_a_plan_is_found_again(tmp_path: Path) -> None:
    assert read_cached_plan(tmp_path, KEY) is None
    plan = cache_plan(tmp_path, KEY, b"machine code")
    assert read_cached_plan(tmp_path, KEY) == b"machine code"
    assert {path.name for path in tmp_path.iterdir()} == {plan.name, f"{KEY.digest}.key.json"}


@pytest.mark.parametrize("part", OTHERS)
def test_every_part_of_the_key_makes_another_plan(tmp_path: Path, part: str) -> None:
    other = dataclasses.replace(KEY, **{part: OTHERS[part]})
    cache_plan(tmp_path, other, b"other code")
    assert other.digest != KEY.digest
    assert read_cached_plan(tmp_path, KEY) is None
    (tmp_path / f"{other.digest}.plan").rename(tmp_path / f"{KEY.digest}.plan")
    (tmp_path / f"{other.digest}.key.json").rename(tmp_path / f"{KEY.digest}.key.json")
    with pytest.raises(EngineError, match="was built for"):
        read_cached_plan(tmp_path, KEY)


def test_the_error_names_what_differs(tmp_path: Path) -> None:
    with pytest.raises(EngineError) as raised:
        KEY.check(dataclasses.replace(KEY, sm="8.9", tensorrt="11.1.0"), tmp_path / "p.plan")
    words = str(raised.value)
    assert "p.plan was built for TensorRT 11.1.0 and a GPU of SM 8.9, but here is TensorRT 10.9.0, SM 9.0" in words
    assert "another graph" not in words


def test_a_changed_plan_is_refused(tmp_path: Path) -> None:
    cache_plan(tmp_path, KEY, b"machine code").write_bytes(b"wicked code!")
    with pytest.raises(EngineError, match="was changed"):
        read_cached_plan(tmp_path, KEY)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"plan_sha256": "x", "sm": "9.0"}', '{"plan_sha256": 1, "more": 2}']
)
def test_a_plan_without_a_readable_key_is_refused(tmp_path: Path, content: str) -> None:
    cache_plan(tmp_path, KEY, b"machine code")
    (tmp_path / f"{KEY.digest}.key.json").write_text(content)
    with pytest.raises(EngineError, match=r"\.key\.json.*it will be built again"):
        read_cached_plan(tmp_path, KEY)


@pytest.fixture
def unet(tmp_path: Path) -> Path:
    graph = tmp_path / "bundle" / "unet" / "model.onnx"
    graph.parent.mkdir(parents=True)
    graph.write_bytes(b"graph")
    return graph


def list_in_manifest(plan: Path) -> None:
    bundle = plan.parent.parent
    entry = {"path": plan.relative_to(bundle).as_posix(), "sha256": hash_file(plan), "bytes": plan.stat().st_size}
    (bundle / "manifest.json").write_text(json.dumps({"files": [entry]}))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This user's, in which a plan of ours is written down."""
    monkeypatch.delenv("QDEPLOY_TRUST_PLANS", raising=False)
    folder = tmp_path / "cache"
    folder.mkdir()
    record_built(folder, b"machine code")
    return folder


def test_a_bundles_plan_needs_the_manifest(unet: Path, cache: Path) -> None:
    assert read_bundled_plan(unet, KEY, cache) is None
    plan = write_plan(unet.with_suffix(".plan"), KEY, b"machine code")
    with pytest.raises(EngineError, match="listed in no bundle's manifest"):
        read_bundled_plan(unet, KEY, cache)
    list_in_manifest(plan)
    assert read_bundled_plan(unet, KEY, cache) == b"machine code"
    with pytest.raises(EngineError, match="export the bundle again, with --build on this machine or without it"):
        read_bundled_plan(unet, dataclasses.replace(KEY, sm="8.9"), cache)


def test_a_plan_built_elsewhere_runs_only_when_trusted(
    unet: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    list_in_manifest(write_plan(unet.with_suffix(".plan"), KEY, b"their code"))
    with pytest.raises(EngineError, match=r"not built by this user on this machine.* set QDEPLOY_TRUST_PLANS=1"):
        read_bundled_plan(unet, KEY, cache)
    monkeypatch.setenv("QDEPLOY_TRUST_PLANS", "1")
    assert read_bundled_plan(unet, KEY, cache) == b"their code"
    monkeypatch.setenv("QDEPLOY_TRUST_PLANS", "0")
    assert read_bundled_plan(unet, KEY, cache) is None


def test_a_plan_swapped_together_with_its_key_is_refused(unet: Path, cache: Path) -> None:
    list_in_manifest(write_plan(unet.with_suffix(".plan"), KEY, b"machine code"))
    write_plan(unet.with_suffix(".plan"), KEY, b"wicked code!")
    with pytest.raises(EngineError, match="was changed"):
        read_bundled_plan(unet, KEY, cache)


def test_the_key_covers_graph_and_weights(unet: Path) -> None:
    profile = {"x": Shapes((1, 2), (1, 2), (1, 2))}
    keys = [build_key(unet, profile, "10.9.0", (9, 0))]
    unet.with_name("model.onnx.data").write_bytes(b"weights")
    keys.append(build_key(unet, profile, "10.9.0", (9, 0)))
    unet.with_name("model.onnx.data").write_bytes(b"others!")
    keys.append(build_key(unet, profile, "10.9.0", (9, 0)))
    keys.append(build_key(unet, {"x": Shapes((1, 2), (2, 2), (4, 2))}, "10.9.0", (9, 0)))
    assert len({key.digest for key in keys}) == 4
    assert keys[-1] == build_key(unet, {"x": Shapes((1, 2), (2, 2), (4, 2))}, "10.9.0", (9, 0))


def test_only_this_user_can_write_to_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = make_cache_folder("tensorrt")
    assert folder == tmp_path / "qdeploy" / "tensorrt"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.chmod(0o777)
    with pytest.raises(EngineError, match="belongs to another user or can be written by one"):
        make_cache_folder("tensorrt")
