"""One run on several GPUs: each process embeds its share of the batch, and every one sees the whole batch's loss.

Under `torchrun` each process holds the full model, loss and memory. It embeds a shard, gathers the others' embeddings,
and computes the loss of the whole batch; so MemVir's memory is the same in every process and is never communicated.
The gradient of the loss by a process's own embeddings flows into its copy of the embedder, and
DistributedDataParallel sums the copies' gradients. The proxies' gradient is complete in every process.
"""

import inspect
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.nn import functional

from memvir.errors import UserError


@dataclass(frozen=True)
class World:
    """The processes of one run; the default is a run of one process."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def shard(self, batch: np.ndarray) -> np.ndarray:
        """This process's consecutive share of a batch of image indices."""
        return np.array_split(batch, self.size)[self.rank]

    def gather(self, embeddings: Tensor, labels: Tensor, total: int) -> tuple[Tensor, Tensor]:
        """The whole batch's embeddings (total, D) and labels (total,) from every process's shard, in batch order.

        Gradients reach this process's own embeddings alone, times the number of processes: DistributedDataParallel
        averages over them what should be summed.
        """
        if self.size == 1:
            return embeddings, labels
        counts = [len(part) for part in np.array_split(np.arange(total), self.size)]
        padding = counts[0] - len(labels)  # the first shard is the longest
        rows = functional.pad(embeddings.detach(), (0, 0, 0, padding))
        others = [torch.empty_like(rows) for _ in counts]
        distributed.all_gather(others, rows)
        all_labels = [labels.new_empty(counts[0]) for _ in counts]
        distributed.all_gather(all_labels, functional.pad(labels, (0, padding)))
        if embeddings.requires_grad:
            embeddings.register_hook(lambda gradient: gradient * self.size)
        parts = [part[:count] for part, count in zip(others, counts, strict=True)]
        parts[self.rank] = embeddings
        return torch.cat(parts), torch.cat([part[:count] for part, count in zip(all_labels, counts, strict=True)])

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether the flag is set in any process."""
        if self.size == 1:
            return flag
        flags = torch.tensor(int(flag), device=device)
        distributed.all_reduce(flags, distributed.ReduceOp.MAX)
        return bool(flags.item())

    def replicate(self, embedder: nn.Module, device: torch.device) -> nn.Module:
        """The embedder as every process trains it."""
        if self.size == 1:
            return embedder
        live = any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in embedder.train().modules())
        if live and device.type != "cuda":
            raise UserError(
                "runtime.processes: BatchNorm over several processes needs GPUs; use one process, or "
                "model.freeze_batch_norm: true"
            )
        if live:
            embedder = nn.SyncBatchNorm.convert_sync_batchnorm(embedder)
        devices = [device] if device.type == "cuda" else None
        parallel = nn.parallel.DistributedDataParallel
        known = inspect.signature(parallel).parameters  # torch has renamed it
        sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        options: dict[str, Any] = {sync: False}
        return parallel(embedder, devices, **options)


def join_world() -> World:
    """The world that torchrun set up, or that of one process. Selects this process's GPU."""
    if "WORLD_SIZE" not in os.environ:
        return World()
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "nccl"
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group(backend)
    return World(distributed.get_rank(), distributed.get_world_size())
