"""Trains a small BLOOM on plain text and writes it in Hugging Face format.

The weights are those of transformers' `BloomForCausalLM`; only the execution is changed for speed
(fused attention, chunked cross entropy), so the checkpoint loads anywhere BLOOM loads. What lies
under --out is a complete checkpoint from the first save on: every file is replaced atomically.

    python benchmarks/train_demo.py --minutes 60 --out bloom-demo
    python benchmarks/train_demo.py --layers 6 --hidden 320 --heads 5 --steps 5000 --out bloom-small
    python benchmarks/train_demo.py --init bloom-demo --lr 5e-4 --minutes 30 --out bloom-longer

Ctrl-C and SIGTERM save and end. A paused process (SIGSTOP) loses nothing of its --minutes.
On a CPU with other work beside it, set OMP_WAIT_POLICY=passive: with one busy process on two cores
at nice 19, threads that spin while they wait gave 1,022 tok/s, threads that sleep 7,086.
Needs torch, transformers, tokenizers, safetensors and numpy.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import os
import signal
import statistics
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import BloomConfig, BloomForCausalLM
from transformers.models.bloom.modeling_bloom import BloomAttention

SHARED = Path(__file__).resolve().parents[2] / "shared" / "corpora"
SPECIAL = ("<unk>", "<s>", "</s>", "<pad>")  # ids 0-3, as in BLOOM
WORD = " ?[^(\\s|[.,!?…。，、।۔،])]+"  # BLOOM's pre-tokenizer, bigscience/bloom tokenizer.json
PROMPTS = ("It was a ", "Il y avait ", "En un lugar ", "Era uma ", "def __init__(self, ")
PIECE_CHARS = 100_000  # text is encoded in pieces of this size, cut at line ends
SIZES = {"layers": 4, "hidden": 256, "heads": 4, "vocab": 8192}
CONFIG_SIZES = (
    "hidden_size", "n_layer", "n_head", "vocab_size", "layer_norm_epsilon", "initializer_range"
)  # fmt: skip
CONFIG = """{
  "architectures": ["BloomForCausalLM"], "model_type": "bloom", "torch_dtype": "bfloat16",
  "apply_residual_connection_post_layernorm": false, "attention_dropout": 0.0, "unk_token_id": 0,
  "hidden_dropout": 0.0, "pretraining_tp": 1, "slow_but_exact": false, "use_cache": true}"""
TOKENIZER_CONFIG = """{
  "tokenizer_class": "BloomTokenizerFast", "add_prefix_space": false, "padding_side": "left",
  "clean_up_tokenization_spaces": false}"""
WARMUP, FLOOR = 0.02, 0.01  # share of the budget at rising rate; last rate / highest rate


@dataclass(frozen=True, slots=True)
class Setup:
    """Where and how precisely the steps run."""

    device: torch.device
    dtype: torch.dtype  # of matrix products; weights and optimizer stay float32

    @property
    def chunk_logits(self) -> int:
        """Logits held at once: 8 MB of float32 stays in a CPU's last-level cache."""
        return 1 << 21 if self.device.type == "cpu" else 1 << 28

    def autocast(self) -> torch.autocast:
        enabled = self.dtype != torch.float32
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)


class Budget:
    """Progress 0..1 by steps or by active time.

    A step counts at most 4 medians of the last 101, so that a pause does not eat the schedule
    while a busy machine's slow steps still count in full.
    """

    def __init__(self, *, steps: int | None, seconds: float) -> None:
        self.steps, self.seconds = steps, seconds
        self.step, self.active_s = 0, 0.0
        self.recent: deque[float] = deque(maxlen=101)

    def spend(self, step_s: float) -> None:
        self.recent.append(step_s)
        self.active_s += min(step_s, 4 * statistics.median(self.recent))
        self.step += 1

    @property
    def progress(self) -> float:
        return self.step / self.steps if self.steps else self.active_s / self.seconds

    def rate(self) -> float:
        """Share of the highest learning rate: linear warm-up, then half a cosine."""
        if self.progress < WARMUP:
            return max(self.progress / WARMUP, 0.01)
        turn = min((self.progress - WARMUP) / (1 - WARMUP), 1.0)
        return FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * turn))


