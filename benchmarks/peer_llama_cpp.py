"""Denoising and decoding against llama.cpp: the same shape, random weights, in turn on one machine.

    python -m benchmarks.peer_llama_cpp WORK [--rounds 3] [--steps 4] [--only step,full,...]

The shape is Qwen2.5-0.5B's (hidden 896, 24 layers, 14 heads, 2 KV heads, FFN 4864, vocabulary
151,936, tied). WORK keeps what takes long: llama.cpp, built from the sources inside PyPI's
llama-cpp-python, its models in Q4_0, our int4 checkpoints (groups of 32, as Q4_0) and bundles.

Cases, each a ratio of llama.cpp's time to ours (more than 1: ours is faster):

- step: one denoising step of 256 positions, head and sampler included, all positions masked
  (`llama-diffusion-cli`, dream; ours: the masked head on all rows).
- full: a whole denoising of 256 positions in as many steps; ours computes the head only for the
  positions that can still change.
- answer: 256 tokens in blocks of 32 over a prompt of 256, the same number of steps; llama.cpp
  computes prompt and all blocks at each step, ours has them cached (block diffusion).
- decode, prefill: one token a step, and a prompt of 256 (`llama-bench` tg and pp).

Beside them stand the quantized matrix products of one step alone, through the same backend
(`benchmarks.matrix_products`), and where our peak RSS comes from.

stdout: a table for people; the last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

SDIST = "llama-cpp-python==0.3.36"
VOCABULARY, HIDDEN, LAYERS, HEADS, KV_HEADS, FFN = 151_936, 896, 24, 14, 2, 4864
HEAD_DIM = HIDDEN // HEADS
MASK = 151_666
POSITIONS = 256
THREADS = 2
CONFIG = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "intermediate_size": FFN,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "eos_token_id": 151_643,
    "pad_token_id": 151_643,
    "bos_token_id": None,
    "torch_dtype": "bfloat16",
}
FORMATS: dict[str, dict[str, Any]] = {
    "block256": {"model_type": "a2d-qwen2", "mask_token_id": MASK, "block_size": POSITIONS},
    "block32": {"model_type": "a2d-qwen2", "mask_token_id": MASK, "block_size": 32},
    "autoregressive": {"model_type": "qwen2"},
}
RECIPES = {
    "block256": "int4-g32",
    "block32": "int4-g32",
    # A token's time is that of moving the weights: the table in int4, too, as Q4_0 has it.
    "autoregressive": "int4-g32-embed4",
}
FORMAT_OF = {
    "step": "block256",
    "full": "block256",
    "answer": "block32",
    "decode": "autoregressive",
    "prefill": "autoregressive",
}
CASES = tuple(FORMAT_OF)
PRODUCTS = "products"
CONTEXT = {"block256": POSITIONS, "block32": 512, "autoregressive": 512}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="steps of a full denoising and block")
    parser.add_argument("--only", default=",".join(CASES))
    arguments = parser.parse_args()
    cases = arguments.only.split(",")
    if unknown := set(cases) - set(CASES):
        parser.error(f"{', '.join(sorted(unknown))} are no cases; give some of {', '.join(CASES)}")
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    programs = _build(work)
    model, qwen = _gguf(work, "dream"), _gguf(work, "qwen2")
    paths = {case: _bundle(work, FORMAT_OF[case]) for case in cases}
    if "step" in cases:
        paths[PRODUCTS] = _products(work)
    measured: dict[str, dict[str, list[float]]] = {c: {"llama.cpp": [], "ours": []} for c in cases}
    products: list[float] = []
    memory: dict[str, dict[str, int]] = {}
    for number in range(arguments.rounds):
        for case in cases:
            theirs = _peer(case, programs, model, qwen, arguments.steps)
            ours = _ours(case, paths[case], arguments.steps)
            measured[case]["llama.cpp"].append(theirs)
            measured[case]["ours"].append(ours["ms"])
            memory[case] = ours["memory"] | {"int4_bytes": _int4_bytes(work, FORMAT_OF[case])}
            _say(f"round {number + 1} {case}: llama.cpp {theirs:.1f} ms, ours {ours['ms']:.1f} ms")
            if case == "step":
                products.append(_ours(PRODUCTS, paths[PRODUCTS], arguments.steps)["ms"])
                _say(f"round {number + 1} its products alone: {products[-1]:.1f} ms")
    _report(arguments, measured, products, memory)


# llama.cpp


def _build(work: Path) -> Path:
    """The folder of its programs; built once."""
    build = work / "build"
    programs = build / "bin"
    if all((programs / name).exists() for name in ("llama-diffusion-cli", "llama-bench")):
        return programs
    _say("building llama.cpp (once; some ten minutes on two cores)")
    archives = list(work.glob("llama_cpp_python-*.tar.gz"))
    if not archives:
        _run([sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary",
              "llama-cpp-python", "-d", str(work), SDIST])  # fmt: skip
        archives = list(work.glob("llama_cpp_python-*.tar.gz"))
    source = work / archives[0].name.removesuffix(".tar.gz")
    if not source.exists():
        with tarfile.open(archives[0]) as archive:
            archive.extractall(work, filter="data")
    if shutil.which("cmake") is None:
        raise SystemExit("cmake is missing; install it (pip install cmake) and try again")
    _run(["cmake", "-S", str(source / "vendor" / "llama.cpp"), "-B", str(build),
          "-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON", "-DLLAMA_CURL=OFF",
          "-DLLAMA_OPENSSL=OFF", "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_SERVER=OFF",
          "-DBUILD_SHARED_LIBS=OFF"])  # fmt: skip
    _run(["cmake", "--build", str(build), "-j", str(THREADS),
          "--target", "llama-diffusion-cli", "llama-bench"])  # fmt: skip
    return programs


def _gguf(work: Path, architecture: str) -> Path:
    """A random model in Q4_0, norms and biases in fp32; made once."""
    path = work / f"{architecture}.gguf"
    if path.exists():
        return path
    sources = next(work.glob("llama_cpp_python-*/vendor/llama.cpp/gguf-py"), None)
    if sources is not None:
        sys.path.insert(0, str(sources))
    import gguf

    _say(f"writing {path.name}")
    partial = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, architecture)
    writer.add_context_length(2048)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(1_000_000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    # The bytes first, as any text needs them; the rest is only counted.
    words = [chr(i) if i > 32 else chr(256 + i) for i in range(256)]
    words += [f"[T{i}]" for i in range(256, VOCABULARY)]
    writer.add_token_list(words)
    writer.add_token_types([gguf.TokenType.NORMAL] * VOCABULARY)
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(151_643)
    writer.add_pad_token_id(151_643)
    if architecture == "dream":
        writer.add_causal_attention(False)
        writer.add_mask_token_id(MASK)
    generator = np.random.default_rng(0)

    def matrix(name: str, rows: int, columns: int) -> None:
        weight = generator.standard_normal((rows, columns), dtype=np.float32) * columns**-0.5
        kind = gguf.GGMLQuantizationType.Q4_0
        writer.add_tensor(name, gguf.quants.quantize(weight, kind), raw_dtype=kind)

    def vector(name: str, size: int, value: float) -> None:
        writer.add_tensor(name, np.full(size, value, dtype=np.float32))

    matrix("token_embd.weight", VOCABULARY, HIDDEN)
    vector("output_norm.weight", HIDDEN, 1.0)
    for i in range(LAYERS):
        for name, rows, columns in _matrices():
            matrix(f"blk.{i}.{name[0]}.weight", rows, columns)
        for name, size in (("attn_q", HIDDEN), ("attn_k", 128), ("attn_v", 128)):
            vector(f"blk.{i}.{name}.bias", size, 0.0)
        vector(f"blk.{i}.attn_norm.weight", HIDDEN, 1.0)
        vector(f"blk.{i}.ffn_norm.weight", HIDDEN, 1.0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(path)
    return path


def _matrices() -> list[tuple[tuple[str, str], int, int]]:
    """(llama.cpp's name, Hugging Face's), rows, columns of a layer's matrices."""
    kv = KV_HEADS * HEAD_DIM
    return [
        (("attn_q", "self_attn.q_proj"), HIDDEN, HIDDEN),
        (("attn_k", "self_attn.k_proj"), kv, HIDDEN),
        (("attn_v", "self_attn.v_proj"), kv, HIDDEN),
        (("attn_output", "self_attn.o_proj"), HIDDEN, HIDDEN),
        (("ffn_gate", "mlp.gate_proj"), FFN, HIDDEN),
        (("ffn_up", "mlp.up_proj"), FFN, HIDDEN),
        (("ffn_down", "mlp.down_proj"), HIDDEN, FFN),
    ]


