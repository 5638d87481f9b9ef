"""The dry run: a real model's real training step, replayed without a GPU, memory or arithmetic, and its peak to the
byte.

    run = replay_config({"model_type": "llama", ...}, micro_batch_size=1, sequence_length=2048, dtype="bf16")
    run.peak_allocated              # what torch.cuda.max_memory_allocated() would read for the steady (second) step
    run.moments["forward_end"]      # and at the moments of the step
    run.peak.tensors[:10]           # what was live at the peak, largest first

The reference step is

    loss = model(input_ids=x, labels=x, use_cache=False).loss
    loss.backward(); optimizer.step(); optimizer.zero_grad(set_to_none=True)

with int64 ids on the device, in train mode with the configuration's own dropout, outputs other than the loss not kept.
Steps after the first are alike, for the optimizer's states exist from then on; the last one is reported.

Not counted: the CUDA context, the allocator's reserved but free blocks, and (unless `workspace_bytes` says so) the
two cuBLAS workspaces. Kernels' scratch is counted where `planner.measure.cuda_semantics` makes it visible.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from planner.errors import NotCovered, PlanError, nearest
from planner.measure.cuda_autocast import CudaAutocast
from planner.measure.cuda_semantics import KERNEL_SCRATCH, CudaSemantics
from planner.measure.live_memory import ALLOCATION_GRANULARITY_BYTES, Allocation, LiveMemory, LiveTensor, Peak
from planner.measure.sharded import CALLER_ROLES, Sharding, one_rank_of, shard
from planner.measure.stepping import STEPPERS, stepper_for
from planner.measure.transformers_edge import build_causal_lm, with_adapters, without_gpu_checks

__all__ = ["DryRun", "Saved", "materialise", "replay", "replay_config", "replay_training_step", "trace"]

MOMENTS = ("forward_end", "forward_peak", "backward_peak", "optimizer_peak", "steady")

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

_ATTENTIONS = ("sdpa", "flash_attention_2", "eager")


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """One storage that autograd kept for backward, at the module call that first kept it."""

    bytes: int
    shape: tuple[int, ...]
    dtype: str
    made_by: str
    made_in: str
    category: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DryRun:
    """The steady step of a replay. All sizes are bytes as the CUDA caching allocator counts them.

    `moments` has the keys forward_end, forward_peak, backward_peak, optimizer_peak and steady; `peak` is the highest
    of all, with every tensor live there; `saved_by_module` maps a module's dotted name to what autograd kept in its
    own forward (not its children's), in order, each storage once, where it was first kept.
    """

    peak_allocated: int
    peak_moment: str
    moments: Mapping[str, int]
    breakdown: Mapping[str, int]
    peak: Peak
    peaks: Mapping[str, Peak]
    saved_by_module: Mapping[str, Sequence[Saved]]
    parameters: int
    trainable_parameters: int

    def largest(self, count: int = 20) -> tuple[LiveTensor, ...]:
        """The largest tensors live at the peak."""
        return self.peak.tensors[:count]


def materialise(module: torch.nn.Module, mode: FakeTensorMode) -> None:
    """Replace every meta parameter and buffer of `module` by a fake CPU tensor of the same layout; what is tied
    stays tied.

    Plain tensor attributes (copies of rotary frequencies, say) are replaced as well.
    """
    twins: dict[int, torch.Tensor] = {}
    keep_alive: list[torch.Tensor] = []

    def twin(tensor: torch.Tensor, is_parameter: bool) -> torch.Tensor:
        if id(tensor) not in twins:
            with mode:
                fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
            if is_parameter:
                fake = torch.nn.Parameter(fake, requires_grad=tensor.requires_grad)
            twins[id(tensor)] = fake
            keep_alive.append(tensor)  # so that no id is used twice
        return twins[id(tensor)]

    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = twin(parameter, True)  # pyright: ignore[reportArgumentType]
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = twin(buffer, False)
        for name, value in list(vars(part).items()):
            if isinstance(value, torch.Tensor) and id(value) in twins:
                vars(part)[name] = twins[id(value)]
            elif isinstance(value, torch.Tensor) and value.device.type == "meta":
                vars(part)[name] = twin(value, False)


def replay(
    step: Callable[[LiveMemory], None],
    *,
    model: torch.nn.Module,
    mode: FakeTensorMode | None = None,
    wrap: Callable[[torch.nn.Module], torch.nn.Module] | None = None,
    kernel: str = "auto",
    vocabulary_size: int | None = None,
    workspace_bytes: int = 0,
    record_saved: bool = False,
    granularity: int = ALLOCATION_GRANULARITY_BYTES,
) -> DryRun:
    """Replay `step` once on `model`, already materialised under `mode`, and report the last occurrence of each phase.

    `step` calls `memory.mark("forward" | "backward" | "optimizer" | "steady")` as it goes, and may loop for several
    steps: the last is reported. `wrap` is what a sharding engine makes of the model, before the first step.
    """
    mode = mode or FakeTensorMode(allow_non_fake_inputs=True)
    saved: dict[str, list[tuple[Allocation, tuple[int, ...], torch.dtype]]] = {}
    with ExitStack() as stack:
        stack.enter_context(without_gpu_checks())
        stack.enter_context(mode)
        memory = stack.enter_context(
            LiveMemory(granularity=granularity, scratch=KERNEL_SCRATCH, caller_roles=CALLER_ROLES if wrap else None)
        )
        stack.enter_context(CudaSemantics(kernel=kernel))
        stack.enter_context(CudaAutocast())
        memory.name_modules(model)
        if wrap is not None:
            memory.adopt(model.parameters(), role="weights")
            model = wrap(model)
            gc.collect()
        memory.adopt(model.parameters(), role="weights")
        memory.adopt(model.buffers(), role="weights")
        if workspace_bytes:
            workspace = torch.empty(workspace_bytes, dtype=torch.uint8)
            memory.adopt([workspace], role="library_workspaces", operator="cuBLAS workspace")
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda p: memory.adopt([p.grad], role="gradients"))
        if record_saved:
            seen: set[int] = set()

            def pack(tensor: torch.Tensor) -> torch.Tensor:
                allocation = memory.allocation_of(tensor)
                if allocation is not None and id(allocation) not in seen:
                    seen.add(id(allocation))
                    saved.setdefault(memory.module, []).append((allocation, tuple(tensor.shape), tensor.dtype))
                return tensor

            def start_over(phase: str) -> None:
                if phase == "forward":
                    saved.clear()
                    seen.clear()

            memory.on_mark = start_over
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor))
        step(memory)
        end = len(memory.events)
        categorise = _categories(memory, vocabulary_size)
        return _report(memory, end, categorise, saved, model)


def _categories(memory: LiveMemory, vocabulary_size: int | None) -> Callable[[Allocation], str]:
    def category(allocation: Allocation) -> str:
        if allocation.role is not None:
            return allocation.role
        if (
            vocabulary_size
            and allocation.shape
            and allocation.shape[-1] == vocabulary_size
            and allocation.phase != "optimizer"
        ):
            return "logits_and_loss"
        return "activations" if allocation.kept else "temporaries"

    return category


def _report(
    memory: LiveMemory, end: int, category: Callable[[Allocation], str], saved: Any, model: torch.nn.Module
) -> DryRun:
    last = {name: position for name, position in memory.marks}
    missing = [name for name in ("forward", "backward", "optimizer", "steady") if name not in last]
    if missing:
        raise PlanError(f"the replayed step never marked {', '.join(missing)}.")
    peaks = {
        "forward_peak": memory.peak(last["forward"], last["backward"], category),
        "forward_end": memory.at(last["backward"], category),
        "backward_peak": memory.peak(last["backward"], last["optimizer"], category),
        "optimizer_peak": memory.peak(last["optimizer"], last["steady"], category),
        "steady": memory.at(last["steady"], category),
    }
    moment = max(("forward_peak", "backward_peak", "optimizer_peak"), key=lambda name: peaks[name].bytes)
    return DryRun(
        peak_allocated=peaks[moment].bytes,
        peak_moment=moment,
        moments={name: peaks[name].bytes for name in MOMENTS},
        breakdown=peaks[moment].by_category(),
        peak=peaks[moment],
        peaks=peaks,
        saved_by_module={
            module: tuple(
                Saved(
                    bytes=a.size_bytes, shape=shape, dtype=str(dtype).removeprefix("torch."),
                    made_by=a.operator, made_in=a.module, category=category(a),
                )
                for a, shape, dtype in entries
            )
            for module, entries in saved.items()
        },
        parameters=sum(p.numel() for p in model.parameters()),
        trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
    )  # fmt: skip


def replay_training_step(
    build_model: Callable[[], torch.nn.Module],
    *,
    micro_batch_size: int,
    sequence_length: int,
    dtype: str = "bf16",
    optimizer: str = "adamw",
    optimizer_kwargs: Mapping[str, Any] | None = None,
    gradient_checkpointing: bool | str = False,
    attention: str = "sdpa",
    kernel: str = "auto",
    lora: Mapping[str, Any] | None = None,
    autocast: str | None = None,
    accumulation_steps: int = 1,
    set_to_none: bool = True,
    sharding: Sharding | Mapping[str, Any] | None = None,
    steps: int = 2,
    loss: str | Callable[[torch.nn.Module, torch.Tensor], torch.Tensor] = "default",
    hold_loss: bool = False,
    workspace_bytes: int = 0,
    record_saved: bool = False,
    granularity: int = ALLOCATION_GRANULARITY_BYTES,
) -> DryRun:
    """Replay `steps` reference steps of the model that `build_model` makes, and report the last.

    build_model             called under `torch.device("meta")`; a Hugging Face model, or any module called as
                            model(input_ids=, labels=)
    dtype                   bf16, fp16 or fp32: torch's default dtype while the model is built, so the format of its
                            parameters
    optimizer               a name of `planner.measure.stepping`
    optimizer_kwargs        passed to the optimizer; `foreach=True` unless said otherwise, as torch itself picks on CUDA
    gradient_checkpointing  True or "reentrant" (transformers' own default before 5.x), "non-reentrant", or False
    lora                    keyword arguments of `peft.LoraConfig`; adapters stay in fp32 beside 16-bit weights, as
                            peft does
    autocast                bf16 or fp16: the forward pass and the loss run under torch.autocast, with CUDA's lists
    accumulation_steps      micro-batches in a step; the last one is reported
    set_to_none             whether zero_grad frees gradients or fills them with zeros
    sharding                a `planner.measure.sharded.Sharding`, or its fields: one rank of many is replayed
    loss                    "default", or a function (model, ids) -> scalar
    hold_loss               keep the loss with its (freed) graph until the next forward has ended, as a bare loop
                            that names it does; by default it is detached after backward, as `transformers.Trainer`
                            does. It matters where the graph holds more than saved tensors: with adapters and
                            checkpointing, the embedding's output and its gradient.

    Raises PlanError for an unknown choice.
    """
    for given, accepted, what in (
        (dtype, DTYPES, "number format"),
        (optimizer, STEPPERS, "optimizer"),
        (attention, _ATTENTIONS, "attention"),
    ):
        if given not in accepted:
            raise PlanError(f'no {what} "{given}" in the dry run; {nearest(given, accepted)}')
    if autocast is not None and autocast not in DTYPES:
        raise PlanError(f'no number format "{autocast}" in the dry run; {nearest(autocast, DTYPES)}')
    if isinstance(sharding, Mapping):
        sharding = Sharding(**sharding)
    with torch.device("meta"), _default_dtype(DTYPES[dtype]):
        model = build_model()
    config = getattr(model, "config", None)
    if config is not None:
        config._attn_implementation = attention
    model.train()
    if gradient_checkpointing:
        reentrant = gradient_checkpointing != "non-reentrant"
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})  # pyright: ignore
        if lora is not None:
            model.enable_input_require_grads()  # pyright: ignore
    if lora is not None:
        with torch.device("meta"):
            model = with_adapters(model, lora)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    materialise(model, mode)
    model.train()
    compute_loss = _default_loss if loss == "default" else loss
    if isinstance(compute_loss, str):
        raise PlanError(f'no loss "{loss}" in the dry run; accepted: default, or a function (model, ids) -> scalar.')

    trained = [model]

    def step(memory: LiveMemory) -> None:
        model = trained[0]
        ids = torch.empty(micro_batch_size, sequence_length, dtype=torch.int64)
        memory.adopt([ids], role="inputs")
        stepper = stepper_for(
            optimizer, [(n, p) for n, p in model.named_parameters() if p.requires_grad], optimizer_kwargs or {}
        )
        for _ in range(steps):
            for _ in range(accumulation_steps):
                memory.mark("forward")
                with torch.autocast("cpu", DTYPES[autocast or "bf16"], enabled=autocast is not None):
                    loss_value = compute_loss(model, ids)
                memory.mark("backward")
                loss_value.backward()
                if not hold_loss:
                    loss_value = loss_value.detach()
            memory.adopt([p.grad for p in model.parameters() if p.grad is not None], role="gradients")
            memory.mark("optimizer")
            stepper.step()
            for _key, value, on_host in stepper.states():
                if on_host:
                    memory.set_aside(value)
                else:
                    memory.adopt([value], role="optimizer_states")
            stepper.zero_grad(set_to_none)
            memory.mark("steady")

    with one_rank_of(sharding.ranks) if sharding is not None else nullcontext() as mesh:

        def wrap(model: torch.nn.Module) -> torch.nn.Module:
            assert isinstance(sharding, Sharding) and mesh is not None
            trained[0] = shard(model, sharding, mesh)
            return trained[0]

        return replay(
            step,
            model=model,
            mode=mode,
            wrap=wrap if sharding is not None else None,
            kernel=kernel,
            vocabulary_size=getattr(config, "vocab_size", None),
            workspace_bytes=workspace_bytes,
            record_saved=record_saved,
            granularity=granularity,
        )


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _default_loss(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def replay_config(
    config: Mapping[str, Any], *, layers: int | None = None, attention: str = "sdpa", dtype: str = "bf16", **step: Any
) -> DryRun:
    """Replay a training step of the causal language model that a Hugging Face `config.json` (as a mapping) describes.

    `layers` overrides the number of layers; every other keyword is one of `replay_training_step`.
    """
    return replay_training_step(
        lambda: build_causal_lm(config, layers=layers), attention=attention, dtype=dtype, **step
    )


def trace(model_or_plan: Any, *, model: torch.nn.Module | None = None, **options: Any) -> DryRun:
    """Replay a training step of a plan, of a module, or as a function of yours says.

    model_or_plan
        a TrainingPlan or its document    the plan's real modules, optimizer and sharding. options: any of
                                          `replay_config`, instead of the plan's own
        a torch.nn.Module                 the reference step on a copy of it. options: those of `replay_training_step`,
                                          of which micro_batch_size and sequence_length are needed
        a function of (model, mark)       one step, or several, on a copy of `model`. It calls mark("forward"),
                                          mark("backward"), mark("optimizer") and mark("steady") as it goes; tensors
                                          that it makes are fake. options: those of `replay`

    Modules stay as they are: only shapes are copied. Raises NotCovered for what cannot be replayed.
    """
    from planner.plan import ServingPlan, TrainingPlan

    if isinstance(model_or_plan, torch.nn.Module):
        return replay_training_step(lambda: _shapes_of(model_or_plan), **options)
    if isinstance(model_or_plan, Mapping):
        from planner.readers.plan_document import plan_from_mapping

        model_or_plan = plan_from_mapping(model_or_plan)
    if isinstance(model_or_plan, ServingPlan):
        raise NotCovered("the dry run replays a training step; a serving plan has none.")
    if isinstance(model_or_plan, TrainingPlan):
        from planner.measure.plan_replay import config_of, replay_arguments

        return replay_config(config_of(model_or_plan.model), **{**replay_arguments(model_or_plan), **options})
    if not callable(model_or_plan) or model is None:
        raise PlanError("trace takes a training plan, a torch.nn.Module, or a step function together with `model`.")
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    copied = _shapes_of(model)
    materialise(copied, mode)

    def step(memory: LiveMemory) -> None:
        model_or_plan(copied, memory.mark)

    return replay(step, model=copied, mode=mode, **options)


def _shapes_of(module: torch.nn.Module) -> torch.nn.Module:
    """A copy of `module` on the meta device: its parameters and buffers have shapes and formats, and no values."""
    twins: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        twin = torch.empty_like(tensor, device="meta", requires_grad=False)
        if isinstance(tensor, torch.nn.Parameter):
            twin = torch.nn.Parameter(twin, requires_grad=tensor.requires_grad)
        twins[id(tensor)] = twin
    return copy.deepcopy(module, twins)
