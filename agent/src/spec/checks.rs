//! What of a spec can be applied. Everything that passes here is applied by the stage or the
//! cgroup; everything else is refused with the field's name.

use std::{
    collections::HashSet,
    path::{Component, Path},
};

use oci_spec::runtime::{
    Hook, Linux, LinuxIdMapping, LinuxNamespaceType, LinuxSeccomp, LinuxSeccompAction, Mount,
    Process, Spec,
};

use super::{SpecError, Supplied, device_type};
use crate::stage::{
    affinity,
    mounts::{self, MountOptions, is_bind},
    namespaces, scheduling,
};

/// Lines of a uid_map, user_namespaces(7).
const MAPPINGS_MAX: usize = 340;

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

fn check_hook(field: &str, hook: &Hook) -> Result<(), SpecError> {
    let plain = |part: Component<'_>| matches!(part, Component::RootDir | Component::Normal(_));
    if !hook.path().is_absolute() || !hook.path().components().all(plain) {
        return Err(SpecError::invalid(
            format!("{field}.path"),
            format!("{} is no absolute path", hook.path().display()),
        ));
    }
    if hook.timeout().is_some_and(|seconds| seconds <= 0) {
        return Err(SpecError::invalid(
            format!("{field}.timeout"),
            "it must be greater than zero",
        ));
    }
    Ok(())
}

