import math

import pytest
import torch
from conftest import shake
from torch.distributions import Normal, kl_divergence

from diffusion_head import (
    SOLVERS,
    DiffusionHead,
    GaussianDiffusion,
    check_solver,
    cosine_alphas_cumprod,
    discretized_nll,
    gaussian_kl,
    normal_cdf,
)

STEPS = [1, 2, 7, 100, 1000]


@pytest.fixture
def head():
    return shake(DiffusionHead(4, 8, 2, 16, sampling_steps=10), seed=2)


@pytest.fixture
def z():
    return torch.randn(6, 8, generator=torch.Generator().manual_seed(0))


def draws(seed):
    generator = torch.Generator().manual_seed(seed)
    return lambda shape: torch.randn(shape, generator=generator)


# ---- the diffusion process -------------------------------------------------------------------------------

def alpha_bar(t):
    """ᾱ_t of the cosine schedule in closed form, for t from -1 (no noise): only the last β is clipped."""
    if t == 999:
        return 0.001 * alpha_bar(998)
    angle = ((t + 1) / 1000 + 0.008) / 1.008 * math.pi / 2
    return (math.cos(angle) / math.cos(0.008 / 1.008 * math.pi / 2)) ** 2


def process(num_steps):
    """(t, ᾱ, ᾱ of the step before, β, posterior variance) of each step."""
    steps, previous = [], 1.0
    for i in range(num_steps):
        t = round(i * 999 / max(1, num_steps - 1))
        beta = 1 - alpha_bar(t) / previous
        # Bayes: precisions add up. x_t given x_{t-1} has variance β and slope √(1 - β).
        precision = (1 - beta) / beta + (1 / (1 - previous) if i else math.inf)
        steps.append((t, alpha_bar(t), previous, beta, 1 / precision))
        previous = alpha_bar(t)
    return steps


