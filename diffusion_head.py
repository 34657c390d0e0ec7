"""Diffusion head: a small MLP that turns one decoder vector into a sample of one latent token.

Paper: "Autoregressive Image Generation without Vector Quantization" (MAR, 2406.11838), section 3:
SimpleMLPAdaLN. Diffusion: "Improved DDPM" (2102.09672), cosine schedule and learned variance. Parameter names
are MAR's.

Letters: M tokens (rows), C latent channels, D condition width, W head width, T = 1000 training steps, S
sampling steps.
"""
import math

import numpy as np
import torch
from torch import nn

T = 1000


# ---- the network ---------------------------------------------------------------------------------

def modulate(x, shift, scale):
    return x * (1 + scale) + shift


class TimestepEmbedder(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):                                                   # (M,)
        i = torch.arange(128, dtype=torch.float32, device=t.device)
        frequencies = torch.exp(-math.log(10000) / 128 * i)                 # (128,)
        angles = t[:, None].float() * frequencies                           # (M, 128)
        features = torch.cat([angles.cos(), angles.sin()], dim=1)           # (M, 256)
        return self.mlp(features.to(self.mlp[0].weight.dtype))              # (M, W)


class ResBlock(nn.Module):
    """A residual MLP block with adaptive layer norm: shift, scale and gate come from time and condition."""

    def __init__(self, width):
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, x, y):                                                # (M, W), (M, W)
        shift, scale, gate = self.adaLN_modulation(y).chunk(3, dim=1)
        return x + gate * self.mlp(modulate(self.in_ln(x), shift, scale))


class FinalLayer(nn.Module):
    def __init__(self, width, out_dim):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(width, out_dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, y):                                                # (M, W), (M, W)
        shift, scale = self.adaLN_modulation(y).chunk(2, dim=1)
        return self.linear(modulate(self.norm(x), shift, scale))


class SimpleMLPAdaLN(nn.Module):
    """x (M, C) noisy tokens, t (M,) of the 1000 steps, z (M, D) conditions -> (M, 2C): ε and v."""

    def __init__(self, token_dim, cond_dim, depth, width):
        super().__init__()
        self.time_embed = TimestepEmbedder(width)
        self.cond_embed = nn.Linear(cond_dim, width)
        self.input_proj = nn.Linear(token_dim, width)
        self.res_blocks = nn.ModuleList(ResBlock(width) for _ in range(depth))
        self.final_layer = FinalLayer(width, 2 * token_dim)
        self.init_weights()

    def forward(self, x, t, z):
        x = self.input_proj(x.to(self.input_proj.weight.dtype))             # (M, W)
        y = self.time_embed(t) + self.cond_embed(z)                         # (M, W)
        for block in self.res_blocks:
            x = block(x, y)
        return self.final_layer(x, y)                                       # (M, 2C)

    def init_weights(self):
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.time_embed.mlp[0].weight, std=0.02)
        nn.init.normal_(self.time_embed.mlp[2].weight, std=0.02)
        # Modulations and output start at zero: every block is the identity, and the head predicts ε = 0.
        for layer in (*self.res_blocks, self.final_layer):
            nn.init.zeros_(layer.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)


# ---- the diffusion process -----------------------------------------------------------------------

def cosine_alphas_cumprod():
    """ᾱ_0 … ᾱ_999 of the cosine schedule, float64."""
    t = np.arange(T + 1) / T
    alpha_bar = np.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    betas = np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)
    return np.cumprod(1 - betas)


