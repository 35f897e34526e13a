"""Which ids have a role: the names and ids a file or its directory states, with Llama 3's own as the fallback."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from llama31_tokenizer import llama3
from llama31_tokenizer.vocabulary import ControlTokens

# Besides the end-of-text token, these end a turn in the models whose vocabularies have them.
TURN_ENDS = (llama3.EOM, llama3.EOT, "<|im_end|>", "<|end|>", "<end_of_turn>")


def is_llama3(special_tokens: Mapping[str, int]) -> bool:
    """Whether these are Llama 3's control tokens, so that its header format can be written with them."""
    return all(name in special_tokens for name in (llama3.START_HEADER, llama3.END_HEADER, llama3.EOT))


def build_controls(
    special_tokens: Mapping[str, int],
    *,
    bos_id: int | None = None,
    eos_id: int | None = None,
    pad_id: int | None = None,
    unk_id: int | None = None,
    stop_ids: Iterable[int] = (),
    add_bos: bool | None = None,
    add_eos: bool = False,
) -> ControlTokens:
    """Roles from what is stated; what is not stated comes from Llama 3's names where the vocabulary has them."""
    llama = is_llama3(special_tokens)
    if llama:
        bos_id = special_tokens.get(llama3.BEGIN_OF_TEXT) if bos_id is None else bos_id
        eos_id = special_tokens.get(llama3.END_OF_TEXT) if eos_id is None else eos_id
        pad_id = special_tokens.get(llama3.PAD) if pad_id is None else pad_id
    ends = [eos_id, special_tokens.get(llama3.END_OF_TEXT), *(special_tokens.get(name) for name in TURN_ENDS)]
    stops = dict.fromkeys([token for token in ends if token is not None] + list(stop_ids))
    return ControlTokens(
        bos_id=bos_id,
        eos_id=eos_id,
        pad_id=pad_id,
        unk_id=unk_id,
        stop_ids=tuple(stops),
        add_bos=(llama if add_bos is None else add_bos) and bos_id is not None,
        add_eos=add_eos and eos_id is not None,
    )
