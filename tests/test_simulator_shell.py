"""The simulated phone's shell: its grammar, its programs, and what it does with nonsense."""

import asyncio
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from phones.simulator import syntax
from phones.simulator.patterns import BadPattern, compile_pattern
from tests.simulated_phone import TestPhone, Typist, open_phone


@pytest.fixture
async def phone(tmp_path: Path) -> TestPhone:
    return await open_phone(tmp_path / "phone")


@pytest.mark.parametrize(
    ("command", "out"),
    [
        ("echo hello   world", "hello world\n"),
        ("echo 'a  b' \"c  $HOME\" d\\ e", "a  b c  / d e\n"),
        ("echo one; echo two", "one\ntwo\n"),
        ("true && echo yes || echo no", "yes\n"),
        ("false && echo yes || echo no", "no\n"),
        ("! false && echo turned", "turned\n"),
        ("echo a | cat | cat", "a\n"),
        ("x=5; echo $x ${x} ${y:-none}", "5 5 none\n"),
        ("X=1 env | grep ^X=", "X=1\n"),
        ("X=1 true; echo [$X]", "[]\n"),
        ("export A=b; env | grep ^A=", "A=b\n"),
        ("echo $(echo in; echo ner) `echo back`", "in ner back\n"),
        ("false; echo $?", "1\n"),
        ("(cd /data; pwd); pwd", "/data\n/\n"),
        ("{ cd /data; }; pwd", "/data\n"),
        ("echo a # not this", "a\n"),
        ("echo a#b '#c'", "a#b #c\n"),
        ("echo a > /sdcard/f; echo b >> /sdcard/f; cat < /sdcard/f", "a\nb\n"),
        ("cat /missing 2>&1", "cat: /missing: No such file or directory\n"),
        ("cat /missing 2>/dev/null; echo $?", "1\n"),
        ("echo lost >/dev/null; cat /dev/null; echo kept", "kept\n"),
        ("exec echo once; echo never", "once\n"),
        ("echo a \\\n b", "a b\n"),
        ("echo first & echo second; wait", "second\nfirst\n"),
        ("sh -c 'echo inner; exit 3'; echo $?", "inner\n3\n"),
        ("echo 'echo from a script $1' > /sdcard/s.sh; sh /sdcard/s.sh x", "from a script x\n"),
        (
            "touch /sdcard/a.png /sdcard/b.png; cd /sdcard; echo *.png '*.png' *.none",
            "a.png b.png *.png *.none\n",
        ),
        ("v='a   b'; echo $v; echo \"$v\"", "a b\na   b\n"),
        ("/system/bin/echo by path", "by path\n"),
        ("export ANDROID_LOG_TAGS=\"''\"; exec logcat -c; echo never", ""),
        ("eval 'echo evaluated'", "evaluated\n"),
        ("command -v ls; which getprop", "/system/bin/ls\n/system/bin/getprop\n"),
    ],
)
async def test_the_grammar_means_what_it_means_in_sh(phone: TestPhone, command: str, out: str) -> None:
    said = await phone.sh(command)
    assert (said.out, said.err) == (out, "")


@pytest.mark.parametrize(
    ("command", "code", "err"),
    [
        ("x", 127, "sh: x: not found\n"),
        ("./x", 127, "sh: ./x: not found\n"),
        ("/data", 126, "sh: /data: can't execute: Permission denied\n"),
        ("echo 'open", 1, "sh: syntax error: no closing quote\n"),
        ("echo a; ; echo b", 1, "sh: syntax error: unexpected ';'\n"),
        ("echo $(echo", 1, "sh: syntax error: unexpected EOF\n"),
        ("| cat", 1, "sh: syntax error: unexpected '|'\n"),
        ("cat <<E", 1, "sh: syntax error: unexpected '<'\n"),
        ("exit 300", 44, ""),
        ("exit 7; echo never", 7, ""),
        ("cd /missing", 2, "sh: cd: /missing: No such file or directory\n"),
        ("echo a > /system/x", 1, "sh: can't create /system/x: Read-only file system\n"),
        ("cat < /missing", 1, "sh: can't open /missing: No such file or directory\n"),
        ("echo ${a b}", 1, "sh: ${a b}: bad substitution\n"),
        ("ls -Q", 1, "ls: Unknown option 'Q'\n"),
    ],
)
async def test_what_goes_wrong_is_told_as_sh_tells_it(
    phone: TestPhone, command: str, code: int, err: str
) -> None:
    said = await phone.sh(command)
    assert (said.code, said.err) == (code, err)


