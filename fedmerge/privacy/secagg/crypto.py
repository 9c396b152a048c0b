"""The cryptography of a secure sum: key pairs, agreed keys, masks, shares of secrets, sealed messages.

All primitives are standard: X25519, HKDF-SHA-256, AES-256 in counter mode and AES-256-GCM of ``cryptography``, and
Shamir's shares of ``pycryptodome`` (Flower also depends on both). The latter shares 16 bytes, so secrets have 128 bits,
the security level of X25519. They come from the operating system, never from the experiment's seed, which is public.
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
    """Return 16 random bytes."""
    return secrets.token_bytes(SECRET_BYTES)


def public_key(secret: bytes) -> bytes:
    """Return the X25519 public key, 32 bytes, of the private key derived from a secret."""
    return _private_key(secret).public_key().public_bytes_raw()


def agree_on_key(secret: bytes, public: bytes, *bound_to: bytes) -> bytes:
    """Return the 32 bytes that only the owners of two key pairs can compute.

    Args:
        secret: secret of this side.
        public: public key of the other side.
        bound_to: purpose, session and pair; different values give different keys.

    Raises:
        AggregationError: the public key is invalid, or gives a key that everyone knows.
    """
    try:
        shared = _private_key(secret).exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:
        raise AggregationError(
            f"secure sum: found a public key that X25519 refuses ({error}), expected {PUBLIC_BYTES} bytes of a fresh "
            "key; exclude this client"
        ) from error
    return _derived(shared, b"agreed", *bound_to)


def mask(secret: bytes, num_values: int, *bound_to: bytes) -> Integers:
    """Expand a secret to uniform integers modulo 2^32: the key stream of AES-256 in counter mode.

    Args:
        secret: 16 or 32 bytes, the only source of randomness.
        num_values: number of integers.
        bound_to: purpose and session; different values give different masks.

    Returns:
        (num_values,).
    """
    key = _derived(secret, b"mask", *bound_to)
    stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
    return np.frombuffer(stream.update(bytes(4 * num_values)), dtype="<u4").astype(np.uint32, copy=False)


def split_secret(secret: bytes, threshold: int, num_shares: int) -> list[bytes]:
    """Split a secret into Shamir's shares of 16 bytes, numbered from 1; any ``threshold`` of them restore it."""
    return [bytes(share) for _, share in Shamir.split(threshold, num_shares, secret, False)]


def restore_secret(shares: Mapping[int, bytes], threshold: int) -> bytes:
    """Restore a secret from at least ``threshold`` shares by number; those with the lowest numbers are used.

    Raises:
        AggregationError: too few shares.
    """
    if len(shares) < threshold:
        raise AggregationError(
            f"secure sum: found {len(shares)} shares of a secret, expected at least {threshold}; start again when more "
            "clients are connected"
        )
    return bytes(Shamir.combine(sorted(shares.items())[:threshold], False))


def seal(key: bytes, text: bytes, about: bytes) -> bytes:
    """Encrypt and authenticate a text and its purpose with a key."""
    nonce = secrets.token_bytes(_NONCE_BYTES)
    return nonce + AESGCM(key).encrypt(nonce, text, about)


def unseal(key: bytes, box: bytes, about: bytes) -> bytes:
    """Decrypt and verify the result of :func:`seal`.

    Raises:
        AggregationError: the message was changed, or sealed with another key or for another purpose.
    """
    try:
        return AESGCM(key).decrypt(box[:_NONCE_BYTES], box[_NONCE_BYTES:], about)
    except (InvalidTag, ValueError) as error:
        raise AggregationError(
            "secure sum: found a message that was not sealed for this client in this session, expected the sealed "
            "shares of another client; it was changed on the way, or belongs to another session. Start again"
        ) from error


def _private_key(secret: bytes) -> X25519PrivateKey:
    return X25519PrivateKey.from_private_bytes(_derived(secret, b"private key"))


def _derived(secret: bytes, *bound_to: bytes) -> bytes:
    info = b"".join(len(part).to_bytes(4, "big") + part for part in (b"fedmerge secure sum", *bound_to))
    return HKDF(SHA256(), 32, salt=None, info=info).derive(secret)
