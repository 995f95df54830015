"""Train the embedded sample with experts: DeepSeek-V2's layout in 7 MB, from the text of the other sample.

    OMP_NUM_THREADS=1 python benchmarks/make_sample_moe.py --out dsconvert/sample_moe --state train.pt

The tokenizer is the other sample's. One seed, one thread; a run that was cut off goes on from `--state` to
the same weights. Figures of the committed model are in dsconvert/sample_moe/README.md.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path
from typing import Any

sys.path.pop(0)  # this folder, whose gguf.py hides the library
sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, "")  # which the other script takes away

import torch
from tokenizers import Tokenizer
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

from benchmarks.make_sample import (
    BPE_TOKENS,
    SEED,
    VOCAB_ROWS,
    batches,
    bits_per_byte,
    save_weights,
    token_streams,
    write_json,
)
from dsconvert.texts.builtin import evaluation_pages

ROOT = Path(__file__).parents[1]
TOKENIZER = ("generation_config.json", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json")
SHAPES = ((4, 256), (2, 512), (1, 1024))  # rows per step by row length
DECAY = 0.4  # of the steps: those in which the rate falls to zero
# What it shares with V2-Lite: two shared experts beside the chosen ones, rows of whole k-quant blocks but in
# the experts' down matrices and in the keys' heads, which fall back; yarn. What not: queries of low rank, as
# V2 has them, because llama.cpp runs a model without only if it has 26 or 27 layers.
CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "aux_loss_alpha": 0.01,
    "bos_token_id": BPE_TOKENS,
    "eos_token_id": BPE_TOKENS + 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 256,
    "initializer_range": 0.05,
    "intermediate_size": 256,
    "kv_lora_rank": 256,
    "max_position_embeddings": 1024,
    "mlp_bias": False,
    "model_type": "deepseek_v2",
    "moe_intermediate_size": 128,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 12,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "pretraining_tp": 1,
    "q_lora_rank": 256,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "rms_norm_eps": 1e-6,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 4,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 256,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "greedy",
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "v_head_dim": 64,
    "vocab_size": VOCAB_ROWS,
}


def moe_layers(model: DeepseekV2ForCausalLM) -> list[torch.nn.Module]:
    return [layer.mlp for layer in model.model.layers[CONFIG["first_k_dense_replace"] :]]


class Balance:
    """Watches the routers: V2's loss of balance of the last batch, and how often each expert was chosen."""

    def __init__(self, model: DeepseekV2ForCausalLM) -> None:
        self.loss = torch.zeros(())
        self.chosen = torch.zeros(len(moe_layers(model)), CONFIG["n_routed_experts"])
        for index, mlp in enumerate(moe_layers(model)):
            mlp.gate.register_forward_hook(lambda _, __, out, i=index: self._see(i, out[0], out[2]))

    def _see(self, layer: int, logits: torch.Tensor, chosen: torch.Tensor) -> None:
        experts = CONFIG["n_routed_experts"]
        counts = torch.bincount(chosen.flatten(), minlength=experts)
        self.chosen[layer] += counts
        self.loss = self.loss + experts * (logits.softmax(-1).mean(0) * counts / counts.sum()).sum()

    def take(self) -> torch.Tensor:
        """The loss since the last call, 1 a layer where all experts are chosen alike."""
        loss, self.loss = self.loss, torch.zeros(())
        return loss


def train(
    model: DeepseekV2ForCausalLM, streams: dict[str, torch.Tensor], steps: int, rate: float, state: Path
) -> None:
    """AdamW, linear warm-up, linear decay at the end; the state of every 25th step goes to a file."""
    balance = Balance(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
    first, total, balances = 0, 0.0, 0.0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
    began = time.process_time()
    for step, batch in enumerate(batches(streams, steps, SHAPES)):
        if step < first:
            continue
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / 50, 1.0, (steps - step) / (DECAY * steps))
        loss = model(batch.clamp(min=0), labels=batch, use_cache=False).loss
        uneven = balance.take()
        (loss + CONFIG["aux_loss_alpha"] * uneven).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        total, balances = total + loss.item(), balances + uneven.item()
        if step % 25 == 24:
            seconds, shares = time.process_time() - began, balance.chosen / balance.chosen.sum(-1, True)
            least, most = shares.min().item(), shares.max().item()
            print(
                f"step {step + 1:5d}  loss {total / 25:.3f}  balance {balances / 25:.3f}  "
                f"experts {least:.3f} to {most:.3f}  {seconds:.0f} CPU s",
                flush=True,
            )
            total = balances = 0.0
            balance.chosen.zero_()
            partial = state.with_suffix(".part")
            saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save(saved, partial)
            partial.replace(state)


def on_disk(model: DeepseekV2ForCausalLM) -> dict[str, torch.Tensor]:
    """The weights by their published names: every expert's three matrices by themselves."""
    found = {}
    for name, value in model.named_parameters():
        if ".experts." not in name:
            found[name] = value
            continue
        prefix, kind = name.rsplit(".", 1)
        for expert, matrix in enumerate(value):
            parts = matrix.chunk(2) if kind == "gate_up_proj" else [matrix]
            kinds = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
            found |= {f"{prefix}.{expert}.{k}.weight": part for k, part in zip(kinds, parts, strict=True)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--state", type=Path, required=True, help="where the state of training is kept")
    parser.add_argument("--steps", type=int, default=800, help="of 1,024 tokens each")
    parser.add_argument("--rate", type=float, default=2e-3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER:
        shutil.copyfile(ROOT / "dsconvert" / "sample" / name, arguments.out / name)
    tokenizer = Tokenizer.from_file(str(arguments.out / "tokenizer.json"))
    model = DeepseekV2ForCausalLM(DeepseekV2Config(**CONFIG, dtype="float32"))
    model.set_experts_implementation("grouped_mm")
    print(sum(p.numel() for p in model.parameters()), "weights")
    train(model, token_streams(tokenizer), arguments.steps, arguments.rate, arguments.state)
    save_weights(arguments.out, on_disk(model))
    write_json(arguments.out / "config.json", CONFIG)
    model = DeepseekV2ForCausalLM.from_pretrained(arguments.out, dtype="float32").eval()
    for kind, count, chars in (("topics", 32, 2000), ("stdlib", 32, 2000), ("chinese", 1, 250)):
        balance = Balance(model)
        model_bits, unigram = bits_per_byte(model, tokenizer, evaluation_pages(count, chars, kind))
        print(f"{kind}: {model_bits:.3f} bits per byte held out (unigram {unigram:.3f})")
        shares = balance.chosen[0] / balance.chosen[0].sum()
        print("  experts' shares", *(f"{share:.3f}" for share in shares.tolist()))


if __name__ == "__main__":
    main()
