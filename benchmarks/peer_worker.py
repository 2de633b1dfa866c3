"""The children of peers.py: each command runs in the interpreter that has what it needs.

    peer_worker.py serve ENGINE MODEL THREADS [OPTION]      answer "pp 512" or "tg 32 8" on stdin
    peer_worker.py gguf CHECKPOINT FILE                     write a checkpoint as an F16 GGUF
    peer_worker.py quantize FILE TARGET TYPE                of a GGUF: q4_0, q4_k_m, iq4_nl, q8_0
    peer_worker.py ctranslate2 CHECKPOINT TARGET
    peer_worker.py losses FILE WINDOWS.npy                  of a GGUF, one a window, as JSON
    peer_worker.py plot ROWS.json PICTURE.png

Invariant: real standard output carries one JSON object an answer and nothing else; whatever a
library prints goes to stderr. Every sample has fresh random ids, so that no prefix cache answers.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

import numpy as np

CONTEXT = 1024
BATCH = 512  # tokens that llama.cpp takes at once
FIRST_ID, LAST_ID = 10, 200_000  # no special tokens, and within every published vocabulary


class Engine(Protocol):
    """A loaded model. Both methods return the seconds of what they name, and nothing else's."""

    package: str  # whose version the report gives
    weights_bytes: int  # that decoding one token reads
    note: str
    isa: str  # the instructions that it says it uses, "" where it does not say

    def prefill(self, ids: list[int]) -> float:
        """Of the prompt and the first token."""

    def decode(self, ids: list[int], count: int) -> float:
        """Of `count` greedy tokens, counted from a first one that is there."""


class Bloomq:
    package = "bloomq"

    def __init__(self, model: Path, threads: int, option: str) -> None:
        import bloomq

        self.model = bloomq.load(model, threads=threads)
        self.weights_bytes = self.model.pack.bytes_per_token
        self.note = self.model.backend.name
        self.isa = self.model.backend.description

    def prefill(self, ids: list[int]) -> float:
        self.model.forget()  # what it knows of these ids from the last time
        seconds: float = self.model.generate(ids, max_new_tokens=1).stats.prompt_s
        return seconds

    def decode(self, ids: list[int], count: int) -> float:
        stats = self.model.generate(ids, max_new_tokens=count + 1).stats
        if stats.generated_tokens != count + 1:
            raise RuntimeError("the end-of-text token came: run again")
        return stats.generate_s


class LlamaCpp:
    """Through llama.cpp's own calls. Options: no-repack, and flash attention by test, as flash-pp
    and flash-tg, which takes a second context only where the two differ."""

    package = "llama-cpp-python"

    def __init__(self, model: Path, threads: int, option: str) -> None:
        import llama_cpp

        self.api = llama_cpp
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.use_extra_bufts = "no-repack" not in option.split()
        self.model = llama_cpp.llama_model_load_from_file(str(model).encode(), params)
        if not self.model:
            raise RuntimeError(f"{model}: llama.cpp cannot load it")
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(
            llama_cpp.llama_model_get_vocab(self.model)
        )
        self.parameters = llama_cpp.llama_model_n_params(self.model)
        self.weights_bytes = llama_cpp.llama_model_size(
            self.model
        )  # the tied embedding is the head
        words = option.split()
        flash = {test: f"flash-{test}" in words for test in ("pp", "tg")}
        contexts = {on: self._context(threads, on) for on in set(flash.values())}
        self.prefill_context, self.decode_context = contexts[flash["pp"]], contexts[flash["tg"]]
        self.note = f"flash attention: {', '.join(t for t, on in flash.items() if on) or 'off'}"
        self.isa = llama_cpp.llama_print_system_info().decode().strip()

    def _context(self, threads: int, flash: bool) -> Any:
        params = self.api.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = CONTEXT, BATCH, BATCH
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = int(flash)
        context = self.api.llama_init_from_model(self.model, params)
        if not context:
            raise RuntimeError("llama.cpp makes no context")
        return context

    def prefill(self, ids: list[int]) -> float:
        return self._prefill(self.prefill_context, ids)

    def decode(self, ids: list[int], count: int) -> float:
        return self._decode(self.decode_context, ids, count)

    def _prefill(self, context: Any, ids: list[int]) -> float:
        started = perf_counter()
        self._start(context, ids)
        return perf_counter() - started

    def _decode(self, context: Any, ids: list[int], count: int) -> float:
        token = self._start(context, ids)
        started = perf_counter()
        for _ in range(count):
            token = self._step(context, [token])
        return perf_counter() - started

    def _start(self, context: Any, ids: list[int]) -> int:
        self.api.llama_memory_clear(self.api.llama_get_memory(context), True)
        return self._step(context, ids)

    def _step(self, context: Any, ids: list[int]) -> int:
        tokens = (self.api.llama_token * len(ids))(*ids)
        if self.api.llama_decode(context, self.api.llama_batch_get_one(tokens, len(ids))):
            raise RuntimeError("llama_decode failed")
        logits = self.api.llama_get_logits_ith(context, -1)
        return int(np.ctypeslib.as_array(logits, (self.vocab_size,)).argmax())

    def all_logits(self, ids: list[int]) -> np.ndarray:
        """[T, V], of every token of a sequence of its own."""
        api, context = self.api, self.prefill_context
        api.llama_memory_clear(api.llama_get_memory(context), True)
        batch = api.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.logits[i] = token, i, 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        failed = api.llama_decode(context, batch)
        api.llama_batch_free(batch)
        if failed:
            raise RuntimeError("llama_decode failed")
        logits = api.llama_get_logits(context)
        return np.ctypeslib.as_array(logits, (len(ids), self.vocab_size)).copy()


