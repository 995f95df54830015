"""Train the embedded sample: a DeepSeek LLM layout in 5 MB, from text that every Python carries.

    OMP_NUM_THREADS=1 python benchmarks/make_sample.py --out dsconvert/sample

One seed, one thread; the same machine, Python and torch give the same file again (another CPU sums in another
order). The evaluation part of the built-in text is not seen, neither by the tokenizer nor by the weights.
Figures of the committed model are in dsconvert/sample/README.md.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.pop(0)  # this folder, whose gguf.py hides the library

import gguf
import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tokenizers.pre_tokenizers import ByteLevel, Digits, Split
from transformers import LlamaConfig, LlamaForCausalLM

from dsconvert.texts.builtin import builtin_documents, evaluation_pages
from tokenizer_tools.runtimes import DEEPSEEK_LLM_SPLITS

SEED = 20240115
VOCAB_ROWS, BPE_TOKENS = 2048, 2000
BOS, EOS = "<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>"
# The bytes that never occur in UTF-8, as byte-level BPE spells them; DeepSeek adds them as tokens.
NEVER_BYTES = "\xf8\xf6\xfa\xff\xf5\xf7\xfb\xfd\xc0\xf9\xc1\xfe\xfc"
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}
{{- 'User: ' + message['content'] + '\\n\\n' -}}
{%- elif message['role'] == 'assistant' -%}
{{- 'Assistant: ' + message['content'] + eos_token -}}
{%- else -%}
{{- message['content'] + '\\n\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- 'Assistant:' -}}
{%- endif -%}
"""
# Four query heads share two key heads, as DeepSeek 67B shares: a converter that confuses the two is seen.
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": BPE_TOKENS,
    "eos_token_id": BPE_TOKENS + 1,
    "hidden_act": "silu",
    "hidden_size": 256,
    "initializer_range": 0.05,
    "intermediate_size": 768,
    "max_position_embeddings": 1024,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": VOCAB_ROWS,
}
# Rows per step by row length: the model meets every position up to its context, and short texts as often.
SHAPES = ((8, 256), (4, 512), (2, 1024))
SHARES = {"topics": 0.3, "stdlib": 0.69, "chinese": 0.01}


def train_tokenizer() -> Tokenizer:
    """Byte-level BPE under the deepseek-llm steps, with DeepSeek's added tokens behind it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(Split(Regex(pattern), "isolated") for pattern in DEEPSEEK_LLM_SPLITS),
            Digits(individual_digits=True),
            ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=BPE_TOKENS,
        initial_alphabet=sorted(set(ByteLevel.alphabet()) - set(NEVER_BYTES)),
        show_progress=False,
    )
    documents = builtin_documents("calibration")
    prose = [d.text for d in documents if not d.name.startswith("stdlib/")]
    tokenizer.train_from_iterator([*(d.text for d in documents), *prose * 5], trainer)
    plain = {"normalized": True, "special": False}
    tokenizer.add_special_tokens([AddedToken(text, normalized=True, special=True) for text in (BOS, EOS)])
    tokenizer.add_tokens([AddedToken(char, **plain) for char in NEVER_BYTES])
    spec = json.loads(tokenizer.to_str())
    spec["decoder"]["add_prefix_space"] = False  # without effect; DeepSeek's file says so and Python cannot
    return Tokenizer.from_str(json.dumps(spec))


def tokenizer_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """tokenizer_config.json with the fields that DeepSeek's has."""
    flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    decoder = tokenizer.get_added_tokens_decoder()
    return {
        "add_bos_token": True,
        "add_eos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(i): {"content": t.content, **flags, "special": t.special} for i, t in sorted(decoder.items())
        },
        "bos_token": BOS,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": EOS,
        "legacy": True,
        "model_max_length": CONFIG["max_position_embeddings"],
        "pad_token": EOS,
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizerFast",
        "unk_token": None,
    }


def token_streams(tokenizer: Tokenizer) -> dict[str, torch.Tensor]:
    """The calibration documents of each kind as one row of ids, each document behind BOS and before EOS."""
    streams: dict[str, list[int]] = {kind: [] for kind in SHARES}
    for document in builtin_documents("calibration"):
        ids = tokenizer.encode(document.text, add_special_tokens=False).ids
        streams[document.name.split("/")[0]] += [BPE_TOKENS, *ids, BPE_TOKENS + 1]
    return {kind: torch.tensor(ids) for kind, ids in streams.items()}


def batches(
    streams: dict[str, torch.Tensor], steps: int, shapes: tuple[tuple[int, int], ...] = SHAPES
) -> Iterator[torch.Tensor]:
    """`steps` batches of ids; each row is BOS and a window of one kind of text at a random place."""
    generator = np.random.default_rng(SEED)
    for step in range(steps):
        rows, length = shapes[step % len(shapes)]
        batch = torch.full((rows, length), BPE_TOKENS)
        for row in batch:
            stream = streams[generator.choice(list(SHARES), p=list(SHARES.values()))]
            window = min(length - 1, len(stream))
            at = int(generator.integers(0, len(stream) - window + 1))
            row[1 : 1 + window] = stream[at : at + window]
            row[1 + window :] = -100
        yield batch


