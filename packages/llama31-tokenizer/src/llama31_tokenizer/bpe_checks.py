"""Whether a merge list can run on tiktoken: its algorithm takes the id of a token as the priority of its merge.

That is the same as Hugging Face's merge list when the merges come in the order of the ids they make, and no token
without a merge could be put together from two others. Then at any moment both pick the same pair (proof sketch: a
pair of tokens that only tiktoken would join needs an inner merge of lower rank left undone, which neither leaves).
A token may have further merges of parts with higher ids, as Hugging Face's file for Llama 3 lists every split of every
token: its second merge makes id 257, four spaces, of one space and of three, which have a higher id.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping


def check_merges(vocab: Mapping[str, int], merges: Iterable[tuple[str, str]]) -> None:
    """Raise ValueError, naming the merge, if tiktoken's algorithm would give other ids than the merge list.

    Args:
        vocab: token as spelled -> id, without the added tokens.
        merges: pairs in order of priority.
    """
    last = -1
    made = set()
    grown = set()  # tokens that at least one merge makes of two lower ids
    for number, (left, right) in enumerate(merges):
        token = left + right
        try:
            made_id, left_id, right_id = vocab[token], vocab[left], vocab[right]
        except KeyError as error:
            raise ValueError(
                f"merge {number} ({left!r}, {right!r}) needs {error.args[0]!r}, not in the vocabulary"
            ) from None
        if made_id < last:
            raise ValueError(
                f"merge {number} ({left!r}, {right!r}) makes id {made_id} out of order; only vocabularies whose ids "
                "follow the merges are supported"
            )
        last = made_id
        made.add(token)
        if left_id < made_id and right_id < made_id:
            grown.add(token)
    for token in made - grown:
        raise ValueError(f"token {token!r} has a lower id than the parts each of its merges makes it of")
    for token in vocab.keys() - made:
        if any(token[:cut] in vocab and token[cut:] in vocab for cut in range(1, len(token))):
            raise ValueError(f"token {token!r} has no merge though its parts are tokens, which tiktoken would join")
