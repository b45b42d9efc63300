"""The `data.*` section: which files, which columns, how media are sampled, how much is read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from verl.config.base import Count, CountOrOff, NonNegative, Positive, Share


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where samples come from and how they become token ids and frames."""

    train_files: list[str] = field(default_factory=list)
    """Training rows: json, jsonl or parquet files, folders of `datasets`, or `file@split`; a list
    or one comma separated string."""
    val_files: list[str] = field(default_factory=list)
    """Validation rows, in the same forms. Metrics are reported for each file."""
    prompt_key: str = "problem"
    """Column that holds the question."""
    answer_key: str = "answer"
    """Column that holds the gold answer; `<answer>` tags around it are removed."""
    problem_type_key: str = "problem_type"
    """Column that holds the kind of question; metrics are split by it. May be absent."""
    reasoning_key: str = "reasoning"
    """Column that holds the written chain of thought, which SFT trains on."""
    options_key: str = "options"
    """Column that holds the offered options of a multiple-choice question. May be absent."""
    image_key: str = "images"
    """Column that holds images: a path, bytes as parquet files and the datasets library hold them,
    or a list of these."""
    video_key: str = "videos"
    """Column that holds video paths: one path or a list; or dicts as Qwen's tools take them,
    `{"video": path, "video_start": seconds, "video_end": seconds}`."""
    video_start_key: str = "video_start"
    """Column with the second at which the part of the video to look at begins; a list with several
    videos. May be absent or null: the first frame."""
    video_end_key: str = "video_end"
    """Column with the second at which that part ends. May be absent or null: the last frame."""
    image_dir: str | None = None
    """Folder that relative image paths start from; null means the folder of the data file."""
    video_dir: str | None = None
    """Folder that relative video paths start from; null means the folder of the data file."""
    allow_outside_media_dir: bool = False
    """Accept media paths that lead out of the media folder. Addresses (http://...) stay refused."""
    format_prompt: str | None = None
    """Jinja file that turns a row into the prompt, for text, images and video alike; null means
    the question as it stands."""
    system_prompt: str | None = None
    """System turn of the chat; null means the default of the chat template."""
    max_prompt_length: Count = 2048
    """Longest prompt in tokens, visual tokens included."""
    max_response_length: Count = 512
    """Longest response in tokens: where generation stops, and the longest target of SFT."""
    rollout_batch_size: Count = 512
    """Prompts a training step; each gets `worker.rollout.n` responses."""
    val_batch_size: CountOrOff = -1
    """Prompts generated at once in validation; -1 means all of them."""
    group_by_video: Count = 1
    """Put up to so many questions about one video next to each other in a step: their prompts share
    what they have in common, so the video is computed once for all of them. 1: order without regard
    to videos. Changes what a batch is made of, and no gradient of it."""
    shuffle: bool = True
    """Shuffle the training rows, anew in each epoch, from `data.seed`."""
    seed: int = 1
    """Seed of the order of rows."""
    num_video_frames: Count = 8
    """Frames taken from each video, spread evenly over it. Not used when `data.fps` is set."""
    fps: Positive | None = None
    """Frames taken a second of video. When set it wins over `data.num_video_frames`."""
    max_video_frames: Count = 768
    """Most frames taken from one video when `data.fps` is set."""
    min_pixels: Count | None = None
    """Smallest image in pixels after resizing; null means what the model's processor files say,
    and the default of its family where they say nothing."""
    max_pixels: Count | None = None
    """Largest image in pixels after resizing; null means as with `data.min_pixels`."""
    video_min_pixels: Count | None = None
    """Smallest video frame in pixels after resizing; null means as with `data.min_pixels`. A model
    without `video_preprocessor_config.json` has the bounds of images for videos, too."""
    video_max_pixels: Count | None = None
    """Largest video frame in pixels after resizing; null means as with `data.video_min_pixels`: of
    published Qwen2.5-VL models 12845056, which bounds no film. Set it for theirs."""
    video_decoder: Literal["pyav", "decord", "torchcodec"] = "pyav"
    """Library that decodes video. `pyav` needs nothing else, reads every kind of file and was the
    fastest on a film; `decord` and `torchcodec` (which needs the system's FFmpeg libraries) are
    refused for kinds of files of which they are not known to return the right frames."""
    decode_threads: Count = 1
    """Threads that decode one video, in each of `data.num_workers`."""
    decode_timeout_s: Positive = 600.0
    """Most seconds that one video may take; then its row cannot be used."""
    decode_in_subprocess: bool = False
    """Measure and decode each video in a process of its own, with limits of time and memory that
    the system enforces: a file that crashes or hangs the decoder costs its row and not the run.
    Costs 0.15 s to measure and 0.15 s to decode a video; for files from strangers."""
    decode_memory_gib: Positive = 4.0
    """With `data.decode_in_subprocess`: most GiB of memory that such a process may take."""
    media_fingerprint: Literal["fast", "full"] = "fast"
    """By what a media file is known again. `fast`: size, time of change and 8 blocks of it; `full`:
    every byte, read once a run: moved and copied files are known, and no change goes unseen."""
    filter_overlong_prompts: bool = True
    """true: drop prompts longer than `data.max_prompt_length` and say how many; false: stop."""
    on_bad_sample: Literal["error", "skip"] = "error"
    """What to do with a row whose media cannot be read or whose answer is none of its options:
    stop, or skip it with a named reason. Media files are looked for before workers start, and read
    when their row comes up."""
    max_bad_fraction: Share = 0.05
    """With `data.on_bad_sample=skip`: stop when more than this share of the rows is bad."""
    num_workers: Count = 2
    """Threads that decode ahead of the training step."""
    prefetch_gib: Positive = 1.0
    """Most GiB of decoded frames read ahead of the batch in use; one larger row passes alone. They
    lie in `data.cache_dir`, as part of `data.cache_gib`: memory holds only what threads decode.
    Videos whose embeddings are stored are not decoded."""
    cache_dir: str | None = None
    """Folder on a disk of each machine for what is kept between steps and runs: decoded frames
    (`frames/`), embeddings of a frozen vision tower (`embeds/`), what was measured of videos
    (`index/`); null means a folder in the system's temporary folder. Images that rows hold as
    bytes lie there, too, beside the bound of `data.cache_gib`."""
    cache_gib: NonNegative = 8.0
    """Most disk space in GiB that decoded frames may take in `data.cache_dir`, and as much again
    for embeddings, of all processes of a machine together; the least recently used go first, those
    of the batch in use stay. What does not fit is decoded, or encoded, at each use."""
