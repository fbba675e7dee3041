"""Every sampler against its pinned diffusers twin over whole trajectories, and what samplers refuse.

Where the twin's own float32 formulas cancel it runs widened to float64: PNDM with v_prediction is
6e-3 from its own float64 result on a cosine schedule, DDIM with eta=1 is 2e-4 from it, or NaN.
"""

from __future__ import annotations

import inspect
import itertools
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from qdeploy.errors import RequestError, UsageError
from qdeploy.sampling import NAMES, NoiseSchedule, Sampler, make_sampler, with_scheduler
from qdeploy.sampling.loop import PictureStreams, denoise, unit_noise
from qdeploy.sampling.settings import KNOWN_SETTINGS

torch = pytest.importorskip("torch", reason="the twins are diffusers' schedulers, which need torch")
diffusers = pytest.importorskip("diffusers", reason="the twins are diffusers' schedulers")

# Float32 rounding of x (6e-8) times 50 steps and the model's feedback reaches 3e-6; a wrong coefficient is over 1e-4.
TOLERANCE = 1e-5
# A few float32 roundings (6e-8): torch.linspace rounds by instruction set, its sqrt wrongly in a fifth of all cases.
SCHEDULE_TOLERANCE = 1e-6
SEED = 3
STEPS = (1, 2, 4, 25, 50)
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
BETAS = ({"beta_schedule": "linear"}, SD, {"beta_schedule": "squaredcos_cap_v2"})
SPACINGS = ("leading", "trailing", "linspace")

Config = Mapping[str, Any]
Trajectory = list[NDArray[np.floating]]


@pytest.fixture(autouse=True, scope="module")
def one_torch_thread() -> Iterator[None]:
    """More threads only slow such small arrays down."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def model(x: NDArray[np.floating], t: int) -> NDArray[np.float32]:
    """A deterministic stand-in for the UNet, whatever its prediction type; ``float32`` in shape of ``x``."""
    return np.tanh(np.float32(0.7) * x.astype(np.float32) + np.float32(0.001 * t))


def first_x() -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal((2, 4, 2, 2), dtype=np.float32)


def clean_x() -> NDArray[np.float32]:
    return 0.5 * np.random.default_rng(1).standard_normal((2, 4, 2, 2), dtype=np.float32)


def new_sampler(config: Config, steps: int, eta: float = 0.0) -> Sampler:
    return make_sampler(config, steps, eta=eta, rng=np.random.default_rng(SEED))


def our_trajectory(config: Config, steps: int, eta: float = 0.0, begin: int = 0) -> tuple[list[int], Trajectory]:
    sampler = new_sampler(config, steps, eta)
    x = sampler.noised(clean_x(), first_x(), begin) if begin else first_x() * np.float32(sampler.init_noise_sigma)
    trajectory = [x]
    for index in range(begin, len(sampler.timesteps)):
        x = sampler.step(model(sampler.scale_model_input(x, index), int(sampler.timesteps[index])), index, x)
        assert x.dtype == np.float32
        trajectory.append(x)
    return sampler.timesteps.tolist(), trajectory


def make_twin(config: Config, steps: int, dtype: Any) -> Any:
    """The diffusers scheduler; its numbers widened to ``dtype`` after it made them.

    With zero terminal SNR it gets our schedule, which `test_schedule` compares: one rounding in torch's
    sqrt is 1e-3 of 1 - alpha_bar_0 there.
    """
    twin = getattr(diffusers, config["_class_name"]).from_config(dict(config))
    if config.get("rescale_betas_zero_snr"):
        last = twin.alphas_cumprod[-1].clone()
        twin.alphas_cumprod = torch.from_numpy(NoiseSchedule.from_config(config).alphas_cumprod.copy())
        twin.alphas_cumprod[-1] = last
    twin.set_timesteps(steps)
    if config["_class_name"] == NAMES["dpm++"]:
        twin.sigmas = twin.sigmas.to(dtype)
        twin.set_begin_index(0)  # else it skips a level where the first timestep comes twice, and then crashes
    else:
        final = torch.tensor(1.0) if twin.config.set_alpha_to_one else twin.alphas_cumprod[0]
        twin.alphas_cumprod, twin.final_alpha_cumprod = twin.alphas_cumprod.to(dtype), final.to(dtype)
    return twin


def twin_trajectory(
    config: Config, steps: int, eta: float = 0.0, dtype: Any = None, begin: int = 0
) -> tuple[list[int], Trajectory]:
    """The twin's timesteps and every x from call ``begin`` on, as diffusers' image-to-image pipeline runs it."""
    dtype = dtype or torch.float32
    twin, rng = make_twin(config, steps, dtype), np.random.default_rng(SEED)
    x = torch.from_numpy(first_x()).to(dtype)
    if begin:
        if hasattr(twin, "set_begin_index"):
            twin.set_begin_index(begin)
        x = twin.add_noise(torch.from_numpy(clean_x()).to(dtype), x, twin.timesteps[begin : begin + 1])
    trajectory = [x.numpy()]
    for t in twin.timesteps[begin:]:
        options = {"eta": eta} if eta else {}
        if eta or config.get("algorithm_type") == "sde-dpmsolver++":
            options["variance_noise"] = torch.from_numpy(rng.standard_normal(x.shape, dtype=np.float32))
        output = torch.from_numpy(model(x.numpy(), int(t))).to(dtype)
        x = twin.step(output, t, x, **options).prev_sample
        trajectory.append(x.numpy())
    return twin.timesteps.tolist(), trajectory


def relative_error(ours: Trajectory, twins: Trajectory) -> float:
    """Largest difference of a step over the step's largest magnitude; NaN if a value is."""
    return float(np.max([np.abs(x - y).max() / np.abs(y).max() for x, y in zip(ours, twins, strict=True)]))


