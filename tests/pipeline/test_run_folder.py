"""Run folders under real processes, real signals and real limits."""

import json
import os
import platform
import resource
import signal
import subprocess
import sys
import textwrap
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from seprune.data.loaders import PART, in_threads
from seprune.errors import EnvironmentFault, InputError, StoppedError, UsageError
from seprune.graph.trace import record
from seprune.pipeline.journal import stage_key
from seprune.pipeline.run_folder import RunFolder, open_run, verify
from seprune.runtime.environment import environment
from seprune.runtime.files import write_sums, write_text
from seprune.runtime.interrupts import interrupts, safe_point, unbroken
from seprune.runtime.progress import silent
from seprune.runtime.transaction import RECORD, UNFINISHED

RECIPE = "name: a\nplan:\n  macs: [0.5]\n  floor: 0.1\ndata:\n  workers: 2\n"
PREAMBLE = """
import os, signal, sys, time
from pathlib import Path
from seprune.errors import SepruneError, StoppedError
from seprune.runtime.files import write_text
from seprune.pipeline.run_folder import open_run
from seprune.runtime.interrupts import interrupts, safe_point, unbroken
out = Path(sys.argv[1])
RECIPE = sys.argv[2]
def main():
{body}
try:
    main()
except (SepruneError, StoppedError) as error:
    print(error, flush=True)
    sys.exit(error.exit_status)
"""


def start(out: Path, body: str, **kwargs) -> subprocess.Popen:
    script = PREAMBLE.format(body=textwrap.indent(textwrap.dedent(body), "    "))
    command = [sys.executable, "-c", script, str(out), RECIPE]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **kwargs)


def finish(process: subprocess.Popen, stdin: str = "") -> str:
    """The rest of the output. (`communicate` would lose what `readline` has buffered.)"""
    if process.stdin:
        process.stdin.write(stdin)
        process.stdin.close()
    with process.stdout as stream:
        output = stream.read()
    process.wait(timeout=60)
    return output


def write_stage(run: RunFolder, stage: str, key: str = "k") -> None:
    write_text(run.path / f"{stage}.txt", f"content of {stage}\n")
    run.commit(stage, key, files=[f"{stage}.txt"], facts={"top1": 0.5})


# The journal


def test_a_committed_stage_is_found_again_with_its_facts(tmp_path):
    with open_run(tmp_path, RECIPE) as run:
        write_stage(run, "plan", stage_key(macs=0.5))
    with open_run(tmp_path, RECIPE) as run:
        record = run.committed("plan", stage_key(macs=0.5))
        assert record.facts == {"top1": 0.5}
        assert list(record.files) == ["plan.txt"]
        assert run.committed("plan", stage_key(macs=0.4)) is None
        assert run.committed("prune", stage_key(macs=0.5)) is None
    assert (tmp_path / "recipe.yaml").read_text() == RECIPE
    assert json.loads((tmp_path / "environment.json").read_text())["packages"]["torch"]
    assert not (tmp_path / "lock.json").exists()


def test_stage_keys_depend_on_values_and_not_on_order():
    assert stage_key(a=1, b={"x": 1, "y": 2}) == stage_key(b={"y": 2, "x": 1}, a=1)
    assert stage_key(a=1) != stage_key(a=2)
    with pytest.raises(ValueError, match="not JSON compliant"):
        stage_key(a=float("nan"))


@pytest.mark.parametrize("damage", ["flip", "delete"])
def test_a_stage_whose_file_changed_no_longer_counts(tmp_path, damage):
    with open_run(tmp_path, RECIPE) as run:
        write_stage(run, "plan")
        write_stage(run, "prune")
        path = tmp_path / "plan.txt"
        if damage == "delete":
            path.unlink()
        else:
            path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
        assert run.committed("plan", "k") is None
        assert run.committed("prune", "k") is not None
    state = {"flip": "changed", "delete": "missing"}[damage]
    assert verify(tmp_path) == [f"plan.txt: {state} since stage plan was committed"]


