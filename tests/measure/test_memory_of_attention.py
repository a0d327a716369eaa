"""Everything the attention page computes of one image fits beside ViT-L/16 at 384 pixels."""

import json
import os
import subprocess
import sys

import pytest

from tests.test_static import ROOT

GROWTH_MIB_MAX = 572  # 600 MB; measured: docs/attention.md


@pytest.mark.slow
def test_the_page_of_vit_large_at_384_pixels_stays_within_600_megabytes():
    command = [sys.executable, "-m", "tests.measure.memory_of_attention"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=True)
    assert json.loads(ended.stdout)["growth_at_peak_mib"] <= GROWTH_MIB_MAX
