"""The results of a data set's runs, read from their files, and whether they belong together."""

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from memvir.errors import NotMade, UserError
from memvir.experiment.identity import flatten
from memvir.experiment.settings import Recipe
from memvir.wrappers import WRAPPERS

PROTOCOLS = ("last", "best")
UNTRAINED = "untrained"
"""The line of the backbone before training; a run's result holds its metrics, those of its seed."""
SPACE = {
    "train_recall_at_1": "Recall@1, seen (%)",
    "recall_at_1_gap": "gap to unseen",
    "train_map": "MAP, seen (%)",
    "map_gap": "gap to unseen",
    "intra_class_distance": "Distance within classes",
    "inter_class_distance": "between classes",
    "distance_ratio": "ratio",
    "spectral_decay": "Spectral decay",
}
"""What `space` of a result gives, for the last model, and how it is called."""
PLAIN = "†"
SEPARATOR, CONTROL = " + ", " (control)"
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
    control: str | None = None
    """The plain loss under this line's settings."""
    origin: str = "untuned"
    """Of its settings."""
    plain_seeds: tuple[int, ...] = ()
    """Seeds whose runs, MemVir or another wrapper by name, never had it in use; the title is marked then."""

    @property
    def wrapper(self) -> str:
        """What stands around the loss, as the paper calls it, or nothing."""
        return self.loss.rpartition(SEPARATOR)[0]

    @property
    def plain_loss(self) -> str:
        return self.loss.rpartition(SEPARATOR)[2].removesuffix(CONTROL)


def table_lines(recipe: Recipe, variants: Sequence[str]) -> list[Line]:
    """The lines of a recipe's tables, in the order of `variants`.

    Where two variants would be called the same, their wrapper's numbers tell them apart, such as (N, M), and where
    those are the same too, their name.
    """
    losses = {name: recipe.variants[name].display_name for name in variants}
    titles = dict(losses)
    for name in variants:
        if subject := recipe.variants[name].control_of:
            wrapper = WRAPPERS[recipe.variants[subject].wrapper or ""].title
            titles[name] = titles[name].replace(CONTROL, f" (control of {wrapper})")
    for name, title in _shared(titles).items():
        settings = recipe.variants[name].wrapper_settings
        titles[name] = f"{title} ({settings.numbers})" if settings and settings.numbers else title
    for name, title in _shared(titles).items():
        titles[name] = f"{title} [{name}]"
    return [
        Line(
            name,
            titles[name],
            losses[name],
            recipe.baseline_of(name),
            recipe.control_of(name),
            recipe.variants[name].origin,
        )
        for name in variants
    ]


def comparisons(lines: Sequence[Line]) -> list[tuple[Line, Line]]:
    """Every line that is compared, and with which: its baseline, and its control where the tables have one."""
    by_variant = {line.variant: line for line in lines}
    return [
        (line, by_variant[other])
        for line in lines
        for other in (line.baseline, line.control)
        if other is not None and other in by_variant
    ]


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
            raise UserError(f"{path}: not a result file; delete it and evaluate the run again") from None
        results[run] = content
    if not results:
        folder = next(iter(files.values())).parent.parent
        raise NotMade(f"{folder}: none of the {len(files)} runs has a result")
    return results


def of_other_settings(results: Results, settings: Callable[[str], Mapping[str, Any]]) -> list[tuple[str, int]]:
    """The runs whose variant has other settings now, those of `settings`, than their result tells of."""
    now = {variant: json.loads(json.dumps(settings(variant))) for variant, _ in results}
    return [run for run, content in results.items() if content.get("settings") != now[run[0]]]


def mark_plain(lines: Sequence[Line], results: Results) -> list[Line]:
    """The lines, those marked whose wrapper was never in use in a run. Older results do not tell."""
    plain: dict[str, list[int]] = {}
    for (variant, seed), content in results.items():
        settings = content.get("settings", {})
        unused = content.get("most_virtual_classes") == 0 and not content.get("most_virtual_embeddings")
        if unused and any(settings.get(name) for name in WRAPPERS):
            plain.setdefault(variant, []).append(seed)
    return [
        replace(line, title=f"{line.title}{PLAIN}", plain_seeds=tuple(plain[line.variant]))
        if line.variant in plain
        else line
        for line in lines
    ]


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


def untrained_values(results: Results, seeds: Sequence[int]) -> pd.DataFrame:
    """The same of the line UNTRAINED, which is the same in all variants; empty where no result has it."""
    rows = []
    for seed in seeds:
        known = [content[UNTRAINED] for (_, s), content in results.items() if s == seed and UNTRAINED in content]
        rows += [
            (protocol, metric, UNTRAINED, seed, 100 * value)
            for protocol in PROTOCOLS
            for metric, value in (known[0] if known else {}).items()
        ]
    return pd.DataFrame(rows, columns=["protocol", "metric", "variant", "seed", "value"])


def space_values(results: Results, lines: Sequence[Line], seeds: Sequence[int]) -> pd.DataFrame:
    """The same of SPACE, of the last models; retrieval in per cent, and the gap is seen less unseen classes."""
    rows = []
    for line in lines:
        for seed in seeds:
            content = results.get((line.variant, seed), {})
            space, last = content.get("space", {}), content.get("last", {})
            values = {name: space.get(name, math.nan) * (100 if name.startswith("train_") else 1) for name in SPACE}
            for metric in ("recall_at_1", "map"):
                values[f"{metric}_gap"] = values[f"train_{metric}"] - 100 * last.get(metric, math.nan)
            rows += [("last", name, line.variant, seed, value) for name, value in values.items()]
    return pd.DataFrame(rows, columns=["protocol", "metric", "variant", "seed", "value"])


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
    return {key: ", ".join(values) for key, values in _environments(results).items()}


