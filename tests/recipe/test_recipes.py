"""The eight recipes hold the experiments' settings and run at tiny scale; any recipe can be stopped and goes on."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from qdeploy.artifacts.bundle import open_bundle
from qdeploy.artifacts.manifest import write_manifest
from qdeploy.artifacts.receipt import RecipeStep, run_step
from qdeploy.artifacts.table import load_table
from qdeploy.base.errors import ModelError, RequestError, UsageError
from qdeploy.base.progress import ignore_progress
from qdeploy.calibrate.dataset_file import load_calibration
from qdeploy.calibrate.record.modes import CalibrationRequest, settings_from_request
from qdeploy.calibrate.spec import QuantSpec, spec_from_options
from qdeploy.cli import main
from qdeploy.models.random_model import make_random_model
from qdeploy.recipe.read import SECTIONS, Recipe, read_recipe
from qdeploy.recipe.run import run_full
from qdeploy.recipe.tiny import shrink
from qdeploy.sample.job import split_into_ranges
from qdeploy.sampling.call_schedule import CallSchedule
from qdeploy.sampling.forecast import Forecast
from tests.shared_artifacts import build_once

RECIPES = sorted((Path(__file__).parent.parent.parent / "recipes").glob("*.toml"))
# Half a minute each on one thread. These three have between them every architecture, calibration and precision.
QUICK = ("lsun_bedroom_w4a8_uncalibrated", "lsun_churches_w8a8", "text_to_image_w4a8")
BY_SPEED = [pytest.param(path, id=path.stem, marks=() if path.stem in QUICK else pytest.mark.slow) for path in RECIPES]

# As the experiments' table has them: what is the same for a model, then what is a recipe's own.
BEDROOM = dict(
    architecture="lsun_beds256", ema=True, mode="noise_data", data=None, calibration_steps=100, split=False,
    scheduler="ddim", steps=100, eta=1.0, count=5000, batch=64, seed=41, prompt=None,
)  # fmt: skip
CHURCHES = BEDROOM | dict(
    architecture="lsun_churches256", mode="raw_data", data="data/lsun/churches", calibration_steps=200, steps=200,
    count=1000,
)  # fmt: skip
TEXT = dict(
    architecture="sd-v1-4", ema=False, from_qdiffusion=True, cali_st=2, cali_n=8, split=True, scheduler="pndm",
    steps=50,
    eta=0.0, guidance=7.5, count=5, prompt="a cat wearing a hat",
)  # fmt: skip
LEARNED = dict(adaround=True, observer="mse", equalize=True)
NEAREST = dict(adaround=False, observer="minmax", equalize=False, mode="noise_data", data=None)
EXPECTED: dict[str, dict[str, Any]] = {
    "lsun_bedroom_w8a8": BEDROOM | LEARNED | dict(weight_bits=8),
    "lsun_bedroom_w4a8": BEDROOM | LEARNED | dict(weight_bits=4),
    "lsun_bedroom_w4a8_uncalibrated": BEDROOM | NEAREST | dict(weight_bits=4),
    "lsun_churches_w8a8": CHURCHES | LEARNED | dict(weight_bits=8),
    "lsun_churches_w4a8": CHURCHES | LEARNED | dict(weight_bits=4),
    "lsun_churches_w4a8_uncalibrated": CHURCHES | NEAREST | dict(weight_bits=4),
    "text_to_image_w8a8": TEXT | LEARNED | dict(weight_bits=8),
    "text_to_image_w4a8": TEXT | LEARNED | dict(weight_bits=4),
}


@pytest.mark.parametrize("path", sorted((RECIPES[0].parent / "builtin").glob("*.toml")), ids=lambda path: path.stem)
def test_recipes_of_the_built_in_models_are_what_they_are_called(path: Path) -> None:
    recipe = read_recipe(path)
    model, bits, *more = path.stem.rsplit("_", 2) if path.stem.endswith("_uncalibrated") else path.stem.rsplit("_", 1)
    assert recipe.model.file == f"builtin:{model.replace('_', '-')}"
    assert f"w{recipe.quantize.weight_bits}a8" == bits
    nearest = recipe.quantize.observer == "minmax" and not recipe.quantize.equalize
    assert (recipe.calibrate.mode == "noise_data") == nearest == (more == ["uncalibrated"])
    assert (recipe.quantize.reconstruction is not None) == (bits == "w4a8" and not more)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["--quiet", "run", *map(str, arguments)])


def collect_settings(recipe: Recipe) -> dict[str, Any]:
    """All of a recipe's settings by name; sampling's and calibration's steps apart."""
    request, spec = recipe.calibrate, recipe.quantize
    assert recipe.sample.scheduler == (request.scheduler or recipe.sample.scheduler)
    return {
        **dataclasses.asdict(recipe.model),
        **dataclasses.asdict(recipe.sample),
        "mode": request.mode,
        "data": None if request.data is None else request.data.as_posix(),
        "calibration_steps": request.steps,
        "from_qdiffusion": request.from_qdiffusion is not None,
        "cali_st": request.cali_st,
        "cali_n": request.cali_n,
        "weight_bits": spec.weight_bits,
        "observer": spec.observer,
        "equalize": spec.equalize,
        "adaround": spec.reconstruction is not None,
        "split": "split_skips" in spec.rewrites,
    }


