"""Who submitted which results: a small file beside a variant's budgets, ``<suite>/<variant>/submission.json``.

It says what the submitter was asked for, when, and the hash of every file that came with it. :meth:`bench.store.Store.records`
looks into the folders of seeds and so passes over it. All its text is somebody else's: escape it where it is shown.
"""

from __future__ import annotations

import hashlib
import re
from datetime import date
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, ValidationError

from bench.store import Store, Strict

FILE = "submission.json"

ASKED = {
    "name": "what the board calls it, e.g. the method's name",
    "paper": "address of the paper, or none",
    "code": "address of the code, or none",
    "contact": "an e-mail address or a page to reach you; everybody will see it",
}
"""What a submitter is asked for, and what for."""

LONGEST = {"name": 80, "paper": 300, "code": 300, "contact": 200}
"""Characters of an answer, at most."""


def checked(field: str, text: str) -> str:
    """An answer without blanks around it.

    Raises:
        ValueError: if it is empty, too long, no address where one is asked for, or has characters that cannot be seen.
    """
    text = text.strip()
    if not 1 <= len(text) <= LONGEST[field]:
        raise ValueError(f"--{field}: 1 to {LONGEST[field]} characters, got {len(text)}")
    if not text.isprintable():  # control characters, line ends, and what turns the direction of writing round
        raise ValueError(f"--{field}: characters that cannot be seen are not allowed, got {text!r}")
    if field in ("paper", "code") and text != "none" and not _address(text):
        raise ValueError(f"--{field}: an address that begins with https:// or http://, or none, got {text!r}")
    if field == "contact" and not _address(text) and not re.fullmatch(r"[^@\s]+@[^@\s]+\.[^@\s.]+", text):
        raise ValueError(f"--{field}: an e-mail address, or one that begins with https:// or http://, got {text!r}")
    return text


def _address(text: str) -> bool:
    try:
        parts = urlsplit(text)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and "." in (parts.hostname or "") and not re.search(r"[\s\"'<>@\\]", text)


def _inside(files: dict[str, str]) -> dict[str, str]:
    """Paths BUDGET/SEED/FILE, so that no other file is ever looked at."""
    for name in files:
        if len(PurePosixPath(name).parts) != 3 or PurePosixPath(name).is_absolute() or ".." in name:
            raise ValueError(f"files are BUDGET/SEED/FILE, got {name!r}")
    return files


class Answers(Strict):
    """What a submitter says: see :data:`ASKED`; an address that there is not is "none"."""

    name: Annotated[str, AfterValidator(lambda text: checked("name", text))]
    paper: Annotated[str, AfterValidator(lambda text: checked("paper", text))]
    code: Annotated[str, AfterValidator(lambda text: checked("code", text))]
    contact: Annotated[str, AfterValidator(lambda text: checked("contact", text))]


class Submission(Strict):
    """What a submission file says.

    Attributes:
        suite, variant: whose records they are, as the records call them.
        answers: what the submitter says.
        date: of the last addition.
        files: hash of every file that came with it, by its path from the variant's folder.
    """

    format: Literal[1] = 1
    suite: str
    variant: str
    answers: Answers
    date: date
    files: Annotated[dict[str, str], AfterValidator(_inside)]


def submissions(store: Store, problems: list[str] | None = None) -> dict[tuple[str, str], Submission]:
    """The submissions of a store by (suite, variant); ``problems`` are told of files that are not what was submitted."""
    found: dict[tuple[str, str], Submission] = {}
    wrong: list[str] = []
    for path in sorted(store.root.glob(f"*/*/{FILE}")):
        try:
            own = read(path)
        except ValueError as error:
            wrong.append(str(error))
            continue
        found[own.suite, own.variant] = own
        changed = [name for name, value in own.files.items() if hashed(path.parent / name) != value]
        if changed:
            wrong.append(f"{path}: {len(changed)} files are not as they were submitted: {', '.join(sorted(changed)[:3])}")
    if problems is not None:
        problems += wrong
    return found


def read(path: Path) -> Submission:
    """Read a submission file.

    Raises:
        ValueError: if it is none, or lies elsewhere than it says.
    """
    try:
        own = Submission.model_validate_json(path.read_bytes())
    except (ValidationError, ValueError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{path} is no submission ({where}: {first['msg']})"[:500]) from error
    if path.parts[-3:] != (own.suite, own.variant.replace("/", "_"), FILE):
        raise ValueError(f"{path} says that it is of {own.variant!r} in {own.suite!r}"[:500])
    return own


def hashed(path: Path) -> str:
    """sha256 of a file; empty if there is none."""
    return f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}" if path.is_file() else ""
