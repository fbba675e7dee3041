"""The runtime side runs with torch blocked; which package may import which is import-linter's (`make lint`)."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "qdeploy"
TORCH_FREE = (
    "base",
    "errors",
    "artifacts",
    "targets",
    "sampling",
    "engines",
    "runtime",
    "reporting",
    "bench",
    "sample",
    "evaluate",
    "serve",
)
IMPORTED_LATE = (
    PACKAGE / "engines" / "torch_graph",  # which its engine imports when it opens a session
    PACKAGE / "targets" / "nvidia" / "rules.py",  # of onnx-ir, which its target imports when it checks a file
    PACKAGE / "targets" / "onnx_files",  # as these, when an export writes or reads one
    PACKAGE / "targets" / "ncnn_files",
    PACKAGE / "targets" / "tflite_files",
)


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def own_room(path: Path) -> str:
    part = path.relative_to(PACKAGE).parts[0]
    return part.removesuffix(".py")


def name_module(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def list_imported_modules(path: Path) -> set[str]:
    """Modules of qdeploy that a file imports, also inside functions and for type checkers."""
    known, imported = set(map(name_module, modules())), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("qdeploy"):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            imported |= {name if name in known else str(node.module) for name in names}
    return imported


def test_no_module_imports_itself_through_others() -> None:
    graph = {name_module(path): list_imported_modules(path) for path in modules()}
    del graph["qdeploy"]  # its names for type checkers are the only ones from above
    TopologicalSorter({name: imported & graph.keys() for name, imported in graph.items()}).prepare()


BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "diffusers", "transformers", "onnx", "onnxscript", "onnx_ir"}:
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Block())
"""


def run_blocked(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED + code, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_runtime_side_imports_without_torch() -> None:
    names = [
        ".".join(("qdeploy", *path.relative_to(PACKAGE).with_suffix("").parts))
        for path in modules()
        if own_room(path) in TORCH_FREE and not {path, *path.parents} & set(IMPORTED_LATE)
    ]
    run_blocked("import importlib\nfor name in sys.argv[1:]: importlib.import_module(name)", *names)


def test_importing_qdeploy_loads_no_torch() -> None:
    code = "import qdeploy, sys; qdeploy.load; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_way_to_a_picture_runs_without_torch(encoder_bundle: Path, tmp_path: Path) -> None:
    from PIL import Image

    picture, mask = tmp_path / "picture.png", tmp_path / "mask.png"
    Image.new("RGB", (30, 20), (200, 30, 30)).save(picture)
    Image.new("L", (30, 20), 255).save(mask)
    command = "from qdeploy.cli import main\nmain(sys.argv[1:])"
    for name, options in {
        "image": ["--image", picture, "--strength", "0.7", "--low-memory"],
        "mask": ["--image", picture, "--mask", mask],
        "text": ["--negative", "blue", "--guidance-rescale", "0.5", "--weighting"],
    }.items():
        out = tmp_path / f"{name}-out.png"
        asked = ["--quiet", "generate", encoder_bundle, "a (red:1.2) cat", "-o", out, "--steps", "3", *options]
        run_blocked(command, *map(str, asked))
        assert Image.open(out).size == (16, 16)


def test_the_tokenizer_needs_no_network_and_no_transformers(encoder_bundle: Path) -> None:
    code = """
import socket
def refuse(*_): raise OSError("no network here")
socket.socket.connect = socket.getaddrinfo = refuse
import qdeploy
with qdeploy.load(sys.argv[1]) as pipe:
    pipe("a cat", steps=1)
assert not {"torch", "transformers", "huggingface_hub"} & set(sys.modules)
"""
    run_blocked(code, str(encoder_bundle))


def test_generate_and_bench_run_without_torch(int8_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "cat.png"
    command = "from qdeploy.cli import main\nmain(sys.argv[1:])"
    run_blocked(command, "--quiet", "generate", str(int8_bundle), "a cat", "-o", str(out), "--steps", "3")
    assert out.stat().st_size > 0
    quick = ("--rounds", "2", "--pictures", "1", "--steps", "2", "--fresh-starts", "1", "--concurrency", "2")
    shown = run_blocked(command, "--quiet", "bench", str(int8_bundle), *quick)
    assert "unet step" in shown