def _peer(case: str, programs: Path, model: Path, qwen: Path, steps: int) -> float:
    """Milliseconds: of a step, of a full denoising, of an answer, of a token, of a prompt."""
    if case in ("decode", "prefill"):
        which = ["-p", "0", "-n", "64"] if case == "decode" else ["-p", str(POSITIONS), "-n", "0"]
        said = _run([str(programs / "llama-bench"), "-m", str(qwen), "-t", str(THREADS),
                     "-r", "3", "-o", "json", *which])  # fmt: skip
        rate = json.loads(said)[0]["avg_ts"]
        return 1000 / rate * (1 if case == "decode" else POSITIONS)
    length = 2 * POSITIONS if case == "answer" else POSITIONS
    prompt = "a" * (POSITIONS if case == "answer" else 1)
    count = steps * (POSITIONS // 32) if case == "answer" else steps
    said = _run([str(programs / "llama-diffusion-cli"), "-m", str(model), "-p", prompt,
                 "-ub", str(length), "-b", str(length), "-c", str(length), "-t", str(THREADS),
                 "--diffusion-eps", "0.001", "--diffusion-algorithm", "4",
                 "--diffusion-steps", str(count), "--temp", "0"])  # fmt: skip
    found = re.search(r"total time: ([\d.]+)ms, time per step: ([\d.]+)ms", said)
    if found is None:
        raise SystemExit(f"llama-diffusion-cli told no time: {said[-400:]}")
    return float(found[2]) if case == "step" else float(found[1])


# Ours


def _bundle(work: Path, name: str) -> Path:
    """A bundle of the shape in one of FORMATS; made once."""
    bundle = work / f"{name}.bundle"
    if bundle.exists():
        return bundle
    checkpoint, int4 = work / f"{name}.checkpoint", work / f"{name}.int4"
    if not int4.exists():
        _say(f"writing and quantizing {name}")
        _write_checkpoint(checkpoint, name)
        _pocketdiff("quantize", checkpoint, int4, "--recipe", RECIPES[name], "--overwrite")
        shutil.rmtree(checkpoint)
    _say(f"lowering {name} (once; minutes)")
    _pocketdiff("export", int4, bundle, "--context", CONTEXT[name])
    return bundle


def _write_checkpoint(folder: Path, name: str) -> None:
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    folder.mkdir(exist_ok=True)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns) * columns**-0.5).to(torch.bfloat16)

    tensors = {
        "model.embed_tokens.weight": matrix(VOCABULARY, HIDDEN),
        "model.norm.weight": torch.ones(HIDDEN, dtype=torch.bfloat16),
    }
    for i in range(LAYERS):
        for (_, theirs), rows, columns in _matrices():
            tensors[f"model.layers.{i}.{theirs}.weight"] = matrix(rows, columns)
            if theirs[-6:] in ("q_proj", "k_proj", "v_proj"):
                bias = torch.zeros(rows, dtype=torch.bfloat16)
                tensors[f"model.layers.{i}.{theirs}.bias"] = bias
        for norm in ("input_layernorm", "post_attention_layernorm"):
            ones = torch.ones(HIDDEN, dtype=torch.bfloat16)
            tensors[f"model.layers.{i}.{norm}.weight"] = ones
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG | FORMATS[name]))


