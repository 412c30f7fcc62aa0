"""Supervises a run: starts its ranks, watches them, and goes on, ends or makes room as :mod:`decide` says."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megamem.errors import LaunchError
from megamem_launch import rundir
from megamem_launch.slurm.parse import Job
from megamem_launch.supervise import exclusion, lease
from megamem_launch.supervise.allocation import Allocation, SlurmAllocation
from megamem_launch.supervise.budget import checkpoint_step, fruitless_starts, is_followed
from megamem_launch.supervise.decide import DONE, EXHAUSTED, FATAL, REQUEUE, Decision, Ended, Policy, decide
from megamem_launch.supervise.incarnation import Incarnation, record_end, record_start
from megamem_launch.supervise.rank import FAILED, TERMINATE
from megamem_launch.supervise.request import Request, request_of
from megamem_launch.supervise.signals import Signals
from megamem_launch.supervise.steps import Step
from megamem_launch.supervise.submission import Submission
from megamem_launch.supervise.tail import Tail
from megamem_launch.watch.dumps import collect
from megamem_launch.watch.stragglers import straggler_report
from megamem_launch.watch.watchdog import Watchdog

_POLL = 0.25  # seconds
_SETTLE = 20.0  # seconds that the other ranks get to end by themselves after one failed


@dataclass(slots=True)
class Supervisor:
    """Supervises ``submission`` on ``allocation`` until the run ends, or must go on elsewhere."""

    submission: Submission
    allocation: Allocation
    _signals: Signals = field(init=False)
    _request: Request | None = field(default=None, init=False)
    _recorded: Incarnation | None = field(default=None, init=False)
    _log: Path | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._signals = Signals(self.submission.cluster.slurm.signal)

    def run(self) -> int:
        """The exit code (:mod:`decide`)."""
        run_dir = self.submission.run_dir
        if (code := self._refused()) is not None:
            return code
        incarnation = self.allocation.first
        while True:
            start = checkpoint_step(run_dir)
            fruitless = fruitless_starts(run_dir, incarnation.job, start)
            try:
                lease.take(run_dir, incarnation, self.allocation.runs)
            except LaunchError as error:
                self._say(str(error))
                return FATAL
            record_start(run_dir, incarnation, nodes=self.allocation.nodes, step=start)
            ended = self._attempt(incarnation, start, fruitless)
            decision = self._conclude(incarnation, ended)
            if decision.action == "restart":
                incarnation = replace(incarnation, attempt=incarnation.attempt + 1)
                continue
            return self._requeue() if decision.action == "requeue" else decision.exit_code

    def _refused(self) -> int | None:
        """The exit code where nothing may be started at all."""
        run_dir, job = self.submission.run_dir, self.allocation.first.job
        if rundir.cancelled_file(run_dir).exists():
            self._say(f"{run_dir} was cancelled")
            return DONE
        if _is_finished(self.submission):
            self._say(f"{run_dir} has trained all {self.submission.steps} steps")
            return DONE
        restarts = self.submission.cluster.slurm.restarts
        fruitless = fruitless_starts(run_dir, job, checkpoint_step(run_dir))
        if fruitless > restarts:
            self._say(
                f"{fruitless} starts in a row brought no newer checkpoint; mend the cause and submit {run_dir} again"
            )
            return EXHAUSTED
        avoided = exclusion.excluded(run_dir)
        if isinstance(self.allocation, SlurmAllocation) and (hit := sorted(set(avoided) & set(self.allocation.nodes))):
            self._say(f"SLURM gave {', '.join(hit)} to the job, which the run avoids ({avoided[hit[0]]})")
            return self._requeue() if self.submission.cluster.slurm.requeue else REQUEUE
        return None

    def _say(self, text: str) -> None:
        """Tell the job's output and the incarnation's log."""
        line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} supervisor: {text}\n"
        sys.stderr.write(line)
        sys.stderr.flush()
        if self._log is not None:
            with contextlib.suppress(OSError), self._log.open("a", encoding="utf-8") as file:
                file.write(line)

    def _policy(self) -> Policy:
        slurm = self.submission.cluster.slurm
        return Policy(
            restarts=slurm.restarts,
            requeue=slurm.requeue and isinstance(self.allocation, SlurmAllocation),
            followed=is_followed(self.submission.run_dir, self.allocation.first.job),
        )

    def _attempt(self, incarnation: Incarnation, start: int, fruitless: int) -> Ended:
        """Run one incarnation, which goes on after step ``start``, to its end."""
        run_dir, name = self.submission.run_dir, str(incarnation)
        rundir.write_json(rundir.control_file(run_dir, name), {"request": "none"})
        self._log = rundir.log_dir(run_dir, name) / "supervisor.log"
        self._log.parent.mkdir(parents=True, exist_ok=True)
        ended = Ended(exit_code=None, fruitless=fruitless)
        if self.submission.cluster.slurm.preflight and (incarnation.attempt == 0 or fruitless):
            found = self.allocation.examine(run_dir, incarnation, self._interrupted)
            for warning in found.warnings:
                self._say(warning)
            ended = replace(ended, bad_nodes=found.bad_nodes, unfit=found.unfit, failure=found.failure, checked=False)
            if self._interrupted() or found.bad_nodes or found.unfit or found.failure:
                return self._explain(ended, self.allocation.job())
            ended = replace(ended, checked=True)
        self._say(f"incarnation {name} starts on {', '.join(self.allocation.nodes)} after step {start}")
        step = self.allocation.start(run_dir, self.submission.config, incarnation)
        try:
            ended = self._watch(step, incarnation, ended)
        finally:
            if step.poll() is None:
                step.kill()
        progress = checkpoint_step(run_dir) > start
        ended = replace(ended, report=rundir.read_json(rundir.outcome_file(run_dir, name)), progress=progress)
        if ended.exit_code == 0 and _is_finished(self.submission):
            ended = replace(ended, report={"outcome": "finished", "step": self.submission.steps})
        self._interrupted()  # a signal and the end of the ranks may come together
        return self._explain(ended, self.allocation.job())

    def _watch(self, step: Step, incarnation: Incarnation, ended: Ended) -> Ended:
        """Until the ranks have ended or must be killed."""
        run_dir, name = self.submission.run_dir, str(incarnation)
        live, slurm = rundir.live_dir(run_dir, name), self.submission.cluster.slurm
        watchdog = Watchdog(
            live, rundir.dump_dir(run_dir, name), self.submission.cluster.world_size, slurm.hang_seconds or float("inf")
        )
        tail, checked, failed_at = Tail(rundir.log_dir(run_dir, name)), 0.0, None
        told: Request | None = None
        while (code := step.poll()) is None:
            time.sleep(_POLL)
            tail.copy()
            if self._interrupted(live) and self._request is not told:
                told = self._request
                assert told is not None
                if not told.final:
                    rundir.write_json(rundir.control_file(run_dir, name), {"request": "stop", "why": told.why})
                so_far = self._explain(ended, self.allocation.job())
                if told.final or so_far.gone:  # SLURM kills this process soon
                    self._conclude(incarnation, so_far)
                if told.final:
                    return ended
            if (now := time.monotonic()) - checked < 1.0:
                continue
            checked = now
            if not lease.is_held(run_dir, incarnation):
                return replace(ended, superseded=True)
            if hang := watchdog.check(now):
                return replace(ended, hang=collect(hang, step.ask_for_stacks, stages=self.submission.stages).sentence)
            if _failures(live):
                failed_at = failed_at or now
                if now - failed_at > _SETTLE:
                    break  # srun waits for the tasks of a node that is lost
        tail.copy()
        # One that was killed is the cause of errors that others, which lost it, wrote down before its agent did.
        first = min(_failures(live), key=lambda record: (record["exit_code"] >= 0, record["time"]), default=None)
        if first is None:
            return replace(ended, exit_code=code)
        sentence = f"rank {first['rank']} on {first['node']}: {first['error']}"
        fatal = next((r["error"] for r in _failures(live) if r["exit_code"] == 2), "")
        return replace(ended, exit_code=code, failure=sentence, fatal=fatal)

    def _interrupted(self, live: Path | None = None) -> bool:
        """Whether somebody wants the ranks to stop: by a signal to this process, or to the ranks (markers in ``live``)."""
        received: list[signal.Signals | None] = [*self._signals.take()]
        markers = list(live.glob(f"{TERMINATE}*")) if live is not None and self._request is None else []
        for marker in markers:
            marker.unlink(missing_ok=True)
        if markers:
            received.append(None)
        for number in received:
            again = self._request is not None
            local = not isinstance(self.allocation, SlurmAllocation)
            request = request_of(number, self.allocation.job(), self.submission, local=local, again=again)
            if request is not None:
                self._request = request
                self._say(f"{number.name if number else 'SIGTERM to the ranks'}: {request.why}")
        return self._request is not None

    def _explain(self, ended: Ended, job: Job | None) -> Ended:
        """Add what was asked, and, where nobody asked for the end, what SLURM knows about the cause."""
        gone = job is not None and job.state not in ("RUNNING", "TIMEOUT")
        if rundir.cancelled_file(self.submission.run_dir).exists() or (job is not None and job.state == "CANCELLED"):
            return replace(ended, asked="cancelled", why="cancelled by a person", gone=gone)
        if self._request is not None:
            ended = replace(ended, asked=self._request.asked, why=self._request.why)
        clean = ended.exit_code == 0 and ended.report is not None
        if not clean and not ended.bad_nodes and not ended.fatal:
            # SLURM starts nothing in a job that is gone: healthy nodes would be blamed.
            ended = replace(ended, bad_nodes=self.allocation.lost_nodes(probe=not gone and not ended.asked))
        return replace(ended, gone=gone)

    def _conclude(self, incarnation: Incarnation, ended: Ended) -> Decision:
        """Decide and record how an incarnation ended; what was recorded of it before stays."""
        run_dir, name = self.submission.run_dir, str(incarnation)
        decision = decide(ended, self._policy())
        if self._recorded == incarnation:
            return decision
        self._recorded = incarnation
        self._say(f"incarnation {name} ended: {decision.outcome}: {decision.reason}")
        if ended.bad_nodes and decision.outcome in ("node_failure", "preflight"):
            exclusion.exclude(run_dir, ended.bad_nodes, name)
        record_end(
            run_dir,
            incarnation,
            outcome=decision.outcome,
            reason=decision.reason,
            step=checkpoint_step(run_dir),
            bad_nodes=ended.bad_nodes,
            stragglers=straggler_report(rundir.live_dir(run_dir, name), self.submission.stages),
        )
        if ended.gone and decision.outcome == "node_failure":
            self._avoid_bad_nodes()
        return decision

    def _requeue(self) -> int:
        assert isinstance(self.allocation, SlurmAllocation)
        try:
            self.allocation.slurm.requeue(self.allocation.job_id)
        except LaunchError as error:
            self._say(f"the job could not be put back into the queue: {error}")
        else:
            self._say("the job is back in the queue")
            self._avoid_bad_nodes()
        return REQUEUE

    def _avoid_bad_nodes(self) -> None:
        assert isinstance(self.allocation, SlurmAllocation)
        try:
            forgotten = self.allocation.avoid_bad_nodes(self.submission.run_dir)
        except LaunchError as error:
            self._say(f"SLURM was not told which nodes to avoid, so the next start looks itself: {error}")
        else:
            if forgotten:
                self._say(forgotten)


def _failures(live: Path) -> list[dict[str, Any]]:
    records = (rundir.read_json(path) for path in live.glob(f"{FAILED}*.json"))
    return [record for record in records if record is not None]


def _is_finished(submission: Submission) -> bool:
    """Whether the run has trained all the steps that are asked of it now, under a supervisor or without one."""
    marker = rundir.read_json(rundir.finished_file(submission.run_dir)) or {}
    if int(marker.get("step", 0)) >= submission.steps:
        return True
    summary = submission.run_dir / "summary.json"
    return summary.exists() and checkpoint_step(submission.run_dir) >= submission.steps
