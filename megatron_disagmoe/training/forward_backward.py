"""AF-pipe's ``forward_backward_func``: what Megatron's ``train_step`` and ``evaluate`` call."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.utils import get_model_config, unwrap_model
from megatron.training import get_args

from megatron_disagmoe import arguments, megatron_seams, parallel_state
from megatron_disagmoe.model.stages import AttentionStages, ExpertStages
from megatron_disagmoe.runtime import weight_gradients
from megatron_disagmoe.runtime.executor import Executor, Worker
from megatron_disagmoe.runtime.links import Links
from megatron_disagmoe.runtime.workers import AttentionWorker, ExpertWorker
from megatron_disagmoe.schedule_choice import StepSchedule
from megatron_disagmoe.training import last_words, transfers
from megatron_disagmoe.training.batches import BatchFeed
from megatron_disagmoe.training.process_groups import transport
from megatron_disagmoe.training.schedule import schedule_for
from megatron_disagmoe.training.tied_embedding import TiedEmbedding
from megatron_disagmoe.training.traces import keep_schedule, recorder


def get_forward_backward_func(*args: Any, **kwargs: Any) -> Callable[..., list[Any]]:
    """Stands for Megatron's function of the same name."""
    return forward_backward


def forward_backward(
    *,
    forward_step_func: Callable[..., Any],
    data_iterator: Any,
    model: Any,
    num_microbatches: int,
    forward_only: bool = False,
    collect_non_loss_data: bool = False,
    force_all_reduce: bool = False,
    **_: Any,
) -> list[dict[str, Any]]:
    """One step of the whole pipe; what the loss function reported, per micro-batch, on the tail's ranks, else ``[]``.

    Arguments are those of Megatron's schedules; sizes are taken from the batches.
    """
    if collect_non_loss_data:
        raise ValueError("process_non_loss_data_func is not supported with --af-pipe")
    model = model[0] if isinstance(model, list) else model
    iterator = data_iterator[0] if isinstance(data_iterator, list) else data_iterator
    pipe = _pipe(unwrap_model(model))
    step = _Step(model, num_microbatches, forward_only=forward_only)
    plan = schedule_for(num_microbatches, forward_only=forward_only)
    if not forward_only:
        keep_schedule(plan.schedule)
    timers = step.config.timers
    if timers is not None:
        timers("forward-backward", log_level=1).start(barrier=step.config.barrier_with_L1_time)
    start = time.perf_counter_ns()
    step.set_aux_loss_scale()
    pipe.traffic.begin()
    with torch.no_grad() if forward_only else contextlib.nullcontext(), weight_gradients.split(plan.is_split):
        worker = pipe.worker(step, plan, forward_step_func, iterator)
        with last_words.on_lost_peer(dist.get_rank(), pipe.state.role):
            pipe.executor.run(plan.schedule, worker)
    if not forward_only:
        pipe.tied.add_up()
        step.finalize_gradients(force_all_reduce=force_all_reduce)
        pipe.traffic.end(get_args().curr_iteration + 1)
    args = get_args()  # curr_iteration is set by training, not by --skip-train
    iteration = getattr(args, "curr_iteration", args.iteration) + 1  # as Megatron logs it
    pipe.executor.recorder.step(iteration, start, time.perf_counter_ns())
    if timers is not None:
        timers("forward-backward").stop()
    return step.reports()


