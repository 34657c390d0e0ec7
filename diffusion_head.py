"""Diffusion head: a small MLP that turns one decoder vector into a sample of one latent token.

Paper: "Autoregressive Image Generation without Vector Quantization" (MAR, 2406.11838), section 3; its SimpleMLPAdaLN.
Diffusion: "Improved DDPM" (2102.09672), cosine schedule and learned variance. Parameter names are MAR's (`diffloss.net.…`).

Letters: M tokens (rows), C latent channels, D conditioning width, W head width, T = 1000 training steps, S sampling steps.
"""
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

T = 1000


# ---- the network -----------------------------------------------------------------------------------------------------

class TimestepEmbedder(nn.Module):
    def __init__(self, width, frequencies=256):
        super().__init__()
        self.half = frequencies // 2
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):                                                       # (M,)
        i = torch.arange(self.half, dtype=torch.float32, device=t.device)
        angle = t[:, None].float() * torch.exp(-math.log(10000) / self.half * i)
        features = torch.cat([angle.cos(), angle.sin()], dim=1)                 # (M, 256)
        return self.mlp(features.to(self.mlp[0].weight.dtype))                  # (M, W)


def modulate(x, shift, scale):
    """(1 + scale) · x + shift, in two operations: the sampler does this 700 times a token."""
    return torch.addcmul(x + shift, x, scale)


class ResBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, x, modulation):                                           # (M, W), (M, 3W)
        shift, scale, gate = modulation.chunk(3, dim=1)
        return torch.addcmul(x, gate, self.mlp(modulate(self.in_ln(x), shift, scale)))


class FinalLayer(nn.Module):
    def __init__(self, width, out_dim):
        super().__init__()
        self.linear = nn.Linear(width, out_dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, modulation):                                           # (M, W), (M, 2W)
        shift, scale = modulation.chunk(2, dim=1)
        return self.linear(modulate(F.layer_norm(x, x.shape[-1:], eps=1e-6), shift, scale))


class SimpleMLPAdaLN(nn.Module):
    """x (M, C) noisy tokens, t (M,) steps of the 1000, z (M, D) conditions -> (M, 2C): noise ε and variance mix v."""

    def __init__(self, token_dim, cond_dim, depth, width):
        super().__init__()
        self.time_embed = TimestepEmbedder(width)
        self.cond_embed = nn.Linear(cond_dim, width)
        self.input_proj = nn.Linear(token_dim, width)
        self.res_blocks = nn.ModuleList(ResBlock(width) for _ in range(depth))
        self.final_layer = FinalLayer(width, 2 * token_dim)

    def forward(self, x, t, z):
        return self.denoise(x, self.modulations(self.time_embed(t) + self.cond_embed(z)))

    def modulations(self, y):
        """y (…, W) = time + condition -> shift, scale and gate of each block (…, 3W), shift and scale of the final layer (…, 2W).

        They do not depend on x, so the sampler computes them for many diffusion steps at once: 60% of the arithmetic, in large products.
        """
        y = F.silu(y)                                                           # the first layer of every adaLN_modulation, once for all
        return [layer.adaLN_modulation[1](y) for layer in (*self.res_blocks, self.final_layer)]

    def denoise(self, x, modulations):
        x = self.input_proj(x.to(self.input_proj.weight.dtype))                 # (M, W)
        for block, modulation in zip(self.res_blocks, modulations):
            x = block(x, modulation)
        return self.final_layer(x, modulations[-1])                             # (M, 2C)


# ---- the diffusion process -------------------------------------------------------------------------------------------

def cosine_alphas_cumprod():
    """ᾱ_0 … ᾱ_999, float64."""
    abar = lambda t: math.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2  # noqa: E731
    betas = [min(1 - abar(t + 1) / abar(t), 0.999) for t in range(T)]
    return np.cumprod(1 - np.array(betas))


class Process:
    """The constants of a (respaced) diffusion process with `steps` of the T steps, each a float32 tensor (steps,)."""

    def __init__(self, steps):
        if not 1 <= steps <= T:
            raise ValueError(f"{steps} diffusion steps are asked for; expected 1 to {T}")
        stride = (T - 1) / (steps - 1) if steps > 1 else 1
        timesteps = np.array([round(i * stride) for i in range(steps)])
        abar = cosine_alphas_cumprod()[timesteps]
        before = np.append(1.0, abar[:-1])                           # ᾱ of the step before; 1 ahead of the first
        beta = 1 - abar / before
        variance = beta * (1 - before) / (1 - abar)                  # β̃, of q(x_{t-1} | x_t, x_0)
        variance[0] = variance[min(1, steps - 1)]                    # it is 0 at t = 0, and its log is needed
        self.timesteps = torch.from_numpy(timesteps)                 # what the network is told, int64
        table = dict(
            signal=abar ** 0.5, noise=(1 - abar) ** 0.5,             # x_t = signal·x_0 + noise·ε
            x0_from_xt=abar ** -0.5, x0_from_eps=(1 / abar - 1) ** 0.5,
            mean_from_x0=beta * before ** 0.5 / (1 - abar), mean_from_xt=(1 - before) * (abar / before) ** 0.5 / (1 - abar),
            log_beta=np.log(beta), log_variance=np.log(np.maximum(variance, 1e-300)))
        self.table = {name: torch.from_numpy(values).float() for name, values in table.items()}
        self.scalars = [{name: column[i].item() for name, column in self.table.items()} for i in range(steps)]

    def at(self, t, *names):
        """The named constants at steps t (M,) as columns (M, 1) on t's device."""
        return [self.table[name].to(t.device)[t][:, None] for name in names]


