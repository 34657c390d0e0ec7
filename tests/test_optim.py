import copy

import pytest
import torch
from conftest import SMALL
from training_helpers import SHORT

from harmon import Harmon
from harmonkit.training.optim import (
    EMA,
    MultiOptimizer,
    load_state,
    make_optimizer,
    parameter_groups,
    schedule,
)
from harmonkit.training.recipes import RECIPES, change

HEAD = ("mar.decoder", "mar.mask_token", "mar.diffusion_pos_embed_learned", "mar.diffloss", "proj_out")
ENCODER = ("mar.encoder", "mar.z_proj", "mar.fake_latent", "mar.class_emb", "proj_in")


@pytest.fixture(scope="module")
def model():
    return Harmon(SMALL)


@pytest.mark.parametrize("name", RECIPES)
def test_every_parameter_has_the_recipes_rate(model, name):
    recipe = RECIPES[name]
    group_of = {id(p): group for group in parameter_groups(model, recipe) for p in group["params"]}
    for n, p in model.named_parameters():
        part = n.split(".")[0]
        if n.startswith(HEAD):
            part = "mar-decoder"
        elif n.startswith(ENCODER):
            part = "mar-encoder"
        assert p.requires_grad == (id(p) in group_of) == (part in recipe.lr), n
        if p.requires_grad:
            group = group_of[id(p)]
            muon = recipe.tiny.muon and p.ndim == 2 and (".layers." in n or "coder_blocks" in n)
            assert group["muon"] == muon and group["peak"] == recipe.lr[part] * (2 if muon else 1), n
            decay = 0.0 if p.ndim <= 1 or ".diffloss." in n else recipe.weight_decay
            assert group["weight_decay"] == decay, n


def test_rates_warm_up_and_end_near_zero():
    recipe = change(SHORT, steps=100, warmup=0.1)
    rates = [schedule(recipe, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[4] == pytest.approx(0.5, abs=0.01)
    assert max(rates) == rates[9] == pytest.approx(0.98, abs=0.001), "the cosine begins with the warm-up"
    assert rates[50] == pytest.approx(0.5) and rates[99] == pytest.approx(0.00025, abs=1e-5)


def test_adamw_for_everything():
    optimizer = make_optimizer(parameter_groups(Harmon(SMALL), SHORT))
    assert type(optimizer) is torch.optim.AdamW
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.95)}


def test_muon_for_the_matrices_of_the_blocks(model):
    groups = parameter_groups(model, change(SHORT, muon=True))
    optimizer = make_optimizer(groups)
    muon, adamw = optimizer.optimizers
    assert (type(muon), type(adamw)) == (torch.optim.Muon, torch.optim.AdamW)
    matrices = [p for group in muon.param_groups for p in group["params"]]
    assert len(matrices) == (2 + 2) * 4 + 2 * 7, "of four MAR blocks and two layers of the LLM"
    assert len(optimizer.param_groups) == len(groups)


def step_once(optimizer, parameters):
    torch.manual_seed(0)
    for p in parameters:
        p.grad = torch.randn_like(p)
    optimizer.step()
    optimizer.zero_grad()
    assert all(p.grad is None for p in parameters)


def test_several_optimizers_act_as_one_and_are_restored():
    def make(lr):
        p, q = (torch.nn.Parameter(torch.ones(4, 4)) for _ in range(2))
        groups = [{"params": [p], "muon": True, "peak": lr, "lr": lr, "weight_decay": 0.0},
                  {"params": [q], "muon": False, "peak": lr, "lr": lr, "weight_decay": 0.0}]
        return make_optimizer(groups), [p, q]
    optimizer, parameters = make(lr=0.1)
    assert isinstance(optimizer, MultiOptimizer)
    step_once(optimizer, parameters)
    assert all((p != 1).any() for p in parameters)
    state = copy.deepcopy(optimizer.state_dict())
    step_once(optimizer, parameters)

    again, others = make(lr=0.1)
    step_once(again, others)
    load_state(again, state)
    step_once(again, others)
    assert all(map(torch.equal, parameters, others)), "momenta are restored"

    slower, _ = make(lr=0.05)
    load_state(slower, state)
    assert [group["peak"] for group in slower.param_groups] == [0.05, 0.05], "a changed rate stays changed"


def test_ema():
    p = torch.nn.Parameter(torch.tensor([0.0]))
    ema = EMA({"p": p}, decay=0.15)
    with torch.no_grad():
        p.fill_(1.0)
    ema.update(step=0)
    assert ema.weights["p"].item() == pytest.approx(0.9), "decay 1 / 10"
    with torch.no_grad():
        p.fill_(2.0)
    ema.update(step=1)
    assert ema.weights["p"].item() == pytest.approx(0.15 * 0.9 + 0.85 * 2), "2 / 11 is more than the decay"
    ema.swap()
    assert (p.item(), ema.weights["p"].item()) == pytest.approx((1.835, 2))
