"""Unfinished work: what is loaded is what was saved, or nothing."""

from pathlib import Path

import pytest
import torch

from teddy_ray import checkpoints
from teddy_ray.checkpoints import Checkpoint
from teddy_ray.storage import Storage

UNIT = "f" * 32
ENVIRONMENT = {"device": "cpu, 1 thread", "versions": {"torch": "2.11", "numpy": "2.0"}, "engine": "fp32, compiled"}


@pytest.fixture(params=["path", "URI", "bucket"])
def storage(request, tmp_path):
    if request.param == "bucket":
        return request.getfixturevalue("bucket")
    return Storage(str(tmp_path) if request.param == "path" else f"file://{tmp_path}")


@pytest.fixture
def local(tmp_path):
    return Storage(str(tmp_path))


def checkpoint(storage, environment=ENVIRONMENT, fingerprint=UNIT):
    return Checkpoint(storage, "unit", fingerprint, environment)


def tensors(seed=0, step=7):
    """What a unit saves, with numbers that a conversion would spoil."""
    random = torch.Generator().manual_seed(seed)
    images = torch.rand(3, 1, 4, 4, generator=random)
    images.view(-1)[:4] = torch.tensor([1e-45, -0.0, float("inf"), float("nan")])
    return {
        "images": images,
        "exp_avg": torch.randn(2, 3, 4, 4, generator=random).to(memory_format=torch.channels_last),
        "losses": torch.rand(5, 2, generator=random, dtype=torch.float64).T,
        "narrow": torch.rand(4, generator=random).bfloat16(),
        "seconds": torch.tensor(12.345678, dtype=torch.float64),
        "step": torch.tensor(step),
        "none": torch.zeros(0, 2),
    }


def bits(saved):
    return {name: (t.dtype, t.shape, t.contiguous().view(-1).view(torch.uint8).tolist()) for name, t in saved.items()}


def test_what_was_saved_is_loaded_bit_for_bit(storage):
    checkpoint(storage).save(tensors())
    loaded = checkpoint(storage).load()
    assert bits(loaded) == bits(tensors())
    assert int(loaded["step"]) == 7


def test_what_is_loaded_can_be_worked_on_and_has_no_gradients(local):
    image = torch.rand(2, 3, requires_grad=True)
    checkpoint(local).save({"image": image})
    loaded = checkpoint(local).load()["image"]
    assert torch.equal(loaded, image)
    assert not loaded.requires_grad
    loaded += 1


def test_nothing_is_loaded_before_anything_is_saved(storage):
    assert checkpoint(storage).load() is None


def test_the_last_one_saved_counts_and_is_the_only_one(local, tmp_path):
    for step in (7, 8):
        checkpoint(local).save(tensors(seed=step, step=step))
    assert bits(checkpoint(local).load()) == bits(tensors(seed=8, step=8))
    local.close_session()
    files = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()]
    assert files == [f"artifacts/.checkpoints/unit/{UNIT}.safetensors"]


def test_a_checkpoint_lies_where_no_artifact_is_looked_for(storage):
    checkpoint(storage).save(tensors())
    assert storage.is_file(f"artifacts/.checkpoints/unit/{UNIT}.safetensors")
    assert not storage.has("unit", UNIT)


def test_checkpoints_of_others_are_apart(storage):
    other = "e" * 32
    checkpoint(storage).save(tensors(seed=1))
    checkpoint(storage, fingerprint=other).save(tensors(seed=2))
    Checkpoint(storage, "base", UNIT, ENVIRONMENT).save(tensors(seed=3))
    checkpoint(storage, fingerprint=other).drop()
    assert checkpoint(storage, fingerprint=other).load() is None
    assert bits(checkpoint(storage).load()) == bits(tensors(seed=1))
    assert bits(Checkpoint(storage, "base", UNIT, ENVIRONMENT).load()) == bits(tensors(seed=3))


