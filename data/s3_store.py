"""Objects of S3, and of what speaks like it (`AWS_ENDPOINT_URL`), by boto3.

boto3's own retries are off, and it is imported when a store is made. Use: `data.remote.download`.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from data.store import CHUNK, LATER, NETWORK, POOL, StoreError, Stream, changed, refuse, whole_size

#: Error codes that mean a refusal, whatever status they come with.
DENIED = ("ExpiredToken", "InvalidToken", "TokenRefreshRequired", "RequestTimeTooSkewed")
SECRETS = (
    "the credentials are those of AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (AWS_SESSION_TOKEN where "
    "temporary) or of AWS_PROFILE, else of the machine's role: set or renew them, and allow s3:GetObject and "
    "s3:ListBucket"
)


class S3Store:
    """Objects of S3 and what speaks like it (`AWS_ENDPOINT_URL`); timeouts in seconds without progress.

    Requests are signed with what boto3 finds (environment, profile, role); where it finds nothing they go
    unsigned, as public buckets want them.
    """

    def __init__(self, connect_timeout: float = 10.0, read_timeout: float = 30.0) -> None:
        import boto3
        from botocore import UNSIGNED
        from botocore.config import Config

        with _boto_errors():
            session = boto3.session.Session()
            signed = session.get_credentials() is not None
            self._client = session.client(
                "s3",
                config=Config(
                    connect_timeout=connect_timeout,
                    read_timeout=read_timeout,
                    retries={"total_max_attempts": 1},
                    signature_version=None if signed else UNSIGNED,
                    response_checksum_validation="when_required",
                    max_pool_connections=POOL,
                ),
            )

    def open(self, address: str, start: int = 0, version: str = "") -> Stream:
        """Returns the object from `start` on (Range, If-Match)."""
        bucket, key = split_s3(address)
        wanted: dict[str, Any] = {"Range": f"bytes={start}-", "IfMatch": version} if start else {}
        with _boto_errors():
            answer = self._client.get_object(Bucket=bucket, Key=key, **wanted)
        body, status = answer["Body"], answer["ResponseMetadata"]["HTTPStatusCode"]
        try:
            whole = answer["ContentLength"]
            if status == 206:
                whole = whole_size(answer.get("ContentRange", ""), start, status)
                if answer.get("ETag", "") != version:
                    changed(status)
        except BaseException:
            body.close()
            raise
        return Stream(
            chunks=_boto_chunks(body, status),
            start=start if status == 206 else 0,
            size=whole,
            version=answer.get("ETag", ""),
            content_type=answer.get("ContentType", ""),
            ends=True,
            close=body.close,
        )

    def list(self, bucket: str, prefix: str, delimiter: str) -> list[str]:
        """Returns the keys that begin with `prefix`, without those that have `delimiter` further on."""
        pages = self._client.get_paginator("list_objects_v2")
        keys: list[str] = []
        with _boto_errors():
            for page in pages.paginate(Bucket=bucket, Prefix=prefix, Delimiter=delimiter):
                keys += [item["Key"] for item in page.get("Contents", ())]
        return keys


def split_s3(address: str) -> tuple[str, str]:
    """Returns (bucket, key) of `s3://bucket/key`; raises StoreError where the bucket is no name."""
    bucket, _, key = address.partition("://")[2].partition("/")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}", bucket):
        raise StoreError("no address of S3", "write s3://bucket/path/00000.tar")
    return bucket, key


def _boto_chunks(body: Any, status: int) -> Iterator[bytes]:
    with _boto_errors(status):
        yield from body.iter_chunks(CHUNK)


@contextmanager
def _boto_errors(status: int | None = None) -> Iterator[None]:
    """Turns what boto3 raises into StoreError."""
    from botocore import exceptions

    try:
        yield
    except exceptions.ClientError as error:
        meta = error.response.get("ResponseMetadata", {})
        code = error.response.get("Error", {}).get("Code", "")
        answered = 403 if code in DENIED else meta.get("HTTPStatusCode", 0)
        refuse(answered, "" if code.isdecimal() else code, meta.get("HTTPHeaders", {}), SECRETS)
    except exceptions.SSLError as error:
        raise StoreError("no secure connection", "trust its authority by AWS_CA_BUNDLE") from error
    except exceptions.IncompleteReadError as error:
        raise StoreError("short body: the connection ended early", LATER, status, retry=True) from error
    except (exceptions.ReadTimeoutError, exceptions.ConnectTimeoutError) as error:
        raise StoreError("no data within the time limit", LATER, status, retry=True) from error
    except (exceptions.HTTPClientError, exceptions.ConnectionError) as error:
        raise StoreError(
            f"the connection broke ({type(error).__name__})", NETWORK, status, retry=True
        ) from error
    except (exceptions.BotoCoreError, ValueError) as error:  # ValueError: an endpoint that is no address
        raise StoreError(f"S3 cannot be asked ({' '.join(str(error).split())})", SECRETS) from error
