"""A driver whose workers hang: prints the mark of its run and the worker processes, then waits."""

from __future__ import annotations

import os

from verl.utils.exits import advising
from verl.utils.processes import exit_on_error, ray_session


def main() -> None:
    from tests.single_controller.toys import ToyWorker
    from verl.single_controller.worker_group import WorkerGroup

    with (
        advising(lambda: "The same command goes on from the newest checkpoint."),
        ray_session(num_cpus=2, object_store_gib=0.1),
        WorkerGroup(ToyWorker, 2) as group,
    ):
        print(os.environ["VERL_RUN_ID"], *group.ping(), flush=True)
        group.wait_for_others(absent=0, how="hang")


if __name__ == "__main__":
    exit_on_error(main)
