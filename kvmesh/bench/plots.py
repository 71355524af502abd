"""Pictures of runs, by matplotlib, which is an extra: pip install 'kvmesh[bench]'."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvmesh.bench.report import Report
from kvmesh.errors import FailedPrecondition, InvalidArgument

FORMATS = (".png", ".svg", ".pdf")


def _pyplot(path: Path) -> Any:
    if path.suffix not in FORMATS:
        raise InvalidArgument(f"{path}: a picture ends in {', '.join(FORMATS)}")
    try:
        import matplotlib
    except ImportError:
        raise FailedPrecondition("matplotlib is not installed: pip install 'kvmesh[bench]'") from None
    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot


def check(path: Path) -> None:
    """Raises InvalidArgument or FailedPrecondition when no picture can be written there."""
    _pyplot(path)


def distributions(reports: Sequence[Report], path: Path) -> None:
    """The share of requests within a time, for TTFT, TPOT and JCT of each run."""
    pyplot = _pyplot(path)
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    for axis, (measure, title, unit) in zip(
        axes, (("ttft", "TTFT", 1.0), ("tpot", "TPOT", 1000.0), ("jct", "JCT", 1.0)), strict=True
    ):
        for report in reports:
            values = sorted(unit * v for v in report.samples.get(measure, []))
            if values:
                axis.step(values, [(i + 1) / len(values) for i in range(len(values))], where="post", label=report.name)
        axis.set_xlabel(f"{title}, {'ms' if unit > 1 else 's'}")
        axis.set_ylim(0, 1)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("share of requests")
    if len(reports) > 1:
        axes[-1].legend(loc="lower right")
    figure.savefig(path, dpi=140)
    pyplot.close(figure)


def curves(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], x: str, path: Path, columns: int = 3
) -> None:
    """Panels by title, each of lines by name, of (x, y). Names that begin with "published" are dashed crosses."""
    pyplot = _pyplot(path)
    rows = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(4 * columns, 3.2 * rows), layout="constrained", squeeze=False
    )
    colours: dict[str, Any] = {}
    for axis, (title, lines) in zip(axes.flat, panels.items(), strict=False):
        for name, points in lines.items():
            published = name.startswith("published ")
            base = name.removeprefix("published ")
            colour = colours.setdefault(base, f"C{len(colours)}")
            style = {"linestyle": "--", "marker": "x", "alpha": 0.6} if published else {"marker": "o", "markersize": 3}
            axis.plot(*zip(*points, strict=True), color=colour, label=name, **style)
        axis.set_title(title)
        axis.set_xlabel(x)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_visible(False)
    axes[0][0].legend(fontsize="small")
    figure.savefig(path, dpi=140)
    pyplot.close(figure)
