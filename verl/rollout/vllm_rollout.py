"""vLLM in a worker's own process, fed with stored features and with the trainer's weights.

Letters: P prompt tokens, R response tokens.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from verl.models.adapter import Adapter
from verl.rollout import RolloutOutput, RolloutRequest, SamplingParams, vllm_compat, vllm_plugin
from verl.rollout.requests import RequestLimits, engine_prompt
from verl.rollout.weight_sync import load_weights
from verl.utils.exits import UserError
from verl.utils.torch_functional import same_random_state

logger = logging.getLogger(__name__)
CPU_CACHE_BYTES = 2**31
"""Most memory for keys and values on a CPU, where no share of a GPU's memory says how much."""
CPU_BLOCK_TOKENS = 32
"""Tokens of a block of the cache on a CPU, the fewest that its attention takes: prompts that are
shorter are never shared."""
GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
"""CUDA graphs of decoding and no compiler: prefill of long prompts gains nothing from either, and
the engine starts within a minute."""
SEEDS = 2**62
"""vLLM adds a sample's number to the seed of its request."""
WAVE_TOKENS = 2**21
"""Most tokens of the prompts that are asked for together: 8 hours of video at 252k tokens, whose
features are 8 GB for the 3B model."""
BANNED = -100.0
"""Added to the logits of placeholders, which no sampler may draw; also seen by the log-probs."""


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """What a vLLM engine is started with; names are those of `worker.rollout.*`."""

    model_path: str
    """Folder with config.json, tokenizer and processor; weights are not read."""
    dtype: torch.dtype
    max_model_len: int
    max_num_batched_tokens: int
    max_num_seqs: int
    tensor_parallel_size: int
    gpu_memory_utilization: float
    enforce_eager: bool
    enable_chunked_prefill: bool
    limit_images: int
    trust_remote_code: bool = False


