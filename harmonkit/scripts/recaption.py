"""Long captions -> short prompts with any Qwen2.5-Instruct, as the paper prepares stage II (supplement).

    python -m harmonkit.scripts.recaption captions.jsonl --llm Qwen2.5-7B-Instruct --out folder
    torchrun --nproc_per_node=8 -m harmonkit.scripts.recaption captions.jsonl --llm folder --out folder

captions.jsonl: {"caption": …} a line. Lines go to part-*.jsonl with "short" and "line", their number, added.
Finished lines are not done again. Filters read a line's numbers "aesthetic", "width" and "height".
"""
import json
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from harmonkit.chat_template import END, answer_ids, message_ids, pad
from harmonkit.checkpoints import decide_tying, find_model, load_strict, read
from harmonkit.config import qwen_config, read_json
from harmonkit.devices import DTYPES, choose_device, rank_and_world_size
from harmonkit.pipeline import generate_batch
from harmonkit.scripts import argument_parser
from harmonkit.terminal import errors_in_one_line
from harmonkit.tokenizer import load_tokenizer
from llm import Qwen2

PROMPT = (
    "Here is a detailed image description: {caption}. Rewrite it into a much shorter, vivid, and visually "
    "rich sentence (one or two sentences) that captures only the most essential elements and atmosphere of "
    "the scene. Ensure the description is concise, clear, and optimized for use with a text-to-image "
    "generation model.")
# Qwen2.5-Instruct's own system prompt.
SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."


def read_lines(path, key, kind):
    """Yield (number, row) of the JSON lines whose `key` is of that kind. Report others on stderr."""
    with open(path, encoding="utf-8-sig", errors="replace", newline="\n") as file:
        for number, text in enumerate(file):
            try:
                row = json.loads(text)
                if not isinstance(row[key], kind) or not str(row[key]).strip():
                    raise ValueError(f"{key} is {row[key]!r}")
                str(row[key]).encode()                                      # raises for half a character
                yield number, row
            except (ValueError, KeyError, TypeError) as error:
                print(f"skipped {path}:{number + 1}: {repr(error)[:200]}", file=sys.stderr)


def passes(row, min_aesthetic=None, max_aspect=None, min_side=None) -> bool:
    """Whether a line passes the given filters. Raises ValueError if it lacks a number that one reads."""
    try:
        if min_aesthetic is not None and row["aesthetic"] <= min_aesthetic:
            return False
        if max_aspect is None and min_side is None:
            return True
        short, long = sorted((row["width"], row["height"]))
        return short >= (min_side or 0) and long <= short * (max_aspect or float("inf"))
    except (KeyError, TypeError) as error:
        raise ValueError(f"a filter reads a number that a line lacks ({error!r}): {row}") from None


def load_llm(folder, device, dtype):
    """A Qwen2.5 folder -> (Qwen2 in eval mode, tokenizer). Raises FileNotFoundError or ValueError."""
    file = find_model(folder) / "config.json"
    tensors = read(file.parent)
    config = decide_tying(qwen_config(read_json(file), file), tensors, folder)
    with torch.device("meta"):
        llm = Qwen2(config)
    load_strict(llm, tensors, folder, device=device, dtype=dtype)
    llm.tie_weights()
    return llm.eval(), load_tokenizer(file.parent, config.vocab_size)


@torch.no_grad()
def rewrite(llm, tokenizer, captions, max_new_tokens=128) -> list:
    """A short prompt for each caption, decoded greedily in one batch; none depends on the others."""
    before = message_ids(tokenizer, "system", SYSTEM)
    prompts = [PROMPT.format(caption=caption.strip().rstrip(".")) for caption in captions]
    messages = [message_ids(tokenizer, "user", prompt) for prompt in prompts]
    ids, attention_mask = pad(tokenizer, [before + message + answer_ids(tokenizer) for message in messages])
    device = llm.lm_head.weight.device
    embeds = llm.model.embed_tokens(ids.to(device))                         # (B, L, H)
    answers = generate_batch(llm, embeds, attention_mask.to(device), max_new_tokens=max_new_tokens,
                             eos_token_id=tokenizer.token_to_id(END))
    return [tokenizer.decode(answer).strip() for answer in answers]


def main(argv=None):
    parser = argument_parser(__doc__)
    flag = parser.add_argument
    flag("captions", type=Path)
    flag("--llm", required=True, help="folder of a Qwen2.5-Instruct model")
    flag("--out", type=Path, required=True, help="folder")
    flag("--batch", type=int, default=32)
    flag("--max-new-tokens", type=int, default=128)
    flag("--min-aesthetic", type=float, help="the score must be above this; 6.5 in the paper's stage III")
    flag("--max-aspect", type=float, help="longer side over shorter side, at most")
    flag("--min-side", type=int, help="pixels")
    flag("--device", help="default: cuda if there is one; under torchrun each process has its own")
    flag("--dtype", choices=DTYPES, help="default: float32 on the CPU, bfloat16 elsewhere")
    args = parser.parse_args(argv)
    with errors_in_one_line("recaption"):
        if min(args.batch, args.max_new_tokens) < 1:
            raise ValueError("--batch and --max-new-tokens must be at least 1")
        rank, world_size = rank_and_world_size()
        parts = args.out.glob("part-*.jsonl")
        done = {row["line"] for part in parts for _, row in read_lines(part, "line", int)}
        todo = []
        for number, row in read_lines(args.captions, "caption", str):
            is_mine = number % world_size == rank and number not in done
            if is_mine and passes(row, args.min_aesthetic, args.max_aspect, args.min_side):
                todo.append(row | {"line": number})
        todo.sort(key=lambda row: len(row["caption"]))                      # batches of like lengths

        device = choose_device(args.device)
        dtype = DTYPES[args.dtype or ("float32" if device.type == "cpu" else "bfloat16")]
        llm, tokenizer = load_llm(args.llm, device, dtype)
        args.out.mkdir(parents=True, exist_ok=True)
        # Each start has a file of its own, so a line that a kill cuts off spoils no other line.
        with open(args.out / f"part-{rank:05d}-{len(done)}.jsonl", "w") as file:
            for start in tqdm(range(0, len(todo), args.batch), desc="batches", disable=None):
                batch = todo[start:start + args.batch]
                captions = [row["caption"] for row in batch]
                prompts = rewrite(llm, tokenizer, captions, args.max_new_tokens)
                for row, prompt in zip(batch, prompts, strict=True):
                    row["short"] = prompt
                    file.write(json.dumps(row) + "\n")
                file.flush()
        print(args.out)


if __name__ == "__main__":
    main()