/// Checks a container's whole spec.
pub fn spec(spec: &Spec, supplied: &Supplied) -> Result<(), SpecError> {
    refuse("solaris", spec.solaris().is_some(), "not Linux")?;
    refuse("windows", spec.windows().is_some(), "not Linux")?;
    refuse("zos", spec.zos().is_some(), "not Linux")?;
    refuse("vm", spec.vm().is_some(), "the VM is Bulkhead's own")?;
    if let Some(hooks) = spec.hooks() {
        let here = [
            ("hooks.createContainer", hooks.create_container()),
            ("hooks.startContainer", hooks.start_container()),
        ];
        for (field, hooks) in here {
            for hook in hooks.iter().flatten() {
                check_hook(field, hook)?;
            }
        }
    }
    let has = |maps: &Option<Vec<_>>| maps.as_ref().is_some_and(|maps| !maps.is_empty());
    let misplaced = has(spec.uid_mappings()) || has(spec.gid_mappings());
    refuse("uidMappings", misplaced, "it belongs below linux")?;
    refuse_missing("root", spec.root().is_none())?;
    let Some(process_spec) = spec.process() else {
        return Err(SpecError::Missing { field: "process" });
    };
    process(process_spec)?;
    for (index, mount) in spec.mounts().iter().flatten().enumerate() {
        check_mount(index, mount, spec, supplied)?;
    }
    match spec.linux() {
        Some(linux) => check_linux(linux, supplied),
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
    let nul = |text: &str| text.contains('\0');
    if args.iter().any(|arg| nul(arg)) || process.env().iter().flatten().any(|env| nul(env)) {
        return Err(SpecError::invalid("process", "a NUL byte in args or env"));
    }
    let named = |variable: &String| variable.find('=').is_some_and(|length| length != 0);
    if let Some(variable) = process.env().iter().flatten().find(|env| !named(env)) {
        return Err(SpecError::invalid(
            "process.env",
            format!("{variable:?} is not of the form NAME=VALUE"),
        ));
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
    scheduling::check(process).map_err(|(field, reason)| SpecError::invalid(field, reason))?;
    let affinity = process.exec_cpu_affinity().as_ref();
    let lists = affinity.map(|it| [it.initial(), it.cpu_affinity_final()]);
    for list in lists.iter().flatten().copied().flatten() {
        affinity::parse(list)
            .map_err(|reason| SpecError::invalid("process.execCPUAffinity", reason))?;
    }
    let mut kinds = HashSet::new();
    for limit in process.rlimits().iter().flatten() {
        if !kinds.insert(limit.typ().to_string()) {
            let reason = format!("{} twice", limit.typ());
            return Err(SpecError::invalid("process.rlimits", reason));
        }
    }
    Ok(())
}

fn check_mount(
    index: usize,
    mount: &Mount,
    spec: &Spec,
    supplied: &Supplied,
) -> Result<(), SpecError> {
    let field = |name: &str| format!("mounts[{index}].{name}");
    let mut components = mount.destination().components();
    if !components.any(|component| matches!(component, Component::Normal(_))) {
        return Err(SpecError::invalid(field("destination"), "the root itself"));
    }
    let options = mounts::options(mount);
    if options.copy_up && mount.typ().as_deref() != Some("tmpfs") {
        let reason = "tmpcopyup is for a tmpfs only";
        return Err(SpecError::invalid(field("options"), reason));
    }
    check_mapped_mount(mount, &options, spec, field)?;
    if is_bind(mount) && !options.remount && !supplied.shares.contains(&index) {
        let source = mount.source().as_deref().unwrap_or(Path::new(""));
        return Err(SpecError::unsupported(
            field("source"),
            format!("{} was not shared with the guest", source.display()),
        ));
    }
    let untyped = !is_bind(mount) && !options.remount && mount.typ().is_none();
    refuse_missing("mounts[].type", untyped)
}

/// A mount with mapped ids, by its own mappings or those of the container's user namespace.
fn check_mapped_mount(
    mount: &Mount,
    options: &MountOptions,
    spec: &Spec,
    field: impl Fn(&str) -> String,
) -> Result<(), SpecError> {
    let (uids, gids) = (mount.uid_mappings(), mount.gid_mappings());
    let own = listed(uids) || listed(gids);
    if !own && !options.idmap {
        return Ok(());
    }
    if !is_bind(mount) {
        let reason = "only bind mounts can have mapped ids";
        return Err(SpecError::invalid(field("options"), reason));
    }
    if own {
        check_mappings(&field("uidMappings"), uids.as_deref())?;
        return check_mappings(&field("gidMappings"), gids.as_deref());
    }
    if !namespaces::has(spec, LinuxNamespaceType::User) {
        let reason = "idmap without mappings needs a user namespace";
        return Err(SpecError::invalid(field("options"), reason));
    }
    Ok(())
}

/// What the kernel takes for a uid_map, user_namespaces(7).
fn check_mappings(field: &str, mappings: Option<&[LinuxIdMapping]>) -> Result<(), SpecError> {
    let mappings = mappings.unwrap_or_default();
    if mappings.is_empty() {
        return Err(SpecError::invalid(field, "no mappings"));
    }
    if mappings.len() > MAPPINGS_MAX {
        let reason = format!("more than {MAPPINGS_MAX} mappings");
        return Err(SpecError::invalid(field, reason));
    }
    for mapping in mappings {
        let fits = |first: u32| first.checked_add(mapping.size()).is_some();
        if mapping.size() == 0 || !fits(mapping.container_id()) || !fits(mapping.host_id()) {
            let (inside, outside) = (mapping.container_id(), mapping.host_id());
            let reason = format!("{} ids from {inside} to {outside}", mapping.size());
            return Err(SpecError::invalid(field, reason));
        }
    }
    Ok(())
}

fn check_linux(linux: &Linux, supplied: &Supplied) -> Result<(), SpecError> {
    check_namespaces(linux, supplied)?;
    refuse(
        "linux.netDevices",
        linux
            .net_devices()
            .as_ref()
            .is_some_and(|devices| !devices.is_empty()),
        "network devices of the host cannot be moved into the guest",
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
    if let Some(personality) = linux.personality() {
        let flags = listed(personality.flags());
        refuse(
            "linux.personality.flags",
            flags,
            "the specification has none yet",
        )?;
    }
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
/// from, and namespaces of the real host do not exist in it. One that is named by a path can only
/// be another container's of the pod.
fn check_namespaces(linux: &Linux, supplied: &Supplied) -> Result<(), SpecError> {
    let namespaces = linux.namespaces().as_deref().unwrap_or_default();
    let mut kinds = HashSet::new();
    for namespace in namespaces {
        let kind = namespace.typ();
        if !kinds.insert(kind) {
            let reason = format!("{kind} twice");
            return Err(SpecError::invalid("linux.namespaces", reason));
        }
        // The network of the pod is the guest's business, whatever its name on the host.
        let Some(path) = super::path_of(namespace).filter(|_| kind != LinuxNamespaceType::Network)
        else {
            continue;
        };
        let reason = match kind {
            LinuxNamespaceType::Mount | LinuxNamespaceType::Cgroup => {
                "containers of a pod cannot share it"
            }
            _ if supplied.namespaces.contains(&kind) => continue,
            // Where it is kept on the host says nothing here: one with these ids is made.
            LinuxNamespaceType::User if listed(linux.uid_mappings()) => continue,
            _ => "it is no namespace of another container in the pod",
        };
        return Err(SpecError::unsupported(
            format!("linux.namespaces type {:?} with path", kind.to_string()),
            format!("{}: {reason}", path.display()),
        ));
    }
    let required = [
        (LinuxNamespaceType::Network, "host network namespace"),
        (LinuxNamespaceType::Pid, "host pid namespace"),
        (LinuxNamespaceType::Ipc, "host ipc namespace"),
        (LinuxNamespaceType::Uts, "host uts namespace"),
        (LinuxNamespaceType::Mount, "host mount namespace"),
    ];
    for (kind, name) in required {
        if !kinds.contains(&kind) {
            return Err(SpecError::unsupported(
                "linux.namespaces",
                format!("{name} cannot be honoured in a microVM"),
            ));
        }
    }
    let new = |kind| {
        let mut all = namespaces.iter();
        all.any(|namespace| namespace.typ() == kind && super::path_of(namespace).is_none())
    };
    let (uids, gids) = (linux.uid_mappings(), linux.gid_mappings());
    if new(LinuxNamespaceType::User) || listed(uids) || listed(gids) {
        if !kinds.contains(&LinuxNamespaceType::User) {
            let reason = "mappings without a user namespace";
            return Err(SpecError::invalid("linux.uidMappings", reason));
        }
        check_mappings("linux.uidMappings", uids.as_deref())?;
        check_mappings("linux.gidMappings", gids.as_deref())?;
    }
    for clock in linux
        .time_offsets()
        .iter()
        .flatten()
        .map(|(clock, _)| clock)
    {
        if !new(LinuxNamespaceType::Time) {
            let reason = "offsets without a new time namespace";
            return Err(SpecError::invalid("linux.timeOffsets", reason));
        }
        if !["monotonic", "boottime"].contains(&clock.as_str()) {
            let reason = format!("{clock:?} has no offset, see time_namespaces(7)");
            return Err(SpecError::invalid("linux.timeOffsets", reason));
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

fn listed<T>(list: &Option<Vec<T>>) -> bool {
    list.as_ref().is_some_and(|list| !list.is_empty())
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
