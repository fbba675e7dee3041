"""PNDM, DDIM and DPM-Solver++ compared with diffusers'; what all schedulers have in common, and what they refuse.

The other families are in `test_euler`, `test_unipc` and `test_lcm`.
"""

from __future__ import annotations

import inspect
import itertools
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from qdeploy.base.errors import RequestError, UsageError
from qdeploy.commands import load_command
from qdeploy.sampling import CLASS_NAMES, NoiseSchedule, make_scheduler, replace_scheduler
from qdeploy.sampling.loop import PictureStreams, denoise, draw_unit_noise
from qdeploy.sampling.settings import KNOWN_SETTINGS, check_settings
from tests.sampling.references import (
    BETAS,
    SCHEDULE_TOLERANCE,
    SD,
    SEED,
    SPACINGS,
    STEPS,
    TRAINED,
    Config,
    check_against_reference,
    clean_x,
    diffusers,
    first_x,
    label,
    make_config,
    make_reference,
    model,
    new_scheduler,
    our_trajectory,
    relative_error,
    torch,
    whole,
)


def step_counts(config: Config) -> tuple[int, ...]:
    """STEPS without those that a Runge-Kutta start refuses."""
    return STEPS[2:] if config.get("skip_prk_steps") is False else STEPS


def pndm_grid(prediction_type: str) -> Iterator[dict[str, Any]]:
    for betas, spacing, skip, to_one in itertools.product(BETAS, SPACINGS, (True, False), (True, False)):
        settings = {"timestep_spacing": spacing, "skip_prk_steps": skip, "set_alpha_to_one": to_one}
        yield make_config("pndm", betas, settings, prediction_type=prediction_type)