async def test_no_nesting_and_no_recursion_brings_the_shell_down(phone: TestPhone) -> None:
    deep = await phone.sh("echo " + "$(echo " * 500 + "x" + ")" * 500)
    assert (deep.code, deep.err) == (1, "sh: syntax error: nested too deeply\n")
    await phone.sh(
        "echo 'sh /sdcard/loop' > /sdcard/loop; echo 'sh /sdcard/fork & sh /sdcard/fork' > /sdcard/fork"
    )
    loop = await phone.sh("sh /sdcard/loop")
    assert (loop.code, loop.err) == (1, "sh: too many nested shells\n")
    fork = await phone.sh("sh /sdcard/fork")
    assert "can't fork - try again" in fork.err
    assert (await phone.sh("echo alive")).out == "alive\n"


async def test_a_pipe_ends_its_writer_when_the_reader_has_left(phone: TestPhone) -> None:
    writer = asyncio.create_task(phone.sh("logcat | head -n 2"))
    for _ in range(40):
        await asyncio.sleep(0.01)
        phone.log.write("Test", "another line")
        if writer.done():
            break
    assert (await writer).out.count("\n") == 2


async def test_ending_a_shell_ends_what_runs_in_it(phone: TestPhone) -> None:
    running = asyncio.create_task(phone.shell.run("sleep 1000 | cat & sleep 1000", Typist()))
    await asyncio.sleep(0.05)
    running.cancel()
    await asyncio.wait({running}, timeout=2)
    assert running.cancelled()
    others = asyncio.all_tasks() - {asyncio.current_task()}
    assert not [task for task in others if "Job" in repr(task.get_coro())]


async def test_a_person_is_prompted_and_sees_what_they_type(phone: TestPhone) -> None:
    person = Typist(stays=True)
    session = asyncio.create_task(phone.shell.interact(person, echo=True))
    await person.shown(b"sim:/ $ ")
    person.type(b"ecXho hi\x7f\x7f\x7f\x7f\x7f\x7fho hi\r")
    await person.shown(b"hi\r\nsim:/ $ ")
    person.type(b"cd /sdcard\r")
    await person.shown(b"sim:/sdcard $ ")
    person.type(b"sleep 1000\r")
    await person.shown(b"sleep 1000\r\n")
    person.type(b"\x03")
    await person.shown(b"^C\r\nsim:/sdcard $ ")
    person.type(b"echo code $?\rexit 5\r")
    await person.shown(b"code 130\r\n")
    assert await asyncio.wait_for(session, 5) == 5
    assert person.err == b""


async def test_a_script_on_the_input_runs_without_a_prompt(phone: TestPhone) -> None:
    script = Typist(b"x=1\necho $x\nread_nothing\ncat\nrest of\nthe input")
    assert await phone.shell.interact(script, echo=False) == 0
    assert script.out == b"1\nrest of\nthe input"
    assert script.err == b"sh: read_nothing: not found\n"


async def test_a_terminal_that_ends_ends_the_session_with_the_last_code(phone: TestPhone) -> None:
    assert await phone.shell.interact(Typist(b"false\n"), echo=False) == 1
    assert await phone.shell.interact(Typist(b"true\r\x04"), echo=True) == 0


