"""Which client certificates are taken, over gRPC and HTTP: revocation lists, allowed names; a key behind a password."""

from __future__ import annotations

import datetime
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

from llama31_serve import AsyncClient, AuthenticationError, Tls
from llama31_serve.errors import StartError
from llama31_serve.server.listener import Security
from llama31_serve.server.peer_check import PeerCheck
from llama31_serve.server.tls import ServerTls

Serve = Any


@dataclass
class Peers:
    """An authority, a server's certificate, and two clients'."""

    directory: Path
    authority: trustme.CA

    def __post_init__(self) -> None:
        self.ca = self.directory / "ca.pem"
        self.authority.cert_pem.write_to_path(str(self.ca))
        self.issue("server", "127.0.0.1")
        self.issue("good", "good.example")
        self.issue("bad", "bad.example")

    def issue(self, name: str, identity: str) -> None:
        issued = self.authority.issue_cert(identity)
        self.cert(name).write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        self.key(name).write_bytes(issued.private_key_pem.bytes())

    def cert(self, name: str) -> Path:
        return self.directory / f"{name}.pem"

    def key(self, name: str) -> Path:
        return self.directory / f"{name}.key"

    def revoke(self, *names: str) -> Path:
        """A list that the authority signed."""
        ca = x509.load_pem_x509_certificate(self.ca.read_bytes())
        key: Any = serialization.load_pem_private_key(self.authority.private_key_pem.bytes(), None)
        now = datetime.datetime.now(datetime.UTC)
        builder = x509.CertificateRevocationListBuilder(ca.subject, now, now + datetime.timedelta(days=1))
        for name in names:
            serial = x509.load_pem_x509_certificate(self.cert(name).read_bytes()).serial_number
            builder = builder.add_revoked_certificate(x509.RevokedCertificateBuilder(serial, now).build())
        path = self.directory / f"crl{''.join(names)}.pem"
        path.write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
        return path

    def server(self, peers: PeerCheck) -> Security:
        return Security(ServerTls(self.cert("server"), self.key("server"), (self.ca,), None, peers))

    def client(self, name: str) -> Tls:
        return Tls(ca=self.ca, cert=self.cert(name), key=self.key(name))

    async def get(self, url: str, name: str) -> httpx.Response:
        """GET over HTTPS as a client."""
        context = ssl.create_default_context(cafile=str(self.ca))
        context.load_cert_chain(self.cert(name), self.key(name))
        async with httpx.AsyncClient(verify=context, timeout=10) as client:
            return await client.get(url)


@pytest.fixture
def peers(tmp_path: Path) -> Peers:
    return Peers(tmp_path, trustme.CA())


async def only_good_gets_in(serve: Serve, peers: Peers, check: PeerCheck, words: str) -> None:
    asking = {"tls": peers.client("good")}
    async with serve(security=peers.server(check), client_options=asking, http_port=0) as running:
        url = f"{running.server.http.business.url}/v1/models"
        assert (await running.client.generate("ab", max_tokens=2)).text == "ab"
        assert await running.client.is_serving()
        assert (await peers.get(url, "good")).status_code == 200
        async with AsyncClient(running.server.address, tls=peers.client("bad"), timeout_s=5, max_attempts=1) as client:
            with pytest.raises(AuthenticationError, match=words):
                await client.generate("ab", max_tokens=2)
            with pytest.raises(AuthenticationError, match=words):
                async for _ in client.generate_stream("ab", max_tokens=2):
                    pass
        assert running.server.tallies.refused_calls == {grpc.StatusCode.UNAUTHENTICATED: 2}
        with pytest.raises(httpx.TransportError):
            await peers.get(url, "bad")
        assert running.engine.num_requests == 0


async def test_revoked_certificates(serve: Serve, peers: Peers) -> None:
    await only_good_gets_in(serve, peers, PeerCheck((peers.revoke("bad"),)), "is revoked")


def test_a_file_with_two_lists(peers: Peers) -> None:
    both = peers.directory / "both.pem"
    both.write_bytes(peers.revoke("good").read_bytes() + peers.revoke("bad").read_bytes())
    check = PeerCheck((both,))
    check.load([peers.ca])
    revoked = "the client's certificate is revoked"
    assert [check.problem_of_pem(peers.cert(name).read_bytes()) for name in ("good", "bad")] == [revoked, revoked]


def test_a_list_of_another_authority(peers: Peers, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = Peers(tmp_path_factory.mktemp("other"), trustme.CA(organization_name="others"))
    with pytest.raises(StartError, match="others is of none of the authorities"):
        restricted(peers, [peers.ca], other.revoke("bad")).context()


async def test_names_that_may_call(serve: Serve, peers: Peers) -> None:
    await only_good_gets_in(serve, peers, PeerCheck(allowed_names=frozenset({"good.example"})), "none of the names")


async def test_a_key_behind_a_password(serve: Serve, peers: Peers) -> None:
    key: Any = serialization.load_pem_private_key(peers.key("server").read_bytes(), None)
    locked = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"open sesame"),
    )
    peers.key("server").write_bytes(locked)
    password = peers.directory / "password"
    password.write_text("open sesame\n")
    tls = ServerTls(peers.cert("server"), peers.key("server"), key_password=password)
    asking = {"tls": Tls(ca=peers.ca)}
    async with serve(security=Security(tls), client_options=asking, http_port=0) as running:
        assert (await running.client.generate("ab", max_tokens=2)).text == "ab"
        assert (await peers.get(f"{running.server.http.business.url}/v1/models", "good")).status_code == 200
    for wrong in (ServerTls(tls.cert, tls.key), ServerTls(tls.cert, tls.key, key_password=peers.ca)):
        with pytest.raises(StartError, match="the key needs another password"):
            wrong.credentials()


def restricted(peers: Peers, authorities: Sequence[Path], *crls: Path) -> ServerTls:
    return ServerTls(peers.cert("server"), peers.key("server"), tuple(authorities), None, PeerCheck(crls))


def test_lists_that_are_none(peers: Peers) -> None:
    with pytest.raises(StartError, match="no such file"):
        restricted(peers, [peers.ca], peers.directory / "none.pem").context()
    with pytest.raises(StartError, match="not a PEM revocation list"):
        restricted(peers, [peers.ca], peers.ca).context()
    with pytest.raises(StartError, match="none are asked for"):
        restricted(peers, [], peers.revoke()).context()
