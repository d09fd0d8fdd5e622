//! Streams and terminals.

use anyhow::{Result, ensure};

use super::{Case, Setting, case};
use crate::command::{Finished, Input};
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
        ),
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
    let execs: Vec<_> = [0, 1, 4095, 4096, 65_537, 200_000]
        .into_iter()
        .map(|length| -> Result<_> {
            let input = Input::From(Box::new(Pattern::new(4, length)));
            // The count says that the end of the input was seen, not only its bytes.
            let exec =
                container.spawn_exec(&[], input, &["sh", "-c", "tee /dev/stderr | wc -c"])?;
            Ok((length, exec))
        })
        .collect::<Result<_>>()?;
    for (length, exec) in execs {
        let done: Finished = exec.finish()?.exits_with(0)?;
        ensure!(
            done.out().trim() == length.to_string(),
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
    let (command, _container) = setting.container().flags(&["-t"]).into_command(&["sh"]);
    let mut terminal = Terminal::spawn(command, 31, 97)?;
    terminal.type_in("stty size; echo first-$((1+1))\n")?;
    terminal.expect("first-2")?;
    let screen = terminal.screen.text();
    ensure!(screen.contains("31 97"), "the size is not 31 97: {screen}");
    // Told, not asked: the shell gets the signal and reports the size it then finds.
    terminal.type_in("trap 'echo resized-to-$(stty size)' WINCH; echo trap-$((1+1))\n")?;
    terminal.expect("trap-2")?;
    terminal.resize(40, 120)?;
    // A shell runs a trap when it has read a line.
    terminal.type_in("\n")?;
    terminal.expect("resized-to-40 120")?;
    // ^C ends what runs in the foreground and not the shell.
    terminal.type_in("echo sleep-$((1+1)); sleep 1000\n")?;
    terminal.expect("sleep-2")?;
    terminal.type_in("\u{3}")?;
    terminal.type_in("echo code-$?\n")?;
    terminal.expect("code-130")?;
    terminal.type_in("test -t 0 && test -t 1 && test -t 2 && tty\n")?;
    terminal.expect("/dev/")?;
    terminal.type_in("exit 7\n")?;
    let code = terminal.finish()?;
    ensure!(code == 7, "exit code {code}");
    Ok(())
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
