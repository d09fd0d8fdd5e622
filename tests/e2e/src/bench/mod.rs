//! Measurements. Run in the metered lab, where the clock counts instructions, they are the same on
//! every machine.

mod create;
pub mod network;
mod pod;
mod start;

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use comfy_table::{CellAlignment, Table, presets};
use serde_json::json;

use crate::ctr::{BULKHEAD, RUNC};

/// What to measure.
#[derive(Debug, clap::Subcommand)]
pub enum Bench {
    /// The start of a container, under runc and under Bulkhead.
    Start {
        /// How many starts each median is of.
        #[arg(long, default_value_t = 7)]
        runs: usize,
    },
    /// One more container in a pod that runs, under runc and under Bulkhead.
    Create {
        /// How many containers each median is of.
        #[arg(long, default_value_t = 15)]
        runs: usize,
    },
    /// A container's connections with the host, under runc and under Bulkhead.
    Network {
        /// How many measurements each median is of.
        #[arg(long, default_value_t = 3)]
        runs: usize,
    },
    /// A pod of Kubernetes with one container, from its start to its removal, under runc and under
    /// Bulkhead.
    Pod {
        /// How many pods each median is of.
        #[arg(long, default_value_t = 5)]
        runs: usize,
    },
}

/// Measures, prints tables, and as the last line everything as JSON.
pub fn run(bench: &Bench) -> Result<()> {
    let (Bench::Start { runs }
    | Bench::Create { runs }
    | Bench::Network { runs }
    | Bench::Pod { runs }) = *bench;
    ensure!(runs > 0, "a median needs at least one run");
    match bench {
        Bench::Start { .. } => start::run(runs),
        Bench::Create { .. } => create::run(runs),
        Bench::Network { .. } => network::run(runs),
        Bench::Pod { .. } => pod::run(runs),
    }
}

/// Measures `runs` times, after once that does not count because caches are cold, and tells on
/// standard error how far it is.
fn repeat<T>(
    what: &str,
    runs: usize,
    mut measure: impl FnMut(usize) -> Result<T>,
) -> Result<Vec<T>> {
    eprintln!("{what}: warming up");
    measure(0).with_context(|| what.to_owned())?;
    (1..=runs)
        .map(|run| {
            eprintln!("{what}: {run} of {runs}");
            measure(run).with_context(|| what.to_owned())
        })
        .collect()
}

/// Does something, and says in how many seconds by `CLOCK_MONOTONIC`.
fn timed<T>(work: impl FnOnce() -> Result<T>) -> Result<(T, f64)> {
    let begun = Instant::now();
    let done = work()?;
    Ok((done, begun.elapsed().as_secs_f64()))
}

/// What is measured under both runtimes: its name, and how a value of it is written.
type Measure = (&'static str, fn(f64) -> String);

/// Takes these measures under both runtimes with `measured`, prints their medians and ratios, and as the
/// last line everything as JSON.
fn compare<const N: usize>(
    what: &str,
    measures: [Measure; N],
    measured: impl Fn(&str) -> Result<Vec<[f64; N]>>,
) -> Result<()> {
    let (runc, bulkhead) = (measured(RUNC)?, measured(BULKHEAD)?);
    let mut table = table(&[what, "runc", "Bulkhead", "ratio"]);
    for (index, (what, written)) in measures.into_iter().enumerate() {
        let of = |all: &[[f64; N]]| {
            let values: Vec<f64> = all.iter().map(|run| run[index]).collect();
            median(&values)
        };
        let (runc, bulkhead) = (of(&runc), of(&bulkhead));
        let ratio = format!("{:.2}", bulkhead / runc);
        table.add_row([what, &written(runc), &written(bulkhead), &ratio]);
    }
    println!("{}", aligned(table));
    let rows = |all: &[[f64; N]]| all.iter().map(|run| run.to_vec()).collect::<Vec<_>>();
    println!(
        "{}",
        json!({"runc": rows(&runc), "bulkhead": rows(&bulkhead)})
    );
    Ok(())
}

/// A count as a number to compute with.
#[expect(
    clippy::cast_precision_loss,
    reason = "nanoseconds and counts are far below 2^53"
)]
fn count(value: u64) -> f64 {
    value as f64
}

/// The middle value, or the mean of the two middle ones.
fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 {
        sorted[middle]
    } else {
        f64::midpoint(sorted[middle - 1], sorted[middle])
    }
}

fn milliseconds(value: f64) -> String {
    format!("{value:.1} ms")
}

fn table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table
        .load_preset(presets::UTF8_BORDERS_ONLY)
        .set_header(header);
    table
}

/// Numbers to the right.
fn aligned(mut table: Table) -> Table {
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_median_is_the_middle() {
        assert!((median(&[3.0, 1.0, 2.0]) - 2.0).abs() < 1e-9);
        assert!((median(&[4.0, 1.0, 2.0, 3.0]) - 2.5).abs() < 1e-9);
    }
}