@pytest.mark.parametrize(
    ("command", "code", "out"),
    [
        ("printf '%s-%d\\n' a 5 b 6", 0, "a-5\nb-6\n"),
        ("printf 'a\\tb\\n'", 0, "a\tb\n"),
        ("echo -n a; echo -e 'b\\nc'", 0, "ab\nc\n"),
        ("printf '1\\n2\\n3\\n' | head -n 2", 0, "1\n2\n"),
        ("printf '1\\n2\\n3\\n' | head -1", 0, "1\n"),
        ("printf 'abcdef' | head -c 3", 0, "abc"),
        ("printf '1\\n2\\n3\\n' | tail -n 2", 0, "2\n3\n"),
        ("printf '1\\n2\\n3\\n' | tail -n +2", 0, "2\n3\n"),
        ("printf 'abcdef' | tail -c 2", 0, "ef"),
        ("printf 'a b\\nc\\n' | wc", 0, "2 3 6\n"),
        ("printf 'a b\\nc\\n' | wc -l", 0, "2\n"),
        ("printf 'Ab\\ncd\\n' | grep -i ab", 0, "Ab\n"),
        ("printf 'ab\\ncd\\n' | grep -v ab", 0, "cd\n"),
        ("printf 'ab\\n' | grep -q zz", 1, ""),
        ("printf 'ab\\nb\\n' | grep -c b", 0, "2\n"),
        ("printf 'ab\\nb\\n' | grep -n '^b'", 0, "2:b\n"),
        ("printf 'a.c\\nabc\\n' | grep -F a.c", 0, "a.c\n"),
        ("printf 'aab\\nc\\n' | grep -E '(a|x)+b$'", 0, "aab\n"),
        ("printf 'b\\na\\n' | sort", 0, "a\nb\n"),
        ("echo kept | tee /sdcard/t; cat /sdcard/t", 0, "kept\nkept\n"),
        ("true", 0, ""),
        ("false", 1, ""),
        ("pwd", 0, "/\n"),
        ("whoami", 0, "shell\n"),
        ("id -u", 0, "2000\n"),
        ("uname", 0, "Linux\n"),
        ("date +%Y-%m-%d", 0, "2026-03-05\n"),
        ("getprop ro.build.version.release", 0, "12\n"),
        ("getprop missing", 0, "\n"),
        ("setprop debug.x 1; getprop debug.x", 0, "1\n"),
        ("test -d /sdcard && [ 1 -lt 2 ] && echo right", 0, "right\n"),
        ("[ a = b ]", 1, ""),
        ("cat /proc/uptime | wc -l", 0, "1\n"),
        ("grep MemTotal /proc/meminfo", 0, "MemTotal:        3145728 kB\n"),
        ("settings get system nothing", 0, "null\n"),
        ("settings put system x 'a b'; settings get system x", 0, "a b\n"),
        ("settings put system x y; settings delete system x", 0, "Deleted 1 rows\n"),
        ("settings list secure | grep -c android_id", 0, "1\n"),
        ("pidof system_server", 0, "1421\n"),
        ("pidof nobody", 1, ""),
        ("ps -A -o NAME | grep -c zygote", 0, "1\n"),
        ("uptime | grep -c up", 0, "1\n"),
        ("free | grep -c Mem", 0, "1\n"),
        ("df /data | wc -l", 0, "2\n"),
        ("sleep 0", 0, ""),
        ("sha256sum /dev/null | head -c 8", 0, "e3b0c442"),
    ],
)  # fmt: skip
async def test_programs_do_what_their_namesakes_do(
    phone: TestPhone, command: str, code: int, out: str
) -> None:
    said = await phone.sh(command)
    assert (said.code, said.out, said.err) == (code, out, "")


async def test_files_are_made_listed_moved_and_removed(phone: TestPhone) -> None:
    assert (
        await phone.sh("mkdir -p /sdcard/a/b && cd /sdcard/a && echo text > f && cp f b/g && mv f h")
    ).code == 0
    assert (await phone.sh("ls /sdcard/a; cat /sdcard/a/b/g")).out == "b\nh\ntext\n"
    listed = (await phone.sh("ls -la /sdcard/a")).out.splitlines()
    assert listed[0].startswith("total ")
    assert [line.split()[-1] for line in listed[1:]] == [".", "..", "b", "h"]
    assert listed[-1].split()[:5] == ["-rw-r--r--", "1", "shell", "shell", "5"]
    assert (await phone.sh("cp -r /sdcard/a /sdcard/c; cat /sdcard/c/b/g")).out == "text\n"
    assert (await phone.sh("rm /sdcard/c")).err == "rm: /sdcard/c: is a directory\n"
    assert (await phone.sh("rm -r /sdcard/c; ls -d /sdcard/c")).code == 1
    assert (await phone.sh("rm -f /sdcard/never; touch /sdcard/a/new; ls /sdcard/a")).out == "b\nh\nnew\n"
    assert (await phone.sh("chmod 755 /sdcard/a/new; stat -c %a /sdcard/a/new")).out == "755\n"
    assert (
        await phone.sh("echo 'echo ran $1' > /sdcard/a/new; chmod +x /sdcard/a/new; /sdcard/a/new it")
    ).out == "ran it\n"


