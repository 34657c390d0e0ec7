"""Harmon: one model that draws images from text and answers questions about images.

Paper: "Harmonizing Visual Representations for Unified Multimodal Understanding and Generation", 2503.21979.

    pixels --VAE--> latents --MAR encoder--> x_enc --proj_in--> z_enc --LLM, after the prompt--> z_llm
      --proj_out, + x_enc--> --MAR decoder--> z --diffusion head--> latents of masked tokens --VAE--> pixels

Letters: B batch, h×w token grid, N = h·w image tokens, n buffer tokens, V visible tokens, C latent channels,
D MAR width, H LLM width, L prompt length. Pixels are RGB in [-1, 1], (B, 3, s·h, s·w) with s the VAE's
stride. A mask is a bool tensor (B, N), True = hidden.
"""
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from harmonkit import checkpoints, pipeline
from harmonkit.chat_template import IGNORE_INDEX, IMAGE_TOKEN_ID
from harmonkit.config import HarmonConfig
from harmonkit.images import open_image  # noqa: F401
from llm import KVCache, Qwen2
from mar import MAR, Randomness, Sampling, first_masked, mask_schedule, random_mask
from vae import AutoencoderKL

GRAD_SCALE = 0.1                 # of the gradient into z_enc where an image is only looked at (section 3.4)


