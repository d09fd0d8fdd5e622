//! Measurements. Run in the metered lab, where the clock counts instructions, they are the same on
//! every machine.

mod create;
pub mod network;
mod start;

use anyhow::{Result, ensure};
use comfy_table::{CellAlignment, Table, presets};

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
}

/// Measures, prints tables, and as the last line everything as JSON.
pub fn run(bench: &Bench) -> Result<()> {
    let (Bench::Start { runs } | Bench::Create { runs } | Bench::Network { runs }) = *bench;
    ensure!(runs > 0, "a median needs at least one run");
    match bench {
        Bench::Start { .. } => start::run(runs),
        Bench::Create { .. } => create::run(runs),
        Bench::Network { .. } => network::run(runs),
    }
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