def check_against_twin(config: Config, steps: int, eta: float = 0.0, dtype: Any = None, begin: int = 0) -> None:
    our_timesteps, ours = our_trajectory(config, steps, eta, begin)
    twin_timesteps, twins = twin_trajectory(config, steps, eta, dtype, begin)
    assert our_timesteps == twin_timesteps
    assert relative_error(ours, twins) < TOLERANCE  # false for NaN


def config_of(name: str, *parts: Config, **settings: Any) -> dict[str, Any]:
    merged = {"_class_name": NAMES[name], "_diffusers_version": "0.42.1"}
    for part in (*parts, settings):
        merged |= part
    return merged


def label(value: Any) -> str | None:
    if not isinstance(value, dict):
        return None
    return "-".join(f"{k}={v}" for k, v in value.items() if k[1:] != "diffusers_version" and not isinstance(v, list))


def step_counts(config: Config) -> tuple[int, ...]:
    """STEPS without those that a Runge-Kutta start refuses."""
    return STEPS[2:] if config.get("skip_prk_steps") is False else STEPS


def pndm_grid(prediction_type: str) -> Iterator[dict[str, Any]]:
    for betas, spacing, skip, to_one in itertools.product(BETAS, SPACINGS, (True, False), (True, False)):
        settings = {"timestep_spacing": spacing, "skip_prk_steps": skip, "set_alpha_to_one": to_one}
        yield config_of("pndm", betas, settings, prediction_type=prediction_type)


def ddim_grid() -> Iterator[dict[str, Any]]:
    for betas, spacing, predicts in itertools.product(BETAS, SPACINGS, ("epsilon", "v_prediction", "sample")):
        clips = predicts != "v_prediction"
        yield config_of(
            "ddim",
            betas,
            timestep_spacing=spacing,
            prediction_type=predicts,
            clip_sample=clips,
            clip_sample_range=1.5,
            set_alpha_to_one=spacing != "leading",
        )


