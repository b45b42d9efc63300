"""Configuration: one frozen dataclass a section. Imports no torch, so `--help` is instant."""

from verl.config.algorithm import AlgorithmConfig, RolloutCorrectionConfig
from verl.config.build import from_dict
from verl.config.cli import load, parse_cli
from verl.config.data import DataConfig
from verl.config.evaluation import EvalConfig
from verl.config.ppo import PPOConfig
from verl.config.problems import ConfigError, Problem
from verl.config.render import diff, fingerprint, to_dict, to_yaml
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
    "ConfigError",
    "DataConfig",
    "EvalConfig",
    "FSDPConfig",
    "ModelConfig",
    "OffloadConfig",
    "OptimConfig",
    "PPOConfig",
    "Problem",
    "RefConfig",
    "RewardConfig",
    "RolloutConfig",
    "RolloutCorrectionConfig",
    "SFTBatchConfig",
    "SFTConfig",
    "TrainerConfig",
    "WorkerConfig",
    "diff",
    "fingerprint",
    "from_dict",
    "load",
    "parse_cli",
    "to_dict",
    "to_yaml",
]
