"""Whose client certificate is taken: not revoked, and one of the names that are allowed. For gRPC and HTTP alike."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llama31_serve.errors import StartError

if TYPE_CHECKING:
    from cryptography.x509 import Certificate


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

    def load(self) -> None:
        """Read the lists now. Raises StartError for a file that is none, or without the library that reads them."""
        try:
            import cryptography.x509  # noqa: F401
        except ImportError as error:
            problem = "revocation lists and allowed names need: pip install 'llama31-serve[server,http]'"
            raise StartError(f"{error}; {problem}") from error
        try:
            self._revoked  # noqa: B018  it is kept
        except (OSError, ValueError) as error:
            names = ", ".join(str(path) for path in self.crls)
            raise StartError(f"TLS: {names}: not a PEM revocation list ({error})") from error

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
    def _revoked(self) -> frozenset[int]:
        from cryptography import x509

        lists = [x509.load_pem_x509_crl(path.read_bytes()) for path in self.crls]
        return frozenset(entry.serial_number for found in lists for entry in found)

    def _problem(self, certificate: Certificate) -> str | None:
        if certificate.serial_number in self._revoked:
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
