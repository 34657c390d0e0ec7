import pytest
import torch
import torch.nn.functional as F
from conftest import shake

from llm import KVCache, Qwen2, QwenConfig, RMSNorm, apply_rotary_emb, rotary_embedding

SIZES = dict(vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6,
             num_key_value_heads=2)


@pytest.fixture(scope="module")
def llm():
    return shake(Qwen2(QwenConfig(**SIZES)), seed=1)


def ids(batch, length, seed=0):
    return torch.randint(97, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_equals_transformers(tied):
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen2Config(
        **SIZES, tie_word_embeddings=tied, rope_theta=1e6, rms_norm_eps=1e-6, attn_implementation="eager")
    theirs = transformers.Qwen2ForCausalLM(config).eval()
    ours = shake(Qwen2(QwenConfig(**SIZES, tie_word_embeddings=tied)), seed=2)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    real = torch.ones(2, 11, dtype=torch.bool)
    real[1, 7:] = False                                                     # padding on the right
    positions = (real.cumsum(1) - 1).clamp(min=0)
    expected = theirs(ids(2, 11), attention_mask=real.long(), position_ids=positions).logits
    logits = ours.logits(ours(ids(2, 11), attention_mask=real))
    assert torch.allclose(logits[real], expected[real], atol=5e-6, rtol=1e-5)
    prompt = ids(1, 5, seed=3)
    answer = theirs.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert list(ours.generate(ours.model.embed_tokens(prompt), max_new_tokens=12)) == answer[0, 5:].tolist()


@torch.no_grad()
def test_a_key_head_serves_consecutive_query_heads(llm):
    """A model with a key head for every query head, each copied from its group's, is the same."""
    wide = Qwen2(QwenConfig(**SIZES | {"num_key_value_heads": 6}))
    state = dict(llm.state_dict())
    for name, tensor in state.items():
        if "k_proj" in name or "v_proj" in name:
            state[name] = tensor.unflatten(0, (2, 8)).repeat_interleave(3, dim=0).flatten(0, 1)
    wide.load_state_dict(state)
    assert torch.allclose(wide(ids(2, 9)), llm(ids(2, 9)), atol=1e-5)


@torch.no_grad()
def test_cached_equals_uncached_token_by_token(llm):
    x, cache = ids(2, 9), KVCache()
    full = llm(x)
    for i in range(9):
        step = llm(x[:, i:i + 1], cache=cache)
        assert cache.length == i + 1
        assert torch.allclose(step[:, 0], full[:, i], atol=1e-5)


@torch.no_grad()
def test_a_truncated_cache_forgets(llm):
    x, cache = ids(1, 8), KVCache()
    llm(x[:, :5], cache=cache)
    first = llm(x[:, 5:], cache=cache)
    assert cache.length == 8
    cache.truncate(5)
    assert cache.length == 5 and KVCache().length == 0
    assert torch.equal(llm(x[:, 5:], cache=cache), first)
    assert torch.allclose(first, llm(x)[:, 5:], atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_changes_nothing(llm, side):
    x, junk, tail = ids(1, 6), ids(1, 4, seed=6), ids(1, 3, seed=5)
    alone = llm(torch.cat([x, tail], dim=1))
    row = torch.cat([x, junk] if side == "right" else [junk, x], dim=1)
    real = torch.arange(10) < 6 if side == "right" else torch.arange(10) >= 4
    cache = KVCache()
    out = llm(row, attention_mask=real[None], cache=cache)
    assert out.isfinite().all()
    assert torch.allclose(out[0, real], alone[0, :6], atol=1e-5)
    longer = torch.cat([real, torch.ones(3, dtype=torch.bool)])[None]
    assert torch.allclose(llm(tail, attention_mask=longer, cache=cache), alone[:, 6:], atol=1e-5)


@torch.no_grad()
def test_padding_attends_to_itself(llm, monkeypatch):
    """A row of the mask without a key has no softmax; torch gives 0 or NaN for it, by its version."""
    masks = []

    def record(q, k, v, attn_mask):
        masks.append(attn_mask)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
    monkeypatch.setattr("llm.scaled_dot_product_attention", record)
    llm(ids(1, 6), attention_mask=torch.arange(6)[None] >= 4)
    assert masks[0][0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0], [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 1, 1]]


@torch.no_grad()
def test_nothing_depends_on_later_tokens(llm):
    x = ids(1, 8)
    changed = x.clone()
    changed[0, 5] += 1
    before, after = llm(x), llm(changed % 97)
    assert torch.allclose(before[:, :5], after[:, :5], atol=1e-6)
    assert not torch.allclose(before[:, 7], after[:, 7], atol=1e-3)


@torch.no_grad()
def test_embeddings_may_replace_ids(llm):
    assert torch.equal(llm(inputs_embeds=llm.model.embed_tokens(ids(2, 5))), llm(ids(2, 5)))


def test_rotation_is_by_the_position_in_half_split_pairs():
    """Channels i and i + d/2 turn by position · θ^(-2i/d); products depend on the distance alone."""
    positions = torch.tensor([[0, 3, 700, 703]])
    cos, sin = rotary_embedding(positions, 8, 1e6, torch.float64)           # (1, 1, 4, 8)
    unit = torch.eye(8, dtype=torch.float64)[2].expand(1, 1, 4, 8)
    turned = apply_rotary_emb(unit, cos, sin)[0, 0]                         # (4, 8)
    angles = positions[0].double() * 1e6 ** -0.5
    assert torch.allclose(turned[:, 2], angles.cos(), atol=1e-6)
    assert torch.allclose(turned[:, 6], angles.sin(), atol=1e-6)
    assert not turned[:, [0, 1, 3, 4, 5, 7]].any()
    q, k = torch.randn(2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    q = apply_rotary_emb(q.expand(1, 1, 4, 8), cos, sin)[0, 0]
    k = apply_rotary_emb(k.expand(1, 1, 4, 8), cos, sin)[0, 0]
    assert torch.allclose(q[0] @ k[1], q[2] @ k[3], atol=1e-4)
    assert not torch.allclose(q[0] @ k[1], q[0] @ k[2], atol=1e-2)


def test_angles_and_norms_are_computed_in_float32():
    positions = torch.arange(3000)[None]                                    # bfloat16 counts to 256
    for half, exact in zip(rotary_embedding(positions, 8, 1e6, torch.bfloat16),
                           rotary_embedding(positions, 8, 1e6, torch.float32), strict=True):
        assert torch.equal(half, exact.bfloat16())
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(0)) * 30
    norm = RMSNorm(256, 1e-6)
    expected = x.bfloat16().double() / x.bfloat16().double().square().mean(-1, keepdim=True).sqrt()
    assert torch.equal(norm.bfloat16()(x.bfloat16()), expected.bfloat16())
    assert RMSNorm(2, 3.0)(torch.tensor([1.0, 1.0])).tolist() == [0.5, 0.5]


@torch.no_grad()
def test_bfloat16_is_near_float32(llm):
    x, real = ids(2, 300), torch.ones(2, 300, dtype=torch.bool)
    exact = llm(x)
    half = shake(Qwen2(QwenConfig(**SIZES)), seed=1).bfloat16()
    out = half(x, attention_mask=real)
    assert out.dtype == torch.bfloat16
    assert (out - exact).norm() < 0.03 * exact.norm()                       # 0.015


def test_generation_stops_before_the_end_token(llm):
    embeds = llm.model.embed_tokens(ids(1, 4)).detach()
    free = list(llm.generate(embeds, max_new_tokens=10))
    assert len(free) == 10
    stop = free[4]
    assert list(llm.generate(embeds, max_new_tokens=10, eos_token_id=stop)) == free[:free.index(stop)]
    assert list(llm.generate(embeds, max_new_tokens=0)) == []


def test_masks_of_another_shape_are_refused(llm):
    with pytest.raises(ValueError, match=r"is \(2, 8\); expected \(batch, cached \+ new\) = \(2, 9\)"):
        llm(ids(2, 9), attention_mask=torch.ones(2, 8).bool())
    cache = KVCache()
    llm(ids(2, 5), cache=cache)
    with pytest.raises(ValueError, match=r"= \(2, 9\)"):
        llm(ids(2, 4), attention_mask=torch.ones(2, 4).bool(), cache=cache)