def dpm_grid() -> Iterator[dict[str, Any]]:
    for betas, predicts, algorithm, solver, final in itertools.product(
        BETAS[1:],
        ("epsilon", "v_prediction", "sample"),
        ("dpmsolver++", "sde-dpmsolver++"),
        ("midpoint", "heun"),
        ("zero", "sigma_min"),
    ):
        spacing = SPACINGS[(solver == "heun") + (final == "zero")]
        yield config_of(
            "dpm++",
            betas,
            timestep_spacing=spacing,
            prediction_type=predicts,
            algorithm_type=algorithm,
            solver_type=solver,
            final_sigmas_type=final,
        )


STABLE_DIFFUSION = [
    config_of("pndm", SD, skip_prk_steps=True),
    config_of("pndm", SD, skip_prk_steps=False),
    config_of("ddim", SD, clip_sample=False, set_alpha_to_one=False),
    config_of("ddim", SD, prediction_type="v_prediction", clip_sample=False, timestep_spacing="trailing"),
    config_of("dpm++", SD),
    config_of("dpm++", SD, use_karras_sigmas=True),
    config_of("dpm++", SD, algorithm_type="sde-dpmsolver++", timestep_spacing="leading", euler_at_final=True),
    config_of("dpm++", SD, prediction_type="v_prediction", timestep_spacing="trailing", solver_type="heun"),
]

TRAINED = np.linspace(0.001, 0.03, 100).tolist()

# One setting at a time that the grids leave out.
SINGLE_SETTINGS = [
    config_of("pndm", trained_betas=TRAINED, num_train_timesteps=100, skip_prk_steps=True),
    config_of("pndm", SD, skip_prk_steps=True, use_karras_sigmas=True, clip_sample=True),  # others' settings
    config_of("ddim", trained_betas=TRAINED, num_train_timesteps=100, set_alpha_to_one=True),
    config_of("ddim", SD, clip_sample=None, set_alpha_to_one=True, trained_betas=None),
    config_of(
        "ddim", SD, rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing",
        set_alpha_to_one=False,
    ),
    config_of("ddim", SD, rescale_betas_zero_snr=True, set_alpha_to_one=False),
    config_of("dpm++", trained_betas=TRAINED, num_train_timesteps=100),
    config_of(
        "dpm++", SD, rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing"
    ),
    config_of("dpm++", SD, solver_order=1),
    config_of("dpm++", SD, lower_order_final=False, final_sigmas_type="sigma_min"),
    config_of("dpm++", SD, euler_at_final=True, final_sigmas_type="sigma_min"),
    config_of("dpm++", beta_schedule="squaredcos_cap_v2", lambda_min_clipped=-5.1),
    config_of("dpm++", beta_schedule="squaredcos_cap_v2", lambda_min_clipped=-5.1, timestep_spacing="trailing"),
    config_of("dpm++", beta_schedule="squaredcos_cap_v2", use_karras_sigmas=True),
    config_of("dpm++", SD, use_karras_sigmas=True, final_sigmas_type="sigma_min"),
    config_of("dpm++", SD, use_karras_sigmas=True, sigma_min=0.1, sigma_max=10.0),
    config_of("dpm++", SD, use_exponential_sigmas=True),
    config_of("dpm++", SD, use_lu_lambdas=True),
    config_of("dpm++", SD, solver_type="bh2"),
]  # fmt: skip


# Samplers that can begin at any call.
BEGINNING = [config for config in STABLE_DIFFUSION if config.get("skip_prk_steps") is not False]


@pytest.mark.parametrize(
    "config", [*STABLE_DIFFUSION, *pndm_grid("epsilon"), *ddim_grid(), *dpm_grid(), *SINGLE_SETTINGS], ids=label
)
def test_equals_the_twin_as_it_is(config: Config) -> None:
    for steps in step_counts(config):
        check_against_twin(config, steps)


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_stochastic_ddim_equals_the_twin_as_it_is(eta: float) -> None:
    for steps in STEPS:
        check_against_twin(config_of("ddim", SD, clip_sample=False, set_alpha_to_one=True), steps, eta)


