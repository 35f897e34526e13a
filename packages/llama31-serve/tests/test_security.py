"""TLS, mutual TLS and bearer tokens, with certificates made here."""

from __future__ import annotations

import asyncio
import datetime
import ssl
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme

from llama31_serve import AsyncClient, AuthenticationError, Client, RpcError, Tls, UnavailableError
from llama31_serve.errors import StartError
from llama31_serve.server.listener import Security
from llama31_serve.server.tls import ServerTls
from llama31_serve.server.token_auth import Token, load_tokens

Serve = Any


@dataclass
class Files:
    """An authority with a server's and a client's certificate, in files."""

    ca: Path
    cert: Path
    key: Path
    client_cert: Path
    client_key: Path
    authority: trustme.CA

    def server_tls(self, *, mutual: bool = False) -> ServerTls:
        return ServerTls(self.cert, self.key, (self.ca,) if mutual else ())


def write(certificate: trustme.LeafCert, directory: Path, name: str) -> tuple[Path, Path]:
    cert, key = directory / f"{name}.pem", directory / f"{name}.key"
    cert.write_bytes(b"".join(blob.bytes() for blob in certificate.cert_chain_pems))
    key.write_bytes(certificate.private_key_pem.bytes())
    return cert, key


def make_files(directory: Path, **server_options: Any) -> Files:
    authority = trustme.CA()
    ca = directory / "ca.pem"
    authority.cert_pem.write_to_path(str(ca))
    cert, key = write(authority.issue_cert("127.0.0.1", **server_options), directory, "server")
    client_cert, client_key = write(authority.issue_cert("client.example"), directory, "client")
    return Files(ca, cert, key, client_cert, client_key, authority)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return make_files(tmp_path)


async def fails(address: str, tls: Tls | None, token: str | None = None) -> RpcError:
    """The error of a call that must not get through."""
    async with AsyncClient(address, tls=tls, token=token, timeout_s=5, max_attempts=1) as client:
        with pytest.raises(RpcError) as error:
            await client.generate("a", max_tokens=1)
    return error.value


async def test_tls(serve: Serve, files: Files, tmp_path: Path) -> None:
    other = tmp_path / "other.pem"
    trustme.CA().cert_pem.write_to_path(str(other))
    asking = {"tls": Tls(ca=files.ca)}
    async with serve(security=Security(files.server_tls()), client_options=asking) as running:
        assert (await running.client.generate("ab", max_tokens=2)).text == "ab"
        assert await running.client.is_serving()
        address = running.server.address
        with Client(address, tls=Tls(ca=files.ca), timeout_s=5) as blocking:
            assert (await asyncio.to_thread(blocking.generate, "ab", max_tokens=2)).text == "ab"
        assert isinstance(await fails(address, None), UnavailableError)  # plaintext
        assert isinstance(await fails(address, Tls(ca=other)), UnavailableError)  # a server we don't trust
        assert isinstance(await fails(address, Tls(ca=files.ca, server_name="other.example")), UnavailableError)


async def test_expired_certificate(serve: Serve, tmp_path: Path) -> None:
    yesterday = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
    files = make_files(tmp_path, not_after=yesterday, not_before=yesterday - datetime.timedelta(days=9))
    async with serve(security=Security(files.server_tls())) as running:
        assert isinstance(await fails(running.server.address, Tls(ca=files.ca)), UnavailableError)


async def test_mutual_tls(serve: Serve, files: Files, tmp_path: Path) -> None:
    foreign_cert, foreign_key = write(trustme.CA().issue_cert("client.example"), tmp_path, "foreign")
    asking = {"tls": Tls(ca=files.ca, cert=files.client_cert, key=files.client_key)}
    async with serve(security=Security(files.server_tls(mutual=True)), client_options=asking) as running:
        assert (await running.client.generate("ab", max_tokens=2)).text == "ab"
        address = running.server.address
        assert isinstance(await fails(address, Tls(ca=files.ca)), UnavailableError)
        assert isinstance(await fails(address, Tls(ca=files.ca, cert=foreign_cert, key=foreign_key)), UnavailableError)


async def test_protocols_before_tls_1_2_are_refused(serve: Serve, files: Files) -> None:
    async with serve(security=Security(files.server_tls()), client_options={"tls": Tls(ca=files.ca)}) as running:
        port = running.server.listener.port
        context = ssl.create_default_context(cafile=str(files.ca))
        context.set_alpn_protocols(["h2"])
        context.set_ciphers("DEFAULT:@SECLEVEL=0")  # OpenSSL itself would not offer 1.1 otherwise
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
        writer.transport.abort()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
        with pytest.raises((ssl.SSLError, ConnectionResetError)):
            await asyncio.open_connection("127.0.0.1", port, ssl=context)


async def test_bearer_tokens(serve: Serve) -> None:
    security = Security(tokens=(Token(b"old-token"), Token(b"new-token")))
    async with serve(security=security, client_options={"token": "new-token"}) as running:
        address = running.server.address
        assert (await running.client.generate("ab", max_tokens=2)).text == "ab"
        async with AsyncClient(address, token="old-token", timeout_s=5) as client:
            assert "".join([chunk.text async for chunk in client.generate_stream("ab", max_tokens=2)]) == "ab"
        for token in (None, "", "new-toke", "new-token2", "NEW-TOKEN"):
            assert isinstance(await fails(address, None, token), AuthenticationError)
        async with AsyncClient(address, timeout_s=5) as stranger:
            assert await stranger.is_serving()  # probes carry no token
            with pytest.raises(AuthenticationError, match="the bearer token is missing or wrong"):
                async for _ in stranger.chat_stream([{"role": "user", "content": "x"}]):
                    pass
        assert running.engine.num_requests == 0
        assert running.server.tallies.refused_calls == {grpc.StatusCode.UNAUTHENTICATED: 6}


Break = Callable[[Files], ServerTls]


@pytest.mark.parametrize(
    ("break_", "message"),
    [
        (lambda f: ServerTls(f.cert, f.cert.parent / "none"), "none: no such file"),
        (lambda f: ServerTls(f.cert, f.client_key), "not a PEM certificate and its key"),
        (lambda f: ServerTls(f.key, f.key), "not a PEM certificate and its key"),
        (lambda f: ServerTls(f.cert, f.key, (f.key,)), "TLS: .*: not a PEM certificate"),
    ],
)
def test_wrong_certificate_files(files: Files, break_: Break, message: str) -> None:
    with pytest.raises(StartError, match=message):
        break_(files).credentials()


def test_token_file(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    with pytest.raises(StartError, match="cannot be read"):
        load_tokens(path)
    path.write_text(" \n\n")
    with pytest.raises(StartError, match="holds no token"):
        load_tokens(path)
    path.write_text("one\n team b two \n")
    assert load_tokens(path) == (Token(b"one"), Token(b"two", "team b"))


def test_client_certificate_and_key_belong_together(files: Files) -> None:
    with pytest.raises(ValueError, match="cert and key belong together"):
        Tls(ca=files.ca, cert=files.client_cert)
