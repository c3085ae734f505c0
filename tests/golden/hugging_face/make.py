"""Writes the small Hugging Face models here: `python tests/golden/hugging_face/make.py` (needs torch and transformers).

Weights are drawn again after transformers' own initialisation (deviation 0.3, norms 1 +- 0.3), because with its 0.02 a wrong
rotary sign or norm flag hardly moves the logits. Beside each model lie the logits of 2 x 24 tokens, computed in float64.
"""

import json
import pathlib
import shutil

import numpy as np
import torch
import transformers

HERE = pathlib.Path(__file__).parent
COMMON = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_experts_per_tok": 2,
          "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": None}
MLA = {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 12, "moe_intermediate_size": 24,
       "intermediate_size": 40, "n_routed_experts": 8, "n_shared_experts": 2, "first_k_dense_replace": 1,
       "num_key_value_heads": 4}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16, "mscale": 0.707,
        "mscale_all_dim": 0.707, "beta_fast": 32, "beta_slow": 1}
MODELS = {
    "mixtral": {"num_key_value_heads": 2, "intermediate_size": 24, "num_local_experts": 6, "sliding_window": 10},
    "olmoe": {"num_key_value_heads": 4, "intermediate_size": 24, "num_experts": 6, "norm_topk_prob": False},
    "qwen2_moe": {"num_key_value_heads": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40,
                  "intermediate_size": 28, "num_experts": 6, "mlp_only_layers": [0]},
    "qwen3_moe": {"num_key_value_heads": 2, "moe_intermediate_size": 24, "num_experts": 6, "head_dim": 12,
                  "norm_topk_prob": True, "num_hidden_layers": 4, "decoder_sparse_step": 2, "intermediate_size": 28,
                  "tie_word_embeddings": True},
    "deepseek_v2": {**MLA, "q_lora_rank": None, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2,
                    "routed_scaling_factor": 1.5, "rope_parameters": YARN},
    "deepseek_v3": {**MLA, "q_lora_rank": 20, "n_group": 4, "topk_group": 2, "norm_topk_prob": True,
                    "routed_scaling_factor": 2.5, "num_nextn_predict_layers": 0},
}


def main() -> None:
  for name, changes in MODELS.items():
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(0)
    settings = transformers.AutoConfig.for_model(name, **{**COMMON, **changes})
    settings._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(settings, experts_implementation="eager").eval()
    with torch.no_grad():
      for key, value in [*model.named_parameters(), *model.named_buffers()]:
        if "inv_freq" in key:
          continue
        norm = "norm" in key or "layernorm" in key
        value.copy_(torch.randn(value.shape) * 0.3 + (1.0 if norm else 0.0))
        if "e_score_correction_bias" in key:
          value.mul_(0.3)
    model.save_pretrained(folder)
    tokens = torch.randint(2, 96, (2, 24))
    with torch.no_grad():
      logits = model.double()(tokens).logits
    np.savez_compressed(folder / "logits.npz", tokens=tokens.numpy().astype(np.int32), logits=logits.numpy().astype(np.float32))
    (folder / "made_with.json").write_text(json.dumps({"transformers": transformers.__version__, "torch": torch.__version__}))
    print(name, f"{sum(p.numel() for p in model.parameters()):,} parameters, logits of size {logits.abs().max():.2f}")


if __name__ == "__main__":
  main()
