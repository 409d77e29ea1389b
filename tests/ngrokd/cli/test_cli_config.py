"""`ngrokd config`: looking at the configuration and changing it."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import tomli

from ngrokd import config
from ngrokd.cli.app import COMMANDS, invoke
from ngrokd.cli.config import config as config_group
from ngrokd.cli.editor import find_editor
from ngrokd.config.manual import commented_file, json_schema
from ngrokd.config.schema import schema
from ngrokd.errors import NgrokdError

Cli = Callable[..., Any]  # the fixture of conftest.py, which is no module to import from
CANARY = "2canaryCANARYcanary_0123456789"
TEN = """\
[api]
poll_interval = 30
keyfile = "/x"
timeout = "10x"
[net]
subnet = "10.107.0.5/16"
mtu = "1400"
level = "debug"
drain = 3s
[limtis]
[log]
level = "warn"
[http]
listen = "localhost"
"""


@pytest.fixture
def file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the fixture `cli` lets the default configuration be. Texts that `edit` keeps go there with it."""
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder / "config.toml"


def canned_editor(folder: Path, *steps: str) -> str:
    """An editor that does these, one a call, to the text of the file (as Python: `text` in and out)."""
    script = folder / "editor.py"
    steps_text = ",\n".join(repr(step) for step in steps)
    script.write_text(
        "import pathlib, sys\n"
        f"steps = [{steps_text}]\n"
        f"calls = pathlib.Path({str(folder / 'calls')!r})\n"
        "number = int(calls.read_text()) if calls.exists() else 0\n"
        "calls.write_text(str(number + 1))\n"
        "path = pathlib.Path(sys.argv[-1])\n"
        f"pathlib.Path({str(folder)!r}, f'seen{{number}}').write_bytes(path.read_bytes())\n"
        f"pathlib.Path({str(folder)!r}, 'place').write_text(str(path))\n"
        "space = {'text': path.read_bytes().decode(), 'sys': sys}\n"
        "exec(steps[number], space)\n"
        "path.write_bytes(space['text'].encode())\n"
    )
    return f"{sys.executable} {script}"


# Looking


