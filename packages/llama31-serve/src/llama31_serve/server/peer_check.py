"""Whose client certificate is taken: not revoked, and one of the names that are allowed. For gRPC and HTTP alike."""

from __future__ import annotations

import re
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama31_serve.errors import StartError

if TYPE_CHECKING:
    from cryptography.x509 import Certificate, CertificateRevocationList, Name

_PEM_LIST = re.compile(rb"-----BEGIN X509 CRL-----.+?-----END X509 CRL-----", re.DOTALL)


@dataclass(frozen=True)
class PeerCheck:
    """What is asked of a client's certificate beyond its signature.

    Attributes:
        crls: PEM files of revocation lists.
        allowed_names: subject alternative names (DNS, URI, e-mail, IP address); empty: any.
    """

    crls: tuple[Path, ...] = ()
    allowed_names: frozenset[str] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.crls or self.allowed_names)

    def load(self, authorities: Sequence[Path]) -> None:
        """Read the lists now.

        Args:
            authorities: PEM files of those that sign clients' certificates; each list has to be of one of them.

        Raises:
            StartError: a file that is no list, a list of another authority, or the library that reads them is missing.
        """
        try:
            from cryptography import x509
        except ImportError as error:
            problem = "revocation lists and allowed names need: pip install 'llama31-serve[server,http]'"
            raise StartError(f"{error}; {problem}") from error
        names = ", ".join(str(path) for path in self.crls)
        try:
            self._revoked  # noqa: B018  it is kept
            known = [ca for path in authorities for ca in x509.load_pem_x509_certificates(path.read_bytes())]
        except (OSError, ValueError) as error:
            raise StartError(f"TLS: {names}: not a PEM revocation list ({error})") from error
        for found in self._lists:
            issuers: list[Any] = [ca.public_key() for ca in known if ca.subject == found.issuer]
            if not any(found.is_signature_valid(key) for key in issuers):
                who = found.issuer.rfc4514_string()
                raise StartError(f"TLS: {names}: the list of {who} is of none of the authorities that sign clients")

    def problem_of_pem(self, pem: bytes) -> str | None:
        """Why a certificate is not taken; None if it is."""
        from cryptography import x509

        return self._problem(x509.load_pem_x509_certificate(pem))

    def ssl_object(self) -> type[ssl.SSLObject]:
        """For SSLContext.sslobject_class: a handshake that ends badly for a certificate that is not taken."""
        check = self

        class Checked(ssl.SSLObject):
            def do_handshake(self) -> None:
                from cryptography import x509

                super().do_handshake()
                der = self.getpeercert(True)
                problem = "no certificate" if der is None else check._problem(x509.load_der_x509_certificate(der))
                if problem is not None:
                    raise ssl.SSLCertVerificationError(problem)

        return Checked

    @cached_property
    def _revoked(self) -> frozenset[tuple[Name, int]]:
        """Issuers and serial numbers: two authorities may give the same number."""
        return frozenset((found.issuer, entry.serial_number) for found in self._lists for entry in found)

    @cached_property
    def _lists(self) -> list[CertificateRevocationList]:
        """Every list of every file; a file may have several."""
        from cryptography import x509

        lists = []
        for path in self.crls:
            blocks = _PEM_LIST.findall(path.read_bytes())
            lists += [x509.load_pem_x509_crl(block) for block in blocks or [path.read_bytes()]]
        return lists

    def _problem(self, certificate: Certificate) -> str | None:
        if (certificate.issuer, certificate.serial_number) in self._revoked:
            return "the client's certificate is revoked"
        if self.allowed_names and not self.allowed_names & _names_of(certificate):
            return "the client's certificate has none of the names that may call"
        return None


def _names_of(certificate: Certificate) -> set[str]:
    from cryptography import x509

    try:
        names: Any = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return set()
    return {str(name.value) for name in names}
