"""What several test files share."""

import pytest

from tests.warm_command_line import WarmCommandLine


@pytest.fixture(scope="session")
def warm():
    """Both command lines in one process that has imported everything once."""
    command_line = WarmCommandLine()
    yield command_line
    command_line.close()
