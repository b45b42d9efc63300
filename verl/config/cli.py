"""The command line of every entry point: parse, check, and say all that is wrong at once."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

from verl.config.arguments import split_arguments
from verl.config.build import Built, argument_assignments, build, file_assignments
from verl.config.problems import ConfigError, Problem
from verl.config.render import help_text, resolved_text
from verl.config.yaml_file import read_yaml

T = TypeVar("T")


def parse_cli(argv: Sequence[str], root: type[T], prog: str) -> T:
    """The configuration that `argv` (without the program's name) asks for, checked.

    `--help` and `--print-config` print and exit with 0. Mistakes are printed to stderr, all of
    them together, and exit with 2; nothing has been started then.
    """
    if any(word in ("-h", "--help") for word in argv):
        sys.stdout.write(help_text(root, prog))
        raise SystemExit(0)
    try:
        cfg = load(argv, root)
    except ConfigError as error:
        count = len(error.problems)
        head = f"{prog}: {count} problem{'s' if count > 1 else ''} in the configuration"
        sys.stderr.write(f"{head}; nothing was started.\n{error}\n")
        sys.stderr.write(f"`{prog} --help` lists every key.\n")
        raise SystemExit(2) from None
    if "--print-config" in argv:
        sys.stdout.write(resolved_text(cfg))
        raise SystemExit(0)
    return cfg


def load(argv: Sequence[str], root: type[T]) -> T:
    """As `parse_cli`, but raises ConfigError with every problem, and prints nothing."""
    args = split_arguments(argv)
    problems, assignments = list(args.problems), []
    if args.config is not None:
        entries, wrong = read_yaml(args.config)
        found, unknown = file_assignments(root, entries, args.config)
        assignments += found
        problems += wrong + unknown
    found, unknown = argument_assignments(root, args.assignments)
    built = build(root, [*assignments, *found])
    problems += unknown + built.problems
    # A setting that could not be read holds its default now; what follows from that is no news.
    bad = built.bad_keys | {key for problem in problems for key in problem.keys}
    found_wrong = _look(built.config)
    problems += [_placed(p, built) for p in found_wrong if not bad & set(p.keys)]
    if problems:
        raise ConfigError(problems)
    return built.config


def _look(cfg: Any) -> list[Problem]:
    """The checks of a root; a path that the system refuses to look at is a problem as well."""
    try:
        return cfg.problems()
    except OSError as error:
        return [Problem((), f"{error.filename}: cannot be looked at ({error.strerror})")]


def _placed(problem: Problem, built: Built) -> Problem:
    """The problem with the places where its settings were given."""
    given = [(key, built.origins[key]) for key in problem.keys if key in built.origins]
    if len(given) == 1 and given[0][0] == problem.keys[0]:
        return replace(problem, where=given[0][1])
    return replace(problem, where="; ".join(f"{key}: {where}" for key, where in given))
