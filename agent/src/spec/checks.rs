//! What of a spec can be applied. Everything that passes here is applied by the stage or the
//! cgroup; everything else is refused with the field's name.

use std::path::{Component, Path};

use oci_spec::runtime::{
    Linux, LinuxNamespaceType, LinuxSeccomp, LinuxSeccompAction, Mount, Process, Spec,
};

use super::{SpecError, device_type};
use crate::stage::mounts::{MountOptions, is_bind};

/// sysctls of the IPC namespace besides `fs.mqueue.*`, see ipc_namespaces(7).
const IPC_SYSCTLS: [&str; 9] = [
    "kernel.auto_msgmni",
    "kernel.msgmax",
    "kernel.msgmnb",
    "kernel.msgmni",
    "kernel.sem",
    "kernel.shm_rmid_forced",
    "kernel.shmall",
    "kernel.shmmax",
    "kernel.shmmni",
];

/// Longest name of an AppArmor profile; the kernel takes no more than a page.
const PROFILE_NAME_MAX: usize = 2048;

/// Checks a container's whole spec.
pub fn spec(spec: &Spec, shared: impl Fn(usize) -> bool) -> Result<(), SpecError> {
    refuse("solaris", spec.solaris().is_some(), "not Linux")?;
    refuse("windows", spec.windows().is_some(), "not Linux")?;
    refuse("zos", spec.zos().is_some(), "not Linux")?;
    refuse("vm", spec.vm().is_some(), "the VM is Bulkhead's own")?;
    if let Some(hooks) = spec.hooks() {
        let reason = "only hooks that run on the host are";
        let set = |hooks: &Option<Vec<_>>| hooks.as_ref().is_some_and(|hooks| !hooks.is_empty());
        refuse(
            "hooks.createContainer",
            set(hooks.create_container()),
            reason,
        )?;
        refuse("hooks.startContainer", set(hooks.start_container()), reason)?;
    }
    let has = |maps: &Option<Vec<_>>| maps.as_ref().is_some_and(|maps| !maps.is_empty());
    let misplaced = has(spec.uid_mappings()) || has(spec.gid_mappings());
    refuse("uidMappings", misplaced, "user namespaces are not applied")?;
    refuse_missing("root", spec.root().is_none())?;
    let Some(process_spec) = spec.process() else {
        return Err(SpecError::Missing { field: "process" });
    };
    process(process_spec)?;
    for (index, mount) in spec.mounts().iter().flatten().enumerate() {
        check_mount(index, mount, &shared)?;
    }
    match spec.linux() {
        Some(linux) => check_linux(linux),
        None => Err(SpecError::Missing { field: "linux" }),
    }
}

/// Checks a process, a container's own or an exec's.
pub fn process(process: &Process) -> Result<(), SpecError> {
    let args = process.args().as_deref().unwrap_or_default();
    refuse_missing("process.args", args.is_empty())?;
    refuse(
        "process.commandLine",
        process.command_line().is_some(),
        "not Linux",
    )?;
    let username = process.user().username().as_deref().unwrap_or_default();
    refuse("process.user.username", !username.is_empty(), "not Linux")?;
    let nul = |text: &str| text.contains('\0');
    if args.iter().any(|arg| nul(arg)) || process.env().iter().flatten().any(|env| nul(env)) {
        return Err(SpecError::invalid("process", "a NUL byte in args or env"));
    }
    if !process.cwd().is_absolute() {
        return Err(SpecError::invalid(
            "process.cwd",
            "must be an absolute path",
        ));
    }
    let profile = process.apparmor_profile().as_deref().unwrap_or_default();
    if profile.len() > PROFILE_NAME_MAX || profile.contains(char::is_control) {
        return Err(SpecError::invalid(
            "process.apparmorProfile",
            "not the name of a profile",
        ));
    }
    refuse(
        "process.selinuxLabel",
        process
            .selinux_label()
            .as_ref()
            .is_some_and(|label| !label.is_empty()),
        "the guest has no SELinux",
    )?;
    let no_scheduling = "scheduling policies are not applied in the guest";
    refuse(
        "process.scheduler",
        process.scheduler().is_some(),
        no_scheduling,
    )?;
    refuse(
        "process.ioPriority",
        process.io_priority().is_some(),
        no_scheduling,
    )?;
    refuse(
        "process.execCPUAffinity",
        process.exec_cpu_affinity().is_some(),
        "the host's CPUs are not the guest's",
    )
}

fn check_mount(
    index: usize,
    mount: &Mount,
    shared: &impl Fn(usize) -> bool,
) -> Result<(), SpecError> {
    let field = |name: &str| format!("mounts[{index}].{name}");
    let has = |maps: &Option<Vec<_>>| maps.as_ref().is_some_and(|maps| !maps.is_empty());
    let reason = "mounts with mapped identities are not applied";
    refuse(&field("uidMappings"), has(mount.uid_mappings()), reason)?;
    refuse(&field("gidMappings"), has(mount.gid_mappings()), reason)?;
    let mut components = mount.destination().components();
    if !components.any(|component| matches!(component, Component::Normal(_))) {
        return Err(SpecError::invalid(field("destination"), "the root itself"));
    }
    MountOptions::parse(mount.options().as_deref().unwrap_or_default())
        .map_err(|reason| SpecError::unsupported(field("options"), reason))?;
    if is_bind(mount) && !shared(index) {
        let source = mount.source().as_deref().unwrap_or(Path::new(""));
        return Err(SpecError::unsupported(
            field("source"),
            format!("{} was not shared with the guest", source.display()),
        ));
    }
    refuse_missing("mounts[].type", !is_bind(mount) && mount.typ().is_none())
}

