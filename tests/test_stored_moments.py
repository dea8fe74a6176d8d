"""Moments on the storage: merged in order, and read by class range."""

from functools import reduce

import numpy as np
import pytest
import torch

from teddy_ray.moments import Moments
from teddy_ray.plan import CLASSES_PER_FILE, Plan
from teddy_ray.pool_plan import DataFacts
from teddy_ray.recipe_file import parse_recipe
from teddy_ray.statistics import Layout
from teddy_ray.storage import Storage
from teddy_ray.stored_moments import (
    POOLED,
    RANGES_KEPT,
    MomentsReader,
    merge_chunks,
    pool_classes,
    to_tensors,
    write_chunk,
)

LAYOUT = Layout(((("norm1", 2), ("norm2", 1)), (("norm1", 1),)))
FIELDS = ("count", "mean", "m2")


def plan_of(num_classes):
    recipe = parse_recipe({"name": "many", "data": {"source": "none"}})
    names = tuple(f"class {label}" for label in range(num_classes))
    return Plan(recipe, DataFacts(names, (1,) * num_classes, 1, "train", "validation", "test"))


def draw(classes, seed):
    """Moments of some images of each of these classes."""
    random = torch.Generator().manual_seed(seed)
    count = torch.randint(1, 9, (len(classes),), generator=random).double()
    mean, m2 = (torch.rand(len(classes), 4, generator=random, dtype=torch.float64) for _ in range(2))
    return Moments(count, 1e3 + mean, m2)


def write(storage, plan, chunks):
    """Publish chunks (classes, moments) and what they come to, as the stage does."""
    for index, (classes, moments) in enumerate(chunks):
        with storage.publish("chunk", f"chunk-{index}") as draft:
            write_chunk(draft, plan.class_ranges(), torch.tensor(classes), moments)
            draft.facts = {"layout": LAYOUT.members}
    merge_chunks(storage, [f"chunk-{index}" for index in range(len(chunks))], plan.class_ranges())
    with storage.publish("statistics", plan.statistics) as draft:
        draft.write_tensors(POOLED, to_tensors(pool_classes(storage, plan.class_ranges())))
        draft.facts = {"layout": LAYOUT.members}


@pytest.fixture
def reads(monkeypatch):
    """Paths that are read from any storage."""
    paths = []
    original = Storage.read

    def read(self, path):
        paths.append(path)
        return original(self, path)

    monkeypatch.setattr(Storage, "read", read)
    return paths


def assert_equal(moments, other):
    assert all(torch.equal(getattr(moments, field), getattr(other, field)) for field in FIELDS)


def test_chunks_are_merged_in_order_whatever_classes_they_hold(tmp_path):
    storage, plan = Storage(str(tmp_path)), plan_of(25)
    held = [range(0, 25), range(3, 4), [1, 7, 19, 20, 24], range(20, 25), range(5)]
    chunks = [(list(classes), draw(classes, seed)) for seed, classes in enumerate(held)]
    write(storage, plan, chunks)
    reader = MomentsReader(plan, storage)
    own = reader.of(range(25))
    for label in range(25):
        parts = [m.rows(slice(c.index(label), c.index(label) + 1)) for c, m in chunks if label in c]
        first, second, third = reduce(Moments.merge, parts).split([2, 1, 1])
        one = slice(label, label + 1)
        assert_equal(own[0]["norm1"].rows(one), first)
        assert_equal(own[0]["norm2"].rows(one), second)
        assert_equal(own[1]["norm1"].rows(one), third)
    whole = own[0]["norm1"].pooled()
    pooled = reader.pooled[0]["norm1"]
    assert pooled.count.tolist() == whole.count.tolist()
    for field in ("mean", "m2"):  # in another order
        torch.testing.assert_close(getattr(pooled, field), getattr(whole, field), rtol=1e-13, atol=0)


