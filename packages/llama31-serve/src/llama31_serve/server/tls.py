"""Server certificates: files in, checked before anything listens, gRPC credentials and an SSL context out."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from llama31_serve.errors import StartError
from llama31_serve.server.peer_check import PeerCheck


@dataclass(frozen=True)
class ServerTls:
    """PEM files, TLS 1.2 and up.

    Attributes:
        cert, key: the server's chain and its key.
        client_cas: clients have to show a certificate that one of these signed (mutual TLS).
        key_password: file whose first line opens the key.
        peers: which of those certificates are taken.
    """

    cert: Path
    key: Path
    client_cas: tuple[Path, ...] = ()
    key_password: Path | None = None
    peers: PeerCheck = field(default_factory=PeerCheck)

    def context(self) -> ssl.SSLContext:
        """For HTTP. Raises StartError if a file can't be read or files don't belong together."""
        passwords = () if self.key_password is None else (self.key_password,)
        for path in (self.cert, self.key, *self.client_cas, *self.peers.crls, *passwords):
            if not path.is_file():
                raise StartError(f"TLS: {path}: no such file")
        if self.peers:
            if not self.client_cas:
                raise StartError("TLS: certificates of clients are restricted, but none are asked for; name their CA")
            self.peers.load(self.client_cas)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_cert_chain(self.cert, self.key, password=self._ask_password)
        except (ssl.SSLError, OSError, ValueError) as error:
            problem = f"not a PEM certificate and its key, or the key needs another password ({error})"
            raise StartError(f"TLS: {self.cert}, {self.key}: {problem}") from error
        for path in self.client_cas:
            try:
                context.load_verify_locations(path)
            except ssl.SSLError as error:
                raise StartError(f"TLS: {path}: not a PEM certificate ({error})") from error
        if self.client_cas:
            context.verify_mode = ssl.CERT_REQUIRED
        if self.peers:
            context.sslobject_class = self.peers.ssl_object()
        return context

    def credentials(self) -> grpc.ServerCredentials:
        """For gRPC. Raises StartError like `context`."""
        self.context()
        authorities = b"\n".join(path.read_bytes() for path in self.client_cas) or None
        pair = (self._open_key(), self.cert.read_bytes())
        return grpc.ssl_server_credentials([pair], authorities, require_client_auth=authorities is not None)

    def _password(self) -> bytes | None:
        if self.key_password is None:
            return None
        lines = self.key_password.read_bytes().splitlines()
        return lines[0] if lines else None

    def _ask_password(self) -> bytes:
        password = self._password()
        if password is None:
            raise ValueError("the key is encrypted, and no password is given")
        return password

    def _open_key(self) -> bytes:
        """The key without its password: gRPC takes no other."""
        data = self.key.read_bytes()
        if b"ENCRYPTED" not in data:
            return data
        try:
            from cryptography.hazmat.primitives import serialization
        except ImportError as error:
            problem = "an encrypted key needs: pip install 'llama31-serve[server,http]'"
            raise StartError(f"{error}; {problem}") from error
        key = serialization.load_pem_private_key(data, self._password())
        plain = serialization.NoEncryption()
        return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
