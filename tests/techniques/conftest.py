"""What the tests of modify_llm.py share: the small model as a directory."""

import pytest
from small_models import small


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """The small model as a local directory."""
    directory = tmp_path_factory.mktemp("small_base")
    small().save_pretrained(directory)
    return str(directory)
