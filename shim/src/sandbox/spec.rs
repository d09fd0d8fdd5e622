//! The specification of the container that stands for a sandbox.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::config::{
    IDMapping, NamespaceMode, NamespaceOption, PodSandboxConfig, SandboxError, UserNamespace,
    check_own,
};
use crate::{config, sizing};

/// By whom the sandbox's process runs, as pause images have it.
const USER: u32 = 65_535;

/// The OOM preference of what a pod cannot do without, as CRI has it.
const OOM_SCORE_ADJ: i32 = -998;

/// What containers may do as any user in their pod's own network, unless the pod says otherwise: the
/// defaults of containerd 2's CRI plugin, which says nothing of them by the sandbox API.
const UNPRIVILEGED_PORTS: (&str, &str) = ("net.ipv4.ip_unprivileged_port_start", "0");
const UNPRIVILEGED_PING: (&str, &str) = ("net.ipv4.ping_group_range", "0 2147483647");

/// As containerd names the cgroups of sandboxes and containers in systemd's form.
const CGROUP_PREFIX: &str = "cri-containerd";

/// Beginning of the path by which a container names a sandbox whose PID containerd has forgotten, as
/// it does when it is restarted.
const FORGOTTEN: &str = "/proc/0/ns/";

/// The specification for a sandbox in the network namespace at a path; with an empty path in a new
/// one.
pub fn specification(
    id: &str,
    config: &PodSandboxConfig,
    netns: &str,
) -> Result<Value, SandboxError> {
    let linux = config.linux.get_or_default();
    let options = linux.security_context.get_or_default();
    let options = options.namespace_options.get_or_default();
    check_namespaces(options)?;
    if !netns.is_empty() && !Path::new(netns).is_absolute() {
        return Err(SandboxError::invalid("network namespace", netns));
    }
    let mut network = json!({ "type": "network" });
    if !netns.is_empty() {
        network["path"] = netns.into();
    }
    let mut namespaces = vec![network];
    let own = ["pid", "ipc", "uts", "mount", "cgroup"];
    namespaces.extend(own.map(|kind| json!({ "type": kind })));

    let mut sysctls: Map<String, Value> = [UNPRIVILEGED_PORTS, UNPRIVILEGED_PING]
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value.into()))
        .collect();
    let mut described = json!({
        "cgroupsPath": cgroups_path(&linux.cgroup_parent, id),
        "resources": {},
    });
    if let Some((uids, gids)) = mappings(options.userns_options.as_ref())? {
        namespaces.push(json!({ "type": "user" }));
        described["uidMappings"] = uids;
        described["gidMappings"] = gids;
        // Which has no such groups.
        sysctls.remove(UNPRIVILEGED_PING.0);
    }
    let given = linux.sysctls.iter();
    sysctls.extend(given.map(|(name, value)| (name.clone(), value.as_str().into())));
    described["namespaces"] = namespaces.into();
    described["sysctl"] = sysctls.into();
    Ok(json!({
        "ociVersion": "1.1.0",
        "process": {
            "user": { "uid": USER, "gid": USER },
            "args": ["pause"],
            "cwd": "/",
            "noNewPrivileges": true,
            "capabilities": {},
            "oomScoreAdj": OOM_SCORE_ADJ,
        },
        "root": { "path": "rootfs", "readonly": true },
        "hostname": hostname(&config.hostname)?,
        "annotations": annotations(id, config),
        "linux": described,
    }))
}

fn check_namespaces(options: &NamespaceOption) -> Result<(), SandboxError> {
    check_own("network", options.network)?;
    check_own("pid", options.pid)?;
    check_own("ipc", options.ipc)
}

/// The pod's name for itself; the host's if it has none.
fn hostname(given: &str) -> Result<String, SandboxError> {
    if given.contains(char::is_control) {
        return Err(SandboxError::invalid("host name", format!("{given:?}")));
    }
    if !given.is_empty() {
        return Ok(given.to_owned());
    }
    let uname = rustix::system::uname();
    Ok(uname.nodename().to_string_lossy().into_owned())
}

