"""A model folder is read once, and again as soon as anything in it is another."""

import json
import os

import pytest

from recoup_jobs import inspection
from recoup_jobs.inspection import Inspections
from recoup_jobs.sources import locate


@pytest.fixture
def folder(settings, write_model):
    write_model("student")
    return locate("student", settings.model_roots)


def test_an_unchanged_folder_is_not_read_again(folder):
    known = Inspections()
    assert known.of(folder) is known.of(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_file_that_was_replaced_is_read_again(folder, name):
    known, place = Inspections(), folder.path / name
    before = known.of(folder)
    aside = place.with_suffix(".new")
    aside.write_text(place.read_text())
    os.utime(aside, ns=(place.stat().st_atime_ns, place.stat().st_mtime_ns))
    aside.replace(place)  # same name, length and time, another inode
    assert known.of(folder) is not before


def test_a_file_that_appears_is_seen(folder):
    known = Inspections()
    assert known.of(folder).faults == ()
    hook = {"auto_map": {"AutoModel": "evil.Model"}}
    (folder.path / "generation_config.json").write_text(json.dumps(hook))
    assert [code for code, _ in known.of(folder).faults] == ["remote_code_refused"]


def test_a_link_inside_the_folder_is_followed(folder, tmp_path):
    known, place = Inspections(), folder.path / "config.json"
    target = folder.root / "elsewhere.json"
    place.rename(target)
    place.symlink_to(target)
    before = known.of(folder)
    target.write_text(target.read_text().replace("4", "8", 1))
    assert known.of(folder) is not before


def test_no_more_is_kept_than_fits(settings, write_model, monkeypatch):
    monkeypatch.setattr(inspection, "MOST_KEPT", 2)
    known = Inspections()
    for name in ("a", "b", "c"):
        write_model(name)
        known.of(locate(name, settings.model_roots))
    assert len(known._kept) == 2


@pytest.fixture
def clock():
    """Stands still until a test moves it."""
    return [100.0]


@pytest.fixture
def named(settings, clock):
    known = Inspections(lambda: clock[0])
    return lambda: known.named("student", settings.model_roots)


def test_a_sound_folder_is_looked_at_again_after_a_second(named, clock, folder):
    before = named()
    (folder.path / "config.json").write_text("no JSON")
    assert named() is before
    clock[0] += inspection.SOUND_SECONDS
    assert {code for code, _ in named().faults} == {"invalid_model"}


def test_a_folder_with_a_fault_is_looked_at_each_time(named, folder):
    config = (folder.path / "config.json").read_text()
    (folder.path / "config.json").write_text("no JSON")
    assert named().faults
    (folder.path / "config.json").write_text(config)
    assert named().faults == ()


def test_what_was_sound_once_is_forgotten(settings, write_model, clock):
    known = Inspections(lambda: clock[0])
    for name in ("a", "b", "c"):
        write_model(name)
        known.named(name, settings.model_roots)
        clock[0] += inspection.SOUND_SECONDS
    assert len(known._sound) == 1
