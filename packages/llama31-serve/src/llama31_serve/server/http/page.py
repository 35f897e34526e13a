"""GET /: one page to chat with the model. It loads nothing else and may talk to nobody else."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files

from llama31_serve.server.http.call import Call

_SCRIPT = re.compile(rb"<script>(.*?)</script>", re.DOTALL)


class Page:
    """The handler."""

    def __init__(self) -> None:
        self._content = files(__package__).joinpath("page.html").read_bytes()
        (script,) = _SCRIPT.findall(self._content)
        digest = base64.b64encode(hashlib.sha256(script).digest()).decode()
        rules = (
            "default-src 'none'",
            f"script-src 'sha256-{digest}'",
            "style-src 'unsafe-inline'",
            "img-src data:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        )
        self._headers = (
            ("content-security-policy", "; ".join(rules)),
            ("x-content-type-options", "nosniff"),
            ("referrer-policy", "no-referrer"),
            ("cache-control", "no-cache"),
        )

    async def page(self, call: Call) -> None:
        """The page."""
        await call.answer_bytes(self._content, "text/html; charset=utf-8", headers=self._headers)
