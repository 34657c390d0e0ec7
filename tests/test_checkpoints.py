"""Models from the files that users have, strictly loaded and saved; messages about what does not fit."""
import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL
from PIL import Image
from safetensors.torch import save_file

from harmon import Harmon, HarmonConfig
from harmonkit.checkpoints import (
    atomic_write,
    find_config,
    load_strict,
    read,
    write,
    write_text,
)
from llm import Qwen2
from mar import MAR, random_mask

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
    with pytest.raises(ValueError, match="index.json: not an index of shards"):
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
    assert asked == [("wusize/Harmon-0_5B", ["*.json", "*.safetensors", "merges.txt"])]

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
    ({"proj_in.0.bias": torch.ones(32).char()}, "not floating-point: proj_in.0.bias is torch.int8$"),
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


def test_a_config_of_other_sizes_gives_a_short_message(small, tmp_path):
    small.save_pretrained(tmp_path)
    content = SMALL.to_json()
    content["llm"] |= {"hidden_size": 64, "num_hidden_layers": 30}
    (tmp_path / "config.json").write_text(json.dumps(content))
    message = "do not fit this model; missing: .* more; of another shape: .* more$"
    with pytest.raises(ValueError, match=message) as error:
        Harmon.from_pretrained(tmp_path)
    assert len(str(error.value)) < 900 and "\n" not in str(error.value)


# ---- names with prefixes ---------------------------------------------------------------------------------

@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod."])
def test_a_prefix_of_all_names_is_dropped(state, official, tmp_path, capsys, prefix):
    """Of the model's file, of the VAE's, and of a Qwen's, whose own names begin with "model."."""
    pth, kl16 = official
    torch.save({prefix + name: tensor for name, tensor in read(pth).items()}, tmp_path / "harmon-2.pth")
    torch.save({prefix + name: tensor for name, tensor in read(kl16).items()}, tmp_path / "kl16-2.ckpt")
    expected = Harmon.from_pretrained(pth, vae=kl16, config=SMALL).state_dict()
    assert capsys.readouterr().err == ""
    files = dict(path=tmp_path / "harmon-2.pth", vae=tmp_path / "kl16-2.ckpt")
    assert same(Harmon.from_pretrained(**files, config=SMALL), expected)
    notes = capsys.readouterr().err.splitlines()
    assert [note.split(": ")[1].split("/")[-1] for note in notes] == ["harmon-2.pth", "kl16-2.ckpt"]
    assert all(note.startswith("note: ") and f"{prefix}" in note and "is read as" in note for note in notes)
    whole = part(state, "llm.")
    for qwen in (whole, {name: tensor for name, tensor in whole.items() if name != "lm_head.weight"}):
        llm = Qwen2(SMALL.llm)
        load_strict(llm, {prefix + name: tensor for name, tensor in qwen.items()}, "qwen")
        assert same(llm, whole)


def test_a_whole_model_of_a_wrapper(small, state, tmp_path, capsys):
    small.save_pretrained(tmp_path)
    tensors = {f"module._orig_mod.{name}": tensor for name, tensor in state.items() if name != LM_HEAD}
    write(tmp_path / "model.safetensors", tensors)
    assert same(Harmon.from_pretrained(tmp_path), state)
    assert capsys.readouterr().err.count("\n") == 1


# ---- tied and untied heads -------------------------------------------------------------------------------

@pytest.fixture
def untied(small, state, tmp_path):
    """A folder whose head has weights of its own, and its state."""
    small.save_pretrained(tmp_path)
    tensors = state | {LM_HEAD: state[LM_HEAD] + 1}
    write(tmp_path / "model.safetensors", tensors)
    return tmp_path, tensors


def set_tying(folder, value):
    content = json.loads((folder / "config.json").read_text())
    content["llm"].pop("tie_word_embeddings", None)
    if value != "absent":
        content["llm"]["tie_word_embeddings"] = value
    (folder / "config.json").write_text(json.dumps(content))


