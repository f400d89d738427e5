"""`rlsys inspect`: a run in figures, or one prompt's whole story, read from the ledger and the rollout store."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlsys.errors import RunDirError
from rlsys.ledger.story import (
    Event,
    PromptStory,
    RunStory,
    evaluation_files,
    read_responses,
    read_run,
    read_story,
    was_drawn,
)
from rlsys.trackers.jsonl import EVALS, METRICS, read_rows

_LATEST_STEPS = 10


def inspect(run_dir: Path, prompt: str | None, html: Path | None = None) -> None:
    """Print the run, or the story of `prompt` (of a held-out one: its responses at each evaluation), and write the same
    to the page `html`.

    Raises RunDirError or DataError for what is not there.
    """
    if not run_dir.is_dir():
        raise RunDirError(f"{run_dir}: no such run directory")
    console = Console(highlight=False, record=html is not None)
    if prompt is None:
        _print_run(console, run_dir, read_run(run_dir))
    elif not was_drawn(run_dir, prompt) and (rows := read_responses(run_dir, prompt)):
        _print_held_out(console, rows)
    else:
        _print_story(console, run_dir, read_story(run_dir, prompt))
    if html is not None:
        console.save_html(str(html))
        console.print(f"written to {html}")


def _print_run(console: Console, run_dir: Path, story: RunStory) -> None:
    fates = story.fates
    dropped = "".join(f", {count:,} dropped ({reason})" for reason, count in fates["dropped"].items())
    console.print(Text(str(run_dir), style="bold"))
    console.print(
        f"{story.prompts:,} prompts drawn: {fates['trained']:,} trained{dropped}, {fates['pending']:,} pending"
    )

    evals = read_rows(run_dir / EVALS)
    if evals:
        table = _table("Evaluations", "after step", "accuracy", "problems", "unscored rollouts")
        for row in evals:
            accuracy = f"{row['accuracy']:.1%}" if "accuracy" in row else "-"
            table.add_row(str(row["step"]), accuracy, _number(row.get("prompts")), _number(row.get("unscored")))
        console.print(table)
    if evaluation_files(run_dir):
        console.print(f"Their responses: rlsys report {run_dir}", soft_wrap=True)
    if story.steps:
        title = f"Steps (the last {_LATEST_STEPS} of {len(story.steps)})"
        table = _table(title, "step", "prompts", "mean score", "sampled by versions")
        for step in story.steps[-_LATEST_STEPS:]:
            table.add_row(str(step["step"]), str(step["prompts"]), _number(step["score_mean"]), _versions(step))
        console.print(table)
    metrics = read_rows(run_dir / METRICS)
    if metrics:
        table = _table(f"Metrics of step {metrics[-1]['step']}", "name", "value")
        for name, value in sorted(metrics[-1].items()):
            if name != "step":
                table.add_row(name, _number(value))
        console.print(table)
    for note in story.notes:
        console.print(Text(_event_line(note)), soft_wrap=True)
    if story.first_prompts:
        console.print(f"\nThe story of one prompt: rlsys inspect {run_dir} {story.first_prompts[0]}", soft_wrap=True)


def _print_story(console: Console, run_dir: Path, story: PromptStory) -> None:
    prompt = story.prompt
    fate = {
        "trained": f"trained at step {prompt['step']}",
        "dropped": f"dropped: {prompt['reason']}",
        "buffered": "complete, waiting for the learner",
        "pending": "pending: drawn, not yet sampled and scored",
    }[prompt["state"]]
    console.print(Text(f"{prompt['id']}: {fate}", style="bold"))
    if story.rollouts:
        console.print(Text(f"prompt: {story.rollouts[0].get('prompt')!r}  answer: {story.rollouts[0].get('answer')!r}"))
    for event in story.events:
        console.print(Text(_event_line(event)), soft_wrap=True)
    if not story.rollouts:
        return
    _print_responses(console, "Rollouts", "sample", story.rollouts)
    if any(row["segments"] for row in story.rollouts):
        _print_segments(console, run_dir, story)


def _print_held_out(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    console.print(Text(f"{rows[0]['prompt_id']}: held out", style="bold"))
    console.print(Text(f"prompt: {rows[0]['prompt']!r}  answer: {rows[0]['answer']!r}"))
    _print_responses(console, "Evaluations", "step", rows)


def _print_responses(console: Console, title: str, key: str, rows: Sequence[Mapping[str, Any]]) -> None:
    table = _table(title, key, "score", "reward", "weights", "finish", "response")
    table.columns[-1].justify = "left"
    for row in rows:
        spans = " ".join(f"{s['version']}[{s['start']}:{s['end']}]" for s in row["version_spans"])
        score = _number(row["score"]) if row["reward_status"] == "ok" else "-"
        reward = row["reward_status"] + (f": {row['reward_detail']}" if row["reward_detail"] else "")
        table.add_row(str(row[key]), score, Text(reward), spans, row["finish_reason"], Text(repr(row["text"])))
    console.print(table)


def _print_segments(console: Console, run_dir: Path, story: PromptStory) -> None:
    """Every response coloured by how much better (green) or worse (red) one stood after each segment than before."""
    decode = _decoder(run_dir)
    table = _table("Segments: values at their ends, by the difference", "sample", "response")
    table.columns[-1].justify = "left"
    for row in story.rollouts:
        line = Text()
        for segment in row["segments"]:
            ids = row["token_ids"][segment["start"] : segment["end"]]
            start, end = segment["start_value"], segment["end_value"]
            known = start is not None and end is not None
            line.append(decode(ids), style=_colour(end - start) if known else "dim")
            line.append(f" {end - start:+.2f} " if known else " ", style="dim")
        table.add_row(str(row["sample"]), line)
    console.print(table)


def _colour(advantage: float) -> str:
    """From white to green, or to red, at a difference of 1."""
    rest = 255 - round(min(1.0, abs(advantage)) * 175)
    red, green = (rest, 255) if advantage > 0 else (255, rest)
    return f"black on rgb({red if advantage else 255},{green if advantage else 255},{rest})"


def _decoder(run_dir: Path) -> Callable[[list[int]], str]:
    """By the tokenizer of the newest checkpoint; the number of tokens where there is none yet."""
    folders = sorted(run_dir.glob("checkpoints/step-*/learner/hf/tokenizer_config.json"))
    if not folders:
        return lambda ids: f"[{len(ids)} tokens]"
    from rlsys.models.loading import load_tokenizer

    tokenizer = load_tokenizer(folders[-1].parent)
    return lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True))


def _event_line(event: Event) -> str:
    at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event.at))
    detail = ", ".join(f"{key} {_plain(value)}" for key, value in event.detail.items())
    return f"{at}  {event.event}{': ' + detail if detail else ''}"


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, list):
        return "[" + ", ".join(map(_plain, value)) + "]"
    if isinstance(value, Mapping):
        return ", ".join(f"{count} {name}" for name, count in value.items())
    return str(value)


def _versions(step: Mapping[str, Any]) -> str:
    low, high = step["min_version"], step["max_version"]
    return str(low) if low == high else f"{low} to {high}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.6g}"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", overflow="fold")
    return table
