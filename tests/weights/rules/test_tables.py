"""Tensors that their names tell to be no weights, and tables that are looked up by row."""

from __future__ import annotations

import pytest

from farms_fast.weights.layers import layers_from_headers
from tests.support.layer_tables import by_header, header, reasons


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        ("conv.tp._compiled_main_left_right._w3j_1_1_2", (3, 3, 5), "Clebsch-Gordan"),
        ("products.0.contractions.0.U_matrix_3", (16, 16, 16, 23), "Clebsch-Gordan"),
        ("tp.cg_1_1_2", (3, 3, 5), "Clebsch-Gordan"),
        ("SO3_grid.to_grid_mat", (14, 14, 49), "Clebsch-Gordan"),
        ("rope.cos_cache", (64, 8), "rotary"),
        ("freqs_sin", (64, 8), "rotary"),
        ("rotary.cos_sin_cache", (64, 16), "rotary"),
        ("heads.0.tril", (8, 8), "a mask"),
        ("mel.melW", (65, 20), "signal transform"),
        ("spectrogram.mel_scale.fb", (65, 20), "signal transform"),
        ("stft.forward_basis", (66, 1, 64), "signal transform"),
        ("up.resample_filter", (4, 4), "resampling filter"),
        ("detect.anchor_grid", (3, 1, 3, 1, 1, 2), "coordinates"),
        ("encoder.pe", (200, 1, 64), "a table of positions"),
    ],
)
def test_constants_are_no_layers(name: str, shape: tuple[int, ...], reason: str) -> None:
    found = layers_from_headers([header(name, *shape), header("fc.weight", 4, 4)])
    assert [layer.name for layer in found[0]] == ["fc"]
    assert reason in reasons(found)[name]


@pytest.mark.parametrize(
    "name",
    [
        *("token_embd.weight", "v.position_embd.weight", "per_layer_token_embd.weight"),
        *("model.shared.weight", "rel_pos_h", "encoder.embed_positions.weight", "wpe/table"),
        *("encoder.pe", "position_enc.pos_table", "pos_encoder.positional_encoding"),
        *("params.wte.embedding", "params/embed/embedding", "embedding/embeddings:0"),
    ],
)
def test_tables_by_row_need_an_include(name: str) -> None:
    layer_name = name.removesuffix(".weight")
    found = layers_from_headers([header(name, 50, 8)])
    assert found[0] == []
    assert f"include={layer_name!r}" in reasons(found)[layer_name]
    assert by_header(header(name, 50, 8), include=layer_name)[layer_name].kind == "embedding"


@pytest.mark.parametrize(
    "name",
    [
        *("patch_embedding.weight", "embeddings_project.weight", "embed_out.weight"),
        *("embedding_hidden_mapping_in.weight", "moe.shared.weight", "fb.weight", "pe_net.weight"),
        *("scale.weight", "mask_decoder.weight", "anchor.weight"),
    ],
)
def test_layers_with_names_like_those_of_tables_are_layers(name: str) -> None:
    assert list(by_header(header(name, 50, 8))) == [name.removesuffix(".weight")]
