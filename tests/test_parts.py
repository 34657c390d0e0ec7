"""attention, VAE, MAR and diffusion head, each against what it must do."""
import math

import pytest
import torch
from conftest import SMALL, shake

import attention as attention_module
from attention import attention
from diffusion_head import SOLVERS, DiffusionHead, Process, cosine_alphas_cumprod
from mar import MAR, MARConfig, visible_index
from vae import AutoencoderKL


def plain_attention(q, k, v, mask):
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = (q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).masked_fill(~mask, float("-inf"))
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("heads, kv_heads, L, S", [(4, 4, 5, 5), (6, 2, 5, 5), (6, 2, 3, 9), (4, 1, 1, 7)])
def test_attention_is_softmax(heads, kv_heads, L, S):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, heads, L, 8), torch.randn(2, kv_heads, S, 8), torch.randn(2, kv_heads, S, 8)
    everything, triangle = torch.ones(L, S).bool(), torch.ones(L, S).bool().tril(S - L)
    assert torch.allclose(attention(q, k, v), plain_attention(q, k, v, everything), atol=1e-6)
    assert torch.allclose(attention(q, k, v, causal=True), plain_attention(q, k, v, triangle), atol=1e-6)
    mask = torch.rand(2, 1, L, S) > 0.3
    mask[..., 0] = True
    assert torch.allclose(attention(q, k, v, mask=mask), plain_attention(q, k, v, mask), atol=1e-6)
    with pytest.raises(ValueError):
        attention(q, k, v, mask=mask, causal=True)


@pytest.mark.parametrize("options", [dict(), dict(causal=True), dict(mask=torch.ones(5, 5).bool().tril())])
def test_half_precision_training_path_equals_the_other(options):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 6, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        x = [t.detach().to(dtype).requires_grad_() for t in (q, k, v)]
        out = attention(*x, **options)
        out.float().square().sum().backward()
        gradients.append([out.float()] + [t.grad.float() for t in x])
    for exact, half in zip(*gradients):
        assert (exact - half).norm() < 0.02 * exact.norm()


@pytest.mark.skipif(not torch.cuda.is_available() or attention_module.flash_attn_func is None, reason="needs CUDA and flash-attn")
@pytest.mark.parametrize("causal", [False, True])
def test_flash_attention_equals_sdpa(causal, monkeypatch):
    q, k, v = (torch.randn(2, h, s, 64, device="cuda", dtype=torch.bfloat16) for h, s in ((6, 5), (2, 9), (2, 9)))
    fast = attention(q, k, v, causal=causal)
    monkeypatch.setattr(attention_module, "flash_attn_func", None)
    assert torch.allclose(fast.float(), attention(q, k, v, causal=causal).float(), atol=2e-2)


def test_flash_attention_is_called_with_its_own_layout(monkeypatch):
    """The layout of the call, checked on the CPU with a stand-in that computes what flash-attn documents."""
    def stand_in(q, k, v, dropout_p, causal):
        L, S = q.shape[1], k.shape[1]
        mask = torch.ones(L, S).bool().tril(S - L) if causal else torch.ones(L, S).bool()
        return plain_attention(*(x.transpose(1, 2) for x in (q, k, v)), mask).transpose(1, 2)

    class OnCuda(torch.Tensor):
        is_cuda = True
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 6, 3, 8).half(), torch.randn(2, 2, 9, 8).half(), torch.randn(2, 2, 9, 8).half()
    expected = attention(q.float(), k.float(), v.float(), causal=True)
    monkeypatch.setattr(attention_module, "flash_attn_func", stand_in)
    got = attention(q.as_subclass(OnCuda), k, v, causal=True)
    assert torch.allclose(torch.Tensor(got).float(), expected, atol=5e-3)