def train(streams: dict[str, torch.Tensor], steps: int, rate: float) -> LlamaForCausalLM:
    """AdamW, linear warm-up, cosine decay to zero."""
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG, dtype="float32"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
    began, total = time.process_time(), 0.0
    for step, batch in enumerate(batches(streams, steps)):
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / 50, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        loss = model(batch.clamp(min=0), labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        total += loss.item()
        if step % 50 == 49:
            seconds = time.process_time() - began
            print(f"step {step + 1:5d}  loss {total / 50:.3f}  {seconds:.0f} CPU s", flush=True)
            total = 0.0
    return model


@torch.no_grad()
def page_logprobs(model: LlamaForCausalLM, ids: list[int]) -> torch.Tensor:
    """Log-probabilities float32 [len(ids), vocabulary] of the ids of a page behind BOS."""
    return model(torch.tensor([[BPE_TOKENS, *ids]])).logits[0, :-1].log_softmax(-1)


def bits_per_byte(model: LlamaForCausalLM, tokenizer: Tokenizer, pages: list[str]) -> tuple[float, float]:
    """Bits per byte of the pages under the model, and under the frequencies of their own tokens."""
    nats = unigram = 0.0
    counts = torch.zeros(VOCAB_ROWS)
    encoded = [tokenizer.encode(page, add_special_tokens=False).ids for page in pages]
    for ids in encoded:
        counts += torch.bincount(torch.tensor(ids), minlength=VOCAB_ROWS)
        nats -= page_logprobs(model, ids).gather(1, torch.tensor(ids)[:, None]).sum().item()
    unigram = -(counts * (counts / counts.sum()).clamp(min=1e-9).log()).sum().item()
    scale = math.log(2) * sum(len(page.encode()) for page in pages)
    return nats / scale, unigram / scale


def rounding_kl(model: LlamaForCausalLM, tokenizer: Tokenizer, pages: list[str]) -> float:
    """Mean KL in nats per token after rounding each decoder linear to Q4_0; the weights stay rounded."""
    encoded = [tokenizer.encode(page, add_special_tokens=False).ids for page in pages]
    before = [page_logprobs(model, ids) for ids in encoded]
    kind = gguf.GGMLQuantizationType.Q4_0
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("proj.weight"):
                weight.copy_(torch.from_numpy(gguf.dequantize(gguf.quantize(weight.numpy(), kind), kind)))
    kl = [(p.exp() * (p - page_logprobs(model, ids))).sum(-1) for p, ids in zip(before, encoded, strict=True)]
    return float(torch.cat(kl).mean())


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def save_weights(out: Path, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Write the weights in bf16, and return them as they are read again, in float32."""
    rounded = {name: w.detach().to(torch.bfloat16).contiguous() for name, w in weights.items()}
    save_file(rounded, out / "model.safetensors", metadata={"format": "pt"})
    return {name: w.float() for name, w in rounded.items()}


def save(out: Path, model: LlamaForCausalLM, tokenizer: Tokenizer) -> None:
    """The files of a Hugging Face checkpoint, weights in bf16; the model keeps the rounded weights."""
    model.load_state_dict(save_weights(out, dict(model.named_parameters())))
    write_json(out / "config.json", CONFIG)
    ids = {key: CONFIG[key] for key in ("bos_token_id", "eos_token_id")}
    write_json(out / "generation_config.json", {**ids, "do_sample": True, "temperature": 0.7, "top_p": 0.95})
    write_json(out / "tokenizer_config.json", tokenizer_config(tokenizer))
    write_json(out / "special_tokens_map.json", {"bos_token": BOS, "eos_token": EOS, "pad_token": EOS})
    tokenizer.save(str(out / "tokenizer.json"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1200, help="of 2,048 tokens each")
    parser.add_argument("--rate", type=float, default=2e-3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer()
    streams = token_streams(tokenizer)
    print({kind: len(stream) for kind, stream in streams.items()}, "training tokens")
    model = train(streams, arguments.steps, arguments.rate).eval()
    save(arguments.out, model, tokenizer)
    for kind, count, chars in (("topics", 32, 2000), ("stdlib", 32, 2000), ("chinese", 1, 250)):
        model_bits, unigram = bits_per_byte(model, tokenizer, evaluation_pages(count, chars, kind))
        print(f"{kind}: {model_bits:.3f} bits per byte held out (unigram {unigram:.3f})")
    kl = rounding_kl(model, tokenizer, evaluation_pages(8, 2000))
    print(f"mean KL of Q4_0 rounding: {kl:.5f} nats per token")


if __name__ == "__main__":
    main()