class FusedAttention(nn.Module):
    """BLOOM's attention in one fused call, with its parameters under their own names.

    softmax(q k^T / sqrt(D) + slope (j - i)) v equals BLOOM's slope * j: softmax ignores a
    constant per row. Source: Press et al. 2021 (ALiBi), section 3.
    """

    bias: Tensor

    def __init__(self, bloom: BloomAttention, bias: Tensor) -> None:
        super().__init__()
        self.query_key_value, self.dense = bloom.query_key_value, bloom.dense
        self.n_head = bloom.num_heads
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, x: Tensor, residual: Tensor, **unused: Any) -> tuple[Tensor, None]:
        qkv = self.query_key_value(x).unflatten(-1, (self.n_head, 3, -1))  # [B, T, H, 3, D]
        q, k, v = qkv.permute(3, 0, 2, 1, 4)  # 3 of [B, H, T, D]
        bias = self.bias[..., : x.shape[1], : x.shape[1]].to(q.dtype)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)  # [B, H, T, D]
        return self.dense(y.transpose(1, 2).flatten(2)) + residual, None  # [B, T, C]


class HeadLoss(torch.autograd.Function):
    """Mean cross entropy of x @ W.T, its gradient taken in the same pass, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, target: Tensor, setup: Setup) -> Tensor:
        x_low, w_low = x.to(setup.dtype), weight.to(setup.dtype)  # [T, C], [V, C]
        grad_x, grad_w = torch.empty_like(x_low), torch.zeros_like(weight)
        loss = torch.zeros((), device=x.device)
        rows = max(1, setup.chunk_logits // len(weight))
        for i in range(0, len(x), rows):
            p = torch.softmax(x_low[i : i + rows] @ w_low.T, -1, dtype=torch.float32)  # [rows, V]
            wanted = target[i : i + rows, None]  # [rows, 1]
            loss -= p.gather(1, wanted).clamp_min(1e-30).log().sum()
            p.scatter_add_(1, wanted, torch.full_like(wanted, -1, dtype=p.dtype))
            grad = p.to(setup.dtype)
            grad_x[i : i + rows] = grad @ w_low
            grad_w += grad.T @ x_low[i : i + rows]
        ctx.save_for_backward(grad_x, grad_w)
        return loss / len(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_x, grad_w = ctx.saved_tensors
        share = grad / len(grad_x)
        return grad_x.float() * share, grad_w * share, None, None


def alibi_bias(n_head: int, window: int) -> Tensor:
    """-> [1, H, T, T], slope * (j - i) for j <= i, else -inf; slopes as in BLOOM."""
    low = 2 ** math.floor(math.log2(n_head))
    slopes = [2 ** (-8 * (i + 1) / low) for i in range(low)]
    slopes += [2 ** (-4 * (2 * i + 1) / low) for i in range(n_head - low)]
    at = torch.arange(window)
    bias = torch.tensor(slopes)[:, None, None] * (at[None] - at[:, None])  # [H, T, T]
    return bias.masked_fill(at[None] > at[:, None], -math.inf)[None]


def build_model(config: BloomConfig, window: int, init: Path | None, setup: Setup) -> Any:
    config.use_cache = False
    model: Any = BloomForCausalLM(config)
    if init:
        model.transformer.load_state_dict(load_file(init / "model.safetensors"))
    bias = alibi_bias(config.n_head, window)
    for block in model.transformer.h:
        block.self_attention = FusedAttention(block.self_attention, bias)
        block.mlp.gelu_impl = nn.GELU(approximate="tanh")
    return model.float().to(setup.device)


def read_texts(folder: Path) -> dict[str, str]:
    """-> text by language, of the folder's *.txt and *.txt.xz."""
    texts = {}
    for path in sorted([*folder.glob("*.txt"), *folder.glob("*.txt.xz")]):
        data = path.read_bytes()
        raw = lzma.decompress(data) if path.suffix == ".xz" else data
        texts[path.name.split(".txt")[0]] = raw.decode()
    if not texts:
        sys.exit(f"error: no *.txt or *.txt.xz in {folder}; name a folder of text with --text")
    return texts


