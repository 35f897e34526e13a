"""GPT-2's byte alphabet: bytes in, printable characters out, and back.

Byte-level vocabularies in tokenizer.json and GGUF files spell each byte as one printable character: the printable
Latin-1 bytes stand for themselves, the others are moved to U+0100 and up (openai/gpt-2, `encoder.py`).
"""

from __future__ import annotations


def _build_alphabet() -> tuple[str, ...]:
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    moved = iter(range(0x100, 0x200))
    return tuple(chr(byte) if byte in plain else chr(next(moved)) for byte in range(256))


CHAR_OF_BYTE = _build_alphabet()
BYTE_OF_CHAR = {char: byte for byte, char in enumerate(CHAR_OF_BYTE)}

# A token spelled in the alphabet becomes Latin-1 text, one character a byte, in one C call.
_TO_LATIN1 = {ord(char): byte for char, byte in BYTE_OF_CHAR.items()}
_FROM_LATIN1 = {byte: ord(char) for byte, char in enumerate(CHAR_OF_BYTE)}


def spelling_to_bytes(spelling: str) -> bytes:
    """Bytes of a token as tokenizer.json spells it.

    Raises:
        ValueError: a character outside the alphabet.
    """
    if not BYTE_OF_CHAR.keys() >= set(spelling):
        outside = next(char for char in spelling if char not in BYTE_OF_CHAR)
        raise ValueError(f"character {outside!r} is not in the byte-level alphabet")
    return spelling.translate(_TO_LATIN1).encode("latin-1")


def bytes_to_spelling(token: bytes) -> str:
    """How tokenizer.json spells a token's bytes."""
    return token.decode("latin-1").translate(_FROM_LATIN1)
