"""Pictures are equal to the bit in any batch and for any number of threads, with the fast paths on."""
import copy

import pytest
import torch

from harmon import Harmon
from harmonkit.fast import accelerate
from harmonkit.outputs import Picture, batches
from harmonkit.pipeline import PROMPT_BLOCK, generation_prompts
from harmonkit.repeatable import ROWS, PaddedLinear, make_repeatable

PROMPTS = ["a red circle", "a green cross left of a yellow triangle", "two crosses", "one star"]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def pictures(model, batch_size):
    """The pixels of each prompt's picture before they are rounded to bytes."""
    drawn = []
    for start in range(0, len(PROMPTS), batch_size):
        ids, real = generation_prompts(model, PROMPTS[start:start + batch_size], 3.0, PROMPT_BLOCK)
        generators = [torch.Generator().manual_seed(start + i) for i in range(len(ids) // 2)]
        drawn += model.sample(ids, real, generator=generators, num_iter=12, num_sampling_steps=8)
    return [pixels.float().numpy().tobytes() for pixels in drawn]


@pytest.mark.parametrize("dtype, mode", [("float32", "auto"), ("float32", "eager"), ("bfloat16", "auto")])
def test_batch_and_threads_change_no_bit(dtype, mode, threads):
    model = make_repeatable(accelerate(Harmon.from_pretrained(device="cpu", dtype=dtype), mode))
    threads(2)
    together = pictures(model, 4)
    assert len(set(together)) == 4
    assert pictures(model, 1) == together
    threads(1)
    assert pictures(model, 3) == together


def test_small_products_give_the_rows_of_large_ones(threads):
    torch.manual_seed(0)
    plain = torch.nn.Linear(192, 40)
    layer = copy.deepcopy(plain)
    layer.__class__ = PaddedLinear
    x = torch.randn(ROWS, 192)
    for rows in (0, 1, 3, ROWS):
        assert torch.equal(layer(x[:rows]), plain(x)[:rows])
    assert torch.equal(layer(x[:6].view(2, 3, 192)), plain(x)[:6].view(2, 3, 40))


def test_prompts_of_one_padded_length_share_a_batch(small):
    texts = ["a", "b " * 40, "c", "d", "b " * 40]
    jobs = [(None, Picture(None, text, 0, "{}")) for text in texts]

    def padded_length(prompt):
        return generation_prompts(small, [prompt], 3.0, PROMPT_BLOCK)[0].shape[1]
    cut = [[picture.prompt[0] for _, picture in batch] for batch in batches(jobs, 2, padded_length)]
    assert cut == [["a", "c"], ["d"], ["b", "b"]]
    assert padded_length("a") == 32 and padded_length("b " * 40) % 32 == 0
