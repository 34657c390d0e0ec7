"""Prompts: the chat template, the tokenizer, token ids, padding. Supplement of the paper, "Prompts";
Qwen2.5's ChatML.

    <|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>
"""
from pathlib import Path

import torch
from tokenizers import Tokenizer

IMAGE_TOKEN_ID = -200            # in input_ids: a position that an image embedding fills
IGNORE_INDEX = -100              # in labels: no loss here
END, PAD = "<|im_end|>", "<|endoftext|>"
USER, ASSISTANT = "<|im_start|>user\n", "<|im_start|>assistant\n"
GENERATE = "Generate an image: {caption}"
UNCONDITIONAL = "Generate an image."                # of classifier-free guidance


def load_tokenizer(path) -> Tokenizer:
    """The tokenizer of a tokenizer.json or of a folder with one. Raises FileNotFoundError or ValueError."""
    path = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a tokenizer.json is needed")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exception
        raise ValueError(f"{path}: not a tokenizer file ({error})") from None
    if tokenizer.token_to_id(END) is None or tokenizer.token_to_id(PAD) is None:
        raise ValueError(f"{path}: a Qwen2.5 tokenizer is expected, with {END} and {PAD} in it")
    return tokenizer


def tokenize(tokenizer, text: str) -> list:
    """Token ids of a text as it is. Raises ValueError for a model without a tokenizer."""
    if tokenizer is None:
        raise ValueError("this model has no tokenizer; give from_pretrained(tokenizer=…), a tokenizer.json "
                         "or a folder with one")
    return tokenizer.encode(text, add_special_tokens=False).ids


def prompt_ids(tokenizer, question: str, *, num_image_tokens=0, history=()) -> list:
    """Token ids of a conversation that waits for the answer to `question`. history: earlier (question,
    answer) pairs.

    num_image_tokens > 0: that many IMAGE_TOKEN_ID open the first user turn. The text before and after them is
    tokenized separately, as in the original.
    """
    text = ""
    for earlier_question, earlier_answer in history:
        text += f"{USER}{earlier_question}{END}\n{ASSISTANT}{earlier_answer}{END}\n"
    text += f"{USER}{question}{END}\n{ASSISTANT}"
    if not num_image_tokens:
        return tokenize(tokenizer, text)
    after_image = "\n" + text.removeprefix(USER)
    return tokenize(tokenizer, USER) + [IMAGE_TOKEN_ID] * num_image_tokens + tokenize(tokenizer, after_image)


def training_ids(tokenizer, turns, *, num_image_tokens=0, max_length=None) -> tuple:
    """[(question, answer or None), …] -> (ids, labels), two lists of one length. Answers and their END are
    labelled.

    max_length: text tokens at most; a longer text is cut at its end, image tokens never are.
    """
    ids, labels = [], []
    for i, (question, answer) in enumerate(turns):
        if i == 0:
            prompt = prompt_ids(tokenizer, question, num_image_tokens=num_image_tokens)
        else:
            prompt = tokenize(tokenizer, f"\n{USER}{question}{END}\n{ASSISTANT}")
        answer_ids = [] if answer is None else tokenize(tokenizer, answer + END)
        ids += prompt + answer_ids
        labels += [IGNORE_INDEX] * len(prompt) + answer_ids
    end = None if max_length is None else num_image_tokens + max_length
    return ids[:end], labels[:end]


def pad(tokenizer, rows) -> tuple:
    """Lists of ids -> input_ids (B, L) padded on the right, attention_mask (B, L) bool, True = real."""
    L = max(map(len, rows))
    pad_id = tokenizer.token_to_id(PAD)
    input_ids = torch.tensor([row + [pad_id] * (L - len(row)) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return input_ids, torch.arange(L) < lengths[:, None]
