"""Content credentials: a signed picture verifies, a changed one does not, bad keys are told in one line."""

import datetime
from pathlib import Path

import pytest
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from data.credentials import Signer, read_credentials
from data.pictures import Look, PictureFormat, encode_picture, read_record
from data.shard_index import DataError


def _name(text: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.COMMON_NAME, text),
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "The Painters"),
        ]
    )


def _certificate(
    subject: str, key: ec.EllipticCurvePublicKey, by: ec.EllipticCurvePrivateKey, root: bool
) -> bytes:
    day, now = datetime.timedelta(days=1), datetime.datetime.now(datetime.UTC)
    begins, ends = now - day, now + 30 * day
    builder = (
        x509.CertificateBuilder()
        .subject_name(_name(subject)).issuer_name(_name("root")).public_key(key)
        .serial_number(x509.random_serial_number()).not_valid_before(begins).not_valid_after(ends)
        .add_extension(x509.BasicConstraints(root, None), critical=True)
        .add_extension(
            x509.KeyUsage(not root, False, False, False, False, root, root, False, False), critical=True
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(by.public_key()), critical=False)
    )  # fmt: skip
    if not root:
        usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION])
        builder = builder.add_extension(usage, critical=False)
    return builder.sign(by, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> Signer:
    folder = tmp_path_factory.mktemp("keys")
    root, mine = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    chain = _certificate("signer", mine.public_key(), root, False) + _certificate(
        "root", root.public_key(), root, True
    )
    (folder / "chain.pem").write_bytes(chain)
    (folder / "key.pem").write_bytes(
        mine.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return Signer(folder / "chain.pem", folder / "key.pem")


@pytest.mark.parametrize("kind", PictureFormat)
def test_a_signed_picture_verifies(kind: PictureFormat, signer: Signer, tmp_path: Path) -> None:
    pixels = torch.arange(3 * 32 * 32).reshape(3, 32, 32).to(torch.uint8)
    plain = encode_picture(pixels, Look(kind), {"prompt": "sea"})
    path = tmp_path / f"a{kind.value}"
    path.write_bytes(plain)
    assert read_credentials(path) is None
    signed = signer.sign(plain, kind.value, {"version": "1", "index": 3})
    assert len(signed) < len(plain) + 8_000
    path.write_bytes(signed)
    found = read_credentials(path)
    assert found is not None
    # Nobody has been told to trust this test's own root, which is all that may be said against it.
    assert (found["state"], found["issuer"]) == ("Valid", "The Painters")
    assert found["problems"] == ["signingCredential.untrusted"]
    record, intact = read_record(path)
    assert intact
    assert record["prompt"] == "sea"


def test_a_changed_byte_is_found(signer: Signer, tmp_path: Path) -> None:
    pixels = torch.randint(0, 256, (3, 32, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    signed = bytearray(signer.sign(encode_picture(pixels, Look(), {}), ".png", {}))
    signed[-200] ^= 1
    (tmp_path / "a.png").write_bytes(signed)
    found = read_credentials(tmp_path / "a.png")
    assert found is not None
    assert found["state"] == "Invalid"
    assert "assertion.dataHash.mismatch" in found["problems"]


def test_keys_that_cannot_sign(signer: Signer, tmp_path: Path) -> None:
    picture = encode_picture(torch.zeros(3, 8, 8, dtype=torch.uint8), Look(), {})
    with pytest.raises(DataError, match=r"credentials: .*none.pem: No such file or directory; give the PEM"):
        Signer(tmp_path / "none.pem", signer.key).sign(picture, ".png", {})
    with pytest.raises(DataError, match=r"cannot sign .* give a chain with a certificate for signing"):
        Signer(signer.key, signer.certificate).sign(picture, ".png", {})
    with pytest.raises(ValueError, match="algorithm is rsa, but must be one of es256"):
        Signer(signer.certificate, signer.key, "rsa")
