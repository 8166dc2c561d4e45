"""The shapes of the guide's models, from their config.json on the hub: for plans where that is out of reach."""

from typing import TYPE_CHECKING, Any

from elmlib.pretrained import ALIASES, locate

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_QWEN3_4B: dict[str, Any] = {
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}
SHAPES: dict[str, dict[str, Any]] = {
    "Qwen/Qwen3-4B-Instruct-2507": {"model_type": "qwen3", "vocab_size": 151936, **_QWEN3_4B},
    "Qwen/Qwen3-Embedding-4B": {"model_type": "qwen3", "vocab_size": 151665, **_QWEN3_4B},
    "microsoft/deberta-xlarge-mnli": {
        "model_type": "deberta",
        "vocab_size": 50265,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        # bert_score reads its layer 40 and drops the eight behind it.
        "num_hidden_layers": 40,
        "num_attention_heads": 16,
        "relative_attention": True,
        "pos_att_type": ["c2p", "p2c"],
    },
}


def load_config(name: str) -> "PretrainedConfig":
    """The config of a model: its own where it is in reach, else the one above.

    Raises FileNotFoundError as `locate` does for any other model.
    """
    from transformers import AutoConfig

    name = ALIASES.get(name, name)
    try:
        return AutoConfig.from_pretrained(locate(name), trust_remote_code=False)
    except FileNotFoundError:
        if name not in SHAPES:
            raise
    shape = dict(SHAPES[name])
    return AutoConfig.for_model(shape.pop("model_type"), **shape)
