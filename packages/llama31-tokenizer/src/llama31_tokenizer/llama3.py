"""What is fixed about the Llama 3.1 vocabulary: 128,000 ranks and the names of the 256 special tokens behind them.

The names are those of Meta's llama-models 0.3.0 (`llama3/tokenizer.py`) and of the 3.1 model card.
"""

from __future__ import annotations

NUM_RANKS = 128_000
NUM_SPECIAL = 256
VOCAB_SIZE = NUM_RANKS + NUM_SPECIAL

# Of the tokenizer.model file that Meta publishes with Llama 3, 3.1, 3.2 and 3.3.
GENUINE_SHA256 = "82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55"

BEGIN_OF_TEXT = "<|begin_of_text|>"
END_OF_TEXT = "<|end_of_text|>"
PAD = "<|finetune_right_pad_id|>"
START_HEADER = "<|start_header_id|>"
END_HEADER = "<|end_header_id|>"
EOM = "<|eom_id|>"
EOT = "<|eot_id|>"
PYTHON_TAG = "<|python_tag|>"
IMAGE = "<|image|>"
# The pad token of the MindFormers tokenizer for Llama 3, which predates 3.1.
MINDFORMERS_PAD = "<|reserved_special_token_0|>"

_NAMED = (
    BEGIN_OF_TEXT,
    END_OF_TEXT,
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    PAD,
    "<|step_id|>",
    START_HEADER,
    END_HEADER,
    EOM,
    EOT,
    PYTHON_TAG,
    IMAGE,
)
SPECIAL_TOKENS = (
    *_NAMED,
    *(f"<|reserved_special_token_{number}|>" for number in range(2, NUM_SPECIAL - len(_NAMED) + 2)),
)


def special_tokens() -> dict[str, int]:
    """Name to id, from 128000 on."""
    return {name: NUM_RANKS + offset for offset, name in enumerate(SPECIAL_TOKENS)}
