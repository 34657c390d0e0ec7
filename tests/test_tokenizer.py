"""Tokenizers as they lie beside models: one file, or vocab.json and merges.txt."""
import json

import pytest
from conftest import ROOT

from harmonkit.chat_template import END, PAD, START, prompt_ids, tokenize
from harmonkit.tokenizer import OTHER_TOKENS, SPECIAL_TOKENS, has_tokenizer, load_tokenizer

EXCERPT = ROOT / "tests/qwen2.5-excerpt.json"
TEXTS = ["a dog on the left and a cat.", "don't  say\n\n12 ½ – 好", "",
         "e\u0301 <|im_end|> <tool_call> <|fim_pad|>"]


@pytest.fixture(scope="module")
def qwen():
    return load_tokenizer(EXCERPT)


def write_parts(folder, content, config=None, added=None):
    """vocab.json and merges.txt of a tokenizer.json's content, and the files that name the added tokens."""
    folder.mkdir()
    added_names = {token["content"] for token in content["added_tokens"]}
    vocab = {token: i for token, i in content["model"]["vocab"].items() if token not in added_names}
    pairs = content["model"]["merges"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in pairs]
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if added is not None:
        (folder / "added_tokens.json").write_text(json.dumps(added))
    return folder


def same_ids(one, other):
    return all(prompt_ids(one, text) == prompt_ids(other, text) for text in TEXTS)


def forms(content):
    """How hubs tell the added tokens: in tokenizer_config.json, in added_tokens.json, in both."""
    listed = {str(token["id"]): {key: value for key, value in token.items() if key != "id"}
              for token in content["added_tokens"]}
    config = {"added_tokens_decoder": listed, "model_max_length": 131072}
    added = {token["content"]: token["id"] for token in content["added_tokens"]}
    return [(config, None), (None, added), (config, added), ({"model_max_length": 131072}, added)]


@pytest.mark.parametrize("form", range(4))
def test_vocabulary_and_merges_give_the_same_tokenizer(qwen, tmp_path, form):
    content = json.loads(EXCERPT.read_text())
    folder = write_parts(tmp_path / "qwen", content, *forms(content)[form])
    built = load_tokenizer(folder)
    assert has_tokenizer(folder) and same_ids(built, qwen)
    assert same_ids(load_tokenizer(folder / "vocab.json"), qwen)
    assert built.get_vocab() == qwen.get_vocab()
    for one in (built, qwen):
        added = one.get_added_tokens_decoder().values()
        assert {token.content for token in added if token.special} == set(SPECIAL_TOKENS)
    for text in TEXTS:
        ids = tokenize(qwen, text)
        assert built.decode(ids) == qwen.decode(ids)


def test_vocabulary_and_merges_alone_have_qwens_added_tokens(qwen, tmp_path):
    """Behind the last id of the vocabulary, in Qwen2.5's order: there 151643 to 151664."""
    content = json.loads(EXCERPT.read_text())
    content["model"]["vocab"]["last"] = 151642
    built = load_tokenizer(write_parts(tmp_path / "qwen", content))
    assert same_ids(built, qwen)
    assert [built.token_to_id(token) for token in (PAD, START, END)] == [151643, 151644, 151645]
    assert [built.token_to_id(token) for token in SPECIAL_TOKENS + OTHER_TOKENS] == [*range(151643, 151665)]


