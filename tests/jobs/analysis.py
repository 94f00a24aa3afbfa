"""The main job: builds ``analysis.ipynb``, a real analysis notebook whose outputs do not depend on where it runs.

``python tests/jobs/analysis.py`` writes the notebook anew beside this file; a test holds the two together.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from textwrap import dedent
from typing import Any

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

NOTEBOOK = Path(__file__).with_name("analysis.ipynb")
LINES = 200_000
FLUSHED = 2_000
BIG = 12_000_000
"""Characters of the big output."""

_CELLS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (
        "imports",
        """
        %matplotlib inline
        import json
        import random
        import sys
        import threading
        import time
        import warnings

        import matplotlib.pyplot as plt
        import numpy as np
        import pandas as pd
        from IPython.display import HTML, JSON, SVG, Image, Latex, Markdown, Math, clear_output, display, update_display

        plt.rcParams["svg.hashsalt"] = "analysis"
        plt.rcParams["figure.dpi"] = 80
        """,
        (),
    ),
    (
        "frame",
        """
        rng = np.random.default_rng(20260905)
        days = pd.date_range("2026-01-01", periods=365, freq="D")
        sales = pd.DataFrame(
            {
                "shop": rng.choice(["Basel", "Bern", "Chur", "Zürich"], size=365),
                "units": rng.poisson(40, size=365),
                "price": np.round(rng.normal(12.5, 1.5, size=365), 2),
            },
            index=days,
        )
        sales["revenue"] = sales["units"] * sales["price"]
        sales.head(10)
        """,
        (),
    ),
    (
        "describe",
        'display(sales.describe())\nsales.groupby("shop")["revenue"].agg(["count", "mean", "sum"]).round(2)',
        (),
    ),
    (
        "info",
        """
        sales.info(memory_usage=False)
        print(sales.resample("MS")["revenue"].sum().round(2).to_string())
        """,
        (),
    ),
    (
        "figure",
        """
        figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5))
        sales.resample("W")["revenue"].sum().plot(ax=left, title="revenue per week")
        sales.boxplot(column="revenue", by="shop", ax=right)
        figure.tight_layout()
        plt.show()
        """,
        (),
    ),
    ("figure_result", 'plt.hist(sales["price"], bins=20, color="#336699")[0].astype(int)', ()),
    (
        "rich",
        """
        display(HTML("<b>bold</b> <script>1 + 1</script>"))
        display(Latex(r"$\\int_0^1 x^2\\,dx = \\tfrac13$"), Math(r"e^{i\\pi}"), Markdown("# a *title*"))
        display(JSON({"a": [1, 2, {"b": None}], "ü": "日本語 🙂"}, expanded=True))
        display(SVG("<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'><rect width='9' height='9'/></svg>"))
        pixel = bytes.fromhex(
            "89504e470d0a1a0a0000000d4948445200000001000000010806000000"
            "1f15c4890000000d49444154789c6360f8cf500f0003860180c4d1b0c80000000049454e44ae426082"
        )
        display(Image(data=pixel, format="png", width=16))
        display({"text/plain": "raw", "application/x-own+json": {"n": 1}}, raw=True, metadata={"own": True})
        """,
        (),
    ),
    (
        "update_display",
        """
        handle = display(HTML("step 0"), display_id="progress")
        for step in range(1, 6):
            update_display(HTML(f"step {step}"), display_id="progress")
        print("done", file=sys.stderr)
        """,
        (),
    ),
    ("update_from_later", 'update_display(HTML("finished"), display_id="progress")', ()),
    (
        "clear_output",
        """
        for step in range(5):
            clear_output(wait=True)
            print("pass", step, flush=True)
        print("after")
        clear_output()
        print("only this")
        """,
        (),
    ),
    (
        "streams",
        """
        for step in range(3):
            print("out", step, flush=True)
            print("err", step, file=sys.stderr, flush=True)
        sys.stdout.write("no newline at the end")
        """,
        (),
    ),
    ("warning", 'warnings.warn("look at line one")', ()),
    (
        "error",
        """
        def ratio(a, b):
            return a / b

        ratio(sales["units"].iloc[0], 0) if False else ratio(1, 0)
        """,
        ("raises-exception",),
    ),
    ("syntax_error", "for x in range(3) print(x)", ("raises-exception",)),
    ("after_error", 'print("the kernel goes on")\n_', ()),
    (
        "input",
        """
        name = input("Your name? ")
        print(f"Hello {name}!")
        """,
        ("raises-exception",),
    ),
    (
        "thread",
        """
        def work():
            for step in range(20):
                print("thread", step)
                time.sleep(0.01)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        print("joined")
        """,
        (),
    ),
    (
        "two_threads",
        """
        turns = [threading.Event(), threading.Event()]

        def other():
            for step in range(10):
                turns[0].wait(); turns[0].clear()
                print("b", step, flush=True)
                turns[1].set()

        thread = threading.Thread(target=other)
        thread.start()
        for step in range(10):
            print("a", step, flush=True)
            turns[0].set()
            turns[1].wait(); turns[1].clear()
        thread.join()
        """,
        (),
    ),
    ("subprocess", "!echo from a subprocess; echo its error >&2; exit 3\n_exit_code", ()),
    ("async", "import asyncio\nawait asyncio.gather(*(asyncio.sleep(0.01, n) for n in range(5)))", ()),
    ("history", "In[2][:40], Out[2].shape", ()),
    ("magics", "%%capture captured\nprint('caught')", ()),
    ("captured", "captured.stdout", ()),
    ("inspect", "import textwrap\nprint(textwrap.dedent.__doc__)", ()),
    ("lines", f"for number in range({LINES}):\n    print(number)", ()),
    ("flushed_lines", f"for number in range({FLUSHED}):\n    print(number, flush=True)", ()),
    (
        "big",
        f"""
        text = random.Random(1).randbytes({BIG // 2}).hex()
        display({{"text/plain": text}}, raw=True)
        len(text)
        """,
        (),
    ),
    ("last", 'print("the end")', ()),
)


def build() -> nbformat.NotebookNode:
    """The notebook, without outputs."""
    cells = [new_markdown_cell("# A year of sales\nThe main job of the acceptance tests.", id="title")]
    for name, code, tags in _CELLS:
        metadata = {"tags": list(tags)} if tags else {}
        cells.append(new_code_cell(dedent(code).strip("\n"), id=name, metadata=metadata))
    kernelspec = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return new_notebook(cells=cells, metadata={"kernelspec": kernelspec, "language_info": {"name": "python"}})


_VOLATILE = (
    (re.compile(r"\S*ipykernel_\d+/\d+\.py"), "<cell>"),
    (re.compile(r"0x[0-9a-f]{6,16}"), "0x..."),
)


def normalised(notebook: nbformat.NotebookNode) -> dict[str, dict[str, Any]]:
    """What the saved outputs say, free of where and when they were made: paths, addresses, times, message cuts.

    How a stream is cut into messages is a matter of timing; so neighbouring pieces of one stream are joined.
    """
    cells: dict[str, dict[str, Any]] = {}
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        outputs: list[Any] = []
        for output in cell.outputs:
            node = _plain(output)
            if node["output_type"] == "stream" and outputs and outputs[-1].get("name") == node["name"]:
                outputs[-1]["text"] += node["text"]
            else:
                outputs.append(node)
        cells[cell.id] = {
            "source": cell.source,
            "count": cell.execution_count,
            "outputs": outputs if cell.id != "streams" else _by_name(outputs),
        }
    return cells


def _by_name(outputs: list[Any]) -> list[Any]:
    """Outputs with the two streams apart: their order between each other is not promised by anybody."""
    streams: dict[str, str] = {}
    others = []
    for output in outputs:
        if output["output_type"] == "stream":
            streams[output["name"]] = streams.get(output["name"], "") + output["text"]
        else:
            others.append(output)
    return [*({"output_type": "stream", "name": name, "text": text} for name, text in sorted(streams.items())), *others]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    if isinstance(value, str) and len(value) < 1_000_000:
        for pattern, replacement in _VOLATILE:
            value = pattern.sub(replacement, value)
    return value


if __name__ == "__main__":
    sys.stdout.write(f"{NOTEBOOK}\n")
    nbformat.write(build(), NOTEBOOK)
