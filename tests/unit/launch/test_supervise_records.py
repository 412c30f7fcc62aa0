"""Files of the supervisor: retry budget, nodes to avoid, lease; and where ranks meet."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megamem.errors import LaunchError
from megamem_launch import rundir
from megamem_launch.supervise import exclusion, lease, rendezvous
from megamem_launch.supervise.budget import checkpoint_step, fruitless_starts, is_followed
from megamem_launch.supervise.findings import read_findings
from megamem_launch.supervise.incarnation import Incarnation, record_end, record_start
from megamem_launch.supervise.preflight import MARK, Arguments, examine


def starts(run: Path, *entries: tuple[str, int, str | None, int]) -> None:
    """Entries are job, step at the start, outcome (None: no end was written) and step at the end."""
    already = len(rundir.read_lines(rundir.incarnations_file(run)))
    for attempt, (job, step, outcome, after) in enumerate(entries, start=already):
        incarnation = Incarnation(job, 0, attempt)
        record_start(run, incarnation, nodes=["n"], step=step)
        if outcome is not None:
            record_end(run, incarnation, outcome=outcome, reason="r", step=after, bad_nodes={}, stragglers=None)


def test_only_starts_without_a_newer_checkpoint_count(tmp_path: Path) -> None:
    assert fruitless_starts(tmp_path, "7", 0) == 0
    starts(tmp_path, ("7", 0, "crash", 0), ("7", 0, "hang", 0))
    assert fruitless_starts(tmp_path, "7", 0) == 2
    starts(tmp_path, ("7", 0, "preempted", 0))
    assert fruitless_starts(tmp_path, "7", 0) == 2
    starts(tmp_path, ("7", 0, "crash", 10))
    assert fruitless_starts(tmp_path, "7", 10) == 0


def test_a_start_without_an_end_counts_by_what_is_there_now(tmp_path: Path) -> None:
    starts(tmp_path, ("7", 0, None, 0), ("7", 0, None, 0))
    assert fruitless_starts(tmp_path, "7", 0) == 2
    assert fruitless_starts(tmp_path, "7", 5) == 0


def test_a_chain_shares_its_budget_and_a_new_submission_has_its_own(tmp_path: Path) -> None:
    for number, after in (("7", ""), ("8", "7"), ("9", "8"), ("10", "")):
        rundir.append_json(rundir.jobs_file(tmp_path), {"job_id": number, "after": after})
    starts(tmp_path, ("7", 0, "crash", 0), ("8", 0, "crash", 0))
    assert [fruitless_starts(tmp_path, job, 0) for job in ("7", "9", "10", "local-3")] == [2, 2, 0, 0]
    assert [is_followed(tmp_path, job) for job in ("7", "8", "9", "10")] == [True, True, False, False]


def test_a_checkpoint_that_is_not_whole_is_no_progress(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step_00000005").mkdir(parents=True)
    assert checkpoint_step(tmp_path) == 0


def test_nodes_are_avoided_until_too_few_are_left(tmp_path: Path) -> None:
    for node in ("a", "b", "c"):
        exclusion.exclude(tmp_path, {node: f"{node} broke"}, "7.0.0")
        time.sleep(0.002)
    assert list(exclusion.excluded(tmp_path)) == ["a", "b", "c"]
    assert exclusion.fit(tmp_path, ["a", "b", "d", "e"], 2) == []
    assert exclusion.fit(tmp_path, ["a", "b", "d"], 2) == ["a"]
    assert exclusion.excluded(tmp_path) == {"b": "b broke", "c": "c broke"}
    assert exclusion.fit(tmp_path, ["d"], 2) == ["b", "c"]
    assert exclusion.excluded(tmp_path) == {}


def test_the_lease_passes_to_later_incarnations_of_the_job_and_never_back(tmp_path: Path) -> None:
    old, new = Incarnation("7", 0, 1), Incarnation("7", 1, 0)
    lease.take(tmp_path, old, lambda job: True)
    lease.take(tmp_path, new, lambda job: True)
    assert lease.is_held(tmp_path, new) and not lease.is_held(tmp_path, old)
    with pytest.raises(LaunchError, match=r"incarnation 7\.1\.0 on .* is writing"):
        lease.take(tmp_path, old, lambda job: True, patience=0.0)


def test_the_lease_of_another_job_is_taken_only_when_that_job_is_over(tmp_path: Path) -> None:
    lease.take(tmp_path, Incarnation("7", 0, 0), lambda job: True)
    with pytest.raises(LaunchError, match="give this run another name"):
        lease.take(tmp_path, Incarnation("8", 0, 0), lambda job: job == "7", patience=0.0)
    lease.take(tmp_path, Incarnation("8", 0, 0), lambda job: False)
    # Nobody can be asked: heartbeats decide.
    beat = rundir.live_dir(tmp_path, "8.0.0") / "rank-00000.json"
    rundir.write_json(beat, {})
    with pytest.raises(LaunchError):
        lease.take(tmp_path, Incarnation("9", 0, 0), lambda job: None, patience=0.0)
    os.utime(beat, (time.time() - 120, time.time() - 120))
    with pytest.raises(LaunchError):  # which it took just now: the beat may be of an earlier attempt
        lease.take(tmp_path, Incarnation("9", 0, 0), lambda job: None, patience=0.0)
    held = rundir.read_json(rundir.lease_file(tmp_path)) or {}
    rundir.write_json(rundir.lease_file(tmp_path), {**held, "time": time.time() - 120})
    lease.take(tmp_path, Incarnation("9", 0, 0), lambda job: None)


def test_the_lease_of_a_process_here_ends_with_it(tmp_path: Path) -> None:
    code = (
        "import os, sys, time; from pathlib import Path; from megamem_launch.supervise import lease;"
        "from megamem_launch.supervise.incarnation import Incarnation as I;"
        "lease.take(Path(sys.argv[1]), I(f'local-{os.getpid()}', 0, 0), lambda j: None); print(flush=True); time.sleep(60)"
    )
    mine = Incarnation(f"local-{os.getpid()}", 0, 0)
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline()
        with pytest.raises(LaunchError, match=f"local-{other.pid}"):
            lease.take(tmp_path, mine, lambda job: None, patience=0.0)
        other.kill()
    lease.take(tmp_path, mine, lambda job: None, patience=0.0)


def test_two_supervisors_that_are_process_1_are_two(tmp_path: Path) -> None:
    """In containers both are, and may begin within the same second."""
    mine = Incarnation("local-1-1700000000", 0, 0)
    lease.take(tmp_path, mine, lambda job: None)
    held = rundir.read_json(rundir.lease_file(tmp_path)) or {}
    lease.take(tmp_path, mine, lambda job: None, patience=0.0)
    rundir.write_json(rundir.lease_file(tmp_path), {**held, "host": "elsewhere"})
    with pytest.raises(LaunchError, match="on elsewhere"):
        lease.take(tmp_path, mine, lambda job: None, patience=0.0)
    assert rendezvous.ports(mine) != rendezvous.ports(Incarnation("local-1-1700000009", 0, 0))


def test_incarnations_that_follow_each_other_meet_elsewhere() -> None:
    used = [rendezvous.ports(Incarnation("1234", restart, 0))[0] for restart in range(8)]
    assert len(set(used)) == 8
    assert not set(rendezvous.ports(Incarnation("1234", 0, 0))) & set(rendezvous.ports(Incarnation("1235", 0, 0)))
    for job in ("1", "999999999", "local-77-1700000000"):
        assert all(1024 < port < 32768 for port in rendezvous.ports(Incarnation(job, 3, 5)))
    with socket.create_server(("", used[0])):
        assert rendezvous.free_port(Incarnation("1234", 0, 0)) == used[1]


def test_addresses_are_those_that_others_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"node1": "127.0.1.1", "node1.net": "10.0.0.1", "node2": "10.0.0.2"}

    def getaddrinfo(name: str, *_: object, **__: object) -> list[tuple]:
        if name not in known:
            raise socket.gaierror(socket.EAI_NONAME, "unknown")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (known[name], 0))]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    assert rendezvous.address_of("node2", lambda name: "") == "10.0.0.2"
    assert rendezvous.address_of("node1", lambda name: "node1.net") == "10.0.0.1"
    assert rendezvous.address_of("node1", lambda name: "") == "127.0.1.1"  # a cluster on one host
    with pytest.raises(LaunchError, match="node9 has no address"):
        rendezvous.address_of("node9", lambda name: "")


@pytest.mark.parametrize("text", ["7", "7.0", "7.0.x", ""])
def test_incarnations_are_read_back(text: str) -> None:
    assert Incarnation.parse("local-12.0.3") == Incarnation("local-12", 0, 3)
    with pytest.raises(LaunchError, match=r"JOB[.]RESTART[.]ATTEMPT"):
        Incarnation.parse(text)


def report(node: str, **found: object) -> str:
    record = {"node": node, "shared": True, "errors": [], "warnings": [], **found}
    return f"noise\n{MARK}{json.dumps(record)}\n"


def judge(text: str, complaint: str = ""):
    return read_findings(text, ["a", "b", "c"], host="a", run_dir=Path("/runs/r"), complaint=complaint)


def test_findings_name_the_node_or_say_that_it_is_not_the_node() -> None:
    fine = report("a") + report("b") + report("c")
    assert judge(fine) == judge(fine) and not judge(fine).bad_nodes and not judge(fine).unfit
    assert judge(report("a") + report("b")).bad_nodes == {"c": "does not run the checks before the start"}
    assert judge(fine + report("b", errors=["0 of 8 GPUs can be used"])).bad_nodes == {"b": "0 of 8 GPUs can be used"}
    apart = report("a") + report("b", shared=False) + report("c", shared=False)
    assert "/runs/r is not the same directory on b, c as on a; set runs_dir" in judge(apart).unfit
    one = judge(report("a") + report("b") + report("c", shared=False))
    assert list(one.bad_nodes) == ["c"] and not one.unfit
    assert "ModuleNotFoundError: no megamem" in judge("", "Traceback\nModuleNotFoundError: no megamem").unfit
    deaf = judge(report("a") + report("b") + report("c", unreachable="RuntimeError: timed out"))
    assert "c: RuntimeError: timed out" in deaf.failure and not deaf.bad_nodes
    late = judge(report("a") + report("b") + report("c", network={"clock_offset_seconds": -30.0}))
    assert late.warnings == ("c: its clock is off by -30.0 s",)


def test_a_node_examines_itself(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("secret")
    arguments = {"run_dir": str(tmp_path), "token_file": str(token), "gpus": 0, "nodes": 1, "endpoint": ""}
    found = examine(Arguments(**arguments, token="secret"))
    assert found["shared"] and not found["errors"] and found["disk_free_gib"] > 1
    assert not examine(Arguments(**arguments, token="of another directory"))["shared"]
    missing = arguments | {"token_file": str(tmp_path / "nowhere")}
    assert not examine(Arguments(**missing, token="secret"))["shared"]
