"""Every setting is documented."""

from __future__ import annotations

import pytest

from megamem.config.describe import settings
from megamem_launch.config import RunConfig


def test_settings_are_listed_with_defaults_and_meaning() -> None:
    found = {setting.name: setting for setting in settings(RunConfig)}
    assert found["memory.engram.width"].default == 32
    assert found["memory.engram.width"].text.startswith("Width of one row")
    assert found["optimizer.betas"].default == [0.9, 0.95]
    assert "model.moe.router" in found and "tracking.uri" in found


@pytest.mark.parametrize("setting", list(settings(RunConfig)), ids=lambda setting: setting.name)
def test_setting_has_a_meaning(setting) -> None:
    assert len(setting.text) > 10
