import copy
import math

import pytest
import torch
import torch.distributed as dist
from conftest import shake
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel
from training_helpers import SHORT, SMALL_64

from harmon import Harmon
from harmonkit.data.mixture import MixtureDataset, Source, loss_arguments
from harmonkit.data.sources import open_source
from harmonkit.training import losses
from harmonkit.training.losses import Losses, blocks_of, locality, wrap_blocks
from harmonkit.training.optim import part_of
from harmonkit.training.recipes import TRAINED_BY, change


@pytest.fixture(scope="module")
def model(tokenizer):
    model = shake(Harmon(SMALL_64))
    model.tokenizer = tokenizer
    return model


def inputs_of(model, task):
    """The arguments of the task's loss for two scenes."""
    kind = "shapes-text" if task == "text" else "shapes"
    source = Source(kind, task, 1, open_source(kind, seed="losses", count=4))
    dataset = MixtureDataset([source], {task: 1}, micro_batch=2, size=64, seed=0)
    return loss_arguments(model, dataset[0])


def loss_of(model, task, inputs, **changes):
    torch.manual_seed(0)
    return Losses(model, change(SHORT, **changes))(task, inputs)


def names_with_gradient(model):
    return {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}


@pytest.mark.parametrize("task", TRAINED_BY)
def test_every_task_trains_its_parts_and_learns(model, task):
    model = copy.deepcopy(model).train()
    inputs = inputs_of(model, task)
    first = loss_of(model, task, inputs)
    first.backward()
    assert {part_of(name) for name in names_with_gradient(model)} == TRAINED_BY[task]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(4):
        optimizer.step()
        optimizer.zero_grad()
        loss = loss_of(model, task, inputs)
        loss.backward()
    assert loss < 0.98 * first


def test_drawing_and_answering_are_the_models_losses(model, monkeypatch):
    inputs = inputs_of(model, "image2text")
    assert loss_of(model, "image2text", inputs) == model.image2text_loss(**inputs)
    inputs = inputs_of(model, "text2image")
    mask = torch.arange(64).expand(2, -1) % 3 > 0
    monkeypatch.setattr(losses, "random_mask", lambda B, N, ratio, device: mask)
    loss = loss_of(model, "text2image", inputs)
    torch.manual_seed(0)
    torch.rand(())                                                          # the draw for `all_hidden`
    assert loss == model.text2image_loss(**inputs, mask=mask)


def test_drawing_by_class_tells_the_class_to_the_buffers(model):
    inputs = inputs_of(model, "mar")
    labelled = loss_of(model, "mar", inputs | {"labels": torch.tensor([3, 5])})
    other = loss_of(model, "mar", inputs | {"labels": torch.tensor([3, 6])})
    unlabelled = loss_of(model, "mar", inputs | {"labels": torch.tensor([-1, -1])})
    assert len({labelled.item(), other.item(), unlabelled.item()}) == 3
    latents = model.encode(inputs["pixels"])
    torch.manual_seed(0)
    mask = Losses(model, SHORT).mask(latents)
    tokens = latents.flatten(1, 2)
    z = model.mar.decode(model.mar.encode(tokens, mask, (8, 8)), mask, (8, 8))
    rows = [x.repeat(4, 1) for x in (z.flatten(0, 1), tokens.flatten(0, 1))]
    assert model.mar.diffloss.loss(*rows, mask.flatten().repeat(4)).item() == pytest.approx(unlabelled.item())


@pytest.mark.parametrize("changes, mean, low", [
    ({}, 0.884, 0.7),
    ({"cosine_mask": True}, 2 / math.pi, 1 / 64),
    ({"all_hidden": 1.0}, 1, 1),
    ({"cosine_mask": True, "all_hidden": 0.5}, (1 + 2 / math.pi) / 2, 1 / 64),
])
def test_masking_ratios(model, changes, mean, low):
    torch.manual_seed(0)
    module = Losses(model, change(SHORT, **changes))
    masks = torch.stack([module.mask(torch.zeros(2, 8, 8, 4)) for _ in range(1000)])
    ratios = masks.float().mean(dim=2)                                      # (1000, 2)
    assert torch.equal(ratios[:, 0], ratios[:, 1])
    # Counts are rounded up, which adds 1 / 128.
    assert ratios.mean().item() == pytest.approx(mean, abs=0.03) and ratios.min() >= low


