"""From text to images and from images to text, around the model's tensors. The model is an argument."""
import bisect
import numbers
import re
from contextlib import contextmanager

import numpy as np
import torch

from harmonkit import inpainting, reconstruction
from harmonkit.chat_template import END, GENERATE, UNCONDITIONAL, pad, prompt_ids
from harmonkit.checkpoints import first_not_finite, is_finite
from harmonkit.images import image_to_pixels, pad_to_square, pixels_to_images
from llm import KVCache, most_likely

PROMPT_BLOCK = 32                   # prompts are padded to whole blocks, see repeatable.py
CONTEXT_LENGTH = 32_768             # tokens with which Qwen2.5 was trained


def token_grid(model, size=None) -> tuple:
    """size in pixels, a whole number or (H, W), None = native -> (h, w) tokens. Raises ValueError."""
    if size is None:
        size = model.config.mar.img_size
    sides = size if isinstance(size, (tuple, list)) else (size, size)
    if len(sides) != 2 or not all(isinstance(side, numbers.Integral) for side in sides):
        raise ValueError(f"size is {size!r}; a number of pixels or (height, width) is expected")
    H, W = map(int, sides)
    s = model.config.vae.stride
    if H < s or W < s or H % s or W % s:
        raise ValueError(f"size {H}x{W} is not possible: height and width must be positive multiples of {s}")
    return H // s, W // s


