"""What the commands' tests share."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def talking_model(byte_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`byte_model` with a chat template."""
    folder = tmp_path_factory.mktemp("talking") / "model"
    shutil.copytree(byte_model, folder)
    template = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    return folder