def ddim_grid() -> Iterator[dict[str, Any]]:
    for betas, spacing, predicts in itertools.product(BETAS, SPACINGS, ("epsilon", "v_prediction", "sample")):
        clips = predicts != "v_prediction"
        yield make_config(
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
        yield make_config(
            "dpm++",
            betas,
            timestep_spacing=spacing,
            prediction_type=predicts,
            algorithm_type=algorithm,
            solver_type=solver,
            final_sigmas_type=final,
        )


STABLE_DIFFUSION = [
    make_config("pndm", SD, skip_prk_steps=True),
    make_config("pndm", SD, skip_prk_steps=False),
    make_config("ddim", SD, clip_sample=False, set_alpha_to_one=False),
    make_config("ddim", SD, prediction_type="v_prediction", clip_sample=False, timestep_spacing="trailing"),
    make_config("dpm++", SD),
    make_config("dpm++", SD, use_karras_sigmas=True),
    make_config("dpm++", SD, algorithm_type="sde-dpmsolver++", timestep_spacing="leading", euler_at_final=True),
    make_config("dpm++", SD, prediction_type="v_prediction", timestep_spacing="trailing", solver_type="heun"),
]

# One setting at a time that the grids leave out.
SINGLE_SETTINGS = [
    make_config("pndm", trained_betas=TRAINED, num_train_timesteps=100, skip_prk_steps=True),
    make_config("pndm", SD, skip_prk_steps=True, use_karras_sigmas=True, clip_sample=True),  # others' settings
    make_config("ddim", trained_betas=TRAINED, num_train_timesteps=100, set_alpha_to_one=True),
    make_config("ddim", SD, clip_sample=None, set_alpha_to_one=True, trained_betas=None),
    make_config(
        "ddim", SD, rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing",
        set_alpha_to_one=False,
    ),
    make_config("ddim", SD, rescale_betas_zero_snr=True, set_alpha_to_one=False),
    make_config("dpm++", trained_betas=TRAINED, num_train_timesteps=100),
    make_config(
        "dpm++", SD, rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing"
    ),
    make_config("dpm++", SD, solver_order=1),
    make_config("dpm++", SD, lower_order_final=False, final_sigmas_type="sigma_min"),
    make_config("dpm++", SD, euler_at_final=True, final_sigmas_type="sigma_min"),
    make_config("dpm++", beta_schedule="squaredcos_cap_v2", lambda_min_clipped=-5.1),
    make_config("dpm++", beta_schedule="squaredcos_cap_v2", lambda_min_clipped=-5.1, timestep_spacing="trailing"),
    make_config("dpm++", beta_schedule="squaredcos_cap_v2", use_karras_sigmas=True),
    make_config("dpm++", SD, use_karras_sigmas=True, final_sigmas_type="sigma_min"),
    make_config("dpm++", SD, use_karras_sigmas=True, sigma_min=0.1, sigma_max=10.0),
    make_config("dpm++", SD, use_exponential_sigmas=True),
    make_config("dpm++", SD, use_lu_lambdas=True),
    make_config("dpm++", SD, use_beta_sigmas=True),
    make_config("dpm++", SD, thresholding=True, sample_max_value=1.2),
    make_config("ddim", SD, thresholding=True, dynamic_thresholding_ratio=0.8, sample_max_value=1.5),
    make_config("dpm++", SD, solver_type="bh2"),
]  # fmt: skip


# Schedulers that can begin at any call.
BEGINNING = [
    *(config for config in STABLE_DIFFUSION if config.get("skip_prk_steps") is not False),
    make_config("dpm++", SD, solver_order=3),
    make_config("euler", SD),
    make_config("euler", SD, use_karras_sigmas=True, timestep_spacing="leading"),
    make_config("euler-a", SD, timestep_spacing="trailing", prediction_type="v_prediction"),
    make_config("unipc", SD),
    make_config("unipc", SD, solver_order=3, use_karras_sigmas=True),
    make_config("lcm", SD),
]


def third_order_grid() -> Iterator[dict[str, Any]]:
    for betas, spacing, final in itertools.product(BETAS, SPACINGS, ("zero", "sigma_min")):
        settings = {"timestep_spacing": spacing, "final_sigmas_type": final, "lower_order_final": final == "zero"}
        yield make_config("dpm++", betas, settings, solver_order=3)


@pytest.mark.parametrize(
    "config", [*STABLE_DIFFUSION, *pndm_grid("epsilon"), *ddim_grid(), *dpm_grid(), *SINGLE_SETTINGS], ids=label
)
def test_equals_diffusers_as_it_is(config: Config) -> None:
    for steps in step_counts(config):
        check_against_reference(config, steps)


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_stochastic_ddim_equals_diffusers_as_it_is(eta: float) -> None:
    for steps in STEPS:
        check_against_reference(make_config("ddim", SD, clip_sample=False, set_alpha_to_one=True), steps, eta)


@pytest.mark.parametrize("config", pndm_grid("v_prediction"), ids=label)
def test_pndm_equals_diffusers_in_float64(config: Config) -> None:
    for steps in step_counts(config):
        check_against_reference(config, steps, dtype=torch.float64)


@pytest.mark.parametrize("config", ddim_grid(), ids=label)
def test_stochastic_ddim_equals_diffusers_in_float64(config: Config) -> None:
    for steps in STEPS:
        check_against_reference(config, steps, eta=1.0, dtype=torch.float64)


@pytest.mark.parametrize("begin", [1, 2, 10, 19])
@pytest.mark.parametrize("config", BEGINNING, ids=label)
def test_begun_in_the_middle_equals_diffusers(config: Config, begin: int) -> None:
    """As image to image begins: x0 noised for call ``begin``, then the rest of the calls."""
    check_against_reference(config, 20, dtype=torch.float64 if config.get("solver_order") == 3 else None, begin=begin)


@pytest.mark.parametrize("config", BEGINNING, ids=label)
def test_noised_equals_add_noise(config: Config) -> None:
    scheduler, reference = new_scheduler(config, 20), make_reference(config, 20, torch.float32)
    x0, noise = clean_x(), first_x()
    for index, t in enumerate(reference.timesteps):
        if hasattr(reference, "set_begin_index"):
            reference.set_begin_index(index)
        expected = reference.add_noise(torch.from_numpy(x0), torch.from_numpy(noise), t[None]).numpy()
        ours = scheduler.add_noise(x0, noise, index)
        assert ours.dtype == np.float32
        assert relative_error([ours], [expected]) < SCHEDULE_TOLERANCE


def test_a_runge_kutta_start_is_at_the_first_call() -> None:
    scheduler = make_scheduler(make_config("pndm", SD, skip_prk_steps=False), 20)
    with pytest.raises(RequestError, match="skip_prk_steps"):
        scheduler.step(first_x(), 3, first_x())


@pytest.mark.parametrize("config", third_order_grid(), ids=label)
def test_third_order_equals_diffusers_in_float64(config: Config) -> None:
    for steps in STEPS:
        check_against_reference(config, steps, dtype=torch.float64)


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("betas", [*BETAS, {"trained_betas": TRAINED, "num_train_timesteps": 100}], ids=label)
def test_uniform_log_snr_starts_at_the_last_trained_timestep(betas: Config, zero_snr: bool) -> None:
    """The ends are the float32 log-sigmas, as diffusers takes them; those of float64 give 998 or 995 for 999."""
    for first, last in ((0.0001, 0.02), (0.00085, 0.012), (0.0015, 0.0195), (0.0015, 0.0155)):
        ends = {} if "trained_betas" in betas else {"beta_start": first, "beta_end": last}
        predicts = "v_prediction" if zero_snr else "epsilon"
        config = make_config(
            "dpm++", betas, ends, use_lu_lambdas=True, rescale_betas_zero_snr=zero_snr, prediction_type=predicts
        )
        for steps in (2, 5, 10, 20):
            reference = make_reference(config, steps, torch.float32)
            assert new_scheduler(config, steps).timesteps.tolist() == whole(reference.timesteps)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("num_train_timesteps", 10**9), ("num_train_timesteps", 10**18), ("steps_offset", 10**30),
        ("beta_start", 10**400), ("beta_start", 1e-320), ("beta_end", 1e-310), ("sample_max_value", float("inf")),
        ("trained_betas", {"0": 0.1}), ("trained_betas", [[0.1]] * 1000), ("trained_betas", [10**400] * 1000),
    ],
)  # fmt: skip
def test_numbers_beyond_reason_are_named(setting: str, value: Any) -> None:
    with pytest.raises(UsageError, match="beta_start" if setting == "beta_end" else setting):
        make_scheduler(make_config("ddim", {setting: value}, thresholding=True), 10)


