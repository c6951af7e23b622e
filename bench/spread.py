"""Drives an executor through a run: parts in the order of their needs, then pieces; all ends in the driver's run folder."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from bench import work
from bench.executors import LOSSES, Answer, Executor, ExecutorError, Lost, Token, Told
from bench.jobs import Fitted, Job, Ready, together
from bench.making import Making
from bench.partial import write_atomic
from bench.pieces import Pieces
from defenses.api import Part

if TYPE_CHECKING:
    from bench.runner import Run


@dataclass
class Open:
    """Pieces of jobs whose models are fitted: what is to do (number, places of jobs), and how many are being done."""

    pieces: Pieces
    asked: list[work.Asked]
    todo: deque[tuple[int, list[int]]]
    running: int = 0
    trouble: Exception | None = None


@dataclass
class Errand:
    """A task in flight: the part of a key, or a piece for the jobs at some places; and how often its worker was lost."""

    title: str
    key: str = ""
    open: Open | None = None
    number: int = 0
    places: Sequence[int] = ()
    losses: int = 0
    halvings: int = 0


class Spread:
    """Does the jobs of a run by an executor.

    Args:
        run: whose jobs; it turns pieces into records.
        jobs: those to do.
        executor: who does the work.
    """

    def __init__(self, run: Run, jobs: list[Job], executor: Executor) -> None:
        self.run, self.executor = run, executor
        self._tails = run.plan.tails() if run.plan else {}
        folder = run.store.root / run.suite.name / "parts"
        self.making = Making([one for job in jobs for one in job.models()], run.task, folder, self._seconds)
        self.fitted = Fitted(run.task, folder, run.progress, jobs, self.making.store)
        self.batches = sorted(together(jobs), key=self._longest, reverse=True)
        self.again: deque[Errand] = deque()
        self.open: list[Open] = []
        self.flight: dict[int, Errand] = {}
        self.tokens: dict[str, Token] = {}
        self.total = len(jobs)

    def _seconds(self, part: Part) -> float:
        """By the plan, of a part with all that waits for it."""
        return self._tails.get(part.key(self.run.task), 0.0)

    def _longest(self, batch: list[Job]) -> float:
        """By the plan, of all of a batch."""
        return sum(self._tails.get(job.title, 0.0) for job in batch)

    def execute(self) -> None:
        """Do everything; records are stored as they come."""
        self.task, self.test = self.executor.put(self.run.task), self.executor.put(self.run.test)
        with self.run.progress.board(f"{self.total} evaluations on {self.executor.workers}") as self.board:
            while self._advance():
                for number, news in self.executor.events(0.2):
                    if number not in self.flight:  # a late word of a finished task
                        continue
                    if isinstance(news, Told):
                        self._told(self.flight[number], number, news)
                    else:
                        self.board.end(number)
                        self._ended(self.flight.pop(number), news)
        for token in (self.task, self.test, *self.tokens.values()):  # others may go on with the same workers
            self.executor.forget(token)

    def _advance(self) -> bool:
        """Hand over what can be done; whether something is left."""
        self.making.settle()
        while self.executor.room() > 0:
            errand = self._next()
            if errand is not None:
                self._submit(errand)
            elif not self._open_next():
                break
        going = bool(self.flight or self.open or self.again)
        assert going or not self.batches or self.executor.room() <= 0, "parts are made or fail, so every model is settled"
        return going or bool(self.batches)

    def _next(self) -> Errand | None:
        """What was lost, then parts, then pieces of what is open."""
        if self.again:
            return self.again.popleft()
        key = self.making.next()
        if key is not None:
            part = self.making.parts[key]
            return Errand(f"{part.role} {part.member} (seed {part.seed})", key)
        one = next((one for one in self.open if one.todo), None)
        if one is None:
            return None
        number, places = one.todo.popleft()
        one.running += 1
        title = f"{one.pieces.title} {number + 1}/{len(one.pieces.whole)}"
        return Errand(title, open=one, number=number, places=places)

    def _fittable(self, batch: list[Job]) -> bool:
        return all(self.making.models[variant.label, seed].settled for job in batch for variant, seed in job.models())

    def _open_next(self) -> bool:
        """Fit the models of the next batch whose parts are all there; whether there was one."""
        batch = next(filter(self._fittable, self.batches), None)
        if batch is None:
            return False
        self.batches.remove(batch)
        for pieces in self.run.begun(self.run.ready(batch, self.fitted)):
            self._begin(pieces)
        self._count()
        return True

    def _begin(self, pieces: Pieces) -> None:
        todo = deque((number, places) for number in self.run.mine(pieces) if (places := pieces.absent(number)))
        one = Open(pieces, [self._asked(ready) for ready in pieces.ready] if todo else [], todo)
        self.open.append(one)
        self._close(one)

    def _asked(self, ready: Ready) -> work.Asked:
        """A subject for the road."""
        variant, subject = ready.job.variant, ready.subject
        others = {}
        for spec in ready.job.evaluation.others:
            assert subject.other is not None
            others[spec] = self._put(f"{ready.blank.hashes[f'source {spec}']} {spec}", subject.other(spec))
        model = self._put(f"{ready.blank.hashes['weights']} {variant.label}", subject.model)
        return work.Asked(model, variant.defense, subject.sigma, subject.seed, others)

    def _put(self, key: str, value: Any) -> Token:
        """Hand something over, unless it was before."""
        if key not in self.tokens:
            self.tokens[key] = self.executor.put(value)
        return self.tokens[key]

    def _submit(self, errand: Errand) -> None:
        """Begin a task."""
        if errand.open is None:
            checkpoint = self.making.checkpoint(errand.key)
            needs = [self._put(key, self.making.path(key).read_bytes()) for key in self.making.needs(errand.key)]
            content = checkpoint.read_bytes() if checkpoint.exists() else None
            number = self.executor.submit(work.make_part, self.task, self.making.parts[errand.key], needs, content)
        else:
            pieces = errand.open.pieces
            piece, asked = pieces.whole[errand.number], [errand.open.asked[place] for place in errand.places]
            most = max(1, _images(errand) >> errand.halvings) if errand.halvings else None
            number = self.executor.submit(work.measure, self.task, self.test, pieces.evaluation, asked, piece, most)
        self.flight[number] = errand
        self.board.begin(number, errand.title)

    def _told(self, errand: Errand, number: int, news: Told) -> None:
        if news.checkpoint is None:
            self.board.report(number, news.done, news.total, news.facts)
        else:
            write_atomic(self.making.checkpoint(errand.key), news.checkpoint)

    def _ended(self, errand: Errand, answer: Answer) -> None:
        """Keep what a task brought, try it again, or note that it failed."""
        error = answer.error
        if isinstance(error, ExecutorError):
            raise error
        if isinstance(error, Lost):
            losses = errand.losses + (not error.memory)
            # A kernel that kills for memory does not say so: the second time, too, less is asked.
            halve = (error.memory or errand.losses > 0) and _images(errand) >> errand.halvings > 1
            if losses <= LOSSES and (halve or not error.memory):
                self.run.progress.say(f"{errand.title}: {error}; it is tried again" + (" in halves" if halve else ""))
                self.again.append(replace(errand, losses=losses, halvings=errand.halvings + halve))
                return
            error = RuntimeError(f"{errand.title}: given up, its worker was lost again and again: {error}")
        if errand.open is not None:
            self._piece_ended(errand, errand.open, answer.value, error)
        elif error is None:
            self.making.keep(errand.key, *answer.value)
        else:
            self.making.fail(errand.key, error)

    def _piece_ended(self, errand: Errand, one: Open, tables: list[bytes], error: Exception | None) -> None:
        one.running -= 1
        if error is None:
            one.pieces.keep(errand.number, errand.places, tables)
        else:
            one.trouble = one.trouble or error
            one.todo.clear()
        self._close(one)

    def _close(self, one: Open) -> None:
        """Turn pieces into records when the last is there; what failed together is done by each alone."""
        if one.todo or one.running:
            return
        self.open.remove(one)
        if one.trouble is None:
            self.run.conclude(one.pieces)
        else:
            for pieces in self.run.alone(one.pieces.ready, one.trouble):
                self._begin(pieces)
        self._count()
        used = {token for one in self.open for own in one.asked for token in (own.model, *own.others.values())}
        wanted = self.making.wanted()
        for key in [key for key, token in self.tokens.items() if token not in used and key not in wanted]:
            self.executor.forget(self.tokens.pop(key))

    def _count(self) -> None:
        left = sum(len(batch) for batch in self.batches) + sum(len(one.pieces.ready) for one in self.open)
        self.board.count(self.total - left, self.total)


def _images(errand: Errand) -> int:
    """How many images a task may be divided into; 1 if it cannot be."""
    if errand.open is None or not errand.open.pieces.evaluation.divides:
        return 1
    rows = errand.open.pieces.whole[errand.number].rows
    return int(rows.stop - rows.start)
