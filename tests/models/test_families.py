"""LLM families of transformers: each works as its naive twin does, or is refused in one line before training."""

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tokenizer, tiny_settings
from reference import check_losses, naive_embeds
from transformers import AutoConfig, AutoModelForCausalLM

from elmlib.config import InputError, SummaryTrainingConfig
from elmlib.data import PromptBatch
from elmlib.models import SoftTokenModel, build_model
from elmlib.training.drift import DriftReadout
from elmlib.training.setup import TrainingComponents, build_components

pytestmark = pytest.mark.heavy

CPU = torch.device("cpu")
SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True, "initializer_range": 0.2,
}  # fmt: skip
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
MLA = {
    "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
    "v_head_dim": 8, "head_dim": 4,
}  # fmt: skip
DEEPSEEK = MLA | {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 2, "topk_group": 1,
    "first_k_dense_replace": 1,
}  # fmt: skip
# One layer looks back over 16 tokens alone, fewer than the prompt has.
SLIDING = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
DELTA = {
    "layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4,
}  # fmt: skip
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 16}

# Family, or "model type, variant" -> what its config has beside SIZES; None: it has no such size.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 16},
    "ministral": SLIDING,
    "ministral3": {},
    "mixtral": LOCAL,
    "qwen2": {},
    "qwen2_moe": MOE | {"shared_expert_intermediate_size": 16},
    "qwen3": {},
    "qwen3_moe": MOE,
    "qwen3_next": MOE | DELTA | {"shared_expert_intermediate_size": 16},
    "qwen3_5_text": DELTA,
    "gemma": {},
    "gemma2": SLIDING,
    "gemma3_text": SLIDING,
    "gemma3": {"text_config": SIZES | SLIDING, "vision_config": SIZES | {"image_size": 28}},
    "gemma3n_text": SLIDING | {
        "hidden_size_per_layer_input": 8, "laurel_rank": 4, "num_kv_shared_layers": 0, "altup_num_inputs": 2,
    },
    "gemma4_text, per-layer inputs": SLIDING | {"hidden_size_per_layer_input": 8, "global_head_dim": 8},
    "gemma4_text": SLIDING | {"hidden_size_per_layer_input": 0, "global_head_dim": 8},
    "phi": {},
    "phi3": {},
    "phimoe": LOCAL,
    "granite": {},
    "granite, scaled": {"logits_scaling": 8.0, "embedding_multiplier": 12.0, "residual_multiplier": 0.22},
    "granitemoe": LOCAL,
    "granitemoehybrid": MAMBA2 | LOCAL | {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 16},
    "olmo": {},
    "olmo2": {},
    "olmo3": SLIDING,
    "olmoe": MOE,
    "smollm3": {"no_rope_layers": [1, 0]},
    "glm": {},
    "glm4": {},
    "glm4_moe": MOE | {"n_routed_experts": 4, "first_k_dense_replace": 1},
    "starcoder2": {"sliding_window": 16},
    "stablelm": {},
    "cohere": {},
    "cohere2": SLIDING,
    "gpt2": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 16},
    "gpt_neox": {},
    "gptj": {"rotary_dim": 4},
    "gpt_bigcode": {},
    "codegen": {"rotary_dim": 4},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32, "init_std": 0.2},
    "bloom": {},
    "mpt": {},
    "falcon": {"head_dim": None},
    "falcon, alibi": {"head_dim": None, "alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
    "falcon_h1": MAMBA2 | {"mamba_d_ssm": 64},
    "falcon_h1, scaled": MAMBA2 | {"mamba_d_ssm": 64, "lm_head_multiplier": 0.04},
    "bamba": MAMBA2 | {"attn_layer_indices": [1]},
    "nemotron": {},
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention"], "mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8,
        "n_groups": 1, "chunk_size": 16,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": MOE | {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "gpt_oss": LOCAL | SLIDING,
    "exaone4": SLIDING,
    "ernie4_5": {},
    "hunyuan_v1_dense": {},
    "seed_oss": {},
    "apertus": {},
    "mamba": {"state_size": 8},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 16},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "attention_window_size": 16},
    "jamba": {
        "mamba_d_state": 8, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 4,
    },
    "deepseek_v2": DEEPSEEK,
    "deepseek_v3": DEEPSEEK,
    "minicpm3": MLA,
    "llama4_text": {"attention_chunk_size": 16, "num_local_experts": 4, "intermediate_size_mlp": 64},
}  # fmt: skip