def pieces(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        end = text.find("\n", start + PIECE_CHARS) + 1 or len(text)
        yield text[start:end]
        start = end


def train_tokenizer(texts: dict[str, str], vocab_size: int) -> Tokenizer:
    """-> byte-level BPE with BLOOM's pre-tokenizer, trained on every fourth piece of text."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(WORD), behavior="isolated", invert=False)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.post_processor = processors.ByteLevel(
        add_prefix_space=True, trim_offsets=False, use_regex=False
    )
    tokenizer.decoder = decoders.ByteLevel(add_prefix_space=True, trim_offsets=True, use_regex=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sample = [piece for text in texts.values() for piece in list(pieces(text))[::4]]
    tokenizer.train_from_iterator(sample, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, text: str) -> np.ndarray:
    parts = [np.array(e.ids, np.int32) for e in tokenizer.encode_batch(list(pieces(text)))]
    return np.concatenate([*parts, np.array([SPECIAL.index("</s>")], np.int32)])


def batches(tokens: np.ndarray, batch: int, window: int, seed: int) -> Iterator[Tensor]:
    """-> int64 [B, T + 1] for ever; each round shuffles all windows, cut at a new offset."""
    rng = np.random.default_rng(seed)
    while True:
        starts = np.arange(rng.integers(window), len(tokens) - window, window)
        rng.shuffle(starts)
        for i in range(0, len(starts) - batch + 1, batch):
            rows = starts[i : i + batch, None] + np.arange(window + 1)
            yield torch.from_numpy(tokens[rows].astype(np.int64))


@torch.no_grad()
def perplexity(model: Any, tokens: np.ndarray, window: int, limit: int, setup: Setup) -> float:
    """exp(mean loss) over at most `limit` evenly spaced windows, each read without context."""
    model.eval()
    n_windows = (len(tokens) - 1) // window
    picked = np.linspace(0, n_windows - 1, min(n_windows, limit), dtype=np.int64) * window
    rows = tokens[picked[:, None] + np.arange(window + 1)].astype(np.int64)  # [B, T + 1]
    total = 0.0
    for some in torch.from_numpy(rows).split(8):
        x, y = some[:, :-1].to(setup.device), some[:, 1:].to(setup.device)
        with setup.autocast():
            logits = model.lm_head(model.transformer(x)[0])  # [8, T, V]
        loss = F.cross_entropy(logits.float().flatten(0, 1), y.flatten(), reduction="sum")
        total += loss.item() / rows[:, 1:].size
    model.train()
    return math.exp(total)


def save_checkpoint(out: Path, model: Any, tokenizer: Tokenizer) -> None:
    sizes = {k: getattr(model.config, k) for k in CONFIG_SIZES}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    names = dict(zip(("unk_token", "bos_token", "eos_token", "pad_token"), SPECIAL, strict=True))
    texts = {
        "config.json": json.loads(CONFIG) | ids | sizes,
        "generation_config.json": {"_from_model_config": True} | ids,
        "tokenizer.json": json.loads(tokenizer.to_str()),
        "tokenizer_config.json": json.loads(TOKENIZER_CONFIG) | names,
        "special_tokens_map.json": names,
    }
    files = {k: json.dumps(v, indent=2, ensure_ascii=False).encode() for k, v in texts.items()}
    state = model.transformer.state_dict()  # names without `transformer.`, the head is tied
    weights = {k: v.to("cpu", torch.bfloat16).contiguous() for k, v in state.items()}
    files["model.safetensors"] = save(weights, {"format": "pt"})
    out.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        part = out / f".{name}.part"
        part.write_bytes(data)
        os.replace(part, out / name)


def print_samples(out: Path, tokenizer: Tokenizer) -> None:
    """Greedy and sampled text from the checkpoint as written, by transformers' own model."""
    model = BloomForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer.encode(prompt.rstrip()).ids])
        greedy = model.generate(ids, max_new_tokens=40, do_sample=False)
        drawn = model.generate(ids, max_new_tokens=40, do_sample=True, top_k=40, temperature=0.8)
        for name, row in (("greedy", greedy[0]), ("sampled", drawn[0])):
            print(f"{name}: {tokenizer.decode(row.tolist())!r}", flush=True)


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def note_heldout(
    model: Any, heldout: dict[str, np.ndarray], window: int, limit: int, setup: Setup
) -> None:
    found = {k: perplexity(model, v, window, limit, setup) for k, v in heldout.items()}
    if found:
        note("  held-out perplexity: " + ", ".join(f"{k} {v:.2f}" for k, v in found.items()))


