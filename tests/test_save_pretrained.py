"""save_pretrained: the folder reads as the saved model, whatever was there, and whenever the writing ends."""
import json
import os
import resource
import shutil
import signal
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from conftest import SMALL, shake
from safetensors.torch import save_file

from harmon import Harmon
from harmonkit import checkpoints
from harmonkit.checkpoints import FILES, atomic_write, first_not_finite, is_finite
from harmonkit.shapes_world.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def models(tokenizer):
    """Two models of equal shapes; weights, vae_scale and tokenizer differ."""
    first, second = shake(Harmon(SMALL), 1), shake(Harmon(replace(SMALL, vae_scale=0.25)), 2)
    first.tokenizer, second.tokenizer = tokenizer, train_tokenizer(500)
    return first, second


def is_whole(loaded, model):
    state, expected = loaded.state_dict(), model.state_dict()
    tokenizers = [each.tokenizer and each.tokenizer.to_str() for each in (loaded, model)]
    return (loaded.config == model.config and tokenizers[0] == tokenizers[1]
            and all(torch.equal(state[name], tensor) for name, tensor in expected.items()))


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- what the folder held before ---------------------------------------------------------------------------

def shard(model, folder, stem, suffix):
    """Weights in two shards with an index, as transformers writes them."""
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items() if "lm_head" not in name}
    names, weight_map = sorted(tensors), {}
    for k in (0, 1):
        file = f"{stem}-{k + 1:05d}-of-00002.{suffix}"
        part = {name: tensors[name] for name in names[k::2]}
        weight_map |= dict.fromkeys(part, file)
        save_file(part, folder / file) if suffix == "safetensors" else torch.save(part, folder / file)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))


def one_pickle(model, folder, stem, suffix):
    torch.save(model.state_dict(), folder / f"{stem}.{suffix}")


BEFORE = {
    "shards": (shard, "model", "safetensors"), "shards of pickles": (shard, "pytorch_model", "bin"),
    "a pickle": (one_pickle, "pytorch_model", "bin"),
}


@pytest.mark.parametrize("kind", BEFORE)
def test_the_folder_reads_as_the_new_model(models, tmp_path, capsys, kind):
    first, second = models
    first.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    write_before, *name = BEFORE[kind]
    write_before(first, tmp_path, *name)
    assert is_whole(Harmon.from_pretrained(tmp_path), first)
    weights = {name: content for name, content in files(tmp_path).items() if name not in FILES}
    second.save_pretrained(tmp_path)
    assert is_whole(Harmon.from_pretrained(tmp_path), second)
    # Nothing is lost, and no other program takes the old weights.
    assert files(tmp_path).keys() == {*FILES, *(f"{name}.old" for name in weights)}
    assert all((tmp_path / f"{name}.old").read_bytes() == content for name, content in weights.items())
    note, = capsys.readouterr().err.splitlines()
    assert note.startswith(f"note: {tmp_path}: ") and note.endswith("of the model before got the suffix .old")


def test_an_adapter_and_a_broken_index_are_set_aside(models, tmp_path):
    for name in ("adapter_config.json", "adapter_model.safetensors", "model.safetensors.index.json"):
        (tmp_path / name).write_text("{")
    models[0].save_pretrained(tmp_path)
    assert is_whole(Harmon.from_pretrained(tmp_path), models[0])
    assert sorted(name for name in files(tmp_path) if not name.endswith(".old")) == sorted(FILES)


def test_other_files_stay_and_saving_again_says_nothing(models, tmp_path, capsys):
    others = {"kl16.ckpt", "harmon.pth", "README.md", "generation_config.json"}
    for name in others:
        (tmp_path / name).write_text(name)
    models[0].save_pretrained(tmp_path)
    models[1].save_pretrained(tmp_path)
    assert is_whole(Harmon.from_pretrained(tmp_path), models[1]) and capsys.readouterr().err == ""
    assert files(tmp_path).keys() == {*FILES, *others}
    assert all((tmp_path / name).read_text() == name for name in others)