@pytest.mark.parametrize("config", pndm_grid("v_prediction"), ids=label)
def test_pndm_equals_the_twin_in_float64(config: Config) -> None:
    for steps in step_counts(config):
        check_against_twin(config, steps, dtype=torch.float64)


@pytest.mark.parametrize("config", ddim_grid(), ids=label)
def test_stochastic_ddim_equals_the_twin_in_float64(config: Config) -> None:
    for steps in STEPS:
        check_against_twin(config, steps, eta=1.0, dtype=torch.float64)


@pytest.mark.parametrize("begin", [1, 2, 10, 19])
@pytest.mark.parametrize("config", BEGINNING, ids=label)
def test_begun_in_the_middle_equals_the_twin(config: Config, begin: int) -> None:
    """As image to image begins: x0 noised for call ``begin``, then the rest of the calls."""
    check_against_twin(config, 20, begin=begin)


@pytest.mark.parametrize("config", BEGINNING, ids=label)
def test_noised_equals_add_noise(config: Config) -> None:
    sampler, twin = new_sampler(config, 20), make_twin(config, 20, torch.float32)
    x0, noise = clean_x(), first_x()
    for index, t in enumerate(twin.timesteps):
        if hasattr(twin, "set_begin_index"):
            twin.set_begin_index(index)
        expected = twin.add_noise(torch.from_numpy(x0), torch.from_numpy(noise), t[None]).numpy()
        ours = sampler.noised(x0, noise, index)
        assert ours.dtype == np.float32
        assert relative_error([ours], [expected]) < SCHEDULE_TOLERANCE


def test_a_runge_kutta_start_is_at_the_first_call() -> None:
    sampler = make_sampler(config_of("pndm", SD, skip_prk_steps=False), 20)
    with pytest.raises(RequestError, match="skip_prk_steps"):
        sampler.step(first_x(), 3, first_x())


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("betas", [*BETAS, {"trained_betas": TRAINED, "num_train_timesteps": 100}], ids=label)
def test_schedule(betas: Config, zero_snr: bool) -> None:
    config = config_of("ddim", betas, rescale_betas_zero_snr=zero_snr)
    ours, twin = NoiseSchedule.from_config(config), diffusers.DDIMScheduler.from_config(dict(config))
    assert ours.betas.dtype == ours.alphas_cumprod.dtype == np.float32
    np.testing.assert_allclose(ours.alphas_cumprod, twin.alphas_cumprod.numpy(), rtol=0, atol=SCHEDULE_TOLERANCE)
    if not zero_snr:  # there, a beta is 1 minus the ratio of two neighbours and holds their rounding
        np.testing.assert_allclose(ours.betas, twin.betas.numpy(), rtol=SCHEDULE_TOLERANCE)
    assert (ours.alphas_cumprod[-1] == 0) == zero_snr


@pytest.mark.parametrize("name", NAMES)
def test_trailing_spacing_never_leaves_the_trained_timesteps(name: str) -> None:
    """diffusers makes 62 timesteps of 61 steps here, the last one -1; ours are the first 61."""
    config = config_of(name, SD, timestep_spacing="trailing", skip_prk_steps=True)
    timesteps = make_sampler(config, 61).timesteps
    twin = make_twin(config, 61, torch.float32)
    assert twin.timesteps[-1] == -1
    assert timesteps.tolist() == twin.timesteps[:-1].tolist()
    assert timesteps.dtype == np.int64


@pytest.mark.parametrize("target", NAMES)
@pytest.mark.parametrize("source", NAMES)
def test_with_scheduler_equals_from_config(source: str, target: str) -> None:
    """From a live diffusers config, whose mere defaults go, and from the file it saves, whose defaults stay."""
    live = getattr(diffusers, NAMES[source]).from_config(dict(config_of(source, SD, clip_sample=False)))
    saved = {key: value for key, value in live.config.items() if key != "_use_default_values"}
    for config in (live.config, saved):
        converted = with_scheduler(config, target)
        twin = getattr(diffusers, NAMES[target]).from_config(config)
        assert converted["_class_name"] == NAMES[target]
        assert {k: twin.config[k] for k in converted if k[0] != "_"} == {
            k: v for k, v in converted.items() if k[0] != "_"
        }
        twin.set_timesteps(25)
        assert make_sampler(converted, 25).timesteps.tolist() == twin.timesteps.tolist()