class CTranslate2:
    package = "ctranslate2"

    def __init__(self, model: Path, threads: int, option: str) -> None:
        if option:
            os.environ["CT2_FORCE_CPU_ISA"] = option
        import ctranslate2

        self.generator = ctranslate2.Generator(
            str(model), device="cpu", compute_type="int8", inter_threads=1, intra_threads=threads
        )
        # The file names its tokens, and a prompt is made of names.
        self.names = json.loads((model / "vocabulary.json").read_text(encoding="utf-8"))
        self.weights_bytes = (model / "model.bin").stat().st_size
        self.note, self.isa = self.generator.compute_type, option

    def prefill(self, ids: list[int]) -> float:
        started = perf_counter()
        return self._ticks(ids, 1)[0] - started

    def decode(self, ids: list[int], count: int) -> float:
        ticks = self._ticks(ids, count + 1)
        return ticks[-1] - ticks[0]

    def _ticks(self, ids: list[int], count: int) -> list[float]:
        """When each of `count` tokens came."""
        ticks: list[float] = []
        self.generator.generate_batch(
            [[self.names[i] for i in ids]], sampling_topk=1, beam_size=1, min_length=count,
            max_length=count, include_prompt_in_result=False,
            callback=lambda result: ticks.append(perf_counter()),
        )  # fmt: skip
        if len(ticks) != count:
            raise RuntimeError(f"ctranslate2 gave {len(ticks)} tokens, expected {count}")
        return ticks


class OpenVino:
    package = "openvino-genai"

    def __init__(self, model: Path, threads: int, option: str) -> None:
        import openvino
        import openvino_genai

        self.tensor, self.config = openvino.Tensor, openvino_genai.GenerationConfig
        self.pipeline = openvino_genai.LLMPipeline(str(model), "CPU", INFERENCE_NUM_THREADS=threads)
        # The embedding lies there once, in int8, and is the head too.
        self.weights_bytes = (model / "openvino_model.bin").stat().st_size
        self.note = self.isa = ""

    def prefill(self, ids: list[int]) -> float:
        started = perf_counter()
        self._generate(ids, 1)
        return perf_counter() - started

    def decode(self, ids: list[int], count: int) -> float:
        metrics = self._generate(ids, count + 1).perf_metrics
        return float(metrics.get_tpot().mean) * count / 1e3  # ms, of the tokens after the first

    def _generate(self, ids: list[int], count: int) -> Any:
        options = self.config(max_new_tokens=count, ignore_eos=True, do_sample=False)
        options.apply_chat_template = False
        result = self.pipeline.generate(self.tensor(np.array([ids], np.int64)), options)
        if len(result.tokens[0]) != count:
            raise RuntimeError(f"openvino gave {len(result.tokens[0])} tokens, expected {count}")
        return result


class Transformers:
    """The forward pass in a loop of our own, which costs less than `generate` does."""

    package = "transformers"

    def __init__(self, model: Path, threads: int, option: str) -> None:
        import torch
        import transformers

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self.torch = torch
        self.model = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
        self.model.eval()
        for parameter in self.model.parameters():  # mapped from the file: may be evicted otherwise
            parameter.data = parameter.data.clone()
        self.weights_bytes = sum(p.numel() * p.element_size() for p in self.model.parameters())
        self.note = f"torch {torch.__version__}"
        self.isa = torch.backends.cpu.get_cpu_capability()

    def prefill(self, ids: list[int]) -> float:
        started = perf_counter()
        self._step(self.torch.tensor([ids]), None)
        return perf_counter() - started

    def decode(self, ids: list[int], count: int) -> float:
        token, cache = self._step(self.torch.tensor([ids]), None)
        started = perf_counter()
        for _ in range(count):
            token, cache = self._step(token, cache)
        return perf_counter() - started

    def _step(self, ids: Any, cache: Any) -> tuple[Any, Any]:
        out = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1].argmax(dim=-1, keepdim=True), out.past_key_values


