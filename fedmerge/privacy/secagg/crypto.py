"""The cryptography of a secure sum: key pairs, agreed keys, masks, shares of secrets, sealed messages.

Nothing here is our own: X25519, HKDF-SHA-256, AES-256 in counter mode and AES-256-GCM of ``cryptography``, and Shamir's
shares of ``pycryptodome`` (Flower depends on both, too). The latter shares 16 bytes, so secrets have 128 bits, as much
as X25519 is worth. They come from the operating system and never from the experiment's seed, which all know.
"""

import secrets
from collections.abc import Mapping

import numpy as np
from Crypto.Protocol.SecretSharing import Shamir
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedmerge.errors import AggregationError
from fedmerge.privacy.secagg.session import Integers

SECRET_BYTES = 16
PUBLIC_BYTES = 32
_NONCE_BYTES = 12


def new_secret() -> bytes:
    """16 random bytes."""
    return secrets.token_bytes(SECRET_BYTES)


def public_key(secret: bytes) -> bytes:
    """The X25519 public key, 32 bytes, of the private key that a secret stands for."""
    return _private_key(secret).public_key().public_bytes_raw()


def agreed_key(secret: bytes, public: bytes, *bound_to: bytes) -> bytes:
    """The 32 bytes that both owners of two key pairs can compute, and nobody else.

    Args:
        secret: one's own.
        public: the other's public key.
        bound_to: other keys come out for other purposes, sessions and pairs.

    Raises:
        AggregationError: a public key that is none, or makes a key that all know.
    """
    try:
        shared = _private_key(secret).exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:
        raise AggregationError(
            f"secure sum: found a public key that X25519 refuses ({error}), expected {PUBLIC_BYTES} bytes of a key of "
            "its own; leave this client out"
        ) from error
    return _derived(shared, b"agreed", *bound_to)


def mask(secret: bytes, num_values: int, *bound_to: bytes) -> Integers:
    """Uniform integers modulo 2^32 from a secret: the key stream of AES-256 in counter mode.

    Args:
        secret: 16 or 32 bytes, of which all the randomness comes.
        num_values: how many.
        bound_to: other masks come out for other purposes and sessions.

    Returns:
        (num_values,).
    """
    key = _derived(secret, b"mask", *bound_to)
    stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
    return np.frombuffer(stream.update(bytes(4 * num_values)), dtype="<u4").astype(np.uint32, copy=False)


def shares_of(secret: bytes, threshold: int, num_shares: int) -> list[bytes]:
    """Shamir's shares, 16 bytes each, for the numbers 1 to num_shares; any ``threshold`` of them give the secret."""
    return [bytes(share) for _, share in Shamir.split(threshold, num_shares, secret, False)]


def secret_of(shares: Mapping[int, bytes], threshold: int) -> bytes:
    """The secret of at least ``threshold`` shares by number; those with the lowest numbers are used.

    Raises:
        AggregationError: too few.
    """
    if len(shares) < threshold:
        raise AggregationError(
            f"secure sum: found {len(shares)} shares of a secret, expected at least {threshold}; start again when more "
            "clients are there"
        )
    return bytes(Shamir.combine(sorted(shares.items())[:threshold], False))


def sealed(key: bytes, text: bytes, about: bytes) -> bytes:
    """Text that only the owner of the key can read, and nobody can change, nor what it is about."""
    nonce = secrets.token_bytes(_NONCE_BYTES)
    return nonce + AESGCM(key).encrypt(nonce, text, about)


def opened(key: bytes, box: bytes, about: bytes) -> bytes:
    """Inverse of :func:`sealed`.

    Raises:
        AggregationError: it was changed, or sealed by somebody else or about something else.
    """
    try:
        return AESGCM(key).decrypt(box[:_NONCE_BYTES], box[_NONCE_BYTES:], about)
    except (InvalidTag, ValueError) as error:
        raise AggregationError(
            "secure sum: found a message that was not sealed for this client in this session, expected shares as "
            "another client sealed them; it was changed on the way, or belongs elsewhere. Start again"
        ) from error


def _private_key(secret: bytes) -> X25519PrivateKey:
    return X25519PrivateKey.from_private_bytes(_derived(secret, b"private key"))


def _derived(secret: bytes, *bound_to: bytes) -> bytes:
    info = b"".join(len(part).to_bytes(4, "big") + part for part in (b"fedmerge secure sum", *bound_to))
    return HKDF(SHA256(), 32, salt=None, info=info).derive(secret)
