"""What the engine holds at its peak: rows, their state, and the working sets of two steps."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
from pathlib import Path
from megamem.memory.config import MemoryConfig, RowOptimizerConfig, StorageConfig
from megamem.memory.engine import MemoryEngine
from megamem.testing.streams import HashedStream, step_batch

def status(name):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024

def train(rows, steps):
    stream = HashedStream("a", rows, (64,), k=8)
    memory = MemoryConfig(
        optimizer=RowOptimizerConfig(name=sys.argv[1]), storage=StorageConfig(format=sys.argv[2]), prefetch_depth=1
    )
    engine = MemoryEngine([stream], memory=memory, seed=1, device="cpu")
    batches = [step_batch(i, sequences=4, length=1024, micro_batch_size=1, vocabulary=rows) for i in range(steps + 1)]
    ticket = engine.submit(batches[0])
    for i in range(steps):
        following = engine.submit(batches[i + 1])
        taken = engine.take(ticket)
        for j in range(4):
            taken.micro(j).lookup("a.0", "a").sum().backward()
        engine.apply(engine.return_gradients(taken), lr=0.1, step=i + 1)
        ticket = following
    engine.synchronize()
    table = engine.tables["a.0"]
    held = sum(table.resident_bytes().values()) + sum(slot.rows.nbytes for slot in engine._slots)
    engine.close()
    return held

train(1000, 3)  # compiled code and libraries are not what is measured
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
held = train(int(sys.argv[3]), 4)
print(held, status("VmHWM") - before)
"""


@pytest.mark.parametrize(
    ("optimizer", "row_format", "rows"), [("lazy_adam", "fp32", 1_000_000), ("rowwise_adagrad", "bf16", 4_000_000)]
)
def test_peak_is_rows_state_and_two_working_sets(optimizer: str, row_format: str, rows: int) -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("this system has no /proc/self/clear_refs, which resets the peak of a process")
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, optimizer, row_format, str(rows)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    held, growth = map(int, run.stdout.split())
    print(f"{held / 2**20:.0f} MiB held, the process grew by {growth / 2**20:.0f} MiB")
    assert 0.9 * held < growth < 1.1 * held