def test_vae_shapes_and_errors():
    vae = shake(AutoencoderKL(SMALL.vae))
    posterior = vae.encode(torch.rand(2, 3, 32, 48))
    assert posterior.mean.shape == posterior.logvar.shape == (2, 4, 4, 6)
    assert torch.equal(posterior.mode(), posterior.mean)
    g = lambda: torch.Generator().manual_seed(3)  # noqa: E731
    assert torch.equal(posterior.sample(g()), posterior.sample(g())) and not torch.equal(posterior.sample(g()), posterior.mean)
    assert vae.decode(posterior.mode()).shape == (2, 3, 32, 48)
    with pytest.raises(ValueError, match="multiples of the VAE's stride, 8"):
        vae.encode(torch.rand(1, 3, 32, 36))


def test_kl_is_that_of_the_normal_distribution():
    posterior = AutoencoderKL(SMALL.vae).encode(torch.rand(1, 3, 16, 16))
    q = torch.distributions.Normal(posterior.mean, (0.5 * posterior.logvar).exp())
    expected = torch.distributions.kl_divergence(q, torch.distributions.Normal(torch.zeros(()), torch.ones(())))
    assert torch.allclose(posterior.kl(), expected, atol=1e-5)


@pytest.fixture(scope="module")
def mar():
    return shake(MAR(SMALL.mar), seed=1)


def test_the_encoder_sees_visible_tokens_only(mar):
    torch.manual_seed(0)
    tokens = torch.randn(2, 16, 4)
    mask = torch.rand(2, 16).argsort(1) < 11
    out = mar.encode(tokens, mask, (4, 4))
    assert out.shape == (2, 4 + 5, 32)
    changed = torch.where(mask[..., None], torch.full_like(tokens, 9.0), tokens)
    assert torch.equal(mar.encode(changed, mask, (4, 4)), out)
    changed = torch.where(mask[..., None], tokens, tokens + 1)
    assert not torch.allclose(mar.encode(changed, mask, (4, 4)), out, atol=1e-2)


def test_visible_index_is_ascending_and_wants_equal_rows():
    mask = torch.tensor([[1, 0, 1, 0], [0, 0, 1, 1]]).bool()
    assert visible_index(mask).tolist() == [[1, 3], [0, 1]]
    with pytest.raises(ValueError, match=r"\[1, 2\]"):
        visible_index(torch.tensor([[1, 0, 0, 0], [0, 0, 1, 1]]).bool())


def test_nothing_and_everything_can_be_hidden(mar):
    tokens = torch.randn(1, 16, 4)
    for hidden in (torch.ones(1, 16).bool(), torch.zeros(1, 16).bool()):
        x = mar.encode(tokens, hidden, (4, 4))
        assert mar.decode(x, hidden, (4, 4)).shape == (1, 16, 32)


def test_position_embeddings_resize_the_image_part_only(mar):
    table = mar.encoder_pos_embed_learned
    assert mar.position_embedding(table, (4, 4)) is table
    larger = mar.position_embedding(table, (8, 8))
    assert larger.shape == (1, 4 + 64, 32) and torch.equal(larger[:, :4], table[:, :4])
    corner, first = larger[0, 4], table[0, 4]        # align_corners False: the corner repeats the first entry
    assert torch.allclose(corner, first)
    # position (1, 1) of the larger grid lies at (0.25, 0.25) of the native one
    g = table[0, 4:].view(4, 4, -1)
    expected = 0.5625 * g[0, 0] + 0.1875 * (g[0, 1] + g[1, 0]) + 0.0625 * g[1, 1]
    assert torch.allclose(larger[0, 4 + 8 + 1], expected, atol=1e-6)


def test_dropout_is_for_training_only(mar):
    tokens, mask = torch.randn(2, 16, 4), torch.zeros(2, 16).bool()
    assert torch.equal(mar.encode(tokens, mask, (4, 4)), mar.encode(tokens, mask, (4, 4)))
    mar.train()
    try:
        assert not torch.equal(mar.encode(tokens, mask, (4, 4)), mar.encode(tokens, mask, (4, 4)))
    finally:
        mar.eval()


