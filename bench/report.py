"""Table, JSON and picture of a run."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from bench.measures import SIDES, Measure


def table(measures: list[Measure]) -> str:
    """The figures for a terminal, with targets and whether they are met."""
    rows = [("measure", "plain p50", "sandboxed p50", "ratio", "target", "")]
    for measure in measures:
        rows.append(
            (
                f"{measure.name} [{measure.unit}]",
                _figure(measure.median("plain")),
                _figure(measure.median("sandboxed")),
                "" if measure.ratio is None else f"{measure.ratio:.2f} x",
                target(measure),
                {True: "pass", False: "MISS", None: ""}[measure.met],
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(6)]
    lines = [
        "  ".join(cell.ljust(width) if column in (0, 4, 5) else cell.rjust(width) for column, (cell, width) in pairs)
        for pairs in (list(enumerate(zip(row, widths, strict=True))) for row in rows)
    ]
    return "\n".join(line.rstrip() for line in lines)


def target(measure: Measure) -> str:
    """The target in words; empty without one."""
    word = "at most" if measure.better == "lower" else "at least"
    if measure.target_value is not None:
        return f"{word} {measure.target_value:g} {measure.unit} ({measure.target_from})"
    if measure.target_ratio is not None:
        return f"{word} {measure.target_ratio:g} x ({measure.target_from})"
    return ""


def as_dict(measures: list[Measure], machine: dict[str, Any], quick: bool) -> dict[str, Any]:
    """JSON form: every sample is kept."""
    return {
        "taken": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "quick": quick,
        "machine": machine,
        "measures": [
            {
                "name": measure.name,
                "unit": measure.unit,
                "better": measure.better,
                "p50": {side: round(measure.median(side), 5) for side in SIDES if measure.samples[side]},
                "ratio": None if measure.ratio is None else round(measure.ratio, 3),
                "target": target(measure),
                "met": measure.met,
                "note": measure.note,
                "samples": {side: [round(value, 5) for value in measure.samples[side]] for side in SIDES},
            }
            for measure in measures
        ],
    }


def write(measures: list[Measure], machine: dict[str, Any], quick: bool, folder: Path) -> list[Path]:
    """Write ``latest.json`` and ``latest.svg`` into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "latest.json"
    data.write_text(json.dumps(as_dict(measures, machine, quick), indent=1) + "\n")
    image = folder / "latest.svg"
    _draw(measures, machine, image)
    return [data, image]


def _draw(measures: list[Measure], machine: dict[str, Any], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    mpl.rcParams["svg.hashsalt"] = "bench"
    shown = [measure for measure in measures if measure.ratio is not None and measure.ratio > 0]
    figure, axes = plt.subplots(figsize=(9, 0.55 * len(shown) + 1.6), layout="constrained")
    colours = {True: "#2e7d32", False: "#c62828", None: "#607d8b"}
    positions = range(len(shown))
    ratios = [measure.ratio or 0.0 for measure in shown]
    axes.barh(positions, ratios, color=[colours[measure.met] for measure in shown], height=0.6)
    axes.axvline(1.0, color="black", linewidth=1)
    for position, measure in enumerate(shown):
        if measure.target_ratio is not None:
            axes.plot([measure.target_ratio] * 2, [position - 0.4, position + 0.4], color="black", linestyle=":")
        text = f" {measure.ratio:.2f} x   {_figure(measure.median('plain'))} -> {_figure(measure.median('sandboxed'))}"
        axes.text(max(measure.ratio or 0.0, 0.0), position, f"{text} {measure.unit}", va="center", fontsize=8)
    arrow = {"lower": "less is better", "higher": "more is better"}
    axes.set_yticks(positions, [f"{measure.name}\n({arrow[measure.better]})" for measure in shown], fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(min([*ratios, 0.1]) / 2, max([*ratios, 1.0]) * 12)
    axes.set_xlabel("sandboxed / plain ipykernel, p50 (dotted: target)")
    axes.set_title(f"{machine['cores']} cores, {machine['processor']}, kernel {machine['kernel']}", fontsize=9)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _figure(value: float) -> str:
    if math.isnan(value):
        return "-"
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"