fn check_linux(linux: &Linux) -> Result<(), SpecError> {
    namespaces(linux)?;
    let has = |maps: &Option<Vec<_>>| maps.as_ref().is_some_and(|maps| !maps.is_empty());
    let no_user = "user namespaces are not applied";
    refuse("linux.uidMappings", has(linux.uid_mappings()), no_user)?;
    refuse("linux.gidMappings", has(linux.gid_mappings()), no_user)?;
    refuse(
        "linux.netDevices",
        linux
            .net_devices()
            .as_ref()
            .is_some_and(|devices| !devices.is_empty()),
        "network devices of the host cannot be moved into the guest",
    )?;
    refuse(
        "linux.timeOffsets",
        linux
            .time_offsets()
            .as_ref()
            .is_some_and(|offsets| !offsets.is_empty()),
        "time namespaces are not applied",
    )?;
    refuse(
        "linux.mountLabel",
        linux
            .mount_label()
            .as_ref()
            .is_some_and(|label| !label.is_empty()),
        "the guest has no SELinux",
    )?;
    refuse(
        "linux.intelRdt",
        linux.intel_rdt().is_some(),
        "not available in a VM",
    )?;
    refuse(
        "linux.memoryPolicy",
        linux.memory_policy().is_some(),
        "the guest has one node",
    )?;
    refuse(
        "linux.personality",
        linux.personality().is_some(),
        "not applied",
    )?;
    if let Some(propagation) = linux.rootfs_propagation()
        && !matches!(
            propagation.as_str(),
            "" | "private"
                | "rprivate"
                | "slave"
                | "rslave"
                | "shared"
                | "rshared"
                | "unbindable"
                | "runbindable"
        )
    {
        return Err(SpecError::invalid(
            "linux.rootfsPropagation",
            propagation.clone(),
        ));
    }
    for device in linux.devices().iter().flatten() {
        if device_type(device.typ()).is_none() {
            let path = device.path().display();
            return Err(SpecError::invalid(
                "linux.devices",
                format!("type of {path}"),
            ));
        }
    }
    for name in linux.sysctl().iter().flatten().map(|(name, _)| name) {
        sysctl(name)?;
    }
    if let Some(resources) = linux.resources() {
        crate::cgroup::limits::check(resources)?;
    }
    linux.seccomp().as_ref().map_or(Ok(()), seccomp)
}

/// The guest is the container's host: its own namespaces are what the spec's namespaces are made
/// from, and namespaces of the real host do not exist in it.
fn namespaces(linux: &Linux) -> Result<(), SpecError> {
    let namespaces = linux.namespaces().as_deref().unwrap_or_default();
    for namespace in namespaces {
        let path = namespace
            .path()
            .as_deref()
            .filter(|path| !path.as_os_str().is_empty());
        match (namespace.typ(), path) {
            (LinuxNamespaceType::User | LinuxNamespaceType::Time, _) => {
                return Err(SpecError::unsupported(
                    format!("linux.namespaces type {:?}", namespace.typ().to_string()),
                    "not applied in the guest",
                ));
            }
            // The network of the pod is the guest's business, whatever its name on the host.
            (LinuxNamespaceType::Network, _) | (_, None) => {}
            (kind, Some(path)) => {
                return Err(SpecError::unsupported(
                    format!("linux.namespaces type {:?} with path", kind.to_string()),
                    format!("{} is a namespace of the host", path.display()),
                ));
            }
        }
    }
    let required = [
        (LinuxNamespaceType::Network, "host network namespace"),
        (LinuxNamespaceType::Pid, "host pid namespace"),
        (LinuxNamespaceType::Ipc, "host ipc namespace"),
        (LinuxNamespaceType::Uts, "host uts namespace"),
        (LinuxNamespaceType::Mount, "host mount namespace"),
    ];
    for (kind, name) in required {
        if !namespaces.iter().any(|namespace| namespace.typ() == kind) {
            return Err(SpecError::unsupported(
                "linux.namespaces",
                format!("{name} cannot be honoured in a microVM"),
            ));
        }
    }
    Ok(())
}

fn sysctl(name: &str) -> Result<(), SpecError> {
    let dotted = name.replace('/', ".");
    let namespaced = dotted.starts_with("net.")
        || dotted.starts_with("fs.mqueue.")
        || IPC_SYSCTLS.contains(&dotted.as_str())
        || dotted == "kernel.domainname";
    if namespaced && !dotted.split('.').any(|part| part.is_empty()) {
        return Ok(());
    }
    Err(SpecError::invalid(
        "linux.sysctl",
        format!("sysctl {name:?} is not in a separate kernel namespace"),
    ))
}

fn seccomp(seccomp: &LinuxSeccomp) -> Result<(), SpecError> {
    let notify = LinuxSeccompAction::ScmpActNotify;
    let syscalls = seccomp.syscalls().iter().flatten();
    let notifies = seccomp.default_action() == notify
        || syscalls
            .into_iter()
            .any(|syscall| syscall.action() == notify);
    let reason = "a listener on the host cannot serve a process in the guest";
    refuse("linux.seccomp SCMP_ACT_NOTIFY", notifies, reason)?;
    refuse(
        "linux.seccomp.listenerPath",
        seccomp.listener_path().is_some(),
        reason,
    )?;
    refuse(
        "linux.seccomp.listenerMetadata",
        seccomp.listener_metadata().is_some(),
        reason,
    )
}

fn refuse(field: &str, present: bool, reason: &str) -> Result<(), SpecError> {
    if present {
        return Err(SpecError::unsupported(field, reason));
    }
    Ok(())
}

fn refuse_missing(field: &'static str, missing: bool) -> Result<(), SpecError> {
    if missing {
        return Err(SpecError::Missing { field });
    }
    Ok(())
}