class ReadBandwidth:
    """No engine: answers "bw" with the machine's read bandwidth, as `bloomq bench` measures it."""

    def __init__(self, threads: int) -> None:
        from bloomq.backends.numba_cpu.ceilings import Ceilings
        from bloomq.backends.numba_cpu.processor import best_tier, cpu_features
        from bloomq.backends.numba_cpu.threads import Pool

        self.ceilings = Ceilings(best_tier(cpu_features()), Pool(threads))

    def gb_s(self) -> float:
        return self.ceilings.read_gb_s()


ENGINES: dict[str, Callable[[Path, int, str], Engine]] = {
    "bloomq": Bloomq,
    "llama.cpp": LlamaCpp,
    "ctranslate2": CTranslate2,
    "openvino": OpenVino,
    "transformers": Transformers,
}


def random_ids(rng: np.random.Generator, count: int, vocab_size: int = LAST_ID) -> list[int]:
    return [int(i) for i in rng.integers(FIRST_ID, min(LAST_ID, vocab_size), count)]


def peak_mb() -> float:
    """Most memory that was resident, mapped files included. ru_maxrss would count the parent's."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024 / 1e6


def serve(answer: Callable[[object], None], engine: str, model: str, threads: str,
          option: str = "") -> None:  # fmt: skip
    """Load, say so, then answer every line of stdin: seconds, CPU seconds, peak memory."""
    if engine == "bandwidth":
        bandwidth = ReadBandwidth(int(threads))
        answer({"note": ""})
        for _ in sys.stdin:
            answer({"gb_s": bandwidth.gb_s()})
        return
    started = perf_counter()
    loaded = ENGINES[engine](Path(model), int(threads), option)
    answer({
        "load_s": perf_counter() - started, "weights_bytes": loaded.weights_bytes,
        "note": loaded.note, "isa": loaded.isa,
        "version": importlib.metadata.version(loaded.package),
    })  # fmt: skip
    rng = np.random.default_rng(0)  # the same prompts for every engine
    for line in sys.stdin:
        test, *numbers = line.split()
        before = time.process_time()
        if test == "pp":
            seconds = loaded.prefill(random_ids(rng, int(numbers[0])))
        else:
            seconds = loaded.decode(random_ids(rng, int(numbers[1])), int(numbers[0]))
        answer({"s": seconds, "cpu_s": time.process_time() - before, "rss_mb": peak_mb()})


# A checkpoint's tensor (without "transformer.") -> llama.cpp's.
GGUF_NAMES = {
    "word_embeddings": "token_embd", "word_embeddings_layernorm": "token_embd_norm",
    "ln_f": "output_norm", "input_layernorm": "attn_norm",
    "self_attention.query_key_value": "attn_qkv", "self_attention.dense": "attn_output",
    "post_attention_layernorm": "ffn_norm", "mlp.dense_h_to_4h": "ffn_up",
    "mlp.dense_4h_to_h": "ffn_down",
}  # fmt: skip


def write_gguf(checkpoint: Path, target: Path) -> None:
    """A checkpoint as GGUF: matrices F16, vectors F32, no vocabulary. One tensor in memory."""
    import gguf
    from safetensors import safe_open

    config = json.loads((checkpoint / "config.json").read_text())
    writer = gguf.GGUFWriter(target, "bloom")
    gguf_header(writer, config)
    files = [safe_open(file, "pt") for file in sorted(checkpoint.glob("*.safetensors"))]
    places = [(file, key) for file in files for key in file.keys() if "lm_head" not in key]  # noqa: SIM118
    for file, key in places:
        shape = file.get_slice(key).get_shape()
        dtype = np.dtype(np.float16 if len(shape) > 1 else np.float32)
        writer.add_tensor_info(gguf_name(key), shape, dtype, int(np.prod(shape)) * dtype.itemsize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for file, key in places:
        data = file.get_tensor(key)
        if "query_key_value" in key:  # [H, 3, D, ...] -> [3, H, D, ...]
            heads = data.reshape(config["n_head"], 3, -1, *data.shape[1:])
            data = heads.transpose(0, 1).reshape(data.shape)
        data = data.half() if data.ndim > 1 else data.float()
        writer.write_tensor_data(data.contiguous().numpy())
    writer.close()


def gguf_header(writer: Any, config: dict[str, Any]) -> None:
    hidden = config.get("n_embed") or config["hidden_size"]
    writer.add_context_length(config.get("seq_length", 2048))
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(4 * hidden)
    writer.add_block_count(config["n_layer"])
    writer.add_head_count(config["n_head"])
    writer.add_head_count_kv(config["n_head"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")  # only ids are used
    writer.add_file_type(1)  # mostly F16


def gguf_name(key: str) -> str:
    """`transformer.h.3.mlp.dense_h_to_4h.bias` -> `blk.3.ffn_up.bias`."""
    stem, _, leaf = key.removeprefix("transformer.").rpartition(".")
    if not stem.startswith("h."):
        return f"{GGUF_NAMES[stem]}.{leaf}"
    _, layer, inner = stem.split(".", 2)
    return f"blk.{layer}.{GGUF_NAMES[inner]}.{leaf}"


def quantize_gguf(source: str, target: str, kind: str) -> None:
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind.upper()}")
    params.nthread = len(os.sched_getaffinity(0))
    if llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)):
        raise RuntimeError(f"{source}: llama.cpp cannot quantize it to {kind}")


def convert_ctranslate2(checkpoint: Path, target: Path) -> None:
    from ctranslate2.converters import TransformersConverter

    TransformersConverter(str(checkpoint)).convert(str(target), quantization="int8", force=True)


def gguf_losses(model: Path, windows: Path) -> dict[str, Any]:
    """Mean negative log-likelihood of each window's tokens but the first, and bits a weight."""
    engine = LlamaCpp(model, len(os.sched_getaffinity(0)), "")
    losses = []
    for ids in np.load(windows):
        logits = engine.all_logits(ids.tolist())
        logits -= logits.max(axis=1, keepdims=True)
        total = np.log(np.exp(logits).sum(axis=1, dtype=np.float64))
        losses.append(float((total[:-1] - logits[np.arange(len(ids) - 1), ids[1:]]).mean()))
    return {"losses": losses, "bits_per_weight": 8 * engine.weights_bytes / engine.parameters}


