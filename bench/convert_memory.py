"""Measures the peak memory of a conversion, against the size of the largest array.

    python -m bench.convert_memory [--format safetensors|bin] [--source-dtype float32] [--folder DIR]

Writes a synthetic Llama checkpoint of 1.2 billion parameters (the shape of Llama-3.2-1B: hidden 2048, 16 layers,
32 heads with 8 key-value heads, MLP 8192, vocabulary 128256, tied embeddings) in four shards and an EAGLE-3 head
of a draft vocabulary of 32000, converts the two to bfloat16 in another process, and samples that process's
memory every 5 ms. Anonymous memory is what the process holds; mapped files are the page cache's, which the
kernel reclaims under pressure. Then it does the same for loading the converted folder on the CPU, which has to
hold the parameters themselves. Needs Linux, and about 6 GB of disk (9 GB with float32 sources).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np

HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, MLP, VOCAB, DRAFT_VOCAB = 2048, 16, 32, 8, 64, 8192, 128256, 32000
SHARDS = 4
MB = 1 << 20

CONVERT = "import sys; from eagle_jax.convert import convert; convert(*sys.argv[1:4], dtype='bfloat16')"
LOAD = "import sys, jax; from eagle_jax.convert import load; jax.block_until_ready(load(sys.argv[1]))"


def config(layers: int, **fields: object) -> dict[str, object]:
    return {
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCAB,
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": True,
        **fields,
    }


def layer_shapes(prefix: str, width: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}.self_attn.q_proj.weight": (HEADS * HEAD_DIM, width),
        f"{prefix}.self_attn.k_proj.weight": (KV_HEADS * HEAD_DIM, width),
        f"{prefix}.self_attn.v_proj.weight": (KV_HEADS * HEAD_DIM, width),
        f"{prefix}.self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD_DIM),
        f"{prefix}.mlp.gate_proj.weight": (MLP, HIDDEN),
        f"{prefix}.mlp.up_proj.weight": (MLP, HIDDEN),
        f"{prefix}.mlp.down_proj.weight": (HIDDEN, MLP),
        f"{prefix}.input_layernorm.weight": (HIDDEN,),
        f"{prefix}.post_attention_layernorm.weight": (HIDDEN,),
    }


def target_shapes() -> dict[str, tuple[int, ...]]:
    shapes = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for i in range(LAYERS):
        shapes |= layer_shapes(f"model.layers.{i}", HIDDEN)
    return shapes


def head_shapes() -> dict[str, tuple[int, ...]]:
    return {
        "fc.weight": (HIDDEN, 3 * HIDDEN),
        "midlayer.hidden_norm.weight": (HIDDEN,),
        "norm.weight": (HIDDEN,),
        "lm_head.weight": (DRAFT_VOCAB, HIDDEN),
        **layer_shapes("midlayer", 2 * HIDDEN),
    }


def write_checkpoint(folder: Path, settings: dict, shapes: dict, shards: int, suffix: str, dtype: str) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(settings))
    rng = np.random.default_rng(0)
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        arrays = {name: rng.standard_normal(shape, np.float32) for name, shape in list(shapes.items())[shard::shards]}
        arrays = {name: array.astype(dtype) for name, array in arrays.items()}
        if "draft_vocab_size" in settings:
            arrays["d2t"] = np.zeros(DRAFT_VOCAB, np.int64)
        file = f"{stem}-{shard + 1:05d}-of-{shards:05d}.{suffix}"
        write_file(folder / file, arrays)
        weight_map |= dict.fromkeys(arrays, file)
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))


def write_file(path: Path, arrays: dict[str, np.ndarray]) -> None:
    if path.suffix == ".safetensors":
        from safetensors.numpy import save_file

        save_file(arrays, path)
        return
    import torch

    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    tensors = {
        name: torch.from_numpy(a.view(np.int16)).view(torch.bfloat16) if a.dtype == bfloat16 else torch.from_numpy(a)
        for name, a in arrays.items()
    }
    torch.save(tensors, path)


def measure(code: str, *args: object) -> tuple[dict[str, int], float]:
    """Runs Python code; returns its highest RssAnon, RssFile and VmRSS in bytes, and its seconds."""
    start = time.monotonic()
    peak = {"RssAnon": 0, "RssFile": 0, "VmRSS": 0}
    with subprocess.Popen([sys.executable, "-c", code, *map(str, args)]) as process:
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            for line in status.read_text().splitlines():
                name, _, value = line.partition(":")
                if name in peak:
                    peak[name] = max(peak[name], int(value.split()[0]) * 1024)
            time.sleep(0.005)
    if process.returncode:
        raise SystemExit(process.returncode)
    return peak, time.monotonic() - start


def report(what: str, peak: dict[str, int], seconds: float) -> None:
    print(
        f"{what:10} peak anonymous {peak['RssAnon'] / MB:6.0f} MB, mapped files {peak['RssFile'] / MB:6.0f} MB, "
        f"together {peak['VmRSS'] / MB:6.0f} MB, {seconds:5.1f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--format", choices=("safetensors", "bin"), default="safetensors")
    parser.add_argument("--source-dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--folder", help="where to write (default: the system's temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        root, suffix, dtype = Path(name), args.format, args.source_dtype
        write_checkpoint(root / "target", config(LAYERS), target_shapes(), SHARDS, suffix, dtype)
        head = config(1, draft_vocab_size=DRAFT_VOCAB)
        write_checkpoint(root / "head", head, head_shapes(), 1, suffix, dtype)
        print(f"sources: {dtype} .{suffix}; largest array as bfloat16: {VOCAB * HIDDEN * 2 / MB:.0f} MB")
        report("imports", *measure("import eagle_jax.convert, orbax.checkpoint"))
        report("convert", *measure(CONVERT, root / "target", root / "head", root / "out"))
        report("load", *measure(LOAD, root / "out"))


if __name__ == "__main__":
    main()
