"""WeChat Pay's seal: its keys, whether it signed something, and what it encrypted for us.

Sources, at pay.weixin.qq.com: docs/merchant/development/interface-rules/signature-verification.html (the
platform's public key), docs/merchant/products/notification/introduction.html (notifications). Five minutes
are what the platform's own libraries grant a signature.

The cryptography is wechatpayv3's. Its own reading of notifications is not used: it never looks at the time,
reads other spellings of the headers before the documented ones, trusts certificates that it downloads beside
the configured key, and does not say whether a notification is forged or merely not understood.
"""

from collections.abc import Callable, Mapping
from typing import Any, Final

import orjson
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, RSAPublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)
from wechatpayv3.async_.utils import aes_decrypt, rsa_verify

from plugins.billing.model import WechatpaySection
from plugins.billing.providers.wechatpay_objects import Resource
from server.clock import Clock
from server.errors import Code, Problem
from server.i18n import N_

SIGNATURE_HEADER: Final = "Wechatpay-Signature"
TOLERANCE_S: Final = 300
API_V3_KEY_BYTES: Final = 32


class Seal:
    """Tells what the platform signed, with the public key it gave to this merchant."""

    def __init__(self, section: WechatpaySection, public_key: RSAPublicKey, clock: Clock) -> None:
        self._public_key_id = section.public_key_id
        self._api_v3_key = section.api_v3_key
        self._public_key = public_key
        self._clock = clock

    def is_on(self, headers: Mapping[str, str], body: bytes) -> bool:
        """Whether the platform signed this body at most 300 s from now, either way."""
        signed_at = headers.get("Wechatpay-Timestamp", "")
        is_time = signed_at.isascii() and signed_at.isdigit() and len(signed_at) <= 12
        if not is_time or abs(self._clock.now().timestamp() - int(signed_at)) > TOLERANCE_S:
            return False
        if headers.get("Wechatpay-Serial") != self._public_key_id:
            return False
        nonce, signature = headers.get("Wechatpay-Nonce", ""), headers.get(SIGNATURE_HEADER, "")
        try:
            is_genuine: bool = rsa_verify(signed_at, nonce, body.decode(), signature, self._public_key)
        except UnicodeError:
            return False
        return is_genuine

    def opened(self, resource: Resource) -> Any:
        """What is encrypted, as JSON. Raises Problem(invalid), orjson.JSONDecodeError."""
        try:
            text: str | None = aes_decrypt(
                resource.nonce, resource.ciphertext, resource.associated_data, self._api_v3_key
            )
        except ValueError:
            text = None
        if text is None:
            sentence = N_("This cannot be decrypted with billing.providers.wechatpay.api_v3_key.")
            raise Problem(Code.INVALID, errors=[("resource", sentence)])
        return orjson.loads(text)


def private_key_in(pem: str) -> str | None:
    """An RSA key in the one form of PEM that the library takes, or None where it cannot be read."""
    key = _read(lambda encoded: load_pem_private_key(encoded, None), pem)
    if not isinstance(key, RSAPrivateKey):
        return None
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()


def public_key_in(pem: str) -> RSAPublicKey | None:
    """An RSA key, or None where it cannot be read."""
    key = _read(load_pem_public_key, pem)
    return key if isinstance(key, RSAPublicKey) else None


def public_pem(key: RSAPublicKey) -> str:
    """The key in the one form of PEM that the library takes."""
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def _read(read: Callable[[bytes], object], pem: str) -> object:
    try:
        return read(pem.encode())
    except (ValueError, TypeError, UnsupportedAlgorithm):
        return None