def test_path_names_the_file_that_is_read(cli: Cli, folder: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = cli("config", "path")
    file.write_text("")
    (folder / "conf.d").mkdir()
    (folder / "conf.d" / "a.toml").write_text("")
    there = cli("config", "path")
    document = cli("config", "path", "--json").document()
    monkeypatch.setenv("NGROKD_CONFIG", "/by/variable.toml")

    assert (missing.code, missing.out) == (0, f"{file}\n")
    assert "ngrokd config init" in missing.err
    assert (there.out, there.err) == (f"{file}\n", "")
    assert document == {
        "schema": "ngrokd.config.path/1",
        "data": {"file": str(file), "exists": True, "files": [str(file), f"{folder}/conf.d/a.toml"]},
    }
    assert cli("config", "path").out == "/by/variable.toml\n"
    assert cli("config", "path", "-c", "/by/option.toml").out == "/by/option.toml\n"


def test_show_is_toml_of_all_that_holds(cli: Cli, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And says where from when asked; a secret is stars in every form."""
    monkeypatch.delenv("NGROKD_SOCKET")
    monkeypatch.setenv("NGROKD__NET__OFFLOAD", "false")
    file.write_text(f'[api]\nkey = "{CANARY}"\n[net]\nmtu = 1400\n')

    plain = cli("config", "show")
    origin = cli("config", "show", "--origin", "net", "--set", "net.drain=9s")
    changed = cli("config", "show", "--changed")
    document = cli("config", "show", "--json", "api.key", "net.mtu").document()

    shown = tomllib.loads(plain.out)
    assert {section: list(keys) for section, keys in shown.items()} == {
        section: list(leaves) for section, (_, leaves) in schema().items()
    }
    assert shown["api"]["key"] == "***"
    assert (shown["net"]["mtu"], shown["net"]["offload"]) == (1400, False)
    lines = {line.partition(" ")[0]: line for line in origin.out.splitlines()}
    assert re.fullmatch(rf"mtu = 1400 +# {re.escape(str(file))}:4", lines["mtu"])
    assert re.fullmatch(r"offload = false +# \$NGROKD__NET__OFFLOAD", lines["offload"])
    assert re.fullmatch(r'drain = "9s" +# --set net.drain', lines["drain"])
    assert re.fullmatch(r'mode = "auto" +# default', lines["mode"])
    assert changed.out == '[api]\nkey = "***"\n\n[net]\nmtu = 1400\noffload = false\n'
    assert document["schema"] == "ngrokd.config.show/1"
    assert document["data"]["settings"] == {"api": {"key": "***"}, "net": {"mtu": 1400}}
    assert document["data"]["origins"] == {"api.key": f"{file}:2", "net.mtu": f"{file}:4"}
    assert CANARY not in plain.out + origin.out + changed.out + json.dumps(document)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("net.mtu", "1400", 1400),
        ("api.poll_interval", "30s", "30s"),
        ("api.selectors", '["true"]', ["true"]),
        ("net.offload", "true", True),
        ("api.key", "***", "***"),
        ("http.listen", "127.0.0.1:8081", "127.0.0.1:8081"),
    ],
)
def test_get_prints_one_value(cli: Cli, file: Path, key: str, text: str, value: object) -> None:
    file.write_text(f'[api]\nkey = "{CANARY}"\n[net]\nmtu = 1400\n')

    assert cli("config", "get", key).out == f"{text}\n"
    document = cli("config", "--json", "get", key).document()
    assert document["schema"] == "ngrokd.config.get/1"
    assert document["data"]["value"] == value


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("get", "net.mtuu"), "there is no key 'net.mtuu' (did you mean 'net.mtu'?)"),
        (("get", "mtu"), "(did you mean 'net.mtu'?)"),
        (("get", "log.mtu"), "(did you mean 'net.mtu'?)"),
        (("get", "net."), "not a key: net.; a key is written as in net.mtu"),
        (("get", "net.mtu.x"), "net.mtu is no table"),
        (("set", "net.mtuu", "5"), "there is no key 'net.mtuu'"),
        (("set", "net.mtu"), "give a value"),
        (("set", "net.mtu", "--stdin", "5"), "give a value"),
        (("show", "nett"), "there is no section or key 'nett' (did you mean 'net'?)"),
        (("shw",), "No such command 'shw'"),
    ],
)
def test_a_wrong_command_line_is_2_and_names_the_nearest(
    cli: Cli, file: Path, arguments: tuple[str, ...], message: str
) -> None:
    outcome = cli("config", *arguments)

    assert outcome.code == 2
    assert message in outcome.err
    assert not file.exists()


def test_validate_names_ten_mistakes_with_their_lines(cli: Cli, file: Path) -> None:
    """A line each, and in JSON one by one."""
    file.write_text(TEN)

    text, document = cli("config", "validate"), cli("config", "validate", "--json")

    places = [2, 3, 4, 6, 7, 8, 9, 10, 12, 14]
    assert (text.code, document.code, text.out) == (78, 78, "")
    assert [int(re.findall(r"config\.toml:(\d+)", line)[0]) for line in text.err.splitlines()] == places
    error = document.document()["error"]
    assert [each["line"] for each in error["mistakes"]] == places
    assert [each["key"] for each in error["mistakes"]] == [
        "api.poll_interval",
        "api.keyfile",
        "api.timeout",
        "net.subnet",
        "net.mtu",
        "net.level",
        "net.drain",
        "limtis",
        "log.level",
        "http.listen",
    ]


def test_validate_says_ok_and_warns(cli: Cli, folder: Path, file: Path) -> None:
    nothing = cli("config", "validate")
    file.write_text(f'[api]\nkey = "{CANARY}"\n')
    file.chmod(0o644)
    fine = cli("config", "validate")
    (folder / "draft.toml").write_text("[net]\nmtu = 1\n")
    draft = cli("config", "validate", str(folder / "draft.toml"))

    assert (nothing.code, nothing.out) == (0, "there is no configuration file; all defaults hold\n")
    assert (fine.code, fine.out) == (0, f"{file}: ok\n")
    assert "chmod 600" in fine.err
    assert draft.code == 78
    assert f"{folder}/draft.toml:2: net.mtu:" in draft.err
    assert cli("config", "validate", "--json").document()["data"]["valid"] is True


def test_schema_is_the_one_that_is_shipped(cli: Cli) -> None:
    assert json.loads(cli("config", "schema").out) == json_schema()
    assert cli("config", "schema", "--json").document()["data"] == json_schema()


@pytest.mark.parametrize(
    ("incomplete", "found"),
    [("po", ["pool."]), ("pool.m", ["pool.max", "pool.max_age"]), ("x", []), ("log.l", ["log.level"])],
)
def test_keys_are_completed(incomplete: str, found: list[str]) -> None:
    """Section by section."""
    for name in ("get", "set", "unset"):
        [argument] = [each for each in config_group.commands[name].params if each.name == "key"]
        context = click.Context(config_group.commands[name])
        assert [item.value for item in argument.shell_complete(context, incomplete)] == found


# Changing


def test_init_writes_the_commented_file_once(cli: Cli, file: Path) -> None:
    printed = cli("config", "init", "--stdout")
    assert printed.out == commented_file()
    assert not file.exists()

    first, second = cli("config", "init"), cli("config", "init", "--json")

    assert (first.code, first.out) == (0, f"wrote {file}\n")
    assert file.read_text() == commented_file()
    assert second.code == 73
    assert second.document()["error"]["message"] == f"{file} exists already"
    assert cli("config", "validate").code == 0


def test_set_and_unset_change_one_line(cli: Cli, file: Path) -> None:
    """And say when it will count."""
    file.write_text(commented_file())

    change = cli("config", "set", "net.drain", "10s")

    line = commented_file().splitlines().index('#drain = "3s"') + 2
    assert (change.code, change.out) == (0, f'net.drain = "10s"  # {file}:{line}\n')
    assert change.err == "a running daemon takes it over\n"
    before, after = commented_file().splitlines(), file.read_text().splitlines()
    assert after == [*before[: line - 1], 'drain = "10s"', *before[line - 1 :]]
    assert "when the daemon starts the next time" in cli("config", "set", "net.mtu", "1400").err
    assert cli("config", "set", "net.mtu", "1400").out == f"net.mtu: nothing to change in {file}\n"

    assert cli("config", "unset", "net.mtu").out == "net.mtu = 0  # default\n"
    cli("config", "unset", "net.drain")
    assert file.read_text() == commented_file()
    assert cli("config", "unset", "net.drain").code == 0


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("net.mtu", "1400"), "mtu = 1400"),
        (("net.offload", "false"), "offload = false"),
        (("api.selectors", "a", "b"), 'selectors = ["a", "b"]'),
        (("api.selectors", "a"), 'selectors = ["a"]'),
        (("api.selectors", "['a', 'b']"), 'selectors = ["a", "b"]'),
        (("net.allow_sources", "[]"), "allow_sources = []"),
        (("http.listen", ""), 'listen = ""'),
        (("api.poll_interval", "1m30s"), 'poll_interval = "1m30s"'),
    ],
)
def test_set_takes_what_each_key_is_made_of(cli: Cli, file: Path, words: tuple[str, ...], line: str) -> None:
    section = words[0].partition(".")[0]

    assert cli("config", "set", *words).code == 0

    assert file.read_text() == f"[{section}]\n{line}\n"


def test_set_writes_nothing_that_would_be_wrong(cli: Cli, file: Path) -> None:
    """Neither the value nor what stands beside it."""
    file.write_text("[net]\nmtu = 1400\n")
    wrong = cli("config", "set", "net.mtu", "5")
    file.write_text("[net]\nmtuu = 1400\nmtu = 5\n[log]\nlevel = debug\n")
    beside = cli("config", "set", "net.mtu", "1400", "--json")

    assert (wrong.code, beside.code) == (78, 78)
    assert "net.mtu: expected an integer from 576 to 65535, or 0 for the best, got 5" in wrong.err
    error = beside.document()["error"]
    assert error["message"].startswith("nothing was written, because the whole would be wrong:\n")
    assert [(each["line"], each["key"]) for each in error["mistakes"]] == [
        (2, "net.mtuu"),
        (3, "net.mtu"),
        (5, "log.level"),
    ]
    assert file.read_text() == "[net]\nmtuu = 1400\nmtu = 5\n[log]\nlevel = debug\n"


def test_a_mistake_can_be_unset_and_set_right(cli: Cli, file: Path) -> None:
    file.write_text("[net]\nmtuu = 1400 # why\n")
    assert cli("config", "unset", "net.mtuu").code == 0
    assert file.read_text() == "[net]\n# why\n"

    file.write_text("[net]\nmtu = 5\n")
    assert cli("config", "set", "net.mtu", "1400").code == 0
    assert file.read_text() == "[net]\nmtu = 1400\n"


def test_set_says_what_goes_before_the_file(cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise somebody wonders for an hour why it has no effect."""
    (folder / "conf.d").mkdir()
    (folder / "conf.d" / "a.toml").write_text("[net]\nmtu = 1300\n")
    in_folder = cli("config", "set", "net.mtu", "1400")
    monkeypatch.setenv("NGROKD__NET__MTU", "1200")
    in_variable = cli("config", "set", "net.mtu", "1500", "--json").document()["data"]

    assert f"net.mtu is {folder}/conf.d/a.toml:2's, which goes before {folder}/config.toml" in in_folder.err
    assert in_folder.out == f"net.mtu = 1300  # {folder}/conf.d/a.toml:2\n"
    assert (in_variable["value"], in_variable["origin"], in_variable["effect"]) == (
        1200,
        "$NGROKD__NET__MTU",
        "restart",
    )


def test_what_was_written_is_said_as_it_was_written(cli: Cli, file: Path) -> None:
    """Not as we would have written it."""
    assert cli("config", "set", "limits.buffer", "5MB").out == f'limits.buffer = "5MB"  # {file}:2\n'
    assert cli("config", "set", "api.selectors", "a", "b").out == f'api.selectors = ["a", "b"]  # {file}:5\n'


def test_a_secret_comes_from_stdin_and_is_not_shown(
    cli: Cli, file: Path, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    (folder / "key").write_text(f"{CANARY}\n")
    with open(folder / "key") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        piped = cli("config", "set", "api.key", "--stdin")
    argument = cli("config", "set", "api.key", CANARY)
    wrong = cli("config", "set", "api.key", f"{CANARY} x")

    assert tomli.loads(file.read_text()) == {"api": {"key": CANARY}}
    assert piped.out == f'api.key = "***"  # {file}:2\n'
    assert "warning" not in piped.err
    assert "warning: an argument is visible" in argument.err
    assert wrong.code == 78
    assert CANARY not in piped.out + argument.out + argument.err + wrong.err


def test_edits_keep_mode_and_link(cli: Cli, folder: Path, file: Path) -> None:
    (folder / "real.toml").write_text("[net]\nmtu = 1300\n")
    (folder / "real.toml").chmod(0o600)
    file.symlink_to("real.toml")

    assert cli("config", "set", "net.mtu", "1400").code == 0

    assert file.is_symlink()
    assert stat.S_IMODE((folder / "real.toml").stat().st_mode) == 0o600
    assert (folder / "real.toml").read_text() == "[net]\nmtu = 1400\n"


# The editor


def test_edit_saves_what_is_right(cli: Cli, folder: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy lies in a private folder and is gone afterwards. VISUAL goes before EDITOR."""
    file.write_text("[net]\nmtu = 1300\n")
    monkeypatch.setenv("EDITOR", "/nobody")
    monkeypatch.setenv("VISUAL", canned_editor(folder, "text = text.replace('1300', '1400 # why')"))

    outcome = cli("config", "edit")

    assert (outcome.code, outcome.out) == (0, f"{file}: saved\n")
    assert file.read_text() == "[net]\nmtu = 1400 # why\n"
    place = Path((folder / "place").read_text())
    assert place.name == "config.toml"
    assert not place.parent.exists()


def test_edit_opens_again_with_what_is_wrong(
    cli: Cli, folder: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a comment at the top, with the lines as the editor counts them, and gone when it is saved."""
    file.write_text("# mine\n[net]\nmtu = 1300\n")
    monkeypatch.setenv(
        "EDITOR",
        canned_editor(
            folder,
            "text += 'mtuu = 1\\ndrain = 3\\n'",
            "text = text.replace('mtuu = 1\\n', '')",
            "text = text.replace('drain = 3', 'drain = \"3s\"')",
        ),
    )

    outcome = cli("config", "edit", "--json")

    assert outcome.document() == {"schema": "ngrokd.config.edit/1", "data": {"file": str(file), "changed": True}}
    assert file.read_text() == '# mine\n[net]\nmtu = 1300\ndrain = "3s"\n'
    second = (folder / "seen1").read_text().splitlines()
    assert second[0].startswith("#! This was not saved")
    for header in second[1:3]:
        found = re.fullmatch(r"#! line (\d+): net\.(\w+): .*", header)
        assert found is not None
        assert second[int(found[1]) - 1].startswith(f"{found[2]} = ")
    assert second[3:] == ["# mine", "[net]", "mtu = 1300", "mtuu = 1", "drain = 3"]
    third = (folder / "seen2").read_text().splitlines()
    assert third[1:] == [
        "#! line 6: net.drain: " + third[1].partition("drain: ")[2],
        "# mine",
        "[net]",
        "mtu = 1300",
        "drain = 3",
    ]


def test_an_edit_that_is_left_wrong_is_kept_and_not_saved(
    cli: Cli, folder: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text("[net]\nmtu = 1300\n")
    monkeypatch.setenv("EDITOR", canned_editor(folder, "text += 'mtuu = 1\\n'", "pass"))

    outcome = cli("config", "edit")

    assert outcome.code == 78
    assert f"{file}:3: net.mtuu: unknown key" in outcome.err
    kept = re.findall(r"your text is in (\S+)", outcome.err)[0]
    assert "mtuu = 1" in Path(kept).read_text()
    assert file.read_text() == "[net]\nmtu = 1300\n"


@pytest.mark.parametrize(
    ("steps", "code", "message"),
    [
        (["pass"], 0, "nothing changed"),
        (["text = ''"], 0, "nothing changed"),
        (["text = '[net]\\n'; sys.exit(3)"], 70, "ended with 3; nothing was saved"),
    ],
)
def test_an_edit_that_is_given_up_changes_nothing(
    cli: Cli, folder: Path, file: Path, monkeypatch: pytest.MonkeyPatch, steps: list[str], code: int, message: str
) -> None:
    file.write_text("[net]\nmtu = 1300\n")
    monkeypatch.setenv("EDITOR", canned_editor(folder, *steps))

    outcome = cli("config", "edit")

    assert outcome.code == code
    assert message in outcome.out + outcome.err
    assert file.read_text() == "[net]\nmtu = 1300\n"


def test_a_change_by_others_during_an_edit_is_not_lost(
    cli: Cli, folder: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text("[net]\nmtu = 1300\n")
    step = f"open({str(file)!r}, 'w').write('[net]\\nmtu = 1200\\n'); text = text.replace('1300', '1400')"
    monkeypatch.setenv("EDITOR", canned_editor(folder, step))

    outcome = cli("config", "edit")

    assert outcome.code == 75
    kept = re.findall(r"your text is in (\S+)", outcome.err)[0]
    assert Path(kept).read_text() == "[net]\nmtu = 1400\n"
    assert file.read_text() == "[net]\nmtu = 1200\n"


def test_a_missing_file_is_edited_from_the_commented_one(
    cli: Cli, folder: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDITOR", canned_editor(folder, "text = text.replace('#mtu = 0', 'mtu = 1400')"))

    assert cli("config", "edit").code == 0

    assert (folder / "seen0").read_text() == commented_file()
    assert config.load(None, {}).net.mtu == 1400


def test_the_editor_is_found() -> None:
    assert find_editor({"VISUAL": "code --wait", "EDITOR": "vi"}) == ["code", "--wait"]
    assert find_editor({"VISUAL": " ", "EDITOR": "ed"}) == ["ed"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shutil.which", lambda _name: None)
        with pytest.raises(NgrokdError, match="no editor"):
            find_editor({})


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
@pytest.mark.parametrize("words", [("set", "net.mtu", "1400"), ("edit",), ("init",), ("show",)])
def test_who_may_not_is_told_to_use_sudo(cli: Cli, folder: Path, file: Path, words: tuple[str, ...]) -> None:
    """Before the editor opens, too. In a child, which has all modules already, since it may read none then."""
    file.write_text("")
    cli("config", *words, "--help")
    cli("config", "set", "net.mtu", "1400")
    errors = os.open(folder / "errors", os.O_CREAT | os.O_WRONLY)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            sys.stderr = os.fdopen(errors, "w")
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            code = invoke("ngrokd", ["--config", str(file), "config", *words])
            sys.stderr.flush()
        finally:
            os._exit(code)
    os.close(errors)

    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == (78 if words == ("show",) else 77)
    assert "sudo" in (folder / "errors").read_text()


def test_config_imports_no_trio(cli: Cli, file: Path) -> None:
    """What looks at files needs no event loop; and `status` needs no editor."""
    file.write_text("")
    program = (
        "import sys; from ngrokd.cli.app import invoke; invoke('ngrokd', sys.argv[1:])\n"
        "print(sorted({'trio', 'ssl', 'cryptography', 'yaml', 'rich'} & set(sys.modules)))"
    )

    for words in (["show"], ["set", "net.mtu", "1400"], ["validate"]):
        done = subprocess.run(
            [sys.executable, "-c", program, "--config", str(file), "config", *words],
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.splitlines()[-1] == "[]"
    assert "config" in COMMANDS
