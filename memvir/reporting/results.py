"""The results of a data set's runs, read from their files, and whether they belong together."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from memvir.config import Recipe
from memvir.errors import UserError

PROTOCOLS = ("last", "best")
Results = dict[tuple[str, int], dict[str, Any]]
"""(variant, seed) -> the content of its result file; a run without one is not there."""


@dataclass(frozen=True)
class Line:
    """A variant as a line of the tables."""

    variant: str
    title: str
    loss: str
    """As the paper calls it; the title too, unless several variants share it."""
    baseline: str | None
    """The variant that its Diff. refers to."""


def table_lines(recipe: Recipe, variants: Sequence[str]) -> list[Line]:
    """The lines of a recipe's tables, in the order of `variants`.

    Where two variants would be called the same, (N, M) tells them apart, and where that is the same too, their name.
    """
    losses = {name: recipe.variants[name].display_name for name in variants}
    titles = dict(losses)
    for name, title in _shared(titles).items():
        memvir = recipe.variants[name].memvir
        titles[name] = f"{title} ({memvir.num_steps}, {memvir.step_gap})" if memvir else title
    for name, title in _shared(titles).items():
        titles[name] = f"{title} [{name}]"
    return [Line(name, titles[name], losses[name], recipe.baseline_of(name)) for name in variants]


def _shared(titles: Mapping[str, str]) -> dict[str, str]:
    count = Counter(titles.values())
    return {name: title for name, title in titles.items() if count[title] > 1}


def read_results(files: Mapping[tuple[str, int], Path]) -> Results:
    """Read the result files that exist; UserError naming the file that is not one."""
    results: Results = {}
    for run, path in files.items():
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            for protocol in PROTOCOLS:
                dict[str, float](content[protocol])
        except FileNotFoundError:
            continue
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}: not a result file; delete it and run `dvc repro`") from None
        results[run] = content
    if not results:
        folder = next(iter(files.values())).parent.parent
        raise UserError(f"{folder}: none of the {len(files)} runs has a result; run `dvc repro`")
    return results


def run_values(results: Results, lines: Sequence[Line], seeds: Sequence[int]) -> pd.DataFrame:
    """One row per protocol, metric, variant and seed, with `value` in per cent, NaN where the run is missing."""
    first = next(iter(results.values()))
    rows = [
        (protocol, metric, line.variant, seed, 100 * value if value is not None else float("nan"))
        for protocol in PROTOCOLS
        for metric in first[protocol]
        for line in lines
        for seed in seeds
        for value in [results.get((line.variant, seed), {}).get(protocol, {}).get(metric)]
    ]
    return pd.DataFrame(rows, columns=["protocol", "metric", "variant", "seed", "value"])


def flatten(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"training": {"epochs": 60}} as {"training.epochs": 60}."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def settings_of(results: Results, lines: Sequence[Line]) -> dict[str, dict[str, Any]]:
    """variant -> its flat settings, from its first run that there is; what names the run itself is left out."""
    settings = {}
    for line in lines:
        runs = [content for (variant, _), content in results.items() if variant == line.variant]
        if runs:
            settings[line.variant] = _run_settings(runs[0])
    return settings


def environment_of(results: Results) -> dict[str, Any]:
    """What the runs were made with; several values where they differ."""
    seen: dict[str, list[str]] = {}
    for content in results.values():
        for key, value in flatten(content.get("environment", {})).items():
            text = value if isinstance(value, str) else json.dumps(value)
            if text not in seen.setdefault(key, []):
                seen[key].append(text)
    return {key: ", ".join(values) for key, values in seen.items()}


@dataclass(frozen=True)
class Check:
    passed: bool
    text: str


def check_runs(results: Results, lines: Sequence[Line], seeds: Sequence[int]) -> list[Check]:
    """What a reader wants to know before believing a comparison, as sentences."""
    expected = len(lines) * len(seeds)
    missing = [f"{line.variant}/{seed}" for line in lines for seed in seeds if (line.variant, seed) not in results]
    checks = [
        Check(False, f"{len(missing)} of {expected} runs missing: {', '.join(missing)}.")
        if missing
        else Check(True, f"All {expected} runs are there: {len(lines)} variants, {len(seeds)} seeds each.")
    ]
    if len(seeds) < 2:
        checks.append(Check(False, "One seed only: nothing here tells chance from effect."))
    mixed = [
        line.variant
        for line in lines
        if _differing([_run_settings(results[line.variant, s]) for s in seeds if (line.variant, s) in results])
    ]
    checks.append(
        Check(False, f"The seeds of {', '.join(mixed)} were run with different settings.")
        if mixed
        else Check(True, "The runs of a variant differ in their seed alone.")
    )
    lengths = {int(content.get("last_epoch", 0)) for content in results.values()}
    checks.append(
        Check(True, f"Every run has {lengths.pop()} epochs.")
        if len(lengths) == 1
        else Check(
            False,
            f"Runs differ in length, from {min(lengths)} to {max(lengths)} epochs, which a difference may be due to.",
        )
    )
    differing = _differing([flatten(content.get("environment", {})) for content in results.values()])
    checks.append(
        Check(False, f"Not all runs were made alike; they differ in {', '.join(differing)}.")
        if differing
        else Check(True, "All runs were made on the same data, with the same software and kind of device.")
    )
    return checks


def _run_settings(content: Mapping[str, Any]) -> dict[str, Any]:
    flat = flatten(content.get("settings", {}))
    return {key: value for key, value in flat.items() if key not in ("dataset", "variant", "seed")}


def _differing(records: Sequence[Mapping[str, Any]]) -> list[str]:
    keys = dict.fromkeys(key for record in records for key in record)
    return [key for key in keys if any(record.get(key) != records[0].get(key) for record in records)]
