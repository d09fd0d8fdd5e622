//! A pod with a network and one container, through the calls that the kubelet makes.

use anyhow::Result;
use serde_json::json;

use super::{Measure, compare, milliseconds, repeat, timed};
use crate::cri::Cri;

/// What is measured.
const MEASURES: [Measure; 7] = [
    ("RunPodSandbox", milliseconds),
    ("CreateContainer", milliseconds),
    ("StartContainer", milliseconds),
    ("start", milliseconds),
    ("StopPodSandbox", milliseconds),
    ("RemovePodSandbox", milliseconds),
    ("removal", milliseconds),
];

/// Measures `runs` times, prints a table, and as the last line everything as JSON.
pub fn run(runs: usize) -> Result<()> {
    compare("a pod with one container", MEASURES, |runtime| {
        under(runtime, runs)
    })
}

/// The measures of each pod of this runtime, in milliseconds.
fn under(runtime: &str, runs: usize) -> Result<Vec<[f64; 7]>> {
    let cri = Cri::new(runtime)?;
    let measured = repeat(&format!("a pod under {runtime}"), runs, |_| measure(&cri))?;
    cri.end()?;
    Ok(measured)
}

fn measure(cri: &Cri) -> Result<[f64; 7]> {
    let none = json!({});
    // With the kubelet's part: a cgroup and a directory.
    let (mut pod, run) = timed(|| cri.pod(&none))?;
    let (container, create) = timed(|| pod.create("container", &none))?;
    let ((), start) = timed(|| container.start())?;
    let ((), stop) = timed(|| pod.stop())?;
    let ((), remove) = timed(|| pod.remove())?;
    let [started, removed] = [run + create + start, stop + remove];
    Ok([run, create, start, started, stop, remove, removed].map(|seconds| seconds * 1e3))
}