class Harmon(nn.Module):
    """Built from a configuration with random float32 weights, or with `from_pretrained`."""

    def __init__(self, config: HarmonConfig):
        super().__init__()
        vae, mar = config.vae, config.mar
        if (vae.stride, vae.z_channels) != (mar.vae_stride, mar.token_dim):
            raise ValueError(f"the VAE has stride {vae.stride} and {vae.z_channels} channels, "
                             f"the MAR expects {mar.vae_stride} and {mar.token_dim}")
        self.config = config
        self.tokenizer = None
        self.grad_scale = GRAD_SCALE
        D, H = mar.embed_dim, config.llm.hidden_size
        self.vae = AutoencoderKL(config.vae)
        self.llm = Qwen2(config.llm)
        self.mar = MAR(config.mar)
        self.proj_in = nn.Sequential(nn.Linear(D, H), nn.SiLU(), nn.Linear(H, H))
        self.proj_out = nn.Sequential(nn.Linear(H, H), nn.SiLU(), nn.Linear(H, D))

    @property
    def device(self):
        return self.mar.mask_token.device

    @property
    def dtype(self):
        return self.mar.mask_token.dtype

    # ---- pixels <-> latents ----------------------------------------------------------------------

    def encode(self, pixels):
        """pixels (B, 3, s·h, s·w) in [-1, 1] -> latents (B, h, w, C), scaled to about unit variance."""
        z = self.vae.encode(pixels.to(self.device, self.dtype)).mode()      # (B, C, h, w)
        return z.permute(0, 2, 3, 1) * self.config.vae_scale

    def decode(self, latents):
        """latents (B, h, w, C) -> pixels (B, 3, s·h, s·w), about in [-1, 1]. Raises ValueError for NaN and
        infinity.
        """
        z = (latents / self.config.vae_scale).permute(0, 3, 1, 2).to(self.dtype)
        return pipeline.decode_each(self, z)

    # ---- the three parts of a pass: see, think, draw ---------------------------------------------

    def see(self, tokens, mask, grid):
        """The visible tokens as the MAR encoder and as the LLM get them.

        tokens (B, N, C), mask (B, N), grid (h, w) -> x_enc (B, n+V, D), buffers first; z_enc (B, V+n, H),
        buffers last, so that the causal LLM has seen the image when it comes to them.
        """
        n = self.config.mar.buffer_size
        x_enc = self.mar.encode(tokens.to(self.dtype), mask, grid)          # (B, n+V, D)
        z_enc = self.proj_in(x_enc)                                         # (B, n+V, H)
        z_enc = torch.cat([z_enc[:, n:], z_enc[:, :n]], dim=1)              # (B, V+n, H)
        return x_enc, z_enc

    def think(self, z_enc, attention_mask, cache):
        """z_enc (B, V+n, H) through the LLM after the cached prompt, of mask (B, L) -> z_llm (B, V+n, H)."""
        L = cache.length
        attention_mask = torch.cat([attention_mask, attention_mask.new_ones(z_enc.shape[:2])], dim=1)
        z_llm = self.llm(inputs_embeds=z_enc, attention_mask=attention_mask, cache=cache)
        # New tokens change every image feature, so only the prompt stays in the cache.
        cache.truncate(L)
        return z_llm

    def add_residual(self, x_enc, z_llm):
        """x_enc (B, n+V, D) plus the projection of z_llm (B, V+n, H), its buffers moved to the front."""
        n = self.config.mar.buffer_size
        residual = self.proj_out(z_llm)                                     # (B, V+n, D)
        residual = torch.cat([residual[:, -n:], residual[:, :-n]], dim=1)   # (B, n+V, D)
        return x_enc + residual

    def draw(self, x_enc, z_llm, mask, grid):
        """-> z (B, N, D): for each token, the condition under which the diffusion head draws it."""
        return self.mar.decode(self.add_residual(x_enc, z_llm), mask, grid)

    # ---- generation ------------------------------------------------------------------------------

    @torch.no_grad()
    def sample_steps(self, input_ids, attention_mask, settings, randomness, canvas, grid, embeds=None):
        """Masked autoregressive generation: yields (tokens (B, N, C), mask (B, N)) after each of K steps.

        input_ids, attention_mask (rows, L): with guidance rows = 2B, [conditional; unconditional], else rows
        = B. settings: a Sampling. randomness: a Randomness. canvas: the tokens and the mask to start from.
        embeds (rows, L, H): given instead of input_ids where prompts hold images.
        """
        tokens, mask = canvas
        B, N, C = tokens.shape
        halves = len(input_ids) // B
        num_tokens = int(mask[0].sum())                                     # to be drawn
        S = settings.num_sampling_steps or self.config.mar.diffusion_steps

        # Move known tokens to the end of the order so that they are never masked.
        orders = randomness.orders(B, N).to(mask.device)
        known = ~mask.gather(1, orders)
        orders = orders.gather(1, known.int().argsort(dim=1, stable=True))

        # The prompt goes through the LLM once.
        cache = KVCache()
        self.llm(input_ids, inputs_embeds=embeds, attention_mask=attention_mask, cache=cache)

        for num_masked in mask_schedule(num_tokens, settings.num_iter)[1:]:
            next_mask = first_masked(orders, num_masked)
            new = mask & ~next_mask                                         # (B, N): the tokens of this step
            if new.any():
                # See and think. Both halves of guidance see the same tokens; only their prompts differ.
                x_enc, z_enc = self.see(tokens, mask, grid)
                x_enc = x_enc.repeat(halves, 1, 1)                          # (rows, n+V, D)
                z_enc = z_enc.repeat(halves, 1, 1)                          # (rows, V+n, H)
                z_llm = self.think(z_enc, attention_mask, cache)

                # Draw the new tokens of all images, in raster order.
                z = self.draw(x_enc, z_llm, mask.repeat(halves, 1), grid)   # (rows, N, D)
                z = z[new.repeat(halves, 1)]                                # (halves·M, D)
                count = int(new[0].sum())                                   # M / B, tokens per image
                weight = settings.guidance(num_masked, num_tokens)
                if weight == 1:
                    z = z[:B * count]                                       # conditional rows only
                with pipeline.naming_the_weight(self):
                    drawn = self.mar.diffloss.sample(
                        z, temperature=settings.temperature, cfg=weight, solver=settings.solver,
                        noise_fn=randomness.noise(B, count, C, S, self.device),
                        num_sampling_steps=settings.num_sampling_steps)
                tokens = tokens.clone()
                tokens[new] = drawn
            mask = next_mask
            yield tokens, mask

    def sample(self, input_ids, attention_mask, *, grid=None, canvas=None, z_enc=None, generator=None,
               orders=None, noise_fn=None, progress=False, on_step=None, **settings):
        """Generate pixels (B, 3, s·h, s·w) by `sample_steps`.

        settings: fields of Sampling. grid (h, w): default the native one. canvas: latents (B, h, w, C) and
        mask (B, N) to start from; default all is masked. z_enc (images, N+n, H): of the images in the
        prompts, as `visual_features` gives it. generator, orders, noise_fn: see Randomness.
        on_step(k, tokens (B, h, w, C), mask (B, N)) is called after step k = 1 … K.
        Raises ValueError for settings outside their ranges, for an odd batch with guidance, for prompts that
        hold more or fewer image positions than z_enc, and for weights that are not finite.
        """
        settings = Sampling(**settings)
        pipeline.check_attention(self, "mar")
        rows, halves = len(input_ids), 1 if settings.cfg == 1 else 2
        if rows % halves:
            raise ValueError(f"with guidance the batch is [conditional; unconditional]; {rows} rows are odd")
        B, C = rows // halves, self.config.mar.token_dim
        h, w = grid or (self.config.mar.grid, self.config.mar.grid)
        if canvas is None:
            tokens = torch.zeros(B, h * w, C, device=self.device, dtype=torch.float32)
            mask = torch.ones(B, h * w, dtype=torch.bool, device=self.device)
        else:
            tokens, mask = canvas[0].flatten(1, 2).to(self.device, torch.float32), canvas[1].to(self.device)
            tokens = tokens * ~mask[..., None]                              # masked tokens start at 0
        input_ids, attention_mask = input_ids.to(self.device), attention_mask.to(self.device).bool()
        no_bar = None if progress else True                                 # None: only off a terminal
        with torch.no_grad(), pipeline.evaluation_mode(self):
            steps = self.sample_steps(
                input_ids, attention_mask, settings, Randomness(generator, orders, noise_fn), (tokens, mask),
                (h, w), self.embed(input_ids, z_enc))
            bar = tqdm(steps, total=settings.num_iter, desc="steps", disable=no_bar, leave=False)
            for k, (tokens, mask) in enumerate(bar, start=1):
                if on_step is not None:
                    on_step(k, tokens.view(B, h, w, C), mask)
            return self.decode(tokens.view(B, h, w, C))

    # ---- losses ----------------------------------------------------------------------------------

    def visual_features(self, latents, mask=None):
        """`see` for latents (B, h, w, C): x_enc (B, n+V, D), z_enc (B, V+n, H). mask: default all visible."""
        B, h, w, C = latents.shape
        if mask is None:
            mask = torch.zeros(B, h * w, dtype=torch.bool, device=latents.device)
        return self.see(latents.reshape(B, h * w, C), mask, (h, w))

    def look(self, latents):
        """z_enc (B, N+n, H) of whole images, latents (B, h, w, C); `grad_scale` of the gradient passes."""
        _, z_enc = self.visual_features(latents)
        return z_enc.detach() + self.grad_scale * (z_enc - z_enc.detach())

    def embed(self, input_ids, z_enc=None):
        """Token embeddings (B, L, H), with the image features z_enc (images, N+n, H) where input_ids are
        IMAGE_TOKEN_ID.

        Raises ValueError unless there are as many such positions as features.
        """
        embeds = self.llm.model.embed_tokens(input_ids.clamp(min=0))
        is_image = input_ids == IMAGE_TOKEN_ID
        positions = int(is_image.sum())
        features = 0 if z_enc is None else z_enc.shape[0] * z_enc.shape[1]
        if positions != features:
            raise ValueError(f"input_ids hold {positions} image positions, the images give {features}")
        if z_enc is None:
            return embeds
        return embeds.masked_scatter(is_image[..., None], z_enc.to(embeds.dtype))

    def masked_features(self, latents, mask, input_ids, attention_mask):
        """The MAR decoder's input (B, n+V, D), for latents (B, h, w, C) under a mask and prompts (B, L)."""
        x_enc, z_enc = self.visual_features(latents, mask)
        shows_image = (input_ids == IMAGE_TOKEN_ID).any()                   # reconstruction alignment
        prompt = self.embed(input_ids, self.look(latents) if shows_image else None)
        attention_mask = torch.cat([attention_mask, attention_mask.new_ones(z_enc.shape[:2])], dim=1)
        embeds = torch.cat([prompt, z_enc.to(prompt.dtype)], dim=1)         # (B, L+V+n, H)
        z_llm = self.llm(inputs_embeds=embeds, attention_mask=attention_mask)[:, prompt.shape[1]:]
        return self.add_residual(x_enc, z_llm)

    def text2image_loss(self, pixels, input_ids, attention_mask, *, latents=None, mask=None, t=None,
                        noise=None):
        """Head loss over the masked tokens of images (B, 3, s·h, s·w) given prompts (B, L); a scalar.

        latents (B, h, w, C): given instead of pixels. If the prompts hold IMAGE_TOKEN_ID, n + N each, the
        model sees the whole image itself (reconstruction alignment, 2509.07295). mask (B, N): default
        `random_mask`. t (R,) and noise (R, C) with R = diffusion_batch_mul · B · N: rows are all B·N tokens,
        then the same tokens again.
        """
        if latents is None:
            with torch.no_grad():
                latents = self.encode(pixels)
        B, h, w, C = latents.shape
        if mask is None:
            mask = random_mask(B, h * w, device=self.device)
        z = self.masked_features(latents, mask, input_ids, attention_mask)
        z = self.mar.decode(z, mask, (h, w))                                # (B, N, D)
        repeats = self.config.mar.diffusion_batch_mul
        return self.mar.diffloss.loss(
            z.flatten(0, 1).repeat(repeats, 1), latents.reshape(-1, C).repeat(repeats, 1),
            mask.flatten().repeat(repeats), t=t, noise=noise)

    def image2text_loss(self, pixels, input_ids, attention_mask, labels, *, latents=None):
        """Mean cross-entropy of the labelled tokens, a scalar; 0 if there are none.

        labels (B, L): -100 = no loss. input_ids (B, L) hold n + N IMAGE_TOKEN_ID for each image (B, 3, s·h,
        s·w) or latents (B, h, w, C). With neither: text only.
        """
        if latents is None and pixels is not None:
            with torch.no_grad():
                latents = self.encode(pixels)
        embeds = self.embed(input_ids, None if latents is None else self.look(latents))
        hidden_states = self.llm(inputs_embeds=embeds, attention_mask=attention_mask)
        targets = labels[:, 1:]                                             # position i predicts label i + 1
        labelled = targets != IGNORE_INDEX
        total = self.next_token_loss(hidden_states[:, :-1][labelled], targets[labelled])
        return total / labelled.sum().clamp(min=1)

    def next_token_loss(self, hidden_states, targets):
        """Summed cross-entropy of hidden states (M, H) for the tokens targets (M,)."""
        return F.cross_entropy(self.llm.logits(hidden_states).float(), targets, reduction="sum")

    # ---- text in, images out; images in, text out; files: see harmonkit --------------------------

    def generate_image(self, prompts=None, *, size=None, seed=0, **sampling):
        """A PIL image for each prompt, or for each picture; see harmonkit.pipeline.generate_image."""
        return pipeline.generate_image(self, prompts, size=size, seed=seed, **sampling)

    def chat(self, question, image=None, **options):
        """The answer to a question, about a PIL image if given, in pieces; see harmonkit.pipeline.chat."""
        return pipeline.chat(self, question, image, **options)

    @classmethod
    def from_pretrained(cls, path="harmon-tiny", **options):
        """A model with its weights, in eval mode; see harmonkit.checkpoints.from_pretrained."""
        return checkpoints.from_pretrained(cls, path, **options)

    def save_pretrained(self, folder, dtype=None):
        """Write a folder that `from_pretrained` reads; see harmonkit.checkpoints.save_pretrained."""
        checkpoints.save_pretrained(self, folder, dtype)