@pytest.fixture(scope="module")
def head():
    return shake(DiffusionHead(4, 8, 2, 16, sampling_steps=10), seed=2)


def test_process_constants():
    abar = cosine_alphas_cumprod()
    assert len(abar) == 1000 and abs(abar[0] - 0.99995873) < 1e-7 and abar[-1] < 1e-6
    process = Process(100)
    assert process.timesteps.tolist()[:3] == [0, 10, 20] and process.timesteps[-1] == 999
    assert torch.allclose(process.table["signal"] ** 2 + process.table["noise"] ** 2, torch.ones(100))
    assert process.table["log_variance"][0] == process.table["log_variance"][1]
    assert Process(1).timesteps.tolist() == [0]
    with pytest.raises(ValueError):
        DiffusionHead(4, 8, 1, 16, sampling_steps=0)


def test_masked_rows_do_not_count(head):
    torch.manual_seed(0)
    z, x, t, noise = torch.randn(12, 8), torch.randn(12, 4), torch.randint(1000, (12,)), torch.randn(12, 4)
    t[0] = 0
    mask = torch.arange(12) % 3 != 1
    masked = head.loss(z, x, mask, t=t, noise=noise)
    assert torch.allclose(masked, head.loss(z[mask], x[mask], t=t[mask], noise=noise[mask]))
    spoiled = torch.where(mask[:, None], x, torch.full_like(x, 1e3))
    assert torch.equal(head.loss(z, spoiled, mask, t=t, noise=noise), masked)


def test_the_bound_trains_the_variance_only(head):
    """Without the ε error, gradients reach the last layer's v rows and leave its ε rows alone."""
    torch.manual_seed(0)
    z, x, t = torch.randn(6, 8), torch.randn(6, 4), torch.tensor([0, 1, 5, 100, 500, 999])
    signal, sigma = head.training_process.at(t, "signal", "noise")
    noise = torch.randn(6, 4)
    with torch.no_grad():  # noise that the network predicts exactly makes the ε error's gradient vanish
        for _ in range(200):
            noise = head.net(signal * x + sigma * noise, t, z)[:, :4] * 0.5 + noise * 0.5
    head.zero_grad()
    head.loss(z, x, t=t, noise=noise).backward()
    grad = head.net.final_layer.linear.weight.grad
    head.zero_grad()
    assert grad[4:].norm() > 1e-3 and grad[:4].norm() < 1e-2 * grad[4:].norm()


def test_sampling_is_reproducible_and_clipped(head):
    def draws(seed):
        g = torch.Generator().manual_seed(seed)
        return lambda shape: torch.randn(shape, generator=g)
    z = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    a = head.sample(z, noise_fn=draws(1))
    assert a.shape == (5, 4) and torch.equal(a, head.sample(z, noise_fn=draws(1))) and not torch.equal(a, head.sample(z, noise_fn=draws(2)))
    both = torch.cat([z, z.flip(0)])
    assert head.sample(both, cfg=3.0, noise_fn=draws(1)).shape == (5, 4)
    # guidance between equal halves is no guidance
    assert torch.allclose(head.sample(torch.cat([z, z]), cfg=3.0, noise_fn=draws(1)), a, atol=1e-4)
    head.x0_clip = 0.5
    try:
        assert head.sample(both, cfg=7.0, noise_fn=draws(1)).abs().max() <= 0.5 + 1e-6     # the last step returns x_0 itself
    finally:
        head.x0_clip = None


def test_number_of_draws(head):
    shapes = []

    def count(shape):
        shapes.append(tuple(shape))
        return torch.zeros(shape)
    head.sample(torch.randn(6, 8), cfg=2.0, noise_fn=count)
    assert shapes == [(3, 4)] * 10


