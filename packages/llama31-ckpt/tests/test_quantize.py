"""`quantize`: what it writes, that calibration does what it is for, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from llama31_ckpt.calibration import Calibration, read_tokens
from llama31_ckpt.cli import main
from llama31_ckpt.gptq import quantize_for_inputs
from llama31_core.checkpoint import open_weights, parameter_shapes, save_weights
from llama31_core.checkpoint.quantized import DequantizedWeights, check_stored, quantize
from llama31_core.config import ModelConfig

Floats = npt.NDArray[np.float32]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model whose tokens are bytes, with inputs that differ in size from column to column."""
    sizes = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "ffn_dim": 96, "max_seq_len": 64}
    config = ModelConfig.build("bytes", vocab_size=258, rope_theta=10000.0, **sizes)
    path = tmp_path / "model"
    config.save_pretrained(path)
    rng = np.random.default_rng(0)
    tensors = {}
    for name, shape in parameter_shapes(config).items():
        spread = 1.0 if len(shape) == 1 else 1 / np.sqrt(shape[-1])
        tensors[name] = (np.exp(rng.normal(0, 1, shape)) if len(shape) == 1 else rng.normal(0, spread, shape)).astype(
            np.float32
        )
    save_weights(path, tensors.items())
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spelling = {byte: chr(byte) for byte in kept}
    spelling |= {byte: chr(256 + i) for i, byte in enumerate(b for b in range(256) if b not in spelling)}
    vocabulary = {spelling[byte]: byte for byte in range(256)}
    special = [{"id": 256 + i, "content": text, "special": True} for i, text in enumerate(("<s>", "</s>"))]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    tokenizer = {
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
        "added_tokens": special,
        "pre_tokenizer": byte_level,
        "decoder": {"type": "ByteLevel"},
    }
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    return path


def test_calibration_runs_the_model(model: Path) -> None:
    """Its layers against transformers' by their outputs, and moments against the inputs that hooks see."""
    torch = pytest.importorskip("torch")
    from transformers import LlamaConfig, LlamaForCausalLM

    config = ModelConfig.from_pretrained(model)
    reference = LlamaForCausalLM(LlamaConfig(**config.to_hf(), attn_implementation="eager")).eval()
    with open_weights(model) as weights:
        tensors = {name: weights.read(name) for name in weights.names()}
    spelled = {
        name.replace("tok_embeddings.embedding_weight", "embed_tokens.weight")
        .replace("norm_out", "norm")
        .replace("attention.wq", "self_attn.q_proj")
        .replace("attention.wk", "self_attn.k_proj")
        .replace("attention.wv", "self_attn.v_proj")
        .replace("attention.wo", "self_attn.o_proj")
        .replace("feed_forward.w1", "mlp.gate_proj")
        .replace("feed_forward.w2", "mlp.down_proj")
        .replace("feed_forward.w3", "mlp.up_proj")
        .replace("attention_norm", "input_layernorm")
        .replace("ffn_norm", "post_attention_layernorm"): torch.from_numpy(array)
        for name, array in tensors.items()
    }
    reference.load_state_dict(spelled)
    tokens = np.random.default_rng(1).integers(0, 256, (3, 20))
    seen: dict[str, Floats] = {}
    for index, layer in enumerate(reference.model.layers):
        for name, linear in {"attention.wo": layer.self_attn.o_proj, "feed_forward.w2": layer.mlp.down_proj}.items():
            linear.register_forward_hook(
                lambda _, inputs, __, key=f"{index}.{name}": seen.__setitem__(key, inputs[0].detach().numpy())
            )
    with torch.no_grad():
        reference(torch.from_numpy(tokens))
    calibration = Calibration(config, tensors["model.tok_embeddings.embedding_weight"][tokens])
    for index in range(config.n_layers):
        prefix = f"model.layers.{index}."
        layer = {
            name.removeprefix(prefix).removesuffix(".weight"): array
            for name, array in tensors.items()
            if name.startswith(prefix)
        }
        moments = calibration.observe(layer)
        for name in ("attention.wo", "feed_forward.w2"):
            rows = seen[f"{index}.{name}"].reshape(-1, seen[f"{index}.{name}"].shape[-1])
            np.testing.assert_allclose(moments[name], rows.T @ rows, atol=1e-3 * np.abs(moments[name]).max())
        calibration.advance(layer)