class GaussianDiffusion:
    """A diffusion process with S of the T steps, evenly spaced. Constants are float32 (S,), by step."""

    def __init__(self, num_steps=T):
        if not 1 <= num_steps <= T:
            raise ValueError(f"{num_steps} diffusion steps are asked for; expected 1 to {T}")
        stride = (T - 1) / max(1, num_steps - 1)
        timesteps = np.array([round(i * stride) for i in range(num_steps)])
        alphas_cumprod = cosine_alphas_cumprod()[timesteps]
        alphas_cumprod_prev = np.append(1.0, alphas_cumprod[:-1])
        betas = 1 - alphas_cumprod / alphas_cumprod_prev
        posterior_variance = betas * (1 - alphas_cumprod_prev) / (1 - alphas_cumprod)
        # β̃ is 0 at the first step; use the second step's value so that its log is finite.
        posterior_variance[0] = posterior_variance[min(1, num_steps - 1)]
        posterior_variance = np.maximum(posterior_variance, 1e-300)         # S = 1 has no second step

        def constant(values):
            return torch.from_numpy(values).float()
        self.num_steps = num_steps
        self.timesteps = torch.from_numpy(timesteps)                        # of the 1000; for the network
        self.sqrt_alphas_cumprod = constant(np.sqrt(alphas_cumprod))
        self.sqrt_one_minus_alphas_cumprod = constant(np.sqrt(1 - alphas_cumprod))
        self.sqrt_recip_alphas_cumprod = constant(np.sqrt(1 / alphas_cumprod))
        self.sqrt_recipm1_alphas_cumprod = constant(np.sqrt(1 / alphas_cumprod - 1))
        self.posterior_mean_coef1 = constant(betas * np.sqrt(alphas_cumprod_prev) / (1 - alphas_cumprod))
        self.posterior_mean_coef2 = constant(
            (1 - alphas_cumprod_prev) * np.sqrt(alphas_cumprod / alphas_cumprod_prev) / (1 - alphas_cumprod))
        self.log_betas = constant(np.log(betas))
        self.posterior_log_variance = constant(np.log(posterior_variance))

    # t is a step of this process: an int, the same for all rows, or an int64 tensor (M,).

    def at(self, constants, t, x):
        """The constants at t, to be multiplied with x (M, C)."""
        return constants[t].item() if isinstance(t, int) else constants.to(x.device)[t][:, None]

    def q_sample(self, x0, t, noise):
        """x_t = √ᾱ x_0 + √(1 - ᾱ) noise."""
        return (self.at(self.sqrt_alphas_cumprod, t, x0) * x0
                + self.at(self.sqrt_one_minus_alphas_cumprod, t, x0) * noise)

    def predict_x0(self, x_t, t, eps):
        """x_0 = x_t / √ᾱ - √(1/ᾱ - 1) ε."""
        return (self.at(self.sqrt_recip_alphas_cumprod, t, x_t) * x_t
                - self.at(self.sqrt_recipm1_alphas_cumprod, t, x_t) * eps)

    def q_posterior_mean(self, x0, x_t, t):
        """The mean of q(x_{t-1} | x_t, x_0)."""
        return (self.at(self.posterior_mean_coef1, t, x_t) * x0
                + self.at(self.posterior_mean_coef2, t, x_t) * x_t)

    def log_variance(self, v, t):
        """The learned log variance: v = -1 gives the posterior's, v = 1 gives log β."""
        fraction = (v + 1) / 2
        return (fraction * self.at(self.log_betas, t, v)
                + (1 - fraction) * self.at(self.posterior_log_variance, t, v))


def gaussian_kl(mean1, logvar1, mean2, logvar2):
    """KL divergence of two Gaussians, in nats."""
    squared_error = (mean1 - mean2) ** 2 * torch.exp(-logvar2)
    return 0.5 * (logvar2 - logvar1 - 1 + torch.exp(logvar1 - logvar2) + squared_error)


