"""Training with weights, gradients and optimiser states shared out over the ranks (FSDP2)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, empty
from torch.optim import Optimizer

from umm_zoo.backbones.frozen import FrozenBackbone
from umm_zoo.backbones.parts import NamedParts
from umm_zoo.checkpoints.background import Writer, WritesBehind
from umm_zoo.checkpoints.files import load_checkpoint
from umm_zoo.checkpoints.folder import INDEX, damage
from umm_zoo.checkpoints.sharded import copied, read_sharded
from umm_zoo.errors import Natural, UserError


class FullyShardedStrategy(ModelParallelStrategy, WritesBehind):
    """Every rank holds a slice of each tensor and gathers a block's weights only while it computes with them.

    ``sharded_blocks`` says which blocks. Batches, losses and clipping are those of ordinary data-parallel
    training. A checkpoint is a folder: each rank's slices as safetensors, everything else in one plain file; copied in memory,
    written under a temporary name while training goes on, verified, renamed. It can be resumed with any number of ranks and without
    sharding, and a single file can be resumed with it; ``tools/consolidate.py`` makes one file of weights.

    Ranks call a network equally often, however many sizes of images each has, and whether it has any: see ``as_many_groups``, and
    ``blocks_are_sharded`` for a method of one's own that leaves out calls of a block where there is nothing to call it on.

    While validation goes on the weights are whole on every rank (ranks may differ in their numbers of batches and generated tokens,
    and must not wait for each other): they must fit beside the optimiser's slices.

    Args:
        gathered: dtype in which weights are gathered and computed with. ``bfloat16`` halves what is sent, and what stands in memory
            while a block computes; it asks for ``trainer.precision: bf16-mixed``, whose products are the same. Slices, gradients
            (in their sum over the ranks too), moments and checkpoints keep their own dtype. None is the weights' own.
        whole: frozen parts, and frozen networks in parts, of up to so many MiB stay whole on every rank, for what gathering them
            costs is mostly waiting (our choice).
        process_group_backend, timeout: see ``ModelParallelStrategy``.
    """

    by_every_rank = True

    def __init__(
        self,
        gathered: Literal["bfloat16"] | None = None,
        whole: Natural = 256,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__(process_group_backend=process_group_backend, timeout=timeout)
        self.gathered, self.whole = gathered, whole
        self.writer = Writer()
        self._writers: dist.ProcessGroup | None = None

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Yes: our files are read slice by slice."""
        return True

    def setup_environment(self) -> None:
        """All devices are data-parallel."""
        if self._data_parallel_size == "auto":
            self._data_parallel_size = self.num_nodes * self.num_processes
        if self._tensor_parallel_size == "auto":
            self._tensor_parallel_size = 1
        super().setup_environment()

    # -- sharing out ---------------------------------------------------------------------------------------------------------

    def shard(self, module: LightningModule) -> None:
        """Share the weights of a method out, block by block; its ``configure_model`` calls this."""
        if isinstance(module, FSDPModule):
            return
        assert module.device_mesh is not None
        mesh = module.device_mesh["data_parallel"]
        kept = small_frozen(module, self.whole)
        blocks = [block for block in sharded_blocks(module) if not kept.issuperset(block.parameters())]
        assert_one_dtype(module, blocks)
        narrow = None if self.gathered is None else torch.bfloat16
        # inputs stay as they are: of a time in bfloat16 there are but 256 values
        policy = MixedPrecisionPolicy(narrow, narrow and torch.float32, cast_forward_inputs=False)
        for block in blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy, ignored_params=kept)
        fully_shard(module, mesh=mesh, mp_policy=policy, ignored_params=kept)
        register_fsdp_forward_method(module, "training_step")
        register_fsdp_forward_method(module, "validation_step")

    def on_validation_start(self) -> None:
        """Gather sharded weights for the whole validation: ranks may have different numbers of batches and generated tokens."""
        super().on_validation_start()
        gather_weights(self.lightning_module, True)

    def on_validation_end(self) -> None:
        """Share them out again."""
        super().on_validation_end()
        gather_weights(self.lightning_module, False)

    # -- saving --------------------------------------------------------------------------------------------------------------

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """This rank's slices."""
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """This rank's slices, numbered as the optimiser numbers its parameters: as without sharding."""
        inner = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        return inner.state_dict()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None) -> None:
        """Write the folder; every rank calls this.

        Raises:
            UserError: on every rank, where one could not write.
        """
        self.begin(checkpoint, Path(self.broadcast(filepath)), lambda: None)
        self.writer.wait()

    def begin(self, checkpoint: dict[str, Any], path: Path, then: Callable[[], None]) -> None:
        """Every rank calls this; what one has met is raised on all."""
        self.writer.wait()
        if self._writers is None:  # of their own, so that they never take what training exchanges meanwhile
            self._writers = dist.new_group(backend="gloo", timeout=self._timeout)
        write = copied(checkpoint, path, self._writers)
        self.writer.start(lambda: write(then))

    def teardown(self) -> None:
        """Wait for the writer; where the trainer ends by an error, it is the one that is said."""
        with suppress(Exception):
            self.writer.wait()
        super().teardown()

    # -- loading -------------------------------------------------------------------------------------------------------------

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """A sharded checkpoint, of each tensor this rank's slice; or a single file, mapped into memory.

        Raises:
            UserError: it is damaged.
        """
        path = Path(self.broadcast(checkpoint_path))
        problem = self.broadcast(damage(path) if self.is_global_zero and path.exists() else None)  # once for all ranks
        if problem:
            raise UserError(path, f"a damaged checkpoint ({problem})", "an intact one")
        if not (path / INDEX).is_file():
            return load_checkpoint(path, mapped=True)
        assert self.device_mesh is not None
        mesh = self.device_mesh["data_parallel"]
        return read_sharded(path, lambda whole: empty(*whole.shape, dtype=whole.dtype, device_mesh=mesh, placements=[Shard(0)]))

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Copy this rank's part of each tensor; which keys there must be, the method has checked."""
        assert self.lightning_module is not None
        own = self.lightning_module.state_dict()
        with torch.no_grad():
            for key, saved in checkpoint["state_dict"].items():
                if key in own:
                    own[key].copy_(placed(saved, own[key]))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Give each parameter's slice its part of the saved states."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            state = {
                number: {slot: placed(value, parameters[number]) for slot, value in slots.items()}
                for number, slots in saved["state"].items()
            }
            optimizer.load_state_dict({"state": state, "param_groups": saved["param_groups"]})


