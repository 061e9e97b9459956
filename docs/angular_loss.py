"""The figure of question 5: which angle a naive constraint bounds, and which the angular loss
bounds.

Writes  docs/angular_loss.png
Run     python docs/angular_loss.py
"""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Circle

ALPHA = 40  # degrees


def main():
    p, a, n = np.array([-1, 0]), np.array([1, 0]), np.array([1.4, 1.2])
    moved = np.array([1.12, 0.08])  # a worse place for the negative: almost on top of a
    c, radius = (a + p) / 2, np.linalg.norm(a - p) / 2
    m = c + radius * np.array([c[1] - n[1], n[0] - c[0]]) / np.linalg.norm(
        n - c
    )  # n - c, turned by 90 degrees
    grid = np.stack(np.meshgrid(np.linspace(-2, 2.6, 461), np.linspace(-1.5, 1.9, 341)), axis=-1)

    def naive(x):
        """Angle in degrees that the segment from p to a fills, seen from x (one point or a grid of
        points)."""
        u, v = a - x, p - x
        cross = u[..., 0] * v[..., 1] - u[..., 1] * v[..., 0]
        return np.degrees(np.arctan2(np.abs(cross), (u * v).sum(-1)))

    def repaired(x):
        """Angle n' in degrees: tan n' = |a - p| / (2 |x - c|)."""
        return np.degrees(np.arctan2(radius, np.linalg.norm(x - c, axis=-1)))

    def draw_point(axes, point, label, colour, offset):
        axes.plot(*point, "o", color=colour, markersize=7)
        axes.annotate(label, point, offset, textcoords="offset points")

    def mark_angle(axes, corner, first, second):
        turn = np.linspace(*(np.arctan2(*(point - corner)[::-1]) for point in (first, second)))
        axes.plot(
            corner[0] + 0.25 * np.cos(turn), corner[1] + 0.25 * np.sin(turn), "k", linewidth=1
        )

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, angle, name, triangle in (
        (left, naive, "n", (p, a, n)),
        (right, repaired, "n'", (m, c, n)),
    ):
        axes.contourf(
            *np.moveaxis(grid, -1, 0), angle(grid), levels=[ALPHA, 180], colors=["#f6dfc8"]
        )
        axes.fill(*np.transpose(triangle), fill=False, linewidth=1.2)
        mark_angle(axes, n, *triangle[:2])
        draw_point(axes, a, "$x_a$", "tab:blue", (-20, -16))
        draw_point(axes, p, "$x_p$", "tab:blue", (-20, -16))
        draw_point(axes, n, f"$x_n$,  ${name}$ = {angle(n):.0f}°", "tab:red", (8, 7))
        draw_point(
            axes, moved, f"$x_n$ moved,  ${name}$ = {angle(moved):.0f}°", "tab:orange", (14, -3)
        )
        axes.set(
            xlabel=f"shaded: ${name}$ > {ALPHA}°, the constraint is violated",
            aspect="equal",
            xticks=[],
            yticks=[],
        )

    left.set_title("naive constraint: angle $n$ of the triangle $x_a, x_p, x_n$")
    left.fill(*np.transpose((p, a, moved)), fill=False, linestyle="--")
    right.set_title("angular loss: angle $n'$ of the triangle $x_m, x_c, x_n$")
    right.plot(*np.transpose((p, a)), "k:")
    right.add_patch(Circle(c, radius, fill=False, color="tab:blue"))
    mark_angle(right, c, n, m)
    draw_point(right, c, "$x_c$,  90°", "tab:green", (-8, -16))
    draw_point(right, m, "$x_m$", "tab:green", (-22, 5))
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=150, bbox_inches="tight")


if __name__ == "__main__":
    main()