@pytest.mark.parametrize("told", ["absent", None, False, True])
def test_a_head_of_its_own_is_used(untied, told, capsys):
    """Whatever config.json says; a contradiction is said. The answers are those of the head."""
    folder, tensors = untied
    set_tying(folder, told)
    model = Harmon.from_pretrained(folder)
    assert same(model, tensors) and model.config.llm.tie_word_embeddings is False
    assert model.llm.lm_head.weight is not model.llm.model.embed_tokens.weight
    notes = capsys.readouterr().err
    assert notes.count("\n") == (0 if told is False else 1)
    assert told is False or "llm.lm_head.weight differs from the embedding, so both are used" in notes
    model.save_pretrained(folder / "again")
    assert same(Harmon.from_pretrained(folder / "again"), tensors) and capsys.readouterr().err == ""


@pytest.mark.parametrize("told", ["absent", None, True])
@pytest.mark.parametrize("with_head", [True, False])
def test_a_head_that_equals_the_embedding_is_tied(small, state, tmp_path, capsys, told, with_head):
    small.save_pretrained(tmp_path)
    if with_head:
        write(tmp_path / "model.safetensors", state)
    set_tying(tmp_path, told)
    model = Harmon.from_pretrained(tmp_path)
    assert same(model, state) and model.config == SMALL and capsys.readouterr().err == ""
    assert model.llm.lm_head.weight is model.llm.model.embed_tokens.weight


def test_untied_without_a_head_says_which_flag(small, tmp_path):
    small.save_pretrained(tmp_path)
    set_tying(tmp_path, False)
    message = 'missing: llm.lm_head.weight; "tie_word_embeddings": true in config.json shares the embedding'
    with pytest.raises(ValueError, match=message):
        Harmon.from_pretrained(tmp_path)


def test_strict_loading_never_drops_a_head(state):
    """A Qwen's head into a tied model, as train.py --init-llm would."""
    tensors = part(state, "llm.")
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    message = "different: lm_head.weight from model.embed_tokens.weight, which tie_word_embeddings makes one$"
    with pytest.raises(ValueError, match=message):
        load_strict(Qwen2(SMALL.llm), tensors, "qwen")


def test_official_files_with_a_head_of_their_own(official, tmp_path, capsys):
    pth, kl16 = official
    tensors = read(pth)
    head = tensors[LM_HEAD] * 2
    torch.save(tensors | {LM_HEAD: head}, tmp_path / "own.pth")
    model = Harmon.from_pretrained(tmp_path / "own.pth", vae=kl16, config=SMALL)
    assert torch.equal(model.llm.lm_head.weight, head.float()) and "own.pth" in capsys.readouterr().err


# ---- dtypes, devices, paths, tokenizers ------------------------------------------------------------------

@pytest.fixture(scope="module")
def saved(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    small.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype, expected", [
    ("bfloat16", torch.bfloat16), ("torch.bfloat16", torch.bfloat16), ("bf16", torch.bfloat16),
    ("float16", torch.float16), ("fp16", torch.float16), ("float32", torch.float32),
    (torch.float16, torch.float16), (np.float32, torch.float32), (np.dtype("float16"), torch.float16),
    (None, torch.float32)])
def test_dtypes_by_name(saved, tmp_path, dtype, expected):
    model = Harmon.from_pretrained(saved, dtype=dtype, device="cpu")
    assert {p.dtype for p in model.parameters()} == {expected}
    model.save_pretrained(tmp_path, dtype=dtype)
    assert {tensor.dtype for tensor in read(tmp_path).values()} == {expected}


@pytest.mark.parametrize("dtype", ["int8", "bfloat", "auto", "", "nn", 16, torch.int32, np.int64,
                                   "float8_e5m2"])
def test_other_dtypes_are_refused(saved, small, tmp_path, dtype):
    with pytest.raises(ValueError, match="^dtype is .*; known: float32, bfloat16, float16$"):
        Harmon.from_pretrained(saved, dtype=dtype or "x")
    with pytest.raises(ValueError, match="^dtype is .*; known: float32, bfloat16, float16$"):
        small.save_pretrained(tmp_path / "out", dtype=dtype)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("device", ["nowhere", "cuda", "gpu:0", 3.5])
def test_devices_that_are_not_here_are_refused(saved, monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=f"^device {device}: "):
        Harmon.from_pretrained(saved, device=device)


