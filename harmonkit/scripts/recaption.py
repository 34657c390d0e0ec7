"""Long captions into short prompts, with Qwen2.5-Instruct of any size, as the paper prepares its stage II (supplement, "Stage II").

    python recaption.py captions.jsonl --llm Qwen2.5-7B-Instruct --out short
    torchrun --nproc_per_node=8 recaption.py captions.jsonl --llm Qwen2.5-7B-Instruct --out short --min-aesthetic 6.5

captions.jsonl: one {"caption": …} a line, with whatever else belongs to it. out/part-*.jsonl get the same lines with "short" and "line", their number;
what is there already is not done again. Filters leave out lines by their columns: "aesthetic" (a score), "width" and "height" (pixels).
"""
import argparse
import json
import os
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from harmonkit import checkpoints
from llm import Qwen2, QwenConfig
from pretrained import END, choose_device, load_tokenizer, read_json

PROMPT = ("Here is a detailed image description: {caption}. Rewrite it into a much shorter, vivid, and visually rich sentence (one or two sentences) that captures only the "
          "most essential elements and atmosphere of the scene. Ensure the description is concise, clear, and optimized for use with a text-to-image generation model.")
SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."      # the Instruct models' own default
CHAT = "<|im_start|>system\n" + SYSTEM + END + "\n<|im_start|>user\n{text}" + END + "\n<|im_start|>assistant\n"


def passes(row, min_aesthetic=None, max_aspect=None, min_side=None):
    """Whether a line passes the filters. A filter that is asked for and whose column is missing raises ValueError."""
    def column(name):
        if not isinstance(row.get(name), (int, float)):
            raise ValueError(f'no number "{name}" in a line, which the filter needs: {json.dumps(row)[:100]}')
        return row[name]
    if min_aesthetic is not None and not column("aesthetic") > min_aesthetic:
        return False
    if max_aspect is not None and max(column("width"), column("height")) > max_aspect * min(column("width"), column("height")):
        return False
    return min_side is None or min(column("width"), column("height")) >= min_side


def load_llm(folder, device, dtype):
    """A Qwen2.5 folder -> (model in eval mode, tokenizer)."""
    folder = Path(folder)
    content = read_json(folder / "config.json")
    try:
        config = QwenConfig(**{k: content[k] for k in QwenConfig.__dataclass_fields__ if k in content})
    except TypeError as error:
        raise ValueError(f"{folder / 'config.json'}: not a Qwen2.5 configuration ({error})") from None
    with torch.device("meta"):
        llm = Qwen2(config)
    checkpoints.load_strict(llm, checkpoints.read(folder), folder, device=device, dtype=dtype)
    llm.tie_weights()
    return llm.eval(), load_tokenizer(folder)


@torch.no_grad()
def rewrite(llm, tokenizer, captions, max_new_tokens=128):
    """Short prompts for a list of captions, decoded greedily in one batch; a caption's prompt does not depend on the others."""
    rows = [tokenizer.encode(CHAT.format(text=PROMPT.format(caption=c.strip().rstrip("."))), add_special_tokens=False).ids for c in captions]
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.tensor([row + [0] * (int(lengths.max()) - len(row)) for row in rows])
    device = llm.model.embed_tokens.weight.device
    answers = llm.generate_batch(ids.to(device), (torch.arange(ids.shape[1]) < lengths[:, None]).to(device), max_new_tokens=max_new_tokens, eos_token_id=tokenizer.token_to_id(END))
    return [tokenizer.decode(answer).strip() for answer in answers]


def finished(folder):
    """Numbers of the lines that are done; a line cut off by a kill does not count."""
    done = set()
    for file in folder.glob("part-*.jsonl"):
        for text in file.read_text().splitlines():
            try:
                done.add(json.loads(text)["line"])
            except (ValueError, KeyError):
                continue
    return done


def read_lines(path):
    """(number, dictionary) of every line; malformed ones are named and left out."""
    with open(path) as file:
        for number, text in enumerate(file):
            try:
                row = json.loads(text)
                if not isinstance(row.get("caption"), str) or not row["caption"].strip():
                    raise ValueError('no "caption"')
                yield number, row
            except (ValueError, AttributeError) as error:
                print(f"skipped {path}:{number + 1}: {error}", file=sys.stderr)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("captions", type=Path)
    parser.add_argument("--llm", required=True, help="folder of a Qwen2.5-Instruct model")
    parser.add_argument("--out", type=Path, required=True, help="folder")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--min-aesthetic", type=float, help="the paper's stage III: 6.5")
    parser.add_argument("--max-aspect", type=float, help="longer side over shorter side")
    parser.add_argument("--min-side", type=int, help="pixels")
    parser.add_argument("--device", help="default: cuda when there is one; under torchrun each process has its own")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    args = parser.parse_args()
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    try:
        if args.batch < 1 or args.max_new_tokens < 1:
            raise ValueError("--batch and --max-new-tokens must be at least 1")
        args.out.mkdir(parents=True, exist_ok=True)
        done = finished(args.out)
        todo = [(n, row) for n, row in read_lines(args.captions)
                if n % ranks == rank and n not in done and passes(row, args.min_aesthetic, args.max_aspect, args.min_side)]
        todo.sort(key=lambda job: len(job[1]["caption"]))            # batches of like length
        device = choose_device(args.device)
        dtype = getattr(torch, args.dtype or ("float32" if device.type == "cpu" else "bfloat16"))
        llm, tokenizer = load_llm(args.llm, device, dtype)
        with open(args.out / f"part-{rank:05d}.jsonl", "a+") as file:
            file.write("\n")                                         # ends a line that a kill cut off
            for start in tqdm(range(0, len(todo), args.batch), desc="batches", disable=None):
                part = todo[start:start + args.batch]
                for (number, row), short in zip(part, rewrite(llm, tokenizer, [row["caption"] for _, row in part], args.max_new_tokens)):
                    file.write(json.dumps(row | {"short": short, "line": number}, ensure_ascii=False) + "\n")
                file.flush()
        print(args.out)
    except (ValueError, OSError) as error:
        print(f"recaption.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
