"""What a program found in the pictures or videos of a demo model, counted by group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table

from max_diffusion.demo import Verdict


def counts(groups: Mapping[str, Sequence[Verdict]]) -> dict[str, dict[str, float]]:
    """Counts what is right in each group, the groups in order."""
    return {
        name: {
            "prompts": len(members),
            "right": sum(v.is_right for v in members),
            "objects_right": sum(v.objects_right for v in members),
            "percent": 100 * sum(v.is_right for v in members) / len(members),
        }
        for name, members in sorted(groups.items())
    }


def table(summary: Mapping[str, Mapping[str, float]]) -> Table:
    """The counts of :func:`counts`, a line each."""
    found = Table("group", "prompts", "right", "objects right", "%")
    for name, row in summary.items():
        found.add_row(
            name,
            str(row["prompts"]),
            str(row["right"]),
            str(row["objects_right"]),
            f"{row['percent']:.1f}",
        )
    return found