def normal_cdf(u):
    """The tanh approximation that the original's likelihood uses."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u ** 3)))


def discretized_nll(x, mean, logvar):
    """-log probability of the bin x ± 1/255 under a Gaussian, in nats; the outermost bins are open."""
    inv_std = torch.exp(-0.5 * logvar)
    upper = normal_cdf(inv_std * (x - mean + 1 / 255))
    lower = normal_cdf(inv_std * (x - mean - 1 / 255))
    probability = torch.where(x > 0.999, 1 - lower, upper - lower)
    probability = torch.where(x < -0.999, upper, probability)
    return -probability.clamp(min=1e-12).log()


# ---- samplers: x_T -> x_0, from the prediction (x_0, v) at each step -----------------------------

def ancestral(predict, diffusion, draw_noise, temperature):
    """DDPM: draw x_{t-1} from q(x_{t-1} | x_t, x_0) with the predicted x_0 and the learned variance."""
    x = draw_noise()
    for i in reversed(range(diffusion.num_steps)):
        x0, v = predict(x, i)
        x = diffusion.q_posterior_mean(x0, x, i)
        if i > 0:                                                           # no noise at the last step
            std = torch.exp(0.5 * diffusion.log_variance(v, i))
            x = x + std * draw_noise() * temperature
    return x


def ddim(predict, diffusion, draw_noise, temperature):
    """DDIM (2010.02502): no noise but the start. Keep the predicted x_0 and ε, at the next smaller noise."""
    alphas = diffusion.sqrt_alphas_cumprod.tolist()
    sigmas = diffusion.sqrt_one_minus_alphas_cumprod.tolist()
    x = draw_noise()
    for i in reversed(range(1, diffusion.num_steps)):
        x0, _ = predict(x, i)
        eps = (x - alphas[i] * x0) / sigmas[i]
        x = alphas[i - 1] * x0 + sigmas[i - 1] * eps
    x0, _ = predict(x, 0)
    return x0


def dpmpp(predict, diffusion, draw_noise, temperature):
    """DPM-Solver++(2M), algorithm 2 of 2211.01095: DDIM with x_0 extrapolated from the last two steps."""
    alphas = diffusion.sqrt_alphas_cumprod.tolist()
    sigmas = diffusion.sqrt_one_minus_alphas_cumprod.tolist()
    log_snr = [math.log(alpha / sigma) for alpha, sigma in zip(alphas, sigmas)]
    x, last_x0 = draw_noise(), None
    for i in reversed(range(1, diffusion.num_steps)):
        x0, _ = predict(x, i)
        h = log_snr[i - 1] - log_snr[i]
        target = x0
        if last_x0 is not None:
            last_h = log_snr[i] - log_snr[i + 1]
            target = x0 + h / (2 * last_h) * (x0 - last_x0)
        x = sigmas[i - 1] / sigmas[i] * x - alphas[i - 1] * math.expm1(-h) * target
        last_x0 = x0
    x0, _ = predict(x, 0)
    return x0


SOLVERS = {"ancestral": ancestral, "ddim": ddim, "dpm++": dpmpp}


def check_solver(solver, temperature):
    """Raise ValueError for an unknown solver, and for a temperature that the solver would ignore."""
    if solver not in SOLVERS:
        raise ValueError(f"solver is {solver!r}; known: {', '.join(SOLVERS)}")
    if solver != "ancestral" and temperature != 1:
        raise ValueError(f"temperature is {temperature}, but solver {solver!r} adds no noise to scale")


# ---- the head ------------------------------------------------------------------------------------

class DiffusionHead(nn.Module):
    """`.net` in the model's dtype, the diffusion in float32.

    sampling_steps: S, 100 in the official models. x0_clip: clamp the predicted x_0 to ± this in sampling,
    None in the official models. Near t = 1000 an error in ε is multiplied by up to 20,000, and the clamp
    bounds that.
    """

    def __init__(self, token_dim, cond_dim, depth, width, sampling_steps=100, x0_clip=None):
        super().__init__()
        self.token_dim = token_dim
        self.x0_clip = x0_clip
        self.net = SimpleMLPAdaLN(token_dim, cond_dim, depth, width)
        self.training_diffusion = GaussianDiffusion(T)
        self.sampling_diffusion = GaussianDiffusion(sampling_steps)

    def loss(self, z, target, mask=None, *, t=None, noise=None):
        """Mean over rows of the ε error and of the variational bound, in bits per channel; a float32 scalar.

        z (M, D) conditions, target (M, C) clean tokens, mask (M,) the rows that count (None: all), t (M,) int
        steps in [0, 1000) and noise (M, C), drawn if not given.
        """
        if mask is not None:
            z, target = z[mask], target[mask]
            t = None if t is None else t[mask]
            noise = None if noise is None else noise[mask]
        x0 = target.float()
        t = torch.randint(T, (len(x0),), device=x0.device) if t is None else t
        noise = torch.randn_like(x0) if noise is None else noise.float()

        diffusion = self.training_diffusion
        x_t = diffusion.q_sample(x0, t, noise)
        eps, v = self.net(x_t, t, z).float().chunk(2, dim=1)                # (M, C), (M, C)
        with torch.autocast(x0.device.type, enabled=False):
            mse = (noise - eps).square().mean(dim=1)                        # (M,)

            # The bound trains v only, so its mean is computed from a detached ε.
            true_mean = diffusion.q_posterior_mean(x0, x_t, t)
            true_logvar = diffusion.at(diffusion.posterior_log_variance, t, x_t)
            mean = diffusion.q_posterior_mean(diffusion.predict_x0(x_t, t, eps.detach()), x_t, t)
            logvar = diffusion.log_variance(v, t)
            kl = gaussian_kl(true_mean, true_logvar, mean, logvar)
            nll = discretized_nll(x0, mean, logvar)
            bound = torch.where(t[:, None] == 0, nll, kl).mean(dim=1) / math.log(2)
            return (mse + bound).mean()

    @torch.no_grad()
    def sample(self, z, *, temperature=1.0, cfg=1.0, noise_fn=None, solver="ancestral",
               num_sampling_steps=None):
        """Draw a token for each condition: float32 (M, C).

        z (M, D), or with cfg != 1 (2M, D) = [conditional; unconditional]. temperature: factor on the noise of
        each step. noise_fn(shape) -> tensor gives every Gaussian draw: the start (M, C), then, for the
        ancestral solver, one for each step but the last. solver: a name in SOLVERS; ddim and dpm++ add no
        noise. num_sampling_steps: default the constructor's. Raises ValueError for an unknown solver or
        number of steps, and where NaN or infinity come out.
        """
        check_solver(solver, temperature)
        guided = cfg != 1
        M = len(z) // 2 if guided else len(z)
        diffusion = self.sampling_diffusion
        if num_sampling_steps is not None:
            diffusion = GaussianDiffusion(num_sampling_steps)
        denoise = self.denoiser(z, diffusion.timesteps.to(z.device))

        def predict(x, i):
            """x_t (M, C) at step i -> the predicted x_0 and the variance mix v, both (M, C)."""
            out = denoise(torch.cat([x, x]) if guided else x, i).float()
            # Infinity becomes NaN, because the clamp below and exp would hide it.
            eps, v = out.nan_to_num(math.nan, math.nan, math.nan).chunk(2, dim=1)
            if guided:
                # Guidance changes ε only; v is the conditional rows' (2207.12598).
                cond_eps, uncond_eps = eps.chunk(2)
                eps = uncond_eps + cfg * (cond_eps - uncond_eps)
                v = v[:M]
            x0 = diffusion.predict_x0(x, i, eps)
            if self.x0_clip is not None:
                x0 = x0.clamp(-self.x0_clip, self.x0_clip)
            return x0, v

        def draw_noise():
            shape = (M, self.token_dim)
            if noise_fn is None:
                return torch.randn(shape, device=z.device, dtype=torch.float32)
            return noise_fn(shape).to(z.device, torch.float32)
        x = SOLVERS[solver](predict, diffusion, draw_noise, temperature)
        if not (x.is_meta or x.isfinite().all()):                            # meta: shapes alone
            raise ValueError("the drawn tokens are not finite: the weights hold NaN or infinity, "
                             "or the dtype overflows")
        return x

    def denoiser(self, z, timesteps):
        """The network under conditions z: (x (M, C), step i) -> (M, 2C), to be called for i = S - 1 … 0."""
        def denoise(x, i):
            return self.net(x, timesteps[i].expand(len(x)), z)
        return denoise
