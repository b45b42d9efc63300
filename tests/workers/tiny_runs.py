"""Tiny engines, media without files and ragged batches for the tests of workers."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from tests.tiny import IMAGE_ID, VIDEO_ID, tiny_config, write_tiny_model
from verl.config import ActorConfig, AlgorithmConfig, FSDPConfig, ModelConfig, OptimConfig
from verl.config.worker import OffloadConfig
from verl.data.embed_store import EmbedStore
from verl.data.media import Frames, MediaItem, MediaRef
from verl.data.preprocess import ResizeRule
from verl.models.adapter import get_adapter
from verl.protocol import DataProto
from verl.workers.dp_actor import DataParallelActor, StepTotals
from verl.workers.encoder import MediaEncoder, StoredFeatures
from verl.workers.fsdp_engine import FSDPEngine

TEMPERATURE = 0.7
KL_COEF = 0.3
RULE = ResizeRule(min_pixels=56 * 56, max_pixels=56 * 56)
MODEL = ModelConfig(init="random", freeze_vision_tower=True, enable_gradient_checkpointing=False)

OPTIM = OptimConfig(lr=1e-2, weight_decay=0.1)
FSDP, ON_DEVICE = FSDPConfig(), OffloadConfig()


def media(key: str, grid: tuple[int, int, int], kind: str = "video") -> MediaItem:
    """A piece of media that `NoFiles` draws from its key."""
    ref = MediaRef(kind=kind, path=f"/{key}", sampling=None, resize=RULE, key=key)  # type: ignore[arg-type]
    return MediaItem(ref, grid, 0.75 * (kind == "video"), grid[0] * grid[1] * grid[2] // 4, ())


CLIP, FILM = media("clip", (2, 4, 4)), media("film", (3, 2, 4))
PHOTO, PLAN = media("photo", (1, 4, 2), "image"), media("plan", (1, 6, 4), "image")


class NoFiles:
    """Stands for a `MediaCache`: noise that follows from the key, of the size the key promises."""

    def __init__(self, *items: MediaItem) -> None:
        self._grids = {i.ref.key: i.grid_thw for i in items or (CLIP, FILM, PHOTO, PLAN)}
        self.gets: list[str] = []

    def get(self, ref: MediaRef) -> Frames:
        self.gets.append(ref.key)
        t, h, w = self._grids[ref.key]
        n_frames = 1 if ref.kind == "image" else 2 * t
        seed = int.from_bytes(hashlib.sha256(ref.key.encode()).digest()[:4], "big")
        g = torch.Generator().manual_seed(seed)
        size = (n_frames, 3, 14 * h, 14 * w)
        frames = torch.randint(0, 256, size, generator=g, dtype=torch.uint8)
        return Frames(frames, (0.0,) * n_frames, 1.0)


@contextmanager
def lone_rank(backend: str = "gloo") -> Iterator[None]:
    """A process group of this process alone, since an engine wants one."""
    with tempfile.TemporaryDirectory() as folder:
        meeting = Path(folder, "rendezvous").as_uri()
        dist.init_process_group(backend, init_method=meeting, rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


def tiny_engine(
    folder: str | Path,
    model: ModelConfig = MODEL,
    *,
    optim: OptimConfig | None = OPTIM,
    fsdp: FSDPConfig = FSDP,
    offload: OffloadConfig = ON_DEVICE,
    device: str = "cpu",
    **kwargs: Any,
) -> FSDPEngine:
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    model = replace(model, model_path=str(folder))
    return FSDPEngine(model, fsdp, offload, mesh, optim=optim, total_steps=10, **kwargs)


def write_model(folder: Path, *, tie: bool = True) -> Path:
    return write_tiny_model(folder, tie=tie)


def tiny_encoder(engine: Any, folder: str | Path | None = None, **kwargs: Any) -> MediaEncoder:
    """An encoder without files; with `folder`, its features are stored there."""
    stored = stored_at(folder) if folder is not None and engine.tower_is_frozen else None
    return MediaEncoder(engine, NoFiles(), stored, **kwargs)  # type: ignore[arg-type]


def stored_at(folder: str | Path, limit_bytes: int = 2**24, **settings: Any) -> StoredFeatures:
    """A store for the features of the tiny model's tower."""
    pixels = get_adapter(tiny_config()).vision
    assert pixels is not None
    named = {"family": "qwen2_5_vl", "weights": "w", "dtype": torch.float32, "pixels": pixels}
    return StoredFeatures(store=EmbedStore(folder, limit_bytes), **(named | settings))


