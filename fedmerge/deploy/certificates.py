"""The federation's certificate authority and the certificates that it issues to the server and the operator."""

import hashlib
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedmerge.errors import DeploymentError

AUTHORITY_DAYS = 3650
CERTIFICATE_DAYS = 397
CLOCK_SKEW = timedelta(hours=1)  # a client whose clock is slightly slow must not refuse a new certificate
LOCAL_HOSTS = ("localhost", "127.0.0.1")  # addresses by which the server's own processes connect


@dataclass(frozen=True)
class Issued:
    """A certificate with its private key.

    Attributes:
        certificate: PEM.
        key: PEM, PKCS #8, not encrypted.
    """

    certificate: bytes
    key: bytes


def new_authority(name: str) -> Issued:
    """Create a certificate authority for one federation (ECDSA P-384); it cannot sign other authorities."""
    key = ec.generate_private_key(ec.SECP384R1())
    subject = _named(f"fedmerge federation {name}")
    builder = _builder(subject, subject, key.public_key(), AUTHORITY_DAYS)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_key_usage(authority=True), critical=True)
    return _issued(builder.sign(key, hashes.SHA384()), key)


def issue(authority: Issued, name: str, purpose: Literal["server", "client"], hosts: Sequence[str] = ()) -> Issued:
    """Issue a certificate (ECDSA P-384) for one purpose.

    Args:
        authority: the authority that signs.
        name: common name of the subject.
        purpose: a server's certificate cannot be used as a client's, nor the other way round.
        hosts: names and addresses of the server that the certificate covers.

    Raises:
        DeploymentError: the authority's key is of another kind.
    """
    signer = x509.load_pem_x509_certificate(authority.certificate)
    signing_key = serialization.load_pem_private_key(authority.key, password=None)
    if not isinstance(signing_key, ec.EllipticCurvePrivateKey):
        raise DeploymentError(
            f"ca/ca.key: found {type(signing_key).__name__}, expected an ECDSA P-384 key. Restore the file."
        )
    key = ec.generate_private_key(ec.SECP384R1())
    builder = _builder(_named(name), signer.subject, key.public_key(), CERTIFICATE_DAYS)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_key_usage(authority=False), critical=True)
    usage = ExtendedKeyUsageOID.SERVER_AUTH if purpose == "server" else ExtendedKeyUsageOID.CLIENT_AUTH
    builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(signing_key.public_key())
    builder = builder.add_extension(issuer, critical=False)
    if hosts:
        names = x509.SubjectAlternativeName([_general_name(host) for host in hosts])
        builder = builder.add_extension(names, critical=False)
    return _issued(builder.sign(signing_key, hashes.SHA384()), key)


def check_host(host: str) -> str:
    """Return a host name or IP address in the form that certificates use.

    Raises:
        DeploymentError: ``host`` is neither.
    """
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        pass
    labels = host.rstrip(".").split(".")
    characters = set("abcdefghijklmnopqrstuvwxyz0123456789-")
    well_formed = all(0 < len(label) <= 63 and set(label.lower()) <= characters for label in labels)
    if not well_formed or any(label[0] == "-" or label[-1] == "-" for label in labels) or labels[-1].isdigit():
        raise DeploymentError(
            f"--host {host!r}: expected a host name or an IP address without port, for example fl.example.org."
        )
    return host.rstrip(".").lower()


def expires(certificate: Path) -> datetime:
    """Return the time at which a certificate expires, UTC."""
    return _read(certificate).not_valid_after_utc


def sha1_fingerprint(certificate: Path) -> str:
    """Return the SHA-1 of a certificate's DER form, hexadecimal, by which nginx identifies client certificates."""
    return _read(certificate).fingerprint(hashes.SHA1()).hex()


def sha256_fingerprint(certificate: Path) -> str:
    """Return the SHA-256 of a certificate's DER form, hexadecimal, which operator and organisation compare."""
    return _read(certificate).fingerprint(hashes.SHA256()).hex()


def read_public_key(path: Path) -> tuple[str, str]:
    """Read an organisation's public key: OpenSSH, ECDSA on a NIST curve, as Flower requires.

    Returns:
        The key in one line without its comment, and the SHA-256 of its DER form, hexadecimal.

    Raises:
        DeploymentError: the file is missing, or holds another kind of key or a private key.
    """
    remedy = "The organisation makes it with 'fedmerge client init' and sends key.pub, never key."
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DeploymentError(f"{path}: cannot be read ({error.strerror}), expected a public key. {remedy}") from error
    if b"PRIVATE KEY" in data:
        raise DeploymentError(f"{path}: holds a private key, which must never leave its organisation. {remedy}")
    try:
        key = serialization.load_ssh_public_key(data)
    except Exception as error:  # several libraries raise here
        raise DeploymentError(f"{path}: not an OpenSSH public key ({type(error).__name__}). {remedy}") from error
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise DeploymentError(
            f"{path}: found a key of type {data.split()[0].decode(errors='replace')}, expected ecdsa-sha2-nistp384. "
            f"{remedy}"
        )
    line = key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return line, hashlib.sha256(der).hexdigest()


def _read(certificate: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(certificate.read_bytes())
    except (OSError, ValueError) as error:
        raise DeploymentError(
            f"{certificate}: not a certificate ({error}). Restore the file, or issue new ones: fedmerge deploy renew."
        ) from error


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _builder(
    subject: x509.Name, issuer: x509.Name, public_key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def _key_usage(authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=authority,
        crl_sign=authority,
        encipher_only=False,
        decipher_only=False,
    )


def _issued(certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> Issued:
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return Issued(certificate.public_bytes(serialization.Encoding.PEM), private)
