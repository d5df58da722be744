"""A ledger on SQLite (or, where a test asks for it, PostgreSQL), settings, and tiny model folders."""

import json

import numpy
import pytest
from safetensors.numpy import save_file

from recoup.schemas import CreateRecovery, ModelRef
from recoup_jobs.settings import Settings
from recoup_jobs.stores import open_store

VOCABULARY = {"a": 0, "b": 1, "c": 2}


@pytest.fixture
def settings(tmp_path, database):
    return Settings(home=tmp_path / "home", database_url=database, sweep_seconds=0.02)


@pytest.fixture
def store(request, settings):
    """An artifact store: a folder or, where a test asks for it, a bucket."""
    if request.param == "folder":
        return open_store(settings)
    return open_store(settings.model_copy(update=request.getfixturevalue("bucket")))


@pytest.fixture
def asked():
    return CreateRecovery(student=ModelRef(source="student"), teacher=ModelRef(source="teacher"))


@pytest.fixture
def write_model(settings):
    """Writes a model folder that preflight accepts; a file given as None is left out."""

    def write(name, **files):
        folder = settings.model_roots[0] / name
        folder.mkdir(parents=True)
        sound = {
            "config.json": {"architectures": ["LlamaForCausalLM"], "hidden_size": 4, "vocab_size": 3},
            "tokenizer.json": {"model": {"vocab": VOCABULARY}, "added_tokens": []},
            "tokenizer_config.json": {"chat_template": "{{ messages }}"},
        }
        for file, content in (sound | files).items():
            if content is not None:
                (folder / file).write_text(json.dumps(content))
        save_file({"w": numpy.zeros((3, 4), numpy.float32)}, folder / "model.safetensors")
        return folder

    return write