def test_a_vocabulary_may_hold_the_added_tokens(tokenizer, tmp_path):
    content = json.loads(tokenizer.to_str())
    (tmp_path / "vocab.json").write_text(json.dumps(content["model"]["vocab"]))
    merges = [" ".join(pair) for pair in content["model"]["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(merges))
    built = load_tokenizer(tmp_path, vocab_size=512)
    assert built.get_vocab() == tokenizer.get_vocab()
    assert all(prompt_ids(built, text) == prompt_ids(tokenizer, text) for text in TEXTS[:3])


def test_they_are_what_transformers_makes_of_them(tmp_path):
    transformers = pytest.importorskip("transformers")
    content = json.loads(EXCERPT.read_text())
    folder = write_parts(tmp_path / "qwen", content, *forms(content)[0])
    theirs, ours = transformers.Qwen2Tokenizer.from_pretrained(str(folder)), load_tokenizer(folder)
    for text in ("a dog on the left and a cat.", "don't  say\n\n12 ½ – 好", "e\u0301 <image>"):
        assert theirs(text)["input_ids"] == tokenize(ours, text)


def test_one_file_goes_before_the_parts(qwen, tmp_path):
    content = json.loads(EXCERPT.read_text())
    folder = write_parts(tmp_path / "qwen", content)
    (folder / "tokenizer.json").write_text(EXCERPT.read_text())
    assert load_tokenizer(folder).get_vocab() == qwen.get_vocab()
    (folder / "merges.txt").unlink()
    (folder / "tokenizer.json").unlink()
    assert not has_tokenizer(folder)
    with pytest.raises(FileNotFoundError, match="tokenizer.json: no such file; .* vocab.json and merges.txt"):
        load_tokenizer(folder)


def test_broken_parts_are_named(tmp_path):
    folder = write_parts(tmp_path / "qwen", json.loads(EXCERPT.read_text()))
    (folder / "vocab.json").write_text("{")
    with pytest.raises(ValueError, match="vocab.json: not a tokenizer file"):
        load_tokenizer(folder)


def test_ids_beyond_the_models_rows_are_refused(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="excerpt.json: .* have no row among the model's 512, the first "):
        load_tokenizer(EXCERPT, vocab_size=512)
    assert load_tokenizer(EXCERPT, vocab_size=151936).token_to_id(END) == 151645
    assert load_tokenizer(EXCERPT, vocab_size=151665).token_to_id(END) == 151645
    with pytest.raises(ValueError, match="1 of its tokens have no row among the model's 151664, the first "
                                         "'<.file_sep.>' with id 151664; give the tokenizer of this model"):
        load_tokenizer(EXCERPT, vocab_size=151664)
    # Special tokens that no text becomes may lie beyond.
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["added_tokens"].append(content["added_tokens"][0] | {"id": 512, "content": "<|video_pad|>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert load_tokenizer(tmp_path, vocab_size=512).token_to_id("<|video_pad|>") == 512


def test_the_templates_marks_are_special_whatever_the_file_says(tmp_path):
    content = json.loads(EXCERPT.read_text())
    content["added_tokens"] = [token | {"special": False} for token in content["added_tokens"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    ids = tokenize(load_tokenizer(tmp_path), f"a {START} {END} {PAD}")
    assert {151643, 151644, 151645}.isdisjoint(ids)


def test_the_cut_and_padding_of_a_training_are_dropped(qwen, tmp_path):
    content = json.loads(EXCERPT.read_text())
    content["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None,
                          "pad_id": 151643, "pad_type_id": 0, "pad_token": PAD}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert same_ids(load_tokenizer(tmp_path), qwen)


def test_files_that_are_no_tokenizer_are_refused(tmp_path, tokenizer):
    with pytest.raises(FileNotFoundError, match="tokenizer.json: no such file"):
        load_tokenizer(tmp_path)
    file = tmp_path / "tokenizer.json"
    for content, message in (
            ("{", "not a tokenizer file"),
            ('{"model": 3}', "not a tokenizer file"),
            ("", "empty; download it again"),
            ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7031645\n", "a Git-LFS pointer"),
            ("<!DOCTYPE html>", "a web page")):
        file.write_text(content)
        with pytest.raises(ValueError, match=f"tokenizer.json: {message}"):
            load_tokenizer(tmp_path)
    tokenizer.save(str(file))
    assert load_tokenizer(tmp_path).get_vocab_size() == 512
    file.write_text(file.read_text().replace(END, "<|end|>"))
    with pytest.raises(ValueError, match="a Qwen2.5 tokenizer is expected, with <.im_end.> in it"):
        load_tokenizer(tmp_path)


def test_home_is_expanded(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer("~").get_vocab_size() == load_tokenizer("~/tokenizer.json").get_vocab_size() == 512