def test_known_settings_are_those_of_the_convertible_schedulers() -> None:
    classes = [getattr(diffusers, name) for name in diffusers.DDIMScheduler._compatibles]
    parameters = {name for cls in classes for name in inspect.signature(cls.__init__).parameters}
    assert parameters - {"self", "args", "kwargs"} == KNOWN_SETTINGS


def test_requests_do_not_share_state() -> None:
    """Two interleaved requests give what each gives alone."""
    config = config_of("dpm++", SD, algorithm_type="sde-dpmsolver++")
    alone = our_trajectory(config, 4)[1][-1]
    samplers = [make_sampler(config, 4, rng=np.random.default_rng(SEED)) for _ in range(2)]
    xs = [first_x(), 2 * first_x()]
    for index, t in enumerate(samplers[0].timesteps):
        xs = [sampler.step(model(x, t), index, x) for sampler, x in zip(samplers, xs, strict=True)]
    np.testing.assert_array_equal(xs[0], alone)


@pytest.mark.parametrize(
    ("config", "eta"),
    [
        (config_of("pndm", SD, skip_prk_steps=True), 0.0),
        (config_of("ddim", SD, clip_sample=False), 1.0),
        (config_of("dpm++", SD, algorithm_type="sde-dpmsolver++"), 0.0),
    ],
)
def test_a_picture_takes_the_same_way_in_any_batch(config: Config, eta: float) -> None:
    seeds = [(SEED, i) for i in range(5)]

    def run(chosen: list[tuple[int, int]]) -> Any:
        sampler = make_sampler(config, 20, eta=eta, rng=PictureStreams(chosen))
        return denoise(lambda x, t, _: model(x, t), sampler, unit_noise((4, 5, 7), chosen), None, None, 1.0)

    together = run(seeds)
    np.testing.assert_array_equal(together[3:], run(seeds[3:]))
    np.testing.assert_array_equal(together[4:], run(seeds[4:]))


def test_importing_loads_no_torch() -> None:
    code = "import sys, qdeploy.sampling; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("name", "setting", "value", "supported"),
    [
        ("ddim", "thresholding", True, "False"),
        ("dpm++", "thresholding", True, "False"),
        ("ddim", "beta_schedule", "sigmoid", "scaled_linear"),
        ("ddim", "beta_start", 0.0, "between 0 and 1"),
        ("ddim", "beta_end", "0.02", "a number"),
        ("ddim", "trained_betas", [0.1, 0.2], "num_train_timesteps=1000"),
        ("ddim", "trained_betas", "none", "a list of numbers"),
        ("ddim", "prediction_type", "flow_prediction", "v_prediction"),
        ("pndm", "prediction_type", "sample", "v_prediction"),
        ("pndm", "rescale_betas_zero_snr", True, "ddim"),
        ("pndm", "timestep_spacing", "log", "trailing"),
        ("dpm++", "timestep_spacing", "log", "trailing"),
        ("pndm", "skip_prk_steps", "yes", "True, False"),
        ("pndm", "steps_offset", -1, "at least 0"),
        ("pndm", "num_train_timesteps", 1000.0, "an integer"),
        ("dpm++", "algorithm_type", "dpmsolver", "dpmsolver++"),
        ("dpm++", "algorithm_type", "deis", "dpmsolver++"),
        ("dpm++", "solver_order", 3, "1, 2"),
        ("dpm++", "solver_order", True, "1, 2"),
        ("dpm++", "solver_type", "euler", "midpoint"),
        ("dpm++", "final_sigmas_type", "last", "sigma_min"),
        ("dpm++", "variance_type", "learned", "None"),
        ("dpm++", "use_beta_sigmas", True, "False"),
        ("dpm++", "use_flow_sigmas", True, "False"),
        ("dpm++", "use_dynamic_shifting", True, "False"),
        ("dpm++", "lambda_min_clipped", 100.0, "at most"),
        ("dpm++", "lambda_min_clipped", float("nan"), "a number"),
        ("dpm++", "beta_dropout", 1, "no setting of that name"),
    ],
)
def test_refuses_a_setting_it_cannot_honour(name: str, setting: str, value: Any, supported: str) -> None:
    with pytest.raises(UsageError) as caught:
        make_sampler(config_of(name, {setting: value}), 10)
    for part in (f"`{setting}`", repr(value), supported):
        assert part in str(caught.value)


