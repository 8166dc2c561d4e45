"""Other frozen LLMs work without code: the losses and summaries of each are those of its naive twin."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import CHAT_TEMPLATE, make_tokenizer
from reference import check_losses, naive_summaries
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.models.llama import LlamaConfig

from elmlib.config import SummaryTrainingConfig
from elmlib.models.adapter import load_adapter
from elmlib.models.elm import build_model, token_table
from elmlib.models.pretrained import load_llm
from elmlib.training.setup import build_components
from elmlib.training.trainer import train

CPU = torch.device("cpu")
SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True, "initializer_range": 0.2,
}  # fmt: skip
FAMILIES = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {}),
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    # One layer looks back over 16 tokens alone, fewer than the prompt has; its embedding layer scales its rows.
    "gemma3": (
        Gemma3TextConfig, Gemma3ForCausalLM,
        {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
    ),
}  # fmt: skip
TEMPLATES = {
    "no system turn": CHAT_TEMPLATE,
    "a system turn of its own": "{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}" + CHAT_TEMPLATE,
    "a system turn is refused": (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
        "{% for message in messages %}{{ '<|im_start|>' + ('model' if message['role'] == 'assistant' else 'user')"
        " + '\n' + message['content'] | trim + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}"
    ),
}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def make_llm(folder: Path, family: str, template: str) -> str:
    kind, model, extra = FAMILIES[family]
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    torch.manual_seed(0)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    model(kind(vocab_size=len(tokenizer), **SIZES, **extra, **ids)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("template", TEMPLATES)
def test_an_llms_losses_and_summaries_are_its_naive_twins(
    family: str, template: str, tiny_config: SummaryTrainingConfig, tmp_path: Path
) -> None:
    config = replace(tiny_config, llm_model_name=make_llm(tmp_path / family, family, TEMPLATES[template]))
    components = build_components(config, CPU)
    components.model.adapter.eval()
    batch = components.train.collate(list(range(6)))
    check_losses(components, batch, config)
    prompts = components.val.collate_prompts(list(range(5)))
    assert naive_summaries(components.model, prompts, 10) == components.model.generate(prompts, 10)


def test_an_adapter_of_each_trains_and_loads(family: str, tiny_config: SummaryTrainingConfig, tmp_path: Path) -> None:
    config = replace(tiny_config, llm_model_name=make_llm(tmp_path / family, family, CHAT_TEMPLATE), max_epochs=1)
    result = train(config)
    assert result.metrics["val_nll"] > 0 and result.metrics["best_step"] >= 0
    file = load_adapter(result.best)
    model = build_model(file.config, CPU, file.weights)
    scale = model.adapter.norm.weight.mean() / token_table(model.llm).float().square().mean().sqrt()
    assert 0.5 < scale < 2, "soft tokens are not at the scale of the LLM's own"


def test_the_table_is_what_the_embedding_layer_gives(family: str, tmp_path: Path) -> None:
    llm, _ = load_llm(make_llm(tmp_path / family, family, CHAT_TEMPLATE), torch.float32, "cpu")
    table, ids = token_table(llm), torch.tensor([3, 250, 7])
    torch.testing.assert_close(table[ids], llm.get_input_embeddings()(ids))
    scaled = not torch.equal(table, llm.get_input_embeddings().weight)
    assert scaled == (family == "gemma3")
