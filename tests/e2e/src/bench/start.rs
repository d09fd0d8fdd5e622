//! The start of a container in a machine of its own.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context, Result};
use serde_json::{Map, Value, json};

use super::{aligned, count, median, milliseconds, repeat, table};
use crate::ctr::{BULKHEAD, RUNC, Run};
use crate::host::{self, Pod};

/// Measures `runs` times, prints tables, and as the last line everything as JSON.
pub fn run(runs: usize) -> Result<()> {
    let runc = starts(RUNC, runs)?;
    let bulkhead = starts(BULKHEAD, runs)?;
    let idle = repeat("an idle container", runs, |_| idle())?;

    let (runc_median, bulkhead_median) = (median(&runc), median(&bulkhead));
    let mut table = table(&["ctr run --rm … true", "median"]);
    table.add_row(["under runc", &milliseconds(runc_median)]);
    table.add_row(["under Bulkhead", &milliseconds(bulkhead_median)]);
    table.add_row(["ratio", &format!("{:.2}", bulkhead_median / runc_median)]);
    println!("{}", aligned(table));
    let phases = print_phases(&idle)?;
    let memory = print_memory(&idle);
    println!(
        "{}",
        json!({
            "runc_ms": runc,
            "bulkhead_ms": bulkhead,
            "ratio": bulkhead_median / runc_median,
            "phases_ms": phases,
            "vm_exits": idle.iter().map(|pod| pod.exits).collect::<Vec<_>>(),
            "memory_kib": memory,
        })
    );
    Ok(())
}

/// Durations of whole starts by `CLOCK_MONOTONIC`, in milliseconds.
fn starts(runtime: &str, runs: usize) -> Result<Vec<f64>> {
    repeat(&format!("a start under {runtime}"), runs, |_| {
        let done = Run::new(runtime).run(&["true"])?.exits_with(0)?;
        Ok(done.took().as_secs_f64() * 1e3)
    })
}

/// What the start of one idle container has written down, and what it takes.
struct Idle {
    /// Phases in their order, `CLOCK_MONOTONIC` in nanoseconds.
    phases: Vec<(String, u64)>,
    exits: u64,
    /// Proportional share of memory in KiB, by process name.
    memory: BTreeMap<String, u64>,
}

fn idle() -> Result<Idle> {
    let container = Run::new(BULKHEAD).detach(&["sleep", "1000"])?;
    let path = PathBuf::from(format!(
        "/run/bulkhead/default:{}/timeline.json",
        container.id()
    ));
    let timeline: Value = serde_json::from_str(&host::read(&path)?)
        .with_context(|| format!("{} is no JSON", path.display()))?;
    let phases = timeline["phases"]
        .as_array()
        .context("the timeline has no phases")?;
    let phases = phases
        .iter()
        .map(|entry| {
            let phase = entry["phase"].as_str().context("a phase without name")?;
            let at = entry["at_ns"].as_u64().context("a phase without time")?;
            Ok((phase.to_owned(), at))
        })
        .collect::<Result<Vec<_>>>()?;
    let pod = Pod::of(container.id())?;
    let mut memory = BTreeMap::new();
    for process in pod.children.iter().chain([&pod.shim]) {
        *memory.entry(process.name.clone()).or_default() += host::pss_kib(process.pid)?;
    }
    Ok(Idle {
        phases,
        exits: timeline["vm_exits"]
            .as_u64()
            .context("the timeline has no vm_exits")?,
        memory,
    })
}

/// Prints when each phase was reached; returns all values by phase.
fn print_phases(idle: &[Idle]) -> Result<Map<String, Value>> {
    let first = idle.first().context("no run")?;
    let mut table = table(&["phase", "reached after", "took"]);
    let mut all = Map::new();
    let mut reached = Vec::new();
    for (phase, _) in &first.phases {
        let values = idle
            .iter()
            .map(|pod| since_start(pod, phase))
            .collect::<Result<Vec<_>>>()?;
        reached.push((phase, median(&values)));
        all.insert(phase.clone(), json!(values));
    }
    // Shim and VMM note theirs side by side.
    reached.sort_by(|(_, a), (_, b)| a.total_cmp(b));
    let mut before = None;
    for (phase, at) in reached {
        let took = before.map_or_else(String::new, |before| milliseconds(at - before));
        table.add_row([phase, &milliseconds(at), &took]);
        before = Some(at);
    }
    println!("{}", aligned(table));
    let guest = idle
        .iter()
        .map(|pod| Ok(since_start(pod, "agent_ready")? - since_start(pod, "kernel_entered")?))
        .collect::<Result<Vec<_>>>()?;
    println!(
        "from kernel entry to agent-ready: {}",
        milliseconds(median(&guest))
    );
    let exits: Vec<f64> = idle.iter().map(|pod| count(pod.exits)).collect();
    println!("VM exits to agent-ready: {:.0}\n", median(&exits));
    all.insert("kernel_entered to agent_ready".into(), json!(guest));
    Ok(all)
}

fn since_start(pod: &Idle, phase: &str) -> Result<f64> {
    let at = |wanted: &str| {
        let found = pod.phases.iter().find(|(phase, _)| phase == wanted);
        found
            .map(|(_, at)| *at)
            .with_context(|| format!("the timeline lacks {wanted}"))
    };
    let (start, _) = pod.phases.first().context("the timeline is empty")?;
    let elapsed = at(phase)?
        .checked_sub(at(start)?)
        .context("the timeline goes back")?;
    Ok(count(elapsed) / 1e6)
}

/// Prints what an idle container takes, by process; returns all values.
fn print_memory(idle: &[Idle]) -> Map<String, Value> {
    let mut table = table(&["memory of an idle container (PSS)", "median"]);
    let mut all = Map::new();
    let names: std::collections::BTreeSet<_> =
        idle.iter().flat_map(|pod| pod.memory.keys()).collect();
    let mut row = |name: &str, values: Vec<u64>| {
        let counts: Vec<f64> = values.iter().copied().map(count).collect();
        table.add_row([name, &format!("{:.1} MiB", median(&counts) / 1024.0)]);
        all.insert(name.to_owned(), json!(values));
    };
    for name in names {
        row(
            name,
            idle.iter()
                .map(|pod| pod.memory.get(name).copied().unwrap_or(0))
                .collect(),
        );
    }
    row(
        "all",
        idle.iter().map(|pod| pod.memory.values().sum()).collect(),
    );
    println!("{}", aligned(table));
    all
}
