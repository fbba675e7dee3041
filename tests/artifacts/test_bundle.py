"""A wrong, cut or hostile bundle is refused with the file's name."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from qdeploy.artifacts.bundle import open_bundle
from qdeploy.artifacts.manifest import MANIFEST
from qdeploy.base.errors import BundleError
from qdeploy.base.files import hash_file


@pytest.fixture
def bundle(float_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(float_bundle, tmp_path / "bundle"))


def edit(bundle: Path, change: Callable[[dict], object]) -> None:
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


def link_outside(bundle: Path) -> None:
    outside = bundle.parent / "outside"
    outside.write_text("secret")
    (bundle / "link").symlink_to(outside)
    edit(bundle, lambda d: d["files"].append({"path": "link", "bytes": 6, "sha256": hash_file(outside)}))


@pytest.mark.parametrize(
    "add",
    [
        link_outside,
        lambda bundle: (bundle / "loop").symlink_to(bundle),
        lambda bundle: (bundle / "dangling").symlink_to("nowhere"),
        lambda bundle: os.mkfifo(bundle / "pipe"),
    ],
)
def test_links_and_pipes_are_refused(bundle: Path, add: Callable[[Path], object]) -> None:
    add(bundle)
    with pytest.raises(BundleError, match="outside the bundle"):
        open_bundle(bundle)


@pytest.mark.parametrize("name", ["notes.txt", "unet/more.data", "inner/manifest.json", ".hidden"])
def test_a_file_that_is_not_listed_is_refused(bundle: Path, name: str) -> None:
    (bundle / name).parent.mkdir(exist_ok=True)
    (bundle / name).write_text("x")
    with pytest.raises(BundleError, match=rf"holds '{re.escape(name)}', which manifest\.json does not list"):
        open_bundle(bundle)


@pytest.mark.parametrize("name", [".DS_Store", "unet/Thumbs.db", "unet/desktop.ini", "unet/._model.onnx"])
def test_what_file_managers_write_is_left_alone(bundle: Path, name: str) -> None:
    """Nothing reads such a file: a bundle that was looked at is as good as before."""
    (bundle / name).write_bytes(b"x")
    assert name not in open_bundle(bundle).files


def test_a_file_managers_name_is_no_way_out(bundle: Path) -> None:
    (bundle / ".DS_Store").symlink_to("/etc/hostname")
    with pytest.raises(BundleError, match="outside the bundle"):
        open_bundle(bundle)


@pytest.mark.parametrize("name", ["a\0b", "C:/windows", "unet/./x", "line\nbreak", "unet//x", "", "UNET/model.onnx"])
def test_names_that_are_not_plain_are_refused(bundle: Path, name: str) -> None:
    edit(bundle, lambda d: d["files"].append({"path": name, "bytes": 6, "sha256": "0" * 64}))
    with pytest.raises(BundleError, match=r"outside the bundle|plain relative path|one file on some systems|`files"):
        open_bundle(bundle)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda d: d.pop("files"), "lists no file"),
        (lambda d: d.update(components=3), "`components` is 3, expected an object"),
        (lambda d: d.update(latents={"channels": 4}), "`latents` has no field `height`"),
        (lambda d: d["components"]["unet"].update(surprise=1), "`components.unet.surprise` is a field"),
        (lambda d: d.update(files=[{"path": "x"}]), r"`files\[0\]` has no field `bytes`"),
        (lambda d: d["latents"].update(height=0), "`latents.height` is 0, expected an integer >= 1"),
        (lambda d: d["latents"].update(channels=-4), "`latents.channels` is -4"),
        (lambda d: d["latents"].update(height=64, width=64), "a picture of 16x16 is no whole multiple"),
        (lambda d: d["latents"].update(height=3), "a picture of 16x16 is no whole multiple"),
        (lambda d: d["latents"].update(image_width=32), "a picture of 32x16 is no whole multiple"),
        (lambda d: d["latents"].update(width="8"), "`latents.width` is '8', expected an integer"),
        (lambda d: d["latents"].update(width=8.5), "`latents.width` is 8.5, expected an integer"),
        (lambda d: d["latents"].update(scaling_factor=0), "`latents.scaling_factor` is 0"),
        (lambda d: d["components"]["unet"].update(integer_mac_share="all"), "integer_mac_share` is 'all'"),
        (lambda d: d["components"]["unet"].update(parity_db="good"), "parity_db` is 'good'"),
        (lambda d: d["components"]["unet"].update(weight_bits=[99]), r"weight bits \[99\]"),
        (lambda d: d["components"]["unet"]["inputs"]["sample"].update(shape=[0, 4, 8, 8]), "no dimension of 0"),
        (lambda d: d["components"]["unet"]["inputs"]["sample"].update(shape=[10**30, 4, 8, 8]), "64 bits"),
        (lambda d: d["components"]["unet"]["inputs"]["sample"].update(shape=["B", 4, 8, 8]), r"shape\[0\]` is 'B'"),
        (lambda d: d.update(precision="int3"), "precision 'int3'"),
        (
            lambda d: d["components"].update(spy=d["components"]["unet"]),
            "a component 'spy', which this qdeploy does not know",
        ),
    ],
)
def test_a_malformed_manifest_is_refused(bundle: Path, change: Callable[[dict], object], field: str) -> None:
    edit(bundle, change)
    with pytest.raises(BundleError, match=field):
        open_bundle(bundle)


@pytest.mark.parametrize(
    ("component", "group", "name", "change", "words"),
    [
        ("unet", "inputs", "sample", {"shape": [2, 4, 16, 16]}, "has the inputs sample float32"),
        ("unet", "inputs", "sample", {"dtype": "float16"}, "the manifest says sample float16"),
        ("unet", "outputs", "noise_pred", {"shape": [2, 1, 8, 8]}, "the manifest says noise_pred float32"),
        ("vae_decoder", "outputs", "image", {"shape": [1, 3, 16]}, "has the outputs image"),
    ],
)
def test_the_graphs_own_signature_counts(
    bundle: Path, component: str, group: str, name: str, change: dict, words: str
) -> None:
    edit(bundle, lambda d: d["components"][component][group][name].update(change))
    with pytest.raises(BundleError, match=words):
        open_bundle(bundle)


@pytest.mark.parametrize(
    ("latents", "words"),
    [
        ({"channels": 3}, r"unet has the input sample float32\[2, 4, 8, 8\], expected float32\[2, 3 or 7, 8, 8\]"),
        ({"height": 16, "width": 16}, r"unet has the input sample float32\[2, 4, 8, 8\], expected"),
        (
            {"image_width": 32, "image_height": 32},
            r"vae_decoder has the output image float32\[1, 3, 16, 16\], expected",
        ),
        ({"tokens": 77}, r"text_encoder has the input input_ids int64\[1, 16\], expected int64\[1, 77\]"),
    ],
)
def test_the_latents_are_what_the_graphs_take(bundle: Path, latents: dict, words: str) -> None:
    edit(bundle, lambda d: d["latents"].update(latents))
    with pytest.raises(BundleError, match=words):
        open_bundle(bundle)


def relist(bundle: Path, *names: str) -> None:
    """Give the manifest the files' sizes and hashes, as one who changed them would."""

    def change(document: dict) -> None:
        for entry in document["files"]:
            if entry["path"] in names:
                path = bundle / entry["path"]
                entry.update(bytes=path.stat().st_size, sha256=hash_file(path))

    edit(bundle, change)


