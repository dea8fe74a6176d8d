"""Which URIs are opened, with whose credentials, and what is done where that fails."""

from __future__ import annotations

import itertools
import pickle
from types import SimpleNamespace

import pyarrow.fs as pafs
import pytest
from pictures import source

from teddy_ray import retries, storage, stores
from teddy_ray.cli import main
from teddy_ray.errors import InputError, StoreError
from teddy_ray.storage import Storage
from teddy_ray.stores import join, open_uri
from teddy_ray.weights import read_weights

names = (f"opened-{number}" for number in itertools.count())


@pytest.fixture
def bucket(object_store):
    """The URI of an empty bucket."""
    return object_store.make_bucket(next(names))


@pytest.mark.parametrize(
    "uri",
    [
        "s3://AKIA:hush@bucket/x",
        "s3://AKIA:hu/sh@bucket/x",
        "s3://AKIA:12/hush@bucket/x",
        "s3://bucket/x?secret%5Fkey=hush",
        "s3://bucket/x?endpoint_override=http://user:hush@host:9000",
        "s3://bucket/x?scheme=http&endpoint_override=http%3A%2F%2Fuser%3Ahush%40host%3A9000",
        "s3://bucket/x?secret_key=hush",
        "s3://bucket/x?region=eu-west-1&access_key=hush",
        "fsspec+s3://bucket/x?token=hush",
        "abfs://container@account.dfs.core.windows.net/x?sas_token=hush",
    ],
)
def test_credentials_in_a_uri_are_refused_and_not_repeated(uri, capfd, tmp_path):
    for key, call in {
        "storage": Storage,
        "data.source": lambda uri: source(uri),
        "pool.base": lambda uri: read_weights(uri, "pool.base"),
    }.items():
        with pytest.raises(InputError) as caught:
            call(uri)
        (problem,) = caught.value.problems
        assert problem.key == key
        assert "AWS_ACCESS_KEY_ID" in problem.remedy
        assert not any(secret in str(caught.value) for secret in ("hush", "hu/sh"))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"name: a\nstorage: {uri}\ndata: {{source: 'sklearn:digits'}}\n")
    assert main(["plan", str(recipe)]) == 2
    error = capfd.readouterr().err
    assert "teddy-ray: error: storage: found '" in error
    assert not any(secret in error for secret in ("hush", "hu/sh"))


@pytest.mark.parametrize("uri", ["s3://bucket/a@b", "s3://bucket/x:1/a@b", "gs://anonymous@bucket/x"])
def test_a_uri_without_credentials_is_opened(object_store, uri):
    assert open_uri(uri, "storage")[0].type_name.startswith("py::patient ")


def test_a_pickled_storage_knows_its_endpoint_and_no_secret(object_store, bucket, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAHUSH")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush-hush")
    pickled = pickle.dumps(Storage(bucket))
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    assert b"hush" not in pickled.lower()
    copy = pickle.loads(pickled)
    copy.write("x", b"1")
    assert copy.read("x") == b"1"


@pytest.mark.parametrize("variable", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
@pytest.mark.parametrize("region", ["AWS_REGION", "AWS_DEFAULT_REGION"])
def test_the_usual_variables_name_endpoint_and_region(object_store, bucket, monkeypatch, variable, region):
    for name in ("AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name)
    monkeypatch.setenv(variable, object_store.url)
    monkeypatch.setenv(region, "eu-west-1")
    place = Storage(bucket)
    place.write("x", b"1")
    assert place.read("x") == b"1"
    assert place.fs.handler.fs.region == "eu-west-1"


def test_what_a_uri_asks_of_its_store_stays_behind_its_path(object_store, bucket):
    uri = f"{bucket}/x?region=eu-west-1"
    place = Storage(uri)
    place.write("runs/a", b"1")
    assert place.display("runs/a") == f"{bucket}/x/runs/a?region=eu-west-1"
    assert Storage(bucket).read("x/runs/a") == b"1"
    assert join("a?b/c", "d") == "a?b/c/d"


def test_google_storage_is_opened():
    fs, path = open_uri("gs://bucket/x", "storage")
    assert (fs.type_name, path) == ("py::patient gcs", "bucket/x")


# -- opening ----------------------------------------------------------------------------------------------------------


def failing(text):
    raise OSError(text)


def opened_by(from_uri, monkeypatch):
    """Instead of what Arrow does, which where no region is named asks S3 for the bucket's."""
    file_system = SimpleNamespace(from_uri=from_uri)
    monkeypatch.setattr(stores, "pafs", SimpleNamespace(**vars(pafs) | {"FileSystem": file_system}))


def test_a_store_that_fails_while_it_is_opened_is_asked_again(bucket, monkeypatch):
    monkeypatch.setattr(retries, "FIRST_WAIT_S", 0.001)
    left = iter(["AWS Error NETWORK_CONNECTION during HeadBucket operation"] * 3)
    opened_by(lambda uri: next(map(failing, left), None) or pafs.FileSystem.from_uri(uri), monkeypatch)
    Storage(bucket).write("x", b"1")
    assert not list(left)


@pytest.mark.parametrize(("code", "kind"), [("SLOW_DOWN", StoreError), ("ACCESS_DENIED", InputError)])
def test_a_store_that_cannot_be_opened_is_named(bucket, monkeypatch, code, kind):
    opened_by(lambda uri: failing(f"AWS Error {code} during HeadBucket operation"), monkeypatch)
    monkeypatch.setattr(storage, "CHECK_PATIENCE_S", 0)
    with pytest.raises(kind, match=f"{bucket}: opening it .* {code} during HeadBucket operation"):
        Storage(bucket)
