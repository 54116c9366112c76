"""s3://bucket/key: lists, small writes, and who asks for a range.

Law: the environment says who we are (boto3's chain: variables, profile, the machine's role), and a secret stays in
the headers of a request: no address ever holds one. Without any credentials the requests are unsigned, as public
buckets want them.

boto3 finds endpoint, region and credentials, lists and writes. Ranges are read like any other web address
(http.py), signed by botocore, so that time limits, retries and checks are the same for every store.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote, urlsplit

import boto3
from botocore import UNSIGNED
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.client import Config
from botocore.exceptions import BotoCoreError, ClientError

from vmamba_dist.config.addresses import redact
from vmamba_dist.config.schema import ConfigError
from vmamba_dist.data.http import AttemptError
from vmamba_dist.data.remote import Item
from vmamba_dist.data.sources import SourceError

# What botocore ends in; a RuntimeError is a role's new credentials that have expired, an OSError a token's file that
# is not there.
_FAILURES = (BotoCoreError, ClientError, RuntimeError, OSError)


class S3:
    """One account's buckets. Credentials are found once, and inherited by forks."""

    def __init__(self, endpoint_url: str = "", timeout_s: float = 30.0) -> None:
        """Raises ConfigError where the environment's settings cannot be used."""
        try:
            self._session = boto3.Session()
            self._credentials = self._session.get_credentials()
            self._client = self._make_client(endpoint_url or None, None, timeout_s)
        except (BotoCoreError, ValueError) as error:
            raise ConfigError(
                f"s3: the environment's AWS settings cannot be used: {redact(str(error))}"
            ) from None
        self._own_endpoint = urlsplit(self._client.meta.endpoint_url).hostname or ""
        self._is_amazon = "amazonaws.com" in self._own_endpoint
        self._timeout_s = timeout_s
        self._buckets: dict[str, tuple[str, str]] = {}  # bucket → base URL, region

    def request(self, address: str) -> tuple[str, Mapping[str, str]]:
        """Raises AttemptError where credentials that have to be renewed cannot be."""
        bucket, key = split(address)
        base, region = self._bucket(bucket)
        request = AWSRequest(method="GET", url=f"{base}/{quote(key, safe='/-_.~')}")
        if self._credentials is not None:
            # Frozen: a role's are renewed as they are read, and key and token must be of one time.
            try:
                frozen = self._credentials.get_frozen_credentials()
            except _FAILURES as error:  # a machine's metadata service misses a moment, as any server does
                raise AttemptError(f"the credentials cannot be renewed: {redact(str(error))}") from None
            S3SigV4Auth(frozen, "s3", region).add_auth(request)
        return request.url, dict(request.headers.items())

    def list(self, address: str, beginning: str = "") -> Iterator[Item]:
        """Yield the objects right below an address whose names begin so. Raises SourceError."""
        bucket, prefix = split(address)
        prefix = prefix.rstrip("/") + "/" if prefix else ""
        try:
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=bucket, Prefix=prefix + beginning, Delimiter="/"
            )
            for page in pages:
                for entry in page.get("Contents", ()):
                    yield Item(f"s3://{bucket}/{entry['Key']}", int(entry["Size"]), entry["ETag"])
        except _FAILURES as error:
            raise SourceError(f"{address} cannot be listed: {redact(str(error))}") from None

    def write(self, address: str, data: bytes) -> None:
        """Write a small object. Raises SourceError."""
        bucket, key = split(address)
        try:
            self._client.put_object(Bucket=bucket, Key=key, Body=data)
        except _FAILURES as error:
            raise SourceError(f"{address} cannot be written: {redact(str(error))}") from None

    def _bucket(self, bucket: str) -> tuple[str, str]:
        found = self._buckets.get(bucket)
        if found is None:
            region = self._client.meta.region_name
            region = region if region not in (None, "aws-global") else "us-east-1"
            endpoint = self._client.meta.endpoint_url
            if self._is_amazon and (own := self._region_of(bucket)) != region:
                region = own
                endpoint = self._make_client(None, region, self._timeout_s).meta.endpoint_url
            if self._is_amazon and "." not in bucket:
                endpoint = endpoint.replace("://", f"://{bucket}.", 1)
            else:
                endpoint = f"{endpoint.rstrip('/')}/{bucket}"
            found = self._buckets[bucket] = (endpoint, region)
        return found

    def _region_of(self, bucket: str) -> str:
        """Ask in which region a bucket is. Raises SourceError where that is not told."""
        try:
            answer = self._client.head_bucket(Bucket=bucket)["ResponseMetadata"]
        except ClientError as error:
            answer = error.response.get("ResponseMetadata", {})
            if "x-amz-bucket-region" not in answer.get("HTTPHeaders", {}):
                raise SourceError(f"s3://{bucket} cannot be reached: {redact(str(error))}") from None
        except _FAILURES as error:
            raise SourceError(f"s3://{bucket} cannot be reached: {redact(str(error))}") from None
        return str(answer["HTTPHeaders"].get("x-amz-bucket-region", "us-east-1"))

    def _make_client(self, endpoint_url: str | None, region: str | None, timeout_s: float) -> Any:
        config = Config(
            connect_timeout=min(10.0, timeout_s),
            read_timeout=timeout_s,
            retries={"mode": "standard", "max_attempts": 5},
            signature_version=UNSIGNED if self._credentials is None else None,
        )
        return self._session.client("s3", endpoint_url=endpoint_url, region_name=region, config=config)


def split(address: str) -> tuple[str, str]:
    """s3://bucket/some/key → (bucket, some/key). Raises ConfigError where there is no bucket."""
    bucket, _, key = address.removeprefix("s3://").partition("/")
    if not bucket:
        raise ConfigError(f"{address!r} names no bucket: write s3://bucket/prefix")
    return bucket, key
