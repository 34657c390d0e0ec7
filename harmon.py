"""Harmon: one model that draws images from text and answers questions about images.

Paper: "Harmonizing Visual Representations for Unified Multimodal Understanding and Generation" (2503.21979).

    pixels --VAE--> latents --MAR encoder--> x_enc --proj_in--> z_enc --LLM, after the prompt--> z_llm
      --proj_out, + x_enc--> --MAR decoder--> z --diffusion head--> latents of masked tokens --VAE--> pixels

Letters: B batch, h×w token grid, N = h·w image tokens, n buffer tokens, V visible tokens, C latent channels, D MAR width, H LLM
width, L text length. Pixels are RGB in [-1, 1], (B, 3, s·h, s·w) with s the VAE's stride.
"""
import json
import math
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import weights
from images import image_to_pixels, pad_to_square, pixels_to_images
from llm import KVCache, Qwen2
from mar import MAR
from pretrained import END, PAD, HarmonConfig, infer_config, load_tokenizer, locate, read_json
from vae import AutoencoderKL

IMAGE_TOKEN_ID = -200            # in input_ids: a position that an image embedding fills
IGNORE_INDEX = -100              # in labels: no loss here
USER, ASSISTANT = "<|im_start|>user\n", "<|im_start|>assistant\n"
GENERATE, UNCONDITIONAL = "Generate an image: {caption}", "Generate an image."
GRADIENT_INTO_IMAGE = 0.1        # scale of the gradient into z_enc where the image is only looked at (paper, section 3.4)


# ---- the model -------------------------------------------------------------------------------------------------------

def masking_schedule(N, num_iter):
    """How many tokens stay masked after each step: a cosine from N to 0. A number that repeats is a step with nothing to do."""
    masked = [N]
    for k in range(1, num_iter):
        masked.append(max(1, min(masked[-1] - 1, math.floor(N * math.cos(math.pi / 2 * k / num_iter)))))
    return masked + [0]