def plot(rows: Path, picture: Path) -> None:
    """A panel for each model and test: every peer's bar above bloomq's of the same pairing."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in json.loads(rows.read_text()):
        panels.setdefault((row["model"], row["test"]), []).append(row)
    height = 1 + 0.62 * max(map(len, panels.values()))
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(5.2 * len(panels), height), squeeze=False, layout="constrained"
    )
    for axis, ((model, test), group) in zip(axes[0], panels.items(), strict=True):
        draw_panel(axis, group)
        axis.set_title(f"{model} {test}", loc="left")
    figure.savefig(picture, dpi=120)


def draw_panel(axis: Any, group: list[dict[str, Any]]) -> None:
    places = np.arange(len(group))
    for shift, key, label, colour in ((-0.2, "tok_s", "peer", "#9aa5b1"),
                                      (0.2, "bloomq_tok_s", "bloomq", "#d9622b")):  # fmt: skip
        samples = [np.array(row[key]) for row in group]
        middle = np.array([np.median(s) for s in samples])
        reach = [middle - [s.min() for s in samples], [s.max() for s in samples] - middle]
        axis.barh(places + shift, middle, 0.38, xerr=reach, color=colour, label=label, capsize=2)
    names = [f"{row['engine']} {row['setting']}\nbloomq {row['bloomq']}" for row in group]
    axis.set_yticks(places, names, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("tokens a second, median and range")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)


def own_stdout() -> Callable[[object], None]:
    """Keep real stdout for answers; what libraries print to it, from C too, goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(value: object) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    return answer


def main() -> None:
    # A stopped child would outlive a parent that is killed: PR_SET_PDEATHSIG (1), SIGKILL (9).
    ctypes.CDLL(None).prctl(1, 9)
    answer = own_stdout()
    command, *rest = sys.argv[1:]
    if command == "serve":
        serve(answer, *rest)
    elif command == "gguf":
        write_gguf(Path(rest[0]), Path(rest[1]))
    elif command == "quantize":
        quantize_gguf(*rest)
    elif command == "ctranslate2":
        convert_ctranslate2(Path(rest[0]), Path(rest[1]))
    elif command == "losses":
        answer(gguf_losses(Path(rest[0]), Path(rest[1])))
    elif command == "plot":
        plot(Path(rest[0]), Path(rest[1]))
    else:
        sys.exit(f"{command}: no such command")


if __name__ == "__main__":
    main()
