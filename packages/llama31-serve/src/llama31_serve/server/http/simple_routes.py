"""The short answers of the business port: /v1/models and /v1/tokenizer."""

from __future__ import annotations

import time

from llama31_serve.server.http.body import Body, parse_body
from llama31_serve.server.http.call import Call
from llama31_serve.server.serving_model import ModelHolder


class TokenizerBody(Body):
    """POST /v1/tokenizer."""

    inputs: str


class SimpleRoutes:
    """The handlers."""

    def __init__(self, holder: ModelHolder) -> None:
        self._holder = holder
        self._created = int(time.time())

    async def models(self, call: Call) -> None:
        """OpenAI's list: the model, and every adapter that is loaded, which is asked for by its name in `model`."""
        await call.answer({"object": "list", "data": [self._describe(name) for name in self._holder.loaded().served()]})

    async def model(self, call: Call) -> None:
        """One entry of the list."""
        name = call.path_params["name"]
        self._holder.loaded().require_served(name)
        await call.answer(self._describe(name))

    async def tokenize(self, call: Call) -> None:
        """MindIE's count of a text's tokens."""
        body = parse_body(TokenizerBody, call.body)
        count, tokens = await self._holder.loaded().text.split(body.inputs)
        await call.answer({"token_number": count, "tokens": tokens})

    def _describe(self, name: str) -> dict[str, object]:
        model = self._holder.loaded().info
        parent = None if name == model.model_name else model.model_name
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "llama31",
            "root": name,
            "parent": parent,
            "max_model_len": model.max_seq_len,
        }
