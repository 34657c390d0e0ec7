"""Files of weights: every format and wrapping that users have, and what is said of other files."""
import argparse
import json
import pickle
import re
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from harmonkit import weight_files
from harmonkit.checkpoints import load_strict
from harmonkit.weight_files import find_model, plain_names, read, shorten

TENSORS = {"a.weight": torch.arange(600.0).view(20, 30), "b": torch.full((7,), 3.5, dtype=torch.bfloat16),
           "c": torch.arange(5)}


def same(tensors, expected=TENSORS):
    are_equal = (torch.equal(tensors[name], tensor) for name, tensor in expected.items())
    return tensors.keys() == expected.keys() and all(are_equal)


def zip_again(source, target, method, extra=None, folders=False):
    """Write the entries of a zip file once more, as a zip tool does."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", method) as new:
        if folders:
            top = old.namelist()[0].split("/")[0]
            new.writestr(f"{top}/", b"")
            new.writestr(f"{top}/data/", b"")
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
        if extra:
            new.writestr(extra, b"x")
    return target


@pytest.fixture
def pth(tmp_path):
    torch.save(TENSORS, tmp_path / "x.pth")
    return tmp_path / "x.pth"


# ---- formats ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("folders", [False, True])
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_written_again_holds_the_same_tensors(pth, tmp_path, method, folders):
    """Compressed entries are unpacked, not mapped."""
    again = zip_again(pth, tmp_path / "again.pth", method, folders=folders)
    assert {entry.compress_type for entry in zipfile.ZipFile(again).infolist()} >= {method}
    assert same(read(again))


def test_only_some_entries_compressed(pth, tmp_path):
    with zipfile.ZipFile(pth) as old, zipfile.ZipFile(tmp_path / "some.pth", "w") as new:
        for entry in old.infolist():
            is_tensor = "/data/" in entry.filename
            method = zipfile.ZIP_DEFLATED if is_tensor else zipfile.ZIP_STORED
            new.writestr(entry.filename, old.read(entry), method)
    assert same(read(tmp_path / "some.pth"))


def test_plain_zips_are_mapped(pth, monkeypatch):
    asked, load = [], torch.load

    def watched(file, **flags):
        asked.append(flags["mmap"])
        return load(file, **flags)
    monkeypatch.setattr(torch, "load", watched)
    assert same(read(pth)) and asked == [True]


def test_formats_are_told_by_their_content(pth, tmp_path):
    """Not by the suffix."""
    save_file(TENSORS, tmp_path / "x.safetensors")
    for name in ("safetensors.pth", "safetensors.bin", "safetensors"):
        (tmp_path / name).write_bytes((tmp_path / "x.safetensors").read_bytes())
        assert same(read(tmp_path / name))
    old = tmp_path / "old.pt"
    torch.save(TENSORS, old, _use_new_zipfile_serialization=False)
    for source in (pth, old):
        for name in ("pickle.safetensors", "pickle.bin", "pickle"):
            (tmp_path / name).write_bytes(source.read_bytes())
            assert same(read(tmp_path / name))


@pytest.mark.parametrize("sharded", [False, True])
def test_folders_of_pytorch_model_bin(tmp_path, sharded):
    if sharded:
        shards = {"pytorch_model-1.bin": ["a.weight"], "pytorch_model-2.bin": ["b", "c"]}
        for file, names in shards.items():
            torch.save({name: TENSORS[name] for name in names}, tmp_path / file)
        shard_of = {name: file for file, names in shards.items() for name in names}
        index = tmp_path / "pytorch_model.bin.index.json"
        index.write_text(json.dumps({"weight_map": shard_of}))
    else:
        torch.save(TENSORS, tmp_path / "pytorch_model.bin")
    assert same(read(tmp_path))


@pytest.mark.parametrize("wrapped", [
    {"model": TENSORS, "args": argparse.Namespace(lr=1e-4), "epoch": 3},
    {"state_dict": OrderedDict(TENSORS), "pytorch-lightning_version": "1.4", "hparams": {"a": [1, None]}},
    {"model_state_dict": TENSORS, "optimizer_state_dict": {"state": {}, "param_groups": []}},
    {"module": TENSORS, "ds_version": "0.16"},
    {name: torch.nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
     for name, tensor in TENSORS.items()},
])
def test_checkpoints_of_training_scripts(tmp_path, wrapped):
    torch.save(wrapped, tmp_path / "x.ckpt")
    tensors = read(tmp_path / "x.ckpt")
    assert same(tensors) and not any(tensor.requires_grad for tensor in tensors.values())


# ---- other files -----------------------------------------------------------------------------------------

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 3087467144\n"
OTHERS = {
    "lfs": (LFS.encode(), r"a Git-LFS pointer, not the file of 3,087,467,144 bytes .* git lfs pull"),
    "html": (b"\n<!DOCTYPE html>\n<html>" + b" " * 2000, r"a web page; download the file itself"),
    "html in capitals": (b"<HTML><HEAD><TITLE>503</TITLE>", r"a web page"),
    "xml": (b'\xef\xbb\xbf<?xml version="1.0"?><Error><Code>AccessDenied</Code>', r"a web page"),
    "json": (b'{"error":"Repository not found"}', r"a text, not weights; it begins '{\"error\":\"Repository"),
    "sentence": (b"Access to model x is restricted.\n", r"a text, not weights; it begins 'Access to"),
    "long text": (b"Entry not found " * 4000, r"a text, not weights; it begins 'Entry not found"),
    "empty": (b"", r"empty; download it again$"),
    "gzip": (b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03", r"a compressed archive; unpack it"),
    "tar": (b"x.pth".ljust(257, b"\0") + b"ustar\x0000" + bytes(300), r"a compressed archive; unpack it"),
    "gguf": (b"GGUF\x03\x00\x00\x00", r"weights of another library \(GGUF or HDF5\)"),
}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".ckpt", ".bin"])
@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_no_weights_is_recognised(tmp_path, kind, suffix):
    content, message = OTHERS[kind]
    (tmp_path / f"x{suffix}").write_bytes(content)
    with pytest.raises(ValueError, match=f"/x{suffix}: {message}") as error:
        read(tmp_path / f"x{suffix}")
    assert is_short(error)


def is_short(error):
    text = str(error.value)
    return len(text) < 400 and "\n" not in text and "weights_only" not in text


class Runs:
    def __reduce__(self):
        return print, ("code ran",)


@pytest.mark.parametrize("content, wanted", [
    ({"a": Runs()}, r"(\w+[.])?print"),
    (torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
    ({"a": np.ones(3)}, r"numpy\S*"),
    ({"a": argparse.Namespace(x=Runs())}, r"(\w+[.])?print"),
])
@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.filterwarnings("error")
def test_a_refused_pickle_is_told_what_it_asks_for(tmp_path, capsys, content, wanted, zipped, protocol):
    """In the project's words: torch's advise to load it unsafely, and warn of protocols in several lines."""
    torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
    message = f"x.pth: not a torch checkpoint of plain tensors .it asks for {wanted}; .* can run code"
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path / "x.pth")
    assert is_short(error) and "code ran" not in capsys.readouterr().out


def test_a_plain_pickle_is_told_what_it_asks_for(tmp_path, capsys):
    for protocol in (0, 2, 4):
        with open(tmp_path / "x.pth", "wb") as file:
            pickle.dump({"model": {"a": 1.0, "b": Runs()}}, file, protocol)
        message = r"x.pth: (not .*it asks for (\w+[.])?print;|a text, not weights)"
        with pytest.raises(ValueError, match=message):
            read(tmp_path / "x.pth")
    assert "code ran" not in capsys.readouterr().out


def test_damaged_pickles_are_named(pth, tmp_path):
    torch.save(TENSORS, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for whole in (pth.read_bytes(), (tmp_path / "old.pth").read_bytes()):
        for cut in (whole[:len(whole) // 2], whole[:-100], whole[:9]):
            (tmp_path / "cut.pth").write_bytes(cut)
            with pytest.raises(ValueError, match="cut.pth: not a torch checkpoint of plain tensors") as error:
                read(tmp_path / "cut.pth")
            assert is_short(error)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_other_zips_are_named(pth, tmp_path):
    np.savez(tmp_path / "x.npz", a=np.ones(3))
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(tmp_path / "program.pt"))
    zip_again(pth, tmp_path / "mac.pth", zipfile.ZIP_DEFLATED, extra="__MACOSX/._x")
    zip_again(pth, tmp_path / "bzip2.pth", zipfile.ZIP_BZIP2)
    for name, message in (("x.npz", "a zip archive, but not one of torch.save; unpack it: it holds a.npy"),
                          ("program.pt", "a TorchScript program, not weights"),
                          ("mac.pth", r"a zip archive of several folders \(__MACOSX, x\)"),
                          ("bzip2.pth", "compressed in a way that torch does not read; .* zip -0")):
        with pytest.raises(ValueError, match=f"{name}: {message}") as error:
            read(tmp_path / name)
        assert is_short(error)


def test_folders_in_place_of_files_and_files_that_are_missing(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(ValueError, match="model.safetensors: a folder; a file of weights is expected here"):
        read(tmp_path)
    with pytest.raises(FileNotFoundError, match="none.pth: no such file"):
        read(tmp_path / "none.pth")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_broken_indices_are_named(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match="not an index of shards|3: no such file"):
        read(tmp_path)


def test_shorten():
    assert shorten(["a", "b"]) == "a, b" and shorten("abcdef", most=2) == "a, b and 4 more"


# ---- names -----------------------------------------------------------------------------------------------

KNOWN = {"model.layers.0.weight", "lm_head.weight"}


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.",
                                    "_orig_mod.module.", "module.module.", "model.module.",
                                    "_fsdp_wrapped_module."])
def test_one_common_prefix_is_dropped_and_said(capsys, prefix):
    tensors = {prefix + name: torch.tensor(len(name)) for name in KNOWN}
    plain_names(tensors, KNOWN.__contains__, "x.pth")
    assert tensors == {name: torch.tensor(len(name)) for name in KNOWN}
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"note: x.pth: {prefix}") and "is read as" in lines[0]


@pytest.mark.parametrize("names", [
    ["model.layers.0.weight"],                                      # a tied Qwen: model. is part of its names
    ["model.layers.0.weight", "lm_head.weight"],
    ["model.other", "model.another"],                               # of another model
    ["module.layers.0.weight", "lm_head.weight"],                   # not common to all
    [],
])
def test_other_names_stay(capsys, names):
    tensors = dict.fromkeys(names, torch.ones(1))
    plain_names(tensors, KNOWN.__contains__, "x.pth")
    assert list(tensors) == names and capsys.readouterr().err == ""


def test_marks_of_compiled_parts_are_dropped_anywhere(capsys):
    tensors = {"model._orig_mod.layers.0._orig_mod.weight": torch.ones(1), "lm_head.weight": torch.ones(1)}
    plain_names(tensors, KNOWN.__contains__, "x.pth")
    assert set(tensors) == KNOWN and capsys.readouterr().err.count("\n") == 1
    tensors = {"model._orig_mod.layers": torch.ones(1), "model.layers": torch.zeros(1)}
    with pytest.raises(ValueError, match="x.pth: two names become one"):
        plain_names(tensors, KNOWN.__contains__, "x.pth")


def test_prefixes_are_dropped_in_strict_loading():
    module = torch.nn.Linear(3, 2)
    tensors = {f"module.{name}": tensor + 1 for name, tensor in module.state_dict().items()}
    expected = {name: tensor.clone() + 1 for name, tensor in module.state_dict().items()}
    load_strict(module, tensors, "x.pth")
    assert same(module.state_dict(), expected) and tensors == {}


# ---- finding ---------------------------------------------------------------------------------------------

@pytest.fixture
def hub(monkeypatch, tmp_path):
    """What the hub is asked for; it has everything."""
    import huggingface_hub

    asked = []

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return asked


@pytest.mark.parametrize("name", ["wusize/Harmon-0_5B", "Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B-Instruct",
                                  "sanaka87/Harmon-1.5B-RecA-plus", "a.b/c.d", "0x/9_a"])
def test_hub_ids(hub, tmp_path, name):
    assert find_model(name) == find_model(f"{name}/") == tmp_path
    assert hub == [(name, ["*.json", "*.safetensors", "merges.txt"])] * 2


@pytest.mark.parametrize("path", [
    "./x/y", "../no-such-x", "x/y/z", "/nowhere/at", "x.pth", "folder/model.pth", "folder/x.ckpt", "a b/c",
    "a/.b", "folder/model.safetensors", "no-such-model", "", "x//y", "~/none/at", ".hidden/x"])
def test_other_paths_are_not_asked_of_the_hub(hub, path):
    with pytest.raises(FileNotFoundError, match=f"^{re.escape(path)}: no such file or folder, and not"):
        find_model(path)
    assert hub == []


def test_home_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    torch.save(TENSORS, tmp_path / "x.pth")
    assert find_model("~/x.pth") == tmp_path / "x.pth" and same(read("~/x.pth"))
    (tmp_path / "folder").mkdir()
    assert find_model("~/folder/") == tmp_path / "folder"
    assert find_model(tmp_path / "folder") == find_model(f"{tmp_path}/folder/") == tmp_path / "folder"
    assert find_model("harmon-tiny/") == weight_files.BUNDLED / "harmon-tiny"