@pytest.mark.parametrize(
    ("command", "err"),
    [
        ("ls /none", "ls: /none: No such file or directory"),
        ("mkdir /sdcard", "mkdir: '/sdcard': File exists"),
        ("mkdir /sdcard/a/b", "mkdir: '/sdcard/a/b': No such file or directory"),
        ("rm /none", "rm: /none: No such file or directory"),
        ("mv /none /sdcard/x", "mv: bad '/none': No such file or directory"),
        ("cp /none /sdcard/x", "cp: bad '/none': No such file or directory"),
        ("touch /system/x", "touch: '/system/x': Read-only file system"),
        ("rmdir /none", "rmdir: '/none': No such file or directory"),
        ("head /none", "head: /none: No such file or directory"),
        ("grep x /none", "grep: /none: No such file or directory"),
        (
            "setprop ro.build.type x",
            "setprop: failed to set property 'ro.build.type' to 'x': read-only property",
        ),
        ("settings get nowhere x", "Error: Invalid namespace 'nowhere'"),
        ("cmd nothing", "cmd: Can't find service: nothing"),
        ("logcat -b nothing", "logcat: unknown buffer nothing"),
        ("grep '[' /dev/null", "grep: bad regex '[': unmatched ["),
        ("sleep x", "sleep: Unknown suffix 'x'"),
        ("input tap 1", "Error: Invalid arguments for command: tap"),
        ("input keyevent KEYCODE_NONSENSE", "Error: Unknown keycode: KEYCODE_NONSENSE"),
        ("wm size big", "Error: size must be given as WxH"),
        ("wm density 10", "Error: density must be >= 72"),
        ("screencap /system/x.png", "Error opening file: /system/x.png (Read-only file system)"),
        ("am nothing", "Unknown command: nothing"),
        ("pm nothing", "Unknown command: nothing"),
    ],
)
async def test_programs_complain_as_their_namesakes_do(phone: TestPhone, command: str, err: str) -> None:
    said = await phone.sh(command)
    assert said.code != 0
    assert said.err.splitlines()[0] == err


async def test_the_log_is_filtered_formatted_cleared_and_followed(phone: TestPhone) -> None:
    assert (await phone.sh("logcat -c")).out == ""
    assert (await phone.sh("log -p w -t Alpha first; log -t Beta second; logcat -d")).out == (
        "--------- beginning of main\n"
        "03-05 14:07:30.000  2749  2749 W Alpha   : first\n"
        "03-05 14:07:30.000  2749  2749 I Beta    : second\n"
    )
    assert (await phone.sh("logcat -d -v brief -s Alpha")).out.splitlines()[1:] == [
        "W/Alpha   ( 2749): first"
    ]
    assert (await phone.sh("logcat -d -v tag Beta:S *:V")).out.splitlines()[1:] == ["W/Alpha   : first"]
    assert (await phone.sh("logcat -d -v raw *:W")).out.splitlines()[1:] == ["first"]
    assert (await phone.sh("logcat -t 1 -v raw")).out.splitlines()[1:] == ["second"]
    assert (await phone.sh("logcat -d -b system")).out == ""
    reader = Typist()
    following = asyncio.create_task(phone.shell.run("logcat -v raw", reader))
    await reader.shown(b"second\n")
    phone.log.write("Gamma", "third")
    await reader.shown(b"third\n")
    following.cancel()
    await asyncio.wait({following})


async def test_settings_properties_and_the_screen_size_survive_a_restart(tmp_path: Path) -> None:
    first = await open_phone(tmp_path)
    await first.sh(
        "settings put global g 1; setprop persist.x 2; setprop debug.x 3; wm size 600x1000; wm density 240;"
        "echo kept > /sdcard/file"
    )
    second = await open_phone(tmp_path)
    assert (
        await second.sh("settings get global g; getprop persist.x; getprop debug.x; cat /sdcard/file")
    ).out == ("1\n2\n\nkept\n")
    assert (await second.sh("wm size; wm density")).out == (
        "Physical size: 720x1280\nOverride size: 600x1000\nPhysical density: 320\nOverride density: 240\n"
    )
    assert (await second.sh("wm size reset; wm density reset; wm size; wm density")).out == (
        "Physical size: 720x1280\nPhysical density: 320\n"
    )


