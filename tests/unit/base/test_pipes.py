import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize("words", [["qdm_lightning"], ["qdm_lightning.report", "--help"], ["qdm_lightning.cost", "--help"]])
def test_a_reader_that_leaves_is_no_fault(words):
    reader, writer = os.pipe()
    os.close(reader)
    ran = subprocess.run([sys.executable, "-m", *words], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (ran.returncode, ran.stderr) == (141, "")
