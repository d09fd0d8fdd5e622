//! The numbers of a cgroup, by the kernel's names.

use std::{collections::HashMap, fs, io};

use bulkhead_agent_api::messages::{CpuStat, IoEntry, MemoryStat, PidsStat, StatsResponse};
use protobuf::MessageField;

use super::{Cgroup, CgroupError, file_error};

impl Cgroup {
    /// Reads all numbers. A file that the kernel does not have counts as zeros.
    pub fn stats(&self) -> Result<StatsResponse, CgroupError> {
        Ok(StatsResponse {
            cpu: MessageField::some(self.cpu()?),
            memory: MessageField::some(self.memory()?),
            pids: MessageField::some(PidsStat {
                current: self.number("pids.current")?,
                limit: self.number("pids.max")?,
                ..PidsStat::default()
            }),
            io: self.read("io.stat")?.lines().filter_map(io_entry).collect(),
            ..StatsResponse::default()
        })
    }

    fn cpu(&self) -> Result<CpuStat, CgroupError> {
        let stat = keyed(&self.read("cpu.stat")?);
        let get = |key: &str| stat.get(key).copied().unwrap_or(0);
        Ok(CpuStat {
            usage_usec: get("usage_usec"),
            user_usec: get("user_usec"),
            system_usec: get("system_usec"),
            nr_periods: get("nr_periods"),
            nr_throttled: get("nr_throttled"),
            throttled_usec: get("throttled_usec"),
            ..CpuStat::default()
        })
    }

    fn memory(&self) -> Result<MemoryStat, CgroupError> {
        Ok(MemoryStat {
            usage: self.number("memory.current")?,
            usage_limit: self.number("memory.max")?,
            swap_usage: self.number("memory.swap.current")?,
            swap_limit: self.number("memory.swap.max")?,
            max_usage: self.number("memory.peak")?,
            stat: keyed(&self.read("memory.stat")?),
            events: keyed(&self.read("memory.events")?),
            ..MemoryStat::default()
        })
    }

    fn number(&self, file: &str) -> Result<u64, CgroupError> {
        let text = self.read(file)?;
        Ok(match text.trim() {
            "max" => u64::MAX,
            number => number.parse().unwrap_or(0),
        })
    }

    fn read(&self, file: &str) -> Result<String, CgroupError> {
        let path = self.path.join(file);
        match fs::read_to_string(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && self.path.exists() => {
                Ok(String::new())
            }
            result => result.map_err(file_error("read", path)),
        }
    }
}

/// A flat keyed file: `KEY VALUE` a line.
fn keyed(text: &str) -> HashMap<String, u64> {
    let pairs = text.lines().filter_map(|line| line.split_once(' '));
    pairs
        .filter_map(|(key, value)| Some((key.to_owned(), value.parse().ok()?)))
        .collect()
}

/// A line of a nested keyed file: `MAJOR:MINOR KEY=VALUE ...`.
fn io_entry(line: &str) -> Option<IoEntry> {
    let mut words = line.split_whitespace();
    let (major, minor) = words.next()?.split_once(':')?;
    let values: HashMap<&str, u64> = words
        .filter_map(|word| word.split_once('='))
        .filter_map(|(key, value)| Some((key, value.parse().ok()?)))
        .collect();
    let get = |key: &str| values.get(key).copied().unwrap_or(0);
    Some(IoEntry {
        major: major.parse().ok()?,
        minor: minor.parse().ok()?,
        rbytes: get("rbytes"),
        wbytes: get("wbytes"),
        rios: get("rios"),
        wios: get("wios"),
        ..IoEntry::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_io_stat_are_read() {
        let entry = io_entry("254:16 rbytes=4096 wbytes=1 rios=2 wios=3 dbytes=0 dios=0");
        let entry = entry.unwrap();
        assert_eq!((entry.major, entry.minor), (254, 16));
        assert_eq!(
            (entry.rbytes, entry.wbytes, entry.rios, entry.wios),
            (4096, 1, 2, 3)
        );
        assert_eq!(io_entry(""), None);
        assert_eq!(io_entry("8:x rbytes=1"), None);
    }

    #[test]
    fn keyed_files_are_read() {
        let map = keyed("anon 12\nfile 7\nbroken\n");
        assert_eq!(map.get("anon"), Some(&12));
        assert_eq!(map.len(), 2);
    }
}
