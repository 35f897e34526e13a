"""Server certificates: files in, checked before anything listens, gRPC credentials and an SSL context out."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc

from llama31_serve.errors import StartError


@dataclass(frozen=True, slots=True)
class ServerTls:
    """PEM files. With `client_ca`, clients have to show a certificate that it signed (mutual TLS)."""

    cert: Path
    key: Path
    client_ca: Path | None = None

    def context(self) -> ssl.SSLContext:
        """For HTTP. Raises StartError if a file can't be read or key and certificate don't belong together."""
        for flag, path in (("--tls_cert", self.cert), ("--tls_key", self.key), ("--tls_client_ca", self.client_ca)):
            if path is not None and not path.is_file():
                raise StartError(f"{flag} {path}: no such file")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_cert_chain(self.cert, self.key, password=_no_password)
        except (ssl.SSLError, OSError, ValueError) as error:
            raise StartError(
                f"--tls_cert {self.cert}, --tls_key {self.key}: not a PEM certificate and its unencrypted key ({error})"
            ) from error
        if self.client_ca is not None:
            context.verify_mode = ssl.CERT_REQUIRED
            try:
                context.load_verify_locations(self.client_ca)
            except ssl.SSLError as error:
                raise StartError(f"--tls_client_ca {self.client_ca}: not a PEM certificate ({error})") from error
        return context

    def credentials(self) -> grpc.ServerCredentials:
        """For gRPC. Raises StartError like `context`."""
        self.context()
        client_ca = None if self.client_ca is None else self.client_ca.read_bytes()
        pair = (self.key.read_bytes(), self.cert.read_bytes())
        return grpc.ssl_server_credentials([pair], client_ca, require_client_auth=client_ca is not None)


def _no_password() -> str:
    raise ValueError("the key is encrypted")