class VLLMRollout:
    """A vLLM engine that starts without weights; `load_weights` comes first.

    Every rank of the default process group makes its engine at the same time, and keeps it until
    the process ends: deleting one destroys the process groups of all.
    """

    def __init__(
        self,
        settings: EngineSettings,
        adapter: Adapter,
        device: torch.device,
        *,
        rank: int = 0,
        world_size: int = 1,
        run: str = "",
    ) -> None:
        """`rank` of `world_size` is that in the default process group, which must be there.

        `run` is one name for all ranks, that no other run on the machine has.
        Raises UserError where vLLM is missing or of a version that is not supported.
        """
        if problem := vllm_compat.version_problem(vllm_compat.vllm_version()):
            raise UserError(f"worker.rollout.name=vllm: {problem}")
        self._device = device
        self._forbidden = adapter.forbidden_ids
        self._is_mrope = adapter.vision is not None
        self._limits = RequestLimits(
            max_model_len=settings.max_model_len,
            hidden=adapter.shape.hidden,
            placeholder_ids=adapter.forbidden_ids,
            limit_images=settings.limit_images,
        )
        self._sleeps = False
        self._has_weights = False
        self._knows_weights = False
        self._positions_agree = False
        self._start_up: dict[str, float] = {}
        with same_random_state(device):
            with self._timed("import of vLLM"):
                vllm_compat.prepare_environment(device)
                from vllm import LLM

                if adapter.vision is not None:
                    vllm_plugin.register()
                self._log = vllm_compat.LastLines()
            with (
                self._timed("engine"),
                _as_external_rank(device, rank, world_size),
                vllm_compat.own_shared_memory(run),
            ):
                self._llm = LLM(**engine_arguments(settings, adapter, device))

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._start_up[part] = time.perf_counter() - started

    def start_up_seconds(self) -> dict[str, float]:
        return dict(self._start_up)

    def load_weights(self, named: Iterable[tuple[str, Tensor]]) -> None:
        with same_random_state(self._device):
            self._wake("weights")
            load_weights(self._llm, named, is_first=not self._knows_weights)
            self._wake("kv_cache")
        self._sleeps, self._has_weights, self._knows_weights = False, True, True

    def sleep(self) -> None:
        """Gives the device's memory back, weights included; nothing on a CPU."""
        if self._device.type == "cuda" and not self._sleeps:
            self._llm.sleep(level=2)
            self._sleeps, self._has_weights = True, False

    def asleep_bytes(self) -> int:
        return vllm_compat.asleep_bytes() if self._sleeps else 0

    def _wake(self, part: str) -> None:
        if not self._sleeps:
            return
        # What training has freed is still torch's; the engine asks the device itself.
        torch.cuda.empty_cache()
        try:
            self._llm.wake_up(tags=[part])
        except RuntimeError as error:
            free, total = (n / 2**30 for n in torch.cuda.mem_get_info(self._device))
            raise UserError(
                f"vLLM cannot take its memory back ({error}): {free:.1f} of {total:.1f} GiB are "
                "free; lower worker.rollout.gpu_memory_utilization, or set "
                "worker.actor.offload.offload_optimizer=true"
            ) from error

    def waves(
        self, prompt_lens: Sequence[int], n_samples: Sequence[int], max_tokens: int
    ) -> list[list[int]]:
        """All together, but for prompts of which the features would fill the host's memory."""
        found: list[list[int]] = []
        room = 0
        for i, length in enumerate(prompt_lens):
            if length > room:
                found.append([])
                room = max(length, WAVE_TOKENS)
            found[-1].append(i)
            room -= length
        return found

    def generate(
        self, requests: Sequence[RolloutRequest], params: SamplingParams
    ) -> list[list[RolloutOutput]]:
        """Samples of each request, in the order of its seeds.

        vLLM numbers the seeds of a request's samples onwards from the first, which alone counts
        here. Raises UserError for a request that the engine cannot take, and RuntimeError with the
        requests under way where the engine fails.
        """
        if not self._has_weights:
            raise RuntimeError("the rollout engine has no weights: load_weights comes first")
        if not requests:
            return []
        # The longest first: short ones then fill the last steps.
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i].prompt_ids))
        asked = [requests[i] for i in order]
        prompts = [engine_prompt(r, self._limits, params.max_tokens) for r in asked]
        sampling = [self._sampling(r, params) for r in asked]
        with same_random_state(self._device):
            answers = self._answers(asked, prompts, sampling)
        found = [self._outputs(r, answer) for r, answer in zip(asked, answers, strict=True)]
        return [outputs for _, outputs in sorted(zip(order, found, strict=True))]

    def _answers(
        self, asked: Sequence[RolloutRequest], prompts: list[Any], sampling: list[Any]
    ) -> list[Any]:
        if self._positions_agree:
            return self._run(asked, prompts, sampling)
        with vllm_compat.recorded_positions(self._llm) as seen:
            answers = self._run(asked, prompts, sampling)
        if self._is_mrope:
            check_positions(asked, seen)
        self._positions_agree = True
        return answers

    def _run(
        self, asked: Sequence[RolloutRequest], prompts: list[Any], sampling: list[Any]
    ) -> list[Any]:
        try:
            return self._llm.generate(prompts, sampling, use_tqdm=False)
        except Exception as error:
            running = set(vllm_compat.abandon_requests(self._llm))
            if isinstance(error, torch.OutOfMemoryError):
                raise
            of = [r.name or "(unnamed)" for r in asked if tuple(r.prompt_ids.tolist()) in running]
            names = ", ".join(of[:5]) or "none"
            raise RuntimeError(
                f"vLLM failed with {len(asked)} prompts to answer, of which these were running: "
                f"{names}. {type(error).__name__}: {error}{self._log.text()}"
            ) from error

    def _sampling(self, request: RolloutRequest, params: SamplingParams) -> Any:
        from vllm import SamplingParams as EngineParams

        return EngineParams(
            # Greedy samples are all the same, and vLLM makes no more than one.
            n=len(request.seeds) if params.temperature else 1,
            seed=request.seeds[0] % SEEDS,
            max_tokens=params.max_tokens,
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k,
            logprobs=0,
            detokenize=False,
            logit_bias=dict.fromkeys(self._forbidden, BANNED) or None,
            # What ends a response is the list alone, and not what the model's files say beside it.
            ignore_eos=True,
            stop_token_ids=[] if params.ignore_eos else list(params.stop_ids),
        )

    def _outputs(self, request: RolloutRequest, answer: Any) -> list[RolloutOutput]:
        require_same_ids(request, answer.prompt_token_ids)
        for completion in answer.outputs:
            if completion.finish_reason not in ("stop", "length"):
                raise RuntimeError(
                    f"prompt {request.name or '(unnamed)'}: vLLM ended a response with "
                    f"{completion.finish_reason!r}{self._log.text()}"
                )
        found = [
            _output(completion) for completion in sorted(answer.outputs, key=lambda o: o.index)
        ]
        return found if len(found) > 1 else found * len(request.seeds)