def test_a_torn_last_line_is_dropped_and_does_not_swallow_the_next(tmp_path):
    with open_run(tmp_path, RECIPE) as run:
        write_stage(run, "plan")
        write_stage(run, "prune")
    journal = tmp_path / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-20])
    assert verify(tmp_path) == []
    with open_run(tmp_path, RECIPE) as run:
        assert run.committed("plan", "k")
        assert run.committed("prune", "k") is None
        write_stage(run, "prune")
        assert run.committed("prune", "k")
    assert [r.stage for r in RunFolder(tmp_path).records()] == ["start", "plan", "prune"]


def test_every_flipped_byte_of_a_journal_line_is_noticed(tmp_path):
    with open_run(tmp_path, RECIPE) as run:
        write_stage(run, "plan")
        write_stage(run, "prune")
    journal = tmp_path / "journal.jsonl"
    whole = journal.read_bytes()
    begin = whole.index(b"\n") + 1  # after the line that says whose folder it is
    for position in range(begin, whole.index(b"\n", begin), 3):
        journal.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        reread = RunFolder(tmp_path)
        assert reread.committed("plan", "k") is None
        assert reread.committed("prune", "k") is not None
        assert verify(tmp_path) == ["journal.jsonl: line 2 is damaged"]


def test_a_folder_of_a_newer_version_is_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("seprune.pipeline.journal.FORMAT", 7)
        with open_run(tmp_path, RECIPE) as run:
            write_stage(run, "plan")
    with pytest.raises(InputError) as caught, open_run(tmp_path, RECIPE):
        pass
    assert str(caught.value) == (
        f"{tmp_path}: written by a newer seprune\n"
        "why: its journal has format 7, this version reads up to 1\n"
        "next: pip install --upgrade seprune, or choose another --out"
    )
    assert (caught.value.exit_status, caught.value.code) == (3, "newer")


def test_another_recipe_is_refused_with_the_keys_that_differ(tmp_path):
    with open_run(tmp_path, RECIPE) as run:
        write_stage(run, "plan")
    other = RECIPE.replace("[0.5]", "[0.3]").replace("  floor: 0.1\n", "  steps: 2\n")
    with pytest.raises(UsageError) as caught, open_run(tmp_path, other):
        pass
    assert str(caught.value) == (
        f"{tmp_path}: started with another recipe\n"
        "why: it differs in plan.macs (was [0.5], now [0.3]), "
        "plan.floor (was 0.1, now absent), plan.steps (was absent, now 2)\n"
        "next: choose another --out, or go on with the same recipe"
    )
    assert (caught.value.exit_status, caught.value.code) == (2, "run-recipe")
    assert (tmp_path / "recipe.yaml").read_text() == RECIPE
    assert not (tmp_path / "lock.json").exists()


def test_keys_that_change_no_result_may_differ_and_so_may_all_before_the_first_commit(tmp_path):
    with open_run(tmp_path, RECIPE.replace("0.5", "0.7")):
        pass
    with open_run(tmp_path, RECIPE) as run:
        write_stage(run, "plan")
    with open_run(tmp_path, RECIPE.replace("workers: 2", "workers: 0")) as run:
        assert run.committed("plan", "k")


def test_out_must_be_a_writable_folder(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match=r"file: not a folder\nwhy: .*\nnext: .*--out"):
        open_run(tmp_path / "file", RECIPE).__enter__()
    with pytest.raises(EnvironmentFault, match=r"cannot be written\nwhy: .+\nnext: .*--out"):
        open_run(Path("/proc/nothing"), RECIPE).__enter__()
    with pytest.raises(EnvironmentFault, match="Not a directory"):
        open_run(tmp_path / "file" / "below", RECIPE).__enter__()


def test_paths_with_spaces_and_letters_from_everywhere(tmp_path):
    with open_run(tmp_path / "mein Lauf ü 漢", RECIPE) as run:
        write_stage(run, "größe")
        assert run.committed("größe", "k")
    assert verify(run.path) == []


# Verifying


def test_verify_reads_no_record_that_a_killed_writer_has_begun(tmp_path):
    (tmp_path / "journal.jsonl").write_text("")
    begun = tmp_path / "trained" / "state" / f".x{UNFINISHED}"
    begun.mkdir(parents=True)
    (begun / RECORD).write_text('{"a": ".x')
    assert verify(tmp_path) == []


