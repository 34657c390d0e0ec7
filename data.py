"""Samples and batches in the model's words: the shapes world as training data, and its tokenizer.

A batch is a dictionary with a "task" and what that task's loss takes. Everything is a pure function of (seed, task, step), so a run
that resumes at step n sees exactly the batches it would have seen.

Letters: B batch, L text length, h×w token grid, C latent channels.
"""
import random

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

import shapes
from harmon import ASSISTANT, END, GENERATE, IGNORE_INDEX, IMAGE_TOKEN_ID, PAD, UNCONDITIONAL, USER

CAPTION_DROP = 0.1   # of text-to-image samples, for classifier-free guidance
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # as Qwen2.5 splits text


# ---- conversations ---------------------------------------------------------------------------------------------------

def conversation(model, turns, image_tokens=0):
    """[(question, answer), …] -> ids and labels, lists of one length. The image opens the first turn; answers and their end are labelled."""
    ids, labels = [], []
    for i, (question, answer) in enumerate(turns):
        if i == 0:
            prompt = model.prompt_ids(question, image_tokens=image_tokens)
        else:
            prompt = model.tokenize(f"\n{USER}{question}{END}\n{ASSISTANT}")
        said = model.tokenize(answer + END)
        ids += prompt + said
        labels += [IGNORE_INDEX] * len(prompt) + said
    return ids, labels


def pad_labels(labels, length):
    return torch.tensor([row + [IGNORE_INDEX] * (length - len(row)) for row in labels])


# ---- the shapes world ------------------------------------------------------------------------------------------------

def reading_turns(rng, index, seed):
    """Text alone: facts, or questions about a scene that a sentence stands in for."""
    if rng.random() < 0.1:
        return [rng.choice(shapes.FACTS)]
    scene = shapes.scene(seed, index)
    turns = [(q, a) for kind, q, a in rng.sample(shapes.questions(scene, rng), 3) if kind != "describe"]
    told = shapes.describe(scene) if scene.kind != "pair" or rng.random() < 0.5 else shapes.caption(scene, rng, style="color position")
    return [(f"{told}\n{turns[0][0]}", turns[0][1])] + turns[1:]


def looking_turns(rng, scene):
    """Two or three questions about a picture; a fact now and then, so that not every answer is sought in the picture."""
    turns = [(q, a) for _, q, a in rng.sample(shapes.questions(scene, rng), rng.choice((2, 3)))]
    return turns + ([rng.choice(shapes.FACTS)] if rng.random() < 0.05 else [])


def train_tokenizer(vocab_size, seed="tokenizer"):
    """A byte-level BPE tokenizer in the form of Qwen2.5's, trained on the world's text."""
    def corpus():
        rng = random.Random(seed)
        for i in range(4000):
            scene = shapes.scene(seed, i)
            yield USER + GENERATE.format(caption=shapes.caption(scene, rng)) + f"{END}\n{ASSISTANT}"
            yield from (f"{q}\n{a}" for _, q, a in shapes.questions(scene, rng))
            yield from (f"{q}\n{a}" for q, a in shapes.FACTS)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(WORDS), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(corpus(), trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[PAD, "<|im_start|>", END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    return tokenizer


def render_pixels(scenes):
    """Scenes -> (B, 3, 64, 64) in [-1, 1]."""
    images = np.stack([np.asarray(shapes.render(s)) for s in scenes])
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div(127.5).sub(1)


@torch.no_grad()
def encode_scenes(model, seed, count, batch=100):
    """Latents (count, h, w, C) of scenes 0 … count - 1, in half precision on the CPU: the VAE is frozen, so once is enough."""
    chunks = [model.encode(render_pixels([shapes.scene(seed, i) for i in range(start, min(start + batch, count))])).half().cpu()
              for start in tqdm(range(0, count, batch), desc="encoding scenes", disable=None, leave=False)]
    return torch.cat(chunks)


class ShapesWorld:
    """Batches of the shapes world. latents: `encode_scenes` of the same seed, for the tasks that look at pictures."""

    def __init__(self, model, seed, latents=None):
        self.model, self.seed, self.latents = model, seed, latents

    def batch(self, task, step, size):
        """task: "reconstruct", "text", "mar", "text2image" or "image2text". Tensors on the model's device."""
        rng = random.Random(f"{self.seed}/{task}/{step}")
        batch = getattr(self, task)(rng, range(step * size, (step + 1) * size))
        return {"task": task} | {k: v.to(self.model.device) for k, v in batch.items()}

    def reconstruct(self, rng, stream):
        return {"pixels": render_pixels([shapes.scene(self.seed, i) for i in stream])}

    def text(self, rng, stream):
        rows = [conversation(self.model, reading_turns(rng, i, self.seed)) for i in stream]
        return self.labelled(rows)

    def mar(self, rng, stream):
        return {"latents": self.latents[[rng.randrange(len(self.latents)) for _ in stream]].float()}

    def text2image(self, rng, stream):
        index = [rng.randrange(len(self.latents)) for _ in stream]
        captions = [shapes.caption(shapes.scene(self.seed, i), rng) for i in index]
        texts = [UNCONDITIONAL if rng.random() < CAPTION_DROP else GENERATE.format(caption=c) for c in captions]
        ids, real = self.model.pad([self.model.prompt_ids(t) for t in texts])
        return {"latents": self.latents[index].float(), "input_ids": ids, "attention_mask": real}

    def image2text(self, rng, stream):
        index = [rng.randrange(len(self.latents)) for _ in stream]
        n = self.latents.shape[1] * self.latents.shape[2] + self.model.config.mar.buffer_size
        rows = [conversation(self.model, looking_turns(rng, shapes.scene(self.seed, i)), image_tokens=n) for i in index]
        return self.labelled(rows) | {"latents": self.latents[index].float()}

    def labelled(self, rows):
        ids, real = self.model.pad([ids for ids, _ in rows])
        return {"input_ids": ids, "attention_mask": real, "labels": pad_labels([labels for _, labels in rows], ids.shape[1])}
