"""`python3 -m verl.data.embed_store ls|verify|prune DIR`: what is stored, is it whole, less of it.

`ls` prints one line a video. `verify` reads everything and exits with 1 when something is damaged.
`prune` removes entries that no running process holds, least recently used first.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from verl.data.embed_file import DamagedEmbeds, check_file, read_record
from verl.data.embed_store import remove_dead_links
from verl.data.file_store import FileStore, StoredFile, stored_files

GIB = 1024**3
_DAY_S = 86_400
_COLUMNS = ("video", "tokens", "frames", "MiB", "dtype", "family", "weights", "age", "used", "key")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    parsed = _parser().parse_args(arguments)
    root = Path(parsed.dir)
    if not root.is_dir():
        print(f"{root} is no folder; give the one that holds <key>.safetensors", file=sys.stderr)
        return 2
    try:
        return parsed.run(root, parsed)
    except BrokenPipeError:  # The reader, `head` for one, has seen enough.
        sys.stderr.close()
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python3 -m verl.data.embed_store", description="Look after stored video embeddings."
    )
    commands = parser.add_subparsers(required=True, metavar="ls|verify|prune")
    for run, text in (
        (_ls, "a line for each video"),
        (_verify, "read everything, name what is damaged, exit with 1 if anything is"),
        (_prune, "remove entries that nobody holds, least recently used first"),
    ):
        command = commands.add_parser(run.__name__[1:], help=text, description=text)
        command.add_argument("dir", metavar="DIR", help="the folder of the store")
        command.set_defaults(run=run)
        if run is _prune:
            _add_prune_options(command)
    return parser


def _add_prune_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--limit-gib", type=_amount, help="leave at most so much")
    command.add_argument(
        "--older-than-days", type=_amount, help="remove what was not used for so long"
    )
    command.add_argument("--weights", metavar="HASH", help="keep only what these weights made")
    command.add_argument("--dry-run", action="store_true", help="name what would go, keep it all")


def _amount(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} must be 0 or more")
    return value


def _ls(root: Path, _: argparse.Namespace) -> int:
    files = list(reversed(stored_files(root)))
    rows = [row for file in files if (row := _row(file)) is not None]
    widths = [max(map(len, column)) for column in zip(_COLUMNS, *rows, strict=True)]
    for row in (_COLUMNS, *rows):
        cells = (f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())
    print(f"{len(files)} entries, {sum(file.n_bytes for file in files) / GIB:.2f} GiB")
    return 0


def _row(file: StoredFile) -> tuple[str, ...] | None:
    """Cells of one line; None for what another process has removed by now."""
    used = _ago(file.last_use_ns / 1e9)
    size = f"{file.n_bytes / 1024**2:.1f}"
    try:
        record = read_record(file.path)
    except FileNotFoundError:
        return None
    except (DamagedEmbeds, OSError):
        return ("(damaged: see verify)", "", "", size, "", "", "", "", used, file.key)
    return (
        _printable(Path(record.path).name),
        str(record.n_tokens),
        str(len(record.frame_times)),
        size,
        record.dtype,
        _printable(record.family),
        _printable(record.weights[:12]),
        _ago(record.made_at),
        used,
        file.key,
    )


def _verify(root: Path, _: argparse.Namespace) -> int:
    n_bad = n_good = 0
    for file in stored_files(root):
        try:
            check_file(file.path)
        except FileNotFoundError:
            continue
        except (DamagedEmbeds, OSError) as error:
            n_bad += 1
            print(f"damaged: {_printable(str(error))}")
        else:
            n_good += 1
    remedy = "; remove them, or let the next run that needs them make them again" if n_bad else ""
    print(f"{n_good} good, {n_bad} damaged{remedy}")
    return 1 if n_bad else 0


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What `prune` leaves."""

    limit_bytes: float = float("inf")
    unused_s: float = float("inf")
    weights: str | None = None

    def surplus(self, files: Iterable[StoredFile], held_bytes: int) -> list[StoredFile]:
        """Files to remove, of those that may be removed, least recently used first."""
        now, gone, kept = time.time(), [], []
        for file in files:
            too_old = now - file.last_use_ns / 1e9 > self.unused_s
            (gone if too_old or self._is_of_other_weights(file) else kept).append(file)
        total = sum(file.n_bytes for file in kept) + held_bytes
        for file in kept:
            if total <= self.limit_bytes:
                break
            gone.append(file)
            total -= file.n_bytes
        return gone

    def _is_of_other_weights(self, file: StoredFile) -> bool:
        if self.weights is None:
            return False
        try:
            return not read_record(file.path).weights.startswith(self.weights)
        except (DamagedEmbeds, OSError):
            return False  # Not known: `verify` names it.


def _prune(root: Path, parsed: argparse.Namespace) -> int:
    if parsed.limit_gib is None and parsed.older_than_days is None and not parsed.weights:
        print("say what to remove: --limit-gib, --older-than-days or --weights", file=sys.stderr)
        return 2
    wanted = Wanted(
        limit_bytes=float("inf") if parsed.limit_gib is None else parsed.limit_gib * GIB,
        unused_s=float("inf")
        if parsed.older_than_days is None
        else parsed.older_than_days * _DAY_S,
        weights=parsed.weights or None,
    )
    named: list[StoredFile] = []

    def choose(files: list[StoredFile], held_bytes: int) -> list[StoredFile]:
        named.extend(wanted.surplus(files, held_bytes))
        return [] if parsed.dry_run else named

    FileStore(root, 0).remove(choose)
    if not parsed.dry_run:
        remove_dead_links(root)
    verb = "would remove" if parsed.dry_run else "removed"
    for file in named:
        print(f"{verb} {file.path.name}, last used {_ago(file.last_use_ns / 1e9)} ago")
    print(f"{verb} {len(named)} entries, {sum(file.n_bytes for file in named) / GIB:.2f} GiB")
    return 0


def _ago(moment: float) -> str:
    seconds = max(0.0, time.time() - moment)
    for unit, length in (("d", _DAY_S), ("h", 3600), ("m", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f}{unit}"
    return f"{seconds:.0f}s"


def _printable(text: str) -> str:
    """Names come from data sets: what would drive a terminal is shown as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
