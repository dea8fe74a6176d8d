"""Workers that share a training do what one worker does with the whole batch."""

import copy
import multiprocessing
import os

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from teddy_ray.data_parallel import Group, join_group
from teddy_ray.training import Batch, State, fit

ROWS = np.arange(7)  # of which the first of two workers has one more


def a_model(norm=False):
    torch.manual_seed(0)
    middle = [nn.BatchNorm1d(8)] if norm else []
    return nn.Sequential(nn.Linear(5, 8), *middle, nn.Tanh(), nn.Linear(8, 3)).double()


def fit_in(group, model):
    random = torch.Generator().manual_seed(1)
    x = torch.rand(len(ROWS), 5, generator=random, dtype=torch.float64)
    y = torch.rand(len(ROWS), 3, generator=random, dtype=torch.float64).softmax(1)
    rows = group.part_of(ROWS)
    batch = Batch(x[rows], y[rows], len(ROWS))
    options = {"key": ("test",), "epochs": 2, "steps_per_epoch": 3, "learning_rate": 0.1}
    *_, last = fit(State.begin(model, 0.1), lambda epoch: [batch] * 3, **options, group=group)
    return last


def in_processes(work, size):
    """What work(rank) gives in each of so many processes, which have a process group of gloo."""

    def run(rank, store, results):
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
        results.put((rank, work(rank)))

    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    store = f"{os.environ['HOME']}/store-{os.urandom(8).hex()}"
    processes = [context.Process(target=run, args=(rank, store, results)) for rank in range(size)]
    for process in processes:
        process.start()
    gathered = dict(results.get() for _ in processes)
    for process in processes:
        process.join()
    return [gathered[rank] for rank in range(size)]


def weights_of(model):
    return [parameter.detach().numpy() for parameter in model.parameters()]


def test_two_workers_train_as_one_does():
    def work(rank):
        last = fit_in(join_group(rank, 2, 2, own_gpus=False), a_model())
        return weights_of(last.model), last.losses

    alone = fit_in(Group(), a_model())
    (first, losses), (second, same_losses) = in_processes(work, 2)
    assert losses == same_losses == pytest.approx(alone.losses, rel=1e-12)
    for one, other, whole in zip(first, second, weights_of(alone.model), strict=True):
        assert (one == other).all()
        assert one == pytest.approx(whole, rel=1e-9)
    start = weights_of(a_model())
    assert abs(first[0] - start[0]).max() > 0.1  # it did train


def test_buffers_are_averaged_and_groups_keep_to_themselves():
    def work(rank):
        group = join_group(rank, 4, 2, own_gpus=False)
        model = nn.BatchNorm1d(2)
        model.running_mean.fill_(float(rank))
        before = copy.deepcopy(model)
        group.average_buffers(model)
        assert int(model.num_batches_tracked) == int(before.num_batches_tracked)
        return group.rank, group.size, model.running_mean.tolist(), group.sum_number(rank)

    assert in_processes(work, 4) == [
        (0, 2, [0.5, 0.5], 1.0),
        (1, 2, [0.5, 0.5], 1.0),
        (0, 2, [2.5, 2.5], 5.0),
        (1, 2, [2.5, 2.5], 5.0),
    ]


def test_a_worker_alone_needs_no_process_group():
    group = join_group(3, 4, 1, own_gpus=False)
    assert (group.rank, group.size, list(group.part_of(ROWS)), group.sum_number(2.5)) == (0, 1, list(ROWS), 2.5)