def test_alphas_cumprod():
    expected = torch.tensor([alpha_bar(t) for t in range(1000)], dtype=torch.float64)
    assert torch.allclose(torch.from_numpy(cosine_alphas_cumprod()), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("num_steps", STEPS)
def test_constants_of_every_step(num_steps):
    diffusion = GaussianDiffusion(num_steps)
    steps = process(num_steps)
    assert diffusion.timesteps.tolist() == [t for t, *_ in steps]
    expected = {
        "sqrt_alphas_cumprod": [math.sqrt(a) for _, a, *_ in steps],
        "sqrt_one_minus_alphas_cumprod": [math.sqrt(1 - a) for _, a, *_ in steps],
        "sqrt_recip_alphas_cumprod": [1 / math.sqrt(a) for _, a, *_ in steps],
        "sqrt_recipm1_alphas_cumprod": [math.sqrt(1 / a - 1) for _, a, *_ in steps],
        "log_betas": [math.log(beta) for *_, beta, _ in steps],
        "posterior_log_variance": [math.log(max(variance, 1e-300)) for *_, variance in steps],
    }
    if num_steps > 1:
        expected["posterior_log_variance"][0] = expected["posterior_log_variance"][1]
    for name, values in expected.items():
        assert getattr(diffusion, name).tolist() == pytest.approx(values, rel=2e-7, abs=1e-12), name


@pytest.mark.parametrize("num_steps", [0, -1, 1001])
def test_impossible_numbers_of_steps_are_refused(num_steps):
    with pytest.raises(ValueError, match=f"{num_steps} diffusion steps .* expected 1 to 1000"):
        GaussianDiffusion(num_steps)
    with pytest.raises(ValueError, match=f"{num_steps} diffusion steps"):
        DiffusionHead(4, 8, 1, 16, sampling_steps=num_steps)


@pytest.mark.parametrize("num_steps", STEPS)
def test_predict_x0_inverts_q_sample(num_steps):
    diffusion = GaussianDiffusion(num_steps)
    torch.manual_seed(0)
    x0, noise = torch.randn(num_steps, 3).double(), torch.randn(num_steps, 3).double()
    t = torch.arange(num_steps)
    x_t = diffusion.q_sample(x0, t, noise)
    # Rounding of the float32 constants is multiplied by √(1/ᾱ), which is 20,000 at the end.
    error = (diffusion.predict_x0(x_t, t, noise) - x0).abs() / diffusion.sqrt_recip_alphas_cumprod[:, None]
    assert error.max() < 1e-6
    last = num_steps - 1
    # An int is a step for all rows.
    assert torch.allclose(diffusion.q_sample(x0, last, noise)[last], x_t[last])


@pytest.mark.parametrize("num_steps", STEPS[1:])
def test_the_posterior_mean_is_that_of_bayes(num_steps):
    """The means of x_{t-1} given x_0 and of x_t given x_{t-1}, weighted with the precisions."""
    torch.manual_seed(0)
    x0, x_t = torch.randn(num_steps, 3), torch.randn(num_steps, 3)
    mean = GaussianDiffusion(num_steps).q_posterior_mean(x0, x_t, torch.arange(num_steps))
    assert torch.allclose(mean[0], x0[0], atol=1e-6), "the last step leads to x_0"
    for i, (_, _, previous, beta, variance) in list(enumerate(process(num_steps)))[1:]:
        from_x0 = math.sqrt(previous) * x0[i] / (1 - previous)
        from_x_t = math.sqrt(1 - beta) * x_t[i] / beta
        assert torch.allclose(mean[i], variance * (from_x0 + from_x_t), atol=2e-6), i


def test_the_ends_of_the_learned_variance():
    diffusion, t = GaussianDiffusion(100), torch.arange(1, 100)
    low, middle, high = (diffusion.log_variance(torch.full((99, 1), v), t)[:, 0] for v in (-1.0, 0.0, 1.0))
    steps = process(100)[1:]
    assert low.tolist() == pytest.approx([math.log(variance) for *_, variance in steps], rel=1e-6)
    assert high.tolist() == pytest.approx([math.log(beta) for *_, beta, _ in steps], rel=1e-6)
    assert torch.allclose(middle, (low + high) / 2)


# ---- the loss --------------------------------------------------------------------------------------------

def test_kl_of_two_gaussians():
    torch.manual_seed(0)
    mean1, logvar1, mean2, logvar2 = torch.randn(4, 50)
    p, q = Normal(mean1, (logvar1 / 2).exp()), Normal(mean2, (logvar2 / 2).exp())
    kl = gaussian_kl(mean1, logvar1, mean2, logvar2)
    assert torch.allclose(kl, kl_divergence(p, q), rtol=1e-4, atol=1e-6)


def test_the_bins_of_the_likelihood():
    u = torch.linspace(-4, 4, 100)
    assert torch.allclose(normal_cdf(u), Normal(0.0, 1.0).cdf(u), atol=2e-4)
    assert normal_cdf(torch.tensor(1.0)).item() == pytest.approx(0.8411920, abs=1e-6), "erf: 0.8413447"
    grey = torch.arange(256) * 2 / 255 - 1
    mean, logvar = torch.tensor(0.3), torch.tensor(-2.0)
    probability = (-discretized_nll(grey, mean, logvar)).exp()
    assert probability.sum().item() == pytest.approx(1, abs=1e-5), "256 grey levels and open ends"
    normal = Normal(0.3, math.exp(-1))
    inside = normal.cdf(grey[1:-1] + 1 / 255) - normal.cdf(grey[1:-1] - 1 / 255)
    assert torch.allclose(probability[1:-1], inside, atol=1e-5)
    assert probability[-1].item() == pytest.approx(1 - normal.cdf(grey[-1] - 1 / 255).item(), abs=3e-4)
    impossible = discretized_nll(torch.tensor(0.9), torch.tensor(-9.0), logvar)
    assert impossible.item() == pytest.approx(-math.log(1e-12), abs=1e-3)


def test_masked_rows_do_not_count(head):
    torch.manual_seed(0)
    z, x, noise = torch.randn(12, 8), torch.randn(12, 4), torch.randn(12, 4)
    t = torch.randint(1000, (12,))
    t[0] = 0
    mask = torch.arange(12) % 3 != 1
    masked = head.loss(z, x, mask, t=t, noise=noise)
    assert torch.allclose(masked, head.loss(z[mask], x[mask], t=t[mask], noise=noise[mask]))
    assert torch.equal(masked, head.loss(z, x.masked_fill(~mask[:, None], 1e3), mask, t=t, noise=noise))


def test_the_loss_draws_its_own_steps_and_noise(head, z):
    x = torch.randn(6, 4)
    torch.manual_seed(0)
    t, noise = torch.randint(1000, (6,)), torch.randn(6, 4)
    torch.manual_seed(0)
    assert torch.equal(head.loss(z, x), head.loss(z, x, t=t, noise=noise))


def test_the_bound_trains_the_variance_only(head, z):
    """Without the ε error, gradients reach the last layer's v rows and leave its ε rows alone."""
    torch.manual_seed(0)
    x, noise, t = torch.randn(6, 4), torch.randn(6, 4), torch.tensor([0, 1, 5, 100, 500, 999])
    with torch.no_grad():       # noise that the network predicts exactly makes the ε error's gradient vanish
        for _ in range(200):
            x_t = head.training_diffusion.q_sample(x, t, noise)
            noise = (head.net(x_t, t, z)[:, :4] + noise) / 2
    head.loss(z, x, t=t, noise=noise).backward()
    gradient = head.net.final_layer.linear.weight.grad
    assert gradient[4:].norm() > 1e-3 and gradient[:4].norm() < 1e-4 * gradient[4:].norm()


def test_a_new_head_predicts_no_noise_and_no_preference(z):
    torch.manual_seed(0)
    head = DiffusionHead(4, 8, 2, 16)
    assert not head.net(torch.randn(6, 4), torch.arange(6), z).any()
    assert head.net.input_proj.weight.any() and head.net.time_embed.mlp[0].weight.any()


def test_the_loss_is_float32_under_autocast(head, z):
    torch.manual_seed(0)
    x, noise, t = torch.randn(6, 4), torch.randn(6, 4), torch.tensor([0, 1, 5, 100, 500, 999])
    exact = head.loss(z, x, t=t, noise=noise)
    with torch.autocast("cpu", torch.bfloat16):
        half = head.loss(z, x, t=t, noise=noise)
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(exact.item(), rel=0.01)           # 0.005


# ---- sampling --------------------------------------------------------------------------------------------

def test_sampling_is_reproducible(head, z):
    sample = head.sample(z, noise_fn=draws(1))
    assert sample.shape == (6, 4) and torch.equal(sample, head.sample(z, noise_fn=draws(1)))
    assert not torch.equal(sample, head.sample(z, noise_fn=draws(2)))
    torch.manual_seed(1)
    without = head.sample(z)
    assert torch.equal(without, head.sample(z, noise_fn=draws(1))), "torch's own generator by default"


@torch.no_grad()
def test_guidance_moves_the_noise_and_keeps_the_variance(head, z, monkeypatch):
    """A network of constants tells conditional rows (ε 2, v 1) from unconditional ones (ε 1, v -1)."""
    def constant(x, t, z):
        conditional = torch.arange(len(x)) < len(x) // 2
        eps = torch.where(conditional, 2.0, 1.0)[:, None].expand(-1, 4)
        return torch.cat([eps, 2 * eps - 3], dim=1)
    head.x0_clip = 3.0
    monkeypatch.setattr(head.net, "forward", constant)
    sample = head.sample(z, cfg=3.0, noise_fn=draws(1))
    guided = torch.tensor([4.0] * 4 + [1.0] * 4)
    monkeypatch.setattr(head.net, "forward", lambda x, t, z: guided.expand(len(x), 8))
    assert torch.allclose(sample, head.sample(z[:3], noise_fn=draws(1))), "1 + 3 · (2 - 1) is 4"
    assert not torch.allclose(sample, head.sample(z[:3], noise_fn=draws(2)), atol=0.1)


def test_guidance_between_equal_halves_is_none(head, z):
    plain = head.sample(z, noise_fn=draws(1))
    assert torch.allclose(head.sample(torch.cat([z, z]), cfg=3.0, noise_fn=draws(1)), plain, atol=1e-4)


def test_x0_is_clamped_if_asked_for(head, z):
    assert head.sample(z, cfg=7.0, noise_fn=draws(1)).abs().max() > 1
    head.x0_clip = 0.5
    clamped = head.sample(z, cfg=7.0, noise_fn=draws(1))
    assert clamped.abs().max().item() == pytest.approx(0.5), "the last step returns x_0 itself"


@pytest.mark.parametrize("solver, num_draws", [("ancestral", 5), ("ddim", 1), ("dpm++", 1)])
def test_number_of_draws(head, z, solver, num_draws):
    shapes = []

    def noise_fn(shape):
        shapes.append(tuple(shape))
        return torch.randn(shape)
    head.sample(z, cfg=2.0, noise_fn=noise_fn, solver=solver, num_sampling_steps=5)
    assert shapes == [(3, 4)] * num_draws


def test_the_number_of_steps_can_be_chosen(head, z):
    ten = head.sample(z, noise_fn=draws(1), num_sampling_steps=10)
    assert torch.equal(ten, head.sample(z, noise_fn=draws(1)))
    other = shake(DiffusionHead(4, 8, 2, 16, sampling_steps=5), seed=2)
    five = head.sample(z, noise_fn=draws(1), num_sampling_steps=5)
    assert torch.equal(five, other.sample(z, noise_fn=draws(1)))
    assert head.sampling_diffusion.num_steps == 10
    with pytest.raises(ValueError, match="0 diffusion steps"):
        head.sample(z, num_sampling_steps=0)


def test_unknown_solvers_and_ignored_temperatures_are_refused(head, z):
    with pytest.raises(ValueError, match=r"solver is 'euler'; known: ancestral, ddim, dpm\+\+"):
        head.sample(z, solver="euler")
    with pytest.raises(ValueError, match="temperature is 0.9, but solver 'ddim' adds no noise"):
        head.sample(z, solver="ddim", temperature=0.9)
    check_solver("ancestral", 0.9)


def ideal(diffusion, mean=0.4, std=0.5):
    """The best prediction of x_0 for data from N(mean, std²), with the posterior's variance."""
    def predict(x, i):
        a, sigma = diffusion.sqrt_alphas_cumprod[i], diffusion.sqrt_one_minus_alphas_cumprod[i]
        gain = a * std ** 2 / (a ** 2 * std ** 2 + sigma ** 2)
        return mean + gain * (x - a * mean), torch.full_like(x, -1.0)
    return predict


@pytest.mark.parametrize("temperature, spread", [(1.0, 0.5), (0.0, 0.0)])
def test_ancestral_sampling_draws_from_the_data(temperature, spread):
    diffusion, draw = GaussianDiffusion(500), draws(0)
    sample = SOLVERS["ancestral"](ideal(diffusion), diffusion, lambda: draw((10000, 1)), temperature)
    assert sample.mean().item() == pytest.approx(0.4, abs=0.02)
    assert sample.std().item() == pytest.approx(spread, abs=0.02)


@pytest.mark.parametrize("solver, order", [("ddim", 1), ("dpm++", 2)])
def test_solvers_converge_to_the_exact_flow(solver, order):
    """Of data from N(0.4, 0.5²), (x_0 - 0.4) / 0.5 = (x_T - 0.4 √ᾱ) / deviation of x_T."""
    start = torch.linspace(-2, 2, 9)[:, None]

    def error(num_steps):
        diffusion = GaussianDiffusion(num_steps)
        a, sigma = diffusion.sqrt_alphas_cumprod[-1], diffusion.sqrt_one_minus_alphas_cumprod[-1]
        exact = 0.4 + 0.5 * (start - 0.4 * a) / (0.25 * a ** 2 + sigma ** 2).sqrt()
        sample = SOLVERS[solver](ideal(diffusion), diffusion, lambda: start, 1.0)
        return (sample - exact).abs().max().item()
    assert error(50) < 0.04
    # Half the step: half the error, or a quarter.
    assert error(100) < error(50) / (1.9 if order == 1 else 3.8)


def test_a_bfloat16_head_diffuses_in_float32(head):
    z = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    x, t = torch.randn(64, 4, generator=torch.Generator().manual_seed(1)), torch.arange(64) * 15
    exact_out, exact = head.net(x, t, z), head.sample(z, noise_fn=draws(1))
    head.bfloat16()
    out, sample = head.net(x, t, z.bfloat16()), head.sample(z.bfloat16(), noise_fn=draws(1))
    assert out.dtype == torch.bfloat16 and sample.dtype == torch.float32
    assert (out - exact_out).norm() < 0.03 * exact_out.norm()               # 0.008
    assert (sample - exact).norm() < 0.02 * exact.norm()                    # 0.006