def test_home_is_expanded_in_every_path(small, state, official, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    small.tokenizer.save(str(tmp_path / "tokenizer.json"))
    files = dict(vae="~/kl16.ckpt", tokenizer="~/tokenizer.json")
    model = Harmon.from_pretrained("~/harmon.pth", **files, config=SMALL)
    assert model.tokenizer is not None
    model.save_pretrained("~/new/model/")
    assert same(Harmon.from_pretrained("~/new/model/"), model.state_dict())
    assert find_config("~/new/model") == SMALL
    assert sorted(path.name for path in (tmp_path / "new/model").iterdir()) == FILES


def test_vocabulary_and_merges_beside_a_model(small, saved, tmp_path):
    small.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text(json.dumps(content["model"]["vocab"]))
    lines = [" ".join(pair) for pair in content["model"]["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *lines]))
    ids = {token["content"]: token["id"] for token in content["added_tokens"]}
    (tmp_path / "added_tokens.json").write_text(json.dumps(ids))
    models = [Harmon.from_pretrained(folder) for folder in (saved, tmp_path)]
    answers = ["".join(model.chat("What color is it?", max_new_tokens=6)) for model in models]
    assert answers[0] == answers[1] != ""


def test_a_tokenizer_with_more_ids_than_rows_is_refused(saved):
    with pytest.raises(ValueError, match="excerpt.json: .* tokens have no row among the model's 512, "):
        Harmon.from_pretrained(saved, tokenizer=ROOT / "tests/qwen2.5-excerpt.json")


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_the_default_dtype_changes_nothing(saved, default):
    """Weights, pictures, answers and training masks are those under float32."""
    def everything():
        model = Harmon.from_pretrained(saved)
        options = dict(num_iter=2, num_sampling_steps=4)
        ids, real = torch.arange(5, 15)[None], torch.ones(1, 10, dtype=torch.bool)
        pictures = [model.generate_image("a star", seed=1, **options)[0],
                    model.generate_image("a star", image=image, mask=mask, seed=1, **options)[0]]
        torch.manual_seed(0)
        pixels = model.sample(ids, real, cfg=1, **options)
        z = torch.ones(3, 32, dtype=torch.float32)
        drawn = [model.mar.diffloss.sample(z), random_mask(2, 16, 0.5)]
        answers = ["".join(model.chat("what?", picture, max_new_tokens=6)) for picture in (None, image)]
        tensors = [pixels, *drawn, *model.state_dict().values()]
        return [picture.tobytes() for picture in pictures], answers, tensors
    image, mask = Image.new("RGB", (32, 32), "teal"), Image.linear_gradient("L").resize((32, 32))
    expected = everything()
    torch.set_default_dtype(default)
    try:
        found = everything()
    finally:
        torch.set_default_dtype(torch.float32)
    assert found[:2] == expected[:2]
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found[2], expected[2], strict=True))


# ---- broken and missing files ----------------------------------------------------------------------------

def test_cut_files_are_named(small, official, tmp_path):
    folder = tmp_path / "folder"
    small.save_pretrained(folder)
    content = (folder / "model.safetensors").read_bytes()
    for cut in (content[:len(content) // 2], content[:4]):
        (folder / "model.safetensors").write_bytes(cut)
        with pytest.raises(ValueError, match="model.safetensors: not a complete safetensors file"):
            Harmon.from_pretrained(folder)
    pth, _ = official
    pth.write_bytes(pth.read_bytes()[:20000])
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


def test_folders_without_weights_say_what_they_lack(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither model.safetensors nor .*json is in this folder$"):
        read(tmp_path)
    for name in ("kl16.ckpt", "harmon_0.5b.pth", "notes.txt"):
        (tmp_path / name).touch()
    with pytest.raises(FileNotFoundError, match="; of harmon_0.5b.pth, kl16.ckpt, give the file itself$"):
        read(tmp_path)
    torch.save({"step": 1}, tmp_path / "step-000001.pt")
    with pytest.raises(FileNotFoundError, match="a run of train.py.*--export"):
        Harmon.from_pretrained(tmp_path)


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
