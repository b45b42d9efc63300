"""Configuration: one frozen dataclass a section. Imports no torch, so `--help` is instant."""

from verl.config.algorithm import AlgorithmConfig
from verl.config.data import DataConfig
from verl.config.evaluation import EvalConfig
from verl.config.ppo import PPOConfig
from verl.config.sft import SFTBatchConfig, SFTConfig
from verl.config.trainer import TrainerConfig
from verl.config.worker import (
    ActorConfig,
    FSDPConfig,
    ModelConfig,
    OffloadConfig,
    OptimConfig,
    RefConfig,
    RewardConfig,
    RolloutConfig,
    WorkerConfig,
)

__all__ = [
    "ActorConfig",
    "AlgorithmConfig",
    "DataConfig",
    "EvalConfig",
    "FSDPConfig",
    "ModelConfig",
    "OffloadConfig",
    "OptimConfig",
    "PPOConfig",
    "RefConfig",
    "RewardConfig",
    "RolloutConfig",
    "SFTBatchConfig",
    "SFTConfig",
    "TrainerConfig",
    "WorkerConfig",
]
