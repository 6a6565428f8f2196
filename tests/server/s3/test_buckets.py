"""Buckets and listings through unmodified boto3."""

from __future__ import annotations

from typing import Any

import pytest

TREE = ["a", "a/b", "a/c/d", "a/c/e", "b/1", "b/2", "b0", "ü/x", "\ue000", "\U0001f3bb"]


@pytest.fixture
def tree(service: Any, bucket: str) -> str:
    for key in TREE:
        service.client().put_object(Bucket=bucket, Key=key, Body=b"x")
    return bucket


def names(answer: dict[str, Any]) -> tuple[list[str], list[str]]:
    contents = [each["Key"] for each in answer.get("Contents", [])]
    return contents, [each["Prefix"] for each in answer.get("CommonPrefixes", [])]


def test_bucket_is_created_and_deleted(either: Any, refused: Any) -> None:
    client = either.client()
    name = f"life-{either.url[:5].strip(':')}"
    answer = client.create_bucket(
        Bucket=name, CreateBucketConfiguration={"LocationConstraint": "eu-west-1"}
    )
    assert answer["Location"] == f"/{name}"
    assert refused(client.create_bucket, Bucket=name) == ("BucketAlreadyOwnedByYou", 409)
    assert client.head_bucket(Bucket=name)["BucketRegion"] == "us-east-1"
    assert client.get_bucket_location(Bucket=name)["LocationConstraint"] is None
    assert name in [each["Name"] for each in client.list_buckets()["Buckets"]]
    client.put_object(Bucket=name, Key="k", Body=b"x")
    assert refused(client.delete_bucket, Bucket=name) == ("BucketNotEmpty", 409)
    client.delete_object(Bucket=name, Key="k")
    client.create_multipart_upload(Bucket=name, Key="never completed")
    client.delete_bucket(Bucket=name)
    assert refused(client.head_bucket, Bucket=name) == ("404", 404)
    assert refused(client.delete_bucket, Bucket=name) == ("NoSuchBucket", 404)


@pytest.mark.parametrize(
    "name", ["ab", "Upper", "a_b", "a..b", "-ab", "1.2.3.4", "x" * 64, "metrics"]
)
def test_invalid_bucket_name_is_rejected(service: Any, name: str) -> None:
    from luthier.errors import ObjectRefused

    with pytest.raises(ObjectRefused) as caught:
        service.objects.create_bucket("000000000001", name)
    assert caught.value.rule == "InvalidBucketName"


def test_bucket_is_hidden_from_foreign_account(service: Any, bucket: str) -> None:
    from botocore.exceptions import ClientError

    service.client().put_object(Bucket=bucket, Key="k", Body=b"secret")
    other = service.client("AKTWO")
    calls = [
        (other.get_object, {"Key": "k"}), (other.put_object, {"Key": "k", "Body": b"x"}),
        (other.list_objects_v2, {}), (other.delete_bucket, {}), (other.delete_object, {"Key": "k"}),
        (other.create_multipart_upload, {"Key": "k"}),
    ]  # fmt: skip
    for call, arguments in calls:
        codes = []
        for name in (bucket, "never-was"):
            with pytest.raises(ClientError) as caught:
                call(Bucket=name, **arguments)
            codes.append(caught.value.response["Error"])
        assert codes[0] == codes[1] and codes[0]["Code"] == "NoSuchBucket"
    assert bucket not in [each["Name"] for each in other.list_buckets()["Buckets"]]
    other.create_bucket(Bucket=bucket)
    other.put_object(Bucket=bucket, Key="k", Body=b"mine")
    assert service.client().get_object(Bucket=bucket, Key="k")["Body"].read() == b"secret"


def test_pages_of_keys(service: Any, tree: str) -> None:
    client = service.client()
    for size in (1, 2, 3, 1000):
        pages = client.get_paginator("list_objects_v2").paginate(
            Bucket=tree, PaginationConfig={"PageSize": size}
        )
        found = [names(page) for page in pages]
        assert [key for keys, _ in found for key in keys] == TREE
        assert all(len(keys) == size for keys, _ in found[:-1])
        pages = client.get_paginator("list_objects").paginate(
            Bucket=tree, PaginationConfig={"PageSize": size}
        )
        assert [key for page in pages for key in names(page)[0]] == TREE