@pytest.mark.parametrize("settings", [[], None, 3, "ddim"])
def test_what_is_no_object_is_refused(settings: Any) -> None:
    for use in (lambda: make_scheduler(settings, 10), lambda: replace_scheduler(settings, "ddim")):
        with pytest.raises(UsageError, match=r"expected an object; edit scheduler_config\.json"):
            use()


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("betas", [*BETAS, {"trained_betas": TRAINED, "num_train_timesteps": 100}], ids=label)
def test_schedule(betas: Config, zero_snr: bool) -> None:
    config = make_config("ddim", betas, rescale_betas_zero_snr=zero_snr)
    ours, reference = NoiseSchedule.from_config(config), diffusers.DDIMScheduler.from_config(dict(config))
    assert ours.betas.dtype == ours.alphas_cumprod.dtype == np.float32
    np.testing.assert_allclose(ours.alphas_cumprod, reference.alphas_cumprod.numpy(), rtol=0, atol=SCHEDULE_TOLERANCE)
    if not zero_snr:  # there, a beta is 1 minus the ratio of two neighbours and holds their rounding
        np.testing.assert_allclose(ours.betas, reference.betas.numpy(), rtol=SCHEDULE_TOLERANCE)
    assert (ours.alphas_cumprod[-1] == 0) == zero_snr


@pytest.mark.parametrize("name", [name for name in CLASS_NAMES if name != "lcm"])  # its timesteps are not spaced
def test_trailing_spacing_never_leaves_the_trained_timesteps(name: str) -> None:
    """diffusers makes 62 timesteps of 61 steps here, the last one -1; ours are the first 61."""
    config = make_config(name, SD, timestep_spacing="trailing", skip_prk_steps=True)
    timesteps = new_scheduler(config, 61).timesteps
    reference = make_reference(config, 61, torch.float32)
    assert reference.timesteps[-1] == -1
    assert timesteps.tolist() == whole(reference.timesteps[:-1])
    assert timesteps.dtype == np.int64


@pytest.mark.parametrize("target", CLASS_NAMES)
@pytest.mark.parametrize("source", CLASS_NAMES)
def test_with_scheduler_equals_from_config(source: str, target: str) -> None:
    """From a live diffusers config, whose mere defaults go, and from the file it saves, whose defaults stay."""
    live = getattr(diffusers, CLASS_NAMES[source]).from_config(dict(make_config(source, SD, clip_sample=False)))
    saved = {key: value for key, value in live.config.items() if key != "_use_default_values"}
    for config in (live.config, saved):
        converted = replace_scheduler(config, target)
        reference = getattr(diffusers, CLASS_NAMES[target]).from_config(config)
        assert converted["_class_name"] == CLASS_NAMES[target]
        # DPM-Solver++ and UniPC rewrite each other's solver types, ours when the config is read
        settings = {name: value for name, value in converted.items() if name[0] != "_" and name != "solver_type"}
        assert {name: reference.config[name] for name in settings} == settings
        reference.set_timesteps(25)
        assert new_scheduler(converted, 25).timesteps.tolist() == whole(reference.timesteps)


