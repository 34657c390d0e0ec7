"""A tokenizer for the text of the shapes world, in the form of Qwen2.5's."""
import random

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from harmonkit.chat_template import ASSISTANT, END, GENERATE, PAD, USER
from harmonkit.shapes_world.world import FACTS, caption, questions, scene
from harmonkit.tokenizer import WORDS


def corpus(seed):
    """Yield captions, questions and facts of 4,000 scenes."""
    rng = random.Random(seed)
    for i in range(4000):
        shown = scene(seed, i)
        yield USER + GENERATE.format(caption=caption(shown, rng)) + f"{END}\n{ASSISTANT}"
        yield from (f"{question}\n{answer}" for _, question, answer in questions(shown, rng))
        yield from (f"{question}\n{answer}" for question, answer in FACTS)


def train_tokenizer(vocab_size: int, seed="tokenizer") -> Tokenizer:
    """A byte-level BPE tokenizer with vocab_size entries, trained on `corpus`."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(WORDS), "isolated")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(corpus(seed), trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[PAD, "<|im_start|>", END],
        initial_alphabet=byte_level.alphabet(), show_progress=False))
    return tokenizer
