"""RL with verifiable answers: `python3 -m verl.trainer.main config=FILE key=value ...`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from verl.config import PPOConfig, parse_cli


def main(argv: Sequence[str] | None = None) -> int:
    """Command line entry."""
    config = parse_cli(sys.argv[1:] if argv is None else argv, PPOConfig, "verl.trainer.main")
    # Heavy imports wait until the configuration is known to be good.
    from verl.trainer.build import run
    from verl.utils.logger import setup_logging

    setup_logging()
    run(config)
    return 0


if __name__ == "__main__":
    from verl.utils.processes import exit_on_error

    exit_on_error(main)
