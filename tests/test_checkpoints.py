"""Every file format that users have, and the messages about broken ones."""
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, SMALL
from safetensors.torch import save_file

from harmon import Harmon, HarmonConfig
from harmonkit.checkpoints import (
    atomic_write,
    find_config,
    find_model,
    load_strict,
    read,
    shorten,
    write,
    write_text,
)
from llm import Qwen2
from mar import MAR

LM_HEAD, EMBEDDING = "llm.lm_head.weight", "llm.model.embed_tokens.weight"
FILES = ["config.json", "model.safetensors", "tokenizer.json"]


@pytest.fixture(scope="module")
def state(small):
    return {name: tensor.clone() for name, tensor in small.state_dict().items()}


@pytest.fixture
def hugging_face(small, state, tmp_path):
    """A folder with config.json and tokenizer.json as on the hub; weights for it, tied, so without a head."""
    content = SMALL.to_json()
    content["mar"] |= {"type": "mar_base", "num_sampling_steps": "8"}
    (tmp_path / "config.json").write_text(json.dumps(content))
    small.tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path, {name: tensor for name, tensor in state.items() if name != LM_HEAD}


@pytest.fixture
def official(state, tmp_path):
    """harmon.pth in bfloat16 without a VAE, and kl16.ckpt with its names less the prefix."""
    rest = {name: tensor.bfloat16() for name, tensor in state.items() if not name.startswith("vae.")}
    torch.save(rest, tmp_path / "harmon.pth")
    torch.save({"model": part(state, "vae.")}, tmp_path / "kl16.ckpt")
    return tmp_path / "harmon.pth", tmp_path / "kl16.ckpt"


def part(state, prefix):
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def same(model, state):
    loaded = model.state_dict()
    return loaded.keys() == state.keys() and all(torch.equal(loaded[name], state[name]) for name in state)


# ---- formats ---------------------------------------------------------------------------------------------

def test_a_folder_of_ours(small, state, tmp_path):
    small.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o644}, "others may read it"
    model = Harmon.from_pretrained(tmp_path)
    assert same(model, state) and model.config == SMALL and not model.training
    assert model.llm.lm_head.weight is model.llm.model.embed_tokens.weight
    assert model.tokenizer.to_str() == small.tokenizer.to_str()
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())


def test_a_folder_in_another_dtype(small, state, tmp_path):
    small.save_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in read(tmp_path).values()} == {torch.bfloat16}
    assert same(Harmon.from_pretrained(tmp_path), {name: t.bfloat16().float() for name, t in state.items()})
    model = Harmon.from_pretrained(tmp_path, dtype=torch.float16)
    assert {p.dtype for p in model.parameters()} == {torch.float16} == {model.dtype}


def test_one_file_of_hugging_face(state, hugging_face):
    folder, tensors = hugging_face
    save_file(tensors, folder / "model.safetensors")
    model = Harmon.from_pretrained(folder)
    assert same(model, state) and model.tokenizer is not None