def test_verify_checks_saved_folders_inside_a_run(tmp_path):
    with open_run(tmp_path, RECIPE) as run:
        write_text(tmp_path / "pruned" / "0.5" / "config.json", "{}")
        write_sums(tmp_path / "pruned" / "0.5")
        run.commit("prune", "k", files=["pruned/0.5/config.json"], facts={})
    assert verify(tmp_path) == []
    (tmp_path / "pruned/0.5/config.json").write_text("{ }")
    assert verify(tmp_path) == [
        "pruned/0.5/config.json: changed since stage prune was committed",
        "pruned/0.5/config.json: missing or not what SHA256SUMS says",
    ]
    assert verify(tmp_path / "pruned" / "0.5") == [
        "config.json: missing or not what SHA256SUMS says"
    ]


def test_verify_refuses_a_folder_that_seprune_did_not_write(tmp_path):
    with pytest.raises(InputError) as caught:
        verify(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: nothing to verify\n"
        "why: it holds neither journal.jsonl nor SHA256SUMS\n"
        "next: name a run folder or a folder that seprune saved a model in"
    )


def test_a_stage_done_again_is_verified_by_its_last_record(tmp_path):
    with open_run(tmp_path, RECIPE) as run:
        write_stage(run, "plan")
        write_text(tmp_path / "plan.txt", "new")
        run.commit("plan", "other", files=["plan.txt"], facts={})
    assert verify(tmp_path) == []


# The lock


def test_a_second_process_exits_6_and_names_the_holder(tmp_path):
    with open_run(tmp_path, RECIPE):
        since = json.loads((tmp_path / "lock.json").read_text())["since"]
        second = start(tmp_path, "with open_run(out, RECIPE): pass")
        output = finish(second)
    assert second.returncode == 6
    assert output == (
        f"{tmp_path}: another run works here\n"
        f"why: it is held by process {os.getpid()} on {platform.node()} since {since}\n"
        "next: wait until it ends, or choose another --out; a lock never outlives its process\n"
    )


@pytest.mark.slow
def test_of_eight_processes_one_works_and_seven_exit_6(tmp_path):
    body = """
    with open_run(out, RECIPE) as run:
        print("working", os.getpid(), flush=True)
        sys.stdin.read()
        write_text(out / "a.txt", "a")
        run.commit("a", "k", files=["a.txt"], facts={})
    """
    started = [start(tmp_path, body, stdin=subprocess.PIPE) for _ in range(8)]
    lines = {p.pid: p.stdout.readline() for p in started}
    (winner,) = [p for p in started if lines[p.pid].startswith("working")]
    losers = [p for p in started if p is not winner]
    for process in losers:
        assert f"held by process {winner.pid} on" in finish(process)
        assert process.returncode == 6
    finish(winner)
    assert winner.returncode == 0
    assert verify(tmp_path) == []
    assert RunFolder(tmp_path).committed("a", "k")


def test_a_killed_holder_leaves_no_lock_even_if_its_worker_lives_on(tmp_path):
    body = """
    with open_run(out, RECIPE) as run:
        if os.fork() == 0:
            print("forked", flush=True)
            time.sleep(60)
            os._exit(9)
        time.sleep(60)
    """
    holder = start(tmp_path, body, start_new_session=True)
    try:
        assert holder.stdout.readline() == "forked\n"
        holder.kill()
        holder.wait(timeout=60)
        assert (tmp_path / "lock.json").exists()
        with open_run(tmp_path, RECIPE) as run:
            assert {record.stage for record in run.records()} == {"start"}
    finally:
        os.killpg(holder.pid, signal.SIGKILL)
        holder.stdout.close()


def test_kill_9_at_any_moment_keeps_every_committed_stage(tmp_path):
    body = """
    with open_run(out, RECIPE) as run:
        for i in range(1000):
            write_text(out / f"{i}.txt", str(i) * 1000)
            run.commit(f"stage{i}", "k", files=[f"{i}.txt"], facts={"i": i})
            print(i, flush=True)
    """
    for wanted in (0, 1, 3, 8):
        process = start(tmp_path, body)
        number = -1
        while number < wanted:
            number = int(process.stdout.readline())
        process.kill()
        finish(process)
        with open_run(tmp_path, RECIPE) as run:
            assert all(run.committed(f"stage{i}", "k") for i in range(number + 1))
        assert verify(tmp_path) == []