@pytest.mark.parametrize(("command", "option"), [("generate", "--scheduler"), ("calibrate", "--scheduler")])
def test_help_names_every_scheduler(command: str, option: str) -> None:
    parameters = load_command(command).params
    (help_text,) = [parameter.help for parameter in parameters if option in parameter.opts]
    assert ", ".join(list(CLASS_NAMES)[:-1]) + f" or {list(CLASS_NAMES)[-1]}, or one with its spacing" in help_text


def test_known_settings_are_those_of_the_convertible_schedulers() -> None:
    classes = [getattr(diffusers, name) for name in ["LCMScheduler", *diffusers.DDIMScheduler._compatibles]]
    parameters = {name for cls in classes for name in inspect.signature(cls.__init__).parameters}
    unseen = {"noise_sampler_seed"}  # of DPMSolverSDEScheduler, whose class diffusers hides without torchsde
    assert parameters - {"self", "args", "kwargs"} | unseen == KNOWN_SETTINGS


def test_a_deis_config_becomes_a_plain_dpm_solver() -> None:
    saved = {key: value for key, value in diffusers.DEISMultistepScheduler(**SD).config.items() if key[0] != "_"}
    assert (saved["algorithm_type"], saved["solver_type"]) == ("deis", "logrho")
    converted = replace_scheduler(saved | {"noise_sampler_seed": 2**40}, "dpm++")
    reference = diffusers.DPMSolverMultistepScheduler.from_config(saved | {"final_sigmas_type": "sigma_min"})
    assert (reference.config.algorithm_type, reference.config.solver_type) == ("dpmsolver++", "midpoint")
    plain = converted | {"algorithm_type": "dpmsolver++", "solver_type": "midpoint"}
    np.testing.assert_array_equal(our_trajectory(converted, 8)[1], our_trajectory(plain, 8)[1])
    check_settings({"noise_sampler_seed": None} | converted)


def test_requests_do_not_share_state() -> None:
    """Two interleaved requests give what each gives by itself."""
    config = make_config("dpm++", SD, algorithm_type="sde-dpmsolver++")
    single = our_trajectory(config, 4)[1][-1]
    schedulers = [make_scheduler(config, 4, rng=np.random.default_rng(SEED)) for _ in range(2)]
    xs = [first_x(), 2 * first_x()]
    for index, t in enumerate(schedulers[0].timesteps):
        xs = [scheduler.step(model(x, t), index, x) for scheduler, x in zip(schedulers, xs, strict=True)]
    np.testing.assert_array_equal(xs[0], single)


@pytest.mark.parametrize(
    ("config", "eta"),
    [
        (make_config("pndm", SD, skip_prk_steps=True), 0.0),
        (make_config("ddim", SD, clip_sample=False), 1.0),
        (make_config("dpm++", SD, algorithm_type="sde-dpmsolver++"), 0.0),
        (make_config("dpm++", SD, thresholding=True, solver_order=3), 0.0),
        (make_config("euler", SD), 0.0),
        (make_config("euler-a", SD), 0.0),
        (make_config("unipc", SD, solver_order=3), 0.0),
        (make_config("lcm", SD), 0.0),
    ],
)
def test_a_picture_takes_the_same_way_in_any_batch(config: Config, eta: float) -> None:
    seeds = [(SEED, i) for i in range(5)]

    def run(chosen: list[tuple[int, int]]) -> Any:
        scheduler = make_scheduler(config, 20, eta=eta, rng=PictureStreams(chosen))
        return denoise(lambda x, t, _: model(x, t), scheduler, draw_unit_noise((4, 5, 7), chosen), None, None, 1.0)

    together = run(seeds)
    np.testing.assert_array_equal(together[3:], run(seeds[3:]))
    np.testing.assert_array_equal(together[4:], run(seeds[4:]))


def test_importing_loads_no_torch() -> None:
    code = "import sys, qdeploy.sampling; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("name", "setting", "value", "supported"),
    [
        ("ddim", "thresholding", "yes", "True, False"),
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
        ("dpm++", "solver_order", 4, "1, 2, 3"),
        ("dpm++", "solver_order", True, "1, 2"),
        ("dpm++", "solver_type", "euler", "midpoint"),
        ("dpm++", "final_sigmas_type", "last", "sigma_min"),
        ("dpm++", "variance_type", "learned", "None"),
        ("dpm++", "use_flow_sigmas", True, "False"),
        ("dpm++", "use_dynamic_shifting", True, "False"),
        ("dpm++", "lambda_min_clipped", 100.0, "at most"),
        ("dpm++", "lambda_min_clipped", float("nan"), "a number"),
        ("dpm++", "beta_dropout", 1, "no setting of that name"),
    ],
)
def test_refuses_a_setting_it_cannot_honour(name: str, setting: str, value: Any, supported: str) -> None:
    with pytest.raises(UsageError) as caught:
        make_scheduler(make_config(name, {setting: value}), 10)
    for part in (f"`{setting}`", repr(value), supported):
        assert part in str(caught.value)