def test_shards_of_hugging_face(state, hugging_face):
    folder, tensors = hugging_face
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, keys in shards.items():
        save_file({name: tensors[name] for name in keys}, folder / file)
    shard_of = {name: file for file, keys in shards.items() for name in keys}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": shard_of}))
    assert same(Harmon.from_pretrained(folder), state)
    index.write_text(json.dumps({"weight_map": shard_of | {"extra": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(ValueError, match="index.json: the shards lack extra"):
        Harmon.from_pretrained(folder)
    index.write_text("{}")
    with pytest.raises(ValueError, match="index.json: not a safetensors index"):
        Harmon.from_pretrained(folder)
    index.write_text(json.dumps({"weight_map": shard_of}))
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of-00002.safetensors.*missing shard"):
        Harmon.from_pretrained(folder)


def test_official_pickles(small, state, official, tmp_path):
    pth, kl16 = official
    model = Harmon.from_pretrained(pth, vae=kl16, config=SMALL)
    rounded = {name: t if name.startswith("vae.") else t.bfloat16().float() for name, t in state.items()}
    assert same(model, rounded) and model.dtype == torch.float32 and model.tokenizer is None
    assert Harmon.from_pretrained(pth, vae=kl16, config=SMALL, dtype=torch.bfloat16).dtype == torch.bfloat16
    small.tokenizer.save(str(tmp_path / "tokenizer.json"))
    for tokenizer in (tmp_path, tmp_path / "tokenizer.json"):
        model = Harmon.from_pretrained(pth, vae=kl16, config=SMALL, tokenizer=tokenizer)
        assert model.tokenizer.to_str() == small.tokenizer.to_str()
    with pytest.raises(ValueError, match="harmon.pth: there is no VAE in it; .*kl16.ckpt"):
        Harmon.from_pretrained(pth, config=SMALL)
    with pytest.raises(ValueError, match="LLM width 32 and MAR width 32 are of no official model"):
        Harmon.from_pretrained(pth, vae=kl16)
    with pytest.raises(ValueError, match="kl16.ckpt: .* not a Harmon checkpoint"):
        Harmon.from_pretrained(kl16)


def test_a_vae_beside_the_model_replaces_its_own(small, state, tmp_path):
    small.save_pretrained(tmp_path)
    other = {name: tensor + 1 for name, tensor in part(state, "vae.").items()}
    save_file(other, tmp_path / "vae.safetensors")
    model = Harmon.from_pretrained(tmp_path, vae=tmp_path / "vae.safetensors")
    assert same(model, {name: t + 1 if name.startswith("vae.") else t for name, t in state.items()})


def test_a_folder_of_qwen(state, tmp_path):
    """Tied, so without a head."""
    tensors = {name: tensor for name, tensor in part(state, "llm.").items() if name != "lm_head.weight"}
    save_file(tensors, tmp_path / "model.safetensors")
    llm = Qwen2(SMALL.llm)
    load_strict(llm, read(tmp_path), tmp_path)
    llm.tie_weights()
    assert same(llm, part(state, "llm."))


def test_a_checkpoint_of_mar(state, tmp_path):
    """The averaged weights are taken."""
    mar_state, file = part(state, "mar."), tmp_path / "checkpoint-last.pth"
    others = {name: tensor + 1 for name, tensor in mar_state.items()}
    torch.save({"model": others, "model_ema": mar_state, "epoch": 3}, file)
    mar = MAR(SMALL.mar)
    load_strict(mar, read(file), file)
    assert same(mar, mar_state)


def test_a_pickle_from_before_the_zip_format(tmp_path):
    torch.save({"a": torch.ones(3)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert torch.equal(read(tmp_path / "old.pth")["a"], torch.ones(3))


def test_the_bundled_model():
    model = Harmon.from_pretrained()
    tiny = HarmonConfig.from_name("harmon-tiny")
    assert model.config == find_config("harmon-tiny") == replace(tiny, vae_scale=model.config.vae_scale)
    assert model.tokenizer.get_vocab_size() == 512


def test_the_configuration_of_an_official_name_needs_no_file():
    assert find_config("harmon-0.5b") == HarmonConfig.from_name("harmon-0.5b")


def test_hub_ids_are_fetched(small, tmp_path, monkeypatch):
    """A folder, and a failure, replace the hub's download."""
    import huggingface_hub

    small.save_pretrained(tmp_path)
    asked = []

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert Harmon.from_pretrained("wusize/Harmon-0_5B").config == SMALL
    assert asked == [("wusize/Harmon-0_5B", ["*.json", "*.safetensors"])]

    def fail(*args, **kwargs):
        raise ConnectionError("no way\nthere")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    message = r"wusize/Harmon-0_5B: no such folder, and the hub did not give it \(ConnectionError: no way\)"
    with pytest.raises(FileNotFoundError, match=message):
        Harmon.from_pretrained("wusize/Harmon-0_5B")


# ---- strict loading --------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes, message", [
    ({"mar.mask_token": None}, "missing: mar.mask_token$"),
    ({LM_HEAD: None, EMBEDDING: None}, f"missing: {EMBEDDING}$"),
    ({"mar.extra": torch.ones(1)}, "unexpected: mar.extra$"),
    ({"proj_in.0.bias": torch.ones(7)}, r"of another shape: proj_in.0.bias is \(7,\), expected \(32,\)$"),
    ({"mar.mask_token": None, "mar.extra": torch.ones(1)}, "missing: mar.mask_token; unexpected: mar.extra$"),
    (dict.fromkeys("abcdef", torch.ones(1)), "unexpected: a, b, c, d and 2 more$"),
])
def test_wrong_keys_are_named(state, changes, message):
    tensors = {name: tensor for name, tensor in (state | changes).items() if tensor is not None}
    with pytest.raises(ValueError, match="some.file: these weights do not fit this model; " + message):
        load_strict(Harmon(SMALL), tensors, "some.file")


def test_loading_converts_and_frees_one_tensor_after_the_other(state):
    tensors = dict(state)
    with torch.device("meta"):
        model = Harmon(SMALL)
    load_strict(model, tensors, "some.file", device="cpu", dtype=torch.bfloat16)
    assert tensors == {} and {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_shorten():
    assert shorten(["a", "b"]) == "a, b" and shorten("abcdef", most=2) == "a, b and 4 more"


# ---- broken and missing files ----------------------------------------------------------------------------

def test_cut_files_are_named(small, official, tmp_path):
    folder = tmp_path / "folder"
    small.save_pretrained(folder)
    content = (folder / "model.safetensors").read_bytes()
    for cut in (content[:len(content) // 2], content[:4], b""):
        (folder / "model.safetensors").write_bytes(cut)
        with pytest.raises(ValueError, match="model.safetensors: not a complete safetensors file"):
            Harmon.from_pretrained(folder)
    pth, _ = official
    for cut in (pth.read_bytes()[:20000], b"no pickle at all"):
        pth.write_bytes(cut)
        with pytest.raises(ValueError, match="harmon.pth: not a torch checkpoint of plain tensors"):
            Harmon.from_pretrained(pth)


@pytest.mark.parametrize("content", [{}, [torch.ones(1)], {"epoch": 3}, {"model": {"a": 1}}])
def test_pickles_of_other_things_are_named(tmp_path, content):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="x.pth: expected a dictionary of tensors, possibly under 'model'"):
        read(tmp_path / "x.pth")


def test_a_broken_config_is_named(small, tmp_path):
    small.save_pretrained(tmp_path)
    for content, message in (('{"llm": {}}', "not a Harmon configuration"), ("{", "not JSON")):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match=f"config.json: {message}"):
            Harmon.from_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config.json: no such file"):
        Harmon.from_pretrained(tmp_path)


@pytest.mark.parametrize("path", ["nothing.pth", "./nothing", "no-such-model", "a/b/c", "/nowhere/at"])
def test_missing_models_are_named(path):
    with pytest.raises(FileNotFoundError, match=f"^{path}: no such file or folder"):
        find_model(path)


def test_folders_without_weights_say_what_they_lack(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither model.safetensors nor model.safetensors.index.json"):
        read(tmp_path)
    torch.save({"step": 1}, tmp_path / "step-000001.pt")
    with pytest.raises(FileNotFoundError, match="a run of train.py.*--export"):
        Harmon.from_pretrained(tmp_path)


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "was-here"), "w")
    torch.save({"a": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="evil.pth: not a torch checkpoint of plain tensors"):
        read(tmp_path / "evil.pth")
    assert not (tmp_path / "was-here").exists()


# ---- writing ---------------------------------------------------------------------------------------------

def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    file = tmp_path / "new" / "notes.txt"
    write_text(file, "before")
    with pytest.raises(KeyError):
        with atomic_write(file) as temporary:
            with open(temporary, "w") as half:
                half.write("half of it")
            raise KeyError
    assert [(path.name, path.read_text()) for path in file.parent.iterdir()] == [("notes.txt", "before")]
    write_text(file, "after")
    assert file.read_text() == "after"


def test_a_full_disk_leaves_the_old_file(small, tmp_path):
    """A limit on the file size replaces the full disk: the write fails half-way."""
    small.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    code = f"""
import resource, signal
import torch
from harmonkit import checkpoints
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
try:
    checkpoints.write({str(tmp_path / "model.safetensors")!r}, {{"a": torch.ones(100000)}})
except OSError as error:
    print("OSError", error)
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.startswith(f"OSError {tmp_path}/model.safetensors: could not be written"), run.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_views_are_written_as_plain_tensors(tmp_path):
    write(tmp_path / "x.safetensors", {"a": torch.arange(6.0).view(2, 3).T.requires_grad_()})
    assert read(tmp_path / "x.safetensors")["a"].tolist() == [[0, 3], [1, 4], [2, 5]]
