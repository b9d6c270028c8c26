"""The tiny base and the chat data of the tests of training, made once."""

from pathlib import Path

import pytest
from training.helpers import Workplace, save_base, save_chat


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory) -> Path:
    return save_chat(tmp_path_factory.mktemp("chat"))


@pytest.fixture
def work(base_folder, chat_folder, tmp_path) -> Workplace:
    return Workplace(base_folder, chat_folder, tmp_path)
