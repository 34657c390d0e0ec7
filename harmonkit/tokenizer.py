"""A model's tokenizer: a tokenizer.json, or Qwen2.5's vocab.json and merges.txt."""
import json
import os
from pathlib import Path

from tokenizers import Tokenizer, models

from harmonkit.chat_template import END, PAD, START
from harmonkit.config import read_json
from harmonkit.weight_files import failed_download

# Qwen2.5 splits text before BPE into contractions, words, single digits, punctuation, line ends and spaces.
WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
         r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
# Qwen2.5's tokens beyond its vocabulary, in the order of their ids from 151643 on.
SPECIAL_TOKENS = (PAD, START, END, "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
                  "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>",
                  "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
OTHER_TOKENS = ("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>",
                "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>")


def has_tokenizer(folder) -> bool:
    """Whether `load_tokenizer` finds its files in a folder."""
    names = {path.name for path in Path(folder).iterdir()}
    return "tokenizer.json" in names or {"vocab.json", "merges.txt"} <= names


def load_tokenizer(path, vocab_size=None) -> Tokenizer:
    """The tokenizer of a tokenizer.json, or of a folder with one or with vocab.json and merges.txt.

    vocab_size: rows of the model's embedding. Raises FileNotFoundError, and ValueError for what is no
    tokenizer of Qwen2.5's form, or makes ids that have no row.
    """
    file = Path(os.path.expanduser(path))
    if file.is_dir():
        only_parts = has_tokenizer(file) and not (file / "tokenizer.json").exists()
        file = file / ("vocab.json" if only_parts else "tokenizer.json")
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; a tokenizer.json is needed, or a folder with one or "
                                "with vocab.json and merges.txt")
    with open(file, "rb") as opened:
        failed = failed_download(opened.read(1024))
    if failed:
        raise ValueError(f"{file}: {failed}")
    try:
        if file.name == "vocab.json":
            tokenizer = build_tokenizer(file.parent)
        else:
            tokenizer = Tokenizer.from_file(str(file))
    except OSError:
        raise
    except Exception as error:  # tokenizers raises plain Exception
        raise ValueError(f"{file}: not a tokenizer file ({error})") from None
    lost = [token for token in (START, END, PAD) if tokenizer.token_to_id(token) is None]
    if lost:
        raise ValueError(f"{file}: a Qwen2.5 tokenizer is expected, with {' and '.join(lost)} in it")
    # Some files do not call these special, or keep the cut and padding of a training.
    tokenizer.add_special_tokens([START, END, PAD])
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if vocab_size is not None:
        check_ids(tokenizer, vocab_size, file)
    return tokenizer


def check_ids(tokenizer, vocab_size, source):
    """Raise ValueError if a text can become an id that has no row in an embedding of vocab_size rows."""
    # Special tokens other than the chat template's never come from a text.
    added = tokenizer.get_added_tokens_decoder()
    unused = {token.content for token in added.values() if token.special} - {START, END, PAD}
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    beyond = sorted((i, token) for token, i in vocabulary.items() if i >= vocab_size and token not in unused)
    if beyond:
        i, token = beyond[0]
        raise ValueError(f"{source}: {len(beyond)} of its tokens have no row among the model's {vocab_size}, "
                         f"the first {ascii(token)} with id {i}; give the tokenizer of this model")


def build_tokenizer(folder) -> Tokenizer:
    """Qwen2.5's tokenizer of a folder's vocab.json, merges.txt and, where they are there, the files that tell
    its added tokens: tokenizer_config.json and added_tokens.json.
    """
    vocab, merges = models.BPE.read_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    added = added_tokens(folder, vocab)
    # In the vocabulary too: ids of others would follow the number of entries.
    vocab |= {token["content"]: token["id"] for token in added}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": WORDS}, "behavior": "Isolated", "invert": False}
    return Tokenizer.from_str(json.dumps({
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
                  "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False, "vocab": vocab,
                  "merges": [list(pair) for pair in merges]},
    }))


def added_tokens(folder, vocab) -> list:
    """The tokens beyond the vocabulary, in the form of tokenizer.json."""
    plain = dict(single_word=False, lstrip=False, rstrip=False, normalized=False)
    if (folder / "added_tokens.json").is_file():
        ids = read_json(folder / "added_tokens.json")
    elif {START, END, PAD} <= vocab.keys():
        ids = {content: vocab[content] for content in SPECIAL_TOKENS + OTHER_TOKENS if content in vocab}
    else:
        first = max(vocab.values()) + 1
        ids = {content: i for i, content in enumerate(SPECIAL_TOKENS + OTHER_TOKENS, start=first)}
    known = {i: plain | {"id": i, "content": content, "special": content not in OTHER_TOKENS}
             for content, i in ids.items()}
    if (folder / "tokenizer_config.json").is_file():
        listed = read_json(folder / "tokenizer_config.json").get("added_tokens_decoder")
        if listed:
            known = {int(i): plain | token | {"id": int(i)} for i, token in listed.items()}
    return [known[i] for i in sorted(known)]