@pytest.mark.parametrize(
    "change",
    [
        {"device": "cuda"},
        {"versions": {"torch": "2.11", "numpy": "2.1"}},
        {"engine": "fp32, not compiled"},
        {"engine": "fp32, compileD"},  # no longer, no shorter
        {"more": 1},
    ],
    ids=str,
)
def test_a_checkpoint_of_another_environment_counts_as_none(local, change):
    checkpoint(local).save(tensors())
    assert checkpoint(local, ENVIRONMENT | change).load() is None
    assert checkpoint(local).load() is not None


def test_the_order_in_which_an_environment_is_told_does_not_matter(local):
    checkpoint(local).save(tensors())
    assert checkpoint(local, dict(reversed(ENVIRONMENT.items()))).load() is not None


# -- damage --------------------------------------------------------------------------------------------------------


def damaged(data):
    """(what, bytes) of every kind of damage."""
    for length in range(0, len(data), 5):
        yield f"cut to {length}", data[:length]
    for position in range(0, len(data), 3):
        changed = bytearray(data)
        changed[position] ^= 1 << position % 8
        yield f"changed at {position}", bytes(changed)
    yield "beginning lost", data[1:]
    yield "middle lost", data[:100] + data[101:]
    yield "longer", data + b"\0"
    yield "twice", data + data
    yield "zeros", bytes(len(data))
    yield "not this program's", b"\x89PNG\r\n\x1a\n" * 40
    yield "text that is no ASCII", "é".encode() * 100


def test_every_kind_of_damage_makes_a_checkpoint_count_as_none(local, tmp_path):
    checkpoint(local).save({"step": torch.tensor(3), "images": torch.rand(2, 3)})
    path = tmp_path / f"artifacts/.checkpoints/unit/{UNIT}.safetensors"
    whole = path.read_bytes()
    survived = []
    for what, data in damaged(whole):
        path.write_bytes(data)
        if checkpoint(local).load() is not None:
            survived.append(what)
    assert survived == []
    path.write_bytes(whole)
    assert int(checkpoint(local).load()["step"]) == 3


def test_a_damaged_checkpoint_is_replaced_by_the_next(storage):
    checkpoint(storage).save(tensors(seed=1))
    storage.write(f"artifacts/.checkpoints/unit/{UNIT}.safetensors", b"half of")
    assert checkpoint(storage).load() is None
    checkpoint(storage).save(tensors(seed=2))
    assert bits(checkpoint(storage).load()) == bits(tensors(seed=2))


def test_the_old_checkpoint_is_there_until_the_new_one_is_whole(local, monkeypatch, caplog):
    checkpoint(local).save(tensors(seed=1))
    write_bytes = Path.write_bytes

    def full(path, data):
        write_bytes(path, data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    monkeypatch.setattr(checkpoints, "_told", set())
    for _ in range(2):
        checkpoint(local).save(tensors(seed=2))  # an insurance that cannot be had ends no work
    assert bits(checkpoint(local).load()) == bits(tensors(seed=1))
    (told,) = caplog.messages
    assert told == (
        f"saving a checkpoint failed, and the work goes on without it: artifacts/.checkpoints/unit/{UNIT}.safetensors: "
        "[Errno 28] No space left on device"
    )


# -- the end -------------------------------------------------------------------------------------------------------


def test_dropped_it_is_gone_and_may_be_dropped_again(storage):
    checkpoint(storage).drop()
    checkpoint(storage).save(tensors())
    checkpoint(storage).drop()
    assert checkpoint(storage).load() is None
    assert not storage.is_file(f"artifacts/.checkpoints/unit/{UNIT}.safetensors")
    checkpoint(storage).drop()


def test_closing_a_session_keeps_checkpoints_for_the_next_run(storage):
    checkpoint(storage).save(tensors())
    storage.close_session()
    assert bits(checkpoint(storage).load()) == bits(tensors())
