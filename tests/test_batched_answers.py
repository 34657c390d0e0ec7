"""answer_batch gives each question the text that chat gives it alone."""
import random
from types import SimpleNamespace

import pytest
import torch

from harmon import Harmon
from harmonkit.chat_template import prompt_ids
from harmonkit.pipeline import CONTEXT_LENGTH, answer_batch, whole_characters
from harmonkit.repeatable import make_repeatable
from harmonkit.scripts import benchmark
from harmonkit.shapes_world import world


@pytest.fixture(scope="module")
def tiny():
    return make_repeatable(Harmon.from_pretrained(device="cpu"))


def mixed(count):
    """[(question, picture or None), …] of many lengths; every fourth one is text alone."""
    asked = []
    for i in range(count):
        scene = world.scene("batched answers", i)
        texts = [text for _, text, _ in world.questions(scene, random.Random(i))]
        text = texts[i % len(texts)] + " Look closely. \n" * (i % 7 == 3) * (i % 5)
        asked.append((text, None if i % 4 == 1 else world.render(scene)))
    return asked


@pytest.mark.parametrize("name, max_new_tokens", [("tiny", 16), ("small", 8)])
def test_64_mixed_questions_are_answered_as_one_by_one(request, name, max_new_tokens):
    model = request.getfixturevalue(name)
    questions, images = zip(*mixed(64))
    alone = ["".join(model.chat(question, image, max_new_tokens=max_new_tokens))
             for question, image in zip(questions, images)]
    assert answer_batch(model, questions, images, max_new_tokens=max_new_tokens) == alone
    lengths = {len(prompt_ids(model.tokenizer, question)) for question in questions}
    assert len(lengths) > 8 and len(set(alone)) > 8 and max(map(len, alone)) > 12


def test_an_answer_has_the_same_bits_in_any_batch(tiny, monkeypatch):
    """Of prompts of one padded length, as the runner makes its batches."""
    questions, images = zip(*[(text, image) for text, image in mixed(12) if image is not None])
    logits, seen = tiny.llm.logits, []

    def watch(hidden_states):
        seen.append(logits(hidden_states))
        return seen[-1]
    monkeypatch.setattr(tiny.llm, "logits", watch)
    answer_batch(tiny, questions, images, max_new_tokens=1)
    together = seen.pop()
    assert len({row.numpy().tobytes() for row in together}) == len(questions)
    for i, (question, image) in enumerate(zip(questions, images)):
        answer_batch(tiny, [question], [image], max_new_tokens=1)
        assert torch.equal(seen.pop()[0], together[i])


def test_questions_without_any_picture(small):
    questions = ["Why?", "How many sides does a triangle have, and why?"]
    alone = ["".join(small.chat(question, max_new_tokens=6)) for question in questions]
    assert answer_batch(small, questions, max_new_tokens=6) == alone
    assert answer_batch(small, questions, [None, None], max_new_tokens=6) == alone
    assert answer_batch(small, [], []) == []


def test_a_shared_picture_is_encoded_once(small, monkeypatch):
    picture, other = world.render(world.scene("a", 0)), world.render(world.scene("b", 0))
    encode, calls = small.encode, []

    def count(pixels):
        calls.append(len(pixels))
        return encode(pixels)
    monkeypatch.setattr(small, "encode", count)
    questions, images = ["a", "bc", "d", "e"], [picture, picture, None, other]
    together = answer_batch(small, questions, images, max_new_tokens=4)
    assert calls == [1, 1]                                  # each alone, so no bit depends on the batch
    assert together == ["".join(small.chat(*asked, max_new_tokens=4)) for asked in zip(questions, images)]


def test_rows_that_have_ended_leave_the_batch(small, monkeypatch):
    questions = ["Why?", "What is it, and where?", "How?"]
    texts = answer_batch(small, questions, max_new_tokens=8)
    logits, steps = small.llm.logits, []

    def end_row(hidden_states):
        """After its second token the row that was the batch's first one ends."""
        scores = logits(hidden_states)
        if len(steps) == 2:
            scores[0, small.tokenizer.token_to_id("<|im_end|>")] = scores.max() + 1
        steps.append(len(scores))
        return scores
    monkeypatch.setattr(small.llm, "logits", end_row)
    ended = answer_batch(small, questions, max_new_tokens=8)
    assert steps == [3, 3, 3, 2, 2, 2, 2, 2]
    assert ended[1:] == texts[1:] and texts[0].startswith(ended[0]) and ended[0] != texts[0]


def test_a_character_without_its_last_token_is_left_out(tokenizer):
    ids = tokenizer.encode("a red ☃").ids
    assert whole_characters(tokenizer, ids) == "a red ☃"
    assert whole_characters(tokenizer, ids[:-1]) == "a red "
    assert whole_characters(tokenizer, []) == ""


def test_answers_per_second_are_measured_in_batches(monkeypatch, tokenizer):
    monkeypatch.setattr(benchmark, "seconds", lambda run, repeat: len(run()) / 10)
    monkeypatch.setattr(benchmark.tokenizer, "train_tokenizer", lambda size: tokenizer)
    args = SimpleNamespace(model="harmon-tiny", device=torch.device("cpu"), dtype="float32", mode="auto",
                           size=None, batch_sizes=[1, 3], answer_tokens=1, repeat=1)
    assert dict(benchmark.batch_rows(args)) == {
        "image to text: batch of 1": {"seconds": 0.1, "answers/s": 10},
        "image to text: batch of 3": {"seconds": 0.3, "answers/s": 10}}


def test_wrong_input_is_refused(small):
    with pytest.raises(ValueError, match="2 questions, but 1 images"):
        answer_batch(small, ["a", "b"], [None])
    with pytest.raises(ValueError, match="a question is empty"):
        answer_batch(small, ["a", " "])
    with pytest.raises(ValueError, match=f"but there is room for {CONTEXT_LENGTH - 32760} beside"):
        answer_batch(small, ["a", "b " * 30], max_new_tokens=32760)
    with pytest.raises(FileNotFoundError, match="nowhere.png: no such file"):
        answer_batch(small, ["a"], ["nowhere.png"])
