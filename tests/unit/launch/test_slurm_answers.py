"""Reading SLURM's answers: recorded ones of 22.05, and the forms that later versions give."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megamem_launch.slurm import parse
from megamem_launch.slurm.parse import Job, Node
from megamem_launch.slurm.reasons import why_ended, why_waiting

DATA = Path(__file__).parents[2] / "data" / "slurm"


@pytest.fixture(scope="module")
def shown() -> dict[str, Job]:
    return {job.id: job for job in parse.show_jobs((DATA / "show_job.txt").read_text())}


@pytest.fixture(scope="module")
def queued() -> dict[str, Job]:
    return {job.id: job for job in parse.squeue_jobs((DATA / "squeue.txt").read_text())}


def test_free_text_cannot_pass_for_a_field(shown: dict[str, Job]) -> None:
    job = shown["14"]  # its name is "odd name JobState=FAILED" and its comment "Reason=x NodeList=y"
    assert job.name == "odd name JobState=FAILED"
    assert (job.state, job.reason, job.nodes, job.batch_host) == ("RUNNING", "", "node[1-2]", "node1")
    assert (job.submitted, job.started, job.ends) == (1795286619.0, 1795286619.0, 1795287219.0)
    assert job.preempted is None and not job.waiting and not job.over


def test_waiting_failed_and_requeued_jobs(shown: dict[str, Job]) -> None:
    assert shown["15"].excluded == "node3" and shown["15"].dependency == "afterany:14(unfulfilled)"
    assert (shown["16_0"].number, shown["16_0"].array, shown["16_0"].task) == ("20", "16", "0")
    assert shown["16_1-3%1"].waiting
    assert shown["22"].restarts == 1 and shown["22"].reason == "BeginTime" and shown["22"].eligible == 1795286790.0
    assert shown["23"].over and shown["23"].exit_code == "3:0"
    assert shown["24"].exit_code == "0:9"


def test_both_commands_tell_the_same(shown: dict[str, Job], queued: dict[str, Job]) -> None:
    for number in ("14", "15", "16_0", "22", "23", "24"):
        told = replace(shown[number], excluded=None, exit_code="")
        if number == "15":  # scontrol estimated nothing, squeue gives N/A: both are None
            assert told.started is None
        assert replace(queued[number], reason=told.reason) == told
    assert {"16_1", "16_2", "16_3"} <= set(queued)


def test_later_versions() -> None:
    """24.11 and 25.05 add fields, and write several states joined by commas or signs."""
    text = """JobId=7 JobName=train me
   UserId=ada(1000) GroupId=ada(1000) MCS_label=N/A
   Priority=1 Nice=0 Account=lab QOS=normal
   JobState=RUNNING Reason=None Dependency=(null)
   Requeue=1 Restarts=2 BatchFlag=1 Reboot=0 ExitCode=0:0
   StartTime=1795286619 EndTime=1795287219 Deadline=N/A
   PreemptEligibleTime=1795286619 PreemptTime=1795286700
   Partition=gpu AllocNode:Sid=10.244.5.5:1
   ReqNodeList=(null) ExcNodeList=node[3,7]
   NodeList=gpu-[01-02]
   BatchHost=gpu-01
   StepMgrEnabled=Yes
   NumNodes=2 NumCPUs=4 NumTasks=1 CPUs/Task=1 ReqB:S:C:T=0:0:*:*
   ReqTRES=cpu=1,mem=96046M,node=1,billing=1
   AllocTRES=cpu=4,mem=96046M,node=1,billing=4
   OverSubscribe=NO Contiguous=0 Licenses=(null) LicensesAlloc=(null) Network=(null)
   Command=/home/ada/a=b.sh x JobState=FAILED
   AdminComment={"pods":["NodeList=evil"]}
   OOMKillStep=0
"""
    (job,) = parse.show_jobs(text)
    assert (job.state, job.nodes, job.node_count, job.restarts) == ("RUNNING", "gpu-[01-02]", 2, 2)
    assert (job.preempted, job.excluded, job.name) == (1795286700.0, "node[3,7]", "train me")
    (ending,) = parse.show_jobs(text.replace("JobState=RUNNING", "JobState=COMPLETING,REQUEUED"))
    assert ending.state == "COMPLETING" and not ending.over and not ending.waiting


def test_nodes() -> None:
    nodes = {node.name: node for node in parse.show_nodes((DATA / "show_node.txt").read_text())}
    assert nodes["node1"] == Node("node1", frozenset({"MIXED"}), "", "127.0.0.1")
    assert nodes["node1"].available
    assert nodes["node3"].state == {"MIXED", "NOT_RESPONDING"} and not nodes["node3"].healthy
    assert nodes["node4"].reason.startswith("bad disk") and nodes["node4"].state == {"MIXED", "DRAIN"}
    assert nodes["node4"].healthy and not nodes["node4"].available


@pytest.mark.parametrize(
    ("word", "healthy", "available"),
    [
        ("idle", True, True),
        ("mixed*", False, False),
        ("DOWN*+DRAIN", False, False),
        ("DOWN+NOT_RESPONDING", False, False),
        ("idle~", False, True),  # powered down: what ran there is lost, yet the cluster powers it up for a new job
        ("IDLE+PLANNED", True, True),
        ("draining", True, False),
        ("maint", True, False),
        ("reboot^", False, False),
    ],
)
def test_states_of_nodes(word: str, healthy: bool, available: bool) -> None:
    node = Node("n", parse.node_state(word), "", "n")
    assert (node.healthy, node.available) == (healthy, available)


def test_accounts() -> None:
    records = parse.sacct_records(
        "7|REQUEUED|1|2|61||0:0|node[1-2]\n7.batch|CANCELLED|1|2|61|2048K|0:15|node1\nsome warning\n7|CANCELLED by 0|3|4|9||0:0|n\n"
    )
    assert [record["State"] for record in records] == ["REQUEUED", "CANCELLED", "CANCELLED"]
    assert parse.mebibytes(records[1]["MaxRSS"]) == 2.0 and parse.mebibytes("") is None
    assert parse.mebibytes("1.5G") == 1536.0


def test_reasons_in_plain_words(queued: dict[str, Job]) -> None:
    assert why_waiting(queued["15"]) == "it starts when job 14 has ended"
    assert "down, drained" in why_waiting(queued["17"])
    assert "requeue" in why_waiting(queued["18"])  # held: says what lets it go on
    assert "sweep" in why_waiting(queued["16_2"])
    assert why_waiting(queued["22"]).startswith("it may start at ")
    limit = replace(queued["19"], reason="QOSMaxJobsPerUserLimit")
    assert why_waiting(limit) == "a limit of its QOS is reached (QOSMaxJobsPerUserLimit)"
    assert "node[2-3]" in why_waiting(replace(limit, reason="ReqNodeNotAvail,_UnavailableNodes:node[2-3]"))
    assert "Odd" in why_waiting(replace(limit, reason="Odd"))


def test_ends_in_plain_words(shown: dict[str, Job]) -> None:
    assert why_ended(shown["23"]) == "its script ended with exit code 3"
    assert why_ended(shown["24"]) == "its script was ended by signal 9"
    assert "slurm.memory" in why_ended(replace(shown["23"], state="OUT_OF_MEMORY"))
