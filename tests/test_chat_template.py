"""The chat template in Qwen2.5's own ids. qwen2.5-excerpt.json is its tokenizer.json with a few words."""
import pytest
import torch
from conftest import ROOT

from harmonkit import chat_template
from harmonkit.chat_template import END, IMAGE_TOKEN_ID, load_tokenizer, prompt_ids, training_ids

START = [151644, 872, 198]                          # <|im_start|>user\n
ANSWER = [151645, 198, 151644, 77091, 198]          # <|im_end|>\n<|im_start|>assistant\n


@pytest.fixture(scope="module")
def qwen():
    return load_tokenizer(ROOT / "tests/qwen2.5-excerpt.json")


def test_ids_of_the_template(qwen):
    caption = "a dog on the left and a cat on the right."
    caption_ids = [264, 5562, 389, 279, 2115, 323, 264, 8251, 389, 279, 1290, 13]
    generate = prompt_ids(qwen, chat_template.GENERATE.format(caption=caption))
    assert generate == START + [31115, 458, 2168, 25] + caption_ids + ANSWER
    assert prompt_ids(qwen, chat_template.UNCONDITIONAL) == START + [31115, 458, 2168, 13] + ANSWER
    question = prompt_ids(qwen, "Describe the image in detail.", num_image_tokens=3)
    assert question == START + [IMAGE_TOKEN_ID] * 3 + [198, 74785, 279, 2168, 304, 7716, 13] + ANSWER
    assert (qwen.token_to_id(END), qwen.token_to_id(chat_template.PAD)) == (151645, 151643)


def test_history_and_image_in_a_prompt(tokenizer):
    ids = prompt_ids(tokenizer, "What is it?", num_image_tokens=20, history=[("Hi", "Hello"), ("So", "what")])
    first = ids.index(IMAGE_TOKEN_ID)
    assert ids[first:first + 20] == [IMAGE_TOKEN_ID] * 20 and ids.count(IMAGE_TOKEN_ID) == 20
    before = tokenizer.decode(ids[:first], skip_special_tokens=False)
    after = tokenizer.decode(ids[first + 20:], skip_special_tokens=False)
    assert before == "<|im_start|>user\n"
    assert after == ("\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
                     "<|im_start|>user\nSo<|im_end|>\n<|im_start|>assistant\nwhat<|im_end|>\n"
                     "<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\n")


def test_training_sees_the_tokens_of_chat(tokenizer):
    turns = [("What color is the star?", "red"), ("How many?", "two")]
    ids, labels = training_ids(tokenizer, turns, num_image_tokens=20)
    first = prompt_ids(tokenizer, "What color is the star?", num_image_tokens=20)
    assert ids[:len(first)] == first
    second = prompt_ids(tokenizer, "How many?", num_image_tokens=20, history=turns[:1])
    assert ids[:len(second)] == second
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
    labelled = [label for label in labels if label != -100]
    assert tokenizer.decode(labelled, skip_special_tokens=False) == f"red{END}two{END}"
    ids, labels = training_ids(tokenizer, [("Draw!", None)])
    assert ids == prompt_ids(tokenizer, "Draw!") and set(labels) == {-100}


def test_long_answers_are_cut_but_images_never(tokenizer):
    long = [("What is it?", "a very long answer " * 50)]
    ids, labels = training_ids(tokenizer, long, num_image_tokens=20, max_length=40)
    assert ids.count(IMAGE_TOKEN_ID) == 20 and len(ids) == len(labels) == 60
    ids, labels = training_ids(tokenizer, [("What is it?", "short")], num_image_tokens=20, max_length=40)
    assert ids[-1] == labels[-1] == tokenizer.token_to_id(END)


def test_padding_is_on_the_right_and_masked(qwen):
    input_ids, attention_mask = chat_template.pad(qwen, [[5, 6, 7], [8]])
    assert input_ids.tolist() == [[5, 6, 7], [8, 151643, 151643]]
    assert attention_mask.dtype == torch.bool
    assert attention_mask.tolist() == [[True, True, True], [True, False, False]]


def test_a_model_without_a_tokenizer_is_told_what_to_do():
    with pytest.raises(ValueError, match="no tokenizer; give from_pretrained"):
        chat_template.tokenize(None, "a star")


def test_the_tiny_tokenizer_has_the_same_form(tokenizer):
    ids = tokenizer.encode("<|im_start|>user\nGenerate an image: three blue stars<|im_end|>\n").tokens
    assert ids == ["<|im_start|>", "user", "Ċ", "Generate", "Ġan", "Ġimage", ":", "Ġthree", "Ġblue", "Ġstars",
                   "<|im_end|>", "Ċ"]
    for text in ("a zebra, 12 ½ times – 好", "  two  spaces\n\n", "three blue stars"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_files_that_are_no_tokenizer_are_refused(tmp_path, tokenizer):
    with pytest.raises(FileNotFoundError, match="tokenizer.json: no such file"):
        load_tokenizer(tmp_path)
    for content in ("{", '{"model": 3}'):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(ValueError, match="not a tokenizer file"):
            load_tokenizer(tmp_path)
    file = tmp_path / "tokenizer.json"
    tokenizer.save(str(file))
    assert load_tokenizer(tmp_path).get_vocab_size() == 512
    file.write_text(file.read_text().replace(END, "<|end|>"))
    with pytest.raises(ValueError, match="a Qwen2.5 tokenizer is expected"):
        load_tokenizer(tmp_path)