def engine_arguments(
    settings: EngineSettings, adapter: Adapter, device: torch.device
) -> dict[str, Any]:
    """Arguments of `vllm.LLM`."""
    on_gpu = device.type == "cuda"
    arguments: dict[str, Any] = {
        "model": settings.model_path,
        "dtype": str(settings.dtype).removeprefix("torch."),
        # The trainer's weights come before the first prompt, so none are read from files.
        "load_format": "dummy",
        "trust_remote_code": settings.trust_remote_code,
        "distributed_executor_backend": "external_launcher",
        "tensor_parallel_size": settings.tensor_parallel_size,
        "max_model_len": settings.max_model_len,
        "max_num_batched_tokens": settings.max_num_batched_tokens,
        "max_num_seqs": settings.max_num_seqs,
        "enable_chunked_prefill": settings.enable_chunked_prefill,
        "enable_prefix_caching": True,
        "enforce_eager": settings.enforce_eager or not on_gpu,
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "disable_log_stats": True,
        "generation_config": "vllm",
        # Of the law that was sampled from: under the temperature, without the banned words.
        "logprobs_mode": "processed_logprobs",
        "seed": 0,
    }
    if adapter.vision is not None:
        # Limits of 0 are those of pixels: no tower is built, and features are taken all the same.
        arguments |= {
            "enable_mm_embeds": True,
            "limit_mm_per_prompt": {"image": 0, "video": 0},
            "mm_processor_cache_gb": 0,
            "skip_mm_profiling": True,
            "hf_overrides": {vllm_plugin.LIMIT: settings.max_model_len},
        }
    if on_gpu:
        arguments["enable_sleep_mode"] = True
        arguments["compilation_config"] = GRAPHS
    else:
        # Of a prompt that is cut, vLLM winds the generator back, which those of CPUs cannot do
        # (0.32: v1/worker/gpu_model_runner.py, `generator.set_offset`).
        arguments["enable_chunked_prefill"] = False
        arguments["max_num_batched_tokens"] = max(
            settings.max_num_batched_tokens, settings.max_model_len
        )
        arguments["block_size"] = CPU_BLOCK_TOKENS
        arguments["kv_cache_memory_bytes"] = cpu_cache_bytes(settings, adapter)
    return arguments


def cpu_cache_bytes(settings: EngineSettings, adapter: Adapter) -> int:
    """Room for all sequences at their full length, within bounds; at least for one."""
    shape, size = adapter.shape, settings.dtype.itemsize
    of_token = 2 * shape.layers * shape.kv_heads * shape.head_dim * size
    of_block = of_token * CPU_BLOCK_TOKENS // settings.tensor_parallel_size
    of_sequence = of_block * (-(-settings.max_model_len // CPU_BLOCK_TOKENS) + 1)
    return max(of_sequence, min(CPU_CACHE_BYTES, settings.max_num_seqs * of_sequence))


def require_same_ids(request: RolloutRequest, answered: Sequence[int]) -> None:
    """Raises RuntimeError where the prompt that vLLM answered is not the trainer's."""
    own = request.prompt_ids.tolist()
    if own == list(answered):
        return
    pairs = zip(own, answered, strict=False)
    first = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(own), len(answered)))
    raise RuntimeError(
        f"prompt {request.name or '(unnamed)'}: vLLM answered a prompt of {len(answered)} tokens "
        f"that differs from the trainer's {len(own)} from token {first} on"
    )


def check_positions(
    requests: Sequence[RolloutRequest], seen: Iterable[tuple[tuple[int, ...], Tensor]]
) -> None:
    """Raises RuntimeError where vLLM's rotary positions are not the trainer's, of the first prompt.

    `seen` are token ids and positions (3, P or more): of a request that goes on after it made room
    for others, its response so far stands behind the prompt. Prompts with equal ids may differ in
    positions (videos of other speeds): one of them must fit. Every prompt must be among `seen`.
    """
    expected: dict[tuple[int, ...], list[RolloutRequest]] = {}
    for request in requests:
        expected.setdefault(tuple(request.prompt_ids.tolist()), []).append(request)
    unseen = set(expected)
    for ids, positions in seen:
        prompt = next((p for p in expected if ids[: len(p)] == p), None)
        if prompt is None:
            raise RuntimeError(f"vLLM made rotary positions of {len(ids)} tokens nobody asked for")
        unseen.discard(prompt)
        own = expected[prompt]
        given = positions[:, : len(prompt)].to(own[0].positions)
        if any(torch.equal(r.positions, given) for r in own):
            continue
        differs = (own[0].positions != given).any(0)
        raise RuntimeError(
            f"prompt {own[0].name or '(unnamed)'}: vLLM's rotary positions differ from the "
            f"trainer's from token {int(differs.nonzero()[0])} on"
        )
    if unseen:
        names = ", ".join(r.name or "(unnamed)" for prompt in unseen for r in expected[prompt])
        raise RuntimeError(f"vLLM made no rotary positions of the prompts {names}")


def _output(completion: Any) -> RolloutOutput:
    """One response as vLLM ended it."""
    ids = list(completion.token_ids)
    log_probs = [
        entry[token].logprob for token, entry in zip(ids, completion.logprobs, strict=True)
    ]
    return RolloutOutput(
        torch.tensor(ids, dtype=torch.long),
        torch.tensor(log_probs, dtype=torch.float32),
        completion.finish_reason,
    )


@contextmanager
def _as_external_rank(device: torch.device, rank: int, world_size: int) -> Iterator[None]:
    """In this block, the variables by which vLLM's `external_launcher` knows this process.

    The default process group, which is there already, says the rest.
    """
    wanted = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": device.index or 0}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update({name: str(value) for name, value in wanted.items()})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