def sharded_blocks(module: nn.Module) -> list[nn.Module]:
    """Modules whose weights are gathered only while they compute; everything else is gathered for the whole step.

    Elements of the outermost ``ModuleList``s, such as the layers of a transformer, that share no parameter with the rest. They must
    be called through their ``forward``; of elements without one the elements of their own lists.
    """
    owners: Counter[int] = Counter(id(parameter) for _, parameter in module.named_parameters(remove_duplicate=False))
    blocks: list[nn.Module] = []
    inside: set[int] = set()
    for candidate in module.modules():  # parents come first
        if not isinstance(candidate, nn.ModuleList) or id(candidate) in inside:
            continue
        for block in candidate:
            if type(block).forward is nn.Module.forward and not isinstance(block, nn.ModuleList):
                continue  # holds the lists of one level, and is never called itself
            inside |= {id(child) for child in block.modules()}
            parameters = list(block.parameters())
            if parameters and all(owners[id(p)] == 1 for p in parameters) and not isinstance(block, nn.ModuleList):
                blocks.append(block)
    return blocks


def small_frozen(module: nn.Module, most: int) -> set[nn.Parameter]:
    """Weights of a method's frozen parts of up to ``most`` MiB each, and of such networks inside its trained parts.

    None where nothing says what its parts are.
    """
    parts = module.all_parts().values() if isinstance(module, NamedParts) else ()
    inside = [network for part in parts for network in part.modules() if isinstance(network, FrozenBackbone)]
    found: set[nn.Parameter] = set()
    for network in [*parts, *inside]:
        weights = list(network.parameters())
        size = sum(weight.numel() * weight.element_size() for weight in weights)
        if size <= most * 2**20 and not any(weight.requires_grad for weight in weights):
            found.update(weights)
    return found


def assert_one_dtype(module: nn.Module, blocks: Sequence[nn.Module]) -> None:
    """Refuse trained weights of two dtypes that are gathered together, which torch asserts in the first step.

    Raises:
        UserError: names a weight of each.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    inside = {id(parameter) for block in blocks for parameter in block.parameters()}
    root = [parameter for parameter in module.parameters() if id(parameter) not in inside]
    for group in [*(list(block.parameters()) for block in blocks), root]:
        first: dict[torch.dtype, str] = {}
        for parameter in group:
            if parameter.requires_grad:
                first.setdefault(parameter.dtype, names[id(parameter)])
        if len(first) > 1:
            said = " and ".join(f"'{name}' in {str(dtype).removeprefix('torch.')}" for dtype, name in first.items())
            raise UserError("trainer.strategy", f"trained weights that are gathered together, {said}", "one dtype, or ddp")


def gather_weights(module: nn.Module | None, whole: bool) -> None:
    """Make sharded weights whole on every rank until further notice, or share them out again; all ranks call it together."""
    if not isinstance(module, FSDPModule) or whole == getattr(module, "_weights_are_whole", False):
        return
    module._weights_are_whole = whole
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_reshard_after_forward(not whole, recurse=False)
            part.unshard() if whole else part.reshard()


def placed(saved: Any, target: Tensor) -> Any:
    """A saved value, sliced as the tensor that it belongs to."""
    if isinstance(saved, DTensor):
        return saved if isinstance(target, DTensor) else saved.full_tensor()
    if isinstance(target, DTensor) and isinstance(saved, Tensor) and saved.shape == target.shape:
        return distribute_tensor(saved.to(target.device), target.device_mesh, target.placements, src_data_rank=None)
    return saved
