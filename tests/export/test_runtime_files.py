"""An export opens what it wrote: other tokenizers and tables without a layer too, or it is refused before any graph."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest

import qdeploy
from qdeploy.artifacts.bundle import open_bundle
from qdeploy.artifacts.manifest import ComponentInfo
from qdeploy.artifacts.table import FloatLayer, QuantTable
from qdeploy.base.documents import convert
from qdeploy.base.errors import BundleError, ExportError
from qdeploy.export.exporter import export_bundle, export_component
from qdeploy.export.runtime_files import check_opens
from qdeploy.models.source import LatentDiffusion, load_model
from qdeploy.targets.base import load_target
from tests.tiny import write_tiny_model

ORT_CPU = load_target("ort-cpu")
PROMPTS = ["a cat", "cat cats concat", "A CAT, <|endoftext|> it's", ""]


def write_merging_model(folder: Path) -> Path:
    """The tiny model with a tokenizer that merges letters, which the tiny one's never does."""
    from transformers import CLIPTokenizer

    write_tiny_model(folder)
    words = list(CLIPTokenizer.from_pretrained(folder / "tokenizer").get_vocab())
    words = [word for word in words if word not in ("\u0142</w>", "\u0143</w>")] + ["ca", "cat</w>"]
    vocab = {word: number for number, word in enumerate(words)}
    merges = [("c", "a"), ("ca", "t</w>")]
    CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=16).save_pretrained(folder / "tokenizer")
    return folder


@pytest.mark.exports
def test_a_tokenizer_with_merges_is_exported_and_opened(tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    folder, out = write_merging_model(tmp_path / "model"), tmp_path / "bundle"
    export_bundle(load_model(str(folder)), None, ORT_CPU, out)
    reference = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    expected = reference(PROMPTS, padding="max_length", truncation=True, max_length=16).input_ids
    assert reference.convert_tokens_to_ids("cat</w>") in expected[0]
    with qdeploy.load(out, threads=1) as pipe:
        (tokenizer,) = pipe.model.tokenizers.values()
        assert tokenizer(PROMPTS).tolist() == expected
        assert pipe("a cat", steps=1).pixels.shape == (1, 16, 16, 3)


def test_a_tokenizer_that_the_runtime_refuses_is_refused_before_any_graph(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokenizers.normalizers import Prepend

    model = load_model(str(tiny_folder))
    encoder = model.text_encoders["text_encoder"]
    backend = encoder.tokenizer.backend.backend_tokenizer
    monkeypatch.setattr(backend, "normalizer", Prepend("x"))
    with pytest.raises(
        ExportError, match=r"the tokenizer of text_encoder of .*'Prepend'.*give the model such a tokeni"
    ):
        export_bundle(model, None, ORT_CPU, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.exports
def test_a_component_whose_layers_are_all_float_again(
    tiny_model: LatentDiffusion, table: QuantTable, tmp_path: Path
) -> None:
    """As `--precise-macs` can leave one most of whose layers were float before."""
    name = "vae_decoder"
    quant = table.components[name]
    float_layers = {layer: FloatLayer("sensitive", macs) for layer, macs in quant.macs.items()}
    emptied = replace(quant, layers={}, macs={}, attention={}, float_layers={**quant.float_layers, **float_layers})
    info = export_component(tiny_model, name, emptied, table.probes[name], ORT_CPU, tmp_path / name)
    assert (info.weight_bits, info.integer_mac_share, info.largest_weight_code) == ((32,), 0, 0)
    assert convert(asdict(info), ComponentInfo) == info


def test_what_the_runtime_would_refuse_is_not_kept(float_bundle: Path, tmp_path: Path) -> None:
    check_opens(float_bundle, tmp_path / "out")
    empty = tmp_path / "new"
    empty.mkdir()
    with pytest.raises(BundleError):
        open_bundle(empty)
    with pytest.raises(ExportError, match=rf"would refuse .* not kept: {tmp_path / 'out'} is not a qdeploy bundle"):
        check_opens(empty, tmp_path / "out")