@pytest.mark.parametrize("solver, order", [("ddim", 1), ("dpm++", 2)])
def test_deterministic_solvers_converge_to_the_exact_flow(solver, order):
    """Of data from N(0.4, 0.5²) the best x_0 is known, and so is where the flow takes each start: (x_0 - 0.4) / 0.5 = (x_T - 0.4·signal) / deviation."""
    start = torch.linspace(-2, 2, 9)[:, None]

    def error(steps):
        constants = Process(steps).scalars

        def predict(x, i):
            a, sigma = constants[i]["signal"], constants[i]["noise"]
            return 0.4 + a * 0.25 / (a * a * 0.25 + sigma * sigma) * (x - 0.4 * a), None
        a, sigma = constants[-1]["signal"], constants[-1]["noise"]
        exact = 0.4 + 0.5 * (start - 0.4 * a) / (a * a * 0.25 + sigma * sigma) ** 0.5
        return (SOLVERS[solver](predict, start[None], 1.0, constants) - exact).abs().max().item()
    assert error(50) < 0.04
    assert error(100) < error(50) / (1.9 if order == 1 else 3.8)      # half the step: half the error, or a quarter


def test_solvers_and_steps_of_the_head(head):
    z = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    draws = []

    def draw(shape):
        draws.append(torch.randn(shape, generator=torch.Generator().manual_seed(3)))
        return draws[-1]
    for solver, expected in (("ddim", 1), ("dpm++", 1), ("ancestral", 5)):
        draws.clear()
        assert head.sample(z, cfg=2.0, noise_fn=draw, solver=solver, steps=5).shape == (3, 4) and len(draws) == expected
    with pytest.raises(ValueError, match="dpm"):
        head.sample(z, solver="euler")
    with pytest.raises(ValueError, match="temperature"):
        head.sample(z, solver="ddim", temperature=0.9)


def test_half_precision_head_diffuses_in_float32():
    head = shake(DiffusionHead(4, 8, 2, 16, sampling_steps=10), seed=2)
    z = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))

    def draw():
        g = torch.Generator().manual_seed(1)
        return lambda shape: torch.randn(shape, generator=g)
    exact = head.sample(z, noise_fn=draw())
    half = head.bfloat16().sample(z.bfloat16(), noise_fn=draw())
    assert half.dtype == torch.float32
    assert ((half - exact).norm() / exact.norm()) < 0.05


def test_buffers_can_tell_a_class(small):
    """Label -1 is what Harmon uses always; another label changes what the encoder says."""
    tokens, mask = torch.randn(2, 16, 4), torch.zeros(2, 16, dtype=torch.bool)
    plain = small.mar.encode(tokens, mask, (4, 4))
    assert torch.equal(plain, small.mar.encode(tokens, mask, (4, 4), torch.tensor([-1, -1])))
    told = small.mar.encode(tokens, mask, (4, 4), torch.tensor([-1, 1]))
    assert torch.equal(told[0], plain[0]) and not torch.allclose(told[1], plain[1], atol=1e-3)


def test_attention_starts_local():
    """At the start a hidden token looks at its neighbors more than at tokens far away; queries equal keys in half of the heads only."""
    torch.manual_seed(0)
    mar = MAR(MARConfig(img_size=64, vae_stride=8, embed_dim=96, encoder_depth=1, decoder_depth=1, num_heads=6, buffer_size=8, token_dim=4, class_num=1, head_depth=1, head_width=32))
    block = mar.decoder_blocks[0]
    q, k, _ = block.attn.qkv.weight.chunk(3)
    assert torch.equal(q[:48], k[:48]) and not torch.equal(q[48:], k[48:])
    x = block.norm1(mar.mask_token + mar.decoder_pos_embed_learned)[0, 8:]                     # (64, 96), all hidden
    logits = ((x @ q[:48].T).view(64, 3, 16).transpose(0, 1) @ (x @ k[:48].T).view(64, 3, 16).permute(1, 2, 0)) / 4
    weights = logits.softmax(-1).mean(0).detach()                                               # (64, 64)
    place = torch.stack(torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij"), -1).view(64, 2)
    far = (place[:, None] - place).abs().amax(-1)
    near = weights[(far == 1)].mean().item()
    assert near > 2 * weights[far >= 4].mean().item()