def test_weights_that_are_not_listed_are_refused(bundle: Path) -> None:
    """Otherwise a listed bundle would run with changed weights."""
    edit(bundle, lambda d: d.update(files=[e for e in d["files"] if e["path"] != "unet/model.onnx.data"]))
    with pytest.raises(BundleError, match=r"holds 'unet/model\.onnx\.data', which manifest\.json does not list"):
        open_bundle(bundle)
    (bundle / "unet" / "model.onnx.data").unlink()
    with pytest.raises(BundleError, match=r"reads weights from 'model\.onnx\.data', which the manifest does not list"):
        open_bundle(bundle)


@pytest.mark.parametrize("content", [b"", b"no graph", b"\xff" * 100])
def test_a_file_that_is_no_graph_is_named(bundle: Path, content: bytes) -> None:
    (bundle / "unet" / "model.onnx").write_bytes(content)
    relist(bundle, "unet/model.onnx")
    with pytest.raises(BundleError, match=r"unet/model\.onnx is not a readable ONNX graph"):
        open_bundle(bundle)


def put_output(bundle: Path, shape: list[int] | None, element: int) -> None:
    """Make the UNet's graph say that its output has this shape and element type."""
    import onnx

    path = bundle / "unet" / "model.onnx"
    graph = onnx.load(path, load_external_data=False)
    (name,) = (value.name for value in graph.graph.output)
    graph.graph.output[0].CopyFrom(onnx.helper.make_tensor_value_info(name, element, shape))
    path.write_bytes(graph.SerializeToString())
    relist(bundle, "unet/model.onnx")


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ([], "float32"),
        ([2, 1, 8, 8], "float32"),
        ([2, 4, 8, 8], "bool"),
        ([2, 4, 8, 8], "string"),
        ([2, 4, 8], "float32"),
    ],
)
def test_a_unet_that_puts_out_something_else_is_refused(bundle: Path, shape: list[int], dtype: str) -> None:
    """A scalar, a bool, a text or one channel would be broadcast or crash; the manifest of a hostile bundle agrees."""
    element = {"float32": 1, "bool": 9, "string": 8}[dtype]
    put_output(bundle, shape, element)
    edit(bundle, lambda d: d["components"]["unet"]["outputs"].update(noise_pred={"dtype": dtype, "shape": shape}))
    with pytest.raises(BundleError, match=r"unet has the output noise_pred|expected one of float32"):
        open_bundle(bundle)


def test_a_newer_schema_is_named(bundle: Path) -> None:
    edit(bundle, lambda d: d.update(schema_version=99))
    with pytest.raises(BundleError, match="schema 99"):
        open_bundle(bundle)


def test_not_a_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no manifest"):
        open_bundle(tmp_path)


def test_a_graph_that_points_outside_is_refused(bundle: Path) -> None:
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

    relist(bundle, "unet/model.onnx")
    with pytest.raises(BundleError, match=r"reads weights from '\.\./\.\./secret'"):
        open_bundle(bundle)