def vocabulary_and_merges(tokenizer, folder):
    content = json.loads(tokenizer.to_str())
    (folder / "vocab.json").write_text(json.dumps(content["model"]["vocab"]))
    (folder / "merges.txt").write_text("\n".join(" ".join(pair) for pair in content["model"]["merges"]))
    ids = {token["content"]: token["id"] for token in content["added_tokens"]}
    (folder / "added_tokens.json").write_text(json.dumps(ids))


@pytest.mark.parametrize("in_parts", [False, True])
@pytest.mark.parametrize("has_tokenizer", [False, True])
def test_the_tokenizer_is_that_of_the_model_or_none(models, tmp_path, in_parts, has_tokenizer):
    first, second = models
    first.save_pretrained(tmp_path)
    if in_parts:
        (tmp_path / "tokenizer.json").unlink()
        vocabulary_and_merges(first.tokenizer, tmp_path)
        assert Harmon.from_pretrained(tmp_path).tokenizer is not None
    kept = second.tokenizer
    try:
        second.tokenizer = kept if has_tokenizer else None
        second.save_pretrained(tmp_path)
        assert is_whole(Harmon.from_pretrained(tmp_path), second)
    finally:
        second.tokenizer = kept


def test_of_two_kinds_of_weights_the_one_is_read_that_transformers_reads(models, tmp_path):
    """model.safetensors, its index, pytorch_model.bin, its index."""
    first, second = models
    first.save_pretrained(tmp_path)
    shard(second, tmp_path, "model", "safetensors")
    one_pickle(second, tmp_path, "pytorch_model", "bin")
    assert torch.equal(Harmon.from_pretrained(tmp_path).proj_in[0].weight, first.proj_in[0].weight)
    (tmp_path / "model.safetensors").unlink()
    one_pickle(first, tmp_path, "pytorch_model", "bin")
    assert torch.equal(Harmon.from_pretrained(tmp_path).proj_in[0].weight, second.proj_in[0].weight)


# ---- when the writing ends early ---------------------------------------------------------------------------

class Killed(BaseException):
    pass


@contextmanager
def killed_at(count, monkeypatch):
    """The process ends at its `count`-th renaming: nothing that comes after is done, no cleaning either."""
    renamings = []

    def counted(source, target):
        renamings.append(target)
        if len(renamings) == count:
            raise Killed
        replace_file(source, target)
    with monkeypatch.context() as patch:
        replace_file = os.replace
        patch.setattr(os, "replace", counted)
        patch.setattr(shutil, "rmtree", lambda *args, **options: None)
        yield


@pytest.mark.parametrize("kind", [None, "shards"])
def test_a_kill_leaves_one_model_or_a_folder_that_is_refused(models, tmp_path, monkeypatch, kind):
    first, second = models
    seen = []
    for count in range(1, 30):
        folder = tmp_path / str(count)
        first.save_pretrained(folder)
        if kind:
            (folder / "model.safetensors").unlink()
            write_before, *name = BEFORE[kind]
            write_before(first, folder, *name)
        try:
            with killed_at(count, monkeypatch):
                second.save_pretrained(folder)
        except Killed:
            pass
        else:
            break
        try:
            loaded = Harmon.from_pretrained(folder)
            which = [is_whole(loaded, model) for model in models]
            assert any(which), f"a mixture of two models after {count} renamings"
            seen.append("first" if which[0] else "second")
        except FileNotFoundError:
            seen.append("refused")
        second.save_pretrained(folder)
        assert is_whole(Harmon.from_pretrained(folder), second)
        assert not [name for name in os.listdir(folder) if name.startswith(".")], "leftovers of the kill"
    assert seen[:3] == ["first"] * 3 and set(seen) == {"first", "refused"} and count > 6


