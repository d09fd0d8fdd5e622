//! Progress of long work: what is being done and for how long.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// One step of long work, announced when it starts and timed when it ends.
pub struct Step {
    name: String,
    started: Instant,
    bar: Option<ProgressBar>,
}

impl Step {
    /// Announces a silent step; on a terminal its elapsed time runs.
    pub fn start(name: impl Into<String>) -> Self {
        let name = name.into();
        if !std::io::stderr().is_terminal() {
            return Self::announce(name);
        }
        let bar = ProgressBar::new_spinner().with_message(name.clone());
        if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} ({elapsed})") {
            bar.set_style(style);
        }
        bar.enable_steady_tick(Duration::from_millis(200));
        Step {
            name,
            started: Instant::now(),
            bar: Some(bar),
        }
    }

    /// Announces a step that shows its own progress.
    pub fn announce(name: impl Into<String>) -> Self {
        let name = name.into();
        eprintln!("==> {name}");
        Step {
            name,
            started: Instant::now(),
            bar: None,
        }
    }

    /// Says that the step is done and how long it took.
    pub fn done(self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        let seconds = self.started.elapsed().as_secs_f64();
        eprintln!("    {}: {seconds:.1} s", self.name);
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