def _environments(results: Results) -> dict[str, list[str]]:
    """Every value of what the runs were made with, as far as they tell."""
    seen: dict[str, list[str]] = {}
    for content in results.values():
        for key, value in _environment(content).items():
            text = value if isinstance(value, str) else json.dumps(value)
            if text not in seen.setdefault(key, []):
                seen[key].append(text)
    return seen


@dataclass(frozen=True)
class Check:
    passed: bool
    text: str


SearchSize = dict[int, int]
"""seed -> how many settings a search tried under it."""


def search_size(trials: pd.DataFrame) -> SearchSize:
    """Of a search, from its table."""
    return trials.groupby("seed")["trial"].nunique().to_dict()


def in_words(size: SearchSize) -> str:
    """Such as "30 under seed 101, 3 also under seed 102"."""
    first = max(size, key=lambda seed: size[seed])
    again = [f", {tried} also under seed {seed}" for seed, tried in size.items() if seed != first]
    return f"{size[first]} under seed {first}{''.join(again)}"


def check_runs(
    results: Results,
    lines: Sequence[Line],
    seeds: Sequence[int],
    left_out: Sequence[tuple[str, int]] = (),
    searches: Mapping[str, SearchSize] | None = None,
) -> list[Check]:
    """What a reader wants to know before believing a comparison, as sentences.

    Args:
        left_out: runs whose results are of other settings.
        searches: variant -> the size of the search for its settings, of those that there are.
    """
    expected = len(lines) * len(seeds)
    missing = [f"{line.variant}/{seed}" for line in lines for seed in seeds if (line.variant, seed) not in results]
    checks = [
        Check(False, f"{len(missing)} of {expected} runs missing: {', '.join(missing)}.")
        if missing
        else Check(True, f"All {expected} runs are there: {len(lines)} variants, {len(seeds)} seeds each.")
    ]
    if left_out:
        runs = ", ".join(f"{variant}/{seed}" for variant, seed in left_out)
        checks.append(Check(False, f"Left out, as they were run with other settings than params.yaml has now: {runs}."))
    checks.append(_check_origins(lines, searches or {}))
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
    plain = [f"{line.variant}/{seed}" for line in lines for seed in line.plain_seeds]
    if plain:
        checks.append(
            Check(False, f"Nothing virtual was ever in use in {', '.join(plain)}: there the plain loss was trained.")
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
    differing = [f"{key} ({', '.join(values)})" for key, values in _environments(results).items() if len(values) > 1]
    unknown = [f"{variant}/{seed}" for (variant, seed), content in results.items() if not _training(content)]
    if differing:
        checks.append(Check(False, f"Not all runs were made alike; they differ in {'; '.join(differing)}."))
    if unknown:
        checks.append(Check(False, f"What trained {', '.join(unknown)} is not on record."))
    if not differing and not unknown:
        checks.append(Check(True, "All runs were made on the same data, with the same software and kind of device."))
    return checks


def _environment(content: Mapping[str, Any]) -> dict[str, Any]:
    """What a run was trained with, and its data; where that is not known, nothing."""
    return {**flatten(_training(content)), **({"data": content["identity"]["index"]} if "identity" in content else {})}


def _training(content: Mapping[str, Any]) -> dict[str, Any]:
    return content.get("made_by", {}).get("training", {}).get("environment", {})


def _check_origins(lines: Sequence[Line], searches: Mapping[str, SearchSize]) -> Check:
    """Whether both sides of every comparison were given the same chance."""
    origins = {line.origin for line in lines}
    sizes = {line.title: searches[line.variant] for line in lines if line.variant in searches}
    if origins == {"tuned"} and any(size != next(iter(sizes.values())) for size in sizes.values()):
        tried = "; ".join(f"{title}: {in_words(size)}" for title, size in sizes.items())
        return Check(False, f"The lines were not searched alike, which a Diff. may be due to; settings tried: {tried}.")
    if origins == {"tuned"}:
        return Check(True, "Tuned on both sides: the settings of every line come from a search of the same size.")
    if origins == {"published"}:
        return Check(True, "The settings of every line are the published ones.")
    titles = {name: ", ".join(line.title for line in lines if line.origin == name) for name in sorted(origins)}
    which = "; ".join(f"{name}: {title}" for name, title in titles.items()) if len(origins) > 1 else "of all lines"
    return Check(
        False, f"An untuned comparison: no equal search was made for the settings {which}; a Diff. may be theirs."
    )


def _run_settings(content: Mapping[str, Any]) -> dict[str, Any]:
    flat = flatten(content.get("settings", {}))
    return {key: value for key, value in flat.items() if key not in ("dataset", "variant", "seed")}


def _differing(records: Sequence[Mapping[str, Any]]) -> list[str]:
    keys = dict.fromkeys(key for record in records for key in record)
    return [key for key in keys if any(record.get(key) != records[0].get(key) for record in records)]
