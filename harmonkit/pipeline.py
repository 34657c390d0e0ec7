"""From text to images and from images to text, around the model's tensors. The model is an argument."""
import torch
import torch.nn.functional as F

from harmonkit.chat_template import END, GENERATE, UNCONDITIONAL, pad, prompt_ids
from harmonkit.images import image_to_pixels, pad_to_square, pixels_to_images
from llm import KVCache


def token_grid(model, size=None) -> tuple:
    """size in pixels, an int or (H, W), None = native -> (h, w) tokens. Raises ValueError."""
    if size is None:
        size = model.config.mar.img_size
    H, W = (size, size) if isinstance(size, int) else size
    s = model.config.vae.stride
    if H < s or W < s or H % s or W % s:
        raise ValueError(f"size {H}x{W} is not possible: height and width must be positive multiples of {s}")
    return H // s, W // s


# ---- text -> images ------------------------------------------------------------------------------

def generation_prompts(model, prompts, cfg) -> tuple:
    """input_ids and attention_mask (rows, L) of prompts; with guidance as many unconditional rows follow."""
    texts = [GENERATE.format(caption=prompt.strip()) for prompt in prompts]
    if cfg != 1:
        texts += [UNCONDITIONAL] * len(prompts)
    return pad(model.tokenizer, [prompt_ids(model.tokenizer, text) for text in texts])


@torch.no_grad()
def generate_image(model, prompts, *, size=None, seed=0, cfg=3.0, image=None, mask=None, **sampling) -> list:
    """Draw one PIL image for each prompt.

    prompts: a string or a list. size: pixels, an int or (H, W), multiples of the VAE's stride. seed: an int,
    image i then uses seed + i; or a list with one for each image. An image depends on its prompt and seed,
    not on its batch. image with mask (PIL): keep the image where the mask is black, redraw it where it is
    white (inpainting). sampling: num_iter, cfg_schedule, temperature, solver, progress, … of `Harmon.sample`.
    Raises ValueError for an empty prompt, an impossible size, settings outside their ranges, or an all-black
    mask.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not prompts or not all(isinstance(p, str) and p.strip() for p in prompts):
        raise ValueError("a prompt is empty; say what to draw")
    seeds = [seed + i for i in range(len(prompts))] if isinstance(seed, int) else list(seed)
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts, but {len(seeds)} seeds")
    if (image is None) != (mask is None):
        raise ValueError("image and mask go together: the mask says which part of the image is redrawn")
    grid = token_grid(model, size)
    input_ids, attention_mask = generation_prompts(model, prompts, cfg)
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    settings = dict(cfg=cfg, grid=grid, generator=generators, **sampling)
    if image is None:
        pixels = model.sample(input_ids, attention_mask, **settings)
    else:
        original, redraw = inpainting_pixels(model, image, mask, grid)
        canvas = inpainting_canvas(model, original, redraw, len(prompts))
        pixels = model.sample(input_ids, attention_mask, canvas=canvas, **settings).float()
        pixels = torch.where(redraw, pixels, original)
    return pixels_to_images(pixels)


def inpainting_pixels(model, image, mask, grid) -> tuple:
    """PIL image and mask -> the image's pixels (1, 3, H, W), and where to redraw it (1, 1, H, W) bool."""
    s = model.config.vae.stride
    size = (grid[0] * s, grid[1] * s)
    original = image_to_pixels(image, size).to(model.device)
    redraw = image_to_pixels(mask, size)[:, :1].to(model.device) > 0
    return original, redraw


def inpainting_canvas(model, original, redraw, batch_size) -> tuple:
    """The latents (B, h, w, C) and the mask (B, N). A token is redrawn if any of its pixels is."""
    mask = F.max_pool2d(redraw.float(), model.config.vae.stride).bool().flatten(1)      # (1, N)
    if not mask.any():
        raise ValueError("the mask is black everywhere: nothing to draw; white marks the redrawn part")
    latents = model.encode(original)                                                    # (1, h, w, C)
    return latents.expand(batch_size, -1, -1, -1), mask.expand(batch_size, -1)


# ---- images -> text ------------------------------------------------------------------------------

@torch.no_grad()
def chat(model, question, image=None, *, history=(), max_new_tokens=1024, size=None):
    """Answer a question, about a PIL image if given: yields pieces of text.

    history: earlier (question, answer) pairs. size: pixels to which the image is resized, default the native
    size. Raises ValueError for an empty question.
    """
    if not question.strip():
        raise ValueError("the question is empty")
    z_enc = None
    if image is not None:
        h, w = token_grid(model, size)
        s = model.config.vae.stride
        pixels = image_to_pixels(pad_to_square(image), (h * s, w * s))
        _, z_enc = model.visual_features(model.encode(pixels))                          # (1, N+n, H)
    num_image_tokens = 0 if z_enc is None else z_enc.shape[1]
    ids = prompt_ids(model.tokenizer, question, num_image_tokens=num_image_tokens, history=history)
    embeds = model.embed(torch.tensor([ids], device=model.device), z_enc)

    answer, text = [], ""
    end = model.tokenizer.token_to_id(END)
    for token in model.llm.generate(embeds, max_new_tokens=max_new_tokens, eos_token_id=end):
        answer.append(token)
        longer_text = model.tokenizer.decode(answer)
        if not longer_text.endswith("\ufffd"):          # one character may take several tokens
            yield longer_text[len(text):]
            text = longer_text


@torch.no_grad()
def generate_batch(llm, inputs_embeds, attention_mask, *, max_new_tokens, eos_token_id) -> list:
    """Greedy decoding of prompts of different lengths: B lists of token ids, without eos.

    inputs_embeds (B, L, H), padded on the right; attention_mask (B, L) bool, True = real. Each row's
    result equals that of `Qwen2.generate`.
    """
    B = len(inputs_embeds)
    cache = KVCache()
    hidden_states = llm(inputs_embeds=inputs_embeds, attention_mask=attention_mask, cache=cache)
    last = attention_mask.sum(dim=1) - 1                # (B,) each row's last real position
    hidden_states = hidden_states[torch.arange(B, device=last.device), last]            # (B, H)
    tokens = []
    for _ in range(max_new_tokens):
        tokens.append(llm.logits(hidden_states).argmax(dim=-1))                         # (B,)
        if (torch.stack(tokens) == eos_token_id).any(dim=0).all() or len(tokens) == max_new_tokens:
            break
        attention_mask = torch.cat([attention_mask, attention_mask.new_ones(B, 1)], dim=1)
        hidden_states = llm(tokens[-1][:, None], attention_mask=attention_mask, cache=cache)[:, -1]
    rows = torch.stack(tokens, dim=1).tolist()                              # (B, ≤ max_new_tokens)
    return [row[:row.index(eos_token_id)] if eos_token_id in row else row for row in rows]