@pytest.mark.parametrize("bits", [8, 4])
def test_rounding_for_inputs_has_the_smaller_error(bits: int) -> None:
    rng = np.random.default_rng(2)
    for seed in range(5):
        weights = rng.standard_normal((24, 96)).astype(np.float32)
        mixed = (rng.standard_normal((96, 96)) * 0.2 + np.eye(96)) * np.exp(rng.normal(0, 1, 96))
        inputs = (rng.standard_normal((400, 96)) @ mixed).astype(np.float32)
        moments = (inputs.T @ inputs).astype(np.float64)
        errors = [
            float(np.linalg.norm(inputs @ (matrix.dequantize() - weights).T))
            for matrix in (quantize_for_inputs(weights, moments, bits, 64), quantize(weights, bits, 64))
        ]
        assert errors[0] < 0.8 * errors[1], seed


def test_silent_inputs_are_no_trouble() -> None:
    weights = np.random.default_rng(3).standard_normal((8, 64)).astype(np.float32)
    moments = np.zeros((64, 64))
    moments[:4, :4] = np.eye(4) * 100
    found = quantize_for_inputs(weights, moments, 4, 64).dequantize()
    assert np.isfinite(found).all()
    assert np.abs(found - weights).max() < 1


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("bits", [8, 4])
def test_the_command(
    model: Path, tmp_path: Path, bits: int, calibrated: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    out = tmp_path / "out"
    command = ["quantize", str(model), "--output_path", str(out), "--bits", str(bits), "--group", "64"]
    assert main([*command, *(["--calibration", str(text)] if calibrated else [])]) == 0
    assert (
        f"{bits} bits, groups of 64, rounded {'for the inputs of' if calibrated else 'to nearest'}"
        in capsys.readouterr().out
    )
    config = ModelConfig.from_pretrained(out)
    assert config.quantization is not None
    plain = ModelConfig.from_pretrained(model)
    with open_weights(out) as weights, open_weights(model) as original:
        check_stored(weights, config)
        widened = DequantizedWeights(weights, config)
        for name, shape in parameter_shapes(plain).items():
            whole, back = original.read(name), widened.read_slice(name, ())
            few = bits == 4 and "layers" in name
            limit = 0 if len(shape) == 1 else 0.3 if few else 0.03
            assert np.linalg.norm(whole - back) <= limit * np.linalg.norm(whole)
    assert main(["verify", str(out)]) == 0
    assert main(["convert", "--input_path", str(out), "--output_path", str(tmp_path / "back"), "--dtype", "fp32"]) == 0
    assert ModelConfig.from_pretrained(tmp_path / "back") == plain
    assert main(["diff", str(out), str(tmp_path / "back")]) == 0
    capsys.readouterr()
    assert main(["quantize", str(out), "--output_path", str(tmp_path / "again"), "--bits", "8"]) == 1
    assert "is quantised already" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()


def test_pieces_of_text_are_spread_over_it(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("abcdefghij" * 50)
    tokens = read_tokens(text, model, 4, 100)
    assert tokens.shape == (4, 100)
    assert bytes(tokens[0].tolist()) == b"abcdefghij" * 10
    assert bytes(tokens[-1].tolist()) == b"abcdefghij" * 10
    assert read_tokens(text, model, 99, 100).shape == (5, 100)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--group", "48"], "group_size must be a multiple of 32, got 48"),
        (["--calibration", "nowhere.txt"], "nowhere.txt cannot be read"),
        (["--calibration", "short.txt"], "short.txt has 5 tokens, at least 64 are needed"),
        (["--sequences", "0", "--calibration", "short.txt"], "--sequences is 0, expected 1 or more"),
    ],
)
def test_bad_options(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    options: list[str], message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "short.txt").write_text("hello")
    assert main(["quantize", str(model), "--output_path", "out", "--bits", "4", *options]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_weight_that_is_no_number_leaves_nothing(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ModelConfig.from_pretrained(model)
    with open_weights(model) as weights:
        tensors = {name: weights.read(name) for name in weights.names()}
    tensors["model.layers.1.feed_forward.w2.weight"] = np.full((64, 96), np.nan, np.float32)
    broken = tmp_path / "broken"
    config.save_pretrained(broken)
    save_weights(broken, tensors.items())
    assert main(["quantize", str(broken), "--output_path", str(tmp_path / "out"), "--bits", "8"]) == 1
    assert "model.layers.1.feed_forward.w2.weight has values that are no finite numbers" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "model"]