def test_listing_continues_after_changes_between_pages(service: Any, tree: str) -> None:
    client = service.client()
    first = client.list_objects_v2(Bucket=tree, MaxKeys=3)
    assert names(first)[0] == TREE[:3] and first["IsTruncated"]
    client.put_object(Bucket=tree, Key="A", Body=b"before")
    client.delete_object(Bucket=tree, Key=TREE[3])
    rest = client.list_objects_v2(Bucket=tree, ContinuationToken=first["NextContinuationToken"])
    assert names(rest)[0] == TREE[4:] and not rest["IsTruncated"]


@pytest.mark.parametrize(
    ("asked", "keys", "prefixes"),
    [
        ({"Delimiter": "/"}, ["a", "b0", "\U0001f3bb", "\ue000"], ["a/", "b/", "ü/"]),
        ({"Delimiter": "/", "Prefix": "a/"}, ["a/b"], ["a/c/"]),
        ({"Prefix": "a/"}, ["a/b", "a/c/d", "a/c/e"], []),
        ({"Delimiter": "/c/"}, [key for key in TREE if "/c/" not in key], ["a/c/"]),
        ({"Prefix": "none"}, [], []),
        ({"StartAfter": "a/c/d"}, TREE[3:], []),
        ({"StartAfter": "b/", "Delimiter": "/"}, ["b0", "\U0001f3bb", "\ue000"], ["ü/"]),
        ({"Prefix": "\U0001f3bb"}, ["\U0001f3bb"], []),
    ],
)
def test_prefixes_and_delimiters(
    service: Any, tree: str, asked: dict[str, str], keys: list[str], prefixes: list[str]
) -> None:
    client = service.client()
    assert names(client.list_objects_v2(Bucket=tree, **asked)) == (
        sorted(keys, key=str.encode), prefixes,
    )  # fmt: skip
    for size in (1, 2):
        settings = {"PageSize": size}
        pages = client.get_paginator("list_objects_v2").paginate(
            Bucket=tree, PaginationConfig=settings, **asked
        )
        found = [names(page) for page in pages]
        assert [key for page, _ in found for key in page] == sorted(keys, key=str.encode)
        assert [prefix for _, page in found for prefix in page] == prefixes
    if "StartAfter" not in asked:
        old = client.get_paginator("list_objects").paginate(
            Bucket=tree, PaginationConfig={"PageSize": 1}, **asked
        )
        assert [name for page in old for name in names(page)[1]] == prefixes


def test_listing_skips_large_common_prefix(service: Any, bucket: str) -> None:
    from luthier.server.stores.listing import page
    from luthier.server.stores.object_files import WrittenFile
    from luthier.server.tables.objects import ObjectMetadata, ObjectPiece, get_bucket, new_object

    database = service.objects.database
    with database.write() as session:
        found = get_bucket(session, "000000000001", bucket)
        for number in range(3000):
            piece = ObjectPiece.of(
                "000000000001", 1, WrittenFile(f"{bucket}{number}", 0, "", ""), {}
            )
            row = new_object(found, f"many/{number:05}", [piece], "", 0, ObjectMetadata())
            session.add(row)
    assert page(database, "000000000001", bucket, delimiter="/").entries == ("many/",)
    every = page(database, "000000000001", bucket, start="many/00900", limit=1500)
    assert [each.key for each in every.objects] == [f"many/{each:05}" for each in range(900, 2400)]
    assert every.next == "many/02400"


def test_fields_of_a_listing(service: Any, bucket: str, refused: Any) -> None:
    client = service.client()
    tag = client.put_object(Bucket=bucket, Key="k", Body=b"abc")["ETag"]
    listed = client.list_objects_v2(Bucket=bucket, FetchOwner=True)
    (entry,) = listed["Contents"]
    assert (entry["ETag"], entry["Size"], entry["StorageClass"]) == (tag, 3, "STANDARD")
    assert entry["LastModified"].tzinfo and entry["Owner"]["ID"] == "000000000001"
    assert (listed["KeyCount"], listed["MaxKeys"], listed["Name"]) == (1, 1000, bucket)
    assert client.list_objects_v2(Bucket=bucket, MaxKeys=0)["IsTruncated"] is False
    assert client.list_objects_v2(Bucket=bucket, MaxKeys=5000)["MaxKeys"] == 1000
    wrong = ("InvalidArgument", 400)
    assert refused(client.list_objects_v2, Bucket=bucket, MaxKeys=-1) == wrong
    assert refused(client.list_objects_v2, Bucket=bucket, ContinuationToken="?") == wrong
    assert refused(client.list_objects_v2, Bucket=bucket, EncodingType="x") == wrong
