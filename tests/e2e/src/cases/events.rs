//! What containerd tells its clients of a container's life.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::{Case, Setting, case};
use crate::command::{Input, Running};
use crate::ctr::{RUNC, Run, ctr, spawn};

pub fn cases() -> Vec<Case> {
    vec![
        case(
            "events come in the order and with the contents that runc gives them",
            of_a_life,
        ),
        case(
            "lack of memory ends a process and is told before its end",
            of_lack_of_memory,
        ),
    ]
}

/// Runs it under both runtimes and compares its events.
fn same(setting: &Setting, life: fn(&str) -> Result<Vec<String>>) -> Result<()> {
    let (expected, found) = (life(RUNC)?, life(&setting.runtime)?);
    ensure!(
        found == expected,
        "runc:\n{}\ntested:\n{}",
        expected.join("\n"),
        found.join("\n")
    );
    Ok(())
}

fn of_a_life(setting: &Setting) -> Result<()> {
    same(setting, |runtime| {
        let listener = Listener::start()?;
        let container = Run::new(runtime).detach(&["sleep", "1000"])?;
        let mut exec = std::process::Command::new("ctr");
        exec.args(["task", "exec", "--exec-id", "an-exec", container.id()]);
        exec.args(["sh", "-c", "exit 3"]);
        Running::spawn(exec, Input::Null)?.finish()?.exits_with(3)?;
        ctr(&["task", "pause", container.id()])?.succeeds()?;
        ctr(&["task", "resume", container.id()])?.succeeds()?;
        let client = container.attach()?;
        container.kill("KILL")?;
        client.finish()?.exits_with(137)?;
        // The attached client has deleted the task.
        ctr(&["container", "delete", container.id()])?.succeeds()?;
        listener.life_of(container.id())
    })
}

fn of_lack_of_memory(setting: &Setting) -> Result<()> {
    same(setting, |runtime| {
        let listener = Listener::start()?;
        // A process of the container's, and then its own.
        let script = "sh -c 'tail /dev/zero'; echo $?; exec tail /dev/zero";
        let started = Run::new(runtime)
            .flags(&["--memory-limit", "16777216"])
            .spawn(&["sh", "-c", script])?;
        let id = started.container.id().to_owned();
        let finished = started.client.finish()?.exits_with(137)?;
        ensure!(finished.out() == "137\n", "{finished}");
        let mut events = listener.life_of(&id)?;
        // How many events there are for two processes that end at nearly the same time is chance.
        events.dedup();
        Ok(events)
    })
}

/// A `ctr events`.
pub struct Listener(Running);

impl Listener {
    /// Waits until it hears. It does not say when it does, so something is made to happen until it is
    /// heard.
    pub fn start() -> Result<Self> {
        let listener = spawn(&["events"])?;
        for attempt in 0..30 {
            ctr(&["namespace", "label", "default", &format!("e2e={attempt}")])?.succeeds()?;
            let heard = listener
                .stdout
                .expect("/namespaces/update", Duration::from_secs(1));
            if heard.is_ok() {
                return Ok(Self(listener));
            }
        }
        bail!("`ctr events` hears nothing")
    }

    /// Waits for this text in an event.
    pub fn expect(&self, text: &str) -> Result<()> {
        self.0.expect(text)
    }

    /// The task events of a container that is gone: topic and contents, without what differs from
    /// run to run.
    fn life_of(&self, id: &str) -> Result<Vec<String>> {
        // The last event of its life, after all of the task's.
        let last = format!("/containers/delete {{\"id\":\"{id}\"}}");
        self.expect(&last)?;
        let text = self.0.stdout.text();
        let mut events = Vec::new();
        for line in text
            .lines()
            .filter(|line| line.contains(" /tasks/") && line.contains(id))
        {
            let (topic, contents) = line
                .split_once(" /tasks/")
                .and_then(|(_, rest)| rest.split_once(' '))
                .with_context(|| format!("an event without contents: {line}"))?;
            let Value::Object(mut fields) = serde_json::from_str(contents)? else {
                bail!("the contents of an event are no object: {line}");
            };
            for varying in ["pid", "exited_at", "bundle", "rootfs", "io"] {
                if let Some(value) = fields.get_mut(varying) {
                    *value = Value::String("(varies)".into());
                }
            }
            let contents = Value::Object(fields).to_string().replace(id, "ID");
            events.push(format!("{topic} {contents}"));
        }
        Ok(events)
    }
}