class Harmon(nn.Module):
    """Built from a configuration with random float32 weights, or with `from_pretrained`."""

    def __init__(self, config):
        super().__init__()
        if config.vae.stride != config.mar.vae_stride or config.vae.z_channels != config.mar.token_dim:
            raise ValueError(f"the VAE has stride {config.vae.stride} and {config.vae.z_channels} channels, the MAR expects "
                             f"{config.mar.vae_stride} and {config.mar.token_dim}")
        self.config, self.tokenizer, self.gradient_into_image = config, None, GRADIENT_INTO_IMAGE
        D, H = config.mar.embed_dim, config.llm.hidden_size
        self.vae, self.llm, self.mar = AutoencoderKL(config.vae), Qwen2(config.llm), MAR(config.mar)
        self.proj_in = nn.Sequential(nn.Linear(D, H), nn.SiLU(), nn.Linear(H, H))
        self.proj_out = nn.Sequential(nn.Linear(H, H), nn.SiLU(), nn.Linear(H, D))

    @property
    def device(self):
        return self.mar.mask_token.device

    @property
    def dtype(self):
        return self.mar.mask_token.dtype

    # -- the parts of a pass --

    def encode(self, pixels):
        """pixels (B, 3, s·h, s·w) in [-1, 1] -> latents (B, h, w, C), scaled to about unit variance."""
        z = self.vae.encode(pixels.to(self.device, self.dtype)).mode()
        return z.permute(0, 2, 3, 1) * self.config.vae_scale

    def decode(self, latents):
        """latents (B, h, w, C) -> pixels (B, 3, s·h, s·w), about in [-1, 1]. At most a megapixel at once, which bounds the memory."""
        z = (latents / self.config.vae_scale).permute(0, 3, 1, 2).to(self.dtype)
        at_once = max(1, 2 ** 20 // (z.shape[2] * z.shape[3] * self.config.vae.stride ** 2))
        return torch.cat([self.vae.decode(part) for part in z.split(at_once)])

    def visual_features(self, latents, mask=None, visible=None):
        """latents (B, h, w, C), mask (B, N) bool, True = hidden, None = all visible; visible (B, V): the same, where the caller has it.

        Returns x_enc (B, n+V, D), buffers first, and z_enc (B, V+n, H), buffers last: the LLM, being causal, then has seen the
        image when it comes to the buffers.
        """
        B, h, w, C = latents.shape
        if mask is None:
            mask = torch.zeros(B, h * w, dtype=torch.bool, device=latents.device)
        x_enc = self.mar.encode(latents.reshape(B, h * w, C).to(self.dtype), mask, (h, w), visible=visible)
        z_enc = self.proj_in(x_enc)
        return x_enc, torch.cat([z_enc[:, self.mar.config.buffer_size:], z_enc[:, :self.mar.config.buffer_size]], dim=1)

    def seen_features(self, latents):
        """z_enc (B, N+n, H) of whole images, for prompts that hold them; of the gradient only a part passes."""
        _, z_enc = self.visual_features(latents)
        return self.gradient_into_image * z_enc + (1 - self.gradient_into_image) * z_enc.detach()

    def back_to_mar(self, x_enc, z_llm):
        """LLM outputs of the image and buffer tokens, as a residual on what the MAR encoder gave: (B, n+V, D), buffers first."""
        z_llm, n = self.proj_out(z_llm), self.mar.config.buffer_size
        return x_enc + torch.cat([z_llm[:, -n:], z_llm[:, :-n]], dim=1)

    def masked_features(self, latents, mask, input_ids, attention_mask):
        """x_enc + proj_out(LLM(prompt, z_enc)): what the MAR decoder gets. Shapes as above; returns (B, n+V, D)."""
        x_enc, z_enc = self.visual_features(latents, mask)
        text = self.embed(input_ids, self.seen_features(latents) if (input_ids == IMAGE_TOKEN_ID).any() else None)
        real = torch.cat([attention_mask, attention_mask.new_ones(z_enc.shape[:2])], dim=1)
        hidden = self.llm(inputs_embeds=torch.cat([text, z_enc.to(text.dtype)], dim=1), attention_mask=real)
        return self.back_to_mar(x_enc, hidden[:, text.shape[1]:])

    # -- sampling --

    @torch.no_grad()
    def sample(self, input_ids, attention_mask, *, num_iter=64, cfg=3.0, cfg_schedule="constant", temperature=1.0, grid=None, orders=None, noise_fn=None,
               generator=None, progress=False, on_step=None, known=None, known_mask=None, solver="ancestral", diffusion_steps=None):
        """Masked autoregressive generation: pixels (B, 3, s·h, s·w).

        input_ids, attention_mask (rows, L): with cfg != 1 rows = 2B, [conditional; unconditional]; with cfg = 1 rows = B.
        num_iter: steps K ≥ 1. cfg_schedule: "constant", or "linear" from 1 up to cfg. grid (h, w), default the native one.
        orders (B or rows, N): row b's first m entries are what is masked when m tokens are. noise_fn: see DiffusionHead.sample.
        generator: a torch.Generator, or a list of B, one an image, so that an image does not depend on its batch.
        on_step(k, tokens (B, h, w, C), hidden (B, N)) is called after each step.
        known (B, h, w, C) with known_mask (N,) bool, True = keep: those tokens start visible and stay (inpainting).
        solver, diffusion_steps: of the head, see DiffusionHead.sample.
        """
        if num_iter < 1 or cfg < 0 or temperature < 0 or cfg_schedule not in ("constant", "linear"):
            raise ValueError(f"num_iter {num_iter} must be at least 1, cfg {cfg} and temperature {temperature} at least 0, "
                             f"cfg_schedule {cfg_schedule!r} 'constant' or 'linear'")
        h, w = grid or (self.mar.config.grid, self.mar.config.grid)
        rows, N, C = input_ids.shape[0], h * w, self.mar.config.token_dim
        if cfg != 1 and rows % 2:
            raise ValueError(f"with cfg != 1 the batch is [conditional; unconditional] and even; it has {rows} rows")
        halves = 1 if cfg == 1 else 2
        B, device = rows // halves, self.device
        generators = generator if isinstance(generator, (list, tuple)) else None
        if orders is None:
            orders = torch.stack([torch.randperm(N, generator=generators[b] if generators else generator) for b in range(B)])
        orders = orders[:B].to(device)
        tokens, total = torch.zeros(B, N, C, device=device), N
        if known is not None:
            tokens = torch.where(known_mask.to(device)[:, None], known.reshape(B, N, C).to(tokens), tokens)
            last = known_mask.to(device)[orders].int().argsort(dim=1, stable=True)   # what is known leaves the masked set first
            orders, total = orders.gather(1, last), N - int(known_mask.sum())

        cache = KVCache()
        self.llm(input_ids.to(device), attention_mask=attention_mask.to(device), cache=cache)
        prompt = cache.length
        masked = masking_schedule(total, num_iter)
        for k in tqdm(range(1, num_iter + 1), desc="steps", disable=None if progress else True, leave=False):
            m, m_next = masked[k - 1:k + 1]
            if m_next == m:
                continue
            hidden = torch.zeros(B, N, dtype=torch.bool, device=device).scatter(1, orders[:, :m], True)
            visible = orders[:, m:].sort(dim=1).values
            x_enc, z_enc = (x.repeat(halves, 1, 1) for x in self.visual_features(tokens.view(B, h, w, C), hidden, visible))   # the same for both halves
            real = torch.cat([attention_mask.to(device), attention_mask.new_ones(z_enc.shape[:2]).to(device)], dim=1)
            z_llm = self.llm(inputs_embeds=z_enc, attention_mask=real, cache=cache)
            cache.truncate(prompt)                                                   # the encoder is bidirectional: all change
            z = self.mar.decode(self.back_to_mar(x_enc, z_llm), hidden.repeat(halves, 1), (h, w), visible.repeat(halves, 1))   # (rows, N, D)

            new = orders[:, m_next:m].sort(dim=1).values                             # (B, m - m_next), raster order
            z = z.gather(1, new.repeat(halves, 1)[..., None].expand(-1, -1, z.shape[-1])).flatten(0, 1)
            weight = cfg if cfg_schedule == "constant" or cfg == 1 else 1 + (cfg - 1) * (total - max(1, m_next)) / total  # the schedule's own m_K is 1
            draw = noise_fn or self.noise_source(B, m - m_next, generators or generator, diffusion_steps)
            drawn = self.mar.diffloss.sample(z, temperature=temperature, cfg=weight, noise_fn=draw, solver=solver, steps=diffusion_steps)
            tokens = tokens.scatter(1, new[..., None].expand(-1, -1, C), drawn.view(B, -1, C))
            if on_step is not None:
                on_step(k, tokens.view(B, h, w, C), torch.zeros_like(hidden).scatter(1, orders[:, :m_next], True))
        return self.decode(tokens.view(B, h, w, C))

    def noise_source(self, B, count, generator, diffusion_steps=None):
        """A noise_fn for one step's new tokens, `count` an image: all draws at once, on the generators' device, image by image."""
        S, C = diffusion_steps or self.mar.config.diffusion_steps, self.mar.config.token_dim
        if isinstance(generator, (list, tuple)):
            noise = torch.stack([torch.randn(S, count, C, generator=g, device=g.device) for g in generator], dim=1)
        else:
            noise = torch.randn(S, B, count, C, generator=generator, device=generator.device if generator is not None else "cpu")
        draws = iter(noise.to(self.device).flatten(1, 2))
        return lambda shape: next(draws)

    # -- losses --

    def draw_mask(self, B, N, ratio=None):
        """(B, N) bool, ceil(ratio · N) tokens hidden at random in each row. ratio: default a draw from a normal (1, 0.25) truncated to [0.7, 1]."""
        if ratio is None:
            low = 0.5 * math.erfc(1.2 / math.sqrt(2))                                # Φ((0.7 - 1) / 0.25)
            ratio = 1 + 0.25 * float(torch.special.ndtri(low + (0.5 - low) * torch.rand((), dtype=torch.float64)))
        count = max(1, min(N, math.ceil(ratio * N)))
        hidden = torch.rand(B, N, device=self.device).argsort(dim=1)[:, :count]
        return torch.zeros(B, N, dtype=torch.bool, device=self.device).scatter(1, hidden, True)

    def text2image_loss(self, pixels, input_ids, attention_mask, *, latents=None, mask=None, t=None, noise=None):
        """Head loss over the masked tokens of images (B, 3, s·h, s·w), or of their latents (B, h, w, C), given prompts (B, L).

        Where input_ids are IMAGE_TOKEN_ID, buffer_size + N of them in each prompt, the model sees the whole image itself (RecA, 2509.07295).
        mask (B, N) bool; t (R,) and noise (R, C) with R = diffusion_batch_mul · B · N, the list of all tokens repeated as a whole.
        """
        if latents is None:
            with torch.no_grad():
                latents = self.encode(pixels)
        B, h, w, C = latents.shape
        mask = self.draw_mask(B, h * w) if mask is None else mask
        z = self.mar.decode(self.masked_features(latents, mask, input_ids, attention_mask), mask, (h, w))
        mul = self.mar.config.diffusion_batch_mul
        return self.mar.diffloss.loss(z.flatten(0, 1).repeat(mul, 1), latents.reshape(-1, C).repeat(mul, 1), mask.flatten().repeat(mul), t=t, noise=noise)

    def embed(self, input_ids, z_enc=None):
        """Token embeddings (B, L, H) with z_enc (images, N+n, H) where input_ids is IMAGE_TOKEN_ID."""
        embeds = self.llm.model.embed_tokens(input_ids.clamp(min=0))
        image = input_ids == IMAGE_TOKEN_ID
        places, given = int(image.sum()), 0 if z_enc is None else z_enc.shape[0] * z_enc.shape[1]
        if places != given:
            raise ValueError(f"input_ids hold {places} image positions, the images give {given} embeddings")
        return embeds if z_enc is None else embeds.masked_scatter(image[..., None], z_enc.to(embeds.dtype))

    def image2text_loss(self, pixels, input_ids, attention_mask, labels, *, latents=None):
        """Mean cross-entropy of the labelled tokens (labels (B, L), -100 = none), given images or their latents; 0 when there are none.

        input_ids (B, L) hold IMAGE_TOKEN_ID at the buffer_size + N positions of each image. Without pixels and latents: text only.
        """
        z_enc = None
        if pixels is not None or latents is not None:
            if latents is None:
                with torch.no_grad():
                    latents = self.encode(pixels)
            z_enc = self.seen_features(latents)
        hidden = self.llm(inputs_embeds=self.embed(input_ids, z_enc), attention_mask=attention_mask)
        counted = labels[:, 1:] != IGNORE_INDEX                                      # position i predicts label i + 1
        parts = list(zip(hidden[:, :-1][counted].split(1024), labels[:, 1:][counted].split(1024)))
        # scores over 151,936 words take gigabytes for a large batch: then they are computed for some positions at a time, and once more in the backward pass
        run = self.words_loss if len(parts) == 1 else partial(checkpoint, self.words_loss, use_reentrant=False)
        return sum(run(*part) for part in parts) / counted.sum().clamp(min=1)

    def words_loss(self, hidden, targets):
        """Cross-entropy, summed, of the next words: hidden (n, H), targets (n,)."""
        return F.cross_entropy(self.llm.logits(hidden).float(), targets, reduction="sum")

    # -- text in, images out; images in, text out --

    def tokenize(self, text):
        if self.tokenizer is None:
            raise ValueError("this model has no tokenizer; give from_pretrained(tokenizer=…), a tokenizer.json or a folder with one")
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def prompt_ids(self, question, *, image_tokens=0, history=()):
        """Token ids, a list, of a conversation that waits for the answer. The image, if any, opens the first user turn."""
        turns = [q for q, _ in history] + [question]
        ids = self.tokenize(USER) + [IMAGE_TOKEN_ID] * image_tokens if image_tokens else []
        text = "\n" if image_tokens else USER
        for i, turn in enumerate(turns):
            text += ("" if i == 0 else USER) + f"{turn}{END}\n{ASSISTANT}"
            if i < len(history):
                text += f"{history[i][1]}{END}\n"
        return ids + self.tokenize(text)

    def pad(self, rows):
        """Lists of ids -> input_ids (B, L) padded on the right, attention_mask (B, L) bool."""
        L, pad = max(map(len, rows)), self.tokenizer.token_to_id(PAD)
        ids = torch.tensor([row + [pad] * (L - len(row)) for row in rows])
        return ids, torch.arange(L) < torch.tensor([[len(row)] for row in rows])

    def token_grid(self, size=None):
        """size in pixels, an int or (H, W), None = native -> (h, w) tokens."""
        H, W = (size, size) if isinstance(size, int) else size or (self.mar.config.img_size,) * 2
        s = self.config.vae.stride
        if H < s or W < s or H % s or W % s:
            raise ValueError(f"size {H}x{W} is not possible: height and width must be positive multiples of {s} pixels")
        return H // s, W // s

    @torch.no_grad()
    def generate_image(self, prompts, *, size=None, seed=0, cfg=3.0, image=None, mask=None, **sampling):
        """Draw one PIL image for each prompt.

        prompts: a string or a list. size: pixels, an int or (H, W). seed: an int (image i then uses seed + i) or a list, one an image;
        the same seed and prompt give the same image whatever else is in the batch. image with mask (PIL): keep the image where the mask
        is black, draw anew where it is white. sampling: num_iter, cfg_schedule, temperature, progress, … of `sample`.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts or not all(isinstance(p, str) and p.strip() for p in prompts):
            raise ValueError("a prompt is empty; say what to draw")
        seeds = [seed + i for i in range(len(prompts))] if isinstance(seed, int) else list(seed)
        if len(seeds) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts, but {len(seeds)} seeds")
        if (image is None) != (mask is None):
            raise ValueError("image and mask go together: the mask says what of the image is drawn anew")
        h, w = self.token_grid(size)
        texts = [GENERATE.format(caption=p.strip()) for p in prompts] + ([] if cfg == 1 else [UNCONDITIONAL] * len(prompts))
        ids, real = self.pad([self.prompt_ids(text) for text in texts])
        if image is not None:
            s = self.config.vae.stride
            original = image_to_pixels(image, (h * s, w * s)).to(self.device)
            redraw = image_to_pixels(mask, (h * s, w * s))[:, :1].to(self.device) > 0
            keep = ~F.max_pool2d(redraw.float(), s).bool().flatten()                 # a token is kept if none of its pixels is redrawn
            if keep.all():
                raise ValueError("the mask is black everywhere: nothing to draw; white marks what is drawn anew")
            sampling |= dict(known=self.encode(original).expand(len(prompts), -1, -1, -1), known_mask=keep)
        pixels = self.sample(ids, real, cfg=cfg, grid=(h, w), generator=[torch.Generator().manual_seed(s) for s in seeds], **sampling)
        if image is not None:
            pixels = torch.where(redraw, pixels.float(), original)
        return pixels_to_images(pixels)

    @torch.no_grad()
    def chat(self, question, image=None, *, history=(), max_new_tokens=1024, size=None):
        """Answer a question, about a PIL image if one is given: yields pieces of text. history: earlier (question, answer) pairs."""
        if not question.strip():
            raise ValueError("the question is empty")
        z_enc = None
        if image is not None:
            h, w = self.token_grid(size)
            s = self.config.vae.stride
            _, z_enc = self.visual_features(self.encode(image_to_pixels(pad_to_square(image), (h * s, w * s))))
        ids = self.prompt_ids(question, image_tokens=0 if z_enc is None else z_enc.shape[1], history=history)
        embeds = self.embed(torch.tensor([ids], device=self.device), z_enc)
        answer, said = [], ""
        for token in self.llm.generate(embeds, max_new_tokens=max_new_tokens, eos_token_id=self.tokenizer.token_to_id(END)):
            answer.append(token)
            text = self.tokenizer.decode(answer)
            if not text.endswith("\ufffd"):                                          # a character may take several tokens
                yield text[len(said):]
                said = text

    # -- weights --

    @classmethod
    def from_pretrained(cls, path="harmon-tiny", *, config=None, vae=None, tokenizer=None, device=None, dtype=None):
        """A model with its weights, in eval mode.

        path: "harmon-tiny", which is bundled; a folder of ours or Hugging Face's; an official `.pth` with vae= (kl16.ckpt) and tokenizer=
        (a tokenizer.json or its folder) beside it; or a hub id such as wusize/Harmon-0_5B. config: needed only for sizes that are not official.
        device: default CUDA when there is one. dtype: default float32 on the CPU, bfloat16 elsewhere.
        Raises FileNotFoundError or ValueError, saying which file and which keys.
        """
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
        path = locate(path)
        tensors = weights.read(path)
        if path.is_dir():
            tokenizer = tokenizer or (path if (path / "tokenizer.json").is_file() else None)
            if config is None:
                config = HarmonConfig.from_json(read_json(path / "config.json"), path / "config.json")
        config = config or infer_config(tensors, path)
        if vae is not None:
            tensors = {k: v for k, v in tensors.items() if not k.startswith("vae.")}
            tensors |= {k if k.startswith("vae.") else f"vae.{k}": v for k, v in weights.read(vae).items()}
        elif not any(k.startswith("vae.") for k in tensors):
            raise ValueError(f"{path}: there is no VAE in it; give the VAE's file as vae= (--vae), kl16.ckpt for official weights")
        with torch.device("meta"):
            model = cls(config)
        weights.assign(model, tensors, path, device=device, dtype=dtype)
        model.llm.tie_weights()
        if tokenizer is not None:
            model.tokenizer = load_tokenizer(tokenizer)
        return model.eval()

    def save_pretrained(self, folder, dtype=None):
        """Write config.json, model.safetensors and tokenizer.json, in a form that from_pretrained reads."""
        folder = Path(folder)
        state = self.state_dict()
        if self.config.llm.tie_word_embeddings:
            del state["llm.lm_head.weight"]
        weights.write(folder / "model.safetensors", {k: v.to(dtype=dtype) for k, v in state.items()})
        with weights.replacing(folder / "config.json") as temporary:
            Path(temporary).write_text(json.dumps(self.config.to_json(), indent=2) + "\n")
        if self.tokenizer is not None:
            with weights.replacing(folder / "tokenizer.json") as temporary:
                self.tokenizer.save(temporary)
