"""The fixed shapes of the fast paths against the plain ones. On CUDA the same tests run captured; without it they show the logic only."""
import copy

import pytest
import torch

from harmonkit.fast import ONEDNN, Graph, accelerate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def pair(small):
    plain = copy.deepcopy(small).to(DEVICE)
    return plain, accelerate(copy.deepcopy(plain), "graphs")


@pytest.mark.parametrize("rows", [1, 8, 11])
@pytest.mark.parametrize("options", [dict(), dict(cfg=3.0), dict(cfg=2.0, temperature=0.7), dict(cfg=3.0, solver="dpm++", steps=4)])
def test_padded_rows_change_nothing(pair, rows, options):
    z = torch.randn(rows * (2 if "cfg" in options else 1), 32, generator=torch.Generator().manual_seed(0)).to(DEVICE)

    def noise():
        g = torch.Generator().manual_seed(1)
        return lambda shape: torch.randn(shape, generator=g)
    expected, got = (model.mar.diffloss.sample(z, noise_fn=noise(), **options) for model in pair)
    assert got.shape == (rows, 4) and torch.allclose(got, expected, atol=1e-4)


def test_whole_images_are_the_same(pair):
    plain, fast = pair
    for _ in range(2):                                    # what is kept from the first call does not disturb the second
        a, b = (model.generate_image(["a red circle", "two stars"], seed=3, num_iter=4) for model in (plain, fast))
        for x, y in zip(a, b):
            assert max(abs(p - q) for p, q in zip(x.tobytes(), y.tobytes())) <= 1


def test_answers_are_the_same(pair):
    plain, fast = pair
    for length, count in ((5, 12), (9, 3), (5, 12), (3, 600)):   # another prompt and another cache length in between
        embeds = torch.randn(1, length, 32, generator=torch.Generator().manual_seed(length)).to(DEVICE)
        expected = list(plain.llm.generate(embeds, max_new_tokens=count))
        assert list(fast.llm.generate(embeds, max_new_tokens=count)) == expected and len(expected) == count
        stop = expected[2]
        assert list(fast.llm.generate(embeds, max_new_tokens=count, eos_token_id=stop)) == expected[:expected.index(stop)]


@pytest.mark.skipif(not ONEDNN, reason="weights are packed on x86 only")
def test_packed_weights_change_nothing(small, tmp_path):
    plain = copy.deepcopy(small).bfloat16()
    fast = accelerate(copy.deepcopy(plain), "auto")
    assert "forward" in vars(fast.llm.lm_head), "auto packs on the CPU"
    for shape in ((1, 1, 32), (2, 7, 32), (300, 32)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
        layer = fast.proj_in[0]
        with torch.no_grad():
            assert torch.allclose(layer(x).float(), plain.proj_in[0](x).float(), atol=0.02) and layer(x).shape == x.shape
    prompt = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert list(fast.llm.generate(prompt, max_new_tokens=8)) == list(plain.llm.generate(prompt, max_new_tokens=8))
    exact = copy.deepcopy(plain).float()
    for mlp in (lambda model: model.llm.model.layers[0].mlp, lambda model: model.mar.encoder_blocks[0].mlp, lambda model: model.mar.diffloss.net.res_blocks[0].mlp):
        x = torch.randn(300, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
        with torch.no_grad():
            expected = mlp(exact)(x.float())
            error, packed_error = ((mlp(model)(x).float() - expected).abs().mean() for model in (plain, fast))
        assert packed_error < 1.05 * error < 0.02 * expected.abs().mean(), "activations join the product before them: one rounding less"
    images = [torch.tensor([list(image.tobytes()) for image in model.generate_image(["a red circle"] * 8, seed=3, num_iter=2)]).float() for model in (exact, plain, fast)]
    error, packed_error = ((image - images[0]).abs().mean(dim=1).median() for image in images[1:])
    assert packed_error < 1.5 * error < 10, "grey levels from float32: no farther than the plain path"
    assert fast.proj_in[0].weight.is_mkldnn, "packed in place: not twice in memory"
    copied = copy.deepcopy(plain)
    assert all(x.layout == torch.strided for x in fast.state_dict().values()) and copied.load_state_dict(fast.state_dict()).missing_keys == []
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), copied.parameters()))
    for folder, model in (("plain", plain), ("fast", fast)):
        model.save_pretrained(tmp_path / folder)
    assert (tmp_path / "plain/model.safetensors").read_bytes() == (tmp_path / "fast/model.safetensors").read_bytes()


@pytest.mark.skipif(not ONEDNN, reason="weights are packed on x86 only")
def test_packed_float32_differs_by_rounding_alone(small):
    fast = accelerate(copy.deepcopy(small), "packed")
    assert fast.llm.model.layers[0].mlp.down_proj.weight.is_mkldnn
    x = torch.randn(300, 32, generator=torch.Generator().manual_seed(0))
    parts = (lambda m: m.proj_in[0], lambda m: m.llm.model.layers[0].mlp, lambda m: m.mar.encoder_blocks[0].mlp, lambda m: m.mar.diffloss.net.res_blocks[0].mlp)
    with torch.no_grad():
        assert all(torch.allclose(part(fast)(x), part(small)(x), rtol=1e-4, atol=1e-6) for part in parts)
    prompt = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
    assert list(fast.llm.generate(prompt, max_new_tokens=8)) == list(small.llm.generate(prompt, max_new_tokens=8))
    a, b = (model.generate_image("a red circle", seed=3, num_iter=2)[0].tobytes() for model in (small, fast))
    assert max(abs(p - q) for p, q in zip(a, b)) <= 1
    assert all(torch.equal(fast.state_dict()[name], p) for name, p in small.state_dict().items())


def test_what_is_not_packed(small):
    assert "forward" not in vars(accelerate(copy.deepcopy(small), "auto").llm.lm_head), "so narrow a model is faster plain"
    half = copy.deepcopy(small).half()
    assert "forward" not in vars(accelerate(half, "auto").llm.lm_head)
    with pytest.raises(ValueError, match="float16"):
        accelerate(half, "packed")


def test_compiled_gives_the_same(small):
    fast = accelerate(copy.deepcopy(small).to(DEVICE), "compiled")
    a, b = (model.generate_image("a red circle", seed=3, num_iter=2)[0] for model in (copy.deepcopy(small).to(DEVICE), fast))
    assert max(abs(p - q) for p, q in zip(a.tobytes(), b.tobytes())) <= 1


def test_unknown_mode(small):
    with pytest.raises(ValueError, match="graphs"):
        accelerate(small, "warp")


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need CUDA")
def test_a_graph_is_captured_once_for_each_shape():
    calls = []

    def double(x):
        calls.append(x.shape)
        return 2 * x
    graph = Graph(double)
    for n in (4, 4, 5, 4):
        x = torch.randn(n, device=DEVICE)
        assert torch.equal(graph(x), 2 * x)
    assert len(graph.captured) == 2 and len(calls) == 6   # two to warm up and one captured, of each shape
