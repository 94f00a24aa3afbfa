"""Draw the kernelspecs' logo, a prompt in a box: one list of shapes becomes the SVG and both PNG files.

Run it as ``python tools/render_logo.py`` from the repository's root after a change to :data:`SHAPES`.
"""

from __future__ import annotations

import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

SIZE = 64
SAMPLES = 5
"""Per pixel and axis."""
OUT = Path(__file__).resolve().parent.parent / "sandbox_gateway" / "logos"


@dataclass(frozen=True)
class Box:
    """A filled rectangle with round corners."""

    x: float
    y: float
    width: float
    height: float
    radius: float
    colour: str

    def svg(self) -> str:
        return (
            f'<rect x="{self.x}" y="{self.y}" width="{self.width}" height="{self.height}"'
            f' rx="{self.radius}" fill="{self.colour}"/>'
        )

    def covers(self, x: float, y: float) -> bool:
        dx = max(self.x + self.radius - x, x - (self.x + self.width - self.radius), 0)
        dy = max(self.y + self.radius - y, y - (self.y + self.height - self.radius), 0)
        inside = self.x <= x <= self.x + self.width and self.y <= y <= self.y + self.height
        return inside and math.hypot(dx, dy) <= self.radius


@dataclass(frozen=True)
class Stroke:
    """A line through points, with round ends."""

    points: tuple[tuple[float, float], ...]
    width: float
    colour: str

    def svg(self) -> str:
        path = " ".join(f"{x},{y}" for x, y in self.points)
        return (
            f'<polyline points="{path}" fill="none" stroke="{self.colour}" stroke-width="{self.width}"'
            ' stroke-linecap="round" stroke-linejoin="round"/>'
        )

    def covers(self, x: float, y: float) -> bool:
        ends = zip(self.points, self.points[1:], strict=False)
        return any(_distance(x, y, start, end) <= self.width / 2 for start, end in ends)


def _distance(x: float, y: float, start: tuple[float, float], end: tuple[float, float]) -> float:
    dx, dy = end[0] - start[0], end[1] - start[1]
    along = max(0.0, min(1.0, ((x - start[0]) * dx + (y - start[1]) * dy) / (dx * dx + dy * dy)))
    return math.hypot(x - start[0] - along * dx, y - start[1] - along * dy)


SHAPES = (
    Box(2, 2, 60, 60, 14, "#1f6f78"),
    Box(9, 9, 46, 46, 8, "#f3efe0"),
    Box(14, 14, 36, 36, 4, "#123c42"),
    Stroke(((21, 24), (29, 32), (21, 40)), 4.5, "#f2b134"),
    Stroke(((33, 41), (43, 41)), 4.5, "#f3efe0"),
)


def svg() -> str:
    """The drawing as SVG."""
    body = "\n  ".join(shape.svg() for shape in SHAPES)
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {SIZE} {SIZE}">\n  {body}\n</svg>\n'


def png(size: int) -> bytes:
    """The drawing as a PNG of ``size`` pixels a side, with transparency."""
    rows = b"".join(b"\0" + b"".join(_pixel(column, row, SIZE / size) for column in range(size)) for row in range(size))
    header = struct.pack("!2I5B", size, size, 8, 6, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in chunks)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack("!I", len(data)) + kind + data + struct.pack("!I", zlib.crc32(kind + data))


def _pixel(column: int, row: int, scale: float) -> bytes:
    total = [0, 0, 0]
    covered = 0
    for sample in range(SAMPLES * SAMPLES):
        x = (column + (sample % SAMPLES + 0.5) / SAMPLES) * scale
        y = (row + (sample // SAMPLES + 0.5) / SAMPLES) * scale
        colour = next((shape.colour for shape in reversed(SHAPES) if shape.covers(x, y)), None)
        if colour is not None:
            covered += 1
            total = [sum_ + part for sum_, part in zip(total, bytes.fromhex(colour[1:]), strict=True)]
    if not covered:
        return bytes(4)
    return bytes([*(round(part / covered) for part in total), round(255 * covered / SAMPLES**2)])


def main() -> None:
    """Write the three files."""
    OUT.mkdir(exist_ok=True)
    (OUT / "logo-svg.svg").write_text(svg(), encoding="utf-8")
    for size in (32, 64):
        (OUT / f"logo-{size}x{size}.png").write_bytes(png(size))


if __name__ == "__main__":
    main()
