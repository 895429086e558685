"""Rectified flow: times, schedules, guidance and Euler steps equal those of diffusers."""

import pytest
import torch

from mos import guide, make_schedule, sample_t

diffusers = pytest.importorskip("diffusers")


@pytest.mark.parametrize("steps", (2, 3, 8, 25, 50))
def test_linear_quadratic(steps):
    """The schedule of Movie Gen equals the one in diffusers' pipeline of Mochi."""
    from diffusers.pipelines.mochi.pipeline_mochi import linear_quadratic_schedule
    expected = [*linear_quadratic_schedule(steps, 0.025), 0.0]
    assert make_schedule(steps, "linear-quadratic") == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("shift", (1.0, 3.0))
@pytest.mark.parametrize("steps", (1, 4, 50))
def test_uniform(steps, shift):
    """The uniform schedule equals the scheduler's (whose set_timesteps would shift it again)."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(steps, shift)
    times = make_schedule(steps, "uniform", shift)
    assert times[:-1] == pytest.approx(scheduler.sigmas.tolist(), abs=1e-6)
    assert times[-1] == 0


def test_euler():
    """All steps from noise to data agree, with a velocity that depends on z and on time."""
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
    """Equal random numbers give equal training times."""
    from diffusers.training_utils import compute_density_for_timestep_sampling
    expected = compute_density_for_timestep_sampling(
        batch_size=1000, generator=torch.Generator().manual_seed(3), **theirs)
    times = sample_t(1000, how, 1.0, torch.Generator().manual_seed(3))
    torch.testing.assert_close(times, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rescale", (0.0, 0.7, 1.0))
def test_guidance(rescale):
    """Guidance and its rescaling equal those of diffusers."""
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
    v_c, v_u = torch.randn(2, 3, 6, 4, 5, generator=torch.Generator().manual_seed(0))
    expected = rescale_noise_cfg(v_u + 6.0 * (v_c - v_u), v_c, rescale)
    torch.testing.assert_close(guide(v_c, v_u, 6.0, rescale), expected, rtol=1e-5, atol=1e-6)