async def test_nothing_leads_out_of_the_phone(phone: TestPhone, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("host")
    for path in ("/../../../secret", f"{tmp_path}/secret", "../secret", "/sdcard/../../../../../secret"):
        for command in (f"cat {path}", f"cat < {path}", f"ls {path}", f"cp {path} /sdcard/x", f"sh {path}"):
            said = await phone.sh(command)
            assert said.code != 0
            assert "host" not in said.out
        await phone.sh(f"echo broken > {path}; rm -rf {path}; mv /sdcard/Download {path}; chmod 777 {path}")
    assert (tmp_path / "secret").read_text() == "host"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["phone", "secret"]


async def test_a_cut_redirect_leaves_no_half_a_file(phone: TestPhone) -> None:
    await phone.sh("echo whole > /sdcard/f")
    running = asyncio.create_task(phone.shell.run("{ echo half; sleep 1000; } > /sdcard/f", Typist()))
    await asyncio.sleep(0.1)
    running.cancel()
    await asyncio.wait({running})
    assert (await phone.sh("cat /sdcard/f")).out == "whole\n"
    assert not [task for task in asyncio.all_tasks() if "FileSink" in repr(task.get_coro())]


_WORDS = """
    echo cat ls rm mv cp mkdir touch head tail wc grep pwd cd id env getprop setprop wm input am pm cmd
    dumpsys settings logcat -d ps df free date printf exit sh -c export sleep 0 test [ ] /sdcard /sdcard/*
    a=b $a $? $( ) ` ' " \\ ; & | && || > >> < 2>&1 { } ( ) -l -n 1 -r -f -S install list packages tap 5
    text keyevent 3 size 300x400 %s %d *:S stat chmod 755 sort tee screencap -p start -n force-stop kill
    monkey ! # = - -- é 谢 \x00 \x07
"""
_words = st.sampled_from([*_WORDS.split(), "\n"])
_lines = st.one_of(
    st.lists(_words, max_size=14).map(" ".join),
    st.lists(_words, max_size=14).map("".join),
    st.text(max_size=60),
)


async def test_no_command_line_makes_the_shell_raise(phone: TestPhone) -> None:
    lines: list[str] = []

    @settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(_lines)
    def collect(line: str) -> None:
        lines.append(line)

    collect()
    for line in lines:
        terminal = Typist(b"typed\n")
        try:
            async with asyncio.timeout(1):
                assert 0 <= await phone.shell.run(line, terminal) <= 255, line
        except TimeoutError:
            # These wait for what never comes.
            assert any(waiting in line for waiting in ("logcat", "sleep")), line
    assert (await phone.sh("echo alive")).out == "alive\n"


@settings(max_examples=300, deadline=None)
@given(
    st.text(alphabet="ab()[]*+?|^$.\\-:é", max_size=20), st.text(alphabet="abé", max_size=30), st.booleans()
)
def test_no_pattern_makes_grep_raise(pattern: str, line: str, extended: bool) -> None:
    try:
        compile_pattern(pattern, extended=extended, ignore_case=False).found_in(line)
    except BadPattern as fault:
        assert str(fault)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="ab", max_size=6), st.text(alphabet="ab", max_size=12))
def test_patterns_agree_with_the_standard_ones(text: str, line: str) -> None:
    some = text or "a"
    for pattern in (f"^{text}", f"{text}$", f"({some})+b", f"[a]{text}|b?({some})*", f"{text}.*a"):
        found = compile_pattern(pattern, extended=True, ignore_case=False).found_in(line)
        assert found == bool(re.search(pattern, line)), pattern


def test_a_hostile_pattern_takes_linear_time() -> None:
    pattern = compile_pattern("(a*)*(a|aa)+(x+x+)+y", extended=True, ignore_case=False)
    assert not pattern.found_in("a" * 3000 + "x" * 3000)


@settings(max_examples=300, deadline=None)
@given(_lines)
def test_every_line_is_read_or_refused(line: str) -> None:
    try:
        syntax.parse(line)
    except syntax.ShellSyntaxError as fault:
        assert str(fault)
