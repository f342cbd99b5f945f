"""Checkpoints of several files: the index, and what it may not name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from farms_fast.weights.sources import (
    open_source,
)
from tests.support.checkpoints import WEIGHTS, assert_holds_weights, write_index, write_shards

# --- indexes ---


@pytest.mark.parametrize(
    "shard",
    [
        "../out.safetensors",
        "sub/out.safetensors",
        "/elsewhere/out.safetensors",
        "..",
        ".",
        "",
        "..\\out.safetensors",
        "C:out.safetensors",
        "out\0.safetensors",
        7,
        None,
    ],
)
@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_index_cannot_name_a_file_elsewhere(tmp_path: Path, shard: object, kind: str) -> None:
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    for place in (tmp_path, folder / "sub"):
        save_file(WEIGHTS, place / "out.safetensors")
    write_index(folder, {"a.weight": shard}, kind)
    with pytest.raises(ValueError, match=r"index.json: expected .*name of a file") as error:
        open_source(folder)
    assert repr(shard) in str(error.value)


def test_absolute_shard_inside_the_folder_is_refused_too(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "x.safetensors")
    write_index(tmp_path, {"a.weight": str(tmp_path / "x.safetensors")})
    with pytest.raises(ValueError, match=r"expected .*name of a file"):
        open_source(tmp_path)


def test_symbolic_links_as_a_download_cache_makes_them_are_followed(tmp_path: Path) -> None:
    blobs, folder = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    folder.mkdir()
    save_file(WEIGHTS, blobs / "0af3")
    (folder / "m-1.safetensors").symlink_to(blobs / "0af3")
    write_index(folder, dict.fromkeys(WEIGHTS, "m-1.safetensors"))
    assert_holds_weights(open_source(folder))


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_index_naming_a_missing_file(tmp_path: Path, kind: str) -> None:
    write_index(tmp_path, {"a.weight": "gone-1.bin"}, kind)
    with pytest.raises(FileNotFoundError, match=r"index.json: names the file 'gone-1.bin'"):
        open_source(tmp_path)


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_index_naming_a_tensor_that_its_shard_lacks(tmp_path: Path, kind: str) -> None:
    save_file(WEIGHTS, tmp_path / "x.safetensors")
    torch.save(WEIGHTS, tmp_path / "x.bin")
    shard = "x.safetensors" if kind == "model.safetensors" else "x.bin"
    write_index(tmp_path, {"a.weight": shard, "c.weight": shard}, kind)
    if kind == "pytorch_model.bin":
        (tmp_path / "x.safetensors").unlink()
    with pytest.raises(ValueError, match=rf"{shard}: expected the tensor 'c.weight' of the index"):
        open_source(tmp_path)


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_tensors_beside_the_index_are_listed(tmp_path: Path, kind: str) -> None:
    if kind == "model.safetensors":
        save_file(WEIGHTS, tmp_path / "x.safetensors")
    else:
        torch.save(WEIGHTS, tmp_path / "x.bin")
    shard = "x.safetensors" if kind == "model.safetensors" else "x.bin"
    write_index(tmp_path, {"a.weight": shard, "a.bias": shard}, kind)
    layers, skipped = open_source(tmp_path).layers()
    assert [layer.name for layer in layers] == ["a"]
    assert ("b.weight", (4, 3), f"in {shard} but not in its index") in [
        (s.name, s.shape, s.reason) for s in skipped
    ]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": []}', "\ud800", "[" * 10**5]
)
def test_broken_index_is_one_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match=r"index.json: expected .*\"weight_map\""):
        open_source(tmp_path)


def test_empty_index_is_an_error(tmp_path: Path) -> None:
    write_index(tmp_path, {})
    with pytest.raises(ValueError, match="at least one tensor"):
        open_source(tmp_path)


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_index_with_a_name_twice_is_an_error(tmp_path: Path, kind: str) -> None:
    text = '{"weight_map": {"a.weight": "x-1.bin", "a.weight": "x-2.bin"}}'
    (tmp_path / f"{kind}.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"expected each name once, got 'a.weight'"):
        open_source(tmp_path)


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
def test_truncated_shard_is_an_error_when_the_folder_is_opened(tmp_path: Path, kind: str) -> None:
    shards = {}
    for number, name in enumerate(("a.weight", "b.weight")):
        path = tmp_path / f"x-{number}.bin"
        if kind == "model.safetensors":
            save_file({name: WEIGHTS[name]}, path)
        else:
            torch.save({name: WEIGHTS[name]}, path)
        shards[name] = path.name
    path.write_bytes(path.read_bytes()[:-20])
    write_index(tmp_path, shards, kind)
    with pytest.raises(ValueError, match=r"x-1.bin: expected a (sound safetensors|pickle)"):
        open_source(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{"])
def test_broken_config_is_one_error(tmp_path: Path, text: str) -> None:
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config.json: expected a JSON object"):
        open_source(tmp_path)


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("sharded", [False, True])
def test_config_of_the_folder_is_used(tmp_path: Path, kind: str, sharded: bool) -> None:
    tensors = {"attn.qkv_proj.weight": torch.randn(24, 10)}
    path = tmp_path / ("x.bin" if sharded else kind)
    if kind == "model.safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)
    if sharded:
        write_index(tmp_path, dict.fromkeys(tensors, path.name), kind)
    assert len(open_source(tmp_path).layers()[0]) == 1
    config = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert [layer.shape for layer in open_source(tmp_path).layers()[0]] == [
        (1, 12, 10),
        (1, 6, 10),
        (1, 6, 10),
    ]


# --- other folders ---


@pytest.mark.parametrize("name", ["model.pt", "best.pth.tar", "weights.BIN", "model", "step-7"])
def test_folder_with_one_file_of_weights(tmp_path: Path, name: str) -> None:
    torch.save(WEIGHTS, tmp_path / name)
    torch.save({"state": {}}, tmp_path / "optimizer.pt")
    torch.save({"state": 1}, tmp_path / "training_args.bin")
    (tmp_path / "README.md").write_text("words")
    assert_holds_weights(open_source(tmp_path))


def test_folder_with_several_files_names_them(tmp_path: Path) -> None:
    for name in ("a.pt", "b.pth"):
        torch.save(WEIGHTS, tmp_path / name)
    with pytest.raises(ValueError, match=r"2 files .*\(a.pt, b.pth\): give the path of one"):
        open_source(tmp_path)


def test_index_given_as_path(tmp_path: Path) -> None:
    write_shards(tmp_path)
    assert_holds_weights(open_source(tmp_path / "model.safetensors.index.json"))
    with pytest.raises(ValueError, match="expected None"):
        open_source(tmp_path / "model.safetensors.index.json", base=WEIGHTS)


def test_index_given_as_path_has_the_config_of_its_folder(tmp_path: Path) -> None:
    save_file({"attn.qkv_proj.weight": torch.randn(24, 10)}, tmp_path / "x.safetensors")
    index = write_index(tmp_path, {"attn.qkv_proj.weight": "x.safetensors"})
    config = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert len(open_source(index).layers()[0]) == 3


def test_variant_does_not_hide_the_weights_themselves(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "diffusion_pytorch_model.safetensors")
    save_file({"c": torch.ones(3, 3)}, tmp_path / "diffusion_pytorch_model.fp16.safetensors")
    assert_holds_weights(open_source(tmp_path))


def test_link_to_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "blobs" / "0af3")
    torch.save(WEIGHTS, tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"model.safetensors"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("files", "what"),
    [
        ((".metadata", "__0_0.distcp"), r"torch.distributed.checkpoint.*dcp_to_torch .* model.pt"),
        (("saved_model.pb", "variables/variables.index"), "a model of TensorFlow"),
        (("checkpoint", "model.ckpt.data-00000-of-00001"), "a model of TensorFlow"),
        (("_METADATA", "manifest.ocdbt"), "Orbax"),
        (("tokenizer.json", "vocab.txt"), "a tokenizer but without weights"),
        (
            ("checkpoint-5/model.pt", "checkpoint-9/model.pt"),
            r"in checkpoint-5, checkpoint-9: give",
        ),
    ],
)
def test_folder_of_another_kind_is_named(tmp_path: Path, files: tuple[str, ...], what: str) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ValueError, match=what):
        open_source(tmp_path)


# --- pipelines ---


def _pipeline(folder: Path) -> None:
    entries = {
        "_class_name": "Pipeline",
        "unet": ["diffusers", "UNet"],
        "text_encoder": ["transformers", "CLIP"],
        "scheduler": ["diffusers", "DDIM"],
        "safety_checker": [None, None],
        "requires": True,
    }
    (folder / "model_index.json").write_text(json.dumps(entries))
    for name in ("unet", "text_encoder", "scheduler", "other"):
        (folder / name).mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    save_file(WEIGHTS, folder / "unet" / "diffusion_pytorch_model.safetensors")
    save_file(WEIGHTS, folder / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    torch.save({"a.weight": torch.ones(5, 6)}, folder / "text_encoder" / "pytorch_model.bin")
    torch.save({"c.weight": torch.ones(5, 6)}, folder / "other" / "pytorch_model.bin")


def test_pipeline_has_the_layers_of_every_component(tmp_path: Path) -> None:
    _pipeline(tmp_path)
    source = open_source(tmp_path)
    layers, skipped = source.layers()
    assert [layer.name for layer in layers] == ["unet.a", "unet.b", "text_encoder.a"]
    assert [tensor.name for tensor in skipped] == ["unet.a.bias"]
    assert torch.equal(source.load("unet.a.weight"), WEIGHTS["a.weight"])
    assert torch.equal(source.load("text_encoder.a.weight"), torch.ones(5, 6))
    assert [layer.name for layer in source.layers(include="text*")[0]] == ["text_encoder.a"]


def test_pipeline_names_the_component_that_is_broken(tmp_path: Path) -> None:
    _pipeline(tmp_path)
    path = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"unet/diffusion_pytorch_model.safetensors: expected"):
        open_source(tmp_path)


@pytest.mark.parametrize("name", ["..", "../other", "/etc", "a\\b", ""])
def test_pipeline_cannot_name_a_folder_elsewhere(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "pipeline"
    folder.mkdir()
    torch.save(WEIGHTS, tmp_path / "model.pt")
    (folder / "model_index.json").write_text(json.dumps({name: ["diffusers", "UNet"]}))
    with pytest.raises(ValueError, match="expected weights of some component"):
        open_source(folder)