def tiny_actor(
    engine: FSDPEngine,
    folder: str | Path | None = None,
    algorithm: AlgorithmConfig = AlgorithmConfig(),  # noqa: B008 (frozen)
    **actor: Any,
) -> DataParallelActor:
    encoder = tiny_encoder(engine, folder)
    return DataParallelActor(engine, encoder, ActorConfig(**actor), algorithm)


def whole(tensor: Tensor) -> Tensor:
    """The tensor of all ranks, as this process's own copy."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def whole_gradients(engine: FSDPEngine) -> dict[str, Tensor]:
    """Gradient of every trained parameter by its name, as the optimizer would see it."""
    found = {}
    for name, p in engine.policy.hf.named_parameters():
        if p.requires_grad:
            assert p.grad is not None, f"{name} has no gradient"
            found[name] = whole(p.grad)
    return found


def keep_gradients(engine: FSDPEngine) -> list[dict[str, Tensor]]:
    """From now on, optimizer steps put their gradients into the returned list, and change nothing.

    The weights stay, so that one engine serves many runs.
    """
    kept: list[dict[str, Tensor]] = []

    def optimizer_step() -> dict[str, float]:
        kept.append(whole_gradients(engine))
        engine.optimizer.zero_grad()
        return {}

    engine.optimizer_step = optimizer_step  # type: ignore[method-assign]
    return kept


def whole_weights(engine: FSDPEngine) -> dict[str, Tensor]:
    return {name: whole(p) for name, p in engine.policy.hf.named_parameters()}


def prompt_ids(adapter: Any, items: tuple[MediaItem, ...], words: list[int]) -> Tensor:
    pads = {"image": IMAGE_ID, "video": VIDEO_ID}
    shown = [t for m in items for t in (3, pads[m.ref.kind], 4, 12)]
    return torch.tensor(adapter.expand([10, *shown, *words], items))


def rl_batch(adapter: Any, *, seed: int = 0, with_rollout: bool = False) -> DataProto:
    """Twelve samples of four prompts, ragged; only the first two prompts have media.

    Two ranks share it so that the second has no media at all. One response is empty.
    `with_rollout` adds the log-probs of the engine that sampled.
    """
    g = torch.Generator().manual_seed(seed)
    prompts = [
        prompt_ids(adapter, (CLIP, PHOTO), [13, 14, 15]),
        prompt_ids(adapter, (FILM,), [20]),
        prompt_ids(adapter, (), [9, 21, 22, 23, 24]),
        prompt_ids(adapter, (), [30, 31]),
    ]
    shown = [(CLIP, PHOTO), (FILM,), (), ()]
    lengths = [3, 7, 1, 5, 2, 9, 4, 0, 6, 2, 8, 1]
    responses = [torch.randint(8, 60, (n,), generator=g) for n in lengths]

    def noise(scale: float) -> list[Tensor]:
        return [-4 + scale * torch.randn(n, generator=g) for n in lengths]

    return DataProto(
        {
            "uid": [f"p{i // 3}" for i in range(12)],
            "prompt_ids": [prompts[i // 3] for i in range(12)],
            "media": [shown[i // 3] for i in range(12)],
            "response_ids": responses,
            "advantage": [float(a) for a in torch.randn(12, generator=g)],
            "old_logp": noise(0.5),
            "ref_logp": noise(0.5),
        }
        | ({"rollout_logp": noise(0.5)} if with_rollout else {}),
        {"kl_coef": KL_COEF},
    )


def totals_of(batch: DataProto, n_minis: int = 1) -> list[StepTotals]:
    """What the driver counts before it sends a batch out."""
    return [
        StepTotals(sum(len(r) for r in mini["response_ids"]), len(mini))
        for mini in batch.split(n_minis)
    ]


def own_share(batch: DataProto, rank: int, world_size: int) -> DataProto:
    return batch.split(world_size)[rank]


def added(shares: list[dict[str, list[float]]], name: str) -> list[float]:
    """A metric of each step, its shares added over ranks."""
    return [sum(values) for values in zip(*(s[name] for s in shares), strict=True)]


def largest_gap(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Largest difference of an entry, as a share of the largest entry of its tensor.

    Tensors that are nearly zero as a whole are measured by a thousandth of the largest of all.
    """
    assert a.keys() == b.keys()
    floor = 1e-3 * max(float(t.abs().max()) for t in b.values())
    return max(float((a[k] - b[k]).abs().max()) / max(float(b[k].abs().max()), floor) for k in b)