def make_optimizer(model: Any, lr: float) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def train_step(
    model: Any, optimizer: torch.optim.AdamW, rows: Tensor, lr: float, setup: Setup
) -> float:
    """-> the batch's loss [B, T + 1 tokens] before this step."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    rows = rows.to(setup.device)
    with setup.autocast():
        x = model.transformer(rows[:, :-1])[0]  # [B, T, C]
    weight, target = model.lm_head.weight, rows[:, 1:].flatten()
    loss = HeadLoss.apply(x.flatten(0, 1), weight, target, setup)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.item())


def train(
    model: Any,
    tokenizer: Tokenizer,
    tokens: np.ndarray,
    heldout: dict[str, np.ndarray],
    args: argparse.Namespace,
    setup: Setup,
) -> int:
    """Steps until the budget is spent or a signal comes; -> that signal's number or 0."""
    asked: list[int] = []  # signals; a step is never cut short
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda number, frame: asked.append(number))
    budget = Budget(steps=args.steps, seconds=args.minutes * 60)
    optimizer = make_optimizer(model, args.lr)
    note_heldout(model, heldout, args.window, 64, setup)
    model.train()
    loss = 0.0
    for rows in batches(tokens, args.batch, args.window, args.seed):
        start = time.perf_counter()
        lr = args.lr * budget.rate()
        now = train_step(model, optimizer, rows, lr, setup)
        budget.spend(time.perf_counter() - start)
        loss = now if budget.step == 1 else 0.98 * loss + 0.02 * now
        if budget.progress >= 1 or asked:
            break
        if budget.step % 100 == 0:
            speed = args.batch * args.window / statistics.median(budget.recent)
            note(
                f"step {budget.step} {budget.progress:.1%} loss {loss:.3f} lr {lr:.2e} "
                f"{speed:.0f} tok/s {budget.active_s / 60:.1f} min"
            )
        if budget.step % args.every == 0:
            save_checkpoint(args.out, model, tokenizer)
            note_heldout(model, heldout, args.window, 64, setup)
    save_checkpoint(args.out, model, tokenizer)
    total = budget.step * args.batch * args.window
    note(f"{total / 1e6:.2f} M tokens in {budget.step} steps, written to {args.out}")
    return asked[0] if asked else 0


def pick_setup(device: str, precision: str) -> Setup:
    """`auto` takes bf16 where the hardware multiplies it: 2.8 times fp32's rate on Zen 5."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if precision == "auto":
        cpu = torch.cpu.get_capabilities()
        fast = device != "cpu" or cpu.get("avx512_bf16") or cpu.get("amx_bf16")
        precision = "bf16" if fast else "fp32"
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return Setup(torch.device(device), dtype)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, default in SIZES.items():
        parser.add_argument(f"--{name}", type=int, help=f"default {default}; not with --init")
    parser.add_argument("--window", type=int, default=256, help="tokens a row")
    parser.add_argument("--batch", type=int, default=16, help="rows a step")
    parser.add_argument("--lr", type=float, default=1e-3, help="highest learning rate")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--minutes", type=float, default=60, help="active time of the steps")
    budget.add_argument("--steps", type=int)
    parser.add_argument("--every", type=int, default=500, help="steps between saves")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text", type=Path, default=SHARED / "train", metavar="DIR")
    parser.add_argument("--heldout", type=Path, default=SHARED / "heldout", metavar="DIR")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--init", type=Path, metavar="CHECKPOINT", help="continue from this one")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto")
    args = parser.parse_args()
    for name, default in SIZES.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
        elif args.init:
            parser.error(f"--{name} comes from the checkpoint given with --init")
    if args.hidden % args.heads or args.vocab < 260:
        parser.error("--hidden must be a multiple of --heads, --vocab at least 260")
    if args.init and not (args.init / "model.safetensors").is_file():
        sys.exit(f"error: no model.safetensors in {args.init}; --init wants a checkpoint folder")
    return args


def main() -> int:
    args = parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    setup = pick_setup(args.device, args.precision)
    texts = read_texts(args.text)
    if args.init:
        tokenizer = Tokenizer.from_file(str(args.init / "tokenizer.json"))
        config = BloomConfig.from_pretrained(args.init)
    else:
        tokenizer = train_tokenizer(texts, args.vocab)
        config = BloomConfig(
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=args.hidden,
            n_layer=args.layers,
            n_head=args.heads,
        )
    tokens = np.concatenate([encode(tokenizer, text) for text in texts.values()])
    held_texts = read_texts(args.heldout) if args.heldout.is_dir() else {}
    heldout = {name: encode(tokenizer, text)[:-1] for name, text in held_texts.items()}
    model = build_model(config, args.window, args.init, setup)
    note(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, "
        f"{len(tokens) / 1e6:.2f} M tokens of {', '.join(texts)}; {setup.device}, {setup.dtype}"
    )
    signum = train(model, tokenizer, tokens, heldout, args, setup)
    if signum:
        return 128 + signum
    note_heldout(model, heldout, args.window, sys.maxsize, setup)
    print_samples(args.out, tokenizer)
    return 0


if __name__ == "__main__":
    sys.exit(main())
