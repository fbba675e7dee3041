"""A missing module is answered with the extra that holds it."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from qdeploy.base import extras
from qdeploy.base.extras import find_extras, format_install, package_from_module

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REQUIREMENTS = list(PROJECT["dependencies"]) + [
    f"{requirement}{' and' if ';' in requirement else ';'} extra == '{extra}'"
    for extra, requirements in PROJECT["optional-dependencies"].items()
    for requirement in requirements
]  # as a wheel's metadata have them


WITHOUT = """
import sys
missing = sys.argv.pop(1)
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
from qdeploy.cli import main
main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("module", "preferred", "expected"),
    [
        ("torch", "", "pip install 'qdeploy[quantize]'"),
        ("torch", "evaluate", "pip install 'qdeploy[evaluate]'"),
        ("torch.nn", "calibrate", "pip install 'qdeploy[quantize]'"),
        ("onnx_ir", "", "pip install 'qdeploy[quantize]'"),
        ("yaml", "", "pip install 'qdeploy[quantize]'"),
        ("torchmetrics", "bench", "pip install 'qdeploy[evaluate]'"),
        ("jinja2", "bench", "pip install 'qdeploy[report]'"),
        ("matplotlib", "report", "pip install 'qdeploy[report]'"),
        ("ray", "", "pip install 'qdeploy[ray]'"),
        ("openvino.runtime", "", "pip install 'qdeploy[openvino]'"),
        ("cuda.bindings", "", "pip install 'qdeploy[tensorrt]'"),
        ("onnxruntime_ep_nv_tensorrt_rtx", "", "pip install 'qdeploy[tensorrt-rtx]'"),
        ("lmdb", "calibrate", "pip install 'qdeploy[lsun]'"),
        ("PIL.Image", "", "pip install pillow"),
        ("hypothesis", "", "pip install hypothesis"),
        ("no_such_thing", "", "pip install no-such-thing"),
        (None, "", "pip install qdeploy"),
    ],
)
def test_the_extra_that_holds_a_module_is_named(
    module: str | None, preferred: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extras, "read_requirements", lambda: REQUIREMENTS)
    assert format_install(module, preferred) == expected


def test_every_extra_for_users_is_found_by_its_packages() -> None:
    users = {name for name in PROJECT["optional-dependencies"] if name not in extras.GROUPS}
    found = {
        extra for line in REQUIREMENTS for extra in find_extras(package_from_module(extras.NAME.match(line)[0]), [line])
    }
    assert found == users


@pytest.mark.parametrize(
    ("missing", "command", "extra"),
    [
        ("torch", ["quantize", "builtin:emoji", "--calib", "c", "-o", "q.safetensors"], "quantize"),
        ("diffusers", ["demo", "-o", "demo"], "quantize"),
        ("torch", ["evaluate", "bundle", "-o", "out"], "evaluate"),
        ("torchmetrics", ["evaluate", "bundle", "-o", "out"], "evaluate"),
        ("jinja2", ["bench", "bundle", "--html", "page.html"], "report"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else value,
)
def test_a_command_names_it(missing: str, command: list[str], extra: str, float_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "bundle").symlink_to(float_bundle)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, missing, "--quiet", *command],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode != 0
    assert re.search(rf"{missing}\W.*run `pip install 'qdeploy\[{extra}\]'`", done.stderr), done.stderr
