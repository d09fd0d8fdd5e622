//! What pods and containers may use, and have used.

use anyhow::{Result, ensure};
use serde_json::json;

use super::{Case, Setting, bulkhead, case};
use crate::cri::{Cri, number};
use crate::host;

pub fn cases() -> Vec<Case> {
    vec![
        case(
            "a container of a pod is held to its limits, which may change",
            limits,
        ),
        case("a container that runs out of memory says so", out_of_memory),
        case(
            "statistics of a pod tell what its containers use",
            statistics,
        ),
        bulkhead("a pod's VM is as large as what its sandbox says", size),
    ]
}

const MIB: u64 = 1 << 20;

fn limits(setting: &Setting) -> Result<()> {
    let cri = Cri::new(&setting.runtime)?;
    let pod = cri.pod(&json!({}))?;
    // Of the most shares each runc makes the most weight; others have had other weights before 1.3.2.
    let resources = json!({
        "memory_limit_in_bytes": (64 * MIB).to_string(),
        "cpu_quota": "50000",
        "cpu_period": "100000",
        "cpu_shares": "262144",
        "oom_score_adj": "500",
    });
    let member = pod.start("member", &json!({ "linux": { "resources": resources } }))?;
    let files = "cd /sys/fs/cgroup; cat memory.max cpu.max cpu.weight";
    let said = member.says(files)?;
    ensure!(said == "67108864\n50000 100000\n10000", "{said}");
    ensure!(member.says("cat /proc/self/oom_score_adj")? == "500");
    member.update(&json!({
        "memory_limit_in_bytes": (96 * MIB).to_string(),
        "cpu_quota": "25000",
        "cpu_period": "100000",
        "cpu_shares": "262144",
    }))?;
    let said = member.says(files)?;
    ensure!(said == "100663296\n25000 100000\n10000", "{said}");
    let status = &member.status()?["resources"]["linux"];
    ensure!(
        number(&status["memory_limit_in_bytes"])? == 96 * MIB,
        "{status}"
    );
    drop(member);
    drop(pod);
    cri.end()
}

pub fn out_of_memory(setting: &Setting) -> Result<()> {
    let cri = Cri::new(&setting.runtime)?;
    let pod = cri.pod(&json!({}))?;
    let quiet = pod.start("quiet", &json!({}))?;
    let hungry = pod.start(
        "hungry",
        &json!({
            "command": ["sh", "-c", "x=$(head -c 100000000 /dev/zero | tr '\\0' x); echo $x"],
            "linux": { "resources": { "memory_limit_in_bytes": (16 * MIB).to_string() } },
        }),
    )?;
    let status = hungry.ended()?;
    ensure!(
        status["reason"] == "OOMKilled" && status["exit_code"] == 137,
        "{status}"
    );
    quiet.says("true")?;
    drop((quiet, hungry));
    drop(pod);
    cri.end()
}

pub fn statistics(setting: &Setting) -> Result<()> {
    let cri = Cri::new(&setting.runtime)?;
    let pod = cri.pod(&json!({}))?;
    let member = pod.start("member", &json!({}))?;
    let other = pod.start("other", &json!({}))?;
    // 20 MiB that stay, and CPU time.
    member.says("head -c 20971520 /dev/zero > /dev/shm/kept")?;
    let inside = |file: &str| member.says(&format!("cat /sys/fs/cgroup/{file}"));
    let usage = |text: String| -> Result<u64> {
        let line = text.lines().next().unwrap_or_default();
        let number = line.rsplit(' ').next().unwrap_or_default();
        Ok(number.parse()?)
    };
    let cpu_before = usage(inside("cpu.stat")?)? * 1000;
    let stats = member.stats()?;
    let cpu_after = usage(inside("cpu.stat")?)? * 1000;
    let cpu = number(&stats["cpu"]["usage_core_nano_seconds"]["value"])?;
    ensure!(
        (cpu_before..=cpu_after).contains(&cpu),
        "{cpu} ns of CPU time are not from {cpu_before} to {cpu_after}"
    );
    let memory = number(&stats["memory"]["working_set_bytes"]["value"])?;
    let current = usage(inside("memory.current")?)?;
    ensure!(
        memory > 20 * MIB && memory < current + 8 * MIB,
        "{memory} bytes of memory, {current} inside"
    );
    let all = cri.call("ListContainerStats", &json!({}))?;
    let ids = all["stats"].as_array().map_or(0, Vec::len);
    ensure!(ids == 2, "{all}");

    let stats = pod.stats()?;
    let containers = stats["linux"]["containers"].as_array().map_or(0, Vec::len);
    let processes = number(&stats["linux"]["process"]["process_count"]["value"])?;
    let memory = number(&stats["linux"]["memory"]["usage_bytes"]["value"])?;
    ensure!(
        containers == 2 && processes >= 1 && memory > 20 * MIB,
        "{stats}"
    );
    let all = cri.call("ListPodSandboxStats", &json!({}))?;
    ensure!(all["stats"].as_array().map_or(0, Vec::len) == 1, "{all}");
    drop((member, other));
    drop(pod);
    cri.end()
}

pub fn size(setting: &Setting) -> Result<()> {
    let cri = Cri::new(&setting.runtime)?;
    let memory_inside = |linux| -> Result<(u64, String)> {
        let pod = cri.pod(&json!({ "linux": linux }))?;
        let member = pod.start("member", &json!({}))?;
        let kib = member.says("awk '/MemTotal/ { print $2 }' /proc/meminfo")?;
        let cpus = member.says("nproc")?;
        drop(member);
        host::read(&pod.cgroup.join("memory.current"))?;
        Ok((kib.parse::<u64>()? / 1024, cpus))
    };
    let (usual, _) = memory_inside(json!({}))?;
    let resources = json!({
        "memory_limit_in_bytes": (1024 * MIB).to_string(),
        "cpu_quota": "200000",
        "cpu_period": "100000",
    });
    let overhead = json!({ "memory_limit_in_bytes": (128 * MIB).to_string() });
    let (larger, cpus) = memory_inside(json!({ "resources": resources, "overhead": overhead }))?;
    ensure!(
        usual < 600 && larger > 900 && cpus == "2",
        "{usual} MiB, {larger} MiB with {cpus} CPUs"
    );
    Ok(())
}
