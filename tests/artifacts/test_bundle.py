"""A wrong, cut or hostile bundle is refused with the file's name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from qdeploy.artifacts.bundle import MANIFEST, open_bundle
from qdeploy.base.errors import BundleError, EngineError
from qdeploy.base.files import hash_file
from qdeploy.runtime.pipeline import load


@pytest.fixture
def bundle(float_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(float_bundle, tmp_path / "bundle"))


def edit(bundle: Path, change) -> None:  # noqa: ANN001
    document = json.loads((bundle / MANIFEST).read_text())
    change(document)
    (bundle / MANIFEST).write_text(json.dumps(document))


def test_a_good_bundle_opens(bundle: Path) -> None:
    opened = open_bundle(bundle)
    assert set(opened.manifest.components) == {"text_encoder", "unet", "vae_decoder"}
    assert opened.total_bytes == sum(p.stat().st_size for p in bundle.rglob("*") if p.is_file() and p.name != MANIFEST)


def test_a_changed_byte_is_found(bundle: Path) -> None:
    path = bundle / "unet" / "model.onnx.data"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match=r"model\.onnx\.data was changed"):
        open_bundle(bundle)


def test_a_missing_file_is_named(bundle: Path) -> None:
    (bundle / "vae_decoder" / "model.onnx").unlink()
    with pytest.raises(BundleError, match=r"vae_decoder/model\.onnx is missing"):
        open_bundle(bundle)


def test_a_cut_file_is_named(bundle: Path) -> None:
    path = bundle / "unet" / "model.onnx"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BundleError, match="the manifest says"):
        open_bundle(bundle, verify=False)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "unet/../../outside", "..\\outside"])
def test_a_path_outside_is_refused(bundle: Path, name: str) -> None:
    (bundle.parent / "outside").write_text("secret")
    edit(bundle, lambda d: d["files"].append({"path": name, "bytes": 6, "sha256": "0" * 64}))
    with pytest.raises(BundleError, match="outside the bundle"):
        open_bundle(bundle)


def test_a_link_to_the_outside_is_refused(bundle: Path) -> None:
    outside = bundle.parent / "outside"
    outside.write_text("secret")
    (bundle / "link").symlink_to(outside)
    edit(bundle, lambda d: d["files"].append({"path": "link", "bytes": 6, "sha256": hash_file(outside)}))
    with pytest.raises(BundleError, match="outside the bundle"):
        open_bundle(bundle)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.pop("files"),
        lambda d: d.update(components=3),
        lambda d: d.update(latents={"channels": 4}),
        lambda d: d["components"]["unet"].update(surprise=1),
        lambda d: d.update(files=[{"path": "x"}]),
    ],
)
def test_a_malformed_manifest_is_refused(bundle: Path, change) -> None:  # noqa: ANN001
    edit(bundle, change)
    with pytest.raises(BundleError, match="not a readable manifest"):
        open_bundle(bundle)


def test_a_newer_schema_is_named(bundle: Path) -> None:
    edit(bundle, lambda d: d.update(schema_version=99))
    with pytest.raises(BundleError, match="schema 99"):
        open_bundle(bundle)


def test_not_a_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no manifest"):
        open_bundle(tmp_path)


def test_a_graph_that_points_outside_is_refused_by_the_engine(bundle: Path) -> None:
    """The hashes of a hostile bundle fit; its graph's external data must still not leave the folder."""
    import onnx

    (bundle.parent / "secret").write_bytes(bytes(10_000_000))
    path = bundle / "unet" / "model.onnx"
    graph = onnx.load(path, load_external_data=False)
    for tensor in graph.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../../secret"
    path.write_bytes(graph.SerializeToString())

    def relist(document: dict) -> None:
        for entry in document["files"]:
            if entry["path"] == "unet/model.onnx":
                entry.update(bytes=path.stat().st_size, sha256=hash_file(path))

    edit(bundle, relist)
    open_bundle(bundle)
    with pytest.raises(EngineError, match="cannot load"):
        load(bundle)