@pytest.mark.parametrize("size", [100, 30_000, 300_000])
def test_a_full_disk_leaves_the_model_before(models, tmp_path, size):
    """A limit on file sizes replaces the full disk. The tokenizer has 22 kB, the weights have more."""
    first, second = models
    first.save_pretrained(tmp_path)
    before = files(tmp_path)
    limit, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
    try:
        with pytest.raises(OSError, match="model.safetensors: could not be written"):
            second.save_pretrained(tmp_path)
        if size < 20_000:
            with pytest.raises(OSError, match="tokenizer.json: could not be written .File too large"):
                checkpoints.write_tokenizer(tmp_path / "tokenizer.json", second.tokenizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert files(tmp_path) == before
    assert is_whole(Harmon.from_pretrained(tmp_path), first)


# ---- weights that cannot be saved --------------------------------------------------------------------------

@pytest.mark.parametrize("name, value, dtype, message", [
    ("mar.mask_token", float("nan"), None, "the weight mar.mask_token holds NaN or infinity"),
    ("vae.decoder.conv_out.bias", float("inf"), "float16", "vae.decoder.conv_out.bias holds NaN or infinity"),
    ("llm.model.norm.weight", -float("inf"), "bfloat16", "llm.model.norm.weight holds NaN or infinity"),
    ("proj_in.0.bias", -65520.0, "float16", "proj_in.0.bias reaches 6.55e.04, too large for float16"),
    ("proj_in.0.bias", 3.4e38, "bfloat16", "proj_in.0.bias reaches 3.4e.38, too large for bfloat16"),
])
def test_weights_that_are_not_finite_in_the_file_are_not_saved(models, tmp_path, name, value, dtype, message):
    first, _ = models
    first.save_pretrained(tmp_path)
    before = files(tmp_path)
    weight = first.get_parameter(name).data.view(-1)
    whole = weight[-1].item()
    try:
        weight[-1] = value
        for folder in (tmp_path, tmp_path / "new"):
            with pytest.raises(ValueError, match=f"^{folder}: not saved, .*{message}"):
                first.save_pretrained(folder, dtype=dtype)
        assert files(tmp_path) == before and not (tmp_path / "new").exists()
    finally:
        weight[-1] = whole


def test_a_configuration_that_could_not_be_read_back_is_not_saved(models, tmp_path):
    model, _ = models
    kept = model.config
    try:
        model.config = replace(kept, vae_scale=float("nan"))
        with pytest.raises(ValueError, match="vae_scale is NaN; expected a number above 0"):
            model.save_pretrained(tmp_path / "new")
    finally:
        model.config = kept
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16,
                                   torch.float8_e5m2])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_not_finite_is_found_at_any_place(dtype, value):
    """Also in the last elements, which vector instructions leave over, and in views."""
    for size in (1, 7, 64, 1001):
        for place in {0, size // 2, size - 1}:
            tensor = torch.zeros(size, 3).to(dtype).T
            assert is_finite(tensor)
            tensor[1, place] = value
            assert not is_finite(tensor)
            assert first_not_finite({"a": torch.ones(2), "b": tensor, "c": tensor}) == "b"
    assert first_not_finite({"a": torch.ones(2), "b": torch.arange(3), "c": torch.empty(0)}) is None


# ---- to the disk -------------------------------------------------------------------------------------------

def test_bytes_reach_the_disk_before_their_name_and_the_name_before_the_end(tmp_path, monkeypatch):
    calls, fsync, rename = [], os.fsync, os.replace

    def synced(handle):
        calls.append(("sync", os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    def renamed(source, target):
        calls.append(("rename", str(source)))
        rename(source, target)
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    with atomic_write(tmp_path / "a.txt") as temporary:
        open(temporary, "w").write("all of it")
    assert calls == [("sync", temporary), ("rename", temporary), ("sync", str(tmp_path))]


def test_an_interrupt_after_the_renaming_is_still_one(tmp_path, monkeypatch):
    rename = os.replace

    def interrupted(source, target):
        rename(source, target)
        raise KeyboardInterrupt
    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        with atomic_write(tmp_path / "a.txt") as temporary:
            open(temporary, "w").write("all of it")
    assert (tmp_path / "a.txt").read_text() == "all of it"
