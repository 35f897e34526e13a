"""Exact, fast, light Llama 3.1 tokenizer and chat format."""

from llama31_tokenizer.chat import ChatFormat
from llama31_tokenizer.dialog import EncodedDialog
from llama31_tokenizer.errors import Llama31Error, TokenizerError
from llama31_tokenizer.stop_strings import StopStringMatcher
from llama31_tokenizer.stream import StreamDecoder
from llama31_tokenizer.tokenizer import Tokenizer

__all__ = [
    "ChatFormat",
    "EncodedDialog",
    "Llama31Error",
    "StopStringMatcher",
    "StreamDecoder",
    "Tokenizer",
    "TokenizerError",
]
__version__ = "0.1.0"
