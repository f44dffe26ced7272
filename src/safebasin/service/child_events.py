"""What the child of a job says, in its event file: copied to the job's events in the table, in the customer's words."""

import json
from pathlib import Path
from typing import Any

from sqlalchemy import update
from sqlmodel import Session, col, select

from safebasin.console import printable
from safebasin.service.store import Job, Store, add_event

EVENTS = 2000  # of a job, in the table; all of them are in its event file
LOSSES = 100  # of an arm, in the table
BLOCK = 1 << 20  # bytes of the file that are read at a time


def copy_events(store: Store, name: str, folder: Path) -> bool:
    """Copy complete new lines of a child's event file into the table; whether there may be more."""
    if not (path := folder / "events.jsonl").is_file():
        return False
    with store.session() as session:
        position, count = session.exec(select(Job.position, Job.events).where(Job.id == name)).one()
        with path.open("rb") as file:
            file.seek(position)
            block = file.read(BLOCK)
        lines = block[: block.rfind(b"\n") + 1] or (block if len(block) == BLOCK else b"")
        if not lines:
            return False
        for line in lines.splitlines():
            count += _add(session, name, line, count)
        session.execute(update(Job).where(col(Job.id) == name).values(position=position + len(lines)))
    return len(block) == BLOCK


def _add(session: Session, name: str, line: bytes, count: int) -> bool:
    """One event of a child as one of the job; whether it became one."""
    try:
        event = json.loads(line)
        created = float(event["time"])
    except (ValueError, LookupError, TypeError, RecursionError):
        return False  # broken off by a kill
    shown = _shown(event)
    if shown is None or count >= EVENTS:
        return False
    text, metrics = shown
    add_event(session, name, text, kind="metrics" if metrics else "message", data=metrics or None, created=created)
    return True


def end_of(folder: Path) -> tuple[int | None, str]:
    """The exit code and the message of a child, as the last line of its events says; no code where it was killed.

    Lines of earlier starts do not count: the file's size at the last start stands beside it.
    """
    path, offset = folder / "events.jsonl", folder / "offset"
    if not path.is_file() or not offset.is_file():
        return None, "the process vanished"
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(int(offset.read_text() or 0), size - (1 << 16)))
        last = file.read().rstrip(b"\n").rpartition(b"\n")[2]
    try:
        event = json.loads(last)
        return (int(event["code"]) if event["event"] == "end" else None), str(event.get("message", ""))
    except (ValueError, LookupError, TypeError, RecursionError):
        return None, "the process vanished"


def _shown(event: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """An event of a run in the customer's words, with its numbers; None where it says nothing to her."""
    match event:
        case {"event": "step", "step": str(step), "state": "started"}:
            return f"Step {printable(step, 60)} has started.", {}
        case {"event": "progress", "title": str(title), "done": int(done), "total": int(total)}:
            return f"{printable(title, 60)}: {done} of {total}", {"done": done, "total": total}
        case {
            "event": "loss",
            "arm": str(arm),
            "step": int(step),
            "total": int(total),
            "loss": int() | float() as loss,
        }:
            if step % max(1, total // LOSSES) and step != total:
                return None
            text = f"Step {step}/{total}: training loss={loss:.2f}"
            return text, {"step": step, "total_steps": total, "train_loss": loss, "arm": printable(arm, 60)}
        case {"event": "round", "arm": str(arm), "outcome": str(outcome), "rows": int(rows)}:
            return f"Search, {printable(arm, 60)}: {rows} rows: {printable(outcome, 60)}", {}
    return None
