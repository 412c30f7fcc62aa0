"""Stacks as they were written by ranks that hung."""

from __future__ import annotations

import json

import pytest

from megamem_launch.watch.stacks import Frame, parse_faulthandler, parse_py_spy, place

IDLE = """\
Thread 0x00007feec37fe6c0 (most recent call first):
  File "/usr/lib/python3.11/concurrent/futures/thread.py", line 81 in _worker
  File "/usr/lib/python3.11/threading.py", line 982 in run
  File "/usr/lib/python3.11/threading.py", line 1045 in _bootstrap_inner
  File "/usr/lib/python3.11/threading.py", line 1002 in _bootstrap

"""
TRAIN = """\
  File "/home/me/megamem/megamem/train/trainer.py", line 143 in _step
  File "/home/me/megamem/megamem/train/trainer.py", line 100 in run
  File "/home/me/megamem/launch/megamem_launch/run.py", line 114 in _train
  File "/home/me/megamem/launch/megamem_launch/pretrain.py", line 19 in main
  File "<frozen runpy>", line 88 in _run_code
  File "<frozen runpy>", line 198 in _run_module_as_main
"""
ALL_REDUCE = f"""{IDLE}Current thread 0x00007fef6ee2eb80 (most recent call first):
  File "/home/me/megamem/.venv/lib/python3.11/site-packages/torch/distributed/distributed_c10d.py", line 3252 in all_reduce
  File "/home/me/megamem/.venv/lib/python3.11/site-packages/torch/distributed/c10d_logger.py", line 83 in wrapper
  File "/home/me/megamem/megamem/train/step.py", line 91 in _world_sum
  File "/home/me/megamem/megamem/train/step.py", line 82 in run
{TRAIN}"""
GATHER_OBJECTS = f"""{IDLE}Current thread 0x00007fef6ee2eb80 (most recent call first):
  File "/opt/venv/lib/python3.11/site-packages/torch/distributed/distributed_c10d.py", line 3900 in all_gather
  File "/opt/venv/lib/python3.11/site-packages/torch/distributed/c10d_logger.py", line 83 in wrapper
  File "/opt/venv/lib/python3.11/site-packages/torch/distributed/distributed_c10d.py", line 3100 in all_gather_object
  File "/opt/venv/lib/python3.11/site-packages/torch/distributed/c10d_logger.py", line 83 in wrapper
  File "/opt/venv/lib/python3.11/site-packages/megamem_checkpoints/ranks.py", line 28 in all
  File "/home/me/job/start.py", line 3 in <module>
"""
BACKGROUND = f"""{IDLE}Thread 0x00007f81af7fe6c0 (most recent call first):
  File "/opt/venv/lib/python3.11/site-packages/torch/distributed/distributed_c10d.py", line 5140 in all_to_all_single
  File "/opt/venv/lib/python3.11/site-packages/torch/distributed/c10d_logger.py", line 83 in wrapper
  File "/home/me/megamem/megamem/memory/exchange/hop.py", line 134 in swap
  File "/home/me/megamem/megamem/memory/engine.py", line 352 in _return
  File "/usr/lib/python3.11/concurrent/futures/thread.py", line 58 in run
  File "/usr/lib/python3.11/threading.py", line 1002 in _bootstrap

{IDLE}Current thread 0x00007f8259c12b80 (most recent call first):
  File "/usr/lib/python3.11/threading.py", line 327 in wait
  File "/usr/lib/python3.11/concurrent/futures/_base.py", line 451 in result
  File "/home/me/megamem/megamem/memory/engine.py", line 210 in return_gradients
{TRAIN}"""
PIPELINE = f"""{IDLE}Current thread 0x00007f8259c12b80 (most recent call first):
  File "/opt/venv/lib/python3.11/site-packages/megatron/core/pipeline_parallel/p2p_communication.py", line 250 in _communicate
  File "/opt/venv/lib/python3.11/site-packages/megatron/core/pipeline_parallel/p2p_communication.py", line 410 in recv_backward
  File "/opt/venv/lib/python3.11/site-packages/megatron/core/pipeline_parallel/schedules.py", line 2100 in forward_backward
  File "/home/me/megamem/megamem/train/step.py", line 71 in run
{TRAIN}"""
COMPUTES = f"""{BACKGROUND.partition("Current")[0]}Current thread 0x00007f8259c12b80 (most recent call first):
  File "/opt/venv/lib/python3.11/site-packages/torch/nn/functional.py", line 2300 in linear
  File "/home/me/megamem/megamem/models/norm.py", line 31 in forward
{TRAIN}"""
FOREIGN = f"""{IDLE}Current thread 0x00007f8259c12b80 (most recent call first):
  File "/opt/venv/lib/python3.11/site-packages/torch/distributed/distributed_c10d.py", line 1 in _new_process_group_helper
  File "/home/me/start.py", line 5 in <module>
"""


