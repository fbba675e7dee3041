"""Each of examples/ runs as its first line says."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


def run(script: str, *arguments: object, folder: Path) -> str:
    """What the example prints and logs."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *map(str, arguments)],
        cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_the_tour(encoder_bundle: Path, tmp_path: Path) -> None:
    said = run("tour.py", encoder_bundle, folder=tmp_path)
    for words in ("step 4 of 5", "CancelledError", "DeadlineError", "RequestError", "hat.png"):
        assert words in said, said


def test_the_batch_goes_on_where_it_stopped(float_bundle: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n\n" + "x" * 10_001 + "\na dog\n", encoding="utf-8")
    said = run("batch.py", float_bundle, prompts, tmp_path / "out", folder=tmp_path)
    assert "ERROR line 3" in said
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["00000.png", "00003.png"]
    before = (tmp_path / "out" / "00003.png").stat().st_mtime_ns
    (tmp_path / "out" / "00000.png").unlink()
    run("batch.py", float_bundle, prompts, tmp_path / "out", folder=tmp_path)
    assert (tmp_path / "out" / "00003.png").stat().st_mtime_ns == before
    assert (tmp_path / "out" / "00000.png").exists()


def test_the_service(float_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    testclient = pytest.importorskip("fastapi.testclient")
    monkeypatch.setenv("BUNDLE", str(float_bundle))
    monkeypatch.syspath_prepend(str(ROOT))
    from examples.service import app

    assert len((EXAMPLES / "service.py").read_text().splitlines()) <= 35
    with testclient.TestClient(app) as client:
        ask = lambda seed: client.get("/picture", params={"prompt": "a cat", "seed": seed, "steps": 2})  # noqa: E731
        sequential = [ask(seed).content for seed in range(4)]
        with ThreadPoolExecutor(4) as pool:
            assert [answer.content for answer in pool.map(ask, range(4))] == sequential
        assert Image.open(io.BytesIO(sequential[0])).size == (16, 16)
        refused = client.get("/picture", params={"prompt": "a cat", "steps": 0})
        assert (refused.status_code, "steps" in refused.json()["detail"]) == (422, True)


def test_the_client(float_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("openai")
    from tests.serve.running import run_bundles

    with run_bundles({"tiny": float_bundle}) as running:
        said = run("client.py", running.url, folder=tmp_path)
    assert "seed: 7" in said
    assert "refused: size" in said
    assert sorted(path.name for path in (tmp_path / "client").iterdir()) == [
        "cat.png", "dog-0.png", "dog-1.png", "dog.png",
    ]  # fmt: skip


@pytest.mark.parametrize("path", sorted((EXAMPLES / "containers").iterdir()), ids=lambda path: path.stem)
def test_a_dockerfile_keeps_the_rules(path: Path) -> None:
    """Nobody builds them here: known instructions in JSON form, no rights, no cache, a look at health, no secret."""
    lines = path.read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    steps = [line.split(" ", 1) for line in lines if line and not line.startswith("#")]
    names = [name for name, _ in steps]
    known = {"ARG", "FROM", "RUN", "COPY", "USER", "EXPOSE", "STOPSIGNAL", "HEALTHCHECK", "ENTRYPOINT", "CMD"}
    assert set(names) <= known
    assert names.index("FROM") <= 1
    assert names.count("USER") == 1
    assert names.index("RUN") < names.index("USER") < names.index("CMD")
    values = dict(steps)
    assert int(values["USER"]) >= 1000
    assert ":" in values["FROM"] or values["FROM"] == "${TRITON}"
    assert not values["FROM"].endswith(":latest")
    assert "--no-cache-dir" in values["RUN"]
    for name in {"ENTRYPOINT", "CMD"} & set(names):
        assert all(isinstance(word, str) for word in json.loads(values[name]))
    assert json.loads(values["HEALTHCHECK"].partition("CMD ")[2])[0].startswith("python")
    assert "KEY" not in " ".join(" ".join(step) for step in steps)