def test_there_is_a_recipe_for_each_experiment() -> None:
    assert {path.stem for path in RECIPES} == set(EXPECTED)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_holds_the_experiments_settings(path: Path) -> None:
    actual = collect_settings(read_recipe(path))
    expected = EXPECTED[path.stem]
    assert {name: actual[name] for name in expected} == expected


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_tiny_changes_only_sizes(path: Path) -> None:
    full = read_recipe(path)
    tiny = shrink(full)
    sizes = {"samples", "steps", "count", "iterations", "batch"}

    def changed(before: Any, after: Any) -> set[str]:
        before, after = dataclasses.asdict(before), dataclasses.asdict(after)
        return {name for name in before if before[name] != after[name]}

    assert changed(full.calibrate, tiny.calibrate) | changed(full.sample, tiny.sample) <= sizes
    assert changed(full.quantize, tiny.quantize) <= {"reconstruction"}
    if full.quantize.reconstruction is not None:
        assert changed(full.quantize.reconstruction, tiny.quantize.reconstruction) <= sizes
    assert (full.target, full.typed, full.model) == (tiny.target, tiny.typed, tiny.model)


@pytest.mark.exports
@pytest.mark.parametrize("path", BY_SPEED)
def test_a_recipe_runs_at_tiny_scale(path: Path, tmp_path: Path) -> None:
    expected = EXPECTED[path.stem]
    result = run(path, "-o", tmp_path, "--scale", "tiny")
    assert result.exit_code == 0, result.output
    assert list_pictures(tmp_path) == ["000000.png", "000001.png"]
    table = load_table(tmp_path / "table.safetensors")
    text = expected["prompt"] is not None
    assert set(table.components) == ({"unet"} if text else {"unet", "vae_decoder"})
    assert {layer.weight_bits for layer in table.components["unet"].layers.values()} == {expected["weight_bits"]}
    spec = table.provenance["spec"]
    assert (spec["reconstruction"] is not None, spec["observer"]) == (expected["adaround"], expected["observer"])
    mode = load_calibration(tmp_path / "calibration.safetensors").provenance["mode"]
    assert mode == ("qdiffusion" if text else expected["mode"])
    manifest = open_bundle(tmp_path / "bundle").manifest
    assert (manifest.precision, manifest.reads_text) == ("int8", text)
    assert manifest.components["unet"].integer_mac_share > 0.8
    before = states_below(tmp_path)
    assert run(path, "-o", tmp_path, "--scale", "tiny").exit_code == 0
    assert states_below(tmp_path) == before


@pytest.mark.parametrize("name", ["lsun_beds256", "lsun_churches256", "sd-v1-4"])
def test_random_models_are_the_same_each_time_and_in_scale(name: str) -> None:
    import torch

    state = torch.random.get_rng_state()
    model = make_random_model(name)
    assert torch.equal(state, torch.random.get_rng_state())
    assert model.sha256 == make_random_model(name).sha256 != make_random_model(name, seed=1).sha256
    for component in model.components:
        with torch.no_grad():
            output = model.component(component)(**model.make_example(component, 2))
        assert 0.1 < float(output.std()) < 3, component
    if name == "lsun_churches256":
        assert model.unet.inner.config.resnet_time_scale_shift == "scale_shift"
        assert {module.heads for module in model.unet.inner.modules() if hasattr(module, "heads")} == {8}


def list_pictures(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "pictures").iterdir())


def states_below(folder: Path) -> dict[str, tuple[int, int]]:
    """Time and size of every file."""
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_mtime_ns, path.stat().st_size)
        for path in folder.rglob("*")
        if path.is_file()
    }


