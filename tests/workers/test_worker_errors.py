"""Device memory that runs out in a worker becomes an error that says which settings to lower."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from verl.config import PPOConfig, SFTConfig
from verl.config.schema import settings
from verl.protocol import DataProto
from verl.rollout import SamplingParams
from verl.sequence_parallel.topology import SequenceGroup
from verl.single_controller.decorator import Dispatch, dispatched_methods
from verl.single_controller.failures import Failure
from verl.utils.device_memory import PeakMemory
from verl.utils.exits import Explained, UserError
from verl.workers.fsdp_workers import ActorRolloutRefWorker, SFTWorker

OOM = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79 GiB"
BATCH = DataProto(
    {"uid": ["a"], "prompt_ids": [[1]], "media": [[]], "seeds": [(0,)]},
    {
        "temperature": 1.0,
        "totals": [(1, 1)],
        "n_tokens": 1,
        "sampling": SamplingParams(max_tokens=1),
    },
)
METHODS = [
    (ActorRolloutRefWorker, PPOConfig, "generate"),
    (ActorRolloutRefWorker, PPOConfig, "log_probs"),
    (ActorRolloutRefWorker, PPOConfig, "ref_log_probs"),
    (ActorRolloutRefWorker, PPOConfig, "update_actor"),
    (SFTWorker, SFTConfig, "train_step"),
    (SFTWorker, SFTConfig, "validation_loss"),
]


class Raises:
    """Stands for every part of a worker: whatever is called raises."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def __getattr__(self, name: str) -> Any:
        def call(*_args: Any) -> None:
            raise self._error

        return call


class Sleeper(Raises):
    """A rollout engine that sleeps without an error."""

    def sleep(self) -> None:
        pass

    def asleep_bytes(self) -> int:
        return 0


def raised(worker_cls: type, method: str, error: Exception) -> Exception:
    """What a worker's method raises when its parts raise `error`."""
    part = Raises(error)
    engine = SimpleNamespace(peak_memory=PeakMemory(torch.device("cpu")), adapter=part)
    worker = object.__new__(worker_cls)
    worker.__dict__.update(
        _actor=part, _reference=part, _rollout=Sleeper(error), _runner=part, engine=engine,
        _sequence=SequenceGroup.alone(), _engine_group=SequenceGroup.alone(), _encoder=part,
    )  # fmt: skip
    with pytest.raises((UserError, type(error))) as caught:
        getattr(worker, method)(BATCH)
    return caught.value


@pytest.mark.parametrize(("worker_cls", "root", "method"), METHODS)
def test_memory_that_runs_out_names_settings_that_exist(worker_cls, root, method):
    error = raised(worker_cls, method, torch.OutOfMemoryError(OOM))
    text = str(error)
    assert text.startswith("the memory of the GPU is too small (CUDA out of memory); lower ")
    keys = re.findall(r"[a-z_]+(?:\.[a-z_]+)+", text)
    assert keys and set(keys) <= set(settings(root))


def test_the_explanation_crosses_from_worker_to_driver_with_its_traceback():
    failure = Failure.of(raised(SFTWorker, "train_step", torch.OutOfMemoryError(OOM)))
    error = failure.exception(1, "train_step")
    assert isinstance(error, Explained) and error.exit_code == 1
    assert error.__notes__[0] == "Raised by worker rank 1 in train_step()."
    assert "total capacity of 79 GiB" in error.__notes__[1]


@pytest.mark.parametrize(("worker_cls", "root", "method"), METHODS)
def test_other_errors_stay_what_they_are(worker_cls, root, method):
    assert str(raised(worker_cls, method, IndexError("7"))) == "7"


@pytest.mark.parametrize(("worker_cls", "root", "method"), METHODS)
def test_such_a_method_is_still_spread_over_the_workers(worker_cls, root, method):
    assert dispatched_methods(worker_cls)[method] is Dispatch.DP
