"""What `logitless reward` says of all rows together: for a program, and for a reader."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from logitless.training.document import Table
from logitless.training.implicit_reward.page import Shown, number_text
from logitless.training.implicit_reward.ranking import Judged, judged, preference, ranking
from logitless.training.implicit_reward.rows import AnswerRows
from logitless.training.implicit_reward.scores import Answer

PAGE_ROWS = 100  # how many of the first rows a page has

Summary = dict[str, Any]


class Collected:
    """What the summary and the page need of the answers, which comes batch by batch."""

    def __init__(self) -> None:
        self.judged: list[Judged] = []
        self.prefers: list[bool] = []
        self.shown: list[Shown] = []
        self.tokens = 0

    def add(self, read: AnswerRows, index: int, found: Sequence[Answer]) -> dict[str, Any]:
        """Takes the answers of a row, and returns the row as it is written."""
        origin = read.rows[index].origin
        record: dict[str, Any] = {"row": read.numbers[index], "origin": origin}
        self.tokens += sum(len(answer.ids) for answer in found)
        right, note = None if read.right is None else read.right[index], ""
        if right is not None:
            self.judged += [judged(*each, read.prompts[index]) for each in zip(found, right, strict=True)]
            note = f"the answer is {'right' if right[0] else 'wrong'}"
            record |= {} if read.paired else {"right": right[0]}
        if read.paired:
            margin = found[0].sequence_reward - found[1].sequence_reward
            self.prefers.append(margin > 0)
            record |= {"prefers_chosen": margin > 0, "margin": margin}
            note = f"the implicit reward {'prefers' if margin > 0 else 'does not prefer'} the chosen answer"
        named = dict(zip(read.names, found, strict=True))
        if len(self.shown) < PAGE_ROWS:
            self.shown.append(Shown(origin, named, note))
        written = {name: answer.to_dict() for name, answer in named.items()}
        return record | (written if read.paired else written["answer"])

    def summary(self, read: AnswerRows, about: Mapping[str, Any], seed: int) -> Summary:
        """The numbers of all rows, behind what they are about; plain values."""
        left_out = read.data.rows - len(read.rows)
        summary = {**about, "seed": seed, "rows": len(read.rows), "rows_left_out": left_out, "tokens": self.tokens}
        if read.paired:
            summary["preference"] = preference(self.prefers, read.prompts, seed)
        if self.judged:
            summary["ranking"] = ranking(self.judged, seed)
        return summary


def summary_lines(summary: Mapping[str, Any]) -> list[str]:
    """A summary for a reader of the terminal."""
    lines = [f"{name}: {value}" for name, value in summary_facts(summary).items()]
    for table in summary_tables(summary):
        widths = [max(map(len, column)) for column in zip(table.columns, *table.rows, strict=True)]
        lines.append(table.caption)
        for cells in (table.columns, *table.rows):
            padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
            lines.append("  " + "  ".join(padded).rstrip())
    return lines


def summary_facts(summary: Mapping[str, Any]) -> dict[str, str]:
    """Names and values of a summary for a reader, without its table."""
    facts = {
        "model": str(summary["model"]),
        "reference": str(summary["reference"] or "none: the endogenous reward"),
        "beta": number_text(summary["beta"]),
        "rows": f"{summary['rows']}, with {summary['tokens']} tokens; {summary['rows_left_out']} left out",
    }
    if found := summary.get("preference"):
        counts = f"{found['pairs']} pairs, {found['prompts']} prompts"
        facts["chosen answer preferred"] = f"{found['accuracy']:.3f} {_between(found['interval'])} of {counts}"
    return facts


def summary_tables(summary: Mapping[str, Any]) -> list[Table]:
    """The table of a summary, if it has one."""
    found = summary.get("ranking")
    if found is None:
        return []
    rows = [
        [
            each["measure"],
            *(
                f"{'none' if each[name] is None else format(each[name], '.3f')} {_between(each[interval])}"
                for name, interval in (("auc", "interval"), ("auc_within_prompts", "interval_within_prompts"))
            ),
        ]
        for each in found["measures"]
    ]
    caption = (
        f"AUC of {found['right']} right against {found['wrong']} wrong answers to {found['prompts']} prompts, with 95% "
        "intervals"
    )
    return [Table(caption, ["measure", "over all answers", "within prompts"], rows)]


def _between(interval: Sequence[float | None]) -> str:
    ends = [end for end in interval if end is not None]
    return f"[{ends[0]:.3f}, {ends[1]:.3f}]" if len(ends) == 2 else ""
