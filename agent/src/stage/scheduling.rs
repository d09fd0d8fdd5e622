//! `process.scheduler` and `process.ioPriority`.

use std::io;

use oci_spec::runtime::{
    IOPriorityClass, LinuxIOPriority, LinuxSchedulerFlag, LinuxSchedulerPolicy, Process, Scheduler,
};

use super::StageError;

/// `IOPRIO_WHO_PROCESS`, ioprio_set(2).
const IOPRIO_WHO_PROCESS: libc::c_int = 1;
/// Where the class begins in a priority, include/uapi/linux/ioprio.h.
const IOPRIO_CLASS_SHIFT: i32 = 13;
/// Priorities within a class, ioprio_set(2).
const IOPRIO_LEVELS: i64 = 8;

/// `struct sched_attr` of sched_setattr(2), in its first version.
#[derive(Debug, Default, PartialEq, Eq)]
#[repr(C)]
struct Attributes {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
}

/// Refuses combinations that the kernel would take to mean something else, as runc does.
///
/// # Errors
///
/// The field and what is wrong with it.
pub fn check(process: &Process) -> Result<(), (&'static str, String)> {
    if let Some(scheduler) = process.scheduler() {
        attributes(scheduler).map_err(|reason| ("process.scheduler", reason))?;
    }
    if let Some(priority) = process.io_priority() {
        level(priority).map_err(|reason| ("process.ioPriority", reason))?;
    }
    Ok(())
}

/// Applies both to this process. Real time needs CAP_SYS_NICE.
pub fn apply(process: &Process) -> Result<(), StageError> {
    if let Some(scheduler) = process.scheduler() {
        let attributes = attributes(scheduler).map_err(StageError::Invalid)?;
        // SAFETY: a whole `struct sched_attr` that says its own size; the call only reads it.
        let result = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) };
        if result < 0 {
            let policy = scheduler.policy();
            return Err(StageError::system(format!("schedule by {policy}"))(
                io::Error::last_os_error(),
            ));
        }
    }
    if let Some(priority) = process.io_priority() {
        let level = level(priority).map_err(StageError::Invalid)?;
        // SAFETY: the call takes three numbers.
        let result = unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, level) };
        if result < 0 {
            return Err(StageError::system("set the I/O priority")(
                io::Error::last_os_error(),
            ));
        }
    }
    Ok(())
}

fn attributes(scheduler: &Scheduler) -> Result<Attributes, String> {
    // include/uapi/linux/sched.h
    let policy = match scheduler.policy() {
        LinuxSchedulerPolicy::SchedOther => libc::SCHED_OTHER,
        LinuxSchedulerPolicy::SchedFifo => libc::SCHED_FIFO,
        LinuxSchedulerPolicy::SchedRr => libc::SCHED_RR,
        LinuxSchedulerPolicy::SchedBatch => libc::SCHED_BATCH,
        LinuxSchedulerPolicy::SchedIdle => libc::SCHED_IDLE,
        LinuxSchedulerPolicy::SchedDeadline => libc::SCHED_DEADLINE,
        LinuxSchedulerPolicy::SchedIso => {
            return Err("SCHED_ISO is not implemented by Linux".into());
        }
    };
    let nice = scheduler.nice().unwrap_or(0);
    if !(-20..=19).contains(&nice) {
        return Err(format!("nice {nice} is not between -20 and 19"));
    }
    let real_time = [libc::SCHED_FIFO, libc::SCHED_RR].contains(&policy);
    let priority = scheduler.priority().unwrap_or(0);
    if priority != 0 && !real_time {
        return Err("priority is for SCHED_FIFO and SCHED_RR only".into());
    }
    let times = [
        scheduler.runtime(),
        scheduler.deadline(),
        scheduler.period(),
    ];
    let [runtime, deadline, period] = times.map(|time| time.unwrap_or(0));
    if policy != libc::SCHED_DEADLINE && (runtime, deadline, period) != (0, 0, 0) {
        return Err("runtime, deadline and period are for SCHED_DEADLINE only".into());
    }
    let flags = scheduler.flags().iter().flatten();
    Ok(Attributes {
        size: u32::try_from(size_of::<Attributes>()).unwrap_or_default(),
        policy: policy.cast_unsigned(),
        flags: flags.fold(0, |all, flag| all | bit(*flag)),
        nice,
        priority: u32::try_from(priority).map_err(|_| format!("priority {priority}"))?,
        runtime,
        deadline,
        period,
    })
}

/// include/uapi/linux/sched.h
fn bit(flag: LinuxSchedulerFlag) -> u64 {
    match flag {
        LinuxSchedulerFlag::SchedResetOnFork => 0x01,
        LinuxSchedulerFlag::SchedFlagReclaim => 0x02,
        LinuxSchedulerFlag::SchedFlagDLOverrun => 0x04,
        LinuxSchedulerFlag::SchedFlagKeepPolicy => 0x08,
        LinuxSchedulerFlag::SchedFlagKeepParams => 0x10,
        LinuxSchedulerFlag::SchedFlagUtilClampMin => 0x20,
        LinuxSchedulerFlag::SchedFlagUtilClampMax => 0x40,
    }
}

fn level(priority: &LinuxIOPriority) -> Result<i32, String> {
    let class = match priority.class() {
        IOPriorityClass::IoprioClassRt => 1,
        IOPriorityClass::IoprioClassBe => 2,
        IOPriorityClass::IoprioClassIdle => 3,
    };
    let level = priority.priority();
    if !(0..IOPRIO_LEVELS).contains(&level) {
        return Err(format!("priority {level} is not between 0 and 7"));
    }
    let level = i32::try_from(level).map_err(|error| error.to_string())?;
    Ok(class << IOPRIO_CLASS_SHIFT | level)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(scheduler: serde_json::Value) -> Result<Attributes, String> {
        attributes(&serde_json::from_value(scheduler).unwrap())
    }

    #[test]
    fn schedulers_become_the_kernels() {
        let attributes = read(json!({"policy": "SCHED_RR", "priority": 5})).unwrap();
        assert_eq!((attributes.policy, attributes.priority), (2, 5));
        let attributes = read(json!({
            "policy": "SCHED_DEADLINE", "runtime": 1, "deadline": 2, "period": 3,
            "flags": ["SCHED_FLAG_RECLAIM"],
        }));
        let attributes = attributes.unwrap();
        assert_eq!((attributes.policy, attributes.flags), (6, 2));
        assert_eq!(attributes.period, 3);
    }

    #[test]
    fn contradictions_are_refused() {
        for scheduler in [
            json!({"policy": "SCHED_OTHER", "nice": 20}),
            json!({"policy": "SCHED_BATCH", "priority": 1}),
            json!({"policy": "SCHED_FIFO", "runtime": 1}),
            json!({"policy": "SCHED_FIFO", "priority": -1}),
            json!({"policy": "SCHED_ISO"}),
        ] {
            assert!(read(scheduler.clone()).is_err(), "{scheduler}");
        }
    }

    #[test]
    fn io_priorities_have_a_class_and_a_level() {
        let read = |json| level(&serde_json::from_value(json).unwrap());
        let best_effort = json!({"class": "IOPRIO_CLASS_BE", "priority": 4});
        assert_eq!(read(best_effort), Ok(2 << 13 | 4));
        assert!(read(json!({"class": "IOPRIO_CLASS_RT", "priority": 8})).is_err());
    }
}