def test_reconstruction_is_error_free_nats_and_locality(model):
    inputs = inputs_of(model, "reconstruct")
    pixels = inputs["pixels"]
    torch.manual_seed(0)
    posterior = model.vae.encode(pixels)
    error = (model.vae.decode(posterior.sample()) - pixels).square().mean()
    kl = posterior.kl().mean(dim=(0, 2, 3))
    assert loss_of(model, "reconstruct", inputs, kl=0.0, local=0.0).item() == pytest.approx(error.item())
    charged = loss_of(model, "reconstruct", inputs, kl=0.5, free_nats=0.0, local=0.0).item()
    assert charged == pytest.approx((error + 0.5 * kl.mean()).item())
    free = loss_of(model, "reconstruct", inputs, kl=0.5, free_nats=100.0, local=0.0).item()
    assert kl.max() < 100 and free == pytest.approx(error.item() + 50)
    local = loss_of(model, "reconstruct", inputs, kl=0.0, local=2.0).item()
    assert local == pytest.approx((error + 2 * locality(pixels, posterior.mean)).item())


def test_the_vae_trains_in_float32(model):
    inputs = inputs_of(model, "reconstruct")
    plain = loss_of(model, "reconstruct", inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert loss_of(model, "reconstruct", inputs) == plain


def test_locality_asks_like_pixels_for_like_codes():
    pixels = torch.zeros(1, 3, 16, 16)
    pixels[..., 8:] = 1                                                     # two tokens black, two white
    one_code_a_color = torch.tensor([[0.0, 1.0], [0.0, 1.0]]).view(1, 1, 2, 2)
    assert locality(pixels, one_code_a_color).item() == pytest.approx(0, abs=1e-6)
    mixed = torch.tensor([[0.0, 1.0], [2.0, 1.0]]).view(1, 1, 2, 2)
    assert locality(pixels, mixed).item() == pytest.approx(2 * 4 / 8, abs=1e-6), "2 of 8 pairs differ by 2"


# ---- wrap_blocks -------------------------------------------------------------------------------------------

def test_checkpointing_computes_twice_and_changes_no_gradient(model):
    plain, saving = copy.deepcopy(model).train(), copy.deepcopy(model).train()
    wrap_blocks(saving, change(SHORT, checkpointing=True))
    calls = {}
    for kind, each in (("plain", plain), ("saving", saving)):
        calls[kind] = 0
        for block in blocks_of(each):
            def count(*_, kind=kind):
                calls[kind] += 1
            block.mlp.register_forward_pre_hook(count)
        loss_of(each, "text2image", inputs_of(each, "text2image")).backward()
    assert calls == {"plain": 6, "saving": 12}
    assert names_with_gradient(plain) == names_with_gradient(saving)
    for p, q in zip(plain.parameters(), saving.parameters(), strict=True):
        assert p.grad is None or torch.equal(p.grad, q.grad)


@pytest.fixture
def compiler():
    """Counts what torch.compile does: "unique_graphs" is the number of its graphs."""
    torch._dynamo.reset()
    counters.clear()
    yield counters["stats"]
    torch._dynamo.reset()


@pytest.fixture
def one_process():
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("checkpointing, backend", [(False, "eager"), (True, "eager"), (True, "aot_eager")])
def test_blocks_are_compiled_with_and_without_checkpointing(
        model, compiler, one_process, checkpointing, backend):
    """The backends make the same graphs as "inductor" and spare the C++ compiler's minute. With the second
    one in DistributedDataParallel."""
    results = {}
    for compiles in (False, True):
        copied = copy.deepcopy(model).train()
        recipe = change(SHORT, compile=compiles, checkpointing=checkpointing)
        wrap_blocks(copied, recipe, backend)
        module = Losses(copied, recipe)
        if backend == "aot_eager":
            module = DistributedDataParallel(module, find_unused_parameters=True)
        torch.manual_seed(0)
        loss = module("text2image", inputs_of(copied, "text2image"))
        loss.backward()
        results[compiles] = loss.detach(), {name: p.grad for name, p in copied.named_parameters()}
        # One for MAR's blocks, of the encoder and of the decoder, and one for the LLM's.
        assert (compiler["unique_graphs"] >= 2) == compiles
    torch.testing.assert_close(results[True], results[False], rtol=1e-4, atol=1e-5)


def test_the_vae_is_compiled_where_it_is_trained(model, compiler):
    inputs = inputs_of(model, "reconstruct")
    for lr, graphs in (({"llm": 1.0}, 0), ({"vae": 1.0}, 2)):
        copied = copy.deepcopy(model)
        recipe = change(SHORT, lr=lr, compile=True)
        wrap_blocks(copied, recipe, backend="eager")
        torch.manual_seed(0)
        loss = Losses(copied, recipe)("reconstruct", inputs)
        assert compiler["unique_graphs"] == graphs
        assert loss.item() == pytest.approx(loss_of(model, "reconstruct", inputs).item(), rel=1e-5)