@pytest.mark.parametrize(
    ("dump", "collective", "caller", "background"),
    [
        (ALL_REDUCE, "all_reduce", "megamem/train/step.py:91 in _world_sum", False),
        (GATHER_OBJECTS, "all_gather", "megamem_checkpoints/ranks.py:28 in all", False),
        (BACKGROUND, "all_to_all_single", "megamem/memory/exchange/hop.py:134 in swap", True),
        (PIPELINE, "recv_backward", "megamem/train/step.py:71 in run", False),
        (COMPUTES, None, "megamem/models/norm.py:31 in forward", False),  # its own thread waits for rows: no news
        (FOREIGN, "_new_process_group_helper", "/home/me/start.py:5 in <module>", False),
        (IDLE.replace("Thread", "Current thread"), None, "concurrent/futures/thread.py:81 in _worker", False),
    ],
)
def test_place_of_a_rank(dump, collective, caller, background):
    found = place(parse_faulthandler(dump))
    assert found is not None
    assert (found.collective, found.caller, found.background) == (collective, caller, background)


def test_main_thread_is_the_last_or_the_one_that_took_the_signal():
    assert [thread.main for thread in parse_faulthandler(BACKGROUND)] == [False, False, False, True]
    # A signal may be taken by any thread.
    elsewhere = BACKGROUND.replace("Current thread", "Thread").replace("Thread", "Current thread", 1)
    assert [thread.main for thread in parse_faulthandler(elsewhere)] == [False, False, False, True]
    # More threads than faulthandler lists: the main one, the oldest, is cut off.
    assert [thread.main for thread in parse_faulthandler(IDLE * 100 + "...\n")] == [False] * 100
    assert place(parse_faulthandler(IDLE * 100 + "...\n")) is None


@pytest.mark.parametrize(
    "text", ["", "...\n", "Fatal Python error: Aborted\n", "\x00\ufffd", "Current thread 0x1 (most"]
)
def test_dumps_without_frames_say_nothing(text):
    assert place(parse_faulthandler(text)) is None


@pytest.mark.parametrize(
    ("file", "path", "ours"),
    [
        ("/home/me/megamem/.venv/lib/python3.11/site-packages/torch/nn/x.py", "torch/nn/x.py", False),
        ("/home/me/megamem/python/lib/python3.11/threading.py", "threading.py", False),
        ("/home/me/megamem/checkpoints/megamem_checkpoints/hf/x.py", "megamem_checkpoints/hf/x.py", True),
        ("/opt/site-packages/megamem/train/step.py", "megamem/train/step.py", True),
        ("megamem/train/step.py", "megamem/train/step.py", True),
        ("/home/me/other/x.py", "/home/me/other/x.py", False),
        ("<frozen runpy>", "<frozen runpy>", False),
    ],
)
def test_paths_begin_at_the_package(file, path, ours):
    frame = Frame(file, 1, "f")
    assert (frame.path, frame.ours) == (path, ours)


def test_py_spy_stacks():
    frames = [
        {"name": "all_reduce", "filename": "/v/site-packages/torch/distributed/distributed_c10d.py", "line": 3252},
        {"name": "_world_sum", "filename": "/src/megamem/megamem/train/step.py", "line": 91},
    ]
    idle = {"thread_name": "heartbeat", "frames": [{"name": "wait", "filename": "/x/threading.py", "line": 1}]}
    text = json.dumps([{"thread_name": "MainThread", "frames": frames}, idle])
    found = place(parse_py_spy(text))
    assert found is not None and (found.collective, found.caller) == (
        "all_reduce",
        "megamem/train/step.py:91 in _world_sum",
    )
    for broken in ("", "{}", "[1]", "null", '[{"frames": []}]'):
        assert parse_py_spy(broken) == []
