"""Does an export do what it should? Loaded as users load it: from its directory, offline, in a process of its own."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from megamem.errors import ExportError

REPORT = "export.json"
"""File that makes a directory an export: origin, checks and checksums."""

_TOKENS = 24
_NEW_TOKENS = 8
_TOLERANCE = 1e-4
"""Largest difference between cached and uncached logits, relative to the largest logit; fp32."""


def check_files(folder: Path) -> None:
    """Compare the weights in ``folder`` with the checksums of its export; ExportError names what is wrong.

    The other files must be there but may be edited, and a directory without a report has nothing to compare with.
    """
    try:
        architecture = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
        report = folder / REPORT
        files = json.loads(report.read_text(encoding="utf-8"))["files"] if report.exists() else {}
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items() if _is_weights(name)}
    except FileNotFoundError:
        raise ExportError(f"{folder} is no exported model; write one with `megamem export RUN OUT`") from None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ExportError(f"{folder} is damaged ({type(error).__name__}: {error}); export the run again") from None
    if architecture != "megamem" and not report.exists():
        raise ExportError(f"{folder} holds a {architecture} model; write one with `megamem export RUN OUT`")
    others = (name for name in files if name != "README.md" and name not in expected)
    missing = [name for name in others if not (folder / name).is_file()]
    if missing:
        raise ExportError(f"{folder / missing[0]} is missing; export the run again")
    for name, (size, sha256) in expected.items():
        try:
            with (folder / name).open("rb") as file:
                intact = os.fstat(file.fileno()).st_size == size
                intact = intact and hashlib.file_digest(file, "sha256").hexdigest() == sha256
        except OSError as error:
            raise ExportError(f"{folder / name} cannot be read ({error.strerror}); export the run again") from None
        if not intact:
            raise ExportError(f"{folder / name} is not what was exported; export the run again")


def _is_weights(name: str) -> bool:
    return name.endswith(".safetensors")


def verify_in_new_process(folder: Path) -> dict[str, Any]:
    """:func:`verify` in a new Python process without network; ExportError with its message where it fails."""
    with tempfile.TemporaryDirectory(prefix="megamem-verify-") as scratch:
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": scratch, "HF_MODULES_CACHE": f"{scratch}/modules"}
        command = [sys.executable, "-m", "megamem_checkpoints.hf.verify", str(folder)]
        result = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or [f"exit code {result.returncode}"])[-1]
        raise ExportError(f"the exported model did not pass its checks: {reason.removeprefix('ExportError: ')}")
    return json.loads(result.stdout.strip().splitlines()[-1])


def verify(folder: Path) -> dict[str, Any]:
    """Load model and tokenizer of ``folder`` and compare inference with and without a cache, in fp32.

    Every weight must be named by the model and the other way round; logits must be finite, and for a batch with a
    document boundary the same in one piece, token by token and in pieces of five; greedy continuations must be equal.
    ExportError names what failed.

    Host memory: 4 bytes for each parameter of the model. Tables of a ``megamem`` model stay in their files; those of a
    Qwen4-Exp model are parameters like all others.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    tables = {"table_placement": "disk"} if config.model_type == "megamem" else {}
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float32, output_loading_info=True, **tables
    )
    model.eval()
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[problem]:
            raise ExportError(
                f"{problem.replace('_', ' ')} after loading {folder}: {sorted(map(str, info[problem]))[0]}"
            )
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    if len(tokenizer) > config.vocab_size:
        raise ExportError(f"the tokenizer has {len(tokenizer)} entries and the model only {config.vocab_size}")

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (2, _TOKENS), generator=generator)
    ends = config.eos_token_id
    ids[0, _TOKENS // 3] = ends[0] if isinstance(ends, list) else ends
    memory = {"memory_paths": model.route(ids)} if getattr(config, "router_dimensions", 0) else {}
    with torch.no_grad():
        whole = model(ids, use_cache=False, **memory).logits
        if not whole.isfinite().all():
            raise ExportError("the logits of the exported model are not finite")
        difference = max(
            float((_in_pieces(model, ids, size, memory) - whole).abs().max() / whole.abs().max()) for size in (1, 5)
        )
        if difference > _TOLERANCE:
            raise ExportError(f"cached and uncached logits differ by {difference:.1e} of the largest logit")
        settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": _NEW_TOKENS, "do_sample": False} | memory
        cached = model.generate(ids, use_cache=True, **settings)
        if not torch.equal(cached, model.generate(ids, use_cache=False, **settings)):
            raise ExportError("greedy continuations with and without a cache differ")
    return {"cached_logits_relative_difference": difference, "greedy_cached_equal": True, "greedy_tokens": _NEW_TOKENS}


def _in_pieces(model: Any, ids: Any, size: int, memory: dict[str, Any]) -> Any:
    """Logits computed ``size`` tokens at a time through the cache."""
    import torch

    logits, cache = [], None
    for piece in ids.split(size, dim=1):
        output = model(piece, past_key_values=cache, use_cache=True, **memory)
        cache = output.past_key_values
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


if __name__ == "__main__":
    try:
        print(json.dumps(verify(Path(sys.argv[1]))))
    except ExportError as error:
        sys.exit(f"ExportError: {error}")