def test_a_full_disk_stops_with_status_4_and_keeps_what_was_there(tmp_path):
    """A file-size limit in a child: the kernel refuses the write, as a full disk does."""
    with open_run(tmp_path, RECIPE) as run:
        write_stage(run, "plan")
    before = (tmp_path / "plan.txt").read_bytes()
    body = """
    import resource
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with open_run(out, RECIPE) as run:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        write_text(out / "plan.txt", "x" * 5000)
    """
    process = start(tmp_path, body)
    output = finish(process)
    assert process.returncode == 4
    assert output.startswith(f"{tmp_path}/plan.txt: cannot be written\nwhy: File too large\nnext: ")
    assert (tmp_path / "plan.txt").read_bytes() == before
    assert not list(tmp_path.glob(".*.part"))
    assert verify(tmp_path) == []
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 2000


# Signals


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_during_a_commit_lets_it_finish(tmp_path, signum, status):
    body = f"""
    with interrupts("seprune run a.yaml --out b"), open_run(out, RECIPE) as run:
        with unbroken():
            os.kill(os.getpid(), {int(signum)})
            write_text(out / "a.txt", "a")
            run.commit("a", "k", files=["a.txt"], facts={{}})
        print("not reached")
    """
    process = start(tmp_path, body)
    output = finish(process)
    assert output == (
        f"stopped by {signum.name}; every finished stage is saved\n"
        "why: somebody or something asked for it: Ctrl-C, kill, a scheduler\n"
        "next: go on with: seprune run a.yaml --out b\n"
    )
    assert process.returncode == status
    with open_run(tmp_path, RECIPE) as run:
        assert run.committed("a", "k")


def test_sigterm_from_outside_while_writing_leaves_whole_files(tmp_path):
    body = """
    with interrupts(), open_run(out, RECIPE) as run:
        while True:
            with unbroken():
                write_text(out / "a.txt", str(time.time()) * 10000)
                run.commit("a", "k", files=["a.txt"], facts={})
            print("writing", flush=True)
    """
    for _ in range(3):
        process = start(tmp_path, body)
        assert process.stdout.readline() == "writing\n"
        process.terminate()
        output = finish(process)
        assert process.returncode == 143
        assert "stopped by SIGTERM" in output
        assert verify(tmp_path) == []
        assert not list(tmp_path.glob(".*.part"))


def test_a_second_signal_stops_at_once_even_where_the_first_had_to_wait():
    reached = []

    def stubborn():
        with interrupts("again"), unbroken():
            os.kill(os.getpid(), signal.SIGINT)
            reached.append("after the first")
            os.kill(os.getpid(), signal.SIGINT)
            reached.append("after the second")

    with pytest.raises(StoppedError, match="stopped by SIGINT"):
        stubborn()
    assert reached == ["after the first"]


@pytest.mark.fault(29)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_stop_that_a_destructor_swallows_comes_again_at_the_next_safe_point():
    """Python drops what is raised in `__del__` and in callbacks of the garbage collector."""

    class Dying:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)
            sum(range(1000))  # the handler runs in here

    def long_loop():
        with interrupts("again"):
            Dying()
            safe_point()
            pytest.fail("went on")

    with pytest.raises(StoppedError):
        long_loop()


@pytest.mark.fault(29)
def test_an_error_that_a_library_makes_of_a_stop_is_the_stop(tmp_path):
    def library():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            sum(range(1000))  # the handler runs in here
        except StoppedError:
            raise ValueError("could not determine the shape of object") from None

    with pytest.raises(StoppedError, match="stopped by SIGTERM"), interrupts("again"):
        library()


@pytest.mark.fault(29)
def test_nothing_is_committed_after_a_stop_that_a_library_swallowed(tmp_path):
    def stage():
        with interrupts("again"), open_run(tmp_path, RECIPE) as run:
            with suppress(StoppedError):
                os.kill(os.getpid(), signal.SIGTERM)
                sum(range(1000))
            write_stage(run, "plan")

    with pytest.raises(StoppedError):
        stage()
    assert [record.stage for record in RunFolder(tmp_path).records()] == ["start"]


