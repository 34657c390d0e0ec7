import pytest
import torch
from conftest import shake

from llm import KVCache, Qwen2, QwenConfig

CONFIG = dict(vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2)


@pytest.fixture(scope="module")
def llm():
    return shake(Qwen2(QwenConfig(**CONFIG)), seed=1)


def ids(batch, length, seed=0):
    return torch.randint(97, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("tied", [True, False])
def test_equals_transformers(tied):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(
        **CONFIG, tie_word_embeddings=tied, rope_theta=1e6, rms_norm_eps=1e-6, attn_implementation="eager")).eval()
    ours = shake(Qwen2(QwenConfig(**CONFIG, tie_word_embeddings=tied)), seed=2)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    real = torch.ones(2, 11, dtype=torch.bool)
    real[1, 7:] = False                                       # right padding
    x = ids(2, 11)
    with torch.no_grad():
        expected = theirs(x, attention_mask=real.long(), position_ids=(real.cumsum(1) - 1).clamp(min=0)).logits
        got = ours.logits(ours(x, attention_mask=real))
    assert torch.allclose(got[real], expected[real], atol=2e-5, rtol=1e-4)
    with torch.no_grad():
        prompt = ids(1, 5, seed=3)
        expected = theirs.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)[0, 5:].tolist()
    assert list(ours.generate(ours.model.embed_tokens(prompt), max_new_tokens=12)) == expected


@torch.no_grad()
def test_cached_equals_uncached_token_by_token(llm):
    x = ids(2, 9)
    full, cache = llm(x), KVCache()
    for i in range(9):
        step = llm(x[:, i:i + 1], cache=cache)
        assert cache.length == i + 1
        assert torch.allclose(step[:, 0], full[:, i], atol=1e-5)


@torch.no_grad()
def test_truncated_cache_forgets(llm):
    x, cache = ids(1, 8), KVCache()
    llm(x[:, :5], cache=cache)
    first = llm(x[:, 5:], cache=cache)
    cache.truncate(5)
    assert cache.length == 5
    assert torch.equal(llm(x[:, 5:], cache=cache), first)


@torch.no_grad()
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_changes_nothing(llm, side):
    x, tail = ids(1, 6), ids(1, 3, seed=5)
    alone = llm(torch.cat([x, tail], 1))
    junk = ids(1, 4, seed=6)
    padded = torch.cat([x, junk] if side == "right" else [junk, x], 1)
    real = torch.cat([torch.ones(1, 6), torch.zeros(1, 4)] if side == "right" else [torch.zeros(1, 4), torch.ones(1, 6)], 1).bool()
    cache = KVCache()
    out = llm(padded, attention_mask=real, cache=cache)
    assert out.isfinite().all()
    assert torch.allclose(out[real], alone[0, :6], atol=1e-5)
    after = llm(tail, attention_mask=torch.cat([real, torch.ones(1, 3).bool()], 1), cache=cache)
    assert torch.allclose(after, alone[:, 6:], atol=1e-5)


def test_generation_stops_before_the_end_token(llm):
    embeds = llm.model.embed_tokens(ids(1, 4)).detach()
    free = list(llm.generate(embeds, max_new_tokens=10))
    assert len(free) == 10
    stop = free[4]
    assert list(llm.generate(embeds, max_new_tokens=10, eos_token_id=stop)) == free[:free.index(stop)]


def test_a_mask_of_the_wrong_length_is_refused(llm):
    with pytest.raises(ValueError, match=r"\(2, 9\)"):
        llm(ids(2, 9), attention_mask=torch.ones(2, 8).bool())


def test_unknown_size_is_refused():
    with pytest.raises(ValueError, match="qwen2.5-0.5b"):
        QwenConfig.from_name("qwen9")