def test_refuses_a_threshold_out_of_range() -> None:
    for setting, value in (("dynamic_thresholding_ratio", 1.5), ("sample_max_value", 0.0)):
        with pytest.raises(UsageError, match=setting):
            make_scheduler(make_config("ddim", {setting: value}, thresholding=True), 10)


def test_refuses_a_stochastic_third_order() -> None:
    """diffusers' formula for it has a coefficient of -1 where h is 0."""
    with pytest.raises(UsageError, match="solver_order"):
        new_scheduler(make_config("dpm++", algorithm_type="sde-dpmsolver++", solver_order=3), 10)


@pytest.mark.parametrize("second", ["use_lu_lambdas", "use_exponential_sigmas", "use_beta_sigmas"])
def test_refuses_two_level_spacings(second: str) -> None:
    with pytest.raises(UsageError, match=second):
        make_scheduler(make_config("dpm++", {"use_karras_sigmas": True, second: True}), 10)


def test_refuses_sigmas_that_do_not_fall() -> None:
    with pytest.raises(UsageError, match="sigma_min"):
        make_scheduler(make_config("dpm++", use_karras_sigmas=True, sigma_min=2.0, sigma_max=1.0), 10)


def test_refuses_epsilon_where_nothing_is_left_of_the_signal() -> None:
    with pytest.raises(UsageError, match="v_prediction"):
        make_scheduler(make_config("ddim", rescale_betas_zero_snr=True, timestep_spacing="trailing"), 10)


@pytest.mark.parametrize("class_name", ["HeunDiscreteScheduler", ["PNDMScheduler"], None])
def test_refuses_another_class(class_name: str | None) -> None:
    with pytest.raises(UsageError, match="PNDMScheduler, DDIMScheduler, DPMSolverMultistepScheduler"):
        make_scheduler({"_class_name": class_name}, 10)


def test_refuses_an_unknown_scheduler_name() -> None:
    with pytest.raises(UsageError, match=r"pndm, ddim, dpm\+\+"):
        replace_scheduler({}, "heun")


@pytest.mark.parametrize("name", CLASS_NAMES)
@pytest.mark.parametrize("steps", [-1, 0, 1001])
def test_refuses_a_step_count_out_of_range(name: str, steps: int) -> None:
    with pytest.raises(RequestError, match=f"got {steps}, expected 1 to 1000"):
        make_scheduler(make_config(name), steps)


@pytest.mark.parametrize(
    ("config", "steps"),
    [
        (make_config("pndm", SD, skip_prk_steps=True), 1000),  # steps_offset=1 would reach timestep 1000
        (make_config("ddim", SD), 1000),
        (make_config("pndm"), 3),  # a Runge-Kutta start takes 4
        (make_config("dpm++"), 1000),  # 1001 levels out of 1000: diffusers divides by 0
        (make_config("dpm++", timestep_spacing="leading"), 1000),
    ],
    ids=str,
)
def test_refuses_steps_that_the_spacing_cannot_place(config: Config, steps: int) -> None:
    with pytest.raises(RequestError, match="steps"):
        make_scheduler(config, steps)


@pytest.mark.parametrize(("name", "eta"), [("ddim", -0.1), ("ddim", 1.1), ("ddim", float("nan")), ("pndm", 0.5)])
def test_refuses_an_eta_it_cannot_serve(name: str, eta: float) -> None:
    with pytest.raises(RequestError, match="eta"):
        make_scheduler(make_config(name, skip_prk_steps=True), 10, eta=eta, rng=np.random.default_rng(0))


def test_noise_needs_a_generator() -> None:
    with pytest.raises(UsageError, match="rng"):
        make_scheduler(make_config("ddim"), 10, eta=0.5)
    with pytest.raises(UsageError, match="rng"):
        make_scheduler(make_config("dpm++", algorithm_type="sde-dpmsolver++"), 10)
    for name in ("euler-a", "lcm"):
        with pytest.raises(UsageError, match="rng"):
            make_scheduler(make_config(name), 10)