@pytest.mark.fault(29)
def test_a_stop_is_no_fault_of_a_strangers_forward():
    """What tries a model out and catches whatever that raises must not catch a signal."""

    class Signalled(torch.nn.Module):
        def forward(self, images):
            os.kill(os.getpid(), signal.SIGTERM)
            return images

    with pytest.raises(StoppedError), interrupts("again"):
        record(Signalled(), torch.zeros(1, 3, 4, 4))


def test_a_stage_may_save_its_state_after_the_signal_and_is_not_stopped_twice():
    saved = []

    def stage():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            safe_point()
        except StoppedError:
            with unbroken():
                saved.append("model")
            with unbroken():
                saved.append("optimizer")
            raise

    with pytest.raises(StoppedError) as caught, interrupts("again"):
        stage()
    assert saved == ["model", "optimizer"]
    assert caught.value.exit_status == 143


def test_handlers_are_put_back_and_ignored_signals_stay_ignored():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with interrupts("again"), interrupts("nested"):
        assert signal.getsignal(signal.SIGTERM) not in before
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with interrupts("again"):
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before[1])
    safe_point()


def test_forked_workers_do_not_inherit_the_handling(tmp_path):
    body = """
    reading, writing = os.pipe()
    with interrupts("again"):
        worker = os.fork()
        if worker == 0:
            os.write(writing, b"x")
            time.sleep(60)
            os._exit(9)
        os.read(reading, 1)  # a signal that comes before Python has finished the fork is lost
        os.kill(worker, signal.SIGTERM)
        print(os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]))
    """
    output = finish(start(tmp_path, body, start_new_session=True))
    assert output == "-15\n"


# The environment


def test_environment_without_devices_does_not_import_torch():
    script = (
        "import sys, seprune.runtime.environment as r; r.environment(devices=False); "
        "print('torch' in sys.modules)"
    )
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert output.stdout == "False\n"


def test_environment_names_versions_extras_devices_and_the_pair(tmp_path):
    facts = environment(tmp_path)
    assert facts["packages"]["torch"].startswith("2.")
    assert facts["pair"]["fits"] is True
    assert facts["devices"][0]["device"] == "cpu"
    assert facts["disk_free"] > 0
    for name, extra in facts["extras"].items():
        line = None if extra["present"] else f"pip install 'seprune[{name}]'"
        assert extra["install"] == line
    json.dumps(facts, allow_nan=False)


@pytest.mark.slow
def test_environment_says_what_to_type_for_a_pair_that_does_not_fit(tmp_path, monkeypatch):
    (tmp_path / "torchvision").mkdir()
    reason = "operator torchvision::nms does not exist"
    (tmp_path / "torchvision" / "__init__.py").write_text(f"raise RuntimeError({reason!r})\n")
    script = (
        "import json, seprune.runtime.environment as r; print(json.dumps(r.environment()['pair']))"
    )
    output = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{os.getcwd()}"},
        capture_output=True,
        text=True,
    )
    pair = json.loads(output.stdout)
    assert (pair["fits"], pair["reason"]) == (False, reason)
    assert pair["install"] == "pip install --upgrade --force-reinstall torch torchvision"


@pytest.mark.fault(29)
def test_a_signal_while_threads_work_waits_for_their_part():
    done = []

    def work(row: int) -> None:
        if row == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        done.append(row)

    with pytest.raises(StoppedError, match="stopped by SIGTERM"), interrupts("again"):
        in_threads(work, 3 * PART, label="working", track=silent)
    assert sorted(done) == list(range(PART))


def test_what_a_killed_writer_left_half_done_is_not_verified(tmp_path: Path):
    out = tmp_path / "run"
    write_text(out / "a.txt", "a")
    write_sums(out)
    staged = out / ".abc.seprune.part"
    staged.mkdir()
    (staged / "state-000001.sha256").write_text(f"{'0' * 64}  state-000001.safetensors\n")
    assert verify(out) == []
    (out / "a.txt").write_text("b")
    assert verify(out) == ["a.txt: missing or not what SHA256SUMS says"]
