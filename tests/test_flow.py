"""Rectified flow: times, schedules, guidance and Euler steps are those of diffusers."""

import pytest
import torch

from mos import guide, make_schedule, sample_t

diffusers = pytest.importorskip("diffusers")


@pytest.mark.parametrize("steps", (2, 3, 8, 25, 50))
def test_linear_quadratic(steps):
    """Movie Gen's schedule, as the pipeline of Mochi has it."""
    from diffusers.pipelines.mochi.pipeline_mochi import linear_quadratic_schedule
    expected = [*linear_quadratic_schedule(steps, 0.025), 0.0]
    assert make_schedule(steps, "linear-quadratic") == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("shift", (1.0, 3.0))
@pytest.mark.parametrize("steps", (1, 4, 50))
def test_uniform(steps, shift):
    """Shifted once. (The scheduler's set_timesteps would do it again.)"""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(steps, shift)
    found = make_schedule(steps, "uniform", shift)
    assert found[:-1] == pytest.approx(scheduler.sigmas.tolist(), abs=1e-6) and found[-1] == 0


def test_euler():
    """A whole way from noise to data with a velocity that depends on place and time."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(1000, shift=1.0)
    times = make_schedule(7, "uniform", 3.0)
    scheduler.set_timesteps(sigmas=times[:-1])
    z = theirs = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for now, then, t in zip(times, times[1:], scheduler.timesteps):
        z = z + (then - now) * (z.sin() - now)
        theirs = scheduler.step(theirs.sin() - now, t, theirs).prev_sample
    torch.testing.assert_close(z, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how, theirs", (
    ("logit-normal", dict(weighting_scheme="logit_normal", logit_mean=0.0, logit_std=1.0)),
    ("mode", dict(weighting_scheme="mode", mode_scale=0.8))))
def test_densities(how, theirs):
    """The same training times from the same random numbers."""
    from diffusers.training_utils import compute_density_for_timestep_sampling
    expected = compute_density_for_timestep_sampling(
        batch_size=1000, generator=torch.Generator().manual_seed(3), **theirs)
    found = sample_t(1000, how, 1.0, torch.Generator().manual_seed(3))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rescale", (0.0, 0.7, 1.0))
def test_guidance(rescale):
    """Guidance and its rescaling."""
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
    v_c, v_u = torch.randn(2, 3, 6, 4, 5, generator=torch.Generator().manual_seed(0))
    expected = rescale_noise_cfg(v_u + 6.0 * (v_c - v_u), v_c, rescale)
    torch.testing.assert_close(guide(v_c, v_u, 6.0, rescale), expected, rtol=1e-5, atol=1e-6)