class _Step:
    """One call: the losses it reports and what happens to the gradients."""

    def __init__(self, model: Any, num_micro_batches: int, *, forward_only: bool) -> None:
        self.model = model
        self.config = get_model_config(model)
        self.num_micro_batches = num_micro_batches
        self.forward_only = forward_only
        self.num_tokens = 0
        self._reports: dict[int, dict[str, Any]] = {}

    def loss(self, micro_batch: int, output: torch.Tensor, loss_func: Callable[..., Any]) -> torch.Tensor:
        """Megatron's loss of one micro-batch, scaled for backward as ``backward_step`` scales it."""
        if self.config.timers is not None:
            self.config.timers("forward-compute", log_level=2).start()
        store: list[dict[str, Any]] = []
        loss, num_tokens = megatron_seams.resolve("megatron.core.pipeline_parallel.schedules:forward_step_calc_loss")(
            self.model,
            output,
            loss_func,
            self.config,
            None,
            False,
            self.num_micro_batches,
            store,
            cp_group_size=1,
            is_last_stage=True,
        )
        self._reports[micro_batch] = store[0]
        self.num_tokens += int(num_tokens.item())
        if not self.forward_only and self.config.grad_scale_func is not None:
            loss = self.config.grad_scale_func(loss)
        return loss

    def set_aux_loss_scale(self) -> None:
        """What ``forward_step_calc_loss`` does on the rank with the loss, on every attention rank."""
        if self.forward_only or not parallel_state.state().is_attention:
            return
        scale = torch.ones(1, device=torch.cuda.current_device())
        if self.config.grad_scale_func is not None:
            scale = self.config.grad_scale_func(scale)
        if not self.config.calculate_per_token_loss:
            scale = scale / self.num_micro_batches
        MoEAuxLossAutoScaler.set_loss_scale(scale)

    def finalize_gradients(self, *, force_all_reduce: bool) -> None:
        """Reduce this rank's gradients with Megatron's function; per-token loss is divided by the tail's count."""
        if self.config.finalize_model_grads_func is None:
            return
        self.config.finalize_model_grads_func([self.model], None, force_all_reduce=force_all_reduce)
        if self.config.calculate_per_token_loss:
            total = torch.tensor([self.num_tokens], dtype=torch.int64, device=torch.cuda.current_device())
            dist.all_reduce(total)
            self.model.scale_gradients(1.0 / torch.clamp(total, min=1))

    def reports(self) -> list[dict[str, Any]]:
        """What the loss function reported, in order of the micro-batches."""
        return [self._reports[micro_batch] for micro_batch in sorted(self._reports)]


class _Pipe:
    """What lives as long as the model: its stages and the executor."""

    def __init__(self, model: GPTModel) -> None:
        args = get_args()
        state = parallel_state.state()
        self.state = state
        self.layout = arguments.layout(args)
        self.dispatcher = transfers.dispatcher(args, model.config)
        shared = model.config.moe_shared_expert_intermediate_size is not None
        specs = transfers.edge_specs(args, self.dispatcher, shared=shared)
        self.executor = Executor(Links(state.topology, state.role, transport(), specs, recorder()), recorder())
        last_words.on_sigterm(dist.get_rank(), state.role, self.executor.doing)
        last_words.on_error(dist.get_rank(), state.role, self.executor.doing)
        self.exchange = transfers.node_exchange(transport(), self.dispatcher)
        self.traffic = transfers.TrafficLog(transport())
        self.num_stages = state.topology.placement.num_layers
        self.tied = TiedEmbedding(model)
        if state.is_attention:
            recompute = args.af_recompute in ("attention", "both")
            self.attention = AttentionStages(model, self.layout, self.dispatcher, recompute=recompute)
        else:
            recompute = args.af_recompute in ("ffn", "both")
            self.experts = ExpertStages(model, self.layout, self.dispatcher, recompute=recompute)

    def worker(
        self, step: _Step, plan: StepSchedule, forward_step: Callable[..., Any], data_iterator: Any
    ) -> Worker:
        """The worker of one step."""
        if not self.state.is_attention:
            return ExpertWorker(
                self.experts, forward_only=step.forward_only, again=plan.again, exchange=self.exchange
            )
        group = self.state.role.group.index
        uses = sum(holder == group for holder in self.state.topology.placement.attention)
        return AttentionWorker(
            self.attention,
            self.num_stages,
            batch=BatchFeed(forward_step, data_iterator, step.model, uses=uses),
            loss=step.loss,
            forward_only=step.forward_only,
            again=plan.again,
            embedding_backward=self.tied.embedding_backward,
        )


_PIPE: tuple[GPTModel, _Pipe] | None = None


def _pipe(model: GPTModel) -> _Pipe:
    global _PIPE
    if _PIPE is None or _PIPE[0] is not model:
        if not isinstance(model, GPTModel):
            raise ValueError(f"--af-pipe trains a GPTModel; this script builds a {type(model).__name__}")
        _PIPE = (model, _Pipe(model))
    return _PIPE[1]
