"""What is kept with a run: secrets are found by name and by value, and nothing else is touched."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from megamem_launch.slurm import capture
from megamem_launch.slurm.scrub import scrubbed
from megamem_launch.slurm.secrets import (
    REDACTED,
    is_secret,
    redact,
    redact_override,
    redact_text,
    redact_variables,
    secret_settings,
)

HF = "hf_" + "aB3" * 10
SECRETS = {
    "HF_TOKEN": "short",
    "AWS_SECRET_ACCESS_KEY": "x" * 40,
    "AWS_ACCESS_KEY_ID": "anything",
    "WANDB_API_KEY": "0123456789abcdef",
    "MLFLOW_TRACKING_PASSWORD": "pw",
    "DATABASE_URL": "postgres://me:pw@host/db",
    "GH_PAT": "x",
    "MY_CREDENTIALS": "x",
    "SOMETHING": HF,
    "GIT": "ghp_" + "a" * 36,
    "JWT": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abc",
    "AUTH_HEADER": "Bearer abcdefghijkl",
    "PEM": "-----BEGIN RSA PRIVATE KEY-----\nabc\n-----END RSA PRIVATE KEY-----",
    "INDEX": "https://oauth2accesstoken12@pypi.example/simple",
}
HARMLESS = {
    "PATH": "/usr/bin:/bin",
    "TOKENIZERS_PARALLELISM": "false",
    "SSH_AUTH_SOCK": "/tmp/agent.1",
    "MONKEY": "banana",
    "KEYBOARD": "us",
    "HOME": "/home/me",
    "COMPASS": "north",
    "MLFLOW_TRACKING_URI": "http://host:5000",
    "GIT_REMOTE": "git@github.com:a/b.git",
    "AUTHOR": "me",
    "SSL_KEY_FILE": "/etc/ssl/key.pem",
}


@pytest.mark.parametrize("name", SECRETS)
def test_secrets_do_not_stay(name: str) -> None:
    value = SECRETS[name]
    assert is_secret(name, value)
    kept = redact_variables({name: value})[name]
    assert REDACTED in kept and value not in kept and "pw@" not in kept


def test_harmless_variables_stay() -> None:
    assert redact_variables(HARMLESS) == dict(sorted(HARMLESS.items()))
    assert not any(is_secret(name, value) for name, value in HARMLESS.items())
    assert not is_secret("HF_TOKEN", "")


def test_text_loses_secrets_alone() -> None:
    text = f"""
+    client(token, key=lambda item: item.name)  # tokens: int
+WANDB_API_KEY = "0123456789abcdef"
+export HF_TOKEN=abcdefgh PATH=/bin
-url = "https://me:swordfish@host/x"
 login({HF!r})
 their = "the-value-of-my-password"
"""
    found = redact_text(text, {"MY_PASSWORD": "the-value-of-my-password", "HOME": "/home/me"})
    for secret in ("0123456789abcdef", "abcdefgh", "swordfish", HF, "the-value-of-my-password"):
        assert secret not in found
    for kept in ("key=lambda item: item.name", "tokens: int", "WANDB_API_KEY", "PATH=/bin", "@host/x"):
        assert kept in found
    assert redact({"a": ["http://u:p@h"], "b": 1}) == {"a": [f"http://{REDACTED}@h"], "b": 1}


def test_settings_that_hold_secrets() -> None:
    sources = [{"path": "a"}, {"options": {"token": "abc", "name": "en"}, "path": "https://me:word@host/x"}]
    settings = {"data": {"sources": sources}, "model": {"token_dispatcher": "alltoall"}, "tracking": {"uri": HF}}
    found = ["data.sources[1].options.token", "data.sources[1].path", "tracking.uri"]
    assert list(secret_settings(settings)) == found
    assert redact_override("tracking.uri=http://me:word@host") == f"tracking.uri=http://{REDACTED}@host"
    assert redact_override("model.moe.token_dispatcher=alltoall") == "model.moe.token_dispatcher=alltoall"


def test_submissions_inherit_nothing_of_another_job() -> None:
    theirs = {
        **{
            "SLURM_JOB_ID": "1",
            "SLURM_CPU_BIND": "x",
            "SBATCH_PARTITION": "x",
            "SRUN_CPUS_PER_TASK": "1",
            "PMIX_RANK": "0",
        },
        **{"PMI_RANK": "0", "RANK": "0", "WORLD_SIZE": "8", "MASTER_ADDR": "a", "CUDA_VISIBLE_DEVICES": "3"},
        **{
            "TORCHELASTIC_RUN_ID": "x",
            "OMPI_COMM_WORLD_RANK": "0",
            "MEGAMEM_INCARNATION": "1.0.0",
            "SLURMD_NODENAME": "n",
        },
    }
    ours = {"PATH": "/bin", "SLURM_CONF": "/etc/slurm.conf", "OMP_NUM_THREADS": "4", "HF_HOME": "/x", "RANKING": "y"}
    assert scrubbed(theirs | ours) == ours


def test_records_tell_code_and_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> None:
        subprocess.run(["git", "-C", str(tmp_path / "code"), *arguments], check=True, capture_output=True)

    (tmp_path / "code").mkdir()
    git("init", "-b", "work")
    git("remote", "add", "origin", "https://me:swordfish@host/repo.git")
    file = tmp_path / "code" / "model.py"
    file.write_text("width = 1\n")
    git("add", ".")
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-m", "first")
    file.write_text(f"width = 2\nMY_TOKEN = '{HF}'\n")
    (tmp_path / "code" / "new.py").write_text("")
    monkeypatch.setenv("HF_TOKEN", "a-secret-of-mine")
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setattr("sys.argv", ["megamem", "launch", "slurm", "x.yaml", "tracking.uri=http://me:swordfish@host"])
    kept = capture.records(tmp_path / "code")
    code = json.loads(kept["code.json"])
    assert len(code["revision"]) == 40 and code["branch"] == "work" and code["dirty"] is True
    assert code["untracked"] == ["new.py"] and code["remote"] == f"https://{REDACTED}@host/repo.git"
    diff = kept["code.diff"]
    assert "-width = 1" in diff and "+width = 2" in diff and HF not in diff
    environment = json.loads(kept["environment.json"])
    assert environment["variables"]["HF_TOKEN"] == REDACTED and "SLURM_JOB_ID" not in environment["variables"]
    assert any(package.startswith("torch==") for package in environment["packages"])
    assert kept["command.txt"] == f"megamem launch slurm x.yaml tracking.uri=http://{REDACTED}@host\n"
    assert not any("swordfish" in text for text in kept.values())


def test_code_without_a_checkout(tmp_path: Path) -> None:
    code, diff = capture.code_revision(tmp_path)
    assert code["revision"] is None and code["version"] and diff == ""
