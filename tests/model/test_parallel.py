"""Two processes that run different numbers of loops: nothing hangs, gradients add up, and the
optimizers move the weights as one process would."""

import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.testing import assert_close

from openmythos import MythosConfig, OpenMythos
from openmythos.errors import ConfigError
from openmythos.model.transformer import cross_entropy
from openmythos.training.gate import Labelled, train_gate
from openmythos.training.optimizer import build_optimizers
from openmythos.training.settings import OptimizerConfig

LOOPS = (3, 7)  # of rank 0 and rank 1


def model():
    return OpenMythos(
        MythosConfig(
            vocab_size=31,
            hidden_size=16,
            max_length=16,
            num_heads=2,
            core_layers=2,
            mean_loops=3,
            experts=4,
            experts_per_token=2,
            expert_size=8,
        )
    )


def token_ids(rank):
    return torch.randint(0, 31, (2, 9), generator=torch.Generator().manual_seed(rank))


def loss(network, rank, window):
    ids = token_ids(rank)
    logits = network(ids[:, :-1], LOOPS[rank], backprop_loops=window).logits
    return cross_entropy(logits, ids[:, 1:]).sum() / (2 * ids[:, 1:].numel())


def work(rank, folder):
    torch.set_num_threads(1)
    meet = f"file://{folder}/ranks"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=2)
    shard(rank, folder)
    replicate(rank, folder)
    wait_for_all(rank, Path(folder))
    dist.destroy_process_group()


def wait_for_all(rank, folder):
    """Gloo aborts a rank whose other end goes while it waits, in a barrier of its own too."""
    dist.barrier()
    (folder / f"done-{rank}").touch()
    while not all((folder / f"done-{other}").exists() for other in range(2)):
        time.sleep(0.01)


def shard(rank, folder):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    network = model()
    splits = network.fused_splits()
    mesh = init_device_mesh("cpu", (2,))
    # The whole loop is one unit: a rank gathers once, however often it loops.
    for unit in (*network.prelude, network.core, *network.coda, network):
        fully_shard(unit, mesh=mesh)
    for window in (None, 2):  # all loops with gradient, then a window at the end
        network.zero_grad()
        loss(network, rank, window).backward()
        gradients = {
            name: p.grad.full_tensor() * 2  # FSDP averages over ranks
            for name, p in network.named_parameters()
            if p.grad is not None
        }
        if rank == 0:
            torch.save(gradients, f"{folder}/{window}.pt")
    optimizers = build_optimizers(
        network.named_parameters(), OptimizerConfig(), fused_splits=splits
    )
    for _ in range(2):  # the second has a momentum
        optimizers.zero_grad()
        (2 * loss(network, rank, 2)).backward()
        optimizers.step()
    with pytest.raises(ConfigError, match="must be whole"):
        train_gate(network, lambda step: Labelled(token_ids(0), token_ids(0)), [])
    weights = {name: p.full_tensor() for name, p in network.named_parameters()}
    if rank == 0:
        torch.save(weights, f"{folder}/moved.pt")


def replicate(rank, folder):
    """An ordinary loop, each rank with the whole model."""
    from torch.nn.parallel import DistributedDataParallel

    network = DistributedDataParallel(model())
    for window in (None, 2):  # a parameter that the first loss had missed would stop the second
        network.zero_grad()
        loss(network, rank, window).backward()
    if rank == 0:
        named = network.module.named_parameters()
        gradients = {name: p.grad * 2 for name, p in named if p.grad is not None}
        torch.save(gradients, f"{folder}/copies.pt")


@pytest.fixture(scope="module")
def worked(tmp_path_factory):
    """What two ranks left behind."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(work, args=(str(folder),), nprocs=2)
    return folder


@pytest.mark.parametrize(
    ("file", "window"),
    [("None", None), ("2", 2), ("copies", 2)],
    ids=["sharded", "sharded, a window", "copies"],
)
def test_ranks_with_other_depths_do_not_hang_and_their_gradients_add_up(worked, file, window):
    alone = model()
    for rank in (0, 1):
        loss(alone, rank, window).backward()
    together = torch.load(worked / f"{file}.pt", weights_only=True)
    expected = {n: p.grad for n, p in alone.named_parameters() if p.grad is not None}
    assert set(together) == set(expected)
    for name, gradient in expected.items():
        assert_close(together[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


def test_sharded_weights_move_as_whole_ones_do(worked):
    alone = model()
    splits = alone.fused_splits()
    optimizers = build_optimizers(alone.named_parameters(), OptimizerConfig(), fused_splits=splits)
    for _ in range(2):
        optimizers.zero_grad()
        for rank in (0, 1):
            loss(alone, rank, 2).backward()
        optimizers.step()
    moved = torch.load(worked / "moved.pt", weights_only=True)
    for name, expected in alone.named_parameters():
        assert_close(moved[name], expected.detach(), atol=2e-5, rtol=1e-4, msg=name)
