//! Streams and terminals.

use anyhow::{Result, ensure};

use super::{Case, Setting, case};
use crate::command::Input;
use crate::ctr::PROBE;
use crate::pattern::{Pattern, compare};
use crate::terminal::Terminal;

/// How much goes through a stream where volume matters.
const VOLUME: u64 = 100 << 20;

pub fn cases() -> Vec<Case> {
    vec![
        case(
            "100 MiB pass through a container byte for byte",
            through_a_container,
        ),
        case(
            "stdout and stderr stay apart, 100 MiB byte for byte",
            two_outputs,
        )
        .in_debian(),
        case(
            "binary input of any length ends where it ends",
            short_inputs,
        ),
        case(
            "a container that does not read does not hang its client",
            unread_input,
        ),
        case(
            "output can be opened by its name, by any user",
            output_by_name,
        ),
        case(
            "a terminal has its size, follows a resize and passes ^C",
            terminal,
        ),
        case(
            "a terminal's exit code arrives and its lines end as a terminal's do",
            terminal_end,
        ),
    ]
}

fn through_a_container(setting: &Setting) -> Result<()> {
    let done = setting
        .container()
        .input(Input::From(Box::new(Pattern::new(3, VOLUME))))
        .spawn(&["cat"])?
        .client
        .finish_within(crate::command::DEADLINE * 3)?
        .exits_with(0)?;
    compare("stdout", &done.stdout, 3, VOLUME)?;
    ensure!(done.stderr.is_empty(), "{}", done.err());
    Ok(())
}

fn two_outputs(setting: &Setting) -> Result<()> {
    let each = VOLUME / 2;
    let done = setting
        .container()
        .probe()?
        .spawn(&[PROBE, "probe", "stream", &each.to_string()])?
        .client
        .finish_within(crate::command::DEADLINE * 3)?
        .exits_with(0)?;
    compare("stdout", &done.stdout, 1, each)?;
    compare("stderr", &done.stderr, 2, each)
}

fn short_inputs(setting: &Setting) -> Result<()> {
    let container = setting.container().detach(&["sleep", "1000"])?;
    // The count says that the end of the input was seen, not only its bytes.
    let script = "echo ready; tee /dev/stderr | wc -c";
    for length in [0, 1, 4095, 4096, 65_537, 200_000] {
        let mut exec = container.spawn_exec(&[], Input::Open, &["sh", "-c", script])?;
        // `ctr` forgets to close the input when it ends before the process has started.
        exec.expect("ready")?;
        exec.write(&Pattern::new(4, length).bytes()?)?;
        exec.close_stdin();
        let done = exec.finish()?.exits_with(0)?;
        ensure!(
            done.out() == format!("ready\n{length}\n"),
            "{length} bytes were sent: {done}"
        );
        compare("the input", &done.stderr, 4, length)?;
    }
    Ok(())
}

fn unread_input(setting: &Setting) -> Result<()> {
    let input = Input::From(Box::new(Pattern::new(5, 10 << 20)));
    let done = setting
        .container()
        .input(input)
        .run(&["echo", "done"])?
        .exits_with(0)?;
    ensure!(done.out() == "done\n", "{done}");
    // Nobody closes this input, and still the container's end is the client's end.
    let started = setting
        .container()
        .input(Input::Open)
        .spawn(&["echo", "done"])?;
    started.client.expect("done")?;
    started.finish()?.succeeds()?;
    Ok(())
}

fn output_by_name(setting: &Setting) -> Result<()> {
    let script = "echo out > /dev/stdout; echo err > /dev/stderr";
    for user in ["0:0", "1234:1234"] {
        let done = setting
            .container()
            .flags(&["--user", user])
            .run(&["sh", "-c", script])?
            .exits_with(0)?;
        ensure!(
            done.out() == "out\n" && done.err() == "err\n",
            "as {user}: {done}"
        );
    }
    Ok(())
}

fn terminal(setting: &Setting) -> Result<()> {
    let script = "trap 'echo resized-to-$(stty size)' WINCH; trap 'echo interrupted; exit 7' INT; \
                  test -t 0 && test -t 1 && test -t 2 && echo ready-on-$(tty); \
                  while :; do sleep 1000 & wait $!; done";
    let (command, _container) = setting
        .container()
        .flags(&["-t"])
        .into_command(&["sh", "-c", script]);
    let mut terminal = Terminal::spawn(command, 31, 97)?;
    terminal.expect("ready-on-/dev/")?;
    terminal.resize(40, 120)?;
    terminal.expect("resized-to-40 120")?;
    terminal.type_in("\u{3}")?;
    terminal.expect("interrupted")?;
    let code = terminal.finish()?;
    ensure!(code == 7, "exit code {code}");
    Ok(())
}

/// A line for a shell that returns when the terminal has this size.
pub fn asking_for(size: &str) -> String {
    format!("until [ \"$(stty size 2>&1)\" = '{size}' ]; do :; done; echo $(stty size)-found\n")
}

fn terminal_end(setting: &Setting) -> Result<()> {
    let (command, _container) =
        setting
            .container()
            .flags(&["-t"])
            .into_command(&["sh", "-c", "seq 1 20000; exit 3"]);
    let terminal = Terminal::spawn(command, 24, 80)?;
    let screen = terminal.screen.clone();
    let code = terminal.finish()?;
    ensure!(code == 3, "exit code {code}");
    let expected: String = (1..=20_000).map(|number| format!("{number}\r\n")).collect();
    // The last of it may still be on its way from the terminal when the command has ended.
    screen.expect("20000\r\n", crate::command::DEADLINE)?;
    ensure!(
        screen.text() == expected,
        "the screen differs: {}",
        crate::command::shown(&screen.bytes())
    );
    Ok(())
}
