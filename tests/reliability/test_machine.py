"""Start, kill, resume, edit, delete, corrupt, a second process, in any order on one run folder.

Whatever happened, the same command ends with the results of an unbroken run, or with a documented
status and an error that says why; and only after damage may it be the latter.
"""

from __future__ import annotations

import random
import shutil

import pytest
from damage import KINDS, damage
from failing import DIED
from harness import DISK, Subject, differences, operations, reported, result
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

STEP = st.tuples(
    st.sampled_from(KINDS), st.floats(0, 1), st.integers(0, 7), st.binary(min_size=1, max_size=20)
)
PICK = st.floats(0, 1, exclude_max=True)


class Folder(RuleBasedStateMachine):
    """One run folder; `hurt`: somebody else than seprune has changed it since it was whole."""

    subject: Subject
    count: int

    @initialize()
    def begin(self):
        self.out = self.subject.home / f"machine-{random.getrandbits(60):x}"
        self.hurt = False

    def files(self) -> list[str]:
        if not self.out.exists():
            return []
        found = (p for p in self.out.rglob("*") if p.is_file() and p.name != "lock")
        return sorted(p.relative_to(self.out).as_posix() for p in found)

    def over(self) -> None:
        """The last resort, which every error that damage leads to can be cured with."""
        shutil.rmtree(self.out)
        self.hurt = False

    @rule()
    def run_to_the_end(self):
        done = self.subject.run(self.out)
        if done.status and self.hurt:
            reported(done, 2, 3)
            self.over()
            return
        assert done.status == 0, done.output
        assert result(self.out) == self.subject.result, differences(
            self.subject.home / "whole", self.out
        )
        if not self.hurt:
            self.subject.readable(self.out)

    @rule(where=PICK, how=st.sampled_from(["exit", "SIGTERM", "SIGINT", *DISK]))
    def break_it(self, where, how):
        """A kill, a signal or a failing disk at one file operation."""
        number = 1 + int(where * self.count)
        fail = {"root": str(self.out), "at": number, "how": how}
        done = self.subject.run(self.out, fail=fail)
        if how == "exit":
            assert done.status in (0, DIED, *((2, 3) if self.hurt else ())), done.output
        elif how.startswith("SIG"):
            number = {"SIGTERM": 143, "SIGINT": 130}[how]
            assert done.status in (0, number, *((2, 3) if self.hurt else ())), done.output
            assert "Traceback" not in done.output
        elif done.status:
            reported(done, 4, *((3,) if how == "EIO" else ()), *((2, 3) if self.hurt else ()))
        if not self.hurt:
            self.subject.readable(self.out)

    @precondition(lambda self: self.files())
    @rule(which=PICK, steps=st.lists(STEP, min_size=1, max_size=3))
    def corrupt(self, which, steps):
        names = self.files()
        path = self.out / names[int(which * len(names))]
        path.write_bytes(damage(path.read_bytes(), steps))
        self.hurt = True

    @precondition(lambda self: self.files())
    @rule(which=PICK)
    def delete(self, which):
        names = self.files()
        (self.out / names[int(which * len(names))]).unlink()
        self.hurt = True

    @precondition(lambda self: any(n.endswith((".json", ".yaml", ".md")) for n in self.files()))
    @rule(which=PICK)
    def edit(self, which):
        """By hand: a line more, or another number."""
        names = [n for n in self.files() if n.endswith((".json", ".yaml", ".md"))]
        path = self.out / names[int(which * len(names))]
        path.write_text(path.read_text(errors="replace").replace("1", "2", 3) + "\n")
        self.hurt = True

    @rule()
    def two_at_once(self):
        pids = [self.subject.start(self.out) for _ in range(2)]
        ended = [self.subject.warm.wait(pid) for pid in pids]
        statuses = sorted(done.status for done in ended)
        if self.hurt and statuses[-1] not in (0, 6):
            self.over()
            return
        assert statuses in ([0, 0], [0, 6]), [done.output for done in ended]
        assert result(self.out) == self.subject.result

    def teardown(self):
        if self.out.exists():
            self.run_to_the_end()
        if self.out.exists():
            shutil.rmtree(self.out)


def play(subject: Subject, examples: int, steps: int) -> None:
    Folder.subject, Folder.count = subject, operations(subject)
    run_state_machine_as_test(
        Folder,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.fault(28)
def test_a_few_histories_of_a_run_folder(tiny_run):
    play(tiny_run, examples=1, steps=4)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.fault(28)
def test_many_histories_of_a_run_folder(tiny_run):
    play(tiny_run, examples=40, steps=10)
