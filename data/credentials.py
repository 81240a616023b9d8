"""Content credentials (C2PA): a signed statement inside a picture's file of what made it.

Whoever holds a signing certificate can say, so that others can check it, that a picture was made by a trained
model and has not been changed since. Certificates are the user's own: a PEM file with the chain, the signer's
first, and its private key. The format is the library's business, c2pa-python.
"""

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from data.shard_index import DataError

MIME = {".png": "image/png", ".jpg": "image/jpeg", ".webp": "image/webp"}
#: IPTC's word for pictures that a model made.
MADE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
NAME = "Firstlight"
#: A thumbnail would be many times as large as the picture.
WITHOUT_THUMBNAIL = {"builder": {"thumbnail": {"enabled": False}}}
#: What the kind of key is called by what its PEM says.
ALGORITHMS = ("es256", "ps256", "ed25519", "es384", "es512")


@dataclass(frozen=True)
class Signer:
    """Signs pictures. `certificate` is a PEM chain, `key` its private key in PEM, `algorithm` such as es256.

    Raises DataError where they cannot be read or do not fit together, when the first picture is signed.
    """

    certificate: Path
    key: Path
    algorithm: str = "es256"

    def __post_init__(self) -> None:
        if self.algorithm not in ALGORITHMS:
            raise ValueError(f"algorithm is {self.algorithm}, but must be one of {', '.join(ALGORITHMS)}")

    def sign(self, picture: bytes, suffix: str, record: Mapping[str, Any]) -> bytes:
        """Returns the file's bytes with the statement and its signature inside."""
        import c2pa

        try:
            chain, key = self.certificate.read_bytes(), self.key.read_bytes()
        except OSError as error:
            raise DataError(f"credentials: {error.filename}: {error.strerror}; give the PEM files") from None
        manifest = {
            "claim_generator_info": [{"name": NAME, "version": str(record.get("version", ""))}],
            "title": f"picture {record.get('index', 0)}",
            "assertions": [
                {
                    "label": "c2pa.actions.v2",
                    "data": {"actions": [{"action": "c2pa.created", "digitalSourceType": MADE}]},
                }
            ],
        }
        try:
            info = c2pa.C2paSignerInfo(self.algorithm.encode(), chain, key, None)
            result = io.BytesIO()
            settings = c2pa.Settings.from_dict(WITHOUT_THUMBNAIL)
            context = c2pa.Context(settings)
            with (
                c2pa.Signer.from_info(info) as signer,
                c2pa.Builder(json.dumps(manifest), context) as builder,
            ):
                builder.sign(signer, MIME[suffix], io.BytesIO(picture), result)
        except c2pa.C2paError as error:
            raise DataError(
                f"credentials: {self.certificate} and {self.key} cannot sign ({error}); give a chain with a "
                "certificate for signing documents, its key, and the algorithm of that key"
            ) from None
        return result.getvalue()


def read_credentials(path: Path) -> dict[str, Any] | None:
    """Returns `state` ("Valid", "Trusted", "Invalid"), `issuer` and `problems`; None without credentials."""
    import c2pa

    with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as image:
        mime = Image.MIME[str(image.format)]
    try:
        with path.open("rb") as stream, c2pa.Reader(mime, stream) as reader:
            found = json.loads(reader.json())
    except c2pa.C2paError as error:
        if "ManifestNotFound" in str(error):
            return None
        return {"state": "Invalid", "issuer": None, "problems": [str(error)]}
    active = found.get("manifests", {}).get(found.get("active_manifest"), {})
    problems = [str(each.get("code")) for each in found.get("validation_status", [])]
    issuer = active.get("signature_info", {}).get("issuer")
    return {"state": found.get("validation_state"), "issuer": issuer, "problems": problems}
