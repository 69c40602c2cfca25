"""One rank of the training job: forward, backward and update of a model that is spread over a mesh."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.stateful import Stateful

from configs.schema import JobConfig
from parallelism import titan
from parallelism.average import WeightAverage
from parallelism.clock import Clock, Part
from parallelism.gradients import clip_by_global_norm
from parallelism.initialise import derive_seed, materialise
from parallelism.losses import StepLoss
from parallelism.lowp import build_lowp
from parallelism.lowp_state import Lowp
from parallelism.mesh import MeshCoords, World, coords_of, loss_ranks
from parallelism.optimizer import ShardedOptimizer, build_optimizer, local_of
from parallelism.precision import Precision, card_of, choose, installed
from parallelism.state import build_states
from parallelism.uncounted import evaluation, forget_trial_runs
from parallelism.updates import check_patterns


class Engine:
    """A model and its optimizer on this rank. Built by `build_engine`; every rank calls every method in step.

    coords: where this rank stands. n_params and flops_per_token are those of the whole model. clock: is told what
    this rank computes; one that runs may be put in its place. precision: what is computed in; converted: how many
    matrices of the whole model are multiplied in less than 16 bits. z_loss: this rank's share of the last step's, as
    the loss's, a detached scalar; zero where there is none.
    """

    def __init__(
        self,
        *,
        config: JobConfig,
        device: torch.device,
        coords: MeshCoords,
        plan: titan.Blueprint,
        pipeline: titan.Pipeline,
        optimizer: ShardedOptimizer,
        average: WeightAverage | None,
        states: dict[str, Stateful],
        counters: list[Tensor],
        loss: StepLoss,
        precision: Precision,
        lowp: Lowp | None,
    ) -> None:
        self.config = config
        self.precision = precision
        self.lowp = lowp
        self.device = device
        self.coords = coords
        self.parts: list[nn.Module] = pipeline.parts
        self.schedule = pipeline.schedule
        self.has_first_stage = pipeline.has_first_stage
        self.is_loss_rank = pipeline.has_last_stage
        self.optimizer = optimizer
        self.average = average
        self.states = states
        self.expert_counters = counters
        self.needs_masks = plan.needs_masks
        self.n_params = plan.n_params
        self.flops_per_token = plan.flops_per_token
        self.dp_rank = coords.dp_rank
        self.dp_degree = coords.dp_degree
        self.reads_data = True
        self.clock = Clock()
        self.z_loss = torch.zeros((), dtype=torch.float32, device=device)
        self._loss = loss
        self.global_tokens = config.training.global_batch_size * config.training.seq_len

    def forward_backward(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """Accumulate the gradients of this dp rank's share of the step.

        Args:
            tokens: [B_local, S + 1] int64, where B_local is global_batch_size / dp_degree; every stage gets them.
            positions: [B_local, S] int64, restarting at 0 with each document; used with FlexAttention to keep
                documents apart. Without them a sequence is one document.

        Returns:
            The sum of the token losses divided by the step's number of tokens over all ranks, a detached scalar;
            zero on a rank without the last stage. `z_loss` is no part of it.
        """
        self._loss.forget()
        if self.schedule is not None:
            self.clock.switch(Part.BACKWARD)
            total = self._run_schedule(self.schedule.step, tokens, positions)
        else:
            total = torch.zeros((), dtype=torch.float32, device=self.device)
            self.clock.switch(Part.FORWARD)
            for loss in self._chunk_losses(tokens, positions):
                self.clock.switch(Part.BACKWARD)
                loss.backward()
                total += loss.detach()
                self.clock.switch(Part.FORWARD)
        if self._loss.has_z and self.is_loss_rank:
            total, self.z_loss = self._loss.parts()
        self.clock.switch(Part.OTHER)
        return total

    def evaluate(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """The loss of this dp rank's share of a batch, with the weights as they are; nothing that trains changes.

        Arguments and result are those of `forward_backward`.
        """
        with evaluation(self.parts), torch.no_grad():
            if self.schedule is not None:
                return self._run_schedule(self.schedule.eval, tokens, positions)
            return torch.stack(list(self._chunk_losses(tokens, positions))).sum()

    def _chunk_losses(self, tokens: Tensor, positions: Tensor | None) -> Iterator[Tensor]:
        """The loss of one microbatch after the other, each as a part of the step's mean."""
        inputs, labels, positions = self._on_device(tokens, positions)
        size = self.config.training.microbatch_size
        for start in range(0, len(inputs), size):
            chunk = slice(start, start + size)
            extra = self._model_inputs(inputs[chunk], None if positions is None else positions[chunk])
            yield self._loss(self.parts[0](inputs[chunk], **extra), labels[chunk])

    def _on_device(self, tokens: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        tokens = tokens.to(self.device)
        if positions is not None:
            positions = positions.to(self.device)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), positions

    def _run_schedule(self, run: Callable[..., Any], tokens: Tensor, positions: Tensor | None) -> Tensor:
        inputs, labels, positions = self._on_device(tokens, positions)
        losses: list[Tensor] = []
        run(
            *((inputs,) if self.has_first_stage else ()),
            target=labels if self.is_loss_rank else None,
            losses=losses if self.is_loss_rank else None,
            return_outputs=False,
            **self._model_inputs(inputs, positions),
        )
        if not self.is_loss_rank:
            return torch.zeros((), dtype=torch.float32, device=self.device)
        return torch.stack([loss.detach().to(self.device) for loss in losses]).sum()

    def _model_inputs(self, inputs: Tensor, positions: Tensor | None) -> dict[str, Any]:
        if not self.needs_masks:
            return {}
        if positions is None:
            positions = torch.arange(inputs.shape[1], device=self.device).expand(inputs.shape[0], -1).contiguous()
        return {"positions": positions, "attention_masks": titan.attention_masks(self.parts[0], positions)}

    def global_loss(self, local: Tensor) -> tuple[float, float]:
        """Mean loss over all tokens of the step, and the largest mean of a dp rank; equal on every rank."""
        gathered = torch.empty(dist.get_world_size(), dtype=torch.float32, device=self.device)
        dist.all_gather(list(gathered.split(1)), local.reshape(1))
        shares = gathered[loss_ranks(self.config.parallelism)].double()
        average, largest = torch.stack([shares.sum(), shares.max() * self.dp_degree]).tolist()
        return average, largest

    def clip_grad_norm(self, max_norm: float) -> Tensor:
        """Scale gradients down to a global norm of max_norm; returns the norm before, equal on every rank."""
        self.clock.switch(Part.OPTIMIZER)
        norm = clip_by_global_norm(self.parts, dist.get_world_size() // self.config.parallelism.pp, max_norm)
        self.clock.switch(Part.OTHER)
        return norm

    def optimizer_step(self, lr: float, step: int) -> None:
        """Apply the accumulated gradients as update `step` at learning rate lr, and clear them."""
        self.clock.switch(Part.OPTIMIZER)
        self.optimizer.step(lr)
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update(step)
        if self.lowp is not None:
            self.lowp.updated()
        self.clock.switch(Part.OTHER)

    def discard_update(self) -> None:
        """Forget the accumulated gradients, and all else that the batch left behind."""
        self.optimizer.zero_grad()
        with torch.no_grad():
            for counter in self.expert_counters:
                counter.zero_()
        if self.lowp is not None:
            self.lowp.forget()

    def seed_step(self, step: int, dp_rank: int | None = None) -> None:
        """Seed torch's generators from (run.seed, step, dp rank), so that there is no generator state to save.

        dp_rank: whose share of the step will be computed; None: this rank's own.
        """
        share = self.dp_rank if dp_rank is None else dp_rank
        torch.manual_seed(derive_seed(self.config.run.seed, "step", step, share))
        if self.lowp is not None:
            self.lowp.begin(step, share)

    @property
    def converted(self) -> int:
        """See above."""
        return 0 if self.lowp is None else len(self.lowp.sites)

    def gradients(self) -> list[Tensor | None]:
        """The local gradients as the next update will take them, in the order of `optimizer.slots`."""
        found = [slot.parameter.grad for slot in self.optimizer.slots]
        return [None if gradient is None else local_of(gradient) for gradient in found]

    def state(self) -> dict[str, Stateful]:
        """`model`, `optimizer` and, where there is one, `ema`, and `precision` if scales are state: live tensors by
        layout-independent names."""
        return self.states


def build_engine(config: JobConfig, world: World, *, init_weights: bool = True) -> Engine:
    """Build this rank's engine. Collective; torch.distributed must be initialised, also for one process.

    Args:
        config: a configuration that `configs.check` accepted.
        world: this process.
        init_weights: False leaves weights unset, for a caller that loads a snapshot into `state()` next.

    Raises:
        ValueError: the model cannot be laid out as configured, or the device cannot compute in the configured recipe.
    """
    precision = choose(config, card_of(world.device), installed())
    titan.prepare_process(world.device)
    lowp = build_lowp(config, precision, world.device)
    plan = titan.blueprint(config, world.device, lowp)
    check_patterns(config.optimizer, {titan.canonical_name(n): p.ndim for n, p in plan.model.named_parameters()})
    dims = titan.build_dims(config, world)
    loss = StepLoss(config.training.z_loss, config.training.global_batch_size * config.training.seq_len)
    pipeline = titan.parallelise(plan, config, dims, world.device, precision.param_dtype, loss)
    if lowp is not None:
        lowp.materialise(world.device)
    if pipeline.schedule is not None:
        forget_trial_runs(pipeline.schedule, pipeline.parts, [loss.forget, *([lowp.forget] if lowp else [])])
    for part in pipeline.parts:
        materialise(part, world.device, config.run.seed, init_weights)
    optimizer = build_optimizer(config, pipeline.parts)
    average = WeightAverage(config.ema, optimizer.slots, init_weights) if config.ema.decay else None
    titan.register_load_balancing(plan, optimizer.adamw, pipeline.parts, dims)
    return Engine(
        config=config,
        device=world.device,
        coords=coords_of(world.rank, config.parallelism),
        plan=plan,
        pipeline=pipeline,
        optimizer=optimizer,
        average=average,
        states=build_states(pipeline.parts, optimizer, average, lowp),
        counters=titan.expert_token_counters(pipeline.parts),
        loss=loss,
        precision=precision,
        lowp=lowp,
    )
