"""Every file format that users have, and what is said of broken ones."""
import copy
import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, SMALL
from safetensors.torch import save_file

from harmonkit import checkpoints
from harmon import Harmon, HarmonConfig
from llm import Qwen2
from mar import MAR


@pytest.fixture(scope="module")
def state(small):
    return {k: v.clone() for k, v in small.state_dict().items()}


def same(model, state):
    return all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def hugging_face_config():
    """As Hugging Face's folders have it: a named MAR size, here overridden down to the small one, and numbers as strings."""
    content = SMALL.to_json()
    content["mar"] |= {"type": "mar_base", "num_sampling_steps": str(SMALL.mar.diffusion_steps), "grad_checkpointing": False}
    content["llm"] |= {"architectures": ["Qwen2ForCausalLM"], "torch_dtype": "bfloat16"}
    return content


def test_our_own_folder(small, state, tmp_path):
    small.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    model = Harmon.from_pretrained(tmp_path)
    assert same(model, state) and model.config == SMALL and not model.training
    assert model.llm.lm_head.weight is model.llm.model.embed_tokens.weight
    assert model.tokenizer.to_str() == small.tokenizer.to_str()
    assert all(p.requires_grad for p in model.parameters())


def test_hugging_face_shards(small, state, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(hugging_face_config()))
    names = sorted(k for k in state if k != "llm.lm_head.weight")
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, keys in shards.items():
        save_file({k: state[k] for k in keys}, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": {k: f for f, keys in shards.items() for k in keys}}))
    small.tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert same(Harmon.from_pretrained(tmp_path), state)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of-00002.safetensors.*missing shard"):
        Harmon.from_pretrained(tmp_path)


def official_files(state, folder, **wrap):
    """harmon.pth without a VAE, in bf16, and kl16.ckpt with its names less the prefix."""
    torch.save({k: v.bfloat16() for k, v in state.items() if not k.startswith("vae.")}, folder / "harmon.pth")
    torch.save({"model": {k[4:]: v for k, v in state.items() if k.startswith("vae.")}}, folder / "kl16.ckpt")
    return folder / "harmon.pth", folder / "kl16.ckpt"


def test_official_pickles(state, tmp_path):
    pth, kl16 = official_files(state, tmp_path)
    model = Harmon.from_pretrained(pth, vae=kl16, config=SMALL)
    rounded = {k: v if k.startswith("vae.") else v.bfloat16().float() for k, v in state.items()}
    assert same(model, rounded) and model.dtype == torch.float32
    assert Harmon.from_pretrained(pth, vae=kl16, config=SMALL, dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="no VAE in it.*kl16.ckpt"):
        Harmon.from_pretrained(pth, config=SMALL)
    with pytest.raises(ValueError, match="LLM width 32 and MAR width 32 belong to no official model"):
        Harmon.from_pretrained(pth, vae=kl16)
    with pytest.raises(ValueError, match="not a Harmon checkpoint"):
        Harmon.from_pretrained(kl16)


def test_convert_writes_one_folder(state, small, tmp_path, monkeypatch, capsys):
    import convert
    import harmon

    pth, kl16 = official_files(state, tmp_path)
    small.tokenizer.save(str(tmp_path / "tokenizer.json"))
    monkeypatch.setattr(harmon, "infer_config", lambda tensors, source: SMALL)
    convert.main([str(pth), "--vae", str(kl16), "--tokenizer", str(tmp_path), "--out", str(tmp_path / "folder"), "--dtype", "float32"])
    model = Harmon.from_pretrained(tmp_path / "folder")
    assert same(model, {k: v if k.startswith("vae.") else v.bfloat16().float() for k, v in state.items()})
    assert model.tokenize("a star") == small.tokenize("a star")
    with pytest.raises(SystemExit):
        convert.main([str(pth), "--vae", str(kl16), "--out", str(tmp_path / "none")])
    assert "there is no tokenizer in it" in capsys.readouterr().err and not (tmp_path / "none").exists()


def test_convert_averages_models(small, tmp_path, capsys):
    import convert

    for i in range(3):
        moved = copy.deepcopy(small)
        with torch.no_grad():
            for p in moved.parameters():
                p += 0.5 * i * i
        moved.save_pretrained(tmp_path / str(i))
    convert.main([*(str(tmp_path / str(i)) for i in range(3)), "--out", str(tmp_path / "mean"), "--dtype", "float32"])
    mean = Harmon.from_pretrained(tmp_path / "mean")
    assert all(torch.allclose(p, q + 0.5 * 5 / 3, atol=1e-5) for p, q in zip(mean.parameters(), small.parameters()))
    assert same(Harmon.from_pretrained(tmp_path / "0"), small.state_dict()), "what was read is as it was"
    with pytest.raises(SystemExit):
        convert.main([str(tmp_path / "0"), "harmon-tiny", "--out", str(tmp_path / "none")])
    assert "differ in size or configuration" in capsys.readouterr().err and not (tmp_path / "none").exists()


def test_parts_from_their_own_checkpoints(state, tmp_path):
    """A Qwen2.5 folder, tied, and a MAR checkpoint, of which the averaged weights are the ones."""
    save_file({k[4:]: v for k, v in state.items() if k.startswith("llm.model.")}, tmp_path / "model.safetensors")
    llm = Qwen2(SMALL.llm)
    checkpoints.load_strict(llm, checkpoints.read(tmp_path), tmp_path)
    assert torch.equal(llm.lm_head.weight, state["llm.model.embed_tokens.weight"])
    mar_state = {k[4:]: v for k, v in state.items() if k.startswith("mar.")}
    torch.save({"model": {k: v + 1 for k, v in mar_state.items()}, "model_ema": mar_state, "epoch": 3}, tmp_path / "checkpoint-last.pth")
    mar = MAR(SMALL.mar)
    checkpoints.load_strict(mar, checkpoints.read(tmp_path / "checkpoint-last.pth"), "checkpoint-last.pth")
    assert all(torch.equal(v, mar_state[k]) for k, v in mar.state_dict().items())


def test_a_pickle_from_before_the_zip_format(state, tmp_path):
    torch.save({"a": torch.ones(3)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert torch.equal(checkpoints.read(tmp_path / "old.pth")["a"], torch.ones(3))


def test_wrong_keys_are_named(state, tmp_path):
    for change, message in (
            (lambda s: s.pop("mar.mask_token"), "missing: mar.mask_token"),
            (lambda s: s.update({"mar.extra": torch.ones(1)}), "unexpected: mar.extra"),
            (lambda s: s.update({"proj_in.0.bias": torch.ones(7)}), r"proj_in.0.bias is \(7,\), expected \(32,\)"),
            (lambda s: [s.pop("llm.lm_head.weight"), s.pop("llm.model.embed_tokens.weight")], "missing: llm.model.embed_tokens.weight")):
        broken = dict(state)
        change(broken)
        with pytest.raises(ValueError, match=message) as error:
            checkpoints.load_strict(Harmon(SMALL), broken, "some.file")
        assert "some.file" in str(error.value)


def test_broken_files_are_named(state, small, tmp_path):
    small.save_pretrained(tmp_path / "folder")
    file = tmp_path / "folder" / "model.safetensors"
    content = file.read_bytes()
    for part in (content[:len(content) // 2], content[:4], b""):
        file.write_bytes(part)
        with pytest.raises(ValueError, match="model.safetensors: not a complete safetensors file"):
            Harmon.from_pretrained(tmp_path / "folder")
    (tmp_path / "junk.pth").write_bytes(b"no pickle at all")
    with pytest.raises(ValueError, match="junk.pth: not a torch checkpoint"):
        Harmon.from_pretrained(tmp_path / "junk.pth")
    pth, _ = official_files(state, tmp_path)
    pth.write_bytes(pth.read_bytes()[:20000])
    with pytest.raises(ValueError, match="harmon.pth: not a torch checkpoint"):
        Harmon.from_pretrained(pth)
    (tmp_path / "folder" / "config.json").write_text('{"llm": {}}')
    file.write_bytes(content)
    with pytest.raises(ValueError, match="config.json: not a Harmon configuration"):
        Harmon.from_pretrained(tmp_path / "folder")
    (tmp_path / "folder" / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json"):
        Harmon.from_pretrained(tmp_path / "folder")
    (tmp_path / "folder" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config.json"):
        Harmon.from_pretrained(tmp_path / "folder")


def test_missing_files_are_named(tmp_path):
    for path in (tmp_path / "nothing.pth", "./nothing", "no-such-model", tmp_path / "a" / "b"):
        with pytest.raises(FileNotFoundError, match="no such"):
            Harmon.from_pretrained(path)


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "was-here"), "w"))
    torch.save({"a": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="evil.pth: not a torch checkpoint of plain tensors"):
        checkpoints.read(tmp_path / "evil.pth")
    assert not (tmp_path / "was-here").exists()


def test_a_full_disk_leaves_nothing_behind(small, tmp_path):
    """A limit on the file size stands in for the full disk: the write fails half-way."""
    small.save_pretrained(tmp_path)
    assert {p.stat().st_mode & 0o777 for p in tmp_path.iterdir()} == {0o644}, "others may read what was written"
    before = (tmp_path / "model.safetensors").read_bytes()
    code = f"""
import resource, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import torch, weights
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
try:
    checkpoints.write({str(tmp_path / "model.safetensors")!r}, {{"a": torch.ones(100000)}})
except OSError as error:
    print("OSError", error)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "OSError" in run.stdout, run.stdout + run.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_a_run_of_training_says_how_it_becomes_a_model(tmp_path):
    torch.save({"step": 1}, tmp_path / "step-000001.pt")
    with pytest.raises(FileNotFoundError, match="a run of train.py.*--export"):
        Harmon.from_pretrained(tmp_path)


def test_names_of_the_published_sizes():
    big = HarmonConfig.from_name("harmon-1.5b")
    assert (big.llm.num_hidden_layers, big.mar.encoder_depth, big.mar.head_width, big.mar.num_heads) == (28, 20, 1536, 16)
    content = {"llm": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2},
               "mar": {"type": "mar_huge", "img_size": 256, "buffer_size": 64, "diffloss_d": 12, "diffloss_w": 1536, "num_sampling_steps": "100"}}
    assert HarmonConfig.from_json(content) == big
    assert HarmonConfig.from_json(big.to_json()) == big


def test_hub_ids_are_fetched(small, tmp_path, monkeypatch):
    """The hub itself cannot be reached in a test: its download is replaced by a folder, and by a failure."""
    import huggingface_hub

    small.save_pretrained(tmp_path)
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, allow_patterns: asked.append((name, allow_patterns)) or str(tmp_path))
    assert Harmon.from_pretrained("wusize/Harmon-0_5B").config == SMALL
    assert asked == [("wusize/Harmon-0_5B", ["*.json", "*.safetensors"])]

    def fail(*args, **kwargs):
        raise ConnectionError("no way\nthere")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(FileNotFoundError, match=r"wusize/Harmon-0_5B: no such folder, and fetching it from the hub failed \(ConnectionError: no way\)"):
        Harmon.from_pretrained("wusize/Harmon-0_5B")