# Family -> part of the line that refuses it.
REFUSED = dict.fromkeys(("phi", "gptj", "codegen"), "shifts its logits")  # their output layer has a bias
REFUSED |= dict.fromkeys(("gemma2", "recurrent_gemma"), "caps")
REFUSED |= {"gemma3n_text": "needs token ids", "bamba": "does not go on from a cache"}  # bamba counts from 0 again
REFUSED |= dict.fromkeys(("gemma4_text, per-layer inputs", "llama4_text"), "does not run on embeddings")


def make_llm(folder: Path, family: str) -> str:
    """A random LLM of the family. Its norms, biases and scales, zeros and ones in a new model, which hides faults, get
    noise."""
    tokenizer = make_tokenizer()
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    shape = {"vocab_size": len(tokenizer), "vocab_size_per_layer_input": len(tokenizer)} | ids
    extra = FAMILIES[family]
    if "text_config" in extra:
        extra = extra | {"text_config": extra["text_config"] | shape}
    sizes = {name: value for name, value in (SIZES | extra).items() if value is not None}
    torch.manual_seed(0)
    llm = AutoModelForCausalLM.from_config(AutoConfig.for_model(family.split(",")[0], **sizes | shape))
    with torch.no_grad():
        for weight in llm.parameters():
            if weight.ndim == 1:
                weight += 0.1 * torch.randn_like(weight)
    llm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def naive_ids(model: SoftTokenModel, batch: PromptBatch, max_new_tokens: int) -> list[list[int]]:
    """Greedy answers by transformers' generate(), which no token ends; where it takes no embeddings for the family,
    everything is read again for each token."""
    embeds = naive_embeds(model, batch)
    if "inputs_embeds" in inspect.signature(model.llm.prepare_inputs_for_generation).parameters:
        mask = torch.ones(embeds.shape[:2], dtype=torch.long)
        options = {"max_new_tokens": max_new_tokens, "do_sample": False, "eos_token_id": None}
        return model.llm.generate(inputs_embeds=embeds, attention_mask=mask, **options).tolist()
    ids: list[torch.Tensor] = []
    for _ in range(max_new_tokens):
        ids.append(model.llm(inputs_embeds=embeds, use_cache=False).logits[:, -1].argmax(-1))
        embeds = torch.cat([embeds, model.table[ids[-1]][:, None]], dim=1)
    return torch.stack(ids, dim=1).tolist()


def ends_rows_apart(rows: list[list[int]]) -> int:
    """The token at whose first place the rows, were it the end of turn, would be of the most lengths."""
    return max({token for row in rows for token in row}, key=lambda t: len({row.index(t) for row in rows if t in row}))


@pytest.fixture(scope="module")
def parts(tiny_llm: Path, small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainingComponents:
    """Data, fits and evaluators, which need no more of an LLM than its tokenizer and the size of its embeddings."""
    return build_components(tiny_settings(tiny_llm, small_data, tmp_path_factory.mktemp("run")), CPU)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_equals_its_naive_twin_or_is_refused(
    family: str, parts: TrainingComponents, tiny_config: SummaryTrainingConfig, tmp_path: Path
) -> None:
    config = replace(tiny_config, llm_model_name=make_llm(tmp_path / "llm", family))
    if family in REFUSED:
        with pytest.raises(InputError, match=REFUSED[family]) as raised:
            build_model(config, CPU)
        assert "\n" not in str(raised.value)
        return
    model = build_model(config, CPU)
    model.adapter.eval()
    drift_head = DriftReadout(model.table, parts.warm_start.idf, parts.warm_start.to_embedding.map)
    components = replace(parts, model=model, drift_head=drift_head)
    batch = components.train.collate(list(range(6)))
    check_losses(components, batch, config)
    prompts = components.val.collate_prompts(list(range(5)))
    rows = naive_ids(model, prompts, 10)
    prompts = prompts._replace(prompt=prompts.prompt._replace(end_of_turn=ends_rows_apart(rows)))
    assert model.generate(prompts, 10) == model._texts(prompts.prompt, rows)