def normal_cdf(u):
    """The tanh approximation that the original's likelihood uses."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u ** 3)))


def discretized_nll(x, mean, logvar):
    """-log probability of the bin x ± 1/255 under a Gaussian, in nats; the outermost bins are open."""
    inv_std = torch.exp(-0.5 * logvar)
    upper, lower = normal_cdf(inv_std * (x - mean + 1 / 255)), normal_cdf(inv_std * (x - mean - 1 / 255))
    p = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return -p.clamp(min=1e-12).log()


def gaussian_kl(mean1, logvar1, mean2, logvar2):
    return 0.5 * (logvar2 - logvar1 - 1 + torch.exp(logvar1 - logvar2) + (mean1 - mean2) ** 2 * torch.exp(-logvar2))


def mix(v, log_beta, log_variance):
    """The learned log variance: v = -1 gives the posterior's, v = 1 gives log β_t."""
    f = (v + 1) / 2
    return f * log_beta + (1 - f) * log_variance


class DiffusionHead(nn.Module):
    """`.net` in the model's dtype; everything about the diffusion itself in float32.

    sampling_steps: S, 100 in the official models. x0_clip: clamp the predicted x_0 to ± this at each sampling step. It keeps
    small or little-trained models from exploding near t = 1000, where an error in ε is multiplied by up to 20,000; None for
    official models.
    """

    rows_at_once = 1024                                                         # of modulations, in sampling

    def __init__(self, token_dim, cond_dim, depth, width, sampling_steps=100, x0_clip=None):
        super().__init__()
        self.token_dim, self.x0_clip = token_dim, x0_clip
        self.net = SimpleMLPAdaLN(token_dim, cond_dim, depth, width)
        self.training_process, self.sampling_process = Process(T), Process(sampling_steps)
        self.init_weights()

    def init_weights(self):
        for module in self.net.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for layer in (self.net.time_embed.mlp[0], self.net.time_embed.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)
        # zero-initialised modulation and output: every block starts as the identity, the head as ε = 0
        for layer in [b.adaLN_modulation[1] for b in self.net.res_blocks] + [self.net.final_layer.adaLN_modulation[1], self.net.final_layer.linear]:
            nn.init.zeros_(layer.weight)

    def loss(self, z, target, mask=None, *, t=None, noise=None):
        """Mean over rows of the ε error plus the variational bound (bits per channel) that trains the variance.

        z (M, D) conditions, target (M, C) clean tokens, mask (M,) rows that count (None: all), t (M,) int steps in [0, 1000)
        and noise (M, C), drawn when not given. Rows outside the mask cost nothing. Returns a float32 scalar.
        """
        if mask is not None:
            rows = mask.nonzero()[:, 0]
            z, target, t, noise = (x if x is None else x[rows] for x in (z, target, t, noise))
        x0 = target.float()
        t = torch.randint(T, x0.shape[:1], device=x0.device) if t is None else t
        noise = torch.randn_like(x0) if noise is None else noise.float()
        process = self.training_process
        signal, sigma, x0_from_xt, x0_from_eps, from_x0, from_xt, log_beta, true_logvar = process.at(
            t, "signal", "noise", "x0_from_xt", "x0_from_eps", "mean_from_x0", "mean_from_xt", "log_beta", "log_variance")
        x_t = signal * x0 + sigma * noise
        eps, v = self.net(x_t, t, z).float().chunk(2, dim=1)
        with torch.autocast(x0.device.type, enabled=False):
            mse = (noise - eps).square().mean(dim=1)
            # the bound trains the variance only, so the mean it sees is detached
            mean = from_x0 * (x0_from_xt * x_t - x0_from_eps * eps.detach()) + from_xt * x_t
            logvar = mix(v, log_beta, true_logvar)
            kl = gaussian_kl(from_x0 * x0 + from_xt * x_t, true_logvar, mean, logvar)
            bound = torch.where(t[:, None] == 0, discretized_nll(x0, mean, logvar), kl).mean(dim=1) / math.log(2)
            return (mse + bound).mean()

    @torch.no_grad()
    def sample(self, z, *, temperature=1.0, cfg=1.0, noise_fn=None, solver="ancestral", num_sampling_steps=None):
        """Draw a token for each condition.

        z (M, D), or with cfg != 1 (2M, D) = [conditional; unconditional]. temperature scales the noise added at each step.
        noise_fn(shape) -> tensor gives every Gaussian draw: the start (M, C), then, for the ancestral solver, one for each step but the last.
        solver: "ancestral" (DDPM, learned variance), or "ddim" (2010.02502) and "dpm++" (2M, 2211.01095), which add no noise and need fewer steps.
        num_sampling_steps: default the constructor's sampling_steps. Returns float32 (M, C).
        """
        if solver not in SOLVERS or (temperature != 1 and solver != "ancestral"):
            raise ValueError(f"solver is {solver!r}; known: {', '.join(SOLVERS)}; and only the ancestral one takes a temperature other than 1")
        M = z.shape[0] // (1 if cfg == 1 else 2)
        draw = noise_fn or (lambda shape: torch.randn(shape, device=z.device))
        process = self.sampling_process if num_sampling_steps is None else Process(num_sampling_steps)
        draws = len(process.timesteps) if solver == "ancestral" else 1
        noise = torch.stack([draw((M, self.token_dim)).to(z.device, torch.float32) for _ in range(draws)])
        time = self.net.time_embed(process.timesteps.to(z.device))              # (S, W)
        return self.solve(z, noise, time, cfg, temperature, solver, process.scalars)

    def solve(self, z, noise, time, cfg, temperature, solver, constants):
        """`sample` with all noise (draws, M, C) and time embeddings (S, W) at hand. It touches nothing but the device, so that fast.py can capture it;
        there cfg and temperature are 0-dim tensors."""
        M, guided = noise.shape[1], z.shape[0] != noise.shape[1]
        cond = self.net.cond_embed(z)                                           # (M or 2M, W)
        together, at = max(1, self.rows_at_once // len(z)), {}                  # steps whose modulations are computed at once

        def predict(x, i):
            """x_0 and the variance mix, from x_t at step i. i goes down."""
            if i not in at:
                steps = range(max(0, i + 1 - together), i + 1)
                at.clear()
                at.update(zip(steps, zip(*self.net.modulations(time[steps.start:steps.stop, None] + cond))))
            eps, v = self.net.denoise(torch.cat([x, x]) if guided else x, at[i]).float().chunk(2, dim=1)
            eps = guide(eps, cfg) if guided else eps
            x0 = constants[i]["x0_from_xt"] * x - constants[i]["x0_from_eps"] * eps
            return (x0 if self.x0_clip is None else x0.clamp(-self.x0_clip, self.x0_clip)), v[:M]   # the variance is the conditional row's

        return SOLVERS[solver](predict, noise, temperature, constants)


def guide(eps, cfg):
    """Classifier-free guidance, 2207.12598: ε of [conditional; unconditional] rows (2M, C) -> (M, C)."""
    cond, uncond = eps.chunk(2)
    return uncond + cfg * (cond - uncond)


def ancestral(predict, noise, temperature, constants):
    """Draw x_{t-1} from q(x_{t-1} | x_t, x_0) with the predicted x_0 and the learned variance."""
    x = noise[0]
    for i in range(len(constants) - 1, -1, -1):
        x0, v = predict(x, i)
        now = constants[i]                                                      # plain numbers: every row is at the same step
        x = now["mean_from_x0"] * x0 + now["mean_from_xt"] * x
        if i > 0:
            x = x + torch.exp(0.5 * mix(v, now["log_beta"], now["log_variance"])) * noise[-i] * temperature
    return x


def ode(order):
    """DPM-Solver++ in x_0, algorithm 2 of 2211.01095: of order 1, which is DDIM, or 2, with the last step's x_0 as the second point."""
    def solve(predict, noise, temperature, constants):
        x, last, h_last = noise[0], None, None
        for i in range(len(constants) - 1, 0, -1):
            x0, _ = predict(x, i)
            now, then = constants[i], constants[i - 1]
            h = math.log(then["signal"] / then["noise"]) - math.log(now["signal"] / now["noise"])
            target = x0 if order == 1 or last is None else x0 + h / (2 * h_last) * (x0 - last)
            x = then["noise"] / now["noise"] * x - then["signal"] * math.expm1(-h) * target
            last, h_last = x0, h
        return predict(x, 0)[0]
    return solve


SOLVERS = {"ancestral": ancestral, "ddim": ode(1), "dpm++": ode(2)}
