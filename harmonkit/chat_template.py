"""Prompts: the chat template, the tokenizer, token ids, padding. Supplement of the paper, "Prompts";
Qwen2.5's ChatML.

    <|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>

The marks <|im_start|> and <|im_end|> are put in by id. In what users write they are text like any other, so
no caption, question or answer can end its turn.
"""
from threading import Lock

import torch

IMAGE_TOKEN_ID = -200            # in input_ids: a position that an image embedding fills
IGNORE_INDEX = -100              # in labels: no loss here
START, END, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
USER, ASSISTANT = f"{START}user\n", f"{START}assistant\n"
GENERATE = "Generate an image: {caption}"
UNCONDITIONAL = "Generate an image."                # of classifier-free guidance
DESCRIBE = "Describe the image."                    # the request about an image that has no other
LOCK = Lock()                                       # of a tokenizer's settings


def tokenize(tokenizer, text: str) -> list:
    """Token ids of a text as it is; special tokens in it are text.

    Raises ValueError for a model without a tokenizer, and for what is no text or not UTF-8.
    """
    if tokenizer is None:
        raise ValueError("this model has no tokenizer; give from_pretrained(tokenizer=…), a tokenizer.json "
                         "or a folder with one")
    if not isinstance(text, str):
        raise ValueError(f"a text is expected, not {type(text).__name__}: {ascii(text)[:60]}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        excerpt = text[max(0, error.start - 20):error.start + 20]
        raise ValueError(f"a text holds {ascii(text[error.start])}, half a character or a byte that is not "
                         f"UTF-8: {ascii(excerpt)}") from None
    # The tokenizer is the user's too, so its setting returns to what it was.
    with LOCK:
        before = tokenizer.encode_special_tokens
        tokenizer.encode_special_tokens = True      # encode them like other text
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        tokenizer.encode_special_tokens = before
    return ids


def message_ids(tokenizer, role: str, text: str, num_image_tokens=0) -> list:
    """Token ids of one turn of a conversation; role: system, user or assistant.

    num_image_tokens > 0: that many IMAGE_TOKEN_ID open the turn. The text before and after them is tokenized
    separately, as in the original.
    """
    if num_image_tokens:
        ids = tokenize(tokenizer, f"{role}\n") + [IMAGE_TOKEN_ID] * num_image_tokens
        ids += tokenize(tokenizer, f"\n{text}")
    else:
        ids = tokenize(tokenizer, f"{role}\n{text}")
    return [tokenizer.token_to_id(START), *ids, tokenizer.token_to_id(END), *tokenize(tokenizer, "\n")]


def answer_ids(tokenizer) -> list:
    """Token ids after which the model answers."""
    ids = tokenize(tokenizer, "assistant\n")
    return [tokenizer.token_to_id(START), *ids]


def prompt_ids(tokenizer, question: str, *, num_image_tokens=0, history=()) -> list:
    """Token ids of a conversation that waits for the answer to `question`. history: earlier (question,
    answer) pairs. num_image_tokens: of the image that opens the first question.
    """
    ids = []
    for earlier_question, earlier_answer in history:
        ids += message_ids(tokenizer, "user", earlier_question, num_image_tokens)
        ids += message_ids(tokenizer, "assistant", earlier_answer)
        num_image_tokens = 0
    return ids + message_ids(tokenizer, "user", question, num_image_tokens) + answer_ids(tokenizer)


def training_ids(tokenizer, turns, *, num_image_tokens=0, max_length=None) -> tuple:
    """[(question, answer or None), …] -> (ids, labels), two lists of one length. Answers and their END are
    labelled.

    max_length: text tokens at most; a longer text is cut at its end, image tokens never are.
    """
    ids, labels = [], []
    for i, (question, answer) in enumerate(turns):
        prompt = prompt_ids(tokenizer, question, num_image_tokens=0 if i else num_image_tokens)
        if i > 0:
            prompt = tokenize(tokenizer, "\n") + prompt
        target = []
        if answer is not None:
            target = [*tokenize(tokenizer, answer), tokenizer.token_to_id(END)]
        ids += prompt + target
        labels += [IGNORE_INDEX] * len(prompt) + target
    end = len(ids) if max_length is None else end_of_text(ids, num_image_tokens + max_length)
    return ids[:end], labels[:end]


def end_of_text(ids, end) -> int:
    """`end`, or the end of the image tokens that it would cut."""
    while end < len(ids) and ids[end] == IMAGE_TOKEN_ID:
        end += 1
    return end


def pad(tokenizer, rows, multiple=1) -> tuple:
    """Lists of ids -> input_ids (B, L) padded on the right, attention_mask (B, L) bool, True = real.

    L is a multiple of `multiple`.
    """
    longest = max(map(len, rows))
    L = longest + -longest % multiple
    pad_id = tokenizer.token_to_id(PAD)
    input_ids = torch.tensor([row + [pad_id] * (L - len(row)) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return input_ids, torch.arange(L) < lengths[:, None]