@contextmanager
def evaluation_mode(model):
    """Without dropout in this block, whatever `model.train()` has set; afterwards all is as before."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def naming_the_weight(model):
    """A ValueError in this block, of an output that is not finite, names the first such weight too."""
    try:
        yield
    except ValueError as error:
        name = first_not_finite(model.state_dict())
        if name is None:
            raise
        raise ValueError(f"{error}; here it is the weight {name}") from None


def check_attention(model, *parts):
    """Raise ValueError for weights of queries and keys that are not finite. parts: "mar", "vae" or both.

    On a CPU, torch's attention without a mask may turn NaN there into finite numbers. All other weights that
    are not finite show in the output.
    """
    with naming_the_weight(model):
        for name, p in model.named_parameters():
            is_hidden = name.partition(".")[0] in parts and re.search(r"\.(qkv|q|k)\.", name)
            if is_hidden and not p.is_mkldnn and not is_finite(p):
                raise ValueError("the attention is not finite: the weights hold NaN or infinity")


def decode_each(model, z):
    """z (B, C, h, w), unscaled -> pixels (B, 3, s·h, s·w). Raises ValueError for NaN and infinity.

    One image at a time: it bounds the memory, and no image depends on its batch.
    """
    check_attention(model, "vae")
    pixels = torch.cat([model.vae.decode(part) for part in z.split(1)])
    with naming_the_weight(model):
        if not (pixels.is_meta or pixels.isfinite().all()):
            raise ValueError("the pixels are not finite: the weights hold NaN or infinity, "
                             "or the dtype overflows")
    return pixels


# ---- text -> images ------------------------------------------------------------------------------

def generation_prompts(model, prompts, cfg, multiple=1, num_image_tokens=0) -> tuple:
    """input_ids and attention_mask (rows, L) of prompts; with guidance as many unconditional rows follow.

    L is a multiple of `multiple`. num_image_tokens > 0: the prompts are requests about an image of that many
    tokens, which the unconditional rows do not show.
    """
    template = "{caption}" if num_image_tokens else GENERATE
    texts = [template.format(caption=prompt.strip()) for prompt in prompts]
    rows = [prompt_ids(model.tokenizer, text, num_image_tokens=num_image_tokens) for text in texts]
    if cfg != 1:
        rows += [prompt_ids(model.tokenizer, UNCONDITIONAL)] * len(prompts)
    return pad(model.tokenizer, rows, multiple)


def seeds_of(seed, count) -> list:
    """One seed, image i then uses seed + i, or one for each of `count` images -> ints. Raises ValueError.

    Whole numbers of any type, also in lists, arrays and tensors.
    """
    given = np.asarray(seed)
    if given.dtype.kind not in "iu":
        raise ValueError(f"seed is {seed!r}; a whole number is expected, or one for each image")
    seeds = given.tolist() if given.ndim else [int(given) + i for i in range(count)]
    if given.ndim > 1 or len(seeds) != count:
        raise ValueError(f"{count} prompts, but {given.size} seeds")
    if not all(-2 ** 63 <= s < 2 ** 64 for s in seeds):
        raise ValueError(f"seed is {seed!r}; torch takes 64 bits")
    return seeds


@torch.no_grad()
def generate_image(model, prompts=None, *, size=None, seed=0, cfg=3.0, image=None, mask=None, like=None,
                   **sampling) -> list:
    """Draw one PIL image for each prompt.

    prompts: a string or a list. size: pixels, a number or (H, W), multiples of the VAE's stride. seed: a
    whole number, image i then uses seed + i; or a list with one for each image. An image depends on its
    prompt and seed, not on its batch. image with mask: redraw the image where the mask marks it, keep its
    other pixels exactly (inpainting); PIL images, paths or arrays, see `images.as_image` and `as_mask`. The
    results then have the image's size, and `size` only says about how many pixels are drawn. like: a picture
    that the model looks at and draws anew, or a list with one for each prompt; its middle is seen, in the
    proportions of `size`. Its prompts are requests about it. Left out, they are the one that reconstruction
    alignment trains; others are untrained. sampling: num_iter, cfg_schedule, temperature, solver, progress of
    `Harmon.sample`, and more.
    Raises ValueError for an empty prompt, an impossible size, settings outside their ranges, a mask that
    marks nothing or has another shape than the image, or weights that are not finite.
    """
    if like is not None:
        if image is not None or mask is not None:
            raise ValueError("like goes with neither image nor mask: it is looked at and drawn anew whole")
        prompts, pictures = reconstruction.prompts_and_pictures(prompts, like)
    prompts = [prompts] if isinstance(prompts, str) else list(() if prompts is None else prompts)
    if not prompts or not all(isinstance(p, str) and p.strip() for p in prompts):
        raise ValueError("a prompt is empty; say what to draw")
    seeds = seeds_of(seed, len(prompts))
    if (image is None) != (mask is None):
        raise ValueError("image and mask go together: the mask says which part of the image is redrawn")
    grid = token_grid(model, size)
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    settings = dict(cfg=cfg, generator=generators, **sampling)
    num_image_tokens = 0
    if like is not None:
        with evaluation_mode(model):
            settings["z_enc"] = reconstruction.features(model, pictures, grid)          # (B, N+n, H)
        num_image_tokens = settings["z_enc"].shape[1]
    input_ids, attention_mask = generation_prompts(model, prompts, cfg, PROMPT_BLOCK, num_image_tokens)
    if image is None:
        return pixels_to_images(model.sample(input_ids, attention_mask, grid=grid, **settings))
    picture, mask = inpainting.picture_and_mask(image, mask)
    grid = inpainting.nearest_grid(picture.size, grid)
    canvas = inpainting.canvas(model, picture, mask, grid, len(prompts))
    pixels = model.sample(input_ids, attention_mask, grid=grid, canvas=canvas, **settings)
    return [inpainting.paste(picture, mask, drawn) for drawn in pixels_to_images(pixels)]


# ---- images -> text ------------------------------------------------------------------------------

def history_pairs(history) -> list:
    """Earlier turns, as (question, answer) pairs or as {role, content} dicts -> pairs. Raises ValueError.

    System turns are dropped. content: a text, or a list of parts {type: text, text}.
    """
    history = list(history)
    if not all(isinstance(turn, dict) for turn in history):
        for pair in history:
            is_pair = isinstance(pair, (list, tuple)) and len(pair) == 2
            if not is_pair or not all(isinstance(text, str) for text in pair):
                raise ValueError(f"a turn of the history is {str(pair)[:80]!r}; (question, answer) is "
                                 "expected, or dicts with role and content")
        return [tuple(pair) for pair in history]
    turns = [turn for turn in history if turn.get("role") != "system"]
    roles = [turn.get("role") for turn in turns]
    if roles != ["user", "assistant"] * (len(roles) // 2):
        raise ValueError(f"the history's roles are {roles}; user and assistant must alternate, and an answer "
                         "ends it")
    texts = [content_text(turn.get("content")) for turn in turns]
    return list(zip(texts[::2], texts[1::2]))


def content_text(content) -> str:
    """The content of a turn, a text or a list of text parts, as one text. Raises ValueError."""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    is_text = isinstance(parts, list) and all(isinstance(part, dict) for part in parts)
    if not is_text or not all(isinstance(part.get("text"), str) for part in parts):
        raise ValueError(f"the content of a turn is {str(content)[:80]!r}; a text is expected")
    return "".join(part["text"] for part in parts)


def fit_history(model, question, history, *, num_image_tokens=0, room=CONTEXT_LENGTH) -> list:
    """The pairs of `history_pairs` without the oldest ones, so that the prompt has at most `room` tokens.

    Raises ValueError if the question alone has more.
    """
    pairs = history_pairs(history)

    def length_from(start):
        return len(prompt_ids(model.tokenizer, question, num_image_tokens=num_image_tokens,
                              history=pairs[start:]))
    start = bisect.bisect_left(range(len(pairs)), True, key=lambda start: length_from(start) <= room)
    if start == len(pairs) and length_from(start) > room:
        raise ValueError(f"the question has {length_from(start)} tokens, but there is room for {room} beside "
                         "the answer; shorten it, or lower max_new_tokens")
    return pairs[start:]


def image_features(model, image, size=None):
    """What the LLM sees of a picture, padded to a square and resized: z_enc (1, N+n, H)."""
    h, w = token_grid(model, size)
    s = model.config.vae.stride
    pixels = image_to_pixels(pad_to_square(image), (h * s, w * s))
    _, z_enc = model.visual_features(model.encode(pixels))
    return z_enc


@torch.no_grad()
def chat(model, question, image=None, *, history=(), max_new_tokens=1024, size=None,
         max_length=CONTEXT_LENGTH):
    """Answer a question, about an image if given: yields pieces of text.

    image: a PIL image, a path or an array, see `images.as_image`. history: earlier (question, answer) pairs,
    or {role, content} dicts. size: pixels to which the image is resized, default the native size. max_length:
    tokens of prompt and answer together; the oldest turns of a longer history are left out. Raises ValueError
    for an empty question, one that leaves no room for the answer, or weights that are not finite.
    """
    if not isinstance(question, str) or not question.strip():
        raise ValueError("the question is empty")
    with evaluation_mode(model):
        z_enc = None
        if image is not None:
            check_attention(model, "vae", "mar")
            z_enc = image_features(model, image, size)                                  # (1, N+n, H)
        num_image_tokens = 0 if z_enc is None else z_enc.shape[1]
        history = fit_history(model, question, history, num_image_tokens=num_image_tokens,
                              room=max_length - max_new_tokens)
        ids = prompt_ids(model.tokenizer, question, num_image_tokens=num_image_tokens, history=history)
        embeds = model.embed(torch.tensor([ids], device=model.device), z_enc)

        answer, text = [], ""
        end = model.tokenizer.token_to_id(END)
        with naming_the_weight(model):
            for token in model.llm.generate(embeds, max_new_tokens=max_new_tokens, eos_token_id=end):
                answer.append(token)
                longer_text = model.tokenizer.decode(answer)
                if not longer_text.endswith("\ufffd"):  # one character may take several tokens
                    yield longer_text[len(text):]
                    text = longer_text


@torch.no_grad()
def answer_batch(model, questions, images=None, *, max_new_tokens=1024, size=None) -> list:
    """Answer several questions at once: the text that `chat` gives for each of them alone.

    questions: texts. images: for each question a picture, as in `chat`, or None; left out, all questions are
    text only. A picture object that several questions share is encoded once. On a CPU, after
    `make_repeatable`, all bits are the same in any batch of prompts of one padded length: pictures are
    encoded one by one, and prompts are padded to whole blocks. Raises what `chat` raises, and ValueError for
    another number of images.
    """
    questions = list(questions)
    images = [None] * len(questions) if images is None else list(images)
    if len(images) != len(questions):
        raise ValueError(f"{len(questions)} questions, but {len(images)} images")
    if not all(isinstance(question, str) and question.strip() for question in questions):
        raise ValueError("a question is empty")
    if not questions:
        return []
    with evaluation_mode(model):
        if any(image is not None for image in images):
            check_attention(model, "vae", "mar")
        features = {}                               # id of an image -> z_enc (1, N+n, H)
        for image in images:
            if image is not None and id(image) not in features:
                features[id(image)] = image_features(model, image, size)
        z_enc = [features[id(image)] for image in images if image is not None]
        num_image_tokens = z_enc[0].shape[1] if z_enc else 0
        rows = []
        for question, image in zip(questions, images):
            shown = {"num_image_tokens": 0 if image is None else num_image_tokens}
            fit_history(model, question, (), room=CONTEXT_LENGTH - max_new_tokens, **shown)
            rows.append(prompt_ids(model.tokenizer, question, **shown))
        input_ids, attention_mask = pad(model.tokenizer, rows, PROMPT_BLOCK)
        embeds = model.embed(input_ids.to(model.device), torch.cat(z_enc) if z_enc else None)
        end = model.tokenizer.token_to_id(END)
        with naming_the_weight(model):
            answers = generate_batch(model.llm, embeds, attention_mask.to(model.device),
                                     max_new_tokens=max_new_tokens, eos_token_id=end)
    return [whole_characters(model.tokenizer, answer) for answer in answers]


def whole_characters(tokenizer, ids) -> str:
    """The text of an answer without a last character of which tokens are missing."""
    text = tokenizer.decode(ids)
    while text.endswith("\ufffd"):
        ids = ids[:-1]
        text = tokenizer.decode(ids)
    return text


@torch.no_grad()
def generate_batch(llm, inputs_embeds, attention_mask, *, max_new_tokens, eos_token_id) -> list:
    """Greedy decoding of prompts of different lengths: B lists of token ids, without eos.

    inputs_embeds (B, L, H), padded on the right; attention_mask (B, L) bool, True = real. Each row's
    result equals that of `Qwen2.generate`. Rows that have ended leave the batch. Raises ValueError for
    weights that are not finite.
    """
    B = len(inputs_embeds)
    cache = KVCache()
    hidden_states = llm(inputs_embeds=inputs_embeds, attention_mask=attention_mask, cache=cache)
    last = attention_mask.sum(dim=1) - 1                # (B,) each row's last real position
    hidden_states = hidden_states[torch.arange(B, device=last.device), last]            # (B, H)
    answers = [[] for _ in range(B)]
    left = list(range(B))                               # rows that have not ended, in the batch's order
    for step in range(max_new_tokens):
        with naming_the_weight(llm):
            tokens = most_likely(llm.logits(hidden_states))                             # (left,)
        goes_on = [token != eos_token_id for token in tokens.tolist()]
        left = [row for row, goes in zip(left, goes_on) if goes]
        if not all(goes_on):
            goes_on = torch.tensor(goes_on, device=tokens.device)
            tokens, attention_mask = tokens[goes_on], attention_mask[goes_on]
            cache.layers = [(k[goes_on], v[goes_on]) for k, v in cache.layers]
        for row, token in zip(left, tokens.tolist()):
            answers[row].append(token)
        if not left or step + 1 == max_new_tokens:
            break
        attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(left), 1)], dim=1)
        hidden_states = llm(tokens[:, None], attention_mask=attention_mask, cache=cache)[:, -1]
    return answers