/// Where CRI puts the cgroup of a sandbox; empty for nowhere in particular.
fn cgroups_path(parent: &str, id: &str) -> String {
    let base = parent.rsplit('/').next().unwrap_or_default();
    if base.ends_with(".slice") {
        format!("{base}:{CGROUP_PREFIX}:{id}")
    } else if parent.is_empty() {
        String::new()
    } else {
        Path::new(parent).join(id).display().to_string()
    }
}

/// What CRI notes for the runtime of a pause container, and what of the pod's annotations is for
/// Bulkhead. Any other could be mistaken for the former.
fn annotations(id: &str, config: &PodSandboxConfig) -> Map<String, Value> {
    let given = config.annotations.iter();
    let given = given.filter(|(name, _)| name.starts_with(config::ANNOTATION_PREFIX));
    let mut all: Map<String, Value> = given
        .map(|(name, value)| (name.clone(), value.as_str().into()))
        .collect();
    all.insert("io.kubernetes.cri.container-type".into(), "sandbox".into());
    all.insert("io.kubernetes.cri.sandbox-id".into(), id.into());
    if let Some(limits) = config.linux.get_or_default().resources.as_ref() {
        for (name, value) in [
            (sizing::SANDBOX_PERIOD, limits.cpu_period),
            (sizing::SANDBOX_QUOTA, limits.cpu_quota),
            (sizing::SANDBOX_MEMORY, limits.memory_limit_in_bytes),
        ] {
            all.insert(name.to_owned(), value.to_string().into());
        }
    }
    all
}

/// Users and groups of the pod's user namespace, if it has one.
fn mappings(users: Option<&UserNamespace>) -> Result<Option<(Value, Value)>, SandboxError> {
    let Some(users) = users else {
        return Ok(None);
    };
    let invalid = |reason: String| Err(SandboxError::invalid("user namespace", reason));
    let none = users.uids.is_empty() && users.gids.is_empty();
    match users.mode.enum_value() {
        Ok(NamespaceMode::NODE) if none => Ok(None),
        Ok(NamespaceMode::NODE) => invalid("mappings without a namespace".into()),
        Ok(NamespaceMode::POD) if users.uids.is_empty() || users.gids.is_empty() => {
            invalid("no mappings".into())
        }
        Ok(NamespaceMode::POD) => Ok(Some((listed(&users.uids), listed(&users.gids)))),
        Ok(mode) => invalid(format!("it cannot be of the mode {mode:?}")),
        Err(number) => invalid(format!("there is no mode {number}")),
    }
}

fn listed(mappings: &[IDMapping]) -> Value {
    let mappings = mappings.iter().map(|mapping| {
        json!({
            "containerID": mapping.container_id,
            "hostID": mapping.host_id,
            "size": mapping.length,
        })
    });
    mappings.collect()
}

