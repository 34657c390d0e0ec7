import pytest
import torch
from conftest import SMALL, shake
from torch.distributions import Normal, kl_divergence

from vae import AttnBlock, AutoencoderKL, Downsample, Posterior, Upsample, VAEConfig


@pytest.fixture(scope="module")
def vae():
    return shake(AutoencoderKL(SMALL.vae))


@torch.no_grad()
def test_shapes_of_a_picture_that_is_not_square(vae):
    posterior = vae.encode(torch.rand(2, 3, 32, 48))
    assert posterior.mean.shape == posterior.logvar.shape == (2, 4, 4, 6)
    assert vae.decode(posterior.mode()).shape == (2, 3, 32, 48)
    assert VAEConfig().stride == 16 and SMALL.vae.stride == 8


@pytest.mark.parametrize("H, W", [(32, 36), (28, 32)])
def test_sides_that_are_no_multiple_of_the_stride_are_refused(vae, H, W):
    message = f"image is {H}x{W} pixels; height and width must be multiples of the VAE's stride, 8"
    with pytest.raises(ValueError, match=message):
        vae.encode(torch.rand(1, 3, H, W))


def test_the_posterior_is_a_gaussian():
    moments = torch.cat([torch.full((1, 1, 100, 100), 3.0), torch.full((1, 1, 100, 100), -1.0)], dim=1)
    posterior = Posterior(moments)
    assert torch.equal(posterior.mode(), posterior.mean)
    sample = posterior.sample(torch.Generator().manual_seed(3))
    assert torch.equal(sample, posterior.sample(torch.Generator().manual_seed(3)))
    # The standard deviation is e^(logvar / 2); 10,000 draws give it to 1%.
    assert sample.mean().item() == pytest.approx(3, abs=0.02)
    assert sample.std().item() == pytest.approx(0.6065, abs=0.015)


def test_the_log_variance_is_clamped():
    posterior = Posterior(torch.tensor([0.0, 0.0, -40.0, 50.0]).view(1, 4, 1, 1))
    assert posterior.logvar.flatten().tolist() == [-30, 20]


@torch.no_grad()
def test_kl_is_that_to_the_normal_distribution(vae):
    posterior = vae.encode(torch.rand(1, 3, 16, 16))
    q = Normal(posterior.mean, (0.5 * posterior.logvar).exp())
    assert torch.allclose(posterior.kl(), kl_divergence(q, Normal(0.0, 1.0)), atol=1e-5)


@torch.no_grad()
def test_downsampling_pads_on_the_right_and_at_the_bottom():
    layer = Downsample(1)
    layer.conv.bias.zero_()
    layer.conv.weight.zero_()
    layer.conv.weight[0, 0, 0, 0] = 1                                       # the window's first pixel
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert layer(x).flatten().tolist() == [0, 2, 8, 10]
    layer.conv.weight[0, 0] = torch.tensor([[0, 0, 0], [0, 0, 0], [0, 0, 1.0]])     # its last
    assert layer(x).flatten().tolist() == [10, 0, 0, 0]


@torch.no_grad()
def test_upsampling_repeats_pixels():
    layer = Upsample(1)
    layer.conv.bias.zero_()
    layer.conv.weight.zero_()
    layer.conv.weight[0, 0, 1, 1] = 1
    doubled = layer(torch.tensor([[1.0, 2.0], [3.0, 4.0]]).view(1, 1, 2, 2))
    assert doubled[0, 0].tolist() == [[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]]


@torch.no_grad()
def test_attention_is_softmax_over_positions():
    block = shake(AttnBlock(32))
    x = torch.randn(2, 32, 3, 5)
    q, k, v = (layer(block.norm(x)).flatten(2) for layer in (block.q, block.k, block.v))    # (2, 32, 15)
    weights = (q.transpose(1, 2) @ k / 32 ** 0.5).softmax(dim=-1)
    expected = x + block.proj_out((v @ weights.transpose(1, 2)).view_as(x))
    assert torch.allclose(block(x), expected, atol=1e-5)
