import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, shake

from mar import (
    MAR,
    MARConfig,
    Randomness,
    Sampling,
    first_masked,
    get_2d_sincos_pos_embed,
    mask_schedule,
    random_mask,
)

GRID = (4, 4)
NO_LAYERS = replace(SMALL.mar, encoder_depth=0, decoder_depth=0)


@pytest.fixture(scope="module")
def mar():
    return shake(MAR(SMALL.mar), seed=1)


@pytest.fixture
def tokens():
    return torch.randn(2, 16, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def mask():
    """11 of 16 tokens hidden, other ones in each row."""
    return torch.rand(2, 16, generator=torch.Generator().manual_seed(0)).argsort(dim=1) < 11


def norm(x, layer):
    return F.layer_norm(x, (32,), layer.weight, layer.bias, 1e-6)


# ---- encoder and decoder ---------------------------------------------------------------------------------

@torch.no_grad()
def test_the_encoder_sees_visible_tokens_only(mar, tokens, mask):
    encoded = mar.encode(tokens, mask, GRID)
    assert encoded.shape == (2, 4 + 5, 32)
    assert torch.equal(mar.encode(tokens.masked_fill(mask[..., None], 9.0), mask, GRID), encoded)
    changed = mar.encode(tokens + ~mask[..., None], mask, GRID)
    assert not torch.allclose(changed, encoded, atol=1e-2)


@torch.no_grad()
def test_the_encoder_without_blocks(tokens, mask):
    """Buffers and visible tokens plus their positions, in raster order, through two norms."""
    mar = shake(MAR(NO_LAYERS))
    buffers = mar.fake_latent.expand(4, -1) + mar.encoder_pos_embed_learned[0, :4]
    for row in range(2):
        visible = ~mask[row]
        image = mar.z_proj(tokens[row, visible]) + mar.encoder_pos_embed_learned[0, 4:][visible]
        expected = norm(norm(torch.cat([buffers, image]), mar.z_proj_ln), mar.encoder_norm)
        assert torch.allclose(mar.encode(tokens, mask, GRID)[row], expected, atol=1e-5)


@torch.no_grad()
def test_the_decoder_without_blocks(mask):
    """Visible tokens return to their places, mask tokens fill the others, buffers go."""
    mar = shake(MAR(NO_LAYERS))
    x = torch.randn(2, 4 + 5, 32)
    z = mar.decode(x, mask, GRID)
    assert z.shape == (2, 16, 32)
    for row in range(2):
        image = mar.mask_token[0].repeat(16, 1)
        image[~mask[row]] = mar.decoder_embed(x[row, 4:])
        expected = norm(image + mar.decoder_pos_embed_learned[0, 4:], mar.decoder_norm)
        assert torch.allclose(z[row], expected + mar.diffusion_pos_embed_learned[0], atol=1e-5)


@torch.no_grad()
def test_nothing_and_everything_can_be_hidden(mar, tokens):
    for mask, visible in ((torch.ones(2, 16).bool(), 0), (torch.zeros(2, 16).bool(), 16)):
        encoded = mar.encode(tokens, mask, GRID)
        assert encoded.shape == (2, 4 + visible, 32)
        assert mar.decode(encoded, mask, GRID).shape == (2, 16, 32)


def test_rows_with_unequal_masks_are_refused(mar, tokens):
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[0, :3] = True
    mask[1, :2] = True
    with pytest.raises(ValueError, match=r"hide equally many tokens, not \[3, 2\]"):
        mar.encode(tokens, mask, GRID)


@torch.no_grad()
def test_position_embeddings_resize_the_image_part_only(mar):
    table = mar.encoder_pos_embed_learned
    assert mar.position_embedding(table, GRID) is table
    larger = mar.position_embedding(table, (8, 6))
    assert larger.shape == (1, 4 + 48, 32) and torch.equal(larger[:, :4], table[:, :4])
    assert torch.allclose(larger[0, 4], table[0, 4]), "a corner repeats the corner: corners are not aligned"
    # Position (1, 1) of the 8×8 grid lies at (0.25, 0.25) of the native one.
    image = table[0, 4:].view(4, 4, 32)
    expected = 0.5625 * image[0, 0] + 0.1875 * (image[0, 1] + image[1, 0]) + 0.0625 * image[1, 1]
    larger = mar.position_embedding(table, (8, 8))
    assert torch.allclose(larger[0, 4 + 8 + 1], expected, atol=1e-6)
    positions = mar.position_embedding(mar.diffusion_pos_embed_learned, (2, 2))
    assert positions.shape == (1, 4, 32), "a table without buffers"


@torch.no_grad()
def test_the_buffers_can_hold_a_class(mar, tokens, mask):
    plain = mar.encode(tokens, mask, GRID)
    assert torch.equal(mar.encode(tokens, mask, GRID, torch.tensor([-1, -1])), plain)
    for label in (0, 1):
        labelled = mar.encode(tokens, mask, GRID, torch.tensor([-1, label]))
        assert torch.equal(labelled[0], plain[0])
        other = shake(MAR(SMALL.mar), seed=1)
        other.fake_latent.copy_(mar.class_emb.weight[label])
        assert torch.allclose(labelled[1], other.encode(tokens, mask, GRID)[1], atol=1e-6)
        assert not torch.allclose(labelled[1], plain[1], atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("part", ["attn", "mlp"])
def test_dropout_is_for_training_only(part):
    layer = getattr(shake(MAR(replace(SMALL.mar, dropout=0.5))).encoder_blocks[0], part)
    x = torch.ones(1, 1000, 32)                                             # 1,000 equal tokens
    assert torch.allclose(layer(x), layer(x[:, :1]), atol=1e-4)
    out = layer.train()(x)
    assert (out == 0).float().mean().item() == pytest.approx(0.5, abs=0.02), "of the output"
    assert out[out != 0].unique().numel() > 10_000, "of attention weights and of hidden features"


def test_sines_of_row_and_column():
    table = get_2d_sincos_pos_embed(8, 4)                                   # (16, 8)
    row, column = 3, 1
    angles = [row * math.pi / 2, row * math.pi / 4, column * math.pi / 2, column * math.pi / 4]
    sines, cosines = torch.tensor(angles).sin(), torch.tensor(angles).cos()
    expected = torch.cat([sines[:2], cosines[:2], sines[2:], cosines[2:]])
    assert torch.allclose(table[row * 4 + column], expected, atol=1e-6)
    assert get_2d_sincos_pos_embed(10, 4)[:, 8:].tolist() == [[0, 0]] * 16


def test_attention_starts_local():
    """At the start a hidden token attends to its neighbours more than to tokens far away."""
    torch.manual_seed(0)
    mar = MAR(MARConfig(
        img_size=64, vae_stride=8, embed_dim=96, encoder_depth=1, decoder_depth=1, num_heads=6, buffer_size=8,
        token_dim=4, class_num=1, head_depth=1, head_width=32))
    block = mar.decoder_blocks[0]
    q, k, _ = block.attn.qkv.weight.chunk(3)
    # Keys equal queries in half of the heads.
    assert torch.equal(q[:48], k[:48]) and not torch.equal(q[48:], k[48:])
    x = block.norm1(mar.mask_token + mar.decoder_pos_embed_learned)[0, 8:]  # (64, 96), all hidden
    q = (x @ q[:48].T).view(64, 3, 16).transpose(0, 1)
    k = (x @ k[:48].T).view(64, 3, 16).transpose(0, 1)
    weights = (q @ k.transpose(1, 2) / 4).softmax(dim=-1).mean(dim=0)       # (64, 64)
    i = torch.arange(64)
    place = torch.stack([i // 8, i % 8], dim=1)
    distance = (place[:, None] - place).abs().amax(dim=-1)
    assert weights[distance == 1].mean() > 2 * weights[distance >= 4].mean()


# ---- masks and order -------------------------------------------------------------------------------------

@pytest.mark.parametrize("N, K", [(256, 64), (16, 1), (16, 16), (16, 50), (1, 3), (30, 7)])
def test_mask_schedule(N, K):
    masked = mask_schedule(N, K)
    assert len(masked) == K + 1 and masked[0] == N and masked[-1] == 0
    for k in range(1, K):
        cosine = math.floor(N * math.cos(math.pi / 2 * k / K))
        assert masked[k] == max(1, min(masked[k - 1] - 1, cosine))
    assert mask_schedule(256, 64)[1:5] == [255, 254, 253, 252] and mask_schedule(256, 64)[32] == 181


def test_masks_of_training():
    torch.manual_seed(0)
    masks = [random_mask(3, 16) for _ in range(1000)]
    counts = [mask.sum(dim=1).tolist() for mask in masks]
    assert masks[0].shape == (3, 16) and all(len(set(count)) == 1 for count in counts)
    # The ratio is normal (1, 0.25) cut to [0.7, 1], so a count of c has probability
    # (Φ(u(c)) - Φ(u(c - 1))) / (Φ(0) - Φ(-1.2)) with u(c) = 4 (c / 16 - 1).
    def below(count):
        u = 4 * (max(0.7, count / 16) - 1)
        return (0.5 - math.erf(-u / math.sqrt(2)) / 2 - 0.11507) / 0.38493
    for count in range(12, 17):
        share = [row[0] for row in counts].count(count) / 1000
        assert share == pytest.approx(below(count) - below(count - 1), abs=0.04), count
    # Every token is hidden equally often.
    assert torch.cat(masks).float().mean(dim=0).std() < 0.02


@pytest.mark.parametrize("ratio, expected", [(1.0, 16), (0.5, 8), (0.51, 9), (0.0, 1)])
def test_masks_of_a_given_ratio(ratio, expected):
    assert random_mask(2, 16, ratio).sum(dim=1).tolist() == [expected, expected]


def test_the_first_of_an_order_are_masked():
    orders = torch.tensor([[2, 0, 1, 3], [3, 1, 0, 2]])
    assert first_masked(orders, 2).int().tolist() == [[1, 0, 1, 0], [0, 1, 0, 1]]
    assert not first_masked(orders, 0).any() and first_masked(orders, 4).all()


# ---- settings and randomness -----------------------------------------------------------------------------

@pytest.mark.parametrize("name, value", [
    ("num_iter", 0), ("num_iter", -1), ("num_iter", math.nan), ("num_iter", math.inf),
    ("cfg", -0.1), ("cfg", math.nan), ("cfg", math.inf),
    ("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf),
    ("num_iter", 2.5), ("num_sampling_steps", 2.5), ("num_sampling_steps", 1001),
    ("num_sampling_steps", 0), ("num_sampling_steps", math.nan), ("num_sampling_steps", math.inf),
    ("cfg_schedule", "cosine"), ("solver", "euler"),
])
def test_settings_out_of_range_are_named(name, value):
    with pytest.raises(ValueError, match=rf"^{name} is '?{value}"):
        Sampling(**{name: value})


@pytest.mark.parametrize("name", ["num_iter", "cfg", "temperature", "num_sampling_steps"])
@pytest.mark.parametrize("value", ["3", [3], np.float32("nan"), np.float64("inf"), -np.int64(1), 1j])
def test_settings_that_are_no_numbers_are_named(name, value):
    with pytest.raises(ValueError, match=f"^{name} is .*; it must be a "):
        Sampling(**{name: value})


def test_settings_at_the_ends_of_their_ranges():
    Sampling(num_iter=1, cfg=0, temperature=0, num_sampling_steps=1)
    Sampling(solver="ddim", temperature=1)
    with pytest.raises(ValueError, match="^temperature is 0.9, but solver 'dpm\\+\\+' adds no noise"):
        Sampling(solver="dpm++", temperature=0.9)


def test_guidance_of_a_step():
    assert Sampling(cfg=3.0).guidance(5, 16) == 3
    linear = Sampling(cfg=3.0, cfg_schedule="linear")
    assert [linear.guidance(masked, 16) for masked in (16, 8, 1)] == [1, 2, 2.875]
    assert linear.guidance(0, 16) == 2.875, "the last step counts one masked token"
    assert Sampling(cfg=1.0, cfg_schedule="linear").guidance(5, 16) == 1


def test_orders_are_random_permutations():
    def orders(seed):
        return Randomness(torch.Generator().manual_seed(seed)).orders(3, 16)
    assert torch.equal(orders(0), orders(0)) and not torch.equal(orders(0), orders(1))
    assert torch.equal(orders(0).sort(dim=1).values, torch.arange(16).expand(3, 16))
    assert len({tuple(row) for row in orders(0).tolist()}) == 3
    recorded = torch.randperm(16).expand(4, 16)
    assert torch.equal(Randomness(orders=recorded).orders(2, 16), recorded[:2])


def test_with_a_generator_for_each_image_no_image_depends_on_the_others():
    def draws(*seeds):
        randomness = Randomness([torch.Generator().manual_seed(seed) for seed in seeds])
        orders = randomness.orders(len(seeds), 16)
        noise_fn = randomness.noise(len(seeds), 5, 4, 3, "cpu")
        noise = [noise_fn((len(seeds) * 5, 4)).view(-1, 5, 4) for _ in range(3)]
        return orders, torch.stack(noise, dim=1)                            # (B, 16), (B, S, count, C)
    orders, noise = draws(7, 8)
    for image, seed in enumerate((7, 8)):
        alone, alone_noise = draws(seed)
        assert torch.equal(orders[image], alone[0]) and torch.equal(noise[image], alone_noise[0])
    assert not torch.equal(noise[0], noise[1])
