"""Settings: the environment before the file, the file before the defaults; and the sentences where one is wrong."""

from pathlib import Path

import pytest

from forkypig.daemon.home import Home
from forkypig.daemon.settings import Settings, load, variable
from forkypig.errors import ForkyError, InvalidRequest, NotFound
from forkypig.sdk import config


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    monkeypatch.setenv("FORKY_HOME", str(tmp_path))
    for name in Settings.model_fields:
        if name != "home":
            monkeypatch.delenv(variable(name), raising=False)
    return Home(tmp_path)


def test_where_each_value_comes_from(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    home.config_file.write_text("# of ours\nshells = 3 # two are few\npack_after_s = 5\n")
    monkeypatch.setenv("FORKY_PACK_AFTER_S", "7.5")
    found = {each.name: each for each in config.settings(home)}
    assert "home" not in found
    assert (found["shells"].value, found["shells"].source, found["shells"].default) == (3, "file", 1)
    assert (found["pack_after_s"].value, found["pack_after_s"].source) == (7.5, "environment")
    assert (found["mtu"].value, found["mtu"].source) == (1500, "default")
    settings = load()  # what the daemons see is the same
    assert (settings.shells, settings.pack_after_s, settings.mtu) == (3, 7.5, 1500)
    assert all(getattr(settings, name) == each.value for name, each in found.items())


def test_what_is_set_keeps_comments_and_types(home: Home) -> None:
    home.config_file.write_text("# of ours\nshells = 3 # two are few\n")
    assert config.put(home, "pack_in_background", "no").value is False
    config.put(home, "shells", "4")
    config.put(home, "log_level", "DEBUG")
    config.put(home, "metrics", "127.0.0.1:9464")
    assert home.config_file.read_text().startswith("# of ours\nshells = 4 # two are few\n")
    assert home.config_file.stat().st_mode & 0o777 == 0o600
    settings = load()
    assert (settings.pack_in_background, settings.shells, settings.log_level) == (False, 4, "debug")
    assert config.drop(home, "shells").source == "default"
    assert config.drop(home, "shells").value == 1
    assert [path.name for path in home.home.iterdir()] == ["config.toml"]


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("shells", "many", "shells can't be «many»: input should be a valid integer"),
        ("shells", "-1", "greater than or equal to 0"),
        ("accelerator", "hvf", "input should be 'auto', 'kvm' or 'tcg'"),
        ("metrics", "::1:9464", "metrics can't be «::1:9464»: it is HOST:PORT, as in"),
        ("pack_in_background", "maybe", "valid boolean"),
        ("shels", "1", "there is no setting «shels»: `forky config ls`"),
        ("home", "/tmp", "set the variable FORKY_HOME"),
        ("a/../b", "1", "no setting"),
    ],
)
def test_what_is_refused_changes_nothing(home: Home, name: str, value: str, why: str) -> None:
    home.config_file.write_text("shells = 2\n")
    with pytest.raises((InvalidRequest, NotFound), match=r".") as refused:
        config.put(home, name, value)
    assert why in str(refused.value)
    assert home.config_file.read_text() == "shells = 2\n"


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("shells = 'x'\n", "shells in {file}: input should be a valid integer"),
        ("shels = 1\n", "shels in {file}: there is no such setting"),
        ("shells = \n", "{file} is not TOML"),
        ("home = '/x'\n", "home in {file}: a home's file can't move it"),
        ("metrics = '9464'\n", "metrics in {file}: it is HOST:PORT"),
    ],
)
def test_a_file_that_is_wrong_is_named(home: Home, content: str, why: str) -> None:
    home.config_file.write_text(content)
    with pytest.raises(InvalidRequest) as refused:
        load()
    assert str(refused.value).startswith(why.format(file=home.config_file))


def test_what_does_not_belong_there_can_be_taken_out(home: Home) -> None:
    home.config_file.write_text("shels = 1\nmtu = 1400\n")
    config.drop(home, "shels")
    assert home.config_file.read_text() == "mtu = 1400\n"


def test_a_variable_that_is_wrong_is_named(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORKY_MTU", "big")
    with pytest.raises(ForkyError, match=r"^FORKY_MTU: input should be a valid integer"):
        load()


def test_the_database_by_its_variable_and_in_the_file(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    config.put(home, "database_url", "postgresql://db/forky")
    assert load().database_url == "postgresql://db/forky"
    monkeypatch.setenv("FORKY_DATABASE", "postgresql://other/forky")
    found = config.get(home, "database_url")
    assert (found.variable, found.source, found.value) == ("FORKY_DATABASE", "environment", load().database_url)


def test_passwords_are_not_shown() -> None:
    shown = config.Setting("x", "FORKY_X", "postgresql://me:secret@db/forky", "file", "").shown
    assert shown == "postgresql://me:…@db/forky"


def test_every_setting_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs/configuration.md").read_text()
    assert [name for name in Settings.model_fields if f"| `{name}` |" not in text and name != "home"] == []
