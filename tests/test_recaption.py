import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from harmonkit.scripts import recaption
from harmonkit import checkpoints
from llm import Qwen2, QwenConfig


@pytest.fixture(scope="module")
def qwen(tmp_path_factory, tokenizer):
    """A tiny Qwen2.5 folder as the hub has it, random weights."""
    folder = tmp_path_factory.mktemp("qwen")
    sizes = dict(vocab_size=512, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
    torch.manual_seed(0)
    llm = Qwen2(QwenConfig(**sizes))
    with torch.no_grad():
        for p in llm.parameters():
            if p.ndim > 1:
                p.mul_(8)                                     # so that answers differ
    checkpoints.write(folder / "model.safetensors", {k: v for k, v in llm.state_dict().items() if k != "lm_head.weight"})
    (folder / "config.json").write_text(json.dumps(sizes | {"model_type": "qwen2"}))
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


CAPTIONS = ["a red circle.", "three blue stars above a green square, in a drawing", "two purple crosses " * 5]


def test_a_batch_decodes_as_one_by_one(qwen):
    llm, tokenizer = recaption.load_llm(qwen, "cpu", torch.float32)
    rows = [tokenizer.encode(recaption.CHAT.format(text=c)).ids for c in CAPTIONS]
    alone = [list(llm.generate(llm.model.embed_tokens(torch.tensor([row])), max_new_tokens=12, eos_token_id=7)) for row in rows]
    L = max(map(len, rows))
    together = llm.generate_batch(torch.tensor([row + [0] * (L - len(row)) for row in rows]), torch.tensor([[i < len(row) for i in range(L)] for row in rows]),
                                  max_new_tokens=12, eos_token_id=7)
    assert together == alone and len({tuple(row) for row in alone}) == 3


def shell(qwen, folder, *more, processes=1):
    start = [sys.executable] if processes == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.run([*start, "recaption.py", folder / "captions.jsonl", "--llm", qwen, "--out", folder / "out", "--max-new-tokens", "6", *more], cwd=ROOT,
                          capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def results(folder):
    rows = [json.loads(text) for file in (folder / "out").glob("*.jsonl") for text in file.read_text().splitlines() if text.strip()]
    assert len(rows) == len({row["line"] for row in rows})
    return {row["line"]: row for row in rows}


def test_lines_are_done_once_on_any_number_of_processes(qwen, tmp_path):
    lines = [json.dumps({"caption": CAPTIONS[i % 3], "image": f"{i}.png"}) for i in range(7)]
    (tmp_path / "captions.jsonl").write_text("\n".join(lines[:3] + ["{broken"] + lines[3:]))
    done = shell(qwen, tmp_path)
    assert done.returncode == 0 and "captions.jsonl:4" in done.stderr
    first = results(tmp_path)
    assert sorted(first) == [0, 1, 2, 4, 5, 6, 7] and first[4]["image"] == "3.png" and first[0]["short"] == first[4]["short"]
    file = tmp_path / "out" / "part-00000.jsonl"
    text = file.read_text().rstrip("\n")
    file.write_text(text[:text.rindex("\n") + 20])             # a kill cut off the last line
    done = shell(qwen, tmp_path, processes=2)
    assert done.returncode == 0, done.stderr
    (cut,) = [t for t in file.read_text().splitlines() if t.startswith("{") and not t.endswith("}")]
    file.write_text(file.read_text().replace(cut + "\n", ""))
    assert results(tmp_path) == first


def test_filters():
    row = {"caption": "x", "aesthetic": 6.5, "width": 300, "height": 100}
    assert not recaption.passes(row, min_aesthetic=6.5) and recaption.passes(row | {"aesthetic": 6.51}, min_aesthetic=6.5)
    assert recaption.passes(row, max_aspect=3) and not recaption.passes(row, max_aspect=2.9)
    assert recaption.passes(row, min_side=100) and not recaption.passes(row, min_side=101)
    with pytest.raises(ValueError, match='no number "aesthetic"'):
        recaption.passes({"caption": "x"}, min_aesthetic=6.5)


def test_a_folder_that_is_no_model(tmp_path):
    (tmp_path / "captions.jsonl").write_text("")
    done = shell(tmp_path / "nothing", tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "no such file" in done.stderr