/// Puts a sandbox's PID into the specification of a container that names its namespaces without.
pub fn name_sandbox(spec: &mut Value, pid: u32) {
    let namespaces = spec["linux"]["namespaces"].as_array_mut();
    for namespace in namespaces.into_iter().flatten() {
        let path = namespace["path"].as_str().unwrap_or_default();
        if let Some(name) = path.strip_prefix(FORGOTTEN) {
            namespace["path"] = format!("/proc/{pid}/ns/{name}").into();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::HashMap, path::Path};

    use protobuf::{EnumOrUnknown, Message, MessageField, well_known_types::any::Any};

    use super::{super::config::decode, *};
    use crate::{
        config::Config,
        sizing::{Machine, fit},
        spec::Spec,
    };

    /// The encoding of a `PodSandboxConfig` with a field that is not known here.
    fn encoded(config: &PodSandboxConfig) -> Any {
        let mut value = config.write_to_bytes().unwrap();
        // `log_directory`, a string.
        value.extend([3 << 3 | 2, 4]);
        value.extend(b"/log");
        Any {
            type_url: "runtime.v1.PodSandboxConfig".into(),
            value,
            ..Any::default()
        }
    }

    fn config(change: impl FnOnce(&mut PodSandboxConfig)) -> PodSandboxConfig {
        let mut config = PodSandboxConfig {
            hostname: "web".into(),
            ..PodSandboxConfig::default()
        };
        config.linux.mut_or_insert_default().cgroup_parent = "/kubepods/podx".into();
        change(&mut config);
        config
    }

    fn made(config: &PodSandboxConfig) -> Result<Value, String> {
        let config = decode(&encoded(config)).map_err(|error| error.to_string())?;
        specification("s1", &config, "/run/netns/n").map_err(|error| error.to_string())
    }

    fn options(config: &mut PodSandboxConfig) -> &mut NamespaceOption {
        let linux = config.linux.mut_or_insert_default();
        let context = linux.security_context.mut_or_insert_default();
        context.namespace_options.mut_or_insert_default()
    }

    #[test]
    fn a_pod_becomes_a_container_that_holds_its_namespaces() {
        let config = config(|config| {
            let linux = config.linux.mut_or_insert_default();
            linux.sysctls = HashMap::from([
                ("kernel.shm_rmid_forced".to_owned(), "1".to_owned()),
                (UNPRIVILEGED_PORTS.0.to_owned(), "80".to_owned()),
            ]);
        });
        let spec = made(&config).unwrap();
        assert_eq!(spec["hostname"], "web");
        let linux = &spec["linux"];
        assert_eq!(linux["cgroupsPath"], "/kubepods/podx/s1");
        assert_eq!(linux["namespaces"][0]["path"], "/run/netns/n");
        let kinds = linux["namespaces"].as_array().unwrap().iter();
        let kinds: Vec<_> = kinds.map(|one| one["type"].as_str().unwrap()).collect();
        assert_eq!(kinds, ["network", "pid", "ipc", "uts", "mount", "cgroup"]);
        assert_eq!(
            linux["sysctl"],
            json!({
                "kernel.shm_rmid_forced": "1",
                "net.ipv4.ip_unprivileged_port_start": "80",
                "net.ipv4.ping_group_range": "0 2147483647",
            })
        );
        let parsed = Spec::parse(spec.to_string().as_bytes(), Path::new("c")).unwrap();
        assert_eq!(parsed.group("s1").unwrap(), "s1");
    }

    #[test]
    fn its_limits_make_the_size_of_its_vm() {
        let config = config(|config| {
            let linux = config.linux.mut_or_insert_default();
            let limits = linux.resources.mut_or_insert_default();
            (limits.cpu_period, limits.cpu_quota) = (100_000, 250_000);
            limits.memory_limit_in_bytes = 1 << 30;
        });
        let spec = made(&config).unwrap();
        let spec = Spec::parse(spec.to_string().as_bytes(), Path::new("c")).unwrap();
        let machine = Machine {
            cpus: 8,
            memory_mib: 8192,
        };
        let sized = fit(Config::default(), &spec, &machine);
        assert_eq!((sized.vcpus, sized.memory_mib), (3, 1152));
    }

    #[test]
    fn annotations_for_others_are_not_taken() {
        let config = config(|config| {
            for (name, value) in [
                ("io.bulkhead.vcpus", "2"),
                ("io.containerd.runc.v2.group", "other"),
                ("io.kubernetes.cri.sandbox-id", "other"),
                ("io.kubernetes.cri.sandbox-memory", "1"),
            ] {
                config.annotations.insert(name.into(), value.into());
            }
        });
        let spec = made(&config).unwrap();
        assert_eq!(
            spec["annotations"],
            json!({
                "io.bulkhead.vcpus": "2",
                "io.kubernetes.cri.container-type": "sandbox",
                "io.kubernetes.cri.sandbox-id": "s1",
            })
        );
    }

    #[test]
    fn user_namespaces_have_the_pods_ids() {
        let mapping = IDMapping {
            host_id: 65_536,
            container_id: 0,
            length: 65_536,
            ..IDMapping::default()
        };
        let with = |mode: i32, mappings: Vec<IDMapping>| {
            made(&config(|config| {
                options(config).userns_options = MessageField::some(UserNamespace {
                    mode: EnumOrUnknown::from_i32(mode),
                    uids: mappings.clone(),
                    gids: mappings,
                    ..UserNamespace::default()
                });
            }))
        };
        let spec = with(0, vec![mapping.clone()]).unwrap();
        let expected = json!([{ "containerID": 0, "hostID": 65_536, "size": 65_536 }]);
        assert_eq!(spec["linux"]["uidMappings"], expected);
        assert_eq!(spec["linux"]["gidMappings"], expected);
        assert_eq!(spec["linux"]["namespaces"][6], json!({ "type": "user" }));
        assert!(spec["linux"]["sysctl"][UNPRIVILEGED_PING.0].is_null());
        assert!(with(2, vec![]).unwrap()["linux"]["uidMappings"].is_null());
        for (mode, mappings) in [(0, vec![]), (2, vec![mapping.clone()]), (1, vec![mapping])] {
            let error = with(mode, mappings).unwrap_err();
            assert!(error.contains("user namespace is invalid"), "{error}");
        }
    }

    #[test]
    fn what_a_vm_cannot_be_is_refused() {
        let mode = |mode| EnumOrUnknown::from_i32(mode);
        for (change, wanted) in [
            (
                (|options, mode| options.network = mode)
                    as fn(&mut NamespaceOption, EnumOrUnknown<NamespaceMode>),
                "network",
            ),
            (|options, mode| options.pid = mode, "pid"),
            (|options, mode| options.ipc = mode, "ipc"),
        ] {
            let with = |number| made(&config(|config| change(options(config), mode(number))));
            assert!(with(1).is_ok());
            let error = with(2).unwrap_err();
            let expected = format!("host {wanted} namespace cannot be honoured in a microVM");
            assert!(error.contains(&expected), "{error}");
            assert!(with(3).is_err() && with(9).is_err());
        }
        assert!(made(&config(|config| config.hostname = "a\nb".into())).is_err());
        assert!(specification("s1", &PodSandboxConfig::default(), "n").is_err());
        let other = Any {
            type_url: "runtime.v1alpha2.PodSandboxConfig".into(),
            ..Any::default()
        };
        assert!(matches!(decode(&other), Err(SandboxError::Type(_))));
        let mut broken = encoded(&config(|_| {}));
        broken.value.truncate(3);
        assert!(matches!(decode(&broken), Err(SandboxError::Decode(_))));
        assert!(decode(&Any::default()).is_ok());
    }

    #[test]
    fn cgroups_are_where_containerd_has_them() {
        assert_eq!(cgroups_path("", "s"), "");
        assert_eq!(cgroups_path("/kubepods/podx", "s"), "/kubepods/podx/s");
        assert_eq!(
            cgroups_path("/kubepods.slice/kubepods-podx.slice", "s"),
            "kubepods-podx.slice:cri-containerd:s"
        );
    }

    #[test]
    fn a_forgotten_sandbox_is_named_again() {
        let mut spec = json!({ "linux": { "namespaces": [
            { "type": "network", "path": "/proc/0/ns/net" },
            { "type": "ipc", "path": "/proc/7/ns/ipc" },
            { "type": "pid" },
        ] } });
        name_sandbox(&mut spec, 42);
        assert_eq!(
            spec["linux"]["namespaces"],
            json!([
                { "type": "network", "path": "/proc/42/ns/net" },
                { "type": "ipc", "path": "/proc/7/ns/ipc" },
                { "type": "pid" },
            ])
        );
    }
}
