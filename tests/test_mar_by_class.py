"""Drawing by class with MAR alone: against plain lines, guidance, labels."""

import numpy as np
import pytest
import torch
from conftest import SMALL, shake

from mar import (
    MAR,
    Randomness,
    first_masked,
    mask_schedule,
)

GRID = (4, 4)


@pytest.fixture(scope="module")
def mar():
    return shake(MAR(SMALL.mar), seed=1)


LABELS = torch.tensor([1, -1, 0])


def draws(mar, labels=LABELS, seeds=(7, 8, 9), **settings):
    """Latents of `MAR.sample` with a generator for each image."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return mar.sample(labels, generator=generators, **{"num_iter": 4, "num_sampling_steps": 5} | settings)


@torch.no_grad()
def by_plain_lines(mar, labels, K, cfg, schedule, seed):
    """What `MAR.sample` computes, a half and an image at a time, in float32."""
    orders = Randomness(torch.Generator().manual_seed(seed)).orders(len(labels), 16)
    masked = mask_schedule(16, K)
    tokens = torch.zeros(len(labels), 16, 4)
    noise = torch.Generator().manual_seed(seed + 1)
    for k in range(1, K + 1):
        hidden, after = first_masked(orders, masked[k - 1]), first_masked(orders, masked[k])
        w = cfg if schedule == "constant" else 1 + (cfg - 1) * (16 - max(1, masked[k])) / 16
        z = []
        for classes in (labels, torch.full_like(labels, -1)):
            half = []
            for row, label in enumerate(classes):
                mask = hidden[row:row + 1]
                alone = shake(MAR(mar.config), seed=1)
                if label >= 0:
                    alone.fake_latent.copy_(mar.class_emb.weight[label])
                x = alone.encode(tokens[row:row + 1], mask, GRID)
                half.append(mar.decode(x, mask, GRID)[0][(hidden & ~after)[row]])
            z.append(torch.cat(half))                                       # (M, D)
        drawn = mar.diffloss.sample(torch.cat(z), cfg=w, noise_fn=lambda s: torch.randn(s, generator=noise))
        tokens[hidden & ~after] = drawn
    return tokens.view(-1, 4, 4, 4)


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_drawing_by_class_against_plain_lines(mar, schedule):
    """Each half of guidance is encoded with its own buffers, and the weight is that of the mask after."""
    noise = torch.Generator().manual_seed(6)
    orders = Randomness(torch.Generator().manual_seed(5)).orders(3, 16)
    drawn = mar.sample(LABELS, num_iter=4, cfg=2.5, cfg_schedule=schedule, orders=orders,
                       noise_fn=lambda shape: torch.randn(shape, generator=noise))
    assert torch.allclose(drawn, by_plain_lines(mar, LABELS, 4, 2.5, schedule, 5), atol=1e-4)


def test_the_class_matters_and_none_is_no_class(mar):
    guided = draws(mar, cfg=3.0)
    assert guided.shape == (3, 4, 4, 4) and guided.dtype == torch.float32
    other = draws(mar, torch.tensor([0, -1, 0]), cfg=3.0)
    assert torch.equal(guided[1:], other[1:]) and not torch.allclose(guided[0], other[0], atol=1e-2)
    # Without a class both halves of guidance are the same.
    plain = draws(mar)
    assert torch.allclose(plain[1], guided[1], atol=1e-4)
    assert not torch.allclose(plain[0], guided[0], atol=1e-2)


def test_guidance_1_has_no_second_half(mar, monkeypatch):
    rows = []
    encode = MAR.encode
    monkeypatch.setattr(MAR, "encode", lambda self, tokens, *rest: (
        rows.append(len(tokens)), encode(self, tokens, *rest))[1])
    for settings, expected in (({}, 3), ({"cfg": 2.0}, 6), ({"cfg": 1.0, "cfg_schedule": "constant"}, 3)):
        rows.clear()
        draws(mar, **settings)
        assert set(rows) == {expected}


def test_more_steps_than_tokens_have_nothing_left_to_do(mar, monkeypatch):
    every, seen, passes = draws(mar, cfg=2.0, num_iter=16), [], []
    decode = MAR.decode
    monkeypatch.setattr(MAR, "decode", lambda *args: (passes.append(args), decode(*args))[1])
    more = draws(mar, cfg=2.0, num_iter=23, on_step=lambda k, tokens, mask: seen.append(int(mask.sum()) // 3))
    assert torch.equal(every, more)
    assert len(passes) == 16
    assert seen == [*range(15, 0, -1), *[1] * 7, 0], "a token a step, then none until the last"


def test_no_image_drawn_by_class_depends_on_its_batch(mar):
    together = draws(mar, cfg=2.0)
    for row, seed in enumerate((7, 8, 9)):
        alone = draws(mar, LABELS[row:row + 1], (seed,), cfg=2.0)
        assert torch.allclose(alone[0], together[row], atol=1e-5)


def test_steps_are_shown(mar):
    seen = []
    result = draws(mar, num_iter=3, on_step=lambda *step: seen.append(step))
    assert [k for k, _, _ in seen] == [1, 2, 3]
    assert torch.equal(seen[-1][1], result) and not seen[-1][2].any()
    for k, tokens, mask in seen:
        assert tokens.shape == (3, 4, 4, 4) and mask.sum(dim=1).tolist() == [mask_schedule(16, 3)[k]] * 3
        assert torch.equal(tokens.flatten(1, 2)[~mask], result.flatten(1, 2)[~mask]), "tokens stay as drawn"
        assert not tokens.flatten(1, 2)[mask].any(), "masked tokens are 0"


def test_drawing_is_without_dropout_and_leaves_the_mode(mar):
    expected = draws(mar)
    mar.train()
    mar.encoder_blocks[0].eval()
    try:
        assert torch.equal(draws(mar), expected)
        assert mar.training and mar.decoder_blocks[1].training and not mar.encoder_blocks[0].training
    finally:
        mar.eval()


def test_drawing_in_half_precision():
    half = shake(MAR(SMALL.mar), seed=1).to(torch.bfloat16)
    latents = draws(half, cfg=2.0)
    difference = (latents - draws(half.float(), cfg=2.0)).abs()
    assert latents.dtype == torch.float32 and difference.median() < 0.05


@pytest.mark.parametrize("labels, message", [
    ([2], "label 2: this MAR has classes 0 to 1, and -1 for none"),
    ([0, -2], "label -2: this MAR has classes 0 to 1"),
    (torch.tensor([1, 255], dtype=torch.uint8), "label 255"),
    ([0.0], "the type torch.float32; whole numbers"), ([True], "the type torch.bool; whole numbers"),
    ([], r"the shape \(0,\)"), (1, r"the shape \(\)"), ([[1]], r"the shape \(1, 1\)"),
    (["cat"], "labels are .*cat.*; whole numbers"), (None, "labels are 'None'"), ([2 ** 70], "labels are"),
])
def test_labels_that_are_no_class_are_refused(mar, labels, message):
    with pytest.raises(ValueError, match=message):
        draws(mar, labels, (7,))


def test_labels_of_any_whole_type(mar):
    for labels in ([0, 1], np.array([0, 1], np.uint8), torch.tensor([0, 1], dtype=torch.int16)):
        assert torch.equal(draws(mar, labels, (7, 8)), draws(mar, torch.tensor([0, 1]), (7, 8)))