@pytest.mark.parametrize("second", ["use_lu_lambdas", "use_exponential_sigmas"])
def test_refuses_two_level_spacings(second: str) -> None:
    with pytest.raises(UsageError, match=second):
        make_sampler(config_of("dpm++", {"use_karras_sigmas": True, second: True}), 10)


def test_refuses_sigmas_that_do_not_fall() -> None:
    with pytest.raises(UsageError, match="sigma_min"):
        make_sampler(config_of("dpm++", use_karras_sigmas=True, sigma_min=2.0, sigma_max=1.0), 10)


def test_refuses_epsilon_where_nothing_is_left_of_the_signal() -> None:
    with pytest.raises(UsageError, match="v_prediction"):
        make_sampler(config_of("ddim", rescale_betas_zero_snr=True, timestep_spacing="trailing"), 10)


@pytest.mark.parametrize("class_name", ["EulerDiscreteScheduler", None])
def test_refuses_another_class(class_name: str | None) -> None:
    with pytest.raises(UsageError, match="PNDMScheduler, DDIMScheduler, DPMSolverMultistepScheduler"):
        make_sampler({"_class_name": class_name}, 10)


def test_refuses_an_unknown_scheduler_name() -> None:
    with pytest.raises(UsageError, match=r"pndm, ddim, dpm\+\+"):
        with_scheduler({}, "euler")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("steps", [-1, 0, 1001])
def test_refuses_a_step_count_out_of_range(name: str, steps: int) -> None:
    with pytest.raises(RequestError, match=f"got {steps}, expected 1 to 1000"):
        make_sampler(config_of(name), steps)


@pytest.mark.parametrize(
    ("config", "steps"),
    [
        (config_of("pndm", SD, skip_prk_steps=True), 1000),  # steps_offset=1 would reach timestep 1000
        (config_of("ddim", SD), 1000),
        (config_of("pndm"), 3),  # a Runge-Kutta start takes 4
        (config_of("dpm++"), 1000),  # 1001 levels out of 1000: diffusers divides by 0
        (config_of("dpm++", timestep_spacing="leading"), 1000),
    ],
    ids=str,
)
def test_refuses_steps_that_the_spacing_cannot_place(config: Config, steps: int) -> None:
    with pytest.raises(RequestError, match="steps"):
        make_sampler(config, steps)


@pytest.mark.parametrize(("name", "eta"), [("ddim", -0.1), ("ddim", 1.1), ("ddim", float("nan")), ("pndm", 0.5)])
def test_refuses_an_eta_it_cannot_serve(name: str, eta: float) -> None:
    with pytest.raises(RequestError, match="eta"):
        make_sampler(config_of(name, skip_prk_steps=True), 10, eta=eta, rng=np.random.default_rng(0))


def test_noise_needs_a_generator() -> None:
    with pytest.raises(UsageError, match="rng"):
        make_sampler(config_of("ddim"), 10, eta=0.5)
    with pytest.raises(UsageError, match="rng"):
        make_sampler(config_of("dpm++", algorithm_type="sde-dpmsolver++"), 10)