def test_file_of_a_chunk_holds_its_own_classes_alone(tmp_path):
    storage, plan = Storage(str(tmp_path)), plan_of(25)
    write(storage, plan, [(list(range(25)), draw(range(25), 0)), ([4, 21], draw([4, 21], 1))])
    assert sorted(storage.open("chunk", "chunk-1").manifest["files"]) == [
        "classes-00000.safetensors",
        "classes-00020.safetensors",
    ]


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """20,000 classes, one chunk."""
    storage, plan = Storage(str(tmp_path_factory.mktemp("many"))), plan_of(20_000)
    moments = draw(range(20_000), 0)
    write(storage, plan, [(list(range(20_000)), moments)])
    return storage, plan, moments


def test_who_needs_10_of_20000_classes_reads_those_alone(many, reads):
    storage, plan, moments = many
    reader = MomentsReader(plan, storage)
    own, pooled = reader.of(range(12_340, 12_350)), reader.pooled
    part = plan.class_ranges()[1234]
    assert part.classes == range(12_340, 12_350)
    assert sorted(path.removeprefix("artifacts/") for path in reads) == [
        f"moments/{part.fingerprint}/manifest.json",
        f"moments/{part.fingerprint}/moments.safetensors",
        f"statistics/{plan.statistics}/manifest.json",
        f"statistics/{plan.statistics}/pooled.safetensors",
    ]
    assert sum(len(storage.read(path)) for path in list(reads)) < 20_000  # bytes, of 1.4 million
    assert_equal(own[0]["norm1"], moments.split([2, 1, 1])[0].rows(slice(12_340, 12_350)))
    assert pooled[0]["norm1"].count.tolist() == [moments.count.sum()]


@pytest.mark.parametrize("classes", [range(7, 8), range(9, 11), range(5, 38), range(19_999, 20_000)], ids=str)
def test_classes_of_several_files_come_together(many, classes):
    storage, plan, moments = many
    own = MomentsReader(plan, storage).of(classes)
    expected = moments.rows(slice(classes.start, classes.stop)).split([2, 1, 1])
    for of_layer, part in zip([own[0]["norm1"], own[0]["norm2"], own[1]["norm1"]], expected, strict=True):
        assert_equal(of_layer, part)


def test_ranges_read_last_are_kept_and_no_others(many, reads):
    storage, plan, _ = many
    reader = MomentsReader(plan, storage)

    def files(classes):
        reads.clear()
        reader.of(classes)
        return sum(path.endswith("moments.safetensors") for path in reads)

    width = CLASSES_PER_FILE
    assert [files(range(0, 5)), files(range(5, 10)), files(range(0, 10))] == [1, 0, 0]
    assert [files(range(width * i, width * i + 1)) for i in range(1, RANGES_KEPT)] == [1] * (RANGES_KEPT - 1)
    assert files(range(0, 1)) == 0
    assert files(range(width * 50, width * 51)) == 1
    assert files(range(0, 1)) == 0  # was used later than the one that had to go
    assert files(range(width, width + 1)) == 1
    wide = range(width * 60, width * 70)
    assert [files(wide), files(wide)] == [10, 0]  # more than are kept otherwise
    assert len(reader._kept) == 10
    files(range(0, 1))
    assert len(reader._kept) == RANGES_KEPT


def test_bytes_do_not_depend_on_who_merges_what(tmp_path):
    plan = plan_of(45)
    chunks = [
        (sorted(c), draw(c, seed))
        for seed, c in enumerate(np.random.default_rng(0).permutation(45).reshape(3, 15).tolist())
    ]
    chunks.append((list(range(45)), draw(range(45), 9)))
    stores = [Storage(str(tmp_path / name)) for name in ("one", "two")]
    write(stores[0], plan, chunks)
    names = [f"chunk-{index}" for index in range(len(chunks))]
    for name, (classes, moments) in zip(names, chunks, strict=True):
        with stores[1].publish("chunk", name) as draft:
            write_chunk(draft, plan.class_ranges(), torch.tensor(classes), moments)
            draft.facts = {"layout": LAYOUT.members}
    for part in reversed(plan.class_ranges()):
        merge_chunks(stores[1], names, [part])
    for part in plan.class_ranges():
        one, two = (store.open("moments", part.fingerprint).manifest["files"] for store in stores)
        assert one == two
