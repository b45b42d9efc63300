"""Embeddings of all videos and images of a data set, made before training: offline caching.

    python3 verl/utils/cache_video_embeds_vila.py --model_path MODEL --data_file train.jsonl \\
        --video_dir VIDEOS --output_dir OUT --num_video_frames 256

Works for every model family of this project; the name is the one that users of Long-RL know.
Training then needs neither the vision tower nor the video files. See docs/cache.md.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):
    # As a script: modules of this folder must not be found under the names of other packages.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from verl.config import DataConfig, ModelConfig
from verl.config.arguments import Assignment
from verl.config.build import argument_assignments, build
from verl.config.problems import ConfigError
from verl.data.cache_dirs import embeds_dir
from verl.utils.exits import Interrupted, UserError, exit_on_error
from verl.utils.logger import setup_logging
from verl.utils.progress import Progress

if TYPE_CHECKING:
    from verl.data.dataset import MediaProbe
    from verl.data.media import MediaItem
    from verl.data.prompts import MediaSlot
    from verl.data.rows import Row
    from verl.workers.offline_encode import OfflineJob

logger = logging.getLogger(__name__)
PROG = "cache_video_embeds_vila.py"
FAILURES = "failures.jsonl"
_UNBOUNDED = 1 << 62
_SAME_IN_TRAINING = (
    "num_video_frames", "fps", "max_video_frames", "min_pixels", "max_pixels", "video_min_pixels",
    "video_max_pixels", "video_key", "image_key", "video_start_key", "video_end_key", "video_dir",
    "image_dir", "allow_outside_media_dir", "video_decoder", "media_fingerprint",
)  # fmt: skip
"""Settings that decide which media are read, and how: keys follow from them."""
_OVERRIDE = re.compile(r"data\.\w+=")
_FLAGS = {
    "video_dir": "folder that relative video paths start from (default: that of the data file)",
    "image_dir": "the same for images",
    "num_video_frames": "frames of a video, spread evenly over it (default: 8)",
    "fps": "frames a second of video, instead of --num_video_frames",
    "max_frames": "most frames of a video with --fps (default: 768)",
    "video_max_pixels": "largest video frame in pixels after resizing",
    "video_min_pixels": "smallest video frame in pixels after resizing",
    "max_pixels": "largest image in pixels after resizing",
    "min_pixels": "smallest image in pixels after resizing",
    "video_key": "column with videos (default: videos)",
    "image_key": "column with images (default: images)",
}
"""Flags that are settings of data.*, with their help."""


@dataclass(frozen=True, kw_only=True)
class _Root:
    data: DataConfig = field(default_factory=DataConfig)


@dataclass(frozen=True)
class Loss:
    """A piece of media without embeddings; a line of failures.jsonl."""

    path: str
    reason: str
    detail: str
    where: str = ""
    """The first row that names it, where the file could not be measured."""


def arguments(argv: Sequence[str]) -> tuple[argparse.Namespace, DataConfig]:
    """The command line, and the `data.*` section that training would have; exits with 2."""
    parser = argparse.ArgumentParser(
        prog=PROG, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model_path", required=True, help="Hugging Face folder or hub id of the model to train")
    add("--tokenizer_path", help="worker.actor.model.tokenizer_path of training, if it is set")
    add("--data_file", required=True, nargs="+", metavar="FILE",
        help="json, jsonl or parquet files, folders of `datasets`, or FILE@SPLIT")  # fmt: skip
    add("--output_dir", required=True, help="data.cache_dir of training")
    for name, text in _FLAGS.items():
        add(f"--{name}", help=text)
    add("--dtype", choices=("auto", "bf16", "fp32"), default="auto",
        help="what the tower computes in: worker.actor.fsdp.mp_param of training (default: auto, "
        "bf16 on CUDA and fp32 on the CPU)")  # fmt: skip
    add("--device", choices=("auto", "cuda", "cpu"), default="auto")
    add("--num_workers", type=int, help="processes (default: one a GPU, or 1 on the CPU); each "
        "decodes with data.num_workers threads")  # fmt: skip
    add("--cache_gib", type=float, help="most GiB of all embeddings in the folder; what does not "
        "fit counts as a failure (default: as the disk allows)")  # fmt: skip
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--overwrite", action="store_true", help="encode what is stored, too")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read all of what is stored, and make damaged embeddings again",
    )
    group.add_argument("--resume", action="store_true",
                       help="skip what is stored; this is the default")  # fmt: skip
    add("overrides", nargs="*", metavar="data.KEY=VALUE", help="any other setting of data.*, as in "
        "training; docs/configuration.md lists them")  # fmt: skip
    args = parser.parse_intermixed_args(argv)
    # --data_file takes all words up to the next flag.
    args.overrides += [word for word in args.data_file if _OVERRIDE.match(word)]
    args.data_file = [word for word in args.data_file if not _OVERRIDE.match(word)]
    if not args.data_file:
        parser.error("--data_file names no file")
    if args.fps is not None and args.num_video_frames is not None:
        parser.error("--num_video_frames and --fps are both given; give one of them")
    if args.max_frames is not None and args.fps is None:
        parser.error(f"--max_frames {args.max_frames} bounds --fps; give --fps, too, or write "
                     f"--num_video_frames {args.max_frames}")  # fmt: skip
    if args.num_workers is not None and args.num_workers < 1:
        parser.error(f"--num_workers {args.num_workers} must be at least 1")
    if args.cache_gib is not None and not args.cache_gib > 0:
        parser.error(f"--cache_gib {args.cache_gib} must be more than 0")
    try:
        return args, _data_config(args)
    except ConfigError as error:
        parser.error(f"settings that cannot be used:\n{error}")


def _data_config(args: argparse.Namespace) -> DataConfig:
    names = {"max_frames": "max_video_frames"}
    given = [
        (f"data.{names.get(flag, flag)}", str(value), f"argument --{flag}")
        for flag in _FLAGS
        if (value := getattr(args, flag)) is not None
    ]
    for text in args.overrides:
        key, _, value = text.removeprefix("--").partition("=")
        given.append((key, value, f"argument {text!r}"))
    assignments, problems = argument_assignments(_Root, given)
    own = {"data.train_files": list(args.data_file), "data.cache_dir": args.output_dir}
    assignments += [Assignment(key, value, "") for key, value in own.items()]
    built = build(_Root, assignments)
    if problems or built.problems:
        raise ConfigError([*problems, *built.problems])
    return built.config.data


def run(args: argparse.Namespace, data: DataConfig) -> int:
    """Makes what is missing; the exit code."""
    from verl.data.embed_store import EmbedStore

    setup_logging()
    out = Path(args.output_dir)
    try:
        limit = _UNBOUNDED if args.cache_gib is None else int(args.cache_gib * 2**30)
        store = EmbedStore(embeds_dir(out), limit)
        failures = (out / FAILURES).open("w", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output_dir {out}: cannot be written to ({error})") from error
    with failures:
        job, devices = _job(args, data, limit)

        def lose(loss: Loss) -> None:
            losses.append(loss)
            try:
                failures.write(json.dumps(vars(loss)) + "\n")
                failures.flush()
            except OSError as error:  # Of a full disk, most likely; the summary has it anyway.
                logger.warning("%s: %s, not written: %s", loss.path, loss.reason, error)

        losses: list[Loss] = []
        found, unknown = _measured(job, data)
        for loss in unknown:
            lose(loss)
        known = {job.key(item): item for item in found}
        with store.hold(known):  # What was just made must not go for what comes next.
            absent = [
                item
                for key, item in known.items()
                if args.overwrite or store.get(key, None if args.verify else (0, 0)) is None
            ]
            n_stored = len(known) - len(absent)
            logger.info(
                "%d pieces of media: %d are stored already, %d to encode (%d process%s on %s, %s)",
                len(known), n_stored, len(absent), len(devices), "es" * (len(devices) > 1),
                devices[0].partition(":")[0], str(job.dtype).removeprefix("torch."),
            )  # fmt: skip
            n_made = 0
            if absent:
                n_made = _encode(job, devices, absent, int(data.prefetch_gib * 2**30), lose)
        _tell(out, data, job, n_stored, n_made, losses, store.size_bytes())
    return 0 if n_stored + n_made else 1


def _job(args: argparse.Namespace, data: DataConfig, limit: int) -> tuple[OfflineJob, list[str]]:
    """What the processes do, and the device of each."""
    import torch

    from verl.models.fingerprint import checkpoint_fingerprint
    from verl.models.loader import load_adapter, load_config
    from verl.workers.offline_encode import OfflineJob

    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if args.device == "cuda" and not n_gpus:
        raise UserError("--device cuda: this machine has no GPU that torch can use; use cpu")
    on_gpu = args.device != "cpu" and n_gpus > 0
    n = args.num_workers or (n_gpus if on_gpu else 1)
    devices = [f"cuda:{i % n_gpus}" if on_gpu else "cpu" for i in range(n)]
    wants_bf16 = args.dtype == "bf16" or (args.dtype == "auto" and on_gpu)
    dtype = torch.bfloat16 if wants_bf16 else torch.float32
    model = ModelConfig(model_path=args.model_path, tokenizer_path=args.tokenizer_path)
    vision, family = load_adapter(model).vision, load_config(model).model_type
    if vision is None:
        raise UserError(f"--model_path {args.model_path}: {family} has no vision tower")
    job = OfflineJob(
        model=model, family=family, weights=checkpoint_fingerprint(model, dtype), dtype=dtype,
        vision=vision, store_dir=str(embeds_dir(data.cache_dir)), limit_bytes=limit,
        threads=data.num_workers, overwrite=args.overwrite,
    )  # fmt: skip
    return job, devices


def _measured(job: OfflineJob, data: DataConfig) -> tuple[list[MediaItem], list[Loss]]:
    """All distinct media of the data files, as training names them, and those without a name."""
    from verl.data.dataset import MediaProbe
    from verl.data.inline import InlineImages
    from verl.data.rows import BadSample, RowKeys, read_rows

    rows = read_rows(
        data.train_files, RowKeys.from_config(data), lambda _: (), InlineImages(data).keep
    )
    wanted: dict[tuple[Path, MediaSlot], Row] = {}
    for row in rows:
        for slot in _slots(row):
            wanted.setdefault((row.folder, slot), row)
    if not wanted:
        raise UserError(
            f"{', '.join(data.train_files)}: no row has a video in the column {data.video_key!r} "
            f"or an image in {data.image_key!r}; name the columns with --video_key and --image_key"
        )
    probe = MediaProbe(data, job.vision, keep_images=True)

    def measure(asked: tuple[Any, Row]) -> MediaItem | BadSample:
        try:
            return _item(probe, asked[1], asked[0][1])
        except BadSample as bad:
            return bad

    items: dict[str, MediaItem] = {}
    losses: dict[tuple[str, str], Loss] = {}
    pool = ThreadPoolExecutor(data.num_workers, thread_name_prefix="measure")
    try:
        with Progress(len(wanted), "measuring") as bar:
            for found in pool.map(measure, wanted.items()):
                if isinstance(found, BadSample):
                    loss = Loss(found.path, found.reason, found.detail, found.row.where)
                    losses.setdefault((loss.path, loss.reason), loss)
                else:
                    items.setdefault(found.ref.key, found)
                bar.advance()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return list(items.values()), list(losses.values())


def _slots(row: Row) -> Iterator[MediaSlot]:
    from verl.data.prompts import MediaSlot

    for path in row.images:
        yield MediaSlot("image", path)
    for i, path in enumerate(row.videos):
        yield MediaSlot("video", path, row.segments[i] if row.segments else (None, None))


def _item(probe: MediaProbe, row: Row, slot: MediaSlot) -> MediaItem:
    (item,) = probe.items(row, [slot])
    return item


def _encode(
    job: OfflineJob,
    devices: Sequence[str],
    items: Sequence[MediaItem],
    ahead_bytes: int,
    lose: Callable[[Loss], None],
) -> int:
    """Encodes media, shows how fast, tells `lose` of those that failed; how many were made."""
    from verl.workers.offline_encode import Failed
    from verl.workers.offline_pool import OfflinePool

    n_made, n_frames, rates = 0, 0, ""
    with (
        _tells_how_to_go_on(),
        OfflinePool(job, devices, ahead_bytes) as pool,
        Progress(len(items), "encoding") as bar,
    ):
        for item, answer in pool.run(items):
            if isinstance(answer, Failed):
                lose(Loss(item.ref.path, answer.reason, answer.detail))
            else:
                n_made += 1
                n_frames += len(item.frame_times)
            rates = _rates(n_made, n_frames, time.monotonic() - (pool.ready_at or 0.0))
            bar.describe(f"encoding, {rates}")
            bar.advance()
    logger.info("encoded %s", rates)
    return n_made


def _rates(n_media: int, n_frames: int, seconds: float) -> str:
    seconds = max(seconds, 1e-3)
    return f"{n_media / seconds:.2f} videos/s, {n_frames / seconds:.1f} frames/s"


@contextmanager
def _tells_how_to_go_on() -> Iterator[None]:
    try:
        yield
    except Interrupted:
        logger.info("what is encoded is stored; the same command goes on from there")
        raise


def _tell(
    out: Path,
    data: DataConfig,
    job: OfflineJob,
    n_stored: int,
    n_made: int,
    losses: Sequence[Loss],
    n_bytes: int,
) -> None:
    """The result and the settings for training, on stdout."""
    folder = embeds_dir(out)
    lines = [
        f"{n_made} pieces of media encoded, {n_stored} stored before, {len(losses)} failed; "
        f"{folder} holds {n_bytes / 2**30:.2f} GiB"
    ]
    first = {loss.reason: loss.path for loss in reversed(losses)}
    for reason, n in Counter(loss.reason for loss in losses).most_common():
        lines.append(f"  {n} {reason}, first: {first[reason]}")
    if losses:
        lines.append(f"  all of them, with what to do: {out / FAILURES}")
    if n_stored + n_made:
        default = DataConfig()
        same = [
            shlex.quote(f"data.{name}={getattr(data, name)}")
            for name in _SAME_IN_TRAINING
            if getattr(data, name) != getattr(default, name)
        ]
        cached = shlex.quote(f"cached_embeds_dir={folder}")
        lines += [
            "Settings for training:",
            shlex.quote(f"data.cache_dir={out}")
            + " "
            + shlex.quote(f"worker.actor.cached_embeds_dir={folder}"),
            f"(SFT and evaluation: {cached}; the actor computes in {str(job.dtype)[6:]}, see "
            "worker.actor.fsdp.mp_param)",
            *([f"as they were here: {' '.join(same)}"] if same else []),
        ]
    else:
        lines.append("Nothing could be cached.")
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()


def main(argv: Sequence[str] | None = None) -> None:
    """The command; exits."""
    args, data = arguments(sys.argv[1:] if argv is None else argv)
    exit_on_error(lambda: run(args, data), resumes=False)


if __name__ == "__main__":
    main()
