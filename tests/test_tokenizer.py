"""The prompt template in Qwen2.5's own ids. qwen2.5-excerpt.json is its tokenizer.json with the vocabulary cut to a few words."""
import pytest
from conftest import ROOT, SMALL

from harmonkit.data.mixture import train_tokenizer
from harmon import END, GENERATE, IMAGE_TOKEN_ID, PAD, UNCONDITIONAL, Harmon, load_tokenizer

START = [151644, 872, 198]                          # <|im_start|>user\n
ANSWER = [151645, 198, 151644, 77091, 198]          # <|im_end|>\n<|im_start|>assistant\n


@pytest.fixture(scope="module")
def model():
    model = Harmon(SMALL)
    model.tokenizer = load_tokenizer(ROOT / "tests/qwen2.5-excerpt.json")
    return model


def test_ids_of_the_template(model):
    caption = "a dog on the left and a cat on the right."
    assert model.prompt_ids(GENERATE.format(caption=caption)) == START + [31115, 458, 2168, 25, 264, 5562, 389, 279, 2115, 323, 264, 8251, 389, 279, 1290, 13] + ANSWER
    assert model.prompt_ids(UNCONDITIONAL) == START + [31115, 458, 2168, 13] + ANSWER
    question = model.prompt_ids("Describe the image in detail.", image_tokens=3)
    assert question == START + [IMAGE_TOKEN_ID] * 3 + [198, 74785, 279, 2168, 304, 7716, 13] + ANSWER
    assert (model.tokenizer.token_to_id(END), model.tokenizer.token_to_id(PAD)) == (151645, 151643)


def test_the_tiny_tokenizer_has_the_same_form():
    tokenizer = train_tokenizer(512)
    ids = tokenizer.encode("<|im_start|>user\nGenerate an image: three blue stars<|im_end|>\n").tokens
    assert ids == ["<|im_start|>", "user", "Ċ", "Generate", "Ġan", "Ġimage", ":", "Ġthree", "Ġblue", "Ġstars", "<|im_end|>", "Ċ"]
    for text in ("a zebra, 12 ½ times – 好", "  two  spaces\n\n", "three blue stars"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path):
    for content in ("{", '{"model": 3}'):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(ValueError, match="not a tokenizer file"):
            load_tokenizer(tmp_path)
    train_tokenizer(300).save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).get_vocab_size() == 300
