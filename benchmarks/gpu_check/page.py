"""The results as a Markdown page."""

from typing import Any

from benchmarks.gpu_check.parts import PARTS


def to_markdown(content: dict[str, Any]) -> str:
    machine = content["machine"]
    lines = [f"# GPU check on {machine['name']}", ""]
    if machine["device"] == "cpu":
        lines += ["**Run on a CPU at small size: this shows that the parts work, and nothing about GPUs.**", ""]
    lines += ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in machine.items()), ""]
    for part, outcome in content["parts"].items():
        state = outcome["status"] + (f": {outcome['why']}" if outcome["why"] else "")
        lines += [f"## {part}", "", f"{PARTS[part].what} ({state}; {outcome['seconds']} s)", ""]
        for title, value in outcome["values"].items():
            lines += table(title, value) if isinstance(value, list) else [f"- {title}: {value}"]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def table(title: str, rows: list[dict[str, Any]]) -> list[str]:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    header = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    return ["", title, "", *header, *(f"| {' | '.join(str(row.get(c, '–')) for c in columns)} |" for row in rows), ""]