def bytes_below(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# --------------------------------------------------------------------- stopping and going on, on the tests' own model

SMALL = """
[model]
file = "{model}"
[calibrate]
samples = 3
steps = 3
batch = 1
scheduler = "ddim"
eta = 1.0
[quantize]
weight_bits = 4
adaround = false
[sample]
scheduler = "ddim"
eta = 1.0
steps = 3
seed = 5
count = 5
batch = 2
"""


def small_recipe(model: Path, folder: Path, **replaced: str) -> Recipe:
    """The small recipe, with lines of it replaced, in a file in ``folder``."""
    text = SMALL.format(model=model.as_posix())
    for old, new in replaced.items():
        text = text.replace(find_line(text, old), new)
    path = folder / "recipe.toml"
    path.write_text(text)
    return read_recipe(path)


@pytest.fixture(scope="module")
def small(unconditional_folder: Path) -> Callable[..., Recipe]:
    return partial(small_recipe, unconditional_folder)


def find_line(text: str, key: str) -> str:
    """The line of ``section_key`` in ``text``."""
    section, _, key = key.partition("_")
    start = text.index(f"[{section}]")
    return next(line for line in text[start:].splitlines() if line.startswith(f"{key} ="))


@build_once("run", traces=True)
def finished_folder(out: Path, unconditional_folder: Path) -> None:
    """A folder in which the small recipe ran without interruption."""
    run_full(small_recipe(unconditional_folder, out.parent), out)


@pytest.fixture
def again(finished_folder: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, times of files included."""
    return shutil.copytree(finished_folder, tmp_path / "run")


class Stop:
    """A progress callback that interrupts when ``what`` has reached ``done``, and keeps what it was told."""

    def __init__(self, what: str, done: int) -> None:
        self.what, self.done, self.told = what, done, []

    def __call__(self, what: str, done: int, total: int, note: str = "") -> None:
        self.told.append((what, done, total))
        if what.startswith(self.what) and done == self.done:
            raise KeyboardInterrupt


def test_interrupted_runs_go_on_to_the_same_pictures(
    small: Callable[..., Recipe], finished_folder: Path, tmp_path: Path
) -> None:
    recipe, folder = small(tmp_path), tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run_full(recipe, folder, Stop("calibrate", 2))
    kept = list((folder / ".calibration.safetensors.part").glob("batch-*.safetensors"))
    assert [path.name for path in kept] == ["batch-000000.safetensors", "batch-000001.safetensors"]
    with pytest.raises(KeyboardInterrupt):
        run_full(recipe, folder, Stop("unet: weights", 3))
    assert not (folder / "table.safetensors").exists()
    with pytest.raises(KeyboardInterrupt):
        run_full(recipe, folder, Stop("sample", 2 * 3 + 1 * 2))  # the second batch's first step
    assert list_pictures(folder) == ["000000.png", "000001.png"]
    before = states_below(folder)
    last = Stop("never", 0)
    run_full(recipe, folder, last)
    assert next(told for told in last.told if told[0].startswith("sample"))[2] == 3 * 3  # steps of three pictures
    after = states_below(folder)
    assert {name: after[name] for name in before} == before
    assert bytes_below(folder / "pictures") == bytes_below(finished_folder / "pictures")


def test_a_receipt_is_keyed_by_values_and_paths_only(tmp_path: Path) -> None:
    assert (
        RecipeStep("a", tmp_path, {"data": tmp_path}, {}).key == RecipeStep("a", tmp_path, {"data": tmp_path}, {}).key
    )
    with pytest.raises(TypeError, match="JSON values and paths"):
        RecipeStep("a", tmp_path, {"check": lambda path: ""}, {}).key  # noqa: B018


def test_only_a_missing_picture_is_made(small: Callable[..., Recipe], again: Path, tmp_path: Path) -> None:
    for number in (1, 3):
        (again / "pictures" / f"00000{number}.png").unlink()
    before, made = states_below(again), bytes_below(again / "pictures")
    run_full(small(tmp_path, sample_count="count = 6"), again)
    after = states_below(again)
    assert {name: after[name] for name in before} == before
    pictures = bytes_below(again / "pictures")
    assert len(pictures) == 6
    assert {name: pictures[name] for name in made} == made


@pytest.mark.parametrize("batch", [1, 5])
def test_the_batch_changes_no_picture(small: Callable[..., Recipe], again: Path, tmp_path: Path, batch: int) -> None:
    made = bytes_below(again / "pictures")
    shutil.rmtree(again / "pictures")
    run_full(small(tmp_path, sample_batch=f"batch = {batch}"), again)
    assert bytes_below(again / "pictures") == made


def test_another_seed_only_makes_other_pictures(small: Callable[..., Recipe], again: Path, tmp_path: Path) -> None:
    before, made = states_below(again), bytes_below(again / "pictures")
    recipe = small(tmp_path, sample_seed="seed = 6")
    with pytest.raises(KeyboardInterrupt):  # in the second batch: no earlier picture may be left with the new ones
        run_full(recipe, again, Stop("sample", 2 * 3 + 2))
    assert list_pictures(again) == ["000000.png", "000001.png"]
    run_full(recipe, again)
    after, pictures = states_below(again), bytes_below(again / "pictures")
    assert {name for name in after if after[name] != before[name]} == {
        "receipts/sample.json", *(f"pictures/{name}" for name in made),
    }  # fmt: skip
    assert set(pictures) == set(made)
    assert all(pictures[name] != made[name] for name in made)


def test_other_weight_bits_redo_all_steps_after_the_calibration(
    small: Callable[..., Recipe], again: Path, tmp_path: Path
) -> None:
    before, made = states_below(again), bytes_below(again / "pictures")
    run_full(small(tmp_path, quantize_weight_bits="weight_bits = 5"), again)
    after, pictures = states_below(again), bytes_below(again / "pictures")
    assert after["calibration.safetensors"] == before["calibration.safetensors"]
    assert open_bundle(again / "bundle").manifest.components["unet"].weight_bits == (5,)
    assert all(pictures[name] != made[name] for name in made)


def test_another_calibration_redoes_the_table(small: Callable[..., Recipe], again: Path, tmp_path: Path) -> None:
    before = states_below(again)
    with pytest.raises(KeyboardInterrupt):
        run_full(small(tmp_path, calibrate_eta="eta = 0.5"), again, Stop("export", 0))
    after = states_below(again)
    assert all(after[name] != before[name] for name in ("calibration.safetensors", "table.safetensors"))
    assert after["bundle/manifest.json"] == before["bundle/manifest.json"]


def test_a_cut_table_is_made_again(small: Callable[..., Recipe], again: Path, tmp_path: Path) -> None:
    table, before = again / "table.safetensors", states_below(again)
    whole = table.read_bytes()
    table.write_bytes(whole[:1000])
    run_full(small(tmp_path), again)
    after = states_below(again)
    assert table.read_bytes() == whole
    assert {name for name in after if after[name] != before[name]} == {"table.safetensors", "receipts/quantize.json"}


@pytest.mark.parametrize("damage", ["graph", "manifest", "swapped"])
def test_a_damaged_bundle_is_exported_again(finished_folder: Path, again: Path, damage: str) -> None:
    bundle, remade = again / "bundle", list[Path]()
    step = RecipeStep("export", bundle, {}, {"table": "0"})
    sha256 = run_step(step, again / "receipts", lambda: None, ignore_progress)
    if damage == "graph":
        (bundle / "unet" / "model.onnx").unlink()
    elif damage == "manifest":
        (bundle / "manifest.json").write_text("{")
    else:
        write_manifest(bundle, dataclasses.replace(open_bundle(bundle).manifest, target="another"))

    def make() -> None:
        remade.append(bundle)
        shutil.rmtree(bundle)
        shutil.copytree(finished_folder / "bundle", bundle)

    assert run_step(step, again / "receipts", make, ignore_progress) == sha256
    assert run_step(step, again / "receipts", make, ignore_progress) == sha256
    assert remade == [bundle]


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "[]", '{"key": null, "sha256": null}', '{"key": 1e999}'])
def test_a_receipt_that_says_nothing_redoes_its_step(
    small: Callable[..., Recipe], again: Path, tmp_path: Path, text: str
) -> None:
    receipt = again / "receipts" / "calibrate.json"
    good = receipt.read_text()
    receipt.write_text(text)
    before = states_below(again)
    run_full(small(tmp_path), again)
    after = states_below(again)
    assert receipt.read_text() == good
    assert after["calibration.safetensors"] != before["calibration.safetensors"]
    assert after["table.safetensors"] == before["table.safetensors"]  # the same set came out again


def test_pictures_of_which_no_receipt_speaks_are_not_touched(
    small: Callable[..., Recipe], again: Path, tmp_path: Path
) -> None:
    (again / "receipts" / "sample.json").write_text("[[")
    made = bytes_below(again / "pictures")
    with pytest.raises(UsageError, match="does not say how they were made"):
        run_full(small(tmp_path), again)
    assert bytes_below(again / "pictures") == made


def test_a_trial_does_not_replace_a_run(again: Path) -> None:
    before = states_below(again)
    result = run(RECIPES[0], "-o", again, "--scale", "tiny")
    assert (result.exit_code, "--scale full" in result.output) == (2, True), result.output
    assert states_below(again) == before


def test_runs_of_missing_pictures() -> None:
    assert list(split_into_ranges([0, 1, 2, 5, 6, 9], 2)) == [range(0, 2), range(2, 3), range(5, 7), range(9, 10)]
    assert list(split_into_ranges([], 2)) == []


# ------------------------------------------------------------------------------------------------------ bad recipes

MODEL = '[model]\nfile = "builtin:emoji"\n'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[model]\nfile = ", "not readable as TOML"),
        (b"\xff\xfe", "byte 0 is not UTF-8"),
        ("x = " + "[" * 5000, "nests 5000 deep"),
        ("#" * 2**17, "more than the 65,536 bytes"),
        ("", "names no `file`"),
        (MODEL + "[sampel]\n", "unknown section [sampel]; known: [model], [calibrate]"),
        ("model = 3\n", "[model]: got 3, expected a section"),
        (MODEL + "[quantize]\nwieght_bits = 4\n", "unknown key `wieght_bits` in [quantize]; known: weight_bits"),
        (MODEL + '[quantize]\nweight_bits = "4"\n', "[quantize] weight_bits: got '4', expected a whole number"),
        (MODEL + "[quantize]\nweight_bits = true\n", "weight_bits: got True, expected a whole number"),
        (MODEL + "[quantize]\nadaround = 1\n", "adaround: got 1, expected true or false"),
        (MODEL + "[quantize]\nkeep_float = [1]\n", "keep_float: got [1], expected a list of texts"),
        (MODEL + "[quantize]\nprecise_macs = nan\n", "`quantize.precise_macs` is nan, expected a finite number"),
        (MODEL + "[quantize]\nweight_bits = 9\n", "weight bits: got 9, expected 2 to 8"),
        (MODEL + '[quantize]\neffort = "great"\n', "effort: got 'great', expected one of fast"),
        (MODEL + "[quantize]\nattention_bits = 16\n", "no engine runs 16-bit attention"),
        (MODEL + '[calibrate]\nmode = "magic"\n', "--mode: got 'magic'"),
        (MODEL + '[calibrate]\nmode = "raw_data"\n', "needs --data"),
        (MODEL + '[calibrate]\nmode = "noise_data"\neta = 0.5\n', "--eta does not go with --mode noise_data"),
        (MODEL + '[calibrate]\ndata = "a\\u0000b"\n', "[calibrate] data: got"),
        (MODEL + "[calibrate]\nseed = -1\n", "--seed: got -1"),
        (MODEL + '[export]\ntarget = "abacus"\n', "known targets: "),
        (MODEL + '[sample]\nscheduler = "heun"\n', "known schedulers: pndm"),
        (MODEL + '[sample]\nscheduler = "pndm"\neta = 1.0\n', "[sample] eta: got 1.0"),
        (MODEL + "[sample]\ncount = 0\n", "[sample] count: got 0, expected at least 1"),
        (MODEL + "[sample]\ncount = 10_000_000\n", "expected at most 1000000"),
        (MODEL + "[sample]\nguidance_interval = [0.8, 0.2]\n", "guidance_interval: got (0.8, 0.2), which is reversed"),
        (MODEL + "[sample]\nguidance_interval = 0.5\n", "guidance_interval: got 0.5, expected two numbers in brackets"),
        (MODEL + '[calibrate]\nguidance_interval = [0, "1"]\n', "expected two numbers in brackets, from and to"),
        (MODEL + '[sample]\nforecast = "linear:width=3"\n', "names: warmup, last, window, growth"),
        (MODEL + '[calibrate]\nforecast = "magic"\n', "got method 'magic'"),
        (MODEL + "[calibrate]\nguidance_interval = [0, 2]\n", "0 <= from < to <= 1"),
        (MODEL + 'architecture = "sd-9"\n', "unknown architecture 'sd-9'; known: lsun_beds256"),
    ],
)
def test_a_wrong_recipe_is_named(tmp_path: Path, text: str | bytes, words: str) -> None:
    path = tmp_path / "wrong.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    result = run(path, "-o", tmp_path / "out")
    assert result.exit_code == 2, result.output
    assert str(path) in result.output
    assert words in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("no/such.toml",), 2, "cannot be read"),
        ((RECIPES[0],), 1, "lsun_beds256/model.ckpt, which is not there: put lsun_beds256 at that path"),
        ((RECIPES[0], "--data", "x"), 2, "--data does not go with --mode noise_data"),
        ((RECIPES[0], "--scale", "tiny", "--model", "x"), 2, "--model does not go with --scale tiny"),
        ((RECIPES[0], "--pictures", "0"), 2, "0 is not in the range"),
    ],
)
def test_wrong_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[object, ...], code: int, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*arguments, "-o", tmp_path / "out")
    assert (result.exit_code, words in result.output) == (code, True), result.output
    assert not (tmp_path / "out").exists()


def test_missing_files_and_another_model(
    unconditional_folder: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    churches = next(path for path in RECIPES if path.stem == "lsun_churches_w8a8")
    here = read_recipe(churches).replace_files(model=str(unconditional_folder))
    with pytest.raises(UsageError, match=r"data.lsun.churches.*--data"):
        run_full(here, tmp_path / "out")
    bedroom = dataclasses.replace(read_recipe(RECIPES[0]).model, file=str(unconditional_folder), ema=False)
    with pytest.raises(ModelError, match=r"is not the architecture lsun_beds256: .*\[32, 64\].*\[224, 448"):
        run_full(dataclasses.replace(read_recipe(RECIPES[0]), model=bedroom), tmp_path / "out")
    path = tmp_path / "text.toml"
    for more, error, words in (
        ("", UsageError, "needs a prompt"),
        ('prompt = "x"\neta = 1.0\n', RequestError, "only ddim takes noise"),
        ('prompt = "x"\nsteps = 5000\n', RequestError, "steps"),
    ):
        path.write_text(f'[model]\nfile = "{tiny_folder.as_posix()}"\n[sample]\n{more}')
        with pytest.raises(error, match=words):
            run_full(read_recipe(path), tmp_path / "text")
    path.write_text('[model]\nfile = "builtin:emoji"\n')
    result = run(path, "-o", tmp_path / "tiny", "--scale", "tiny")
    assert (result.exit_code, "needs [model] architecture" in result.output) == (2, True), result.output


def test_a_recipe_and_the_commands_have_the_same_options_and_defaults(tmp_path: Path) -> None:
    path = tmp_path / "empty.toml"
    path.write_text(MODEL)
    recipe = read_recipe(path)
    assert (recipe.calibrate, recipe.quantize) == (CalibrationRequest(), QuantSpec())
    loading = {"model", "out", "loras", "config", "ema", "allow_download", "vae"}
    for name, more, meant in (("calibrate", [], CalibrationRequest), ("quantize", ["--calib", "c"], spec_from_options)):
        typed = main.get_command(click.Context(main), name).make_context(name, ["m", "-o", "o", *more]).params
        assert set(typed) - loading - {"calib"} == set(SECTIONS[name])
        assert meant(**{key: typed[key] for key in SECTIONS[name]}) == getattr(recipe, name)


def test_the_call_schedule_goes_to_calibration_and_pictures(tmp_path: Path) -> None:
    path = tmp_path / "interval.toml"
    path.write_text(
        MODEL + "[calibrate]\nguidance_interval = [0.2, 0.8]\n[sample]\nprompt = 'a'\nguidance_interval = [0.2, 1]\n"
        "forecast = 'linear:window=3'\n"
    )
    recipe = read_recipe(path)
    assert settings_from_request(recipe.calibrate).calls == CallSchedule((0.2, 0.8))
    job = recipe.sample.job(tmp_path, "0")
    assert job.calls == CallSchedule((0.2, 1), Forecast("linear", window=3))
    assert (job.settings["guidance_interval"], job.settings["forecast"]["window"]) == ([0.2, 1.0], 3)
    tiny = shrink(recipe)
    assert (tiny.calibrate.guidance_interval, tiny.sample.guidance_interval, tiny.sample.forecast) == (None,) * 3


@pytest.mark.exports
def test_a_recipe_exports_the_encoder_on_demand(small: Callable[..., Recipe], tmp_path: Path) -> None:
    assert not small(tmp_path).with_encoder
    recipe = small(tmp_path, sample_batch="batch = 2\n[export]\nwith_encoder = true")
    assert recipe.with_encoder
    run_full(recipe, tmp_path / "out")
    assert "vae_encoder" in open_bundle(tmp_path / "out" / "bundle").manifest.components