def _products(work: Path) -> Path:
    """The program of the matrix products alone; made once."""
    from benchmarks.matrix_products import lower_products

    path = work / "products.pte"
    if not path.exists():
        _say("lowering the matrix products alone (once; minutes)")
        lower_products(work / "block256.int4", POSITIONS, path)
    return path


def _int4_bytes(work: Path, name: str) -> int:
    """What the int4 checkpoint stores of weights."""
    return (work / f"{name}.int4" / "model.safetensors").stat().st_size


def _ours(case: str, path: Path, steps: int) -> dict[str, Any]:
    """What `peer_llama_cpp_case` says, in a process of its own; ms as `_peer`'s."""
    said = _run([sys.executable, "-m", "benchmarks.peer_llama_cpp_case", case, str(path),
                 str(steps)])  # fmt: skip
    return json.loads(said.splitlines()[-1])


def _pocketdiff(*words: object) -> None:
    _run([sys.executable, "-m", "scripts.pocketdiff", *map(str, words)])


def _run(command: list[str]) -> str:
    """What it prints; its complaint on stderr if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout + done.stderr if "diffusion" in command[0] else done.stdout


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _report(
    arguments: argparse.Namespace,
    measured: dict[str, dict[str, list[float]]],
    products: list[float],
    memory: dict[str, dict[str, int]],
) -> None:
    from rich.console import Console
    from rich.table import Table

    title = f"Qwen2.5-0.5B's shape, int4 in groups of 32, {THREADS} threads, medians"
    table = Table("case", title=title, title_justify="left")
    for heading in ("llama.cpp, ms", "ours, ms", "llama.cpp / ours", "rounds"):
        table.add_column(heading, justify="right")
    ratios = {}
    for case, times in measured.items():
        medians = {who: statistics.median(values) for who, values in times.items()}
        ratios[case] = medians["llama.cpp"] / medians["ours"]
        spread = [a / b for a, b in zip(times["llama.cpp"], times["ours"], strict=True)]
        table.add_row(
            case,
            f"{medians['llama.cpp']:.1f}",
            f"{medians['ours']:.1f}",
            f"{ratios[case]:.2f}",
            ", ".join(f"{ratio:.2f}" for ratio in spread),
        )
    console = Console(width=100)
    console.print(table)
    if products:
        alone = statistics.median(products)
        ratios["step_over_products"] = statistics.median(measured["step"]["ours"]) / alone
        console.print(
            f"a step's matrix products alone: {alone:.1f} ms; the step takes "
            f"{ratios['step_over_products']:.2f} times as long"
        )
    table = Table("case", title="Memory of our process, MB", title_justify="left")
    for heading in ("before loading", "peak RSS", "int4 weights", "KV cache", "1.5 x int4 + KV"):
        table.add_column(heading, justify="right")
    for case, found in memory.items():
        limit = 1.5 * found["int4_bytes"] + found["kv_cache_bytes"]
        values = (found["before_bytes"], found["peak_rss_bytes"], found["int4_bytes"],
                  found["kv_cache_bytes"], limit)  # fmt: skip
        table.add_row(case, *(f"{value / 1e6:.0f}" for value in values))
    console.print(table)
    conditions = {
        "rounds": arguments.rounds,
        "steps": arguments.steps,
        "threads": THREADS,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "load_average_at_end": os.getloadavg(),
        "llama_cpp": SDIST,
        "executorch": version("executorch"),
    }
    document = {
        "benchmark": "peer_llama_cpp",
        "conditions": conditions,
        "ms": measured,
        "products_ms": products,
        "ratio_of_medians": ratios,
        "memory": memory,
    }
    print(json.dumps(document, separators=(",", ":")))


if __name__ == "__main__":
    main()
