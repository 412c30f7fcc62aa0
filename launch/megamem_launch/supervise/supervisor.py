"""Supervises a run: starts its ranks, watches them, and goes on, ends or makes room as :mod:`decide` says."""

from __future__ import annotations

import contextlib
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
from megamem_launch.supervise.incarnation import Incarnation, last_late_nodes, record_end, record_start
from megamem_launch.supervise.notices import Notices
from megamem_launch.supervise.rank import FAILED
from megamem_launch.supervise.steps import Step
from megamem_launch.supervise.submission import Submission
from megamem_launch.supervise.tail import STDERR, Tail, put
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
    _notices: Notices = field(init=False)
    _requeued: bool = field(default=False, init=False)
    _recorded: Incarnation | None = field(default=None, init=False)
    _log: Path | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._notices = Notices(self.submission, self.allocation, self._say)

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
            rundir.stopped_file(run_dir).unlink(missing_ok=True)
            record_start(run_dir, incarnation, nodes=self.allocation.nodes, step=start)
            ended = self._attempt(incarnation, start, fruitless)
            decision = self._conclude(incarnation, ended)
            if decision.action == "restart":
                if stop := rundir.stop_lies(run_dir):
                    self._say(f"stopped: {stop}")
                    return DONE
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
        if stop := rundir.stop_lies(run_dir):
            self._say(f"stopped: {stop}")
            return DONE
        stopped = rundir.read_json(rundir.stopped_file(run_dir))
        if stopped is not None and isinstance(self.allocation, SlurmAllocation):  # to start it here is to go on
            self._say(
                f"{run_dir} was ended ({stopped['reason']}); submit it again or `megamem launch requeue` it to go on"
            )
            return int(stopped["exit_code"])
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
        put(STDERR, line.encode())
        if self._log is not None:
            with contextlib.suppress(OSError), self._log.open("a", encoding="utf-8") as file:
                file.write(line)

    def _policy(self) -> Policy:
        slurm = self.submission.cluster.slurm
        return Policy(
            restarts=slurm.restarts,
            requeue=slurm.requeue and isinstance(self.allocation, SlurmAllocation),
            followed=is_followed(self.submission.run_dir, self.allocation.first.job),
            chain=self.submission.kind == "chain",
        )

    def _attempt(self, incarnation: Incarnation, start: int, fruitless: int) -> Ended:
        """Run one incarnation, which goes on after step ``start``, to its end."""
        run_dir, name = self.submission.run_dir, str(incarnation)
        rundir.write_json(rundir.control_file(run_dir, name), {"request": "none"})
        self._log = rundir.log_dir(run_dir, name) / "supervisor.log"
        self._log.parent.mkdir(parents=True, exist_ok=True)
        ended = Ended(exit_code=None, fruitless=fruitless)
        if self.submission.cluster.slurm.preflight and (incarnation.attempt == 0 or fruitless):
            found = self.allocation.examine(run_dir, incarnation, self._notices.look)
            for warning in found.warnings:
                self._say(warning)
            ended = replace(ended, bad_nodes=found.bad_nodes, unfit=found.unfit, failure=found.failure, checked=False)
            if self._notices.look() or found.bad_nodes or found.unfit or found.failure:
                return self._explain(ended, self.allocation.job())
            ended = replace(ended, checked=True)
        self._say(f"incarnation {name} starts on {', '.join(self.allocation.nodes)} after step {start}")
        step = self.allocation.start(run_dir, self.submission.config, incarnation)
        gone = True
        try:
            ended = self._watch(step, incarnation, ended, start)
        finally:
            if step.poll() is None:
                gone = step.kill()
        progress = checkpoint_step(run_dir) > start
        report = rundir.read_json(rundir.outcome_file(run_dir, name))
        ended = replace(ended, report=report, progress=progress, lingering=not gone)
        if ended.exit_code == 0 and _is_finished(self.submission):
            ended = replace(ended, report={"outcome": "finished", "step": self.submission.steps})
        self._notices.look()  # a signal and the end of the ranks may come together
        return self._explain(ended, self.allocation.job())

    def _watch(self, step: Step, incarnation: Incarnation, ended: Ended, start: int) -> Ended:
        """Until the ranks have ended or must be killed."""
        run_dir, name = self.submission.run_dir, str(incarnation)
        live, slurm = rundir.live_dir(run_dir, name), self.submission.cluster.slurm
        watchdog = Watchdog(
            live,
            rundir.dump_dir(run_dir, name),
            self.submission.cluster.world_size,
            slurm.hang_seconds or float("inf"),
            slurm.start_seconds,
        )
        tail, checked, failed_at = Tail(rundir.log_dir(run_dir, name)), 0.0, None
        heeded = 0
        while (code := step.poll()) is None:
            time.sleep(_POLL)
            tail.copy()
            if self._notices.look(incarnation) and self._notices.count != heeded:
                heeded = self._notices.count
                if self._heed(incarnation, ended, start):
                    return ended
            self._notices.tell(incarnation)
            if (now := time.monotonic()) - checked < 1.0:
                continue
            checked = now
            if not lease.is_held(run_dir, incarnation):
                return replace(ended, superseded=True)
            if hang := watchdog.check(now):
                verdict = collect(hang, step.ask_for_stacks, elsewhere=step.states, stages=self.submission.stages)
                return self._blame(replace(ended, hang=verdict.sentence, late_nodes=verdict.nodes))
            if _failures(live):
                failed_at = failed_at or now
                if now - failed_at > _SETTLE:
                    break  # srun waits for the tasks of a node that is lost
        tail.copy()
        # One that was killed is the cause of errors that others, which lost it, wrote down before its agent did.
        first = min(_failures(live), key=lambda record: (record["exit_code"] >= 0, record["time"]), default=None)
        if first is None:
            logs = rundir.log_dir(run_dir, name)
            unsaid = f"a rank ended with exit code {FATAL}: its log in {logs} says what must be mended"
            return replace(ended, exit_code=code, fatal=unsaid if code == FATAL else "")
        sentence = f"rank {first['rank']} on {first['node']}: {first['error']}"
        fatal = next((r["error"] for r in _failures(live) if r["exit_code"] == FATAL), "")
        return replace(ended, exit_code=code, failure=sentence, fatal=fatal if first["exit_code"] >= 0 else "")

    def _blame(self, ended: Ended) -> Ended:
        """After a hang: nodes whose ranks were late in the one before, too, are not to be used any more."""
        again = last_late_nodes(self.submission.run_dir) & set(ended.late_nodes) & set(self.allocation.nodes)
        if not again or not isinstance(self.allocation, SlurmAllocation):
            return ended
        return replace(ended, bad_nodes=dict.fromkeys(sorted(again), "its ranks were late in two hangs in a row"))

    def _heed(self, incarnation: Incarnation, ended: Ended, start: int) -> bool:
        """Act on a request, or on a notice that followed it; whether the ranks are to be killed at once."""
        request = self._notices.request
        assert request is not None
        if not request.final:
            self._notices.tell(incarnation, request.why)
        job = self.allocation.job()
        ended = replace(ended, progress=checkpoint_step(self.submission.run_dir) > start)
        so_far = self._explain(ended, job)
        late = job is not None and job.state == "TIMEOUT"
        if (
            request.final or so_far.gone or late
        ):  # SLURM kills this process soon, whether or not the ranks have saved by then
            decision = self._conclude(incarnation, so_far)
            if late and decision.action == "requeue":
                self._requeue()
        return request.final

    def _explain(self, ended: Ended, job: Job | None) -> Ended:
        """Add what was asked, and, where nobody asked for the end, what SLURM knows about the cause."""
        gone = job is not None and job.state not in ("RUNNING", "TIMEOUT")
        if rundir.cancelled_file(self.submission.run_dir).exists() or (job is not None and job.state == "CANCELLED"):
            return replace(ended, asked="cancelled", why="cancelled by a person", gone=gone)
        if (request := self._notices.request) is not None:
            ended = replace(ended, asked=request.asked, why=request.why)
        clean = ended.exit_code == 0 and ended.report is not None
        if not clean and not ended.bad_nodes and not ended.fatal:
            # SLURM starts nothing in a job that is gone: healthy nodes would be blamed.
            ended = replace(ended, bad_nodes=self.allocation.lost_nodes(probe=not gone and not ended.asked))
        return replace(ended, gone=gone)

    def _conclude(self, incarnation: Incarnation, ended: Ended) -> Decision:
        """Decide and record how an incarnation ended; what was recorded of it before stays."""
        run_dir, name = self.submission.run_dir, str(incarnation)
        decision = decide(ended, self._policy())
        if decision.outcome == "stopped" or (decision.exit_code == FATAL and is_followed(run_dir, incarnation.job)):
            # The next job of a chain, or this one that SLURM has requeued, is not to go on.
            mark = {"reason": decision.reason, "exit_code": decision.exit_code, "time": round(time.time(), 3)}
            rundir.write_json(rundir.stopped_file(run_dir), mark)
        if self._recorded == incarnation:
            return decision
        self._recorded = incarnation
        self._say(f"incarnation {name} ended: {decision.outcome}: {decision.reason}")
        if ended.bad_nodes and decision.outcome in ("node_failure", "preflight", "hang"):
            exclusion.exclude(run_dir, ended.bad_nodes, name)
        record_end(
            run_dir,
            incarnation,
            outcome=decision.outcome,
            reason=decision.reason,
            step=checkpoint_step(run_dir),
            bad_nodes=ended.bad_nodes,
            stragglers=straggler_report(
                rundir.live_dir(run_dir, name), self.submission.stages, self.submission.cluster.world_size
            ),
            late_nodes=ended.late_nodes,
        )
        if ended.gone and decision.outcome == "node_failure":
            self._avoid_bad_nodes()
        return decision

    def _requeue(self) -> int:
        assert isinstance(self.allocation, SlurmAllocation)
        job = None if self._requeued else self.allocation.job()
        # SLURM revives cancelled jobs too, and somebody may have cancelled this one since it was looked at.
        if rundir.cancelled_file(self.submission.run_dir).exists() or (job is not None and job.state == "CANCELLED"):
            self._say("the job was cancelled, so it is not put back into the queue")
            return DONE
        if self._requeued or (job is not None and (job.waiting or job.restarts > self.allocation.first.restart)):
            return REQUEUE
        try:
            self.allocation.slurm.requeue(self.allocation.job_id)
        except LaunchError as error:
            self._say(f"the job could not be put back into the queue: {error}")
        else:
            self._requeued = True
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
    records = []
    with contextlib.suppress(OSError):
        for path in live.glob(f"{FAILED}*.json"):
            if (record := rundir.read_json(path)) is not None:
                records.append(record)
    return records


def _is_finished(submission: Submission) -> bool:
    """Whether the run has trained all the steps that are asked of it now, under a supervisor or without one."""
    marker = rundir.read_json(rundir.finished_file(submission.run_dir)) or {}
    if int(marker.get("step", 0)) >= submission.steps:
        return True
    summary = submission.run_dir / "summary.json"
    return summary.exists() and checkpoint_step(submission.run_dir) >= submission.steps
